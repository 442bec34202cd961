"""What only other events let in: parents that come later, unique values that are free later."""

from __future__ import annotations

import asyncio
import itertools
import random
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clerk_sync.mapping.change import from_quarantine
from clerk_sync.schema.migrate import migrate
from clerk_sync.store import quarantine
from clerk_sync.store.retries import Retries
from clerk_sync.store.values import time_text
from tests import deliveries
from tests.deliveries import now_ms, served, settings_of
from tests.histories import Clerk, Committing, Database, mapped
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from clerk_sync.database.connection import Connection, Result, Step
    from clerk_sync.database.errors import RejectedByDatabase, SchemaChanged
    from clerk_sync.mapping.change import Change
    from tests.deliveries import At
    from tools.servers import Managed

# The most usual schema there is: the app's own tables, with foreign keys between them.
OWN: Final = mapped("""
tables:
  user:
    table: people
    key: clerk_id
    columns: {email: primary_email, username: username}
  organization:
    table: teams
    key: clerk_id
    columns: {name: name}
  organizationMembership:
    table: members
    key: clerk_id
    columns: {team: organization.id, person: public_user_data.user_id}
""")
OWN_TABLES: Final = (
    """CREATE TABLE people (
        id SERIAL,
        clerk_id VARCHAR(64) EXACT NOT NULL UNIQUE,
        email VARCHAR(255) UNIQUE,
        username VARCHAR(255) NOT NULL UNIQUE
    ) OPTIONS""",
    """CREATE TABLE teams (
        id SERIAL, clerk_id VARCHAR(64) EXACT NOT NULL UNIQUE, name VARCHAR(255)
    ) OPTIONS""",
    """CREATE TABLE members (
        clerk_id VARCHAR(64) EXACT PRIMARY KEY,
        team VARCHAR(64) EXACT NOT NULL,
        person VARCHAR(64) EXACT NOT NULL,
        FOREIGN KEY (team) REFERENCES teams (clerk_id),
        FOREIGN KEY (person) REFERENCES people (clerk_id)
    ) OPTIONS""",
)
MEMBERS: Final = "SELECT clerk_id, team, person FROM members ORDER BY clerk_id"


async def make_tables(url: str) -> None:
    async with Database.at(url) as database:
        await database.ddl(*OWN_TABLES)


@asynccontextmanager
async def committing_to(url: str, **options: Any) -> AsyncIterator[tuple[Database, Committing]]:
    """A committer on the app's own tables."""
    await make_tables(url)
    async with Database.at(url) as database:
        await migrate(database.engine, OWN)
        store = await database.store(OWN)
        async with Committing(database, store, **options) as committing:
            yield database, committing


@asynccontextmanager
async def serving(url: str, **more: Any) -> AsyncIterator[At]:
    await make_tables(url)
    async with served(url, OWN, **more) as at:
        yield at


def signed_up(number: int) -> list[deliveries.Event]:
    """One person's user, organization and membership."""
    user, team = f"user_{number:03}", f"org_{number:03}"
    return [
        deliveries.event("user.created", user, username=user, email_addresses=[]),
        deliveries.event("organization.created", team),
        deliveries.event(
            "organizationMembership.created",
            f"orgmem_{number:03}",
            organization={"id": team},
            public_user_data={"user_id": user},
        ),
    ]


async def told(at: At, event: deliveries.Event, after: float) -> tuple[int, str, str | None]:
    """Deliver after so many seconds, and as Svix again where it is answered 503."""
    await asyncio.sleep(after)
    return (await at.until_taken(event, seconds=20)).said


async def is_empty(database_url: str) -> bool:
    return not await deliveries.rows(database_url, "SELECT 1 FROM clerk_sync_quarantine")


async def until_let_in(database_url: str) -> None:
    await until(lambda: is_empty(database_url), bool, seconds=20)


@pytest.mark.parametrize("reverse", [False, True])
async def test_two_hundred_sign_ups_are_all_there_in_whatever_order(
    mysql_server: Managed,
    reverse: bool,  # noqa: FBT001
) -> None:
    url = mysql_server.create_database("clerk_sync_sign_ups")
    pauses = random.Random(7)
    async with serving(url) as at:

        async def one(number: int) -> list[tuple[int, str, str | None]]:
            events = signed_up(number)
            times = [number / 200]
            for _ in events[1:]:
                times.append(times[-1] + pauses.uniform(0, 0.05))
            order = events[::-1] if reverse else events
            posted = (told(at, *pair) for pair in zip(order, times, strict=True))
            return await asyncio.gather(*posted)

        said = [one for three in await asyncio.gather(*map(one, range(200))) for one in three]
        assert {status for status, *_ in said} == {200}
        await until_let_in(url)  # on a machine that is slow, some may be held for too long
    assert len(await deliveries.rows(url, MEMBERS)) == 200


