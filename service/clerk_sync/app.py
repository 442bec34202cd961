"""The composition root: settings in, a running service out. Tests run this very thing."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog
from aiohttp import web

from clerk_sync import __version__
from clerk_sync.clerk.metrics import new_metrics
from clerk_sync.database.connection import Connection, close_idle, connect, engine_of
from clerk_sync.database.errors import DatabaseUnavailable
from clerk_sync.http.connections import Connections, listeners
from clerk_sync.http.internal import ENSURE_SECONDS, InternalListener, Readiness
from clerk_sync.http.webhook import WebhookListener
from clerk_sync.outcomes import UNREADINESSES, Reason
from clerk_sync.rotation import Rotation
from clerk_sync.schema.binding import bind
from clerk_sync.schema.checks import SchemaMismatch
from clerk_sync.settings import InvalidSettings, Settings
from clerk_sync.store import health, quarantine, retention
from clerk_sync.store.committer import Committer
from clerk_sync.store.held import HOLD_SECONDS
from clerk_sync.store.retries import Retries
from clerk_sync.sync.ensure import Ensure
from clerk_sync.sync.runs import clerk_of
from clerk_sync.sync.scheduler import Schedule
from clerk_sync.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.mapping.model import Mapping
    from clerk_sync.store.target import Target
    from clerk_sync.telemetry.tracing import Tracing

log = structlog.get_logger()

LOOK_SECONDS_READY: Final = 3.0
LOOK_SECONDS_UNREADY: Final = 0.25
KEEP_SECONDS: Final = 60.0
PING_SECONDS: Final = 3.0
BIND_SECONDS: Final = 60.0
# Reading a schema takes dozens of queries, and a database may be a continent away.
BINDING_SECONDS: Final = 20.0
STARTING: Final = Readiness(ready=False, reason=Reason.DATABASE, detail="starting")


@dataclass(frozen=True, slots=True)
class Running:
    """A service that listens: the two base URLs."""

    url: str
    internal_url: str


class Watch:
    """Looks after the schema and the database, and says whether the service is ready."""

    def __init__(
        self,
        engine: AsyncEngine,
        mapping: Mapping,
        committer: Committer,
        metrics: Metrics,
        settings: Settings,
        *,
        reads: AsyncEngine,
    ) -> None:
        """`engine` is for its looks alone, which wait for nobody; `reads` is everybody's."""
        self.readiness = STARTING
        self.looked = asyncio.Event()
        self._engine = engine
        self._reads = reads
        self._mapping = mapping
        self._committer = committer
        self._metrics = metrics
        self._settings = settings
        self._bound = 0.0
        # What nobody foresaw is told once, not with every look.
        self._surprise: type[Exception] | None = None

    @property
    def users(self) -> Target | None:
        """The users' table, once the schema is known."""
        store = self._committer.store
        return store.targets.get("user") if store else None

    async def look(self) -> None:
        """Look, again and again, until cancelled."""
        troubled = False
        while True:
            self._say(await self._found(troubled=troubled))
            self.looked.set()
            seconds = LOOK_SECONDS_READY if self.readiness.ready else LOOK_SECONDS_UNREADY
            await asyncio.sleep(LOOK_SECONDS_UNREADY)  # trouble may come many times a second
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds - LOOK_SECONDS_UNREADY):
                    await self._committer.status.trouble.wait()
            troubled = self._committer.status.trouble.is_set()
            self._committer.status.trouble.clear()

    async def _found(self, *, troubled: bool) -> Readiness:
        status = self._committer.status
        doubtful, status.doubtful = status.doubtful, False
        if troubled:
            # A connection from before may still be good where a new one, with the credentials of
            # now, is not let in.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PING_SECONDS):
                    await self._engine.dispose()
            await close_idle(self._reads)
        if status.store is None or doubtful:
            return await self._bind()
        commits = status.commits
        try:
            async with asyncio.timeout(PING_SECONDS):
                await health.check_writes(self._engine)
        except (DatabaseUnavailable, InvalidSettings, TimeoutError) as error:
            if status.commits > commits:
                return self.readiness  # what is written shows more than a look that failed
            # Nobody has to wait for a deadline to hear it.
            self._committer.suspend()
            return _unready(error, PING_SECONDS)
        except Exception as error:
            if type(error) is not self._surprise:
                self._surprise = type(error)
                log.exception("schema_check_failed")
            return self.readiness
        # Bound anew every now and then: a column that was widened takes longer values.
        now = asyncio.get_running_loop().time()
        return await self._bind() if now - self._bound > BIND_SECONDS else Readiness(ready=True)

    async def _bind(self) -> Readiness:
        """Look at the schema, and bind the store to it as it is.

        Where the look fails, the schema that is known serves on.
        """
        status = self._committer.status
        self._bound = asyncio.get_running_loop().time()
        unready = Readiness(ready=False, reason=Reason.DATABASE, detail="the look at it failed")
        known = status.store is not None
        try:
            async with asyncio.timeout(BINDING_SECONDS):
                status.store = await bind(self._engine, self._mapping)
            return Readiness(ready=True)
        except SchemaMismatch as error:
            status.store, status.storeless = None, Reason.SCHEMA
            return Readiness(ready=False, reason=Reason.SCHEMA, detail=str(error))
        except (DatabaseUnavailable, InvalidSettings, TimeoutError) as error:
            unready = _unready(error, BINDING_SECONDS)
        except Exception as error:
            if type(error) is not self._surprise:
                self._surprise = type(error)
                log.exception("schema_check_failed")
        return self.readiness if known else unready

    def _say(self, readiness: Readiness) -> None:
        if readiness != self.readiness:
            if readiness.ready:
                self._committer.back()
                log.info("ready")
            else:
                for line in readiness.detail.splitlines():
                    log.error("not_ready", reason=readiness.reason, detail=line)
        self.readiness = readiness

    async def keep(self) -> None:
        """Expire what is old and count what is in quarantine, until cancelled."""
        while True:
            await self.looked.wait()
            if self.readiness.ready:
                try:
                    async with asyncio.timeout(KEEP_SECONDS):
                        await self._keep()
                except (DatabaseUnavailable, TimeoutError) as error:
                    log.warning("housekeeping_failed", error=str(error))
                except Exception:
                    log.exception("housekeeping_failed")
            await asyncio.sleep(KEEP_SECONDS if self.readiness.ready else LOOK_SECONDS_READY)

    async def _keep(self) -> None:
        gone = await retention.expire(
            self._reads,
            ledger_days=self._settings.ledger_days,
            quarantine_days=self._settings.quarantine_days,
        )
        if gone:
            log.info("expired", rows=gone)
        size = await quarantine.size(self._reads)
        self._metrics.quarantine_size.set(size.stuck)
        self._metrics.quarantine_retried.set(size.retried)
        await close_idle(self._reads)


