"""Retention: ledger and quarantine rows expire."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from clerk_sync.clerk.catalog import PROBE, PROBE_IDS
from clerk_sync.clock import now_utc
from clerk_sync.database.errors import translate_engine_errors
from clerk_sync.store.tables import events, quarantine

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

PROBES_KEPT: Final = timedelta(hours=1)
_CHUNK: Final = 1000


async def expire(engine: AsyncEngine, *, ledger_days: int, quarantine_days: int) -> int:
    """Delete expired rows of ledger and quarantine in small transactions. Returns how many.

    Ledger rows of end-to-end probes, which may come every minute for years, expire after an hour.
    Raises DatabaseUnavailable.
    """
    now = now_utc()
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


async def _run(engine: AsyncEngine, query: sa.Select[Any]) -> list[dict[str, Any]]:
    with translate_engine_errors():
        async with engine.connect() as connection:
            return [dict(row) for row in (await connection.execute(query)).mappings()]
