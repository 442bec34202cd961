"""From any state of Clerk and any of the tables, one reconcile ends with the two in step.

Webhooks come before, while and after it runs, late, twice and out of order. What this cannot
promise is left out below, where it says why.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, Final, Literal

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from clerk_sync.outcomes import Ending
from tests.histories import Committing
from tests.walking import MARKING, NAMES, REMOVING, TABLE, Walking, prepare, walking

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from clerk_sync.mapping.change import Change
    from clerk_sync.store.store import Store

USERS: Final = ("user_a", "user_A", "user_b", "user_c")
ORGANIZATIONS: Final = ("org_1", "org_2")
MEMBERS: Final = {
    "orgmem_1": ("user_a", "org_1"),
    "orgmem_2": ("user_b", "org_1"),
    "orgmem_3": ("user_a", "org_2"),
    "orgmem_4": ("user_A", "org_2"),
    "orgmem_5": ("user_c", "org_2"),
}
IDS: Final = (*USERS, *ORGANIZATIONS, *MEMBERS)
KIND: Final = (
    dict.fromkeys(USERS, "user")
    | dict.fromkeys(ORGANIZATIONS, "organization")
    | dict.fromkeys(MEMBERS, "organizationMembership")
)
COLUMN: Final = {"user": "username", "organization": "name", "organizationMembership": "role"}
LONG_AGO: Final = "2023-11-15 23:13:20"
YEARS_MS: Final = 10**11

What = Literal["create", "update", "delete"]
# What becomes of a webhook: it was delivered at once, is on its way, or was lost for good.
Fate = Literal["delivered", "late", "lost"]
Damage = Literal[
    "row missing",
    "column altered",
    "ends altered",
    "row back",
    "no state",
    "state older",
    "state ahead",
    "marked by hand",
    "unmarked by hand",
]


@dataclass(frozen=True)
class Step:
    """Something that happens in Clerk, if it can."""

    what: What
    clerk_id: str
    fate: Fate


@dataclass(frozen=True)
class Meanwhile:
    """What happens while a page is answered; `late` webhooks arrive then, too."""

    path: str
    page: int
    old: bool
    steps: tuple[Step, ...]
    late: int


@dataclass(frozen=True)
class Story:
    """A whole example. `fates` are those of everything's creation, None being never created."""

    fates: Sequence[Fate | None]
    before: Sequence[Step]
    damages: Sequence[tuple[Damage, str]]
    meanwhile: Sequence[Meanwhile]
    seed: int
    most: int
    marking: bool
    cascades: bool


def steps(*fates: Fate) -> st.SearchStrategy[Step]:
    whats = st.sampled_from(["create", "update", "update", "delete"])
    return st.builds(Step, whats, st.sampled_from(IDS), st.sampled_from(fates))


PLACES: Final = (
    *(("/v1/users", page) for page in (1, 2, 3)),
    *(("/v1/users/count", page) for page in (1, 2, 3)),
    *(("/v1/organizations", page) for page in (1, 2, 3, 4)),
    *(("/v1/organization_memberships", page) for page in (1, 2, 3, 4)),
    *((f"/v1/users/{user}", 1) for user in USERS),
    *((f"/v1/organizations/{one}/memberships", 1) for one in ORGANIZATIONS),
)


@st.composite
def meanwhiles(draw: st.DrawFn) -> Meanwhile:
    path, page = draw(st.sampled_from(PLACES))
    what = draw(st.lists(steps("delivered", "late"), min_size=1, max_size=3))
    return Meanwhile(path, page, draw(st.booleans()), tuple(what), draw(st.integers(0, 3)))