def _unready(error: Exception, seconds: float) -> Readiness:
    """What a failed look says about the database."""
    detail = str(error)
    if isinstance(error, TimeoutError):
        detail = f"the database did not answer within {seconds:.0f} s"
    return Readiness(ready=False, reason=Reason.DATABASE, detail=detail)


def database_committer(settings: Settings, metrics: Metrics) -> Committer:
    """The committer on the database that the settings name."""

    async def opened() -> Connection:
        try:
            return await connect(settings.locate(), seconds=settings.deadline_seconds)
        except InvalidSettings as error:
            raise DatabaseUnavailable(str(error)) from None

    return Committer(
        opened,
        metrics=metrics,
        # SQLite has one writer at a time: a second would only wait for the first.
        writers=1 if settings.locate().path is not None else settings.writers,
        batch_limit=settings.batch_limit,
        queue_limit=settings.queue_limit,
        # Who waits has to hear of it within the deadline.
        hold_seconds=min(HOLD_SECONDS, settings.deadline_seconds / 4),
    )


@contextlib.asynccontextmanager
async def committing(settings: Settings, mapping: Mapping) -> AsyncIterator[Committer]:
    """A committer without listeners, for commands.

    Raises SchemaMismatch, or DatabaseUnavailable.
    """
    committer = database_committer(settings, new_metrics())
    engine = engine_of(settings.locate, size=1)
    try:
        committer.store = await bind(engine, mapping)
    finally:
        await engine.dispose()
    committer.start()
    try:
        yield committer
    finally:
        await committer.close()


