"""What `Store.apply` makes of changes, the same on every database."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import permutations
from typing import TYPE_CHECKING, Any, Final

import pytest

from clerk_sync.database.errors import RejectedByDatabase
from clerk_sync.mapping import loader
from clerk_sync.mapping.change import ApiRead, Change
from clerk_sync.outcomes import Reason
from clerk_sync.schema.migrate import migrate
from clerk_sync.store.store import FencedOff
from tests.histories import Clerk, Committing, Database, Halting, at, mapped, upsert_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from clerk_sync.database.connection import Connection, Result, Step
    from clerk_sync.mapping.model import Mapping
    from clerk_sync.store.store import Store

PEOPLE: Final = mapped("""
tables:
  user:
    table: people
    key: clerk_id
    columns:
      username: username
      display_name: first_name
""")
MARKED: Final = mapped("""
tables:
  user:
    table: marked
    key: clerk_id
    columns: {username: username}
    on_delete: {mark: deleted_at}
""")
SETTING: Final = mapped("""
tables:
  user:
    table: setting
    key: clerk_id
    columns: {email: email, username: username, plan: plan}
    on_delete:
      mark: deleted_at
      set: {email: null, plan: 'none', active: 0, status: gone}
""")
NAMED: Final = mapped("""
tables:
  user:
    table: named
    key: clerk_id
    columns: {username: username}
""")
CODED: Final = mapped("""
tables:
  user:
    table: coded
    key: clerk_id
    columns: {username: username}
""")
OLD: Final = mapped("""
tables:
  user:
    table: old
    key: clerk_id
    adopt: {username: username}
    columns: {username: username}
""")
STRICT: Final = mapped("""
tables:
  user:
    table: strict
    key: clerk_id
    columns:
      username: username
      age: public_metadata.age
      score: public_metadata.score
      born: public_metadata.born
      note: public_metadata.note
      nick: public_metadata.nick
