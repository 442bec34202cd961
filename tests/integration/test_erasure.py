"""What is removed for good is gone whole, stays away, and takes nobody else's rows along."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest
import sqlalchemy as sa
from asyncmy.errors import OperationalError

from clerk_sync.database.errors import (
    Contention,
    DatabaseUnavailable,
    LockWaitTimeout,
    translate_engine_errors,
)
from clerk_sync.schema.migrate import migrate
from clerk_sync.store import erasure
from clerk_sync.store.store import REMOVED
from tests.histories import NOW, Clerk, Database, Halting, at, mapped

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from clerk_sync.mapping.change import Change
    from clerk_sync.mapping.model import Mapping
    from clerk_sync.store.store import Store

DAY: Final = 86_400_000
_TABLES: Final = """
tables:
  user:
    table: people
    key: clerk_id
    columns: {username: username}
    on_delete: %s
    owns:
      - {table: notes, column: person_id, references: id}
      - {table: members, column: user_id, references: clerk_id}
      - {table: sessions, column: user_id, references: clerk_id}
  organizationMembership:
    table: members
    create: true
    key: clerk_id
    columns: {user_id: {value: public_user_data.user_id, type: id, index: true}}
    owns:
      - {table: badges, column: member_id, references: clerk_id}
  session:
    table: sessions
    create: true
    key: clerk_id
    columns: {user_id: {value: user_id, type: id, index: true}}
  organizationInvitation:
    table: invitations
    create: true
    key: clerk_id
    columns:
      email: {value: email_address, type: string(320)}
      user_id: {value: user_id, type: id}
      inviter: {value: inviter_id, type: id}
  subscription:
    table: plans
    key: clerk_id
    columns: {payer: payer.user_id, price: public_metadata.price}
  waitlistEntry:
    table: waiting
    create: true
    key: clerk_id
    columns: {email: {value: email_address, type: string(320)}}
"""
PURGED: Final = mapped(_TABLES % "{mark: deleted_at, purge_after: 1d}")
KEPT: Final = mapped(_TABLES % "{mark: deleted_at}")
REMOVING: Final = mapped(_TABLES % "remove")
BLIND: Final = mapped("""
tables:
  session: {table: sessions, key: clerk_id, columns: {user_id: client_id}}
  subscription: {table: plans, key: clerk_id, columns: {payer: payer.user_id}}
  organizationMembership: {table: members, key: clerk_id, columns: {user_id: role}}
  waitlistEntry: {table: waiting, key: clerk_id, columns: {email: email_address}}
