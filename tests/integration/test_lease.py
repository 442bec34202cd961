"""Leases: one holder at a time, whoever dies, is cut off or comes late."""

from __future__ import annotations

import asyncio
import os
import re
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import pytest
import sqlalchemy as sa

from clerk_sync.clerk.listing import Range
from clerk_sync.database.connection import engine_of
from clerk_sync.database.errors import DatabaseUnavailable
from clerk_sync.database.url import target_of
from clerk_sync.outcomes import Ending
from clerk_sync.store import lease, tables
from clerk_sync.store.lease import Lease, LeaseHeld, held, holder_name
from clerk_sync.store.sql import Compiler
from clerk_sync.store.store import Store
from clerk_sync.sync import checkpoints, history
from clerk_sync.sync.repair import Repairer
from tests.histories import Database
from tests.waiting import until
from tests.walking import REMOVING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from tools.servers import Managed

NAME: Final = "backfill"
SHORT: Final = 0.36
LONG: Final = 60


@pytest.fixture
async def database(shared_url: str) -> AsyncIterator[Database]:
    async with Database.at(shared_url) as database:
        await made(database.engine)
        yield database


async def made(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(tables.metadata.create_all, tables=[tables.leases])
        await connection.execute(sa.delete(tables.leases))


async def expires_ms(database: Database) -> int:
    return int(await database.value("SELECT expires_ms FROM clerk_sync_leases"))


class Line:
    """One process's way to the database, which can be cut, or hold back what was done."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.dialect = engine.dialect
        self.cut = False
        self.done = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        if self.cut:
            raise OSError("cut off")
        async with self.engine.begin() as connection:
            yield connection
        self.done.set()
        await self.go_on.wait()

    def held(self, holder: str, **options: Any) -> Any:
        return held(self, NAME, holder, **options)  # type: ignore[arg-type]


async def test_one_of_twenty_holds_it_and_tokens_grow(database: Database) -> None:
    tokens = []
    for _ in range(3):  # the first finds no row, the others one that was given back
        refused = 0
        over = asyncio.Event()

        async def contend(number: int, over: asyncio.Event) -> None:
            nonlocal refused
            try:
                async with held(
                    database.engine, NAME, f"{number}", seconds=LONG, patience=False
                ) as ours:
                    tokens.append(ours.token)
                    await over.wait()
            except LeaseHeld:
                refused += 1
                if refused == 19:
                    over.set()

        await asyncio.gather(*(contend(number, over) for number in range(20)))
        assert refused == 19
    assert tokens == [1, 2, 3]


async def test_ten_that_insist_hold_it_one_after_the_other(database: Database) -> None:
    tokens: list[int] = []
    inside = 0

    async def insist(number: int) -> None:
        nonlocal inside
        while True:
            with suppress(LeaseHeld):
                async with held(
                    database.engine, NAME, f"{number}", seconds=LONG, patience=False
                ) as ours:
                    inside += 1
                    assert inside == 1
                    await asyncio.sleep(0)
                    inside -= 1
                    tokens.append(ours.token)
                return
            await asyncio.sleep(0.002)

    await asyncio.gather(*map(insist, range(10)))
    assert tokens == list(range(1, 11))


async def test_holder_that_died_is_waited_for_and_learns_it_when_it_was_not_dead(
    database: Database,
) -> None:
    line = Line(database.engine)
    async with line.held("dead", seconds=SHORT) as first:
        line.cut = True
        with pytest.raises(LeaseHeld):
            async with held(database.engine, NAME, "hasty", patience=False):
                pass
        async with held(database.engine, NAME, "heir", seconds=SHORT) as second:
            assert second.token == first.token + 1
            assert not first.lost.is_set()
            line.cut = False
            async with asyncio.timeout(5):
                await first.lost.wait()
            line.cut = True
    # What the first would have given back is not its own any more.
    async with held(database.engine, NAME, "next", seconds=LONG, patience=False) as third:
        assert third.token == second.token + 1


async def test_late_holder_does_not_give_back_what_is_not_its_own(database: Database) -> None:
    async with held(database.engine, NAME, "late", seconds=LONG):
        await database.execute(
            "UPDATE clerk_sync_leases SET token = token + 1, holder = 'thief', expires_ms = 99"
        )
    assert await database.rows("SELECT * FROM clerk_sync_leases") == [(NAME, "thief", 2, 99)]


async def test_holder_that_is_cut_off_keeps_it_while_nobody_takes_it(database: Database) -> None:
    line = Line(database.engine)
    async with line.held("cut off", seconds=SHORT) as ours:
        line.cut = True
        before = await expires_ms(database)
        await until(lambda: expired(database))
        line.cut = False
        await until(lambda: renewed(database, before))
        assert not ours.lost.is_set()
        with pytest.raises(LeaseHeld):
            async with held(database.engine, NAME, "other", patience=False):
                pass


async def test_renewal_between_look_and_taking_is_not_missed(database: Database) -> None:
    async with held(database.engine, NAME, "slow"):
        pass
    line = Line(database.engine)
    line.go_on.clear()
    contender = asyncio.create_task(line.held("quick", patience=False).__aenter__())
    await line.done.wait()  # it has seen that the lease is free
    there = await now_ms(database.engine)
    await database.execute(f"UPDATE clerk_sync_leases SET expires_ms = {there + 60_000}")
    line.go_on.set()
    with pytest.raises(LeaseHeld, match="slow is at work"):
        await contender


async def expired(database: Database) -> bool:
    return await expires_ms(database) < await now_ms(database.engine)


async def renewed(database: Database, before: int) -> bool:
    return await expires_ms(database) > before


async def now_ms(engine: AsyncEngine) -> int:
    """What the database's clock says, read in another way than by the lease."""
    query = "SELECT UNIX_TIMESTAMP(CURRENT_TIMESTAMP(3)) * 1000"
    if engine.dialect.name == "sqlite":
        query = "SELECT strftime('%s', 'now') * 1000 + substr(strftime('%f', 'now'), 4)"
    async with engine.connect() as connection:
        return int((await connection.exec_driver_sql(query)).scalar_one())


async def test_renewal_keeps_it_beyond_its_time_and_tells_the_patient(database: Database) -> None:
    async with held(database.engine, NAME, "alive", seconds=SHORT) as ours:
        first = await expires_ms(database)
        with pytest.raises(LeaseHeld) as patient:
            async with held(database.engine, NAME, "patient", seconds=SHORT):
                pass
        assert patient.value.expires_ms > first
        await until(lambda: beyond(database, first))
        with pytest.raises(LeaseHeld):
            async with held(database.engine, NAME, "hasty", patience=False):
                pass
        assert not ours.lost.is_set()


async def beyond(database: Database, expiry: int) -> bool:
    return await now_ms(database.engine) > expiry


@pytest.mark.parametrize("end", ["done", "failed", "cancelled"])
async def test_whoever_comes_next_need_not_wait(database: Database, end: str) -> None:
    inside = asyncio.Event()

    async def work() -> None:
        async with held(database.engine, NAME, "first", seconds=LONG):
            inside.set()
            if end == "failed":
                raise ValueError("of the work")
            if end == "cancelled":
                await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await inside.wait()
    if end == "cancelled":
        task.cancel()
    (said,) = await asyncio.gather(task, return_exceptions=True)
    expected = {"failed": ValueError, "cancelled": asyncio.CancelledError}
    assert type(said) is expected.get(end, type(None))
    assert await expires_ms(database) == 0
    async with held(database.engine, NAME, "next", patience=False) as ours:
        assert ours.token == 2


async def test_cancelled_while_it_takes_gives_back_what_it_took(database: Database) -> None:
    async with held(database.engine, NAME, "first"):
        pass
    line = Line(database.engine)

    async def work() -> None:
        async with line.held("cancelled", seconds=LONG):
            pass

    task = asyncio.create_task(work())
    await line.done.wait()  # it has read the row
    line.done.clear()
    line.go_on.clear()
    await line.done.wait()  # it has taken the lease, and was not told yet
    assert await expires_ms(database) > 0
    task.cancel()
    await asyncio.sleep(0)
    line.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await database.rows("SELECT * FROM clerk_sync_leases") == [(NAME, "cancelled", 2, 0)]


@pytest.mark.past_vitess
async def test_clock_is_the_databases(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = 3_600_000
    there = await now_ms(database.engine)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    async with (
        held(database.engine, NAME, "here", seconds=LONG) as ours,
        later(database.url, there + ahead) as engine,
        held(engine, NAME, "where it is an hour later", seconds=LONG, patience=False) as theirs,
    ):
        assert theirs.token == ours.token + 1
        assert await expires_ms(database) == pytest.approx(there + ahead + LONG * 1000, abs=1)


@asynccontextmanager
async def later(url: str, at_ms: int) -> AsyncIterator[AsyncEngine]:
    """An engine on whose connections it is always this time."""
    target = target_of(url)
    engine = engine_of(lambda: target, size=2)

    @sa.event.listens_for(engine.sync_engine, "connect")
    def set_clock(connection: Any, _: object) -> None:
        if engine.dialect.name == "sqlite":
            julian = at_ms / 86_400_000 + 2_440_587.5
            connection.run_async(lambda one: one.create_function("julianday", 1, lambda _: julian))
        else:
            cursor = connection.cursor()
            cursor.execute(f"SET timestamp = {at_ms / 1000}")
            cursor.close()

    try:
        yield engine
    finally:
        await engine.dispose()


@pytest.mark.past_vitess
async def test_clock_that_stands_still_is_no_loss(database: Database) -> None:
    async with (
        later(database.url, await now_ms(database.engine)) as engine,
        held(engine, NAME, "timeless", seconds=0.03) as ours,
    ):
        await asyncio.sleep(0.05)
        assert not ours.lost.is_set()


async def test_row_that_is_gone_is_a_loss(database: Database) -> None:
    async with held(database.engine, NAME, "robbed", seconds=0.06) as ours:
        await database.execute("DELETE FROM clerk_sync_leases")
        async with asyncio.timeout(5):
            await ours.lost.wait()


def test_held_says_who_until_when_and_that_it_ends() -> None:
    holder = "backfill on clerk-sync-7c9f (pid 1)"
    error = LeaseHeld("sync", holder, 1_700_000_015_400)
    assert (error.holder, error.expires_ms) == (holder, 1_700_000_015_400)
    assert str(error) == (
        "backfill on clerk-sync-7c9f (pid 1) is at work, and only one may be: wait until it "
        "ends, then try again. It holds the lease `sync` until 2023-11-14 22:13:35 UTC, and renews "
        "it while it lives"
    )


async def test_held_names_the_holder_of_the_row(database: Database) -> None:
    async with held(database.engine, NAME, holder_name(), seconds=LONG):
        with pytest.raises(LeaseHeld) as error:
            async with held(database.engine, NAME, "other", patience=False):
                pass
        assert error.value.holder == holder_name()
        assert error.value.expires_ms == await expires_ms(database)
        async with held(database.engine, "another lease", "other", patience=False) as other:
            assert other == Lease("another lease", 1, other.lost)


def test_holder_is_this_process() -> None:
    assert re.fullmatch(rf"\S+ \(pid {os.getpid()}\)", holder_name())


async def test_database_that_is_away_is_told_at_once() -> None:
    target = target_of("mysql://somebody@127.0.0.1:1/nothing")
    engine = engine_of(lambda: target, size=1)
    with pytest.raises(DatabaseUnavailable, match="Can't connect"):
        async with held(engine, NAME, "hopeless"):
            pass
    await engine.dispose()


async def test_database_that_falls_silent_delays_no_end_and_hides_no_error(
    mysql_server: Managed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_RELEASE_SECONDS", 0.2)
    url = mysql_server.create_database("clerk_sync_test_lease")

    async def work(engine: AsyncEngine) -> None:
        async with held(engine, NAME, "stuck", seconds=0.06):
            mysql_server.freeze()
            await asyncio.sleep(0.05)  # a renewal is on its way
            raise ValueError("of the work")

    async with Database.at(url) as database:
        await made(database.engine)
        async with asyncio.timeout(2):
            with pytest.raises(ValueError, match="of the work"):
                await work(database.engine)
            monkeypatch.setattr(lease, "_STATEMENT_SECONDS", 0.1)
            with pytest.raises(DatabaseUnavailable, match="did not answer in time"):
                await work(database.engine)
        mysql_server.thaw()
    mysql_server.drop_database("clerk_sync_test_lease")


# What is kept of a run


async def test_where_a_run_stands_is_kept_by_its_own_lease_only(database: Database) -> None:
    async with database.engine.begin() as connection:
        await connection.run_sync(tables.metadata.create_all, tables=[tables.cursors, tables.runs])
    late, ours = Lease(NAME, 1), Lease(NAME, 2)
    await database.execute(
        "DELETE FROM clerk_sync_cursors",
        "DELETE FROM clerk_sync_runs",
        f"INSERT INTO clerk_sync_leases VALUES ('{NAME}', 'the second', 2, 0)",
    )
    begun = Range("user", seen=0)
    await checkpoints.save(database.engine, [begun], "")
    await history.record_start(database.engine, "backfill")
    further = replace(begun, after="user_b", reached_ms=7, seen=2)
    store = Store({}, Compiler(database.engine.dialect))
    for lease_, range_, kept in ((ours, further, [further]), (late, begun, [further])):
        fenced = store.fenced(lease_.name, lease_.token)
        repairer = Repairer(
            REMOVING, fenced, database.connect, committer=None, lost=asyncio.Event()
        )
        await checkpoints.advance(repairer, range_)
        assert await checkpoints.load(database.engine) == {"user": kept}
    for lease_, ending in ((late, None), (ours, Ending.MENDED), (late, Ending.MENDED)):
        mine = Ending.FAILED if lease_ is late else Ending.MENDED
        await history.record_end(database.engine, "backfill", mine, {}, lease_)
        run = await history.last_run(database.engine, "backfill")
        assert run is not None
        assert run.ending is ending
    for lease_, left in ((late, {"user": [further]}), (ours, {})):
        await checkpoints.clear(database.engine, lease_)
        assert await checkpoints.load(database.engine) == left
