"""A reconcile: what it finds, what it mends, and all that it leaves alone."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest
import stamina

from clerk_sync.clerk.api import ClerkRefused, ClerkUnavailable
from clerk_sync.clerk.metrics import new_metrics
from clerk_sync.database.connection import connect
from clerk_sync.database.errors import DatabaseUnavailable
from clerk_sync.database.url import target_of
from clerk_sync.outcomes import Ending, Verdict
from clerk_sync.store.committer import Committer
from clerk_sync.store.lease import LeaseHeld, LeaseLost, held
from clerk_sync.sync import history
from clerk_sync.sync.reconcile import Reconcile
from clerk_sync.sync.repair import Repairer
from clerk_sync.sync.report import Report
from clerk_sync.sync.runs import LEASE, noop
from clerk_sync.sync.safety import SafetyStop
from tests.clerk_api import failing
from tests.histories import Database, mapped
from tests.walking import MARKING, PURGING, REMOVING, Walking, prepare, walking

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from clerk_sync.store.store import Store

DAY_MS: Final = 86_400_000
# Words that stand for types which SQLite does not have, or not so.
TYPES: Final = {
    "clerk_id": "VARCHAR(128) EXACT PRIMARY KEY",
    "text": "TEXT",
    "word": "VARCHAR(20)",
    "padded": "CHAR(8)",
    "choice": "ENUM('ada', 'bob')",
    "whole": "INTEGER",
    "big": "BIGINT UNSIGNED",
    "flag": "BOOLEAN",
    "price": "DECIMAL(12,2)",
    "ratio": "DOUBLE",
    "coarse": "FLOAT",
    "second": "DATETIME",
    "milli": "DATETIME(3)",
    "micro": "DATETIME(6)",
    "stamp": "TIMESTAMP NULL",
    "day": "DATE",
    "data": "JSON",
    "blank": "VARCHAR(20)",
}
ON_SQLITE: Final = {
    "choice": "TEXT",
    "milli": "DATETIME",
    "micro": "DATETIME",
    "stamp": "DATETIME",
}
EVERYTHING: Final = mapped(
    """
tables:
  user:
    table: everything
    key: clerk_id
    columns:
      text: public_metadata.text
      word: username
      padded: public_metadata.padded
      choice: public_metadata.choice
      whole: public_metadata.whole
      big: public_metadata.big
      flag: banned
      price: public_metadata.price
      ratio: public_metadata.ratio
      coarse: public_metadata.coarse
      second: last_sign_in_at
      milli: last_sign_in_at
      micro: last_sign_in_at
      stamp: last_sign_in_at
      day: last_sign_in_at
      data: {value: public_metadata, type: json}
      blank: external_id
"""
)
_ODD: Final = """
tables:
  user:
    table: %s
    key: clerk_id
    columns:
      bit: banned
      data: {value: public_metadata, type: json}
"""
ODD: Final = mapped(_ODD % "odd")
BYTES: Final = mapped(_ODD % "bytes")
# A table of the app's with a unique name, and what a delete frees there.
UNIQUE: Final = """CREATE TABLE unique_people (
    clerk_id VARCHAR(128) EXACT PRIMARY KEY, username VARCHAR(8) UNIQUE, name VARCHAR(8),
    deleted_at DATETIME, active INTEGER DEFAULT 1
) OPTIONS"""
SETTING: Final = mapped("""
tables:
  user:
    table: unique_people
    key: clerk_id
    columns: {username: username, name: first_name}
    on_delete: {mark: deleted_at, set: {username: null, active: 0}}