""")
TABLES: Final = (*("people", "notes", "members", "badges"), *("sessions", "invitations", "plans"))
APP: Final = (
    """CREATE TABLE people (id SERIAL, clerk_id VARCHAR(128) EXACT UNIQUE, username VARCHAR(64),
        deleted_at DATETIME(3)) OPTIONS""",
    "CREATE TABLE notes (id SERIAL, person_id INT) OPTIONS",
    "CREATE TABLE badges (id SERIAL, member_id VARCHAR(128) EXACT) OPTIONS",
    # The app's own way to write a Clerk id: without regard to case.
    """CREATE TABLE plans (clerk_id VARCHAR(128) EXACT UNIQUE, payer VARCHAR(128), price INT)
        OPTIONS""",
)
_stores: dict[tuple[str, int], Store] = {}

ADA: Final = "user_ada"
# Ids that a careless comparison takes for Ada's.
OTHERS: Final = ("user_ADA", "user_adab", "userxada")


@pytest.fixture(scope="module")
def world_url(shared_url: str) -> str:
    async def made() -> None:
        async with Database.at(shared_url) as database:
            await database.ddl(*APP)
            await migrate(database.engine, PURGED)

    asyncio.run(made())
    return shared_url


@asynccontextmanager
async def world(url: str, mapping: Mapping) -> AsyncIterator[tuple[Database, Store, Clerk]]:
    async with Database.at(url) as database:
        await database.empty(*TABLES, "waiting")
        at_hand = (url, id(mapping))
        if at_hand not in _stores:  # looking at the tables takes longer than most tests here
            _stores[at_hand] = await database.store(mapping)
        yield database, _stores[at_hand], Clerk(mapping)


def session(clerk: Clerk, clerk_id: str, user: str, moment: int = 1) -> Change:
    data = {"id": clerk_id, "user_id": user, "updated_at": at(moment)}
    return clerk.event("session.created", data, event=moment)


def invitation(clerk: Clerk, clerk_id: str, user: str | None, inviter: str) -> Change:
    data = {"id": clerk_id, "user_id": user, "inviter_id": inviter, "updated_at": at(1)}
    return clerk.event("organizationInvitation.accepted", data, event=1)


def plan(clerk: Clerk, clerk_id: str, user: str, moment: int = 1, price: object = 7) -> Change:
    fields = {"payer": {"user_id": user}, "public_metadata": {"price": price}}
    data = {"id": clerk_id, "updated_at": at(moment), **fields}
    return clerk.event("subscription.updated", data, event=moment)


async def live(database: Database, store: Store, clerk: Clerk, user: str) -> None:
    """Everything that there may be of a user."""
    tail = user.removeprefix("user")
    changes = [
        clerk.user(user, username=tail),
        clerk.membership(f"orgmem{tail}", user, "org_1"),
        session(clerk, f"sess{tail}", user),
        invitation(clerk, f"orginv{tail}", user, "user_z"),
        plan(clerk, f"csub{tail}", user),
    ]
    assert await database.apply(store, *changes) == ["applied"] * 5
    await database.execute(
        f"INSERT INTO notes (person_id) SELECT id FROM people WHERE clerk_id = '{user}'",
        f"INSERT INTO badges (member_id) VALUES ('orgmem{tail}')",
    )


async def counted(database: Database, *names: str) -> list[int]:
    return [await database.value(f"SELECT COUNT(*) FROM {name}") for name in names or TABLES]


async def state(database: Database, clerk_id: str) -> tuple[Any, ...]:
    ((*version, deleted_at),) = await database.rows(
        "SELECT version_ms, event_ms, source, deleted_at IS NOT NULL FROM clerk_sync_entities"
        f" WHERE clerk_id = '{clerk_id}'"
    )
    return tuple(version), bool(deleted_at)


# Purging


async def test_a_marked_row_goes_when_its_time_is_over_with_what_it_owns(
    world_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "_CHUNK", 2)  # so that a few rows are many
    async with world(world_url, PURGED) as (database, store, clerk):
        due = [f"user_{n}" for n in range(5)]
        for user in [*due, "user_young", "user_undone", "user_app", "user_live"]:
            await live(database, store, clerk, user)
        gone = [clerk.deleted(user) for user in [*due, "user_undone"]]
        await database.apply(store, *gone, clerk.deleted("user_young", 11))
        await database.execute(
            "UPDATE people SET deleted_at = NULL WHERE clerk_id = 'user_undone'",
            "UPDATE people SET deleted_at = '2000-01-01 00:00:00' WHERE clerk_id = 'user_app'",
        )
        now_ms = at(10) + DAY
        before = await database.snapshot(*TABLES)
        assert await erasure.purge(database.engine, store, now_ms=now_ms, dry_run=True) == {
            "user": 5
        }
        assert await database.snapshot(*TABLES) == before
        assert await erasure.purge(database.engine, store, now_ms=now_ms) == {"user": 5}
        left = [("user_app",), ("user_live",), ("user_undone",), ("user_young",)]
        assert await database.rows("SELECT clerk_id FROM people ORDER BY clerk_id") == left
        # What is somebody's without being owned stays, as with any delete.
        assert await counted(database) == [4, 4, 4, 4, 4, 9, 9]
        assert await erasure.purge(database.engine, store, now_ms=now_ms) == {"user": 0}
        assert await state(database, "user_0") == (REMOVED, True)
        assert await state(database, "sess_0") == (REMOVED, True)
        assert await state(database, "user_young") != (REMOVED, True)


async def test_a_row_goes_after_its_time_and_not_before(world_url: str) -> None:
    async with world(world_url, PURGED) as (database, store, clerk):
        await database.apply(store, clerk.user(ADA), clerk.deleted(ADA))
        assert await erasure.purge(database.engine, store, now_ms=at(9) + DAY) == {"user": 0}
        assert await erasure.purge(database.engine, store, now_ms=at(9) + DAY + 1) == {"user": 1}


async def test_without_a_time_nothing_goes(world_url: str) -> None:
    for mapping in (KEPT, REMOVING):
        async with world(world_url, mapping) as (database, store, clerk):
            await database.apply(store, clerk.user(ADA), clerk.deleted(ADA))
            before = await database.snapshot(*TABLES)
            assert await erasure.purge(database.engine, store, now_ms=at(9) + 9999 * DAY) == {}
            assert await database.snapshot(*TABLES) == before


async def test_what_comes_late_does_not_bring_a_purged_row_back(world_url: str) -> None:
    async with world(world_url, PURGED) as (database, store, clerk):
        await live(database, store, clerk, ADA)
        await database.apply(store, clerk.deleted(ADA))
        # Marked only, what the user has may still change, and more may come.
        more = [clerk.user(ADA, 20), clerk.membership("orgmem_more", ADA, "org_1")]
        assert await database.apply(store, *more) == ["applied"] * 2
        assert await erasure.purge(database.engine, store, now_ms=at(30) + DAY) == {"user": 1}
        late = [
            clerk.user(ADA, 40),
            clerk.membership("orgmem_ada", ADA, "org_1", 40),
            clerk.membership("orgmem_new", ADA, "org_1", 40),
            session(clerk, "sess_new", ADA, 40),
        ]
        assert await database.apply(store, *late) == ["stale"] * 4
        await database.apply(store, clerk.deleted(ADA, 3), clerk.deleted(ADA, 50))
        assert await counted(database) == [0, 0, 0, 0, 0, 1, 1]


async def test_a_purge_waits_for_a_save_that_is_under_way(world_url: str) -> None:
    async with world(world_url, PURGED) as (database, store, clerk):
        await database.apply(store, clerk.user(ADA), clerk.deleted(ADA))
        halting = Halting(await database.connect())
        saving = asyncio.create_task(
            store.apply(halting, [clerk.user(ADA, 20, username="late")], now_ms=NOW)
        )
        await halting.decided.wait()
        purging = asyncio.create_task(erasure.purge(database.engine, store, now_ms=at(30) + DAY))
        # Longer than MySQL waits for a row here: it has to be tried again.
        await asyncio.sleep(0.1 if database.sqlite else 1.2)
        assert not purging.done()
        halting.go_on.set()
        assert [answer.outcome for answer in await saving] == ["applied"]
        assert await purging == {"user": 1}
        assert await counted(database, "people") == [0]
        assert await state(database, ADA) == (REMOVED, True)


@pytest.mark.parametrize(
    ("number", "told"), [(1213, Contention), (1205, LockWaitTimeout), (1045, DatabaseUnavailable)]
)
def test_an_engine_s_error_says_whether_to_try_again(number: int, told: type[Exception]) -> None:
    cause = OperationalError(number, "told")
    with pytest.raises(DatabaseUnavailable) as caught, translate_engine_errors():
        raise sa.exc.OperationalError("SELECT 1", {}, cause)
    assert type(caught.value) is told


# Erasing


@pytest.mark.parametrize("mapping", [KEPT, REMOVING], ids=["marking", "removing"])
@pytest.mark.parametrize("deleted", [True, False])
async def test_all_there_is_of_a_user_goes_and_nothing_of_others(
    world_url: str, mapping: Mapping, *, deleted: bool
) -> None:
    async with world(world_url, mapping) as (database, store, clerk):
        for user in OTHERS:
            await live(database, store, clerk, user)
        await database.apply(store, invitation(clerk, "orginv_z", None, ADA))
        others = await database.snapshot(*TABLES)
        await live(database, store, clerk, ADA)
        if deleted:
            await database.apply(store, clerk.deleted(ADA))
        # By then nobody can tell whose the others were: their ids stay in state and ledger.
        forgotten = mapping is REMOVING and deleted
        removed = await erasure.erase(database.engine, store, ADA, now_ms=NOW)
        known = {"people", "notes", "members", "badges", "sessions"} if not forgotten else set()
        assert removed == dict.fromkeys({"invitations", "plans", *known}, 1) | {
            "clerk_sync_events": 3 + deleted if forgotten else 5 + deleted
        }
        now = await database.snapshot(*TABLES)
        changed = {name for name in now if now[name] != others[name]}
        # A delete of Clerk's takes along what the user owns, but not what that owns.
        assert changed == ({"state", "ledger", "badges"} if forgotten else {"state"})
        assert set(others["state"]) < set(now["state"])
        assert await state(database, ADA) == (REMOVED, True)
        assert await state(database, "csub_ada") == (REMOVED, True)
        assert await erasure.erase(database.engine, store, ADA, now_ms=NOW) == {}


@pytest.mark.parametrize("mapping", [KEPT, REMOVING], ids=["marking", "removing"])
async def test_what_comes_late_does_not_bring_a_user_back(world_url: str, mapping: Mapping) -> None:
    async with world(world_url, mapping) as (database, store, clerk):
        await live(database, store, clerk, ADA)
        await erasure.erase(database.engine, store, ADA, now_ms=NOW)
        late = [
            clerk.user(ADA, 40),
            clerk.event("user.created", {"id": ADA}, event=41),
            clerk.membership("orgmem_ada", ADA, "org_1", 40),
            clerk.membership("orgmem_new", ADA, "org_1", 40),
            session(clerk, "sess_new", ADA, 40),
            plan(clerk, "csub_ada", ADA, 40),
        ]
        assert await database.apply(store, *late) == ["stale"] * 6
        assert await counted(database) == [0] * 7
        # Nobody owns these, and this one was never seen: it takes another run.
        assert await database.apply(store, plan(clerk, "csub_new", ADA, 40)) == ["applied"]
        removed = await erasure.erase(database.engine, store, ADA, now_ms=NOW)
        assert removed == {"plans": 1, "clerk_sync_events": 3}


async def test_a_user_who_is_nowhere_stays_nowhere(world_url: str) -> None:
    async with world(world_url, KEPT) as (database, store, clerk):
        assert await erasure.erase(database.engine, store, ADA, now_ms=NOW) == {}
        assert await state(database, ADA) == (REMOVED, True)
        assert await database.apply(store, clerk.user(ADA, 40)) == ["stale"]
        assert await counted(database) == [0] * 7


async def test_the_time_of_a_delete_is_kept(world_url: str) -> None:
    async with world(world_url, KEPT) as (database, store, clerk):
        await database.apply(store, clerk.deleted(ADA, 3))
        query = "SELECT deleted_at FROM clerk_sync_entities"
        before = await database.value(query)
        await erasure.erase(database.engine, store, ADA, now_ms=NOW)
        assert await database.value(query) == before


async def test_quarantine_keeps_nothing_of_a_user(
    world_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "_PAYLOADS", 2)
    async with world(world_url, KEPT) as (database, store, clerk):
        await live(database, store, clerk, ADA)
        answers = await database.apply(
            store,
            plan(clerk, "csub_ada", "user_z", 5, "much"),
            *(
                plan(clerk, f"csub_{n}", user, 5, "much")
                for n, user in enumerate([ADA, *OTHERS] * 3)
            ),
        )
        assert set(answers) == {"quarantined: wrong_type"}
        await database.execute(
            "UPDATE clerk_sync_quarantine SET payload = NULL WHERE clerk_id = 'csub_ada'",
            "INSERT INTO clerk_sync_quarantine"
            " (svix_id, type, reason, quarantined_at, clerk_id, payload) VALUES"
            f" ('msg_end', 'x.y', 'refused', '2020-01-01', NULL, '{{\"a\":\"/{ADA}'),"
            " ('msg_no_payload', 'unknown', 'bad_json', '2020-01-01', NULL, NULL)",
        )
        removed = await erasure.erase(database.engine, store, ADA, now_ms=NOW)
        assert removed["clerk_sync_quarantine"] == 1 + 3 + 1
        payloads = await database.rows("SELECT svix_id, payload FROM clerk_sync_quarantine")
        assert len(payloads) == 9 + 1
        assert not [payload for _, payload in payloads if payload and f'"{ADA}"' in payload]


async def test_what_failed_half_way_is_done_by_the_next_run(
    world_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "_CHUNK", 1)
    async with world(world_url, KEPT) as (database, store, clerk):
        await live(database, store, clerk, ADA)
        await database.execute("ALTER TABLE notes RENAME TO notes_away")
        with pytest.raises(DatabaseUnavailable, match="notes"):
            await erasure.erase(database.engine, store, ADA, now_ms=NOW)
        await database.execute("ALTER TABLE notes_away RENAME TO notes")
        assert await database.apply(store, clerk.user(ADA, 40)) == ["stale"]
        assert await counted(database, "people", "plans") == [1, 0]
        await erasure.erase(database.engine, store, ADA, now_ms=NOW)
        assert await counted(database) == [0] * 7
        assert await counted(database, "clerk_sync_events") == [0]


async def test_many_rows_of_one_user_go_in_parts(
    world_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "_CHUNK", 3)
    async with world(world_url, REMOVING) as (database, store, clerk):
        sessions = [session(clerk, f"sess_{n}", ADA) for n in range(8)]
        await database.apply(store, *sessions, clerk.user(ADA))
        assert await erasure.erase(database.engine, store, ADA, now_ms=NOW) == {
            "people": 1,
            "sessions": 8,
            "clerk_sync_events": 9,
        }


async def test_what_is_no_id_is_refused(world_url: str) -> None:
    async with world(world_url, KEPT) as (database, store, _):
        for user_id in ("", " ", "user ada", "user_\n", "ü", "x" * 129):
            with pytest.raises(ValueError, match="not an id"):
                await erasure.erase(database.engine, store, user_id, now_ms=NOW)
        assert await counted(database, "clerk_sync_entities") == [0]


async def test_an_erasure_waits_for_what_is_under_way(world_url: str) -> None:
    async with world(world_url, KEPT) as (database, store, clerk):
        halting = Halting(await database.connect())
        saving = asyncio.create_task(
            store.apply(halting, [session(clerk, "sess_new", ADA)], now_ms=NOW)
        )
        await halting.decided.wait()
        erasing = asyncio.create_task(erasure.erase(database.engine, store, ADA, now_ms=NOW))
        await asyncio.sleep(0.2)
        halting.go_on.set()
        assert [answer.outcome for answer in await saving] == ["applied"]
        assert await erasing == {"sessions": 1, "clerk_sync_events": 1}
        assert await counted(database, "sessions", "clerk_sync_events") == [0, 0]


async def test_what_cannot_be_found_is_told(world_url: str) -> None:
    async with world(world_url, BLIND) as (_, store, _):
        assert erasure.out_of_reach(store) == ("session", "organizationMembership")
    async with world(world_url, KEPT) as (_, store, _):
        assert erasure.out_of_reach(store) == ()
