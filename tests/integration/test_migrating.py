"""Several migrations at once, of which some are killed, or meet what others have begun."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import pytest

from clerk_sync.database.errors import DatabaseUnavailable
from clerk_sync.schema.migrate import migrate
from clerk_sync.store import lease
from tests.histories import Database, mapped
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tools.servers import Managed

OLD: Final = """
tables:
  user:
    table: made
    create: true
    key: clerk_id
    columns: {username: {value: username, type: string(255)}}
"""
NEW: Final = (
    f"{OLD.rstrip().removesuffix('}')}, email: {{value: primary_email, type: string(320)}}}}\n"
)
SCRIPT: Final = """
import asyncio, json, sys
from clerk_sync.mapping import loader
from clerk_sync.schema.migrate import migrate
from clerk_sync.database.url import target_of
from clerk_sync.database.connection import engine_of

async def main():
    target = target_of(sys.argv[1])
    engine = engine_of(lambda: target, size=2)
    print(json.dumps(await migrate(engine, loader.load(sys.argv[2]))))
    await engine.dispose()

asyncio.run(main())
"""
ALTERING: Final = (
    "SELECT COUNT(*) FROM information_schema.processlist"
    " WHERE info LIKE 'ALTER TABLE made%' AND state LIKE '%metadata lock%'"
)


@pytest.fixture
async def database(mysql_server: Managed) -> AsyncIterator[Database]:
    async with Database.at(mysql_server.create_database("migrating")) as database:
        yield database


@asynccontextmanager
async def held_up(database: Database) -> AsyncIterator[None]:
    """Within, a transaction of the app's keeps the table `made` as it is."""
    async with database.engine.connect() as app:
        await app.exec_driver_sql("SELECT * FROM made")
        yield
        await app.rollback()


async def altering(database: Database, processes: int = 1) -> bool:
    return bool(await database.value(ALTERING.replace("%", "%%")) == processes)


async def begun(database: Database, mapping: Path) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", SCRIPT, database.url, str(mapping), stdout=asyncio.subprocess.PIPE
    )


async def done_by(process: asyncio.subprocess.Process) -> list[str]:
    out, _ = await process.communicate()
    assert process.returncode == 0
    done: list[str] = json.loads(out)
    return done


async def test_who_waits_is_told_whom_it_waits_for(database: Database, tmp_path: Path) -> None:
    await migrate(database.engine, mapped(OLD))
    (tmp_path / "new.yaml").write_text(NEW)
    async with held_up(database):
        first = await begun(database, tmp_path / "new.yaml")
        await until(lambda: altering(database))
        with pytest.raises(
            DatabaseUnavailable, match=rf"\(pid {first.pid}\) is at work.*`migrate`"
        ):
            await migrate(database.engine, mapped(NEW), patience_seconds=0)
        second = asyncio.create_task(migrate(database.engine, mapped(NEW)))
        # It takes longer than a lease lasts: the first renews its own.
        query = "SELECT expires_ms FROM clerk_sync_leases WHERE name = 'migrate'"
        at_first = await database.value(query)
        assert not second.done()

        async def renewed() -> bool:
            return bool(await database.value(query) > at_first)

        await until(renewed, seconds=lease.LEASE_SECONDS)
    assert await done_by(first) == ["added column made.email"]
    assert await second == []


async def test_one_that_was_killed_in_the_middle_is_taken_over(
    database: Database, mysql_server: Managed, tmp_path: Path
) -> None:
    # MySQL ends the statement of a client that is gone, MariaDB drops it.
    ends = mysql_server.flavour == "mysql"
    await migrate(database.engine, mapped(OLD))
    (tmp_path / "new.yaml").write_text(NEW)
    async with held_up(database):
        dead = await begun(database, tmp_path / "new.yaml")
        await until(lambda: altering(database))
        dead.kill()
        await dead.wait()
        heirs = [await begun(database, tmp_path / "new.yaml") for _ in range(3)]
        # As if its time had passed.
        await database.execute("UPDATE clerk_sync_leases SET expires_ms = 1")

        async def taken_over() -> bool:
            query = "SELECT expires_ms FROM clerk_sync_leases WHERE name = 'migrate'"
            return await database.value(query) > 1 and await altering(database, 1 + ends)

        await until(taken_over)
    done = [line for heir in heirs for line in await done_by(heir)]
    # Whoever added it: MariaDB notices a moment later that its client is gone.
    assert done in ([], ["added column made.email"])
    await database.store(mapped(NEW))
    assert await migrate(database.engine, mapped(NEW)) == []


async def test_first_migrations_of_four_at_once(database: Database, tmp_path: Path) -> None:
    (tmp_path / "new.yaml").write_text(NEW)
    processes = [await begun(database, tmp_path / "new.yaml") for _ in range(4)]
    done = sorted([await done_by(one) for one in processes], key=len)
    assert done[:3] == [[], [], []]
    assert "created table made" in done[3]