""")
# Another value of each, as close as the column can tell.
BY_HAND: Final = {
    "text": "'Text'",
    "word": "'ADA'",
    "padded": "'adb'",
    "choice": "'bob'",
    "whole": "-8",
    "big": "4611686018427387906",
    "flag": "0",
    "price": "1234567.90",
    "ratio": "0.3333334",
    "coarse": "2.7181",
    "second": "'2023-11-14 22:13:18'",
    "milli": "'2023-11-14 22:13:20.987'",
    "micro": "'2023-11-14 22:13:20.989'",
    "stamp": "'2023-11-14 22:13:18'",
    "day": "'2023-11-13'",
    "blank": "''",
}
METADATA: Final = {
    "text": "text with ümlaut, 🎈 and an end ",
    "padded": "ada",
    "choice": "ada",
    "whole": -7,
    "big": 2**62 + 1,
    "price": 1234567.89,
    "ratio": 1 / 3,
    "coarse": 2.71828,
    "zz": {"b": [1, 2.5, None, True], "a": "é", "aaa": {}},
}


@pytest.fixture(scope="module")
def stores(shared_url: str) -> Mapping[bool, Store]:
    return asyncio.run(prepare(shared_url))


@pytest.fixture
async def world(shared_url: str, stores: Mapping[bool, Store]) -> AsyncIterator[Walking]:
    async with walking(shared_url, store=stores[False]) as world:
        yield world


@pytest.fixture
async def marking(shared_url: str, stores: Mapping[bool, Store]) -> AsyncIterator[Walking]:
    async with walking(shared_url, MARKING, store=stores[True]) as world:
        yield world


async def users(world: Walking, number: int, *, gone: int = 0, first: int = 0) -> None:
    """So many users in step, but that some are gone from Clerk, and nobody told."""
    ids = [f"user_{n:04}" for n in range(first, first + number)]
    await world.deliver(*(world.api.put_user(one, username="ada") for one in ids))
    for one in ids[:gone]:
        world.api.delete(one)


async def member(world: Walking, clerk_id: str = "m_1") -> None:
    await world.deliver(
        world.api.put_user("user_a", username="ada"),
        world.api.put_organization("org_1", name="one"),
        world.api.put_membership(clerk_id, "user_a", "org_1", role="admin"),
    )


async def ahead(world: Walking, clerk_id: str, *, synced_at: str = "2023-11-15 23:13:20") -> None:
    await world.database.execute(
        f"UPDATE clerk_sync_entities SET version_ms = version_ms + {DAY_MS},"
        f" synced_at = '{synced_at}' WHERE clerk_id = '{clerk_id}'"
    )


async def names(world: Walking) -> dict[str, str]:
    return dict(await world.database.rows("SELECT clerk_id, username FROM people"))


def verdicts(report: Report, kind: str = "user") -> dict[Verdict, int]:
    return dict(report.tallies[kind].found)


# What it finds


async def test_each_verdict_is_found_and_mended(world: Walking) -> None:
    api, database = world.api, world.database
    known = ("same", "outdated", "drifted", "gone", "lost", "ahead", "newer")
    await world.deliver(*(api.put_user(one, username=one) for one in known))
    api.update("outdated", username="updated")
    await database.execute(
        "UPDATE people SET username = 'by hand' WHERE clerk_id IN ('drifted', 'ahead', 'newer')",
        "DELETE FROM people WHERE clerk_id = 'lost'",
    )
    api.delete("gone")
    await ahead(world, "ahead")
    await ahead(world, "newer", synced_at="2999-01-01 00:00:00")
    api.put_user("missing", username="new")
    api.put_user("unfit", username="nine char")
    ending, report = await world.reconcile()
    assert verdicts(report) == {
        Verdict.SAME: 1,
        Verdict.MISSING: 2,
        Verdict.OUTDATED: 1,
        Verdict.DRIFTED: 2,
        Verdict.DELETED: 1,
        Verdict.UNFIT: 1,
        Verdict.NEWER: 1,
    }
    assert (ending, report.invalid, report.tallies["user"].written) == (Ending.UNMENDED, 1, 6)
    assert (report.clerk["user"], report.table["user"]) == (8, 7)
    assert await names(world) == {
        "same": "same",
        "outdated": "updated",
        "drifted": "drifted",
        "lost": "lost",
        "ahead": "ahead",
        "newer": "by hand",
        "missing": "new",
    }


@pytest.mark.parametrize("by", ["reconcile", "insert"])
async def test_json_that_hardly_any_parser_reads_is_one_objects_trouble(
    shared_url: str, stores: Mapping[bool, Store], by: str
) -> None:
    """In three pages, of which one is read as rows that are there, or all as rows that are new."""
    deep: Any = "the innermost"
    for _ in range(250):
        deep = [deep]
    async with walking(shared_url, store=stores[False], most=10) as world:
        api = world.api
        api.put_organization("org_1", name="one")
        for number in range(30):
            api.put_user(f"user_{number:02}", username="ada", public_metadata={})
            api.put_membership(f"m_{number:02}", f"user_{number:02}", "org_1", role="admin")
        if by == "reconcile":
            await world.reconcile()
            await world.database.execute("UPDATE people SET username = 'drifted'")
            await world.database.execute("UPDATE members SET role = 'drifted'")
        broken: dict[str, dict[str, Any]] = {
            "user_03": {"username": "cut \ud83d"},
            "user_05": {"public_metadata": {"a": ["\ud83d"]}},
            "user_15": {"public_metadata": {"\ud83d": 1}},
            "user_25": {"updated_at": "\ud83d"},
        }
        for clerk_id, fields in broken.items():
            api.users[clerk_id] |= fields
        api.users["user_17"] |= {"last_name": "\udc00", "unsafe_metadata": deep, "x": 10**4000}
        api.memberships["m_07"]["role"] = "\ud83d"
        api.organizations["org_1"]["public_metadata"] = {"\ud83d": deep}
        report, told = await world.look()
        assert report.tallies["user"].invalid == 4
        assert len(told) == 26 + 29 + (by == "insert")
        ending, report = await world.reconcile()
        assert ending is Ending.UNMENDED
        unfit = {kind: tally.invalid for kind, tally in report.tallies.items()}
        assert unfit == {"user": 4, "organization": 0, "organizationMembership": 1}
        rows = await names(world)
        assert {one for one, name in rows.items() if name == "ada"} == {
            f"user_{number:02}" for number in range(30)
        } - broken.keys()
        members = await world.database.rows("SELECT clerk_id FROM members WHERE role = 'admin'")
        assert len(members) == 29


async def test_endings_and_the_table_of_runs(world: Walking) -> None:
    api, engine = world.api, world.database.engine
    await users(world, 2, gone=1)
    assert (await world.reconcile())[0] is Ending.MENDED
    ending, report = await world.reconcile()
    run = await history.last_run(engine, "reconcile")
    assert run is not None
    assert ending is run.ending is Ending.IN_STEP
    assert run.report is not None
    assert 0 < run.report["seconds"] < 60
    assert run.report == json.loads(json.dumps(report.summary())) | {
        "seconds": run.report["seconds"]
    }
    assert run.report["clerk"]["user"] == run.report["table"]["user"] == 1
    api.put_user("unfit", username="nine char")
    assert (await world.reconcile())[0] is Ending.UNMENDED
    await users(world, 20, gone=10, first=1000)
    with pytest.raises(SafetyStop, match="10 of 21 users"):
        await world.reconcile()
    run = await history.last_run(engine, "reconcile")
    assert run is not None
    assert run.ending is Ending.STOPPED
    assert run.finished_at is not None
    assert run.finished_at >= run.started_at
    api.faults.append(failing(422, path="/v1/users"))
    with pytest.raises(ClerkRefused):
        await world.reconcile()
    run = await history.last_run(engine, "reconcile")
    assert run is not None
    assert run.ending is Ending.FAILED


@pytest.fixture(scope="module")
def everything(shared_url: str, stores: Mapping[bool, Store]) -> Store:
    async def make() -> Store:
        async with Database.at(shared_url) as database:
            types = TYPES | (ON_SQLITE if database.sqlite else {})
            columns = ", ".join(f"{name} {type_}" for name, type_ in types.items())
            await database.ddl(f"CREATE TABLE everything ({columns}) OPTIONS")
            return await database.store(EVERYTHING)

    return asyncio.run(make())


@asynccontextmanager
async def typed(url: str, store: Store) -> AsyncIterator[Walking]:
    """One user, written in a column of every type."""
    async with walking(url, EVERYTHING, store=store) as world:
        world.api.put_user(
            "user_a",
            username="ada",
            banned=True,
            external_id=None,
            last_sign_in_at=1_700_000_000_988,
            public_metadata=METADATA,
        )
        assert (await world.reconcile())[0] is Ending.MENDED
        yield world


async def test_equal_values_are_no_drift_and_nothing_is_written(
    shared_url: str, everything: Store
) -> None:
    async with typed(shared_url, everything) as world:
        before = await world.written()
        report, told = await world.look()
        assert [one.differences for _, one in told] == []
        ending, report = await world.reconcile()
        assert (ending, report.tallies["user"].written) == (Ending.IN_STEP, 0)
        assert verdicts(report) == {Verdict.SAME: 1}
        assert await world.written() == before


def quoted(world: Walking, text: str) -> str:
    text = text.replace("'", "''")
    return "'" + (text if world.database.sqlite else text.replace("\\", "\\\\")) + "'"


async def test_json_in_another_order_is_no_drift(shared_url: str, everything: Store) -> None:
    async with typed(shared_url, everything) as world:
        turned = json.dumps(dict(reversed(METADATA.items())), indent=1)
        await world.database.execute(f"UPDATE everything SET data = {quoted(world, turned)}")
        assert (await world.reconcile())[0] is Ending.IN_STEP


async def test_drift_in_any_column_is_found_and_mended(shared_url: str, everything: Store) -> None:
    async with typed(shared_url, everything) as world:
        changes = BY_HAND | (
            dict.fromkeys(("milli", "micro"), BY_HAND["second"]) if world.database.sqlite else {}
        )
        changes |= {"data": quoted(world, json.dumps(METADATA | {"whole": -8}))}
        if world.database.sqlite:  # whose times have no precision to differ by
            changes |= dict.fromkeys(("milli", "micro"), BY_HAND["second"])
        before = (await world.everything())["everything"]
        for column, value in changes.items():
            await world.database.execute(f"UPDATE everything SET {column} = {value}")
        _, told = await world.look()
        ((_, found),) = told
        assert found.verdict is Verdict.DRIFTED
        assert {one.column for one in found.differences} == {*changes}
        assert (await world.reconcile())[0] is Ending.MENDED
        assert (await world.everything())["everything"] == before


async def test_what_a_server_gives_back_otherwise_is_no_drift(shared_url: str) -> None:
    async with Database.at(shared_url) as database:
        columns = f"bit {'BOOLEAN' if database.sqlite else 'BIT(1)'}, data JSON"
        key = "clerk_id VARCHAR(128) EXACT PRIMARY KEY"
        await database.ddl(f"CREATE TABLE odd ({key}, {columns}) OPTIONS")
    async with walking(shared_url, ODD) as world:
        for n, value in enumerate([10**25 + 1, 1e300, -0.0, 2**63, 1.0, 0.1, "\u0001\u2028"]):
            world.api.put_user(f"user_{n}", banned=n % 2 == 0, public_metadata={"value": value})
        assert (await world.reconcile())[0] is Ending.MENDED
        _, told = await world.look()
        assert [one.differences for _, one in told] == []


async def test_a_key_may_be_bytes(shared_url: str) -> None:
    async with Database.at(shared_url) as database:
        key = "clerk_id VARCHAR(128)" if database.sqlite else "clerk_id VARBINARY(128)"
        await database.ddl(
            f"CREATE TABLE bytes ({key} PRIMARY KEY, bit BOOLEAN, data JSON) OPTIONS"
        )
    async with walking(shared_url, BYTES) as world:
        world.api.put_user("user_a")
        world.api.put_user("user_b")
        assert (await world.reconcile())[0] is Ending.MENDED
        assert (await world.reconcile())[0] is Ending.IN_STEP
        world.api.delete("user_a")
        assert (await world.reconcile())[0] is Ending.MENDED
        assert await world.database.value("SELECT COUNT(*) FROM bytes") == 1


async def test_a_dry_run_tells_ids_and_columns_and_writes_nothing(world: Walking) -> None:
    api, database = world.api, world.database
    await member(world)
    await world.deliver(*(api.put_user(one, username=one) for one in ("drifted", "gone", "ahead")))
    await database.execute(
        "UPDATE people SET username = 'by hand' WHERE clerk_id IN ('drifted', 'ahead')",
        "UPDATE members SET role = 'by hand', user_id = 'gone'",
    )
    await ahead(world, "ahead")
    api.delete("gone")
    api.put_organization("org_2", name="two")
    before = await world.everything()
    report, told = await world.look()
    assert sorted(
        (kind, one.clerk_id, one.verdict.value, [d.column for d in one.differences])
        for kind, one in told
    ) == [
        ("organization", "org_2", "missing", []),
        ("organizationMembership", "m_1", "drifted", ["user_id", "role"]),
        ("user", "ahead", "drifted", ["username"]),
        ("user", "drifted", "drifted", ["username"]),
        ("user", "gone", "deleted", []),
    ]
    differences = {
        (d.wanted, d.stored) for _, one in told for d in one.differences if d.column == "role"
    }
    assert differences == {("admin", "by hand")}
    assert report.drifted == 5
    assert await world.everything() == before
    ending, mended = await world.reconcile()
    assert (ending, mended.drift) == (Ending.MENDED, report.drift)


# What it deletes, and what not


async def test_what_a_list_hides_and_clerk_still_has_stays(world: Walking) -> None:
    api = world.api
    await users(world, 3)
    api.update("user_0001", username="new")
    hidden: dict[str, Any] = {}
    api.before_read(1, lambda: hidden.update(one=api.users.pop("user_0001")))
    api.before_send(1, lambda: api.users.update(user_0001=hidden["one"]))
    ending, report = await world.reconcile()
    assert hidden
    assert (ending, report.table["user"]) == (Ending.MENDED, 3)
    assert api.asked_for("/v1/users/user_0001")
    assert (await names(world))["user_0001"] == "new"


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (failing(422, path="/v1/users", query="limit=500"), ClerkRefused),
        (failing(500, path="/v1/users", query="limit=500", skip=1, times=9), ClerkUnavailable),
        (failing(500, path="/v1/organization_memberships", skip=1, times=9), ClerkUnavailable),
        (failing(401, path="/v1/users/user_0000"), ClerkRefused),
        (failing(500, path="/v1/users/user_0000", times=9), ClerkUnavailable),
    ],
    ids=["first-page", "last-page", "other-list", "key-withdrawn", "one"],
)
async def test_a_walk_that_fails_deletes_nothing(
    world: Walking, fault: Any, error: type[Exception]
) -> None:
    await users(world, 3, gone=1)
    world.api.faults.append(fault)
    with stamina.set_testing(True, attempts=2), pytest.raises(error):
        await world.reconcile()
    assert len(await world.ids("user")) == 3


async def test_a_list_far_shorter_than_the_count_deletes_nothing(world: Walking) -> None:
    api = world.api
    await users(world, 30, gone=1)
    hidden: dict[str, Any] = {}
    api.before_read(1, lambda: hidden.update({f"{n}": api.users.popitem() for n in range(10)}))
    api.before_read(3, lambda: api.users.update(hidden.values()), path="/v1/users/count")
    api.before_read(2, lambda: api.users.update(hidden.values()), path="/v1/users/count")
    with pytest.raises(ClerkUnavailable, match="ended early: Clerk counts 29 users and listed 19"):
        await world.reconcile()
    assert len(await world.ids("user")) == 30


@pytest.mark.parametrize(
    ("number", "gone", "percent", "stopped"),
    [
        (20, 9, 5, False),
        (20, 10, 5, True),
        (20, 10, 100, False),
        (20, 19, 100, False),
    ],
)
async def test_the_breaker(
    world: Walking, number: int, gone: int, percent: float, *, stopped: bool
) -> None:
    await users(world, number, gone=gone)
    await world.deliver(world.api.put_organization("org_1", name="one"))
    world.api.delete("org_1")
    if stopped:
        with pytest.raises(SafetyStop, match=f"{gone} of {number} users"):
            await world.reconcile(percent=percent)
        # Not even what is below the breaker.
        assert await world.ids("organization") == ["org_1"]
        assert len(await world.ids("user")) == number
    else:
        ending, report = await world.reconcile(percent=percent)
        assert (ending, verdicts(report)[Verdict.DELETED]) == (Ending.MENDED, gone)
        assert await world.ids("organization") == []
        assert len(await world.ids("user")) == number - gone


async def test_one_kind_s_breaker_keeps_what_the_others_would_lose(world: Walking) -> None:
    await users(world, 20, gone=1)
    for number in range(10):
        await world.deliver(world.api.put_organization(f"org_{number}", name="one"))
        world.api.delete(f"org_{number}")
    with pytest.raises(SafetyStop, match="10 of 10 organizations"):
        await world.reconcile()
    assert len(await world.ids("user")) == 20
    assert len(await world.ids("organization")) == 10


async def test_the_breaker_of_a_large_table(world: Walking) -> None:
    await users(world, 400, gone=16)  # 4 %
    ending, report = await world.reconcile()
    assert (ending, verdicts(report)[Verdict.DELETED]) == (Ending.MENDED, 16)
    for number in range(100, 123):  # 6 % of those that are left
        world.api.delete(f"user_{number:04}")
    with pytest.raises(SafetyStop, match="23 of 384 users"):
        await world.reconcile()
    assert len(await world.ids("user")) == 384


@pytest.mark.parametrize("percent", [5, 100])
async def test_another_instances_key_changes_nothing(world: Walking, percent: float) -> None:
    await users(world, 12, gone=12)
    world.api.put_user("user_of_another", username="eve")
    told = "knows none of 12 users of this table: nothing was changed. Is CLERK_SECRET_KEY the key"
    with pytest.raises(SafetyStop, match=told):
        await world.reconcile(percent=percent)
    assert await world.ids("user") == [f"user_{n:04}" for n in range(12)]


async def test_rows_stay_where_organizations_are_switched_off(world: Walking) -> None:
    await member(world)
    world.api.organizations_enabled = False
    ending, report = await world.reconcile()
    assert (ending, report.switched_off) == (
        Ending.IN_STEP,
        ["organization", "organizationMembership"],
    )
    assert await world.ids("organization") == ["org_1"]
    assert await world.ids("organizationMembership") == ["m_1"]


async def test_a_key_that_is_refused_deletes_nothing(world: Walking) -> None:
    await users(world, 3, gone=1)
    world.api.key = "sk_live_another"
    with pytest.raises(ClerkRefused, match="CLERK_SECRET_KEY"):
        await world.reconcile()
    assert len(await world.ids("user")) == 3


@pytest.mark.parametrize("gone", ["m_1", "org_1", "user_a"])
@pytest.mark.parametrize("marks", [False, True])
async def test_a_membership_goes_with_whatever_ends_it(
    shared_url: str, stores: Mapping[bool, Store], gone: str, *, marks: bool
) -> None:
    mapping = MARKING if marks else REMOVING
    async with walking(shared_url, mapping, store=stores[marks]) as world:
        await member(world)
        world.api.delete(gone)
        if gone == "user_a":  # its row went by itself, and left the membership's
            await world.database.execute("DELETE FROM people")
        assert (await world.reconcile())[0] is Ending.MENDED
        assert await world.ids("organizationMembership") == []
        await world.deliver(*world.api.events)
        assert await world.ids("organizationMembership") == []


async def test_a_membership_that_cannot_be_asked_for_stays_and_is_told(shared_url: str) -> None:
    text = """