async def test_a_membership_long_before_its_user_is_kept_and_gets_in_by_itself(
    mysql_server: Managed,
) -> None:
    url = mysql_server.create_database("clerk_sync_early")
    user, team, membership = signed_up(1)
    async with serving(url) as at:
        assert (await at.post(team)).outcome == "applied"
        # Nothing is answered 2xx that is kept nowhere.
        assert (await at.post(membership)).said == (200, "quarantined", "refused")
        assert not await is_empty(url)
        assert (await at.post(user)).outcome == "applied"
        await until_let_in(url)
        outcomes = "SELECT outcome, COUNT(*) FROM clerk_sync_events GROUP BY outcome"
        assert await deliveries.rows(url, outcomes) == [("applied", 3)]
    assert await deliveries.rows(url, MEMBERS) == [("orgmem_001", "org_001", "user_001")]


async def test_what_waits_is_tried_by_the_next_process(mysql_server: Managed) -> None:
    url = mysql_server.create_database("clerk_sync_restart")
    user, team, membership = signed_up(1)
    async with serving(url) as at:
        await at.post(team)
        assert (await at.post(membership)).outcome == "quarantined"
    async with deliveries.serving(settings_of(url), OWN) as at:
        await at.until_ready()
        await at.post(user)
        await until_let_in(url)
    assert await deliveries.rows(url, MEMBERS) == [("orgmem_001", "org_001", "user_001")]


def person(user: str, email: str, version: int, username: str | None = None) -> deliveries.Event:
    return deliveries.event(
        "user.updated",
        user,
        version=version,
        username=username or user,
        primary_email_address_id="one",
        email_addresses=[{"id": "one", "email_address": email}],
    )


async def test_an_address_is_taken_over_although_its_owner_is_deleted_later(
    database_url: str,
) -> None:
    begin = now_ms()
    async with serving(database_url) as at:
        assert (await at.post(person("user_old", "a@b.c", begin))).outcome == "applied"
        taking, deletion = await asyncio.gather(
            told(at, person("user_new", "a@b.c", begin + 1), 0),
            told(at, deliveries.event("user.deleted", "user_old"), 0.3),
        )
        assert taking == deletion == (200, "applied", None)
    assert await deliveries.rows(database_url, "SELECT clerk_id, email FROM people") == [
        ("user_new", "a@b.c")
    ]


@pytest.mark.parametrize("later", [0.0, 1.5])
async def test_two_users_swap_what_is_unique(database_url: str, later: float) -> None:
    begin = now_ms()
    async with serving(database_url) as at:
        for user in ("user_a", "user_b"):
            assert (await at.post(person(user, f"{user}@b.c", begin))).outcome == "applied"
        await asyncio.gather(
            told(at, person("user_a", "user_b@b.c", begin + 1, "user_b"), 0),
            told(at, person("user_b", "user_a@b.c", begin + 1, "user_a"), later),
        )
        await until_let_in(database_url)
    found = await deliveries.rows(
        database_url, "SELECT clerk_id, email, username FROM people ORDER BY clerk_id"
    )
    assert found == [
        ("user_a", "user_b@b.c", "user_b"),
        ("user_b", "user_a@b.c", "user_a"),
    ]


async def test_a_user_is_deleted_although_its_membership_goes_later(
    mysql_server: Managed,
) -> None:
    url = mysql_server.create_database("clerk_sync_deletes")
    async with serving(url) as at:
        for event in signed_up(1):
            assert (await at.post(event)).outcome == "applied"
        said = await asyncio.gather(
            told(at, deliveries.event("user.deleted", "user_001"), 0),
            told(at, deliveries.event("organizationMembership.deleted", "orgmem_001"), 0.2),
        )
        assert set(said) == {(200, "applied", None)}
    assert await deliveries.rows(url, "SELECT 1 FROM people") == []


