"""What expires on clerk-sync's own tables, and whether the database takes writes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from clerk_sync.clerk.catalog import PROBE, PROBE_IDS
from clerk_sync.database.errors import translate_engine_errors
from clerk_sync.store.tables import entities, events, quarantine

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

PROBES_KEPT: Final = timedelta(hours=1)
_CHUNK: Final = 1000


async def expire(engine: AsyncEngine, *, ledger_days: int, quarantine_days: int) -> int:
    """Delete what has outlived its days, in small transactions; how many rows went.

    Of probes, which may come every minute for years, an hour is kept.
    """
    now = datetime.now(UTC).replace(tzinfo=None)
    gone = 0
    for table, outlived in (
        (events, events.c.committed_at < now - timedelta(days=ledger_days)),
        (quarantine, quarantine.c.quarantined_at < now - timedelta(days=quarantine_days)),
        (
            events,
            sa.and_(
                # A range of the primary key: a search by type would read the whole ledger.
                events.c.svix_id.between(PROBE_IDS, f"{PROBE_IDS}~"),
                events.c.type == PROBE,
                events.c.committed_at < now - PROBES_KEPT,
            ),
        ),
    ):
        old = sa.select(table.c.svix_id).where(outlived).limit(_CHUNK)
        while ids := [row["svix_id"] for row in await _run(engine, old)]:
            with translate_engine_errors():
                async with engine.begin() as connection:
                    await connection.execute(sa.delete(table).where(table.c.svix_id.in_(ids)))
            gone += len(ids)
    return gone


async def probe(engine: AsyncEngine) -> None:
    """Ask the database whether it takes writes, with one that changes nothing.

    Raises DatabaseUnavailable.

    After a failover the old primary still answers every SELECT. A server's full disk stops the
    server, or shows in its numbers; SQLite's shows when pages are written, and in nothing less.
    """
    none = entities.c.kind == ""
    nothing = sa.update(entities).where(none).values(synced_at=None)
    with translate_engine_errors():
        async with engine.connect() as connection:
            await connection.execute(nothing)
            if connection.dialect.name == "sqlite":
                now = datetime.now(UTC).replace(tzinfo=None)
                row = entities.insert().values(
                    kind="", clerk_id="", version_ms=0, event_ms=0, source="", synced_at=now
                )
                await connection.execute(row)
                await connection.execute(sa.delete(entities).where(none))
                await connection.commit()


async def probe_rights(engine: AsyncEngine) -> None:
    """As `probe`, and with every right that serving needs. Raises DatabaseUnavailable.

    It is asked of one table: rights are mostly given for a whole database.
    """
    none = entities.c.kind == ""
    rows = sa.select(entities).where(none)
    with translate_engine_errors():
        async with engine.connect() as connection:
            await connection.execute(sa.insert(entities).from_select(entities.c.keys(), rows))
            await connection.execute(sa.update(entities).where(none).values(synced_at=None))
            await connection.execute(sa.delete(entities).where(none))


async def _run(engine: AsyncEngine, query: sa.Select[Any]) -> list[dict[str, Any]]:
    with translate_engine_errors():
        async with engine.connect() as connection:
            return [dict(row) for row in (await connection.execute(query)).mappings()]