""")
MIRROR: Final = loader.load("mirror")
ORBYTAL: Final = loader.load("orbytal")
ALL: Final = (PEOPLE, MARKED, SETTING, NAMED, CODED, STRICT, MIRROR)

APP: Final = (
    """CREATE TABLE people (
        id SERIAL,
        clerk_id VARCHAR(128) EXACT UNIQUE,
        username VARCHAR(255),
        display_name VARCHAR(255),
        tagline VARCHAR(255) NOT NULL DEFAULT 'hello',
        visits INTEGER DEFAULT 7
    ) OPTIONS""",
    """CREATE TABLE marked (
        clerk_id VARCHAR(128) EXACT PRIMARY KEY, username VARCHAR(255), deleted_at DATETIME
    ) OPTIONS""",
    """CREATE TABLE setting (
        id SERIAL,
        clerk_id VARCHAR(128) EXACT UNIQUE,
        email VARCHAR(255) UNIQUE,
        username VARCHAR(255),
        plan VARCHAR(20) NOT NULL,
        active BOOLEAN NOT NULL DEFAULT 1,
        status VARCHAR(20) NOT NULL DEFAULT 'here',
        deleted_at DATETIME
    ) OPTIONS""",
    """CREATE TABLE named (
        id SERIAL, clerk_id VARCHAR(128) EXACT UNIQUE, username VARCHAR(255) UNIQUE
    ) OPTIONS""",
    """CREATE TABLE coded (
        id SERIAL,
        clerk_id VARCHAR(128) EXACT UNIQUE,
        username VARCHAR(255),
        code VARCHAR(20) NOT NULL DEFAULT '' UNIQUE
    ) OPTIONS""",
    """CREATE TABLE old (
        id SERIAL, clerk_id VARCHAR(128) EXACT UNIQUE, username VARCHAR(255) LATIN
    ) OPTIONS""",
    """CREATE TABLE strict (
        clerk_id VARCHAR(128) EXACT PRIMARY KEY,
        username VARCHAR(5) NOT NULL,
        age SMALLINT CHECK (age <> 13),
        score DECIMAL(5,2),
        born DATETIME,
        note TEXT,
        nick VARCHAR(20) NARROW
    ) OPTIONS""",
)
# The link-in-bio tutorial's own, as `SHOW CREATE TABLE` tells it.
TUTORIAL: Final = (
    """CREATE TABLE users (
        id SERIAL,
        username VARCHAR(255),
        tagline VARCHAR(255),
        display_name VARCHAR(255),
        img_url VARCHAR(255)
    ) OPTIONS""",
    """CREATE TABLE blocks (
        id SERIAL,
        url VARCHAR(255),
        type INTEGER,
        user_id BIGINT,
        label VARCHAR(255)
    ) OPTIONS""",
)


class World(Database):
    """The databases of this module: all tables there, and empty."""

    stores: dict[str, Store]

    async def of(self, mapping: Mapping) -> Store:
        key = mapping.tables["user"].table
        if key not in self.stores:
            self.stores[key] = await self.store(mapping)
        return self.stores[key]


@pytest.fixture(scope="module")
def prepared(shared_url: str) -> tuple[str, dict[str, Store]]:
    """Every table of this module, made once; and the Stores bound to them."""

    async def prepare() -> None:
        async with Database.at(shared_url) as database:
            await database.ddl(*APP, *TUTORIAL)
            await database.execute("INSERT INTO users (username) VALUES ('before')")
            for mapping in (MIRROR, ORBYTAL):
                await migrate(database.engine, mapping)

    asyncio.run(prepare())
    return shared_url, {}


@pytest.fixture
async def world(prepared: tuple[str, dict[str, Store]]) -> AsyncIterator[World]:
    url, stores = prepared
    async with World.at(url) as world:
        world.stores = stores
        mirrored = [table.table for table in MIRROR.tables.values()]
        names = [
            "people",
            "marked",
            "setting",
            "named",
            "coded",
            "old",
            "strict",
            "users",
            "blocks",
            *mirrored,
        ]
        await world.empty(*names)
        yield world


# The order of events: newest content wins, whatever comes when.


async def test_new_user_becomes_a_row(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)
    assert await world.apply(store, clerk.user("user_1", username="ada", first_name="Ada")) == [
        "applied"
    ]
    rows = await world.rows("SELECT clerk_id, username, display_name, tagline, visits FROM people")
    assert rows == [("user_1", "ada", "Ada", "hello", 7)]


async def test_newer_update_is_applied_and_older_is_stale(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)
    assert await world.apply(store, clerk.user("user_1", 2, username="two")) == ["applied"]
    assert await world.apply(store, clerk.user("user_1", 3, username="three")) == ["applied"]
    assert await world.apply(store, clerk.user("user_1", 1, username="one")) == ["stale"]
    assert await world.value("SELECT username FROM people") == "three"


async def test_update_of_an_old_version_by_a_newer_event_is_stale(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)
    await world.apply(store, clerk.user("user_1", 5, event=5, username="new"))
    assert await world.apply(store, clerk.user("user_1", 4, event=8, username="old")) == ["stale"]
    assert await world.value("SELECT username FROM people") == "new"


@pytest.mark.parametrize(
    ("first", "second", "answer"), [(5, 6, "applied"), (6, 5, "stale")], ids=["newer", "older"]
)
async def test_same_version_is_decided_by_the_time_of_the_event(
    world: World, first: int, second: int, answer: str
) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)
    await world.apply(store, clerk.user("user_1", 3, event=first, username=f"at_{first}"))
    late = clerk.user("user_1", 3, event=second, username=f"at_{second}")
    assert await world.apply(store, late) == [answer]
    assert await world.value("SELECT username FROM people") == "at_6"


async def test_exact_ties_are_decided_by_svix_id_in_any_order_and_batching(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)
    tied = [
        clerk.user("user_1", 3, event=4, svix_id=f"msg_{name}", username=name)
        for name in ("a", "B", "c")
    ]
    for order in permutations(tied):
        for batches in (
            [[change] for change in order],
            [list(order)],
            [order[:2], order[2:]],
        ):
            await world.empty("people")
            for batch in batches:
                await world.apply(store, *batch)
            assert await world.value("SELECT username FROM people") == "c"
            assert await world.value("SELECT source FROM clerk_sync_entities") == "msg_c"


async def test_batch_of_one_users_history_ends_with_its_newest(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)
    history = [clerk.user("user_1", version, username=f"v{version}") for version in (2, 4, 1, 3)]
    assert await world.apply(store, *history) == ["stale", "applied", "stale", "stale"]
    assert await world.value("SELECT username FROM people") == "v4"


async def test_state_keeps_version_and_time_together(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)
    for version, event in ((1, 9), (2, 3), (2, 5)):
        await world.apply(store, clerk.user("user_1", version, event=event, svix_id=f"m{event}"))
    rows = await world.rows("SELECT version_ms, event_ms, source FROM clerk_sync_entities")
    assert rows == [(at(2), at(5), "m5")]


async def test_facts_without_a_delivery_are_ordered_too_and_leave_no_ledger(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)

    def read(change: Change) -> Change:
        upsert = upsert_of(change)
        version_ms, event_ms, _ = upsert.version
        return Change(ApiRead(event_ms), replace(upsert, version=(version_ms, event_ms, "")))

    assert await world.apply(store, read(clerk.user("user_1", 2, username="api"))) == ["applied"]
    assert await world.apply(store, clerk.user("user_1", 1, username="late")) == ["stale"]
    assert await world.apply(store, read(clerk.user("user_1", 2, username="api"))) == ["applied"]
    assert await world.apply(store, clerk.user("user_1", 3, username="hook")) == ["applied"]
    assert await world.apply(store, read(clerk.user("user_1", 2, username="api"))) == ["stale"]
    assert await world.value("SELECT username FROM people") == "hook"
    assert len(await world.outcomes()) == 2


# Once.


async def test_duplicates_are_known_in_one_batch_and_across_batches(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)
    change = clerk.user("user_1", username="ada")
    assert await world.apply(store, change, change) == ["applied", "duplicate"]
    assert await world.apply(store, change, change) == ["duplicate", "duplicate"]
    assert await world.value("SELECT COUNT(*) FROM clerk_sync_events") == 1


async def test_duplicate_does_not_rewrite_what_the_app_changed_meanwhile(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)
    change = clerk.user("user_1", username="ada", first_name="Ada")
    await world.apply(store, change)
    await world.execute("UPDATE people SET display_name = 'Countess'")
    assert await world.apply(store, change) == ["duplicate"]
    assert await world.value("SELECT display_name FROM people") == "Countess"


async def test_stale_event_stays_stale_and_is_a_duplicate_when_sent_again(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)
    await world.apply(store, clerk.user("user_1", 2, username="new"))
    late = clerk.user("user_1", 1, username="old", svix_id="late")
    assert await world.apply(store, late) == ["stale"]
    assert await world.apply(store, late) == ["duplicate"]
    assert (await world.outcomes())["late"] == "stale"


async def test_same_delivery_on_two_connections_has_one_effect(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)
    change = clerk.user("user_1", username="ada")
    first = Halting(await world.connect())
    one = asyncio.create_task(world.apply(store, change, connection=first))
    await first.decided.wait()
    two = asyncio.create_task(world.apply(store, change, connection=await world.connect()))
    await asyncio.sleep(0.1)
    assert not two.done(), "the second waits for the first one's commit"
    first.go_on.set()
    assert (await one, await two) == (["applied"], ["duplicate"])


class Noting(Halting):
    """A real connection that keeps the steps that it was given."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.packets: list[Sequence[Step]] = []
        self.go_on.set()

    async def run(self, steps: Sequence[Step]) -> list[Result]:
        self.packets.append(steps)
        return await super().run(steps)