async def test_a_conflict_for_good_ends_in_quarantine_and_hurts_nobody(
    database_url: str,
) -> None:
    begin = now_ms()
    async with serving(database_url) as at:
        assert (await at.post(person("user_1", "a@b.c", begin))).outcome == "applied"
        refused, *others = await asyncio.gather(
            told(at, person("user_2", "a@b.c", begin), 0),
            *(told(at, person(f"user_{n}", f"{n}@b.c", begin), n / 100) for n in range(3, 60)),
        )
        assert refused == (200, "quarantined", "conflict")
        assert set(others) == {(200, "applied", None)}
        found = await deliveries.rows(
            database_url, "SELECT reason, clerk_id FROM clerk_sync_quarantine"
        )
        assert found == [("conflict", "user_2")]


@pytest.mark.parametrize(
    ("age_ms", "pause"),
    [(0, 1_000), (5_000, 1_000), (60_000, 4_000), (3_600_000, 256_000), (28 * 3_600_000, None)],
)
def test_the_pause_before_the_next_try_is_a_tenth_of_the_wait(
    age_ms: int, pause: int | None
) -> None:
    now = now_ms()
    found = quarantine.next_retry(now, now - age_ms)
    if pause is None:
        assert found is None
    else:
        # At a moment that all of this pause, or of a shorter one, share.
        assert found is not None
        assert found % pause == 0
        assert 0 < found - now <= pause


async def test_two_that_swap_are_tried_together_however_old_each_is(database_url: str) -> None:
    clerk = Clerk(OWN)
    async with committing_to(database_url, hold_seconds=0.05) as (database, committing):
        await committing.commit(
            clerk.user("user_1", username="one"), clerk.user("user_2", username="two")
        )
        for user, other in (("user_1", "two"), ("user_2", "one")):
            said = await committing.commit(clerk.user(user, 2, username=other))
            assert said == ["quarantined: conflict"]
            await asyncio.sleep(0.3)
        retries = retries_of(database, committing)
        for _ in range(20):
            await retries.due()
            if not await database.quarantined():
                break
            await asyncio.sleep(0.2)
        people = "SELECT clerk_id, username FROM people ORDER BY clerk_id"
        assert await database.rows(people) == [("user_1", "two"), ("user_2", "one")]


async def test_what_another_replica_does_not_map_stays_in_quarantine(database_url: str) -> None:
    clerk = Clerk(OWN)
    async with committing_to(database_url, hold_seconds=0.05) as (database, committing):
        await committing.commit(clerk.user("user_1", username="same"))
        await committing.commit(clerk.user("user_2", username="same"))
        await due_since(database, hours=1)
        teams = replace(OWN, tables={"organization": OWN.tables["organization"]})
        older = Retries(
            database.engine, teams, committing.committer, instance_id=None, ready=lambda: True
        )
        await older.due()
        assert await database.quarantined() == {"msg_000002": "conflict"}
        assert await quarantine.size(database.engine) == quarantine.Size(stuck=1, retried=1)


async def test_what_was_tried_for_too_long_stays_for_somebody_to_look(
    database_url: str,
) -> None:
    clerk = Clerk(OWN)
    async with committing_to(database_url, hold_seconds=0.05) as (database, committing):
        retries = retries_of(database, committing)
        assert await committing.commit(clerk.user("user_1", username="same")) == ["applied"]
        said = await committing.commit(clerk.user("user_2", username="same"))
        assert said == ["quarantined: conflict"]
        assert await quarantine.size(database.engine) == quarantine.Size(stuck=0, retried=1)
        await due_since(database, hours=1)
        await retries.due()
        assert await quarantine.size(database.engine) == quarantine.Size(stuck=1, retried=1)
        await due_since(database, hours=29)
        await retries.due()
        assert await quarantine.size(database.engine) == quarantine.Size(stuck=1, retried=0)
        assert await database.outcomes() == {
            "msg_000001": "applied",
            "msg_000002": "quarantined",
        }


async def due_since(database: Database, *, hours: int) -> None:
    """Have everything in quarantine be as old as this, and due."""
    then = time_text(now_ms() - hours * 3_600_000)
    await database.execute(
        f"UPDATE clerk_sync_quarantine SET quarantined_at = '{then}', retry_at = '{then}'"
    )


def retries_of(database: Database, committing: Committing) -> Retries:
    return Retries(database.engine, OWN, committing.committer, instance_id=None, ready=lambda: True)


