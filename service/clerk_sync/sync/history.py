"""How the last runs ended, in `clerk_sync_runs`: for metrics on every replica, and the next run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa

from clerk_sync.clock import now_utc
from clerk_sync.database.errors import translate_engine_errors
from clerk_sync.outcomes import Ending
from clerk_sync.store.lease import holds
from clerk_sync.store.tables import runs
from clerk_sync.sync.patience import patient

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.store.lease import Lease

Name = Literal["backfill", "reconcile", "count"]


@dataclass(frozen=True, slots=True)
class Run:
    """The last run of a name. Times are UTC; `report` is what `record_end` was given.

    While a run is in progress, `finished_at`, `ending` and `report` are those of the run before.
    """

    name: Name
    started_at: datetime
    finished_at: datetime | None
    ending: Ending | None
    report: Mapping[str, Any] | None


@patient
async def record_start(engine: AsyncEngine, name: Name) -> None:
    """Record that a run starts. How the last one ended stays until this one has."""
    now = now_utc()
    with translate_engine_errors():
        async with engine.begin() as connection:
            changed = await connection.execute(
                sa.update(runs).where(runs.c.name == name).values(started_at=now)
            )
            if not changed.rowcount:
                await connection.execute(sa.insert(runs).values(name=name, started_at=now))


@patient
async def record_end(
    engine: AsyncEngine, name: Name, ending: Ending, report: Mapping[str, Any], lease: Lease
) -> None:
    """Record how a run ended. Without the lease, nothing changes: its successor's end counts."""
    values = {"finished_at": now_utc(), "result": ending.value, "report": json.dumps(report)}
    with translate_engine_errors():
        async with engine.begin() as connection:
            await connection.execute(
                sa.update(runs).where(runs.c.name == name, holds(lease)).values(values)
            )


async def try_claim(engine: AsyncEngine, name: Name, last: Run | None) -> bool:
    """Record that a run starts, unless another process did since `last` was read."""
    now = now_utc()
    with translate_engine_errors():
        async with engine.begin() as connection:
            if last is None:
                try:
                    await connection.execute(sa.insert(runs).values(name=name, started_at=now))
                except sa.exc.IntegrityError:
                    return False
                return True
            changed = await connection.execute(
                sa.update(runs)
                .where(runs.c.name == name, runs.c.started_at == last.started_at)
                .values(started_at=now)
            )
            return changed.rowcount == 1


async def record_counts(engine: AsyncEngine, report: Mapping[str, Any]) -> None:
    """Record what both sides counted, for every replica to show."""
    values = {"finished_at": now_utc(), "report": json.dumps(report)}
    with translate_engine_errors():
        async with engine.begin() as connection:
            await connection.execute(sa.update(runs).where(runs.c.name == "count").values(values))


async def last_run(engine: AsyncEngine, name: Name) -> Run | None:
    """The last run of this name that any process made."""
    with translate_engine_errors():
        async with engine.connect() as connection:
            row = (await connection.execute(sa.select(runs).where(runs.c.name == name))).first()
    if row is None:
        return None
    ending = None if row.result is None else Ending(row.result)
    report = None if row.report is None else json.loads(row.report)
    return Run(name, row.started_at, row.finished_at, ending, report)


@patient
async def instance(engine: AsyncEngine) -> str | None:
    """The Clerk instance of the last run that knew it; None where none did."""
    found = [await last_run(engine, name) for name in ("reconcile", "backfill")]
    known = [
        (run.started_at, str(run.report["instance"]))
        for run in found
        if run is not None and run.report is not None and run.report.get("instance")
    ]
    return max(known)[1] if known else None
