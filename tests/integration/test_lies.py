"""Clerk's API, or what answers in its place, says what is not so, in any way.

A walk ends, nothing that is alive is deleted, and only where both sides agree it is a success.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from clerk_sync.clerk.api import ClerkUnavailable
from clerk_sync.outcomes import Ending
from clerk_sync.sync.safety import SafetyStop
from tests import clerk_api
from tests.clerk_api import Lies
from tests.walking import Walking, prepare, walking

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping

    from clerk_sync.store.store import Store

BORN: Final = 1_700_000_000_000
KINDS: Final = ("user", "organization", "organizationMembership")
FINE: Final = (Ending.IN_STEP, Ending.MENDED)


@pytest.fixture(scope="module")
def stores(shared_url: str) -> Mapping[bool, Store]:
    return asyncio.run(prepare(shared_url))


@pytest.fixture
async def anywhere(shared_url: str, stores: Mapping[bool, Store]) -> AsyncIterator[Walking]:
    """Where it may matter which database it is."""
    async with walking(shared_url, store=stores[False]) as world:
        yield world


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Store]:
    url = f"sqlite:///{tmp_path_factory.mktemp('lies')}/clerk-sync.db"
    return url, asyncio.run(prepare(url))[False]


@pytest.fixture
async def world(embedded: tuple[str, Store]) -> AsyncIterator[Walking]:
    async with walking(embedded[0], store=embedded[1], most=50) as world:
        yield world


def put(world: Walking, kind: str, number: int, *, ties: int = 1) -> list[str]:
    """So many of a kind, `ties` of them of one moment; who is a member is there, too."""
    api = world.api
    made = []
    for n in range(number):
        born = BORN + n // ties * 1000
        if kind == "user":
            api.put_user(f"user_{n:05}", username="ada", created_at=born)
        elif kind == "organization":
            api.put_organization(f"org_{n:05}", name="one", created_at=born)
        else:
            if not api.organizations:
                api.put_organization("org_00000", name="one", created_at=BORN)
            api.put_user(f"user_{n:05}", username="ada", created_at=born)
            api.put_membership(
                f"orgmem_{n:05}", f"user_{n:05}", "org_00000", role="admin", created_at=born
            )
        made.append({"user": "user", "organization": "org"}.get(kind, "orgmem") + f"_{n:05}")
    return made


async def in_step(world: Walking, kind: str, number: int) -> list[str]:
    """So many of a kind on both sides."""
    ids = put(world, kind, number)
    await world.deliver(*world.api.events)
    return ids


# 404, and what is none


def code(value: object) -> tuple[int, bytes]:
    errors = [{"code": value, "message": "not found", "long_message": "not found"}]
    return 404, clerk_api.bytes_of({"errors": errors})


NO_WORDS: Final = [
    (200, b'{"status":"maintenance"}'),
    (200, b'{"errors":[{"code":"resource_not_found","message":"","long_message":""}]}'),
    (200, b'{"data":{"object":"organization","id":"org_00003"}}'),
    (200, b'{"object":"organization","id":"ORG_00003"}'),
    (200, b'{"object":"organization_membership","id":"org_00003"}'),
    *map(code, (None, 404, 0, "host_invalid", "route_not_found")),
    (404, b"<html>not found</html>"),
    (410, code("resource_not_found")[1]),
]


@pytest.mark.parametrize("answer", NO_WORDS)
@pytest.mark.parametrize("kind", ["user", "organization"])
async def test_what_is_hidden_stays_unless_clerk_says_that_it_is_gone(
    world: Walking, kind: str, answer: tuple[int, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    ids = await in_step(world, kind, 30)
    hidden = ids[3]
    status, body = answer
    body = body.replace(b"org_00003", hidden.encode()).replace(
        b"ORG_00003", hidden.upper().encode()
    )
    body = body.replace(b'"organization"', f'"{kind}"'.encode())
    world.api.lies[kind] = Lies(hides=frozenset({hidden}), instead={hidden: (status, body)})
    for _ in range(2):
        ending, report = await world.reconcile()
        assert (ending, report.unconfirmed) == (Ending.UNMENDED, 1)
        assert await world.ids(kind) == ids
    line = next(one for one in capsys.readouterr().out.splitlines() if "unconfirmed " in one)
    assert kind in line
    assert hidden in line
    # In Clerk's own words it is gone.
    world.api.lies = {}
    world.api.delete(hidden)
    ending, report = await world.reconcile()
    assert (ending, report.unconfirmed) == (Ending.MENDED, 0)
    assert hidden not in await world.ids(kind)


MEMBERSHIP: Final = {
    "object": "organization_membership",
    "id": "orgmem_99999",
    "organization": {"id": "org_00000"},
    "public_user_data": {"user_id": "user_99999"},
}


@pytest.mark.parametrize(
    "answer",
    [
        {"data": []},
        {"data": [], "total_count": 30},
        {"data": [MEMBERSHIP], "total_count": 700},
        {"data": [MEMBERSHIP], "total_count": 1},
        {"status": "maintenance"},
    ],
)
async def test_a_membership_stays_unless_the_list_of_its_users_is_whole(
    world: Walking, answer: object
) -> None:
    kind = KINDS[2]
    ids = await in_step(world, kind, 30)
    instead = {"user_00003": (200, clerk_api.bytes_of(answer))}
    world.api.lies[kind] = Lies(hides=frozenset({ids[3]}), instead=instead)
    ending, report = await world.reconcile()
    assert (ending, report.unconfirmed) == (Ending.UNMENDED, 1)
    assert await world.ids(kind) == ids


async def test_a_list_that_does_not_look_at_the_user_deletes_nobody(anywhere: Walking) -> None:
    kind = KINDS[2]
    ids = await in_step(anywhere, kind, 30)
    anywhere.api.most = 10
    lies = Lies(hides=frozenset(ids[22:25]), ignores=frozenset({"user_id"}))
    anywhere.api.lies[kind] = lies
    ending, report = await anywhere.reconcile()
    assert (ending, report.unconfirmed) == (Ending.UNMENDED, 3)
    assert await anywhere.ids(kind) == ids


# Counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [1, 3, -1, -15, 15])
@pytest.mark.parametrize("command", ["backfill", "reconcile"])
async def test_a_count_that_is_wrong_is_no_success(
    world: Walking, kind: str, wrong: int, command: str
) -> None:
    ids = put(world, kind, 30)
    world.api.lies[kind] = Lies(count=lambda number: number + wrong)
    before = len(world.api.asked)
    if command == "backfill":
        ending, report = await world.backfill()
        assert ending is Ending.UNMENDED
        assert any(kind in doubt for doubt in report.discrepancies)
    elif abs(wrong) == 15:
        with pytest.raises(ClerkUnavailable, match="Clerk counts"):
            await world.reconcile()
    else:
        ending, report = await world.reconcile()
        assert ending is Ending.UNMENDED
        assert any(kind in doubt for doubt in report.discrepancies)
    assert len(world.api.asked) - before < 40
    # All that it lists is written all the same.
    assert await world.ids(kind) == ids


@pytest.mark.parametrize(("count", "size"), [(100, 240), (0, 60), (100, 104)])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_list_ends_where_it_ends_and_not_where_clerk_counts(
    world: Walking, kind: str, count: int, size: int
) -> None:
    ids = put(world, kind, size)
    world.api.lies[kind] = Lies(count=lambda _: count)
    ending, report = await world.backfill()
    assert ending is Ending.UNMENDED
    assert any(f"{count} {kind}s" in doubt for doubt in report.discrepancies)
    assert await world.ids(kind) == ids
    try:
        ending, _ = await world.reconcile()
    except (ClerkUnavailable, SafetyStop):
        ending = Ending.FAILED
    assert ending not in FINE
    assert await world.ids(kind) == ids


# The order of those of one moment


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ties", [240, 120, 30])
async def test_those_of_one_moment_may_come_in_any_order(
    world: Walking, kind: str, ties: int
) -> None:
    size = 240
    ids = put(world, kind, size, ties=ties)
    world.api.lies[kind] = Lies(shuffles=Random(ties))
    ending, _ = await world.backfill()
    assert ending is Ending.MENDED
    assert await world.ids(kind) == ids
    assert len(world.api.asked) < 120
    ending, _ = await world.reconcile()
    assert ending is Ending.IN_STEP


@pytest.mark.parametrize("ignored", ["starting_after", "offset"])
async def test_one_way_beyond_a_page_of_one_moment_is_enough(world: Walking, ignored: str) -> None:
    ids = put(world, "user", 120, ties=120)
    world.api.lies["user"] = Lies(ignores=frozenset({ignored}))
    ending, _ = await world.backfill()
    assert (ending, await world.ids("user")) == (Ending.MENDED, ids)


# Both sides


async def test_who_comes_and_goes_meanwhile_makes_no_run_fail(anywhere: Walking) -> None:
    """Without webhooks: what differs in the end is what came or went since it was looked at."""
    api = anywhere.api
    await in_step(anywhere, "user", 30)
    api.put_organization("org_1", name="one")

    def change() -> None:
        api.delete("user_00002")
        api.put_user("user_10000", username="new")
        api.put_user("user_10001", username="new")

    api.before_read(2, change, path="/v1/organizations")
    ending, report = await anywhere.reconcile()
    assert (ending, report.discrepancies) == (Ending.MENDED, [])
    assert {"user_10000", "user_10001"} <= {*await anywhere.ids("user")}


async def test_rows_that_are_no_clerks_stay_and_are_told(anywhere: Walking) -> None:
    ids = await in_step(anywhere, "user", 3)
    own = [*(f"admin{n}" for n in range(12)), "system", "user_x y"]
    rows = ", ".join(f"('{one}', 'own')" for one in own)
    await anywhere.database.execute(f"INSERT INTO people (clerk_id, username) VALUES {rows}")
    ending, report = await anywhere.reconcile()
    assert (ending, report.unmanaged["user"]) == (Ending.IN_STEP, 14)
    assert sorted(await anywhere.ids("user")) == sorted([*ids, *own])


@pytest.mark.parametrize("change", ["none", "by hand"])
async def test_without_a_time_of_its_own_what_is_the_same_is_in_step(
    anywhere: Walking, change: str
) -> None:
    ids = put(anywhere, "user", 3)
    for one in ids:
        anywhere.api.users[one]["updated_at"] = None
    assert (await anywhere.reconcile())[0] is Ending.MENDED
    if change == "by hand":
        await anywhere.database.execute("UPDATE people SET username = 'hand'")
        assert (await anywhere.reconcile())[0] is Ending.MENDED
    before = await anywhere.written()
    ending, report = await anywhere.reconcile()
    assert (ending, report.drifted) == (Ending.IN_STEP, 0)
    assert await anywhere.written() == before


async def test_another_instances_run_changes_nothing(anywhere: Walking) -> None:
    """Nine users are too few to tell by asking; the instance is known from the last run."""
    api = anywhere.api
    ids = put(anywhere, "user", 9)
    await anywhere.backfill()
    theirs, api.instance_id = dict(api.users), "ins_2xAnother"
    api.users.clear()
    others = [f"user_other{n}" for n in range(20)]
    for one in others:
        api.put_user(one, username="other")
    for run in (anywhere.backfill, anywhere.reconcile, anywhere.look):
        with pytest.raises(
            SafetyStop, match="ins_2xAnother, and the last run on this database names"
        ):
            await run()
        assert await anywhere.ids("user") == ids
    api.instance_id = "ins_2xStandIn"
    api.users.clear()
    api.users.update(theirs)
    assert (await anywhere.reconcile())[0] is Ending.IN_STEP


async def test_a_key_of_another_instance_than_the_settings_name(world: Walking) -> None:
    put(world, "user", 3)
    world.runs = replace(world.runs, instance="ins_2xOurs")
    with pytest.raises(SafetyStop, match="ins_2xStandIn, and CLERK_INSTANCE_ID names ins_2xOurs"):
        await world.backfill()
    assert await world.ids("user") == []


# Whatever it says


@dataclass(frozen=True)
class Story:
    """How many there are, which of them the tables have, and what is said of one kind."""

    size: int
    ties: int
    there: int
    gone: int
    kind: str
    lies: Lies
    most: int
    command: str


def counting(wrong: int | None, instead: int | None) -> Callable[[int], Any]:
    if instead is not None:
        return lambda _: instead
    return lambda number: None if wrong is None else number + wrong


numbers: Final = st.frozensets(st.integers(1, 8), max_size=3)
lies: Final = st.builds(
    Lies,
    count=st.one_of(
        st.just(counting(0, None)),
        st.builds(counting, st.sampled_from([0, 0, 1, 2, -1, -3, 40, None]), st.none()),
        st.builds(counting, st.none(), st.sampled_from([0, -1, 10, 10**9, 10**15])),
    ),
    ignores=st.frozensets(
        st.sampled_from(
            [
                *("starting_after", "offset", "created_at_after", "created_at_before"),
                *("order_by", "limit", "user_id"),
            ]
        ),
        max_size=3,
    ),
    shuffles=st.one_of(st.none(), st.builds(Random, st.integers(0, 99))),
    hides=st.frozensets(st.sampled_from(range(12)), max_size=3),
    empties=numbers,
    repeats=numbers,
    circles=st.booleans(),
    longer=st.sampled_from([0, 0, 0, 1, 7]),
    undated=st.frozensets(st.sampled_from(range(12)), max_size=3),
    instead=st.dictionaries(st.sampled_from(range(12)), st.sampled_from(NO_WORDS), max_size=3),
)
stories: Final = st.builds(
    Story,
    size=st.integers(0, 70),
    ties=st.sampled_from([1, 1, 3, 12, 70]),
    there=st.integers(0, 70),
    gone=st.integers(0, 5),
    kind=st.sampled_from(KINDS),
    lies=lies,
    # A smaller limit than was asked for, so that there are pages at all.
    most=st.sampled_from([10, 25, 500]),
    command=st.sampled_from(["backfill", "reconcile"]),
)


def named(ids: list[str], numbers: Iterable[Any]) -> frozenset[str]:
    return frozenset(ids[number] for number in numbers if number < len(ids))


async def check(url: str, store: Store, story: Story) -> None:
    async with walking(url, store=store, most=story.most) as world:
        api, kind = world.api, story.kind
        ids = put(world, kind, story.size, ties=story.ties)
        await world.deliver(*(api.events if kind != "user" else api.events[: story.there]))
        for one in ids[: story.gone]:
            api.delete(one)
        lies = replace(
            story.lies,
            hides=named(ids, story.lies.hides),
            undated=named(ids, story.lies.undated),
            instead={
                one.replace("orgmem", "user"): answer
                for number, answer in story.lies.instead.items()
                for one in named(ids, [number])
            },
        )
        # Where a count hides just those whom a list hides, nothing tells.
        if lies.hides:
            lies = replace(lies, count=lambda number: number)
        api.lies[kind] = lies
        before = {one: {*await world.ids(one)} for one in KINDS}
        try:
            async with asyncio.timeout(30):
                run = world.backfill if story.command == "backfill" else world.reconcile
                ending, _ = await run()
        except (ClerkUnavailable, SafetyStop):
            ending = Ending.FAILED
        # Of 70 in tens, some ways of sweeping and going back, and questions for each missed one.
        assert len(api.asked) < 700
        truth = {
            "user": {*api.users},
            "organization": {*api.organizations},
            "organizationMembership": {*api.memberships},
        }
        after = {one: {*await world.ids(one)} for one in KINDS}
        for one in KINDS:
            assert before[one] & truth[one] <= after[one]
        if ending in FINE:
            assert after == truth


# By number, as `stories` have them; `check` puts ids in their place.
some: Final[Any] = frozenset


def told(**how: Any) -> Story:
    return Story(60, 60, 20, 2, "user", Lies(**how), 10, "reconcile")


@given(story=stories)
@example(story=told(ignores=frozenset({"starting_after", "offset", "created_at_after"})))
@example(story=told(ignores=frozenset({"order_by"}), circles=True))
@example(
    story=Story(
        size=8,
        ties=1,
        there=2,
        gone=2,
        kind="user",
        lies=Lies(
            ignores=frozenset({"starting_after", "created_at_after"}),
            hides=some({4, 5}),
            undated=some({0, 2, 3}),
        ),
        most=10,
        command="backfill",
    )
)
@example(story=replace(told(shuffles=Random(1)), kind="organization"))
@example(story=replace(told(circles=True, count=lambda _: 10**15), kind="organization"))
@example(story=replace(told(ignores=frozenset({"offset"})), kind="organizationMembership"))
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    print_blob=True,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
def test_a_walk_ends_and_succeeds_only_where_both_sides_agree(
    embedded: tuple[str, Store], story: Story
) -> None:
    asyncio.run(check(*embedded, story))