# The database refuses the one; the other is longer than its column by now.
@pytest.mark.parametrize("username", ["same", "x" * 300])
async def test_what_was_erased_meanwhile_does_not_come_back(
    database_url: str, username: str
) -> None:
    clerk = Clerk(OWN)
    async with committing_to(database_url, hold_seconds=0.05) as (database, committing):
        await committing.commit(clerk.user("user_1", username="same"))
        await committing.commit(clerk.user("user_2", username="same"))
        await due_since(database, hours=1)
        # Of several replicas, one has it.
        claims = await asyncio.gather(*(quarantine.claim(database.engine, 9) for _ in "abc"))
        (claimed,) = [one for claim in claims for one in claim]
        await quarantine.drop(database.engine, [claimed.svix_id])
        change = clerk.user("user_2", username=username, svix_id=claimed.svix_id)
        (answer,) = await committing.committer.retry([change])
        assert answer.outcome == "quarantined"
        await quarantine.postpone(database.engine, claimed.svix_id, "conflict", now_ms())
        assert await database.quarantined() == {}
        # Nor by a replay that read it before.
        (said,) = await committing.commit(from_quarantine(change))
        assert said.startswith("quarantined")
        assert await database.quarantined() == {}


async def test_what_is_replayed_in_vain_says_why_it_stays(database_url: str) -> None:
    clerk = Clerk(OWN)
    async with committing_to(database_url, hold_seconds=0.05) as (database, committing):
        await committing.commit(clerk.user("user_1", username="same"))
        await committing.commit(clerk.user("user_2", username="same"))
        (kept,) = await quarantine.listed(database.engine)
        for username, reason in (("x" * 300, "too_long"), ("same", "conflict")):
            change = clerk.user("user_2", username=username, svix_id=kept.svix_id)
            said = await committing.commit(from_quarantine(change))
            assert said == [f"quarantined: {reason}"]
            (now,) = await quarantine.listed(database.engine)
            assert (now.reason, now.payload) == (reason, kept.payload)
            # Only what another event may let in is tried again by itself.
            assert (now.retry_at is not None) == (reason == "conflict")
        alone = clerk.user("user_2", username="free", svix_id=kept.svix_id)
        assert await committing.commit(from_quarantine(alone)) == ["applied"]
        assert await database.quarantined() == {}


# Any order, any batches: the rows are those of one delivery in order, on tables that refuse.


def history(clerk: Clerk) -> list[Change]:
    def named(user: str, version: int, name: str) -> Change:
        return clerk.user(user, version, username=name)

    return [
        named("user_a", 1, "ada"),
        named("user_b", 1, "bob"),
        clerk.save("organization", "org_1", 1, name="one"),
        clerk.membership("orgmem_1", "user_a", "org_1", 2),
        named("user_a", 3, "tmp"),
        named("user_b", 3, "ada"),
        named("user_a", 4, "bob"),
        clerk.deleted("user_b", 5),
        named("user_c", 6, "ada"),
        clerk.membership("orgmem_2", "user_c", "org_1", 7),
        clerk.deleted("orgmem_1", 8, kind="organizationMembership"),
    ]


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_order_converges_on_tables_that_refuse(data: st.DataObject, shared_url: str) -> None:
    clerk = Clerk(OWN)
    changes = data.draw(st.permutations(history(clerk)))
    cuts = data.draw(st.lists(st.integers(0, len(changes)), max_size=4))
    asyncio.run(converge(shared_url, changes, sorted({0, *cuts, len(changes)})))


async def converge(url: str, changes: Sequence[Change], cuts: Sequence[int]) -> None:
    async with Database.at(url) as database:
        if "people" not in await table_names(database):
            await database.ddl(*OWN_TABLES)
            await migrate(database.engine, OWN)
        await database.empty("members", "people", "teams")
        store = await database.store(OWN)
        async with Committing(database, store, writers=2, hold_seconds=0.05) as committing:
            for start, end in itertools.pairwise(cuts):
                await committing.commit(*changes[start:end])
            retries = retries_of(database, committing)
            for _ in range(8):
                await due_since(database, hours=1)
                await retries.due()
                if not await database.quarantined():
                    break
        assert await database.quarantined() == {}
        people = "SELECT clerk_id, username FROM people ORDER BY clerk_id"
        assert await database.rows(people) == [("user_a", "bob"), ("user_c", "ada")]
        assert await database.rows(MEMBERS) == [("orgmem_2", "org_1", "user_c")]