async def test_entities_are_locked_in_one_order_whatever_order_they_come_in(world: World) -> None:
    clerk = Clerk(MIRROR)
    store = await world.of(MIRROR)
    connection = Noting(await world.connect())
    changes = [
        clerk.user("user_2"),
        clerk.membership("m_1", "user_3", "org_1"),
        clerk.user("user_1"),
    ]
    await world.apply(store, *changes, connection=connection)
    await store.insert(
        connection, "user", [upsert_of(clerk.user(f"user_{n}")) for n in (5, 4)], now_ms=at(99)
    )
    (_, advanced), (_, begun) = connection.packets[0][0], connection.packets[2][0]
    locked = [tuple(row[:2]) for row in advanced]
    assert len(locked) == 5
    assert locked == sorted(locked)
    assert [row[0] for row in begun] == ["user_4", "user_5"]


async def test_same_deliveries_racing_on_two_connections_are_applied_once(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)
    left, right = await world.connect(), await world.connect()
    for number in range(20):
        changes = [clerk.user(f"user_{number}_{n}", username="ada") for n in range(3)]
        answers = await asyncio.gather(
            world.apply(store, *changes, connection=left),
            world.apply(store, *reversed(changes), connection=right),
        )
        assert sorted([*answers[0], *answers[1]]) == ["applied"] * 3 + ["duplicate"] * 3


async def test_ignored_event_is_recorded_once_and_changes_nothing(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)
    change = clerk.event("session.created", {"id": "sess_1"}, event=1)
    unmapped = clerk.save("organization", "org_1")
    assert await world.apply(store, change, unmapped, change) == ["ignored", "ignored", "duplicate"]
    assert await world.apply(store, change) == ["duplicate"]
    assert not await world.rows("SELECT * FROM clerk_sync_entities")


async def test_ledger_has_what_happened_and_no_payload(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)
    await world.apply(
        store,
        clerk.user("user_1", 3, event=4, svix_id="good", username="ada@example.com"),
        clerk.user("user_2", svix_id="bad", username="ada@example.com" * 99),
    )
    columns = "svix_id, type, kind, clerk_id, outcome, reason"
    assert sorted(await world.rows(f"SELECT {columns} FROM clerk_sync_events")) == [
        ("bad", "user.updated", "user", "user_2", "quarantined", "too_long"),
        ("good", "user.updated", "user", "user_1", "applied", None),
    ]
    assert "example.com" not in repr(await world.rows("SELECT * FROM clerk_sync_events"))
    assert "example.com" not in repr(await world.rows("SELECT * FROM clerk_sync_entities"))
    event_at = await world.value("SELECT event_at FROM clerk_sync_events WHERE svix_id = 'good'")
    assert str(event_at).startswith("2023-11-14 22:13:24")
    assert await world.quarantined() == {"bad": "too_long"}
    (payload,) = (await world.rows("SELECT payload FROM clerk_sync_quarantine"))[0]
    assert "ada@example.com" in payload


# Deleted stays deleted.


async def test_delete_removes_the_row_and_late_updates_do_not_bring_it_back(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)
    await world.apply(store, clerk.user("user_1", 1), clerk.user("user_2", 1))
    assert await world.apply(store, clerk.deleted("user_1", 5)) == ["applied"]
    assert await world.apply(store, clerk.user("user_1", 4, username="late")) == ["stale"]
    assert await world.apply(store, clerk.user("user_1", 8, username="later")) == ["stale"]
    assert await world.rows("SELECT clerk_id FROM people") == [("user_2",)]


async def test_create_after_the_delete_of_an_unknown_user_writes_nothing(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)
    assert await world.apply(store, clerk.deleted("user_1", 5)) == ["applied"]
    assert await world.apply(store, clerk.user("user_1", 1), clerk.user("user_1", 9)) == [
        "stale",
        "stale",
    ]
    assert not await world.rows("SELECT * FROM people")


async def test_second_delete_changes_nothing(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)
    await world.apply(store, clerk.user("user_1"))
    assert await world.apply(store, clerk.deleted("user_1", 5)) == ["applied"]
    assert await world.apply(store, clerk.deleted("user_1", 7)) == ["stale"]
    deleted_at = await world.value("SELECT deleted_at FROM clerk_sync_entities")
    assert str(deleted_at).startswith("2023-11-14 22:13:25")
    assert not await world.rows("SELECT * FROM people")


async def test_second_delivery_of_one_deletion_is_stale(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)
    await world.apply(store, clerk.user("user_1"), clerk.user("user_2"))
    together = [clerk.deleted("user_2", 5), clerk.deleted("user_2", 5)]
    assert await world.apply(store, clerk.deleted("user_1", 5)) == ["applied"]
    assert await world.apply(store, *together, now_ms=1) == ["applied", "stale"]
    assert await world.apply(store, clerk.deleted("user_1", 5), now_ms=2) == ["stale"]
    # It is an earlier time that the first did not know.
    assert await world.apply(store, clerk.deleted("user_1", 4), now_ms=3) == ["applied"]
    assert not await world.rows("SELECT * FROM people")


async def test_delete_and_update_in_one_batch_end_deleted_in_either_order(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)
    for number, before in enumerate((True, False)):
        user = f"user_{number}"
        await world.apply(store, clerk.user(user, 1))
        batch = [clerk.user(user, 2), clerk.deleted(user, 3)]
        answers = await world.apply(store, *(batch if before else reversed(batch)))
        assert sorted(answers) == ["applied", "stale"]
    assert not await world.rows("SELECT * FROM people")


