"""Where a backfill stands, and how the last runs ended: kept in the database, for whoever asks."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal

import sqlalchemy as sa
import stamina

from clerk_sync.clerk.listing import Part
from clerk_sync.database.errors import DatabaseUnavailable, translate_engine_errors
from clerk_sync.outcomes import Ending
from clerk_sync.store.tables import cursors, leases, runs
from clerk_sync.store.values import time_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.store.lease import Lease
    from clerk_sync.sync.repair import Mending

Name = Literal["backfill", "reconcile", "count"]
PATIENCE_SECONDS: Final = 60.0
"""How long a database may be away before a walk gives up."""
patient: Final = stamina.retry(
    on=DatabaseUnavailable, attempts=None, timeout=PATIENCE_SECONDS, wait_max=5.0
)


@dataclass(frozen=True, slots=True)
class Run:
    """One run. `report` has numbers by kind; all is None until the run has ended."""

    name: Name
    started_at: datetime
    finished_at: datetime | None
    ending: Ending | None
    report: Mapping[str, Any] | None


@patient
async def begun(engine: AsyncEngine) -> datetime | None:
    """When the backfill began whose cursors are kept, None where there is none."""
    with translate_engine_errors():
        async with engine.connect() as connection:
            at = await connection.scalar(sa.select(sa.func.min(cursors.c.begun_at)))
    return at if at is None or isinstance(at, datetime) else datetime.fromisoformat(str(at))


@patient
async def parts(engine: AsyncEngine) -> dict[str, list[Part]]:
    """The parts of the backfill that was not finished, by kind."""
    query = sa.select(cursors).order_by(cursors.c.kind, cursors.c.part)
    found: dict[str, list[Part]] = {}
    with translate_engine_errors():
        async with engine.connect() as connection:
            for row in await connection.execute(query):
                part = Part(
                    row.kind,
                    row.part,
                    row.from_ms,
                    row.to_ms,
                    row.after,
                    row.reached_ms,
                    row.seen,
                    row.finished,
                )
                found.setdefault(part.kind, []).append(part)
    return found


async def mappings(engine: AsyncEngine) -> dict[str, str | None]:
    """For what the parts of each kind are kept: a hash of its mapping."""
    query = sa.select(cursors.c.kind, cursors.c.mapping).distinct()
    found: dict[str, str | None] = {}
    with translate_engine_errors():
        async with engine.connect() as connection:
            for kind, mapping in await connection.execute(query):
                found[kind] = mapping if found.get(kind, mapping) == mapping else None
    return found


@patient
async def planned(engine: AsyncEngine, new: Sequence[Part], mapping: str) -> None:
    """Keep these parts, all there are of their kind, for what has this hash."""
    now = _now()
    rows = [
        {
            "kind": part.kind,
            "part": part.number,
            "from_ms": part.from_ms,
            "to_ms": part.to_ms,
            "after": part.after,
            "reached_ms": part.reached_ms,
            "seen": part.seen,
            "finished": part.finished,
            "begun_at": now,
            "moved_at": now,
            "mapping": mapping,
        }
        for part in new
    ]
    with translate_engine_errors():
        async with engine.begin() as connection:
            kinds = {part.kind for part in new}
            await connection.execute(sa.delete(cursors).where(cursors.c.kind.in_(kinds)))
            await connection.execute(sa.insert(cursors), rows)


def age_of(at: datetime) -> float:
    """How many seconds ago that was."""
    return (_now() - at).total_seconds()


async def moved(mending: Mending, part: Part) -> None:
    """Keep how far a part has come, as long as the lease is the run's: else nothing moves.

    By the run's own connections: SQLAlchemy's would take as long for this as for half the page.
    """
    to = (part.after, part.reached_ms, part.seen, part.finished, time_text(_now_ms()))
    await mending.write(mending.store.moved(part.kind, part.number, to=to))


@patient
async def forget(engine: AsyncEngine, lease: Lease, kind: str | None = None) -> None:
    """Forget all parts, or a kind's, as long as the lease is ours: it is done, or starts anew."""
    its = sa.true() if kind is None else cursors.c.kind == kind
    with translate_engine_errors():
        async with engine.begin() as connection:
            await connection.execute(sa.delete(cursors).where(_ours(lease), its))


@patient
async def started(engine: AsyncEngine, name: Name) -> datetime:
    """Note that a run begins; how the last one ended stays until this one has."""
    now = _now()
    with translate_engine_errors():
        async with engine.begin() as connection:
            changed = await connection.execute(
                sa.update(runs).where(runs.c.name == name).values(started_at=now)
            )
            if not changed.rowcount:
                await connection.execute(sa.insert(runs).values(name=name, started_at=now))
    return now


@patient
async def finished(
    engine: AsyncEngine, name: Name, ending: Ending, report: Mapping[str, Any], lease: Lease
) -> None:
    """Note how a run ended, as long as the lease is its own: else the next one's word counts."""
    values = {"finished_at": _now(), "result": ending.value, "report": json.dumps(report)}
    with translate_engine_errors():
        async with engine.begin() as connection:
            await connection.execute(
                sa.update(runs).where(runs.c.name == name, _ours(lease)).values(values)
            )


async def claimed(engine: AsyncEngine, name: Name, last: Run | None) -> bool:
    """Note that a run begins, unless somebody else's has since `last` was read."""
    now = _now()
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


async def counted(engine: AsyncEngine, report: Mapping[str, Any]) -> None:
    """Keep what a count found, for every replica to show."""
    values = {"finished_at": _now(), "report": json.dumps(report)}
    with translate_engine_errors():
        async with engine.begin() as connection:
            await connection.execute(sa.update(runs).where(runs.c.name == "count").values(values))


@patient
async def instance(engine: AsyncEngine) -> str | None:
    """The Clerk instance that the last run was of which knew its own; None where none did."""
    runs = [await last(engine, name) for name in ("reconcile", "backfill")]
    known = [
        (run.started_at, str(run.report["instance"]))
        for run in runs
        if run is not None and run.report is not None and run.report.get("instance")
    ]
    return max(known)[1] if known else None


async def last(engine: AsyncEngine, name: Name) -> Run | None:
    """The last run of this name that any process made."""
    with translate_engine_errors():
        async with engine.connect() as connection:
            row = (await connection.execute(sa.select(runs).where(runs.c.name == name))).first()
    if row is None:
        return None
    ending = None if row.result is None else Ending(row.result)
    report = None if row.report is None else json.loads(row.report)
    return Run(name, row.started_at, row.finished_at, ending, report)


def _ours(lease: Lease) -> sa.Exists:
    return sa.exists().where(leases.c.name == lease.name, leases.c.token == lease.token)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)