async def table_names(database: Database) -> set[str]:
    async with database.engine.connect() as connection:
        return set(await connection.run_sync(lambda c: sa.inspect(c).get_table_names()))


async def test_what_is_held_has_its_answer_before_the_end(database_url: str) -> None:
    clerk = Clerk(OWN)
    async with committing_to(database_url, hold_seconds=60) as (_, committing):
        await committing.commit(clerk.user("user_1", username="same"))
        change = clerk.user("user_2", username="same")
        refused = asyncio.create_task(committing.commit(change))
        for _ in range(40):  # until its tries are far apart
            await asyncio.sleep(0.02)
        assert not refused.done()
        closing = asyncio.create_task(committing.committer.close())
        async with asyncio.timeout(10):
            assert await refused == ["quarantined: conflict"]
            await closing


async def test_a_row_to_adopt_that_is_refused_takes_nobody_along(database_url: str) -> None:
    adopting = mapped("""
tables:
  user:
    table: old_people
    key: clerk_id
    adopt: {username: username}
    columns: {username: username, email: external_id}
""")
    async with Database.at(database_url) as database:
        await database.ddl(
            "CREATE TABLE old_people (id SERIAL, clerk_id VARCHAR(64) EXACT UNIQUE,"
            " username VARCHAR(50), email VARCHAR(50) UNIQUE) OPTIONS"
        )
        await database.execute(
            "INSERT INTO old_people (username, email) VALUES ('ada', 'old'), ('bob', 'taken')"
        )
        await migrate(database.engine, adopting)
        clerk = Clerk(adopting)
        store = await database.store(adopting)
        async with Committing(database, store, hold_seconds=0.1) as committing:
            refused, fine = await committing.commit(
                clerk.user("user_ada", username="ada", external_id="taken"),
                clerk.user("user_new", username="new", external_id="mine"),
            )
            assert (refused, fine) == ("quarantined: conflict", "applied")
            people = "SELECT username, clerk_id, email FROM old_people ORDER BY username"
            assert await database.rows(people) == [
                ("ada", None, "old"),
                ("bob", None, "taken"),
                ("new", "user_new", "mine"),
            ]


async def test_an_event_that_is_held_takes_no_value_from_rows_that_refer_to_it(
    mysql_server: Managed,
) -> None:
    url = mysql_server.create_database("clerk_sync_cascade")
    await make_tables(url)
    async with Database.at(url) as database:
        await database.ddl(
            "CREATE TABLE posts (id SERIAL, author VARCHAR(255),"
            " FOREIGN KEY (author) REFERENCES people (email) ON UPDATE SET NULL) OPTIONS"
        )
        await migrate(database.engine, OWN)
        store = await database.store(OWN)
        clerk = Clerk(OWN)

        def with_email(version: int) -> Change:
            address = [{"id": "one", "email_address": "a@b.c"}]
            return clerk.user(
                "user_1",
                version,
                username=f"name {version}",
                primary_email_address_id="one",
                email_addresses=address,
            )

        async with Committing(database, store) as committing:
            assert await committing.commit(with_email(1)) == ["applied"]
            await database.execute("INSERT INTO posts (author) VALUES ('a@b.c')")
            committing.committer.status.wary_until = float("inf")
            async with database.engine.connect() as app:
                await app.exec_driver_sql("SELECT 1 FROM people FOR UPDATE")
                held = asyncio.create_task(committing.commit(with_email(2)))
                await asyncio.sleep(0.1)
                await app.rollback()
            assert await held == ["applied"]
        assert await database.rows("SELECT author FROM posts") == [("a@b.c",)]


# Within one batch nothing has to wait


async def test_a_batch_saves_parents_first_and_deletes_them_last(mysql_server: Managed) -> None:
    clerk = Clerk(OWN)
    url = mysql_server.create_database("clerk_sync_kinds")
    async with committing_to(url, hold_seconds=0) as (database, batch):
        answers = await batch.commit(
            clerk.membership("orgmem_1", "user_1", "org_1"),
            clerk.save("organization", "org_1"),
            clerk.user("user_1", username="one"),
        )
        assert answers == ["applied"] * 3
        answers = await batch.commit(
            clerk.deleted("user_1"),
            clerk.deleted("org_1", kind="organization"),
            clerk.deleted("orgmem_1", kind="organizationMembership"),
        )
        assert answers == ["applied"] * 3
        assert batch.transactions == 2
        assert await database.rows(MEMBERS) == []


