"""The composition root of what walks over Clerk: settings in, a finished run out."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

import aiohttp
import structlog
from asyncmy.errors import MySQLError

from clerk_sync.clerk.api import PATIENCE_SECONDS, Clerk, ClerkUnavailable
from clerk_sync.clerk.listing import AT_ONCE
from clerk_sync.clerk.metrics import new_metrics
from clerk_sync.database.connection import Connection, connect, engine_of
from clerk_sync.database.errors import DatabaseUnavailable
from clerk_sync.outcomes import Ending
from clerk_sync.schema.binding import bind
from clerk_sync.settings import InvalidSettings, Settings
from clerk_sync.store.committer import Committer
from clerk_sync.store.lease import Lease, held, holder_name
from clerk_sync.store.writer import Connect
from clerk_sync.sync import progress
from clerk_sync.sync.backfill import backfill
from clerk_sync.sync.reconcile import Reconcile
from clerk_sync.sync.repair import Mending
from clerk_sync.sync.report import Report, SafetyStop, listed
from clerk_sync.sync.safety import PAUSES
from clerk_sync.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.mapping.model import Mapping
    from clerk_sync.store.store import Store
    from clerk_sync.sync.diff import Compared

log = structlog.get_logger()

LEASE: Final = "walk"
KEYLESS: Final = (
    "CLERK_SECRET_KEY: is not set: copy a secret key (sk_…) from Clerk's dashboard, API keys; or "
    "set CLERK_SECRET_KEY_FILE to a file that holds it"
)
# A page of Clerk's is one transaction, and two of them overlap.
_BATCH: Final = 500
_WRITERS: Final = 2
# Nobody waits for an answer here: a page may take its time.
_STATEMENT_SECONDS: Final = 30.0

# What passes: no connection, too many of them, a shutdown, a failover, a lock, a full disk. All
# other numbers are the same with every try, such as a wrong password or an account that is locked
# (https://dev.mysql.com/doc/mysql-errors/9.4/en/).
_PASSING: Final = frozenset(
    {1021, 1030, 1040, 1041, 1053, 1077, 1105, 1114, 1152, 1159, 1160, 1161, 1184, 1203, 1205}
    | {1213, 1226, 1290, 1317, 1792, 1836, 1927, 2002, 2003, 2006, 2013, 2055}
)

_T = TypeVar("_T")

OnPage = Callable[[str, int, int], None]
Told = Callable[[str, "Compared"], None]


def quiet(*_: object) -> None:
    """Hear, and say nothing."""


@contextlib.asynccontextmanager
async def clerk_of(
    settings: Settings, metrics: Metrics, *, patience: float = PATIENCE_SECONDS
) -> AsyncIterator[Clerk]:
    """A client of Clerk's API, for `patience` see there.

    Raises InvalidSettings when there is no key.
    """
    secret = settings.clerk_key
    if secret is None:
        raise InvalidSettings([KEYLESS])

    def key() -> str:
        try:
            return secret.read()
        except InvalidSettings as error:
            raise ClerkUnavailable(str(error)) from None

    # Twice over: parts that are walked at once, and what is asked for ahead.
    connector = aiohttp.TCPConnector(limit=32)
    async with aiohttp.ClientSession(connector=connector) as session:
        # One request is one request: aiohttp would ask again by itself, past the rate limit.
        session._retry_connection = False  # noqa: SLF001 -- there is no public way
        yield Clerk(
            session,
            settings.api_url,
            key,
            share=settings.clerk_share,
            metrics=metrics,
            patience=patience,
        )


async def ridden_out(work: Callable[[], Awaitable[_T]], seconds: float | None = None) -> _T:
    """Do this, again and again while the database is away: for a minute, as later in a run.

    Not where it is there and does not let us in. Raises DatabaseUnavailable.
    """
    seconds = progress.PATIENCE_SECONDS if seconds is None else seconds
    deadline, wait, told = time.monotonic() + seconds, 0.1, False
    while True:
        try:
            return await work()
        except DatabaseUnavailable as error:
            if _is_refusal(error) or time.monotonic() + wait > deadline:
                raise
            if not told:
                told = True
                log.warning("waiting_for_database", error=str(error), seconds=round(seconds))
        await asyncio.sleep(wait)
        wait = min(2 * wait, 5.0)


def _is_refusal(error: DatabaseUnavailable) -> bool:
    """Whether another try would have the same answer."""
    cause: BaseException | None = error
    while cause is not None:
        said = getattr(cause, "orig", None) or cause
        if isinstance(said, MySQLError) and said.args:
            return said.args[0] not in _PASSING or "CERTIFICATE_VERIFY_FAILED" in str(said)
        cause = cause.__cause__
    return False


def connecting(settings: Settings, seconds: float) -> Connect:
    """How to open a connection whose round trips end within so many seconds."""

    async def opened() -> Connection:
        try:
            return await connect(settings.locate(), seconds=seconds)
        except InvalidSettings as error:
            raise DatabaseUnavailable(str(error)) from None

    return opened


@dataclass(frozen=True, slots=True)
class Walks:
    """What every walk needs, open. `pauses`, in seconds, are for counts that do not agree yet."""

    settings: Settings
    mapping: Mapping
    clerk: Clerk
    engine: AsyncEngine
    store: Store
    metrics: Metrics
    pauses: Sequence[float] = PAUSES

    async def backfill(self, *, restart: bool, report: Report, on_page: OnPage) -> Ending:
        """Run a backfill.

        Raises lease.LeaseHeld, ClerkUnavailable, ClerkRefused, DatabaseUnavailable, LeaseLost,
        SafetyStop.
        """

        async def work(mending: Mending, lease: Lease) -> None:
            await backfill(
                self.clerk,
                self.mapping,
                mending,
                self.engine,
                lease,
                instance=self.settings.instance_id,
                pauses=self.pauses,
                restart=restart,
                report=report,
                on_page=on_page,
            )

        return await self._recorded("backfill", report, work)

    async def reconcile(
        self,
        *,
        breaker_percent: float,
        report: Report,
        on_page: OnPage,
        patience: bool = True,
        at_once: int = AT_ONCE,
    ) -> Ending:
        """Run a reconcile. Raises as `backfill` does.

        Without patience it does not wait to see whether the lease's holder is still alive.
        `at_once` is how many parts are walked at the same time.
        """

        async def work(mending: Mending, lease: Lease) -> None:
            await self._reconcile(mending, lease, breaker_percent, report, on_page, at_once=at_once)

        return await self._recorded("reconcile", report, work, patience=patience)

    async def count(self, report: Report) -> None:
        """What both sides count now, into the report. Raises as the others do."""
        mending = self._mending(None, asyncio.Event())
        try:
            report.clerk = await listed(self.clerk, self.mapping, report)
            for kind in report.clerk:
                report.table[kind] = await mending.rows(kind)
        finally:
            mending.close()

    async def look(
        self, *, breaker_percent: float, report: Report, on_page: OnPage, told: Told
    ) -> None:
        """What a reconcile would mend. Writes nothing, not even a lease. Raises as it does."""
        mending = self._mending(None, asyncio.Event(), told)
        try:
            await self._reconcile(mending, None, breaker_percent, report, on_page)
        finally:
            mending.close()

    async def _reconcile(
        self,
        mending: Mending,
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
            mending,
            self.engine,
            lease,
            instance=self.settings.instance_id,
            pauses=self.pauses,
            breaker_percent=breaker_percent,
            report=report,
            on_page=on_page,
            at_once=at_once,
        ).run()

    def _mending(
        self, committer: Committer | None, lost: asyncio.Event, told: Told = quiet
    ) -> Mending:
        fenced = committer.store if committer is not None else None
        return Mending(
            self.mapping,
            fenced or self.store,
            connecting(self.settings, _STATEMENT_SECONDS),
            committer=committer,
            lost=lost,
            told=told,
        )

    async def _recorded(
        self,
        name: progress.Name,
        report: Report,
        work: Callable[[Mending, Lease], Awaitable[None]],
        *,
        patience: bool = True,
    ) -> Ending:
        """Do the work under the lease, alone; how it ends is kept for metrics."""
        holder = f"{name} on {holder_name()}"
        async with contextlib.AsyncExitStack() as stack:
            lease = await ridden_out(
                lambda: stack.enter_async_context(
                    held(self.engine, LEASE, holder, patience=patience)
                )
            )
            began = time.monotonic()
            ending: Ending | None = Ending.FAILED
            await progress.started(self.engine, name)
            self.metrics.lease_held.set(1)
            try:
                async with self._committing(lease) as committer:
                    mending = self._mending(committer, lease.lost)
                    try:
                        await work(mending, lease)
                    finally:
                        mending.close()
                ending = report.ending
            except SafetyStop:
                ending = Ending.STOPPED
                raise
            except asyncio.CancelledError:
                ending = None  # told to stop, as by a rollout: nobody's failure
                raise
            finally:
                self.metrics.lease_held.set(0)
                if ending is not None:
                    summary = {**report.summary(), "seconds": time.monotonic() - began}
                    with contextlib.suppress(DatabaseUnavailable):
                        await progress.finished(self.engine, name, ending, summary, lease)
            return ending

    @contextlib.asynccontextmanager
    async def _committing(self, lease: Lease) -> AsyncIterator[Committer]:
        """A committer of the run's own, so that webhooks never wait behind it."""
        sqlite = self.settings.locate().path is not None
        committer = Committer(
            connecting(self.settings, _STATEMENT_SECONDS),
            metrics=new_metrics(),
            writers=1 if sqlite else _WRITERS,
            batch_limit=_BATCH,
            queue_limit=100 * _BATCH,
        )
        committer.store = self.store.fenced(lease.name, lease.token)
        committer.start()
        try:
            yield committer
        finally:
            await committer.close()


@contextlib.asynccontextmanager
async def walks(
    settings: Settings, mapping: Mapping, metrics: Metrics, *, patience: float | None = None
) -> AsyncIterator[Walks]:
    """Open what a walk needs; a database that is away is waited for, `patience` seconds.

    Raises InvalidSettings, SchemaMismatch, DatabaseUnavailable.
    """
    engine = engine_of(settings.locate, size=3)
    try:
        async with clerk_of(settings, metrics) as clerk:
            store = await ridden_out(lambda: bind(engine, mapping), patience)
            yield Walks(settings, mapping, clerk, engine, store, metrics)
    finally:
        await engine.dispose()