async def test_marked_rows_are_the_same_in_every_order(world: World) -> None:
    clerk = Clerk(MARKED)
    store = await world.of(MARKED)
    history = [
        clerk.user("user_1", 1, username="one"),
        clerk.user("user_1", 3, username="three"),
        clerk.deleted("user_1", 5),
        clerk.deleted("user_1", 6),
    ]
    for number, order in enumerate(permutations(history)):
        await world.empty("marked")
        cut = number % 4
        for batch in (order[:cut], order[cut:]):
            if batch:
                await world.apply(store, *batch)
        ((clerk_id, username, deleted_at),) = await world.rows("SELECT * FROM marked")
        assert (clerk_id, username) == ("user_1", "three")
        assert str(deleted_at).startswith("2023-11-14 22:13:25")


async def test_mark_of_an_unknown_user_makes_no_row_until_it_is_known(world: World) -> None:
    clerk = Clerk(MARKED)
    store = await world.of(MARKED)
    await world.apply(store, clerk.deleted("user_1", 5))
    assert not await world.rows("SELECT * FROM marked")
    assert await world.apply(store, clerk.user("user_1", 1, username="ada")) == ["applied"]
    ((username, deleted_at),) = await world.rows("SELECT username, deleted_at FROM marked")
    assert username == "ada"
    assert deleted_at is not None


_SET: Final = (
    "SELECT clerk_id, email, username, plan, active, status, deleted_at IS NOT NULL FROM setting"
    " ORDER BY id"
)


async def test_what_a_delete_sets_is_the_same_in_every_order(world: World) -> None:
    clerk = Clerk(SETTING)
    store = await world.of(SETTING)
    history = [
        clerk.user("user_1", 1, email="a@x", username="one", plan="pro"),
        clerk.user("user_1", 7, email="b@x", username="seven", plan="free"),
        clerk.deleted("user_1", 5),
        clerk.deleted("user_1", 6),
    ]
    for number, order in enumerate(permutations(history)):
        await world.empty("setting")
        cut = number % 4
        for batch in (order[:cut], order[cut:]):
            if batch:
                await world.apply(store, *batch)
        assert await world.rows(_SET) == [("user_1", None, "seven", "none", 0, "gone", 1)]


async def test_only_what_is_deleted_is_set(world: World) -> None:
    clerk = Clerk(SETTING)
    store = await world.of(SETTING)
    await world.apply(
        store,
        *(clerk.user(f"user_{n}", 1, email=f"{n}@x", username="u", plan="pro") for n in range(3)),
        clerk.deleted("user_1", 2),
    )
    await world.apply(store, clerk.user("user_2", 3, email="z@x", username="u", plan="pro"))
    assert sorted(await world.rows(_SET)) == [
        ("user_0", "0@x", "u", "pro", 1, "here", 0),
        ("user_1", None, "u", "none", 0, "gone", 1),
        ("user_2", "z@x", "u", "pro", 1, "here", 0),
    ]


@pytest.mark.parametrize("late", ["save", "delete", "both"])
@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
async def test_who_comes_back_with_a_unique_address_is_written(
    world: World,
    late: str,
    together: bool,  # noqa: FBT001 -- pytest passes it by name
) -> None:
    """Also where the one who had it before is heard of once more, later and newer."""
    clerk = Clerk(SETTING)
    store = await world.of(SETTING)
    fields = {"email": "ada@x", "username": "ada", "plan": "pro"}
    await world.apply(store, clerk.user("user_old", 1, **fields))
    await world.apply(store, clerk.deleted("user_old", 5))
    changes = [clerk.user("user_new", 6, **fields)]
    if late in ("save", "both"):
        changes += [clerk.user("user_old", 4, **fields), clerk.user("user_old", 8, **fields)]
    if late in ("delete", "both"):
        changes.insert(0, clerk.deleted("user_old", 4))
    for order in permutations(changes):
        for batch in [order] if together else [[one] for one in order]:
            answers = await world.apply(store, *batch)
            assert set(answers) <= {"applied", "stale", "duplicate"}
        assert sorted(await world.rows(_SET)) == [
            ("user_new", "ada@x", "ada", "pro", 1, "here", 0),
            ("user_old", None, "ada", "none", 0, "gone", 1),
        ]


async def test_the_delete_and_who_comes_back_may_come_together(world: World) -> None:
    clerk = Clerk(SETTING)
    store = await world.of(SETTING)
    fields = {"email": "ada@x", "username": "ada", "plan": "pro"}
    await world.apply(store, clerk.user("user_old", 1, **fields))
    async with Committing(world, store) as committing:
        answers = await committing.commit(
            clerk.deleted("user_old", 5), clerk.user("user_new", 6, **fields)
        )
    assert answers == ["applied", "applied"]
    assert [row[:2] for row in await world.rows(_SET)] == [
        ("user_old", None),
        ("user_new", "ada@x"),
    ]


async def test_who_is_deleted_before_anything_else_is_known_takes_no_address(world: World) -> None:
    clerk = Clerk(SETTING)
    store = await world.of(SETTING)
    fields = {"email": "ada@x", "username": "ada", "plan": "pro"}
    await world.apply(store, clerk.deleted("user_old", 5), clerk.user("user_new", 6, **fields))
    assert await world.apply(store, clerk.user("user_old", 1, **fields)) == ["applied"]
    assert sorted(await world.rows(_SET)) == [
        ("user_new", "ada@x", "ada", "pro", 1, "here", 0),
        ("user_old", None, "ada", "none", 0, "gone", 1),
    ]


# Your table is yours.


async def test_columns_of_the_app_survive_every_event(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)
    await world.apply(store, clerk.user("user_1", 1, username="ada"))
    await world.execute("UPDATE people SET tagline = 'mine', visits = 99")
    number = await world.value("SELECT id FROM people")
    await world.apply(store, clerk.user("user_1", 2, username="ada2"))
    await world.apply(store, clerk.user("user_1", 3, username="ada3", tagline="Clerk's"))
    rows = await world.rows("SELECT id, username, tagline, visits FROM people")
    assert rows == [(number, "ada3", "mine", 99)]