async def test_a_batch_deletes_before_it_saves(database_url: str) -> None:
    clerk = Clerk(OWN)
    async with committing_to(database_url, hold_seconds=0) as (database, batch):
        assert await batch.commit(clerk.user("user_1", username="same")) == ["applied"]
        answers = await batch.commit(clerk.user("user_2", username="same"), clerk.deleted("user_1"))
        assert answers == ["applied"] * 2
        assert batch.transactions == 2
        assert await database.rows("SELECT clerk_id FROM people") == [("user_2",)]


# A row that the app inserts at the same moment


class Interrupted:
    """A real connection, before whose second round trip the app does something."""

    def __init__(self, connection: Connection, database: Database, once: list[str]) -> None:
        self._connection = connection
        self._database = database
        self._once = once
        self._trips = 0

    async def run(self, steps: Sequence[Step]) -> list[Result]:
        self._trips += 1
        if self._trips == 2 and self._once:
            await self._database.execute(self._once.pop())
        return await self._connection.run(steps)

    async def try_each(
        self, steps: Sequence[Step]
    ) -> dict[int, RejectedByDatabase | SchemaChanged]:
        return await self._connection.try_each(steps)

    async def rollback(self) -> None:
        await self._connection.rollback()

    def close(self) -> None:
        self._connection.close()


async def test_a_row_that_the_app_inserts_meanwhile_is_updated(mysql_server: Managed) -> None:
    url = mysql_server.create_database("clerk_sync_race")
    await make_tables(url)
    async with Database.at(url) as database:
        await migrate(database.engine, OWN)
        inserts = ["INSERT INTO people (clerk_id, username) VALUES ('user_1', 'mine')"]

        async def opened() -> Connection:
            return Interrupted(await database.connect(), database, inserts)

        store = await database.store(OWN)
        async with Committing(database, store, connect=opened) as committing:
            said = await committing.commit(Clerk(OWN).user("user_1", username="ada"))
        assert said == ["applied"]
        assert await database.rows("SELECT clerk_id, username FROM people") == [("user_1", "ada")]


# Numbers that the database gives out


async def test_updates_use_up_no_numbers_and_nobody_gets_another_s_row(
    mysql_server: Managed,
) -> None:
    url = mysql_server.create_database("clerk_sync_numbers")
    numbered = mapped("""
tables:
  user:
    table: numbered
    key: clerk_id
    columns: {username: username}
""")
    async with Database.at(url) as database:
        await database.ddl(
            "CREATE TABLE numbered (n TINYINT AUTO_INCREMENT PRIMARY KEY,"
            " clerk_id VARCHAR(64) EXACT NOT NULL UNIQUE, username VARCHAR(50)) OPTIONS"
        )
        await migrate(database.engine, numbered)
        store = await database.store(numbered)
        clerk = Clerk(numbered)
        async with Committing(database, store, hold_seconds=0.05) as committing:
            for version in range(1, 160):
                assert await committing.commit(clerk.user("user_1", version)) == ["applied"]
            for user in ("user_2", "user_3"):
                assert await committing.commit(clerk.user(user, username=user)) == ["applied"]
            await database.execute("INSERT INTO numbered VALUES (127, 'user_last', 'last')")
            # None is left: the new user is kept for when the column is widened.
            said = await committing.commit(clerk.user("user_4", username="new"))
            assert said == ["quarantined: conflict"]
            assert await committing.commit(clerk.user("user_1", 999, username="one")) == ["applied"]
            expected = [
                (1, "user_1", "one"),
                (2, "user_2", "user_2"),
                (3, "user_3", "user_3"),
                (127, "user_last", "last"),
            ]
            assert await database.rows("SELECT * FROM numbered ORDER BY n") == expected
            await database.execute("ALTER TABLE numbered MODIFY n INT AUTO_INCREMENT")
            await due_since(database, hours=1)
            await Retries(
                database.engine,
                numbered,
                committing.committer,
                instance_id=None,
                ready=lambda: True,
            ).due()
            last = "SELECT clerk_id, username FROM numbered WHERE n > 127"
            assert await database.rows(last) == [("user_4", "new")]
            assert await database.quarantined() == {}
