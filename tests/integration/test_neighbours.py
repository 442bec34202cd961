"""What one event meets costs no other: locks of the app, poison, connections gone strange."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import pytest

from clerk_sync.database.errors import RejectedByDatabase
from clerk_sync.schema.migrate import migrate
from tests import deliveries
from tests.deliveries import served, settings_of
from tests.histories import Clerk, Committing, Database, mapped

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from clerk_sync.database.connection import Connection, Result, Step
    from clerk_sync.database.errors import SchemaChanged
    from clerk_sync.store.store import Store
    from tools.servers import Managed

OWN: Final = mapped("""
tables:
  user:
    table: people
    key: clerk_id
    columns: {username: username, age: public_metadata.age}
    owns:
      - {table: blocks, column: user_id, references: id}
  organizationMembership:
    table: members
    key: clerk_id
    columns: {person: public_user_data.user_id}
""")
OWN_TABLES: Final = (
    """CREATE TABLE people (
        id SERIAL,
        clerk_id VARCHAR(64) EXACT NOT NULL UNIQUE,
        username VARCHAR(255),
        age INTEGER CHECK (age <> 13)
    ) OPTIONS""",
    "CREATE TABLE blocks (id SERIAL, user_id BIGINT) OPTIONS",
    """CREATE TABLE members (
        clerk_id VARCHAR(64) EXACT PRIMARY KEY,
        person VARCHAR(64) EXACT NOT NULL,
        FOREIGN KEY (person) REFERENCES people (clerk_id)
    ) OPTIONS""",
)
LOCKED: Final = "unavailable: database"


@asynccontextmanager
async def own_tables(url: str) -> AsyncIterator[tuple[Database, Store]]:
    async with Database.at(url) as database:
        await database.ddl(*OWN_TABLES)
        await migrate(database.engine, OWN)
        yield database, await database.store(OWN)


@asynccontextmanager
async def locking(database: Database, *statements: str) -> AsyncIterator[None]:
    """Hold locks as a transaction of the app's."""
    async with database.engine.connect() as app:
        for statement in statements:
            await app.exec_driver_sql(statement)
        try:
            yield
        finally:
            await app.rollback()


