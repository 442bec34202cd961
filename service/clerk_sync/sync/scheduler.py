"""Reconcile on a schedule inside `serve`, and compare counts in between.

Any number of replicas may have a scheduler: one of them runs, and the database knows when the
last run was. It also has the results, which every replica shows as metrics. With a Clerk key,
counts are compared without an interval as well: only they tell a quiet Clerk instance from one
whose webhooks do not arrive.
"""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

import structlog

from clerk_sync.clerk.api import ClerkRefused, ClerkUnavailable
from clerk_sync.clock import now_utc
from clerk_sync.database.connection import close_idle
from clerk_sync.database.errors import DatabaseUnavailable
from clerk_sync.outcomes import Ending
from clerk_sync.schema.checks import SchemaMismatch
from clerk_sync.settings import InvalidSettings
from clerk_sync.store.lease import LeaseHeld, LeaseLost
from clerk_sync.sync import history
from clerk_sync.sync.report import Report
from clerk_sync.sync.safety import SafetyStop

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.settings import Settings
    from clerk_sync.sync.runs import Runs
    from clerk_sync.telemetry.metrics import Metrics

log = structlog.get_logger()

CHECK_SECONDS: Final = 60.0
COUNT_SECONDS: Final = 300.0
# A run that failed or was interrupted is retried this soon, if not sooner.
RETRY_SECONDS: Final = 900.0


class Scheduler:
    """The scheduler of one replica."""

    def __init__(
        self,
        settings: Settings,
        open_runs: Callable[[], AbstractAsyncContextManager[Runs]],
        engine: AsyncEngine,
        metrics: Metrics,
        ready: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._open_runs = open_runs
        self._engine = engine
        self._metrics = metrics
        self._ready = ready
        self._shown = datetime.min  # noqa: DTZ901 -- naive UTC, as all times of the database
        self._interval: float | None = None
        if settings.clerk_key is not None:
            self._interval = settings.reconcile_interval

    async def keep(self) -> None:
        """Show how the last run ended, reconcile when it is time, and count; until cancelled."""
        pause = min(CHECK_SECONDS, self._interval or CHECK_SECONDS)
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
        """Whether a reconcile is due. The last one goes into the metrics on the way."""
        run = await history.last_run(self._engine, "reconcile")
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
        return last + timedelta(seconds=wait) <= now_utc()

    async def _reconcile(self) -> None:
        report = Report()
        try:
            async with self._open_runs() as runs:
                ending = await runs.reconcile(
                    breaker_percent=self._settings.breaker_percent,
                    report=report,
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
        """Compare the counts of both sides, unless a replica just has; show the result."""
        run = await history.last_run(self._engine, "count")
        if run is not None:
            self._show(run)
        # Jitter, so that replicas that started together do not count at the same moment.
        pause = min(COUNT_SECONDS, self._interval or COUNT_SECONDS) * random.uniform(0.9, 1.1)  # noqa: S311
        last = max(self._shown, run.started_at) if run is not None else self._shown
        fresh = (now_utc() - last).total_seconds() < pause
        if self._settings.clerk_key is None or fresh:
            return
        if not await history.try_claim(self._engine, "count", run):
            return
        report = Report()
        async with self._open_runs() as runs:
            await runs.count(report)
        await history.record_counts(self._engine, {"clerk": report.clerk, "table": report.table})
        if (run := await history.last_run(self._engine, "count")) is not None:
            self._show(run)
        for kind, table in report.table.items():
            if report.clerk[kind] != table:
                log.info("counts_differ", kind=kind, clerk=report.clerk[kind], table=table)

    def _show(self, run: history.Run) -> None:
        """Show the counts at the end of this run, unless those shown are newer."""
        counts = run.report or {}
        tables: dict[str, int] = counts.get("table", {})
        if not tables or run.finished_at is None or run.finished_at <= self._shown:
            return
        self._shown = run.finished_at
        for kind, table in tables.items():
            self._metrics.counted(kind, clerk=counts["clerk"][kind], table=table)