tables:
  organizationMembership:
    table: members
    key: clerk_id
    columns: {role: role, user_id: public_user_data.user_id}
"""
    async with walking(shared_url, mapped(text)) as world:
        await member(world)
        world.api.delete("m_1")
        ending, report = await world.reconcile()
        assert (ending, report.unconfirmed, report.drifted) == (Ending.UNMENDED, 1, 0)
        assert await world.ids("organizationMembership") == ["m_1"]


async def test_a_row_that_came_back_after_its_delete_goes_again(world: Walking) -> None:
    await member(world)
    await world.deliver(world.api.delete("user_a"))
    await world.database.execute(
        "INSERT INTO people (clerk_id, username) VALUES ('user_a', 'ada')",
        "INSERT INTO members VALUES ('m_1', 'org_1', 'user_a', 'admin')",
    )
    ending, _ = await world.reconcile()
    assert (ending, await world.ids("user")) == (Ending.MENDED, [])
    assert await world.ids("organizationMembership") == []
    # Clerk had already said so.
    assert not world.api.asked_for("/v1/users/user_a")


async def test_a_membership_whose_owner_was_deleted_here_goes_though_clerk_lists_it(
    world: Walking,
) -> None:
    await member(world)
    await world.database.execute(
        "UPDATE clerk_sync_entities SET deleted_at = '2023-11-15 00:00:00.000000'"
        " WHERE kind = 'user'"
    )
    ending, report = await world.reconcile()
    assert ending is Ending.UNMENDED
    assert report.discrepancies == [
        "Clerk counts 1 users, `people` has 0 of them",
        "Clerk counts 1 organizationMemberships, `members` has 0 of them",
    ]
    # With the user's row, or by itself.
    assert await world.ids("user") == []
    assert await world.ids("organizationMembership") == []


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.usefixtures("stores")
async def test_what_was_marked_for_long_enough_is_purged(shared_url: str, *, dry_run: bool) -> None:
    async with walking(shared_url, PURGING) as world:
        await users(world, 3)
        now_ms = time.time_ns() // 1_000_000
        for clerk_id, days in (("user_0000", 31), ("user_0001", 29)):
            deleted = world.api.delete(clerk_id) | {"timestamp": now_ms - days * DAY_MS}
            await world.deliver(deleted)
        report = (await world.look())[0] if dry_run else (await world.reconcile())[1]
        assert report.purged == 1
        left = await world.database.rows("SELECT clerk_id FROM people ORDER BY clerk_id")
        assert left == [(f"user_{n:04}",) for n in range(0 if dry_run else 1, 3)]


async def test_marks_are_set_kept_and_taken_back(marking: Walking) -> None:
    await marking.deliver(
        *(marking.api.put_user(one, username=one) for one in ("gone", "marked", "alive"))
    )
    await marking.deliver(marking.api.delete("marked"))
    marking.api.delete("gone")
    await marking.database.execute(
        "UPDATE people SET deleted_at = '2023-11-15 00:00:00' WHERE clerk_id = 'alive'"
    )
    query = "SELECT deleted_at FROM people WHERE clerk_id = 'marked'"
    before = await marking.database.value(query)
    ending, _ = await marking.reconcile()
    assert (ending, await marking.ids("user")) == (Ending.MENDED, ["alive"])
    assert await marking.database.value("SELECT COUNT(*) FROM people") == 3
    assert await marking.database.value(query) == before


async def test_a_row_just_brought_is_asked_for_twice(tmp_path: Any) -> None:
    url = f"sqlite:///{tmp_path}/clerk-sync.db"
    await prepare(url)
    async with walking(url, now_ms=None) as world:
        api = world.api
        loop = asyncio.get_running_loop()
        api.now_ms = int(await world.database.value("SELECT unixepoch() * 1000"))
        await world.deliver(api.put_user("user_a", username="ada"))
        user = api.users.pop("user_a")  # the API lags behind its own webhook
        loop.call_later(0.5, lambda: api.users.update(user_a=user))
        assert (await world.reconcile())[0] is Ending.IN_STEP
        assert await world.ids("user") == ["user_a"]


# Beside webhooks


async def test_a_webhook_newer_than_the_page_wins(world: Walking) -> None:
    await users(world, 1)

    async def update() -> None:
        await world.deliver_now(world.api.update("user_0000", username="newest"))

    world.api.update("user_0000", username="older")
    world.api.before_send(1, update)
    ending, report = await world.reconcile()
    assert (ending, await names(world)) == (Ending.IN_STEP, {"user_0000": "newest"})
    assert verdicts(report) == {Verdict.NEWER: 1}


@pytest.mark.parametrize("known", [True, False])
async def test_a_delete_during_the_walk_stays(world: Walking, *, known: bool) -> None:
    created = world.api.put_user("user_a", username="ada")
    if known:
        await world.deliver(created)

    async def delete() -> None:
        await world.deliver_now(world.api.delete("user_a"))

    world.api.before_send(1, delete)
    ending, _ = await world.reconcile()
    assert (ending, await world.ids("user")) == (Ending.IN_STEP, [])


@pytest.mark.parametrize("meanwhile", ["updated", "deleted", "by hand", "unfit"])
async def test_one_that_is_not_new_among_many_that_are(
    shared_url: str, stores: Mapping[bool, Store], meanwhile: str
) -> None:
    """In the second of three pages: by then, whole pages are taken for new."""
    async with walking(shared_url, store=stores[False], most=10) as world:
        api, one = world.api, "user_0015"
        for number in range(30):
            api.put_user(f"user_{number:04}", username="ada")

        async def happen() -> None:
            if meanwhile == "updated":
                await world.deliver_now(api.update(one, username="newest"))
            elif meanwhile == "deleted":
                await world.deliver_now(api.delete(one))
            else:
                await world.database.execute(f"INSERT INTO people VALUES ('{one}', 'hand', NULL)")

        if meanwhile == "unfit":
            api.update(one, username="longer than eight")
        else:
            api.before_send(2, happen)
        ending, report = await world.reconcile()
        expected = {f"user_{number:04}": "ada" for number in range(30)}
        if meanwhile == "updated":
            expected[one] = "newest"
        elif meanwhile != "by hand":
            del expected[one]
        assert await names(world) == expected
        assert ending is (Ending.UNMENDED if meanwhile == "unfit" else Ending.MENDED)
        assert report.tallies["user"].written == (30 if meanwhile == "by hand" else 29)
        state = "SELECT COUNT(*) FROM clerk_sync_entities"
        assert await world.database.value(state) == (29 if meanwhile == "unfit" else 30)


async def test_a_new_membership_of_who_is_deleted_meanwhile_is_not_written(
    shared_url: str, stores: Mapping[bool, Store]
) -> None:
    async with walking(shared_url, store=stores[False], most=30) as world:
        api = world.api
        api.put_organization("org_1", name="one")
        for number in range(60):
            api.put_user(f"user_{number:04}", username="ada")
            api.put_membership(f"m_{number:04}", f"user_{number:04}", "org_1", role="admin")

        async def delete() -> None:
            await world.deliver_now(api.delete("user_0035"))

        api.before_send(3, delete, path="/v1/organization_memberships")  # the first one counts
        await world.reconcile()
        expected = [f"m_{number:04}" for number in range(60) if number != 35]
        assert await world.ids("organizationMembership") == expected


@pytest.mark.parametrize("name", ["by hand", "ada"], ids=["altered", "equal"])
async def test_an_update_after_a_forged_version_was_found_is_taken(
    world: Walking, name: str
) -> None:
    await users(world, 1)
    await ahead(world, "user_0000")
    await world.database.execute(f"UPDATE people SET username = '{name}'")
    await world.reconcile()
    await world.deliver(world.api.update("user_0000", username="newest"))
    assert await names(world) == {"user_0000": "newest"}


@pytest.mark.parametrize("meanwhile", ["updated", "deleted"])
async def test_a_version_is_taken_back_only_when_clerk_says_the_same_twice(
    world: Walking, meanwhile: str
) -> None:
    await users(world, 1)
    await ahead(world, "user_0000")
    await world.database.execute("UPDATE people SET username = 'newer'")
    before = await world.written()

    def moved() -> None:
        if meanwhile == "updated":
            world.api.update("user_0000", username="newest")
        else:
            world.api.delete("user_0000")

    world.api.before_read(1, moved, path="/v1/users/user_0000")
    await world.reconcile()
    assert world.api.asked_for("/v1/users/user_0000")
    assert await world.written() == before


async def test_rows_from_before_clerk_are_adopted(shared_url: str) -> None:
    mapping = mapped(
        """
