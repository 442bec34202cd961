"""One run: a backfill or a reconcile under the lease, by itself, and recorded when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from clerk_sync.clerk.listing import AT_ONCE
from clerk_sync.database.errors import DatabaseUnavailable
from clerk_sync.outcomes import Ending
from clerk_sync.store.lease import Lease, held, holder_name
from clerk_sync.sync import history
from clerk_sync.sync.backfill import backfill
from clerk_sync.sync.counts import PAUSES, countable
from clerk_sync.sync.patience import wait_for_database
from clerk_sync.sync.reconcile import Reconcile
from clerk_sync.sync.repair import Repairer
from clerk_sync.sync.safety import SafetyStop

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.clerk.api import Clerk
    from clerk_sync.mapping.model import Mapping
    from clerk_sync.store.committer import Committer
    from clerk_sync.store.store import Store
    from clerk_sync.store.writer import Connect
    from clerk_sync.sync.diff import Comparison
    from clerk_sync.sync.report import Report
    from clerk_sync.telemetry.metrics import Metrics

LEASE: Final = "sync"
"""The lease of all runs: one at a time, over all replicas and commands."""

OnPage = Callable[[str, int, int], None]
OnDrift = Callable[[str, "Comparison"], None]


def noop(*_: object) -> None:
    """Do nothing: the callback of a caller who wants to hear nothing."""


@dataclass(frozen=True, slots=True)
class Runs:
    """Everything that a run needs, open.

    `open_committer` gives each run a committer of its own, so that webhooks never wait behind
    it. `connect` opens a connection to read by. `instance` is the Clerk instance that the
    settings name. `pauses`, in seconds, are for counts that do not agree yet.
    """

    mapping: Mapping
    clerk: Clerk
    engine: AsyncEngine
    store: Store
    connect: Connect
    open_committer: Callable[[Store], AbstractAsyncContextManager[Committer]]
    metrics: Metrics
    instance: str | None = None
    pauses: Sequence[float] = PAUSES

    async def backfill(self, *, restart: bool, report: Report, on_page: OnPage = noop) -> Ending:
        """Run a backfill.

        Raises LeaseHeld, LeaseLost, ClerkUnavailable, ClerkRefused, DatabaseUnavailable,
        SafetyStop.
        """

        async def work(repairer: Repairer, lease: Lease) -> None:
            await backfill(
                self.clerk,
                self.mapping,
                repairer,
                self.engine,
                lease,
                instance=self.instance,
                pauses=self.pauses,
                restart=restart,
                report=report,
                on_page=on_page,
            )

        return await self._run("backfill", report, work)

    async def reconcile(
        self,
        *,
        breaker_percent: float,
        report: Report,
        on_page: OnPage = noop,
        patience: bool = True,
        at_once: int = AT_ONCE,
    ) -> Ending:
        """Run a reconcile. Raises what `backfill` does.

        Without patience it does not wait to see whether the lease's holder is still alive.
        `at_once` is how many ranges are read at the same time.
        """

        async def work(repairer: Repairer, lease: Lease) -> None:
            await self._reconcile(
                repairer, lease, breaker_percent, report, on_page, at_once=at_once
            )

        return await self._run("reconcile", report, work, patience=patience)

    async def dry_run(
        self,
        *,
        breaker_percent: float,
        report: Report,
        on_page: OnPage = noop,
        on_drift: OnDrift = noop,
    ) -> None:
        """Find what a reconcile would repair. It writes nothing, not even a lease."""
        repairer = self._repairer(self.store, None, asyncio.Event(), on_drift)
        with contextlib.closing(repairer):
            await self._reconcile(repairer, None, breaker_percent, report, on_page)

    async def count(self, report: Report) -> None:
        """Count both sides now, into the report."""
        with contextlib.closing(self._repairer(self.store, None, asyncio.Event())) as repairer:
            report.clerk = await countable(self.clerk, self.mapping, report)
            for kind in report.clerk:
                report.table[kind] = await repairer.rows(kind)

    async def _reconcile(
        self,
        repairer: Repairer,
        lease: Lease | None,
        breaker_percent: float,
        report: Report,
        on_page: OnPage,
        *,
        at_once: int = AT_ONCE,
    ) -> None:
        await Reconcile(
            self.clerk,
            self.mapping,
            repairer,
            self.engine,
            lease,
            instance=self.instance,
            pauses=self.pauses,
            breaker_percent=breaker_percent,
            report=report,
            on_page=on_page,
            at_once=at_once,
        ).run()

    def _repairer(
        self,
        store: Store,
        committer: Committer | None,
        lost: asyncio.Event,
        on_drift: OnDrift = noop,
    ) -> Repairer:
        return Repairer(
            self.mapping, store, self.connect, committer=committer, lost=lost, on_drift=on_drift
        )

    async def _run(
        self,
        name: history.Name,
        report: Report,
        work: Callable[[Repairer, Lease], Awaitable[None]],
        *,
        patience: bool = True,
    ) -> Ending:
        """Do the work under the lease, and record how it ends."""
        holder = f"{name} on {holder_name()}"
        async with contextlib.AsyncExitStack() as stack:
            lease = await wait_for_database(
                lambda: stack.enter_async_context(
                    held(self.engine, LEASE, holder, patience=patience)
                )
            )
            began = time.monotonic()
            ending: Ending | None = Ending.FAILED
            await history.record_start(self.engine, name)
            self.metrics.lease_held.set(1)
            try:
                store = self.store.fenced(lease.name, lease.token)
                async with self.open_committer(store) as committer:
                    repairer = self._repairer(store, committer, lease.lost)
                    with contextlib.closing(repairer):
                        await work(repairer, lease)
                ending = report.ending
            except SafetyStop:
                ending = Ending.STOPPED
                raise
            except asyncio.CancelledError:
                ending = None  # by SIGTERM, as in a rollout: not a failure
                raise
            finally:
                self.metrics.lease_held.set(0)
                if ending is not None:
                    summary = {**report.summary(), "seconds": time.monotonic() - began}
                    with contextlib.suppress(DatabaseUnavailable):
                        await history.record_end(self.engine, name, ending, summary, lease)
            return ending