@pytest.mark.parametrize("locked", [1, 3, 8, 40, 100])
async def test_every_free_row_is_written_however_many_are_locked(
    mysql_server: Managed, locked: int
) -> None:
    url = mysql_server.create_database("clerk_sync_locked")
    await deliveries.migrate(url)
    clerk_ids = [f"user_{n:03}" for n in range(100 + locked)]
    events = [deliveries.event("user.updated", one, version=2) for one in clerk_ids]
    async with served(url, CLERK_SYNC_DEADLINE_SECONDS=5) as at, Database.at(url) as database:
        first = [deliveries.event("user.updated", one, version=1) for one in clerk_ids]
        assert {reply.status for reply in await asyncio.gather(*map(at.post, first))} == {200}
        # Spread among the free ones, as nobody sorts his events by who is going to lock what.
        held = clerk_ids[:: max(1, len(clerk_ids) // locked)][:locked]
        # One by one: for a long list MariaDB would read a whole index, and lock all of it.
        row = "SELECT 1 FROM clerk_users WHERE clerk_id = '{}' FOR UPDATE"
        async with locking(database, *map(row.format, held)):
            replies = await asyncio.gather(*map(at.post, events))
            said = {one: reply.said for one, reply in zip(clerk_ids, replies, strict=True)}
            free = {outcome for one, outcome in said.items() if one not in held}
            assert free == {(200, "applied", None)}
            assert {said[one] for one in held} == {(503, "unavailable", "database")}
            # Nor is there trouble behind it.
            again = [deliveries.event("user.updated", one, version=3) for one in clerk_ids[-40:]]
            later = await asyncio.gather(*map(at.post, again))
            assert {
                reply.said
                for one, reply in zip(clerk_ids[-40:], later, strict=True)
                if one not in held
            } == {(200, "applied", None)}
        assert {reply.status for reply in await asyncio.gather(*map(at.post, events))} == {200}


async def test_a_short_lock_costs_its_event_a_moment_and_nothing_else(
    mysql_server: Managed,
) -> None:
    clerk = Clerk(OWN)
    async with (
        own_tables(mysql_server.create_database("clerk_sync_briefly")) as (database, store),
        Committing(database, store) as committing,
    ):
        await committing.commit(clerk.user("user_1"), clerk.user("user_2"))
        committing.committer.status.wary_until = float("inf")  # as after a lock was met
        async with locking(database, "SELECT 1 FROM people WHERE clerk_id = 'user_1' FOR UPDATE"):
            held = asyncio.create_task(committing.commit(clerk.user("user_1", 2, username="one")))
            assert await committing.commit(clerk.user("user_2", 2)) == ["applied"]
            assert not held.done()
        assert await held == ["applied"]


@pytest.mark.parametrize(
    "lock",
    [
        "SELECT 1 FROM people WHERE clerk_id = 'user_1' FOR UPDATE",
        "SELECT 1 FROM clerk_sync_entities WHERE clerk_id = 'user_1' FOR UPDATE",
    ],
    ids=["row", "state"],
)
async def test_a_lock_is_found_wherever_it_is(mysql_server: Managed, lock: str) -> None:
    clerk = Clerk(OWN)
    async with (
        own_tables(mysql_server.create_database("clerk_sync_wherever")) as (database, store),
        Committing(database, store, hold_seconds=0.2) as committing,
    ):
        users = [clerk.user(f"user_{n}") for n in range(1, 4)]
        assert await committing.commit(*users) == ["applied"] * 3
        async with locking(database, lock):
            connection = await database.connect()
            changes = [clerk.user("user_2", 2), clerk.deleted("user_1"), clerk.user("user_3", 2)]
            assert await store.locked(connection, changes) == {1}
            assert await committing.commit(*changes) == ["applied", LOCKED, "applied"]


async def test_the_lock_of_a_parent_or_of_an_owned_row_is_seen(mysql_server: Managed) -> None:
    clerk = Clerk(OWN)
    async with own_tables(mysql_server.create_database("clerk_sync_kin")) as (database, store):
        await database.apply(store, clerk.user("user_1"), clerk.user("user_2"))
        await database.execute(
            "INSERT INTO blocks (user_id) SELECT id FROM people WHERE clerk_id = 'user_2'"
        )
        connection = await database.connect()
        memberships = [clerk.membership(f"orgmem_{n}", f"user_{n}", "org_1") for n in (1, 2, 3)]
        async with locking(database, "SELECT 1 FROM people WHERE clerk_id = 'user_1' FOR UPDATE"):
            assert await store.locked(connection, memberships) == {0}
        deletions = [clerk.deleted(f"user_{n}") for n in (1, 2)]
        async with locking(database, "SELECT 1 FROM blocks FOR UPDATE"):
            assert await store.locked(connection, deletions) == {1}
        assert await store.locked(connection, [*memberships, *deletions]) == set()


# Poison


async def test_half_a_thousand_poisoned_events_hurt_nobody_else(mysql_server: Managed) -> None:
    clerk = Clerk(OWN)
    changes = [
        clerk.user(f"user_{n:04}", public_metadata={"age": 13 if n % 2 else 14})
        for n in range(1000)
    ]
    async with (
        own_tables(mysql_server.create_database("clerk_sync_poison")) as (database, store),
        Committing(database, store, writers=2) as committing,
    ):
        answers = await committing.commit(*changes)
        assert answers == ["applied", "quarantined: refused"] * 500
        # One for each batch, where halving took one for nearly every event.
        assert committing.transactions <= 8
        assert await database.value("SELECT COUNT(*) FROM people") == 500
        assert await database.value("SELECT COUNT(*) FROM clerk_sync_quarantine") == 500


async def test_an_older_save_takes_the_place_of_a_newer_one_that_is_refused(
    database_url: str,
) -> None:
    clerk = Clerk(OWN)
    async with (
        own_tables(database_url) as (database, store),
        Committing(database, store) as committing,
    ):
        answers = await committing.commit(
            clerk.user("user_1", 1, username="one"),
            clerk.user("user_1", 2, username="two", public_metadata={"age": 13}),
            clerk.user("user_1", 3, username="three", public_metadata={"age": 13}),
            clerk.user("user_2", 1, public_metadata={"age": 13}),
            clerk.user("user_3", 1),
        )
        refused = "quarantined: refused"
        assert answers == ["applied", refused, refused, refused, "applied"]
        found = await database.rows("SELECT clerk_id, username FROM people ORDER BY clerk_id")
        assert found == [("user_1", "one"), ("user_3", None)]


async def test_a_poisoned_event_beside_a_locked_row_costs_the_others_nothing(
    mysql_server: Managed,
) -> None:
    clerk = Clerk(OWN)
    async with (
        own_tables(mysql_server.create_database("clerk_sync_both")) as (database, store),
        Committing(database, store, hold_seconds=0.2) as committing,
    ):
        users = [clerk.user(f"user_{n}") for n in range(20)]
        assert await committing.commit(*users) == ["applied"] * 20
        lock = "SELECT 1 FROM people WHERE clerk_id = 'user_9' FOR UPDATE"
        async with locking(database, lock):
            answers = await committing.commit(
                *(
                    clerk.user(f"user_{n}", 2, public_metadata={"age": 13 if n == 2 else 1})
                    for n in range(20)
                )
            )
        expected = {2: "quarantined: refused", 9: LOCKED}
        assert answers == [expected.get(n, "applied") for n in range(20)]


async def test_writers_do_not_take_each_other_s_locks_for_the_app_s(
    mysql_server: Managed,
) -> None:
    clerk = Clerk(OWN)
    async with (
        own_tables(mysql_server.create_database("clerk_sync_shared")) as (database, store),
        Committing(database, store, writers=2, hold_seconds=5) as committing,
    ):
        assert await committing.commit(clerk.user("user_1")) == ["applied"]
        committing.committer.status.wary_until = float("inf")
        memberships = [clerk.membership(f"orgmem_{n}", "user_1", "org_1") for n in range(600)]
        assert await committing.commit(*memberships) == ["applied"] * 600


# Connections


class Strange:
    """A real connection on which every statement is refused, by a number that nobody knows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def run(self, steps: Sequence[Step]) -> list[Result]:
        raise RejectedByDatabase(None, f"MySQL error 12345 for {len(steps)} statements")

    async def try_each(
        self, steps: Sequence[Step]
    ) -> dict[int, RejectedByDatabase | SchemaChanged]:
        raise RejectedByDatabase(None, f"MySQL error 12345 for {len(steps)} statements")

    async def rollback(self) -> None:
        await self._connection.rollback()

    def close(self) -> None:
        self._connection.close()


async def test_a_connection_that_refuses_everything_is_replaced(database_url: str) -> None:
    clerk = Clerk(OWN)
    async with own_tables(database_url) as (database, store):
        opened = 0

        async def open_one() -> Connection:
            nonlocal opened
            opened += 1
            connection = await database.connect()
            return Strange(connection) if opened == 1 else connection

        async with Committing(database, store, connect=open_one) as committing:
            first = await committing.commit(*(clerk.user(f"user_{n}") for n in range(3)))
            second = await committing.commit(*(clerk.user(f"user_{n}") for n in range(3)))
        # The first three tell: from then on it is another connection.
        assert first in ([LOCKED] * 3, ["applied"] * 3)
        assert second == ["applied"] * 3
        assert opened == 2


class Partly(Strange):
    """One on which some statements are refused so: those that write this name."""

    def __init__(self, connection: Connection, name: str) -> None:
        super().__init__(connection)
        self._name = name

    async def run(self, steps: Sequence[Step]) -> list[Result]:
        if any(self._name in map(str, row) for _, rows in steps for row in rows):
            raise RejectedByDatabase(None, "MySQL error 1449")
        return await self._connection.run(steps)

    async def try_each(
        self, steps: Sequence[Step]
    ) -> dict[int, RejectedByDatabase | SchemaChanged]:
        refused = {
            place: RejectedByDatabase(None, "MySQL error 1449")
            for place, (_, rows) in enumerate(steps)
            if any(self._name in map(str, row) for row in rows)
        }
        fine = [step for place, step in enumerate(steps) if place not in refused]
        assert not await self._connection.try_each(fine)
        return {**refused}


async def test_one_table_s_unknown_trouble_costs_no_connection(mysql_server: Managed) -> None:
    clerk = Clerk(OWN)
    async with own_tables(mysql_server.create_database("clerk_sync_partly")) as (database, store):

        async def open_one() -> Connection:
            return Partly(await database.connect(), "cursed")

        async with Committing(database, store, connect=open_one) as committing:
            for version in (1, 2):
                answers = await committing.commit(
                    *(
                        clerk.user(f"user_{n}", version, username="cursed" if n < 6 else "fine")
                        for n in range(20)
                    )
                )
                assert answers == [LOCKED] * 6 + ["applied"] * 14


async def test_a_frozen_database_is_answered_at_once_when_it_is_known(
    mysql_server: Managed,
) -> None:
    url = mysql_server.create_database("clerk_sync_frozen")
    await deliveries.migrate(url)
    settings = settings_of(url, CLERK_SYNC_DEADLINE_SECONDS=8)
    async with deliveries.serving(settings) as at:
        await at.until_ready()
        assert (await at.post(deliveries.event("user.created", "user_1"))).status == 200
        mysql_server.freeze()
        try:
            await at.until_ready(ready=False, seconds=20)
            events = [deliveries.event("user.created", f"user_{n}") for n in range(20)]
            posted = [asyncio.create_task(at.post(event)) for event in events]
            # Well before the deadline, which each of these would take otherwise. One in a second
            # is let through, to see whether the database is back.
            done, _ = await asyncio.wait(posted, timeout=4)
            assert len(done) >= 15
            assert {task.result().said for task in done} == {(503, "unavailable", "database")}
        finally:
            mysql_server.thaw()
        await at.until_ready(seconds=20)
        assert (await at.post(deliveries.event("user.created", "user_2"))).status == 200