@contextlib.asynccontextmanager
async def running(
    settings: Settings,
    mapping: Mapping,
    *,
    committer_of: Callable[[Settings, Metrics], Committer] = database_committer,
    tracing: Tracing | None = None,
) -> AsyncIterator[Running]:
    """Run the service; leaving drains it: not ready, then what is in flight, then the database.

    Raises InvalidSettings and OSError before it listens. `committer_of` is for the bench,
    which leaves the database out to see what the rest costs. `tracing` is closed at the end.
    """
    secrets = Rotation(settings)
    metrics = new_metrics()
    looks = engine_of(settings.locate, size=1)
    engine = engine_of(settings.locate, size=max(1, settings.pool_size - 1))

    committer = committer_of(settings, metrics)
    watch = Watch(looks, mapping, committer, metrics, settings, reads=engine)
    outside, inside = listeners(settings.writers + settings.pool_size)
    webhook = WebhookListener(
        path=settings.webhook_path,
        signers=secrets.signers,
        mapping=mapping,
        instance_id=settings.instance_id,
        committer=committer,
        metrics=metrics,
        deadline_seconds=settings.deadline_seconds,
        connections=outside,
        tracing=tracing,
    )

    listening = asyncio.Event()

    def readiness() -> Readiness:
        if webhook.draining:
            return Readiness(ready=False, reason=Reason.DRAINING, detail="shutting down")
        if watch.readiness.ready and not listening.is_set():
            return STARTING
        return watch.readiness

    def unready(reason: Reason) -> float:
        return readiness().reason is reason

    # What a scrape says is what /readyz says at that moment.
    metrics.ready.set_function(lambda: readiness().ready)
    for reason in UNREADINESSES:
        metrics.unready.labels(reason.value).set_function(functools.partial(unready, reason))
    schedule = Schedule(settings, mapping, engine, metrics, lambda: readiness().ready)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(webhook.close)
        if tracing is not None:
            stack.push_async_callback(tracing.close)
        ensure = None
        if settings.clerk_key is not None:
            clerk = await stack.enter_async_context(
                clerk_of(settings, metrics, patience=ENSURE_SECONDS)
            )
            ensure = Ensure(clerk, mapping, committer, engine, lambda: watch.users)
        internal = InternalListener(
            engine=engine,
            metrics=metrics,
            readiness=readiness,
            users=lambda: watch.users,
            ensure=ensure,
            tokens=secrets.tokens,
            connections=inside,
        )
        stack.callback(internal.close)
        committer.start()
        retries = Retries(
            engine,
            mapping,
            committer,
            instance_id=settings.instance_id,
            ready=lambda: readiness().ready,
        )
        tasks = [
            asyncio.create_task(work)
            for work in (
                watch.look(),
                watch.keep(),
                schedule.keep(),
                retries.keep(),
                secrets.keep(metrics),
                inside.watch(),
                outside.watch(),
            )
        ]
        stack.push_async_callback(looks.dispose)
        stack.push_async_callback(engine.dispose)
        stack.push_async_callback(committer.close)
        stack.push_async_callback(_ended, tasks)
        # Probes and metrics are answered until the very end.
        probes = web.AppRunner(
            internal.app(),
            access_log=None,
            shutdown_timeout=1.0,
            # What is asked for /ensure, and for /profiles, ends with who asked.
            handler_cancellation=True,
        )
        internal_url = await _listen(stack, probes, inside, settings.host, settings.internal_port)
        await _at_most(watch.looked.wait(), PING_SECONDS)
        receiver = web.ServerRunner(
            webhook.server(), shutdown_timeout=settings.deadline_seconds + 1
        )
        url = await _listen(stack, receiver, outside, settings.host, settings.port)
        listening.set()
        log.info("listening", version=__version__, url=url, internal_url=internal_url)
        _collect_less()
        try:
            yield Running(url, internal_url)
        finally:
            webhook.draining = True
            log.info("draining")


def _collect_less() -> None:
    """Let the collector look no more at what start-up made, and at the rest more seldom.

    Where strangers' buffers are garbage, `connections` calls it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


async def serve(
    settings: Settings,
    mapping: Mapping,
    *,
    committer_of: Callable[[Settings, Metrics], Committer] = database_committer,
    tracing: Tracing | None = None,
) -> None:
    """Run until SIGTERM or SIGINT, then drain."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with running(settings, mapping, committer_of=committer_of, tracing=tracing):
        await stop.wait()
    log.info("stopped")
    # The loop's end would bring the signals' defaults back: an impatient second one would
    # turn a clean exit into a kill.
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)


async def _listen(
    stack: contextlib.AsyncExitStack,
    runner: web.BaseRunner,
    connections: Connections,
    host: str | None,
    port: int,
) -> str:
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    assert runner.server is not None
    listening = connections.listening(runner.server, host, port)
    address, port = await stack.enter_async_context(listening)
    shown = "127.0.0.1" if address in ("0.0.0.0", "::") else address  # noqa: S104
    shown = f"[{shown}]" if ":" in shown else shown
    return f"http://{shown}:{port}"


async def _ended(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _at_most(wait: Awaitable[object], seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await wait