tables:
  user:
    table: users
    key: clerk_id
    adopt: {username: username}
    columns: {username: username, img_url: image_url}
"""
    )
    async with Database.at(shared_url) as database:
        await database.ddl(
            """CREATE TABLE users (
                id SERIAL,
                clerk_id VARCHAR(128) EXACT UNIQUE,
                username VARCHAR(20),
                img_url TEXT
            ) OPTIONS"""
        )
    async with walking(shared_url, mapping) as world:
        await world.database.execute("INSERT INTO users (id, username) VALUES (7, 'ada'), (8, 'x')")
        for one in ("ada", "bob"):
            world.api.put_user(f"user_{one}", username=one)
        assert (await world.reconcile())[0] is Ending.MENDED
        query = "SELECT clerk_id, username, id = 7 FROM users ORDER BY username"
        assert await world.database.rows(query) == [
            ("user_ada", "ada", 1),
            ("user_bob", "bob", 0),
            (None, "x", 0),
        ]
        assert (await world.reconcile())[0] is Ending.IN_STEP


# Alone


async def test_of_two_at_once_one_is_told_who_the_other_is(world: Walking) -> None:
    refused = []

    async def second() -> None:
        with pytest.raises(LeaseHeld) as caught:
            await world.reconcile()
        refused.append(caught.value)

    await users(world, 2, gone=1)
    world.api.before_send(1, second)
    assert (await world.reconcile())[0] is Ending.MENDED
    ((error),) = refused
    assert error.holder.startswith("reconcile on ")
    assert error.holder in str(error)
    run = await history.last_run(world.database.engine, "reconcile")
    assert run is not None
    assert run.ending is Ending.MENDED


async def test_how_the_next_ended_stays_when_one_that_lost_its_lease_ends(world: Walking) -> None:
    await users(world, 2, gone=1)
    endings = []

    async def next_one() -> None:
        await world.database.execute("UPDATE clerk_sync_leases SET expires_ms = 0")
        endings.append((await world.reconcile())[0])
        world.api.faults.append(failing(422))

    world.api.before_send(1, next_one, path="/v1/organizations")
    with pytest.raises(ClerkRefused):
        await world.reconcile()
    run = await history.last_run(world.database.engine, "reconcile")
    assert run is not None
    assert endings == [run.ending] == [Ending.MENDED]


@pytest.mark.parametrize("known", [True, False], ids=["told", "not-yet-told"])
@pytest.mark.parametrize(
    ("path", "page"),
    [("/v1/users", 1), ("/v1/users/user_0000", 1)],
    ids=["walking", "deleting"],
)
async def test_a_run_whose_lease_is_stolen_is_fenced_off(
    world: Walking, path: str, page: int, *, known: bool
) -> None:
    """Also not in the time until its holder knows."""
    await users(world, 2, gone=1)
    world.api.put_user("missing", username="new")
    if path.endswith("user_0000"):
        world.api.delete("missing")
    before: dict[str, list[str]] = {}

    async with held(world.database.engine, LEASE, "the first", seconds=0.9) as lease:

        async def steal() -> None:
            await world.database.execute(
                "UPDATE clerk_sync_leases SET token = token + 1, holder = 'the second',"
                " expires_ms = expires_ms + 60000"
            )
            before.update(await world.written())
            if known:
                await lease.lost.wait()

        world.api.before_send(page, steal, path=path)
        if path.endswith("user_0000"):  # which the stand-in answers with 404, and sends nothing
            world.api.before_read(page, steal, path=path)
        with pytest.raises((LeaseLost, DatabaseUnavailable)):
            await reconciled(world, lease)
    assert before
    assert await world.written() == before
    holder = await world.database.value("SELECT holder FROM clerk_sync_leases")
    assert holder == "the second"


async def test_a_run_whose_lease_is_stolen_is_fenced_off_from_new_rows(
    shared_url: str, stores: Mapping[bool, Store]
) -> None:
    async with walking(shared_url, store=stores[False], most=10) as world:
        for number in range(40):
            world.api.put_user(f"user_{number:04}", username="ada")
        before: dict[str, list[str]] = {}

        async def steal() -> None:
            await world.database.execute("UPDATE clerk_sync_leases SET token = token + 1")
            before.update(await world.written())

        world.api.before_send(4, steal)
        async with held(world.database.engine, LEASE, "the first", seconds=60) as lease:
            with pytest.raises((LeaseLost, DatabaseUnavailable)):
                await reconciled(world, lease)
        assert await world.written() == before
        assert 20 <= len(await world.ids("user")) < 40


async def reconciled(world: Walking, lease: Any) -> None:
    """Reconcile under a lease that is shorter than the command's."""

    def opened(seconds: float = 5) -> Any:
        return connect(target_of(world.database.url), seconds=seconds)

    committer = Committer(
        opened, metrics=new_metrics(), writers=1, batch_limit=500, queue_limit=500
    )
    store = world.store.fenced(lease.name, lease.token)
    committer.resume(store)
    committer.start()
    repairer = Repairer(world.mapping, store, opened, committer=committer, lost=lease.lost)
    try:
        await Reconcile(
            world.runs.clerk,
            world.mapping,
            repairer,
            world.database.engine,
            lease,
            instance=None,
            pauses=(),
            breaker_percent=5,
            report=Report(),
            on_page=noop,
        ).run()
    finally:
        repairer.close()
        await committer.close()


