"""Reconciling on a schedule inside `serve`, and counting in between.

Any number of replicas may do this: one of them does, and when the last run was is in the
database. So are its results, which every replica shows, wherever it ran. With Clerk's key,
counting is done without an interval as well: it is what tells that nothing happens in Clerk
from nothing arriving here.
"""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

import structlog

from clerk_sync.clerk.api import ClerkRefused, ClerkUnavailable
from clerk_sync.database.connection import close_idle
from clerk_sync.database.errors import DatabaseUnavailable
from clerk_sync.outcomes import Ending
from clerk_sync.schema.checks import SchemaMismatch
from clerk_sync.settings import InvalidSettings
from clerk_sync.store.lease import LeaseHeld, LeaseLost
from clerk_sync.sync import progress, runs
from clerk_sync.sync.report import Report, SafetyStop

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.mapping.model import Mapping
    from clerk_sync.settings import Settings
    from clerk_sync.telemetry.metrics import Metrics

log = structlog.get_logger()

LOOK_SECONDS: Final = 60.0
COUNT_SECONDS: Final = 300.0
# A run that failed or was interrupted is tried again this soon, if not sooner.
RETRY_SECONDS: Final = 900.0


class Schedule:
    """One replica's part in it."""

    def __init__(
        self,
        settings: Settings,
        mapping: Mapping,
        engine: AsyncEngine,
        metrics: Metrics,
        ready: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._mapping = mapping
        self._engine = engine
        self._metrics = metrics
        self._ready = ready
        self._shown = datetime.min  # noqa: DTZ901 -- naive UTC, as all times of the database
        self._interval: float | None = None
        if settings.clerk_key is not None:
            self._interval = settings.reconcile_interval

    async def keep(self) -> None:
        """Show how the last run ended, count, and reconcile when it is time; until cancelled."""
        pause = min(LOOK_SECONDS, self._interval or LOOK_SECONDS)
        while True:
            if self._ready():
                try:
                    if await self._due():
                        await self._reconcile()
                        await self._due()
                    await self._count()
                    await close_idle(self._engine)
                except (
                    *(DatabaseUnavailable, ClerkUnavailable, ClerkRefused),
                    *(InvalidSettings, SchemaMismatch),
                ) as error:
                    log.warning("count_failed", error=str(error))
                except Exception:
                    log.exception("scheduler_failed")
            await asyncio.sleep(pause if self._ready() else 1.0)

    async def _due(self) -> bool:
        """Whether it is time; on the way, the last run goes into the metrics."""
        run = await progress.last(self._engine, "reconcile")
        if run is None:
            return self._interval is not None
        if run.finished_at is not None and run.ending is not None:
            report = run.report or {}
            self._metrics.reconciled(
                run.ending,
                finished=run.finished_at.replace(tzinfo=UTC).timestamp(),
                seconds=report.get("seconds", 0.0),
                drift=report.get("drift", {}),
            )
            self._show(run)
        if self._interval is None:
            return False
        wait = self._interval
        ended = run.finished_at is not None and run.finished_at >= run.started_at
        if not ended or run.ending is Ending.FAILED:
            wait = min(wait, RETRY_SECONDS)
        last = max(run.started_at, run.finished_at or run.started_at)
        return last + timedelta(seconds=wait) <= datetime.now(UTC).replace(tzinfo=None)

    async def _reconcile(self) -> None:
        report = Report()
        try:
            async with runs.walks(self._settings, self._mapping, self._metrics) as opened:
                ending = await opened.reconcile(
                    breaker_percent=self._settings.breaker_percent,
                    report=report,
                    on_page=runs.quiet,
                    patience=False,
                    # Several pages in one turn of the loop would keep webhooks waiting.
                    at_once=1,
                )
        except LeaseHeld as error:
            log.info("lease_held", holder=error.holder)
            return
        except (
            SafetyStop,
            LeaseLost,
            ClerkUnavailable,
            ClerkRefused,
            DatabaseUnavailable,
            SchemaMismatch,
            InvalidSettings,
        ) as error:
            log.error("reconcile_failed", error=str(error))
            return
        if ending is Ending.IN_STEP:
            log.info("reconciled", result=ending.value, **report.summary())
        else:
            log.warning("reconciled", result=ending.value, **report.summary())

    async def _count(self) -> None:
        """Compare what both sides count, unless somebody just has; show what was found."""
        run = await progress.last(self._engine, "count")
        if run is not None:
            self._show(run)
        # Jitter, so that replicas that started together do not look at the same moment.
        pause = min(COUNT_SECONDS, self._interval or COUNT_SECONDS) * random.uniform(0.9, 1.1)  # noqa: S311
        last = max(self._shown, run.started_at) if run is not None else self._shown
        fresh = progress.age_of(last) < pause
        if self._settings.clerk_key is None or fresh:
            return
        if not await progress.claimed(self._engine, "count", run):
            return
        report = Report()
        async with runs.walks(self._settings, self._mapping, self._metrics) as opened:
            await opened.count(report)
        await progress.counted(self._engine, {"clerk": report.clerk, "table": report.table})
        if (run := await progress.last(self._engine, "count")) is not None:
            self._show(run)
        for kind, table in report.table.items():
            if report.clerk[kind] != table:
                log.info("counts_differ", kind=kind, clerk=report.clerk[kind], table=table)

    def _show(self, run: progress.Run) -> None:
        """Show what both sides counted at the end of this run, unless what is shown is newer."""
        counts = run.report or {}
        tables: dict[str, int] = counts.get("table", {})
        if not tables or run.finished_at is None or run.finished_at <= self._shown:
            return
        self._shown = run.finished_at
        for kind, table in tables.items():
            self._metrics.counted(kind, clerk=counts["clerk"][kind], table=table)