async def test_ids_that_differ_only_in_case_are_two_users(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)
    await world.apply(store, clerk.user("user_a", username="lower"))
    await world.apply(store, clerk.user("user_A", username="upper"), clerk.deleted("USER_a"))
    rows = await world.rows("SELECT clerk_id, username FROM people")
    assert sorted(rows) == [("user_A", "upper"), ("user_a", "lower")]
    assert await world.value("SELECT COUNT(*) FROM clerk_sync_entities") == 3


@pytest.mark.parametrize(
    "text", ["nul\0inside", "😀👩‍👩‍👧", "quote'\"\\ %s %% ;--", "ﬀ\u200b\r\n\t"]
)
async def test_text_comes_back_as_it_was(world: World, text: str) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)
    assert await world.apply(store, clerk.user("user_1", username=text)) == ["applied"]
    async with world.engine.connect() as connection:
        row = (await connection.exec_driver_sql("SELECT username FROM people")).one()
    assert row[0] == text


async def test_username_of_another_is_a_conflict_and_rewrites_nobody(world: World) -> None:
    clerk = Clerk(NAMED)
    store = await world.of(NAMED)
    await world.apply(store, clerk.user("user_1", username="ada"))
    async with Committing(world, store) as committing:
        answers = await committing.commit(
            clerk.user("user_2", username="ada", svix_id="taken"),
            clerk.user("user_3", username="bob"),
        )
        assert answers == ["quarantined: conflict", "applied"]
        taken = clerk.user("user_3", 2, username="ada")
        assert await committing.commit(taken) == ["quarantined: conflict"]
        assert await committing.commit(clerk.user("user_1", 2, username="eve")) == ["applied"]
        # Free now: what is sent again gets in.
        again = clerk.user("user_2", username="ada", svix_id="taken")
        assert await committing.commit(again) == ["applied"]
    rows = await world.rows("SELECT clerk_id, username FROM named")
    assert sorted(rows) == [("user_1", "eve"), ("user_2", "ada"), ("user_3", "bob")]


async def test_unique_column_of_the_app_never_makes_one_user_overwrite_another(
    world: World,
) -> None:
    clerk = Clerk(CODED)
    store = await world.of(CODED)
    async with Committing(world, store) as committing:
        assert await committing.commit(clerk.user("user_1", username="ada")) == ["applied"]
        late = await committing.commit(clerk.user("user_2", username="bob"))
        assert late == ["quarantined: conflict"]
        await world.execute("UPDATE coded SET code = 'A1'")
        assert await committing.commit(clerk.user("user_3", username="eve")) == ["applied"]
        assert await committing.commit(clerk.user("user_1", 2, username="ada2")) == ["applied"]
    rows = await world.rows("SELECT clerk_id, username, code FROM coded")
    assert sorted(rows) == [("user_1", "ada2", "A1"), ("user_3", "eve", "")]


# One bad event hurts nobody else.

FITTING: Final[dict[str, Any]] = {"age": 1, "score": 1.25, "born": at(0), "note": "n", "nick": "n"}
UNFIT: Final[dict[str, tuple[dict[str, Any], dict[str, Any], str]]] = {
    "long name": ({"username": "sixsix"}, {}, "too_long"),
    "no name": ({"username": None}, {}, "not_null"),
    "age of text": ({}, {"age": "old"}, "wrong_type"),
    "age beyond any integer": ({}, {"age": 2**70}, "out_of_range"),
    "score of text": ({}, {"score": "high"}, "wrong_type"),
    "score beyond any number": ({}, {"score": 10**400}, "out_of_range"),
    "birth beyond the calendar": ({}, {"born": 2**53}, "out_of_range"),
    "birth of text": ({}, {"born": "today"}, "wrong_type"),
    "age checked": ({}, {"age": 13}, "refused"),
}
UNFIT_FOR_MYSQL: Final[dict[str, tuple[dict[str, Any], dict[str, Any], str]]] = {
    "age too high": ({}, {"age": 2**15}, "out_of_range"),
    "score too high": ({}, {"score": 12345}, "out_of_range"),
    "long note": ({}, {"note": "ü" * 40_000}, "too_long"),
    "emoji in an old charset": ({}, {"nick": "😀"}, "wrong_type"),
}


async def test_what_no_column_takes_is_quarantined_and_neighbours_are_applied(
    world: World,
) -> None:
    clerk = Clerk(STRICT)
    store = await world.of(STRICT)
    cases = UNFIT if world.sqlite else UNFIT | UNFIT_FOR_MYSQL
    changes: list[Change] = []
    for name, (fields, metadata, _) in cases.items():
        changes.append(clerk.user(f"good_{len(changes)}", username="ok", public_metadata=FITTING))
        said = {"username": "ok", "public_metadata": FITTING | metadata} | fields
        changes.append(clerk.user(f"bad_{len(changes)}", svix_id=name, **said))
    async with Committing(world, store) as committing:
        answers = await committing.commit(*changes)
    assert dict(zip(cases, answers[1::2], strict=True)) == {
        name: f"quarantined: {reason}" for name, (_, _, reason) in cases.items()
    }
    assert answers[::2] == ["applied"] * len(cases)
    rows = await world.rows("SELECT clerk_id FROM strict")
    assert {clerk_id for (clerk_id,) in rows} == {f"good_{2 * n}" for n in range(len(cases))}
    assert await world.quarantined() == {name: reason for name, (_, _, reason) in cases.items()}
    state = await world.rows("SELECT clerk_id FROM clerk_sync_entities")
    assert sorted(state) == sorted(rows), "a quarantined event has no effect on the order"