stories: Final = st.builds(
    Story,
    fates=st.lists(
        st.sampled_from(["delivered", "delivered", "delivered", "late", "lost", None]),
        min_size=len(IDS),
        max_size=len(IDS),
    ),
    before=st.lists(steps("delivered", "late", "lost"), min_size=2, max_size=10),
    damages=st.lists(
        st.tuples(st.sampled_from(Damage.__args__), st.sampled_from(IDS)),  # type: ignore[attr-defined]
        min_size=3,
        max_size=12,
    ),
    meanwhile=st.lists(meanwhiles(), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    # Of users that came at different times, two fit on the smallest page that can be walked.
    most=st.sampled_from([2, 3, 500]),
    marking=st.booleans(),
    cascades=st.booleans(),
)


@dataclass
class World:
    """Clerk, the tables, and the webhooks between them."""

    walking: Walking
    committing: Committing
    chance: Random
    delivered: list[Change] = field(default_factory=list)
    late: list[Change] = field(default_factory=list)
    born: set[str] = field(default_factory=set)
    ahead: set[str] = field(default_factory=set)
    over: bool = False
    failures: list[BaseException] = field(default_factory=list)
    _number: int = 0

    def there(self, clerk_id: str) -> bool:
        api = self.walking.api
        return clerk_id in {**api.users, **api.organizations, **api.memberships}

    def happens(self, what: str, clerk_id: str) -> list[Change]:
        """Let it happen in Clerk, if it can; the webhooks that this makes."""
        api = self.walking.api
        known = len(api.events)
        self._number += 1
        value = {COLUMN[KIND[clerk_id]]: f"v{self._number}"}
        ends = MEMBERS.get(clerk_id, ())
        if what == "create" and clerk_id not in self.born and all(map(self.there, ends)):
            self.born.add(clerk_id)
            if clerk_id in MEMBERS:
                api.put_membership(clerk_id, *ends, **value)
            elif clerk_id in USERS:
                api.put_user(clerk_id, **value)
            else:
                api.put_organization(clerk_id, **value)
        # Where Clerk moves while a forged version is being asked about, the next run mends it.
        elif what == "update" and self.there(clerk_id) and clerk_id not in self.ahead:
            api.update(clerk_id, **value)
        elif what == "delete" and self.there(clerk_id):
            api.delete(clerk_id)
        return [self.walking.change(event) for event in api.events[known:]]

    async def before(self, step: Step) -> None:
        webhooks = self.happens(step.what, step.clerk_id)
        if step.fate == "delivered" and webhooks:
            await self.walking.database.apply(self.walking.store, *webhooks)
            self.delivered += webhooks
        elif step.fate == "late":
            self.late += webhooks
        else:
            # Where only a delete is lost and what came before it is not, nothing that is there
            # during the run tells of either. The next one deletes what came.
            self.late = [late for late in self.late if not self._is_gone(late)]

    def _is_gone(self, late: Change) -> bool:
        clerk_id = late.clerk_id or ""
        return not all(map(self.there, (clerk_id, *MEMBERS.get(clerk_id, ()))))

    async def deliver(self, webhooks: Sequence[Change]) -> None:
        """Deliver these, and some that came before, in any order."""
        again = self.chance.sample(self.delivered, min(2, len(self.delivered)))
        self.delivered += webhooks
        deliveries = [*webhooks, *again]
        self.chance.shuffle(deliveries)
        answers = await self.committing.commit(*deliveries)
        assert set(answers) <= {"applied", "stale", "duplicate"}, answers

    def arriving(self, number: int) -> list[Change]:
        self.chance.shuffle(self.late)
        return [self.late.pop() for _ in range(min(number, len(self.late)))]

    async def meanwhile(self, what: Meanwhile) -> None:
        if self.over:
            return
        try:
            webhooks = []
            for step in what.steps:
                made = self.happens(step.what, step.clerk_id)
                if step.fate == "delivered":
                    webhooks += made
                else:
                    self.late += made
            await self.deliver([*webhooks, *self.arriving(what.late)])
        except BaseException as error:  # or the stand-in would answer with 500
            self.failures.append(error)
            raise

    async def damage(self, what: Damage, clerk_id: str) -> None:
        kind = KIND[clerk_id]
        column, table = COLUMN[kind], TABLE[kind]
        row = f"WHERE clerk_id = '{clerk_id}'"
        # A tombstone is for good, as Clerk's ids are.
        state = f"WHERE kind = '{kind}' AND clerk_id = '{clerk_id}' AND deleted_at IS NULL"
        execute = self.walking.database.execute
        match what:
            case "row missing":
                await execute(f"DELETE FROM {table} {row}")
            case "column altered":
                await execute(f"UPDATE {table} SET {column} = 'by hand' {row}")
            case "ends altered" if clerk_id in MEMBERS:
                user = self.chance.choice(USERS)
                await execute(f"UPDATE members SET user_id = '{user}' {row}")
            case "row back" if not self.there(clerk_id):
                self.born.add(clerk_id)  # for Clerk's next object gets an id of its own
                await self._back(clerk_id, table, column)
            case "no state":
                await execute(f"DELETE FROM clerk_sync_entities {state}")
            case "state older":
                set_ = "version_ms = version_ms - 1500, event_ms = event_ms - 1500"
                await execute(f"UPDATE clerk_sync_entities SET {set_} {state} AND version_ms > 0")
            case "state ahead" if self.there(clerk_id):
                self.ahead.add(clerk_id)
                set_ = f"version_ms = version_ms + {YEARS_MS}, synced_at = '{LONG_AGO}'"
                await execute(
                    f"UPDATE clerk_sync_entities SET {set_} {state}",
                    f"UPDATE {table} SET {column} = 'by hand' {row}",
                )
            case "marked by hand" if kind == "user" and self.marking and self.there(clerk_id):
                await execute(f"UPDATE {table} SET deleted_at = '{LONG_AGO}' {row}")
            case "unmarked by hand" if kind == "user" and self.marking:
                await execute(f"UPDATE {table} SET deleted_at = NULL {row}")

    async def _back(self, clerk_id: str, table: str, column: str) -> None:
        row: dict[str, Any] = {"clerk_id": clerk_id, column: "back"}
        if clerk_id in MEMBERS:
            row["user_id"], row["organization_id"] = MEMBERS[clerk_id]
        values = ", ".join(map(repr, row.values()))
        database = self.walking.database
        if not await database.rows(f"SELECT 1 FROM {table} WHERE clerk_id = '{clerk_id}'"):
            await database.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({values})")

    @property
    def marking(self) -> bool:
        return self.walking.mapping is MARKING

    def wanted(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """What Clerk has, in the columns that are mapped."""
        api = self.walking.api
        return {
            "people": {one["id"]: (one["username"],) for one in api.users.values()},
            "organizations": {one["id"]: (one["name"],) for one in api.organizations.values()},
            "members": {
                one["id"]: (
                    one["role"],
                    one["public_user_data"]["user_id"],
                    one["organization"]["id"],
                )
                for one in api.memberships.values()
            },
        }

    async def present(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """What the tables have that is not marked."""
        columns = ("username", "name", "role, user_id, organization_id")
        found = {}
        for name, column in zip(NAMES, columns, strict=True):
            unmarked = " WHERE deleted_at IS NULL" if name == "people" else ""
            rows = await self.walking.database.rows(
                f"SELECT clerk_id, {column} FROM {name}{unmarked}"
            )
            found[name] = {clerk_id: tuple(values) for clerk_id, *values in rows}
        return found

    async def tombstones(self) -> set[str]:
        query = "SELECT clerk_id FROM clerk_sync_entities WHERE deleted_at IS NOT NULL"
        return {clerk_id for (clerk_id,) in await self.walking.database.rows(query)}


async def check(url: str, stores: Mapping[bool, Store], story: Story) -> None:
    # Whom a mark ends keeps the memberships that Clerk does not tell of: until the next run.
    options = {"tells_of_cascades": story.cascades or story.marking, "most": story.most}
    mapping = MARKING if story.marking else REMOVING
    async with (
        walking(url, mapping, store=stores[story.marking], **options) as open_,
        Committing(open_.database, open_.store) as committing,
    ):
        world = World(open_, committing, Random(story.seed))
        for fate, clerk_id in zip(story.fates, IDS, strict=True):
            if fate is not None:
                await world.before(Step("create", clerk_id, fate))
        for step in story.before:
            await world.before(step)
        for what, clerk_id in story.damages:
            await world.damage(what, clerk_id)
        for one in story.meanwhile:
            hook = open_.api.before_send if one.old else open_.api.before_read
            hook(one.page, partial(world.meanwhile, one), path=one.path)
        await open_.reconcile()
        world.over = True
        assert not world.failures
        await world.deliver(world.arriving(len(world.late)))
        present = await world.present()
        assert present == world.wanted()
        gone = await world.tombstones()
        assert not gone & {clerk_id for rows in present.values() for clerk_id in rows}
        written = await open_.written()
        ending, report = await open_.reconcile()
        assert (ending, report.drifted) == (Ending.IN_STEP, 0)
        assert await open_.written() == written


@pytest.fixture(scope="module")
def prepared(shared_url: str) -> tuple[str, Mapping[bool, Store]]:
    return shared_url, asyncio.run(prepare(shared_url))


def corner(
    *damages: tuple[Damage, str],
    before: Sequence[Step] = (),
    meanwhile: Sequence[Meanwhile] = (),
    marking: bool = False,
) -> Story:
    """Everything was created and delivered."""
    fates: list[Fate] = ["delivered"] * (len(IDS) - 1)
    return Story([*fates, None], before, damages, meanwhile, 1, 2, marking, cascades=False)


DAMAGED: Final[tuple[tuple[Damage, str], ...]] = (
    ("row missing", "user_a"),
    ("column altered", "user_A"),
    ("no state", "user_b"),
    ("column altered", "user_b"),
    ("state ahead", "org_1"),
    ("state older", "org_2"),
    ("ends altered", "orgmem_1"),
    ("row missing", "orgmem_2"),
    ("state ahead", "orgmem_3"),
    ("row back", "user_c"),
    ("row back", "orgmem_5"),
    ("unmarked by hand", "user_c"),
)
GONE: Final = (Step("delete", "user_c", "delivered"),)


def then(path: str, what: What, clerk_id: str, *, old: bool = False) -> Meanwhile:
    """One step and its webhook, around the second page of a path."""
    return Meanwhile(path, 2, old, (Step(what, clerk_id, "delivered"),), 1)


# After the page, and before what the walk missed is asked for.
BEHIND: Final = (
    then("/v1/users/count", "create", "orgmem_5"),
    then("/v1/users/count", "delete", "user_a"),
    then("/v1/users/count", "update", "user_b"),
)
OUTRUN: Final = (
    then("/v1/users", "delete", "user_A", old=True),
    then("/v1/organizations", "update", "org_2", old=True),
    then("/v1/organization_memberships", "delete", "orgmem_1", old=True),
    then("/v1/organization_memberships", "delete", "user_a", old=True),
)


@given(story=stories)
@example(story=corner(*DAMAGED, before=GONE))
@example(story=corner(*DAMAGED, before=GONE, marking=True))
@example(story=corner(meanwhile=BEHIND))
@example(story=corner(*DAMAGED[:7], meanwhile=OUTRUN))
@settings(
    max_examples=16,
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
def test_one_reconcile_ends_in_step(
    prepared: tuple[str, Mapping[bool, Store]], story: Story
) -> None:
    asyncio.run(check(*prepared, story))