@pytest.fixture(scope="module")
def setting(shared_url: str, stores: Mapping[bool, Store]) -> Store:
    async def make() -> Store:
        async with Database.at(shared_url) as database:
            await database.ddl(UNIQUE)
            return await database.store(SETTING)

    assert stores  # which the same tables of our own are made for
    return asyncio.run(make())


async def unique_people(world: Walking) -> list[tuple[Any, ...]]:
    return await world.database.rows(
        "SELECT clerk_id, username, name, active, deleted_at IS NULL FROM unique_people"
        " ORDER BY clerk_id"
    )


@pytest.mark.parametrize("by", ["webhook", "reconcile"])
async def test_who_comes_back_with_a_unique_name_is_written(
    shared_url: str, setting: Store, by: str
) -> None:
    async with walking(shared_url, SETTING, store=setting) as world:
        api = world.api
        await world.deliver(api.put_user("user_1", username="ada", first_name="Ada"))
        gone = api.delete("user_1")
        if by == "webhook":
            await world.deliver(gone)
        elif by == "reconcile":
            assert (await world.reconcile())[0] is Ending.MENDED
        marked = ("user_1", None, "Ada", 0, 0)
        assert await unique_people(world) == [marked]
        api.put_user("user_2", username="ada", first_name="Ada")
        report, told = await world.look()
        assert [(one.clerk_id, one.verdict) for _, one in told] == [("user_2", Verdict.MISSING)]
        assert (await world.reconcile())[0] is Ending.MENDED
        assert await unique_people(world) == [marked, ("user_2", "ada", "Ada", 1, 1)]
        # Where Clerk lists the first one all the same, it stays deleted, and somebody has to look.
        api.users["user_1"] = api.users["user_2"] | {"id": "user_1"}
        ending, report = await world.reconcile()
        assert (ending, verdicts(report)) == (
            Ending.UNMENDED,
            {Verdict.SAME: 1, Verdict.NEWER: 1},
        )
        assert await unique_people(world) == [marked, ("user_2", "ada", "Ada", 1, 1)]


