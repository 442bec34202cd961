"""Where a backfill stands: one checkpoint per range of a listing, in `clerk_sync_cursors`.

A crash loses at most the pages that were being written. Every write but the first is guarded by
the run's lease, so that a run that lost it cannot move its successor's checkpoints.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import sqlalchemy as sa

from clerk_sync.clerk.listing import Range
from clerk_sync.clock import now_ms, now_utc
from clerk_sync.database.errors import translate_engine_errors
from clerk_sync.store.lease import holds
from clerk_sync.store.tables import cursors
from clerk_sync.store.values import time_text
from clerk_sync.sync.patience import patient

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.store.lease import Lease
    from clerk_sync.sync.repair import Repairer


@patient
async def started_at(engine: AsyncEngine) -> datetime | None:
    """When the backfill started whose checkpoints are saved; None if there are none."""
    with translate_engine_errors():
        async with engine.connect() as connection:
            at = await connection.scalar(sa.select(sa.func.min(cursors.c.begun_at)))
    return at if at is None or isinstance(at, datetime) else datetime.fromisoformat(str(at))


@patient
async def load(engine: AsyncEngine) -> dict[str, list[Range]]:
    """The ranges of the unfinished backfill, by kind."""
    query = sa.select(cursors).order_by(cursors.c.kind, cursors.c.part)
    ranges: dict[str, list[Range]] = {}
    with translate_engine_errors():
        async with engine.connect() as connection:
            for row in await connection.execute(query):
                range_ = Range(
                    row.kind,
                    row.part,
                    row.from_ms,
                    row.to_ms,
                    row.after,
                    row.reached_ms,
                    row.seen,
                    row.finished,
                )
                ranges.setdefault(range_.kind, []).append(range_)
    return ranges


@patient
async def fingerprints(engine: AsyncEngine) -> dict[str, str | None]:
    """What `save` was given for each kind; None where its ranges do not agree."""
    query = sa.select(cursors.c.kind, cursors.c.mapping).distinct()
    found: dict[str, str | None] = {}
    with translate_engine_errors():
        async with engine.connect() as connection:
            for kind, mapping in await connection.execute(query):
                found[kind] = mapping if found.get(kind, mapping) == mapping else None
    return found


@patient
async def save(engine: AsyncEngine, ranges: Sequence[Range], fingerprint: str) -> None:
    """Save all ranges of a kind, with the fingerprint of what is written from them."""
    now = now_utc()
    rows = [
        {
            "kind": range_.kind,
            "part": range_.number,
            "from_ms": range_.from_ms,
            "to_ms": range_.to_ms,
            "after": range_.after,
            "reached_ms": range_.reached_ms,
            "seen": range_.seen,
            "finished": range_.finished,
            "begun_at": now,
            "moved_at": now,
            "mapping": fingerprint,
        }
        for range_ in ranges
    ]
    with translate_engine_errors():
        async with engine.begin() as connection:
            kinds = {range_.kind for range_ in ranges}
            await connection.execute(sa.delete(cursors).where(cursors.c.kind.in_(kinds)))
            await connection.execute(sa.insert(cursors), rows)


async def advance(repairer: Repairer, range_: Range) -> None:
    """Save how far a range has come. Without the lease, nothing changes.

    It uses the run's own connections: SQLAlchemy's takes as long for this as half a page.
    """
    to = (
        range_.after,
        range_.reached_ms,
        range_.seen,
        range_.finished,
        time_text(now_ms()),
    )
    await repairer.write(repairer.store.moved(range_.kind, range_.number, to=to))


@patient
async def clear(engine: AsyncEngine, lease: Lease, kind: str | None = None) -> None:
    """Delete all checkpoints, or a kind's. Without the lease, nothing changes."""
    of_kind = sa.true() if kind is None else cursors.c.kind == kind
    with translate_engine_errors():
        async with engine.begin() as connection:
            await connection.execute(sa.delete(cursors).where(holds(lease), of_kind))