async def test_event_of_an_impossible_time_is_quarantined_and_hurts_nobody(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)
    far = (2**53 - at(0)) // 1000
    async with Committing(world, store) as committing:
        answers = await committing.commit(
            clerk.user("user_1", 1),
            clerk.user("user_2", 1, event=far),
            clerk.deleted("user_3", far),
            clerk.user("user_4", 1),
        )
    assert answers == ["applied", *["quarantined: bad_version"] * 2, "applied"]


@asynccontextmanager
async def doorman(world: World, when: str, of: str) -> AsyncIterator[None]:
    """A trigger of the app's that refuses what `of` says, `when` it is tried."""
    action = (
        f"WHEN {of} BEGIN SELECT RAISE(ABORT, 'not here'); END"
        if world.sqlite
        else f"FOR EACH ROW BEGIN IF {of} THEN"
        " SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'not here'; END IF; END"
    )
    await world.execute(f"CREATE TRIGGER doorman BEFORE {when} {action}")
    try:
        yield
    finally:
        await world.execute("DROP TRIGGER doorman")


@pytest.mark.past_vitess
async def test_words_of_a_trigger_refuse_one_event(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)
    async with (
        doorman(world, "INSERT ON people", "NEW.username = 'no'"),
        Committing(world, store) as committing,
    ):
        changes = [clerk.user(f"user_{name}", username=name) for name in ("yes", "no", "fine")]
        answers = await committing.commit(*changes)
    assert answers == ["applied", "quarantined: refused", "applied"]