async def test_who_came_back_while_nobody_listened_is_written_in_the_end(
    shared_url: str, setting: Store
) -> None:
    async with walking(shared_url, SETTING, store=setting) as world:
        api = world.api
        await world.deliver(api.put_user("user_1", username="ada", first_name="Ada"))
        api.delete("user_1")
        api.put_user("user_2", username="ada", first_name="Ada")
        for _ in range(2):  # what is gone goes last
            await world.reconcile()
        assert await unique_people(world) == [
            ("user_1", None, "Ada", 0, 0),
            ("user_2", "ada", "Ada", 1, 1),
        ]
        assert (await world.reconcile())[0] is Ending.IN_STEP


async def test_what_was_deleted_here_and_is_in_clerk_is_told(
    world: Walking, capsys: pytest.CaptureFixture[str]
) -> None:
    await users(world, 2)
    await world.deliver(world.api.delete("user_0001"))
    world.api.users["user_0001"] = world.api.users["user_0000"] | {"id": "user_0001"}
    ending, report = await world.reconcile()
    assert ending is Ending.UNMENDED
    assert report.discrepancies == ["Clerk counts 2 users, `people` has 1 of them"]
    assert await world.ids("user") == ["user_0000"]
    assert "tombstone_conflict" in capsys.readouterr().out