@pytest.mark.past_vitess
async def test_effect_and_ledger_are_one_transaction(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = await world.of(PEOPLE)
    async with doorman(world, "INSERT ON clerk_sync_events", "NEW.svix_id = 'no'"):
        with pytest.raises(RejectedByDatabase):
            await world.apply(store, clerk.user("user_1", svix_id="no"))
    for table in ("people", "clerk_sync_entities", "clerk_sync_events"):
        assert await world.value(f"SELECT COUNT(*) FROM {table}") == 0


async def test_refusal_keeps_nothing_of_its_transaction(world: World) -> None:
    clerk = Clerk(STRICT)
    store = await world.of(STRICT)
    bad = clerk.user("user_2", username="ok", public_metadata={"age": 13})
    with pytest.raises(RejectedByDatabase) as refused:
        await world.apply(store, clerk.user("user_1", username="ok"), bad)
    assert refused.value.reason is Reason.REFUSED
    for table in ("strict", "clerk_sync_entities", "clerk_sync_events", "clerk_sync_quarantine"):
        assert await world.value(f"SELECT COUNT(*) FROM {table}") == 0


async def test_quarantined_event_is_applied_when_its_column_has_been_widened(
    world: World,
) -> None:
    clerk = Clerk(STRICT)
    store = await world.of(STRICT)
    change = clerk.user("user_1", svix_id="wide", username="sixsix")
    assert await world.apply(store, change) == ["quarantined: too_long"]
    assert await world.apply(store, change) == ["quarantined: too_long"]
    assert await world.value("SELECT COUNT(*) FROM clerk_sync_quarantine") == 1
    (strict,) = [text for text in APP if "TABLE strict" in text]
    await world.ddl("DROP TABLE strict", strict.replace("VARCHAR(5)", "VARCHAR(6)"))
    try:
        assert await world.apply(await world.store(STRICT), change) == ["applied"]
        assert await world.value("SELECT username FROM strict") == "sixsix"
    finally:
        await world.ddl("DROP TABLE strict", strict)
    assert await world.quarantined() == {}
    assert await world.outcomes() == {"wide": "applied"}


async def test_quarantined_event_that_is_stale_by_now_leaves_the_quarantine_too(
    world: World,
) -> None:
    clerk = Clerk(NAMED)
    store = await world.of(NAMED)
    await world.apply(store, clerk.user("user_1", username="ada"))
    change = clerk.user("user_2", 1, svix_id="late", username="ada")
    async with Committing(world, store) as committing:
        assert await committing.commit(change) == ["quarantined: conflict"]
        assert await committing.commit(clerk.user("user_2", 2, username="bob")) == ["applied"]
        assert await committing.commit(change) == ["stale"]
        assert await committing.commit(change) == ["duplicate"]
    assert await world.quarantined() == {}
    assert (await world.outcomes())["late"] == "stale"


# What belongs to a row goes with it.


async def test_memberships_go_with_their_user_and_with_their_organization(world: World) -> None:
    clerk = Clerk(MIRROR)
    store = await world.of(MIRROR)
    await world.apply(
        store,
        clerk.save("organization", "org_1", name="One"),
        clerk.save("organization", "org_2", name="Two"),
        clerk.user("user_1"),
        clerk.user("user_2"),
        clerk.membership("m_11", "user_1", "org_1"),
        clerk.membership("m_12", "user_1", "org_2"),
        clerk.membership("m_21", "user_2", "org_1"),
        clerk.membership("m_22", "user_2", "org_2"),
    )
    assert await world.apply(store, clerk.deleted("user_1")) == ["applied"]
    memberships = "SELECT clerk_id FROM clerk_organization_memberships ORDER BY clerk_id"
    assert await world.rows(memberships) == [("m_21",), ("m_22",)]
    assert await world.apply(store, clerk.deleted("org_1", kind="organization")) == ["applied"]
    assert await world.rows(memberships) == [("m_22",)]
    gone = clerk.deleted("m_22", kind="organizationMembership")
    assert await world.apply(store, gone) == ["applied"]
    assert await world.rows(memberships) == []
    assert await world.rows("SELECT clerk_id FROM clerk_users") == [("user_2",)]


@pytest.mark.parametrize("owner", ["user", "organization"])
async def test_membership_of_a_gone_owner_is_not_written_in_any_order(
    world: World, owner: str
) -> None:
    clerk = Clerk(MIRROR)
    store = await world.of(MIRROR)
    owners = {"user": "user_1", "organization": "org_1"}
    history = [
        clerk.save(owner, owners[owner], 1),
        clerk.membership("m_1", "user_1", "org_1", 2),
        clerk.membership("m_1", "user_1", "org_1", 4),
        clerk.deleted(owners[owner], 3, kind=owner),
    ]
    for number, order in enumerate(permutations(history)):
        await world.empty("clerk_users", "clerk_organizations", "clerk_organization_memberships")
        for batch in (order[: number % 4], order[number % 4 :]):
            if batch:
                await world.apply(store, *batch)
        assert not await world.rows("SELECT * FROM clerk_organization_memberships")
        assert not await world.rows("SELECT * FROM clerk_users")


async def test_membership_waits_for_the_deletion_of_its_owner(world: World) -> None:
    clerk = Clerk(MIRROR)
    store = await world.of(MIRROR)
    await world.apply(store, clerk.user("user_1"))
    deleting = Halting(await world.connect())
    deletion = asyncio.create_task(world.apply(store, clerk.deleted("user_1"), connection=deleting))
    await deleting.decided.wait()
    joined = clerk.membership("m_1", "user_1", "org_1")
    joining = asyncio.create_task(world.apply(store, joined, connection=await world.connect()))
    await asyncio.sleep(0.1)
    assert not joining.done()
    deleting.go_on.set()
    assert (await deletion, await joining) == (["applied"], ["stale"])
    assert not await world.rows("SELECT * FROM clerk_organization_memberships")


async def test_deletion_waits_for_a_membership_on_its_way(world: World) -> None:
    clerk = Clerk(MIRROR)
    store = await world.of(MIRROR)
    await world.apply(store, clerk.user("user_1"))
    joining = Halting(await world.connect())
    joined = clerk.membership("m_1", "user_1", "org_1")
    join = asyncio.create_task(world.apply(store, joined, connection=joining))
    await joining.decided.wait()
    deletion = asyncio.create_task(
        world.apply(store, clerk.deleted("user_1"), connection=await world.connect())
    )
    await asyncio.sleep(0.1)
    assert not deletion.done()
    joining.go_on.set()
    assert (await join, await deletion) == (["applied"], ["applied"])
    assert not await world.rows("SELECT * FROM clerk_organization_memberships")


async def test_memberships_racing_with_the_end_of_their_owners_never_stay(world: World) -> None:
    clerk = Clerk(MIRROR)
    store = await world.of(MIRROR)
    left, right = await world.connect(), await world.connect()
    for number in range(40):
        user, organization = f"user_{number}", f"org_{number}"
        joins = [clerk.membership(f"m_{number}_{n}", user, organization) for n in range(2)]
        end = (
            clerk.deleted(user) if number % 2 else clerk.deleted(organization, kind="organization")
        )
        await asyncio.gather(
            world.apply(store, *joins, connection=left),
            world.apply(store, end, connection=right),
        )
    assert not await world.rows("SELECT * FROM clerk_organization_memberships")


# The tutorial's tables.


async def seeded(world: World, *users: tuple[str, str | None]) -> None:
    """Rows as the tutorial's function wrote them, each with a block."""
    for number, (username, tagline) in enumerate(users, 1):
        said = "NULL" if tagline is None else f"'{tagline}'"
        await world.execute(
            f"INSERT INTO users (id, username, tagline, display_name, img_url)"
            f" VALUES ({number}, '{username}', {said}, 'Old', 'https://old')",
            f"INSERT INTO blocks (url, type, user_id, label)"
            f" VALUES ('https://{number}', 0, {number}, 'site')",
        )


async def test_rows_of_the_tutorial_are_adopted_by_username_with_their_tagline(
    world: World,
) -> None:
    await seeded(world, ("ada", "counts"), ("bob", None))
    clerk = Clerk(ORBYTAL)
    store = await world.of(ORBYTAL)
    ada = {"username": "ada", "first_name": "Ada", "last_name": "L", "image_url": "https://new"}
    assert await world.apply(store, clerk.user("user_1", 1, **ada)) == ["applied"]
    columns = "id, clerk_id, username, tagline, display_name, img_url"
    assert sorted(await world.rows(f"SELECT {columns} FROM users")) == [
        (1, "user_1", "ada", "counts", "Ada L", "https://new"),
        (2, None, "bob", None, "Old", "https://old"),
    ]
    # Known from now on, whatever its name becomes.
    await world.apply(store, clerk.user("user_1", 2, username="bob"))
    assert await world.rows(
        "SELECT id, username, tagline FROM users WHERE clerk_id = 'user_1'"
    ) == [(1, "bob", "counts")]
    assert await world.value("SELECT COUNT(*) FROM users") == 2


@pytest.mark.past_vitess
async def test_deleting_a_user_deletes_its_blocks_in_the_same_transaction(world: World) -> None:
    await seeded(world, ("ada", None), ("bob", None))
    clerk = Clerk(ORBYTAL)
    store = await world.of(ORBYTAL)
    await world.apply(
        store, clerk.user("user_1", username="ada"), clerk.user("user_2", username="bob")
    )
    async with doorman(world, "DELETE ON users", "OLD.id = 1"):
        with pytest.raises(RejectedByDatabase):
            await world.apply(store, clerk.deleted("user_1"))
    assert await world.value("SELECT COUNT(*) FROM blocks") == 2
    assert await world.apply(store, clerk.deleted("user_1")) == ["applied"]
    assert await world.rows("SELECT user_id FROM blocks") == [(2,)]
    assert await world.rows("SELECT clerk_id FROM users") == [("user_2",)]


@pytest.mark.parametrize("together", [True, False], ids=["one batch", "two batches"])
async def test_one_row_is_adopted_by_one_user_only(world: World, together: bool) -> None:  # noqa: FBT001
    await seeded(world, ("ada", "mine"))
    clerk = Clerk(ORBYTAL)
    store = await world.of(ORBYTAL)
    changes = [clerk.user(f"user_{n}", username="ada") for n in (1, 2)]
    for batch in [changes] if together else [[change] for change in changes]:
        await world.apply(store, *batch)
    rows = await world.rows("SELECT clerk_id, username, tagline FROM users ORDER BY id")
    assert rows == [("user_1", "ada", "mine"), ("user_2", "ada", None)]


async def test_one_row_is_adopted_once_by_two_users_at_the_same_time(world: World) -> None:
    clerk = Clerk(ORBYTAL)
    store = await world.of(ORBYTAL)
    left, right = await world.connect(), await world.connect()
    for number in range(10):
        await world.execute(f"INSERT INTO users (username, tagline) VALUES ('n{number}', 'mine')")
        await asyncio.gather(
            *(
                world.apply(
                    store, clerk.user(f"{side}{number}", username=f"n{number}"), connection=c
                )
                for side, c in (("l", left), ("r", right))
            )
        )
    rows = await world.rows("SELECT clerk_id, tagline FROM users")
    assert len({clerk_id for clerk_id, _ in rows if clerk_id}) == len(rows) == 20
    assert sorted(tagline or "" for _, tagline in rows) == [""] * 10 + ["mine"] * 10


async def test_of_two_rows_with_one_name_each_user_adopts_one(world: World) -> None:
    await seeded(world, ("ada", "first"), ("ada", "second"))
    clerk = Clerk(ORBYTAL)
    store = await world.of(ORBYTAL)
    await world.apply(store, *(clerk.user(f"user_{n}", username="ada") for n in (1, 2, 3)))
    rows = await world.rows("SELECT clerk_id, tagline FROM users ORDER BY id")
    assert rows == [("user_1", "first"), ("user_2", "second"), ("user_3", None)]


@pytest.mark.parametrize("username", ["josé", "ada ", "ßen", "a%a"])
async def test_row_of_a_similar_name_is_not_adopted(world: World, username: str) -> None:
    await seeded(world, ("jose", "1"), ("ada", "2"), ("sen", "3"), ("aba", "4"))
    clerk = Clerk(ORBYTAL)
    store = await world.of(ORBYTAL)
    await world.apply(store, clerk.user("user_1", username=username))
    rows = await world.rows("SELECT username, tagline FROM users WHERE clerk_id = 'user_1'")
    assert rows == [(username, None)]
    assert await world.value("SELECT COUNT(*) FROM users WHERE clerk_id IS NULL") == 4


async def test_user_without_a_name_adopts_nothing(world: World) -> None:
    await world.execute("INSERT INTO users (username, tagline) VALUES (NULL, 'mine')")
    clerk = Clerk(ORBYTAL)
    store = await world.of(ORBYTAL)
    assert await world.apply(store, clerk.user("user_1", username=None)) == ["applied"]
    assert await world.value("SELECT tagline FROM users WHERE clerk_id = 'user_1'") is None


async def test_name_that_the_columns_charset_lacks_hurts_nobody_else(world: World) -> None:
    await world.execute("INSERT INTO old (username) VALUES ('ada')")
    clerk = Clerk(OLD)
    store = await world.of(OLD)
    async with Committing(world, store) as committing:
        answers = await committing.commit(
            clerk.user("user_1", username="😀"), clerk.user("user_2", username="ada")
        )
    assert answers == ["applied" if world.sqlite else "quarantined: wrong_type", "applied"]
    assert await world.rows("SELECT id, username FROM old WHERE clerk_id = 'user_2'") == [
        (1, "ada")
    ]


async def test_deleted_user_adopts_nothing_any_more(world: World) -> None:
    await seeded(world, ("ada", "mine"))
    clerk = Clerk(ORBYTAL)
    store = await world.of(ORBYTAL)
    await world.apply(store, clerk.deleted("user_1"))
    assert await world.apply(store, clerk.user("user_1", 20, username="ada")) == ["stale"]
    assert await world.rows("SELECT clerk_id, tagline FROM users") == [(None, "mine")]


LEASE: Final = "INSERT INTO clerk_sync_leases VALUES ('walk', 'a run', 1, 0)"
TAKEN_OVER: Final = "UPDATE clerk_sync_leases SET token = 2 WHERE name = 'walk'"


async def test_a_write_with_an_old_fencing_token_is_fenced_off(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = (await world.of(PEOPLE)).fenced("walk", 1)
    await world.execute("DELETE FROM clerk_sync_leases", LEASE)
    assert await world.apply(store, clerk.user("user_1", username="ada")) == ["applied"]
    await world.execute(TAKEN_OVER)
    before = await world.snapshot("people")
    with pytest.raises(FencedOff):
        await world.apply(store, clerk.user("user_1", 2, username="ida"))
    connection = await world.connect()
    with pytest.raises(FencedOff):
        await store.insert(connection, "user", [upsert_of(clerk.user("user_2"))], now_ms=at(99))
    await connection.rollback()
    assert await world.snapshot("people") == before


async def test_a_lease_is_acquired_only_after_what_is_written_under_it(world: World) -> None:
    clerk = Clerk(PEOPLE)
    store = (await world.of(PEOPLE)).fenced("walk", 1)
    await world.execute("DELETE FROM clerk_sync_leases", LEASE)
    writing = Halting(await world.connect())
    change = clerk.user("user_1", username="ada")
    write = asyncio.create_task(world.apply(store, change, connection=writing))
    await writing.decided.wait()
    takeover = asyncio.create_task(world.execute(TAKEN_OVER))
    await asyncio.sleep(0.1)
    assert not takeover.done(), "the lease's row is locked"
    writing.go_on.set()
    assert await write == ["applied"]
    await takeover
