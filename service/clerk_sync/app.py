"""The composition root: it opens what `serve` and the commands use. Tests run this very thing."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import aiohttp
import structlog
from aiohttp import web

from clerk_sync import __version__
from clerk_sync.clerk.api import PATIENCE_SECONDS as CLERK_PATIENCE_SECONDS
from clerk_sync.clerk.api import Clerk, ClerkUnavailable
from clerk_sync.clerk.metrics import new_metrics
from clerk_sync.database.connection import Connection, close_idle, connect, engine_of
from clerk_sync.database.errors import DatabaseUnavailable
from clerk_sync.health import READY_SECONDS, STARTING, Health, Readiness
from clerk_sync.http.connections import Connections, listeners
from clerk_sync.http.internal import ENSURE_SECONDS, InternalListener
from clerk_sync.http.webhook import WebhookListener
from clerk_sync.outcomes import UNREADINESSES, Reason
from clerk_sync.rotation import Rotation
from clerk_sync.schema.binding import bind
from clerk_sync.settings import InvalidSettings, Settings
from clerk_sync.store import quarantine, retention
from clerk_sync.store.committer import Committer
from clerk_sync.store.held import HOLD_SECONDS
from clerk_sync.store.retries import Retries
from clerk_sync.sync.counts import PAUSES
from clerk_sync.sync.ensure import Ensure
from clerk_sync.sync.patience import PATIENCE_SECONDS as DATABASE_PATIENCE_SECONDS
from clerk_sync.sync.patience import wait_for_database
from clerk_sync.sync.runs import Runs
from clerk_sync.sync.scheduler import Scheduler
from clerk_sync.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.mapping.model import Mapping
    from clerk_sync.store.store import Store
    from clerk_sync.store.writer import Connect
    from clerk_sync.telemetry.tracing import Tracing

log = structlog.get_logger()

KEYLESS: Final = (
    "CLERK_SECRET_KEY: is not set: copy a secret key (sk_…) from Clerk's dashboard, API keys; or "
    "set CLERK_SECRET_KEY_FILE to a file that holds it"
)
# A page of Clerk's is one transaction, and two of them overlap.
RUN_BATCH: Final = 500
RUN_WRITERS: Final = 2
# Nobody waits for an answer here: a page may take its time.
RUN_STATEMENT_SECONDS: Final = 30.0
EXPIRE_SECONDS: Final = 60.0
FIRST_CHECK_SECONDS: Final = 3.0


@dataclass(frozen=True, slots=True)
class Running:
    """A service that listens: the two base URLs."""

    url: str
    internal_url: str


async def _expire(
    engine: AsyncEngine, settings: Settings, metrics: Metrics, health: Health
) -> None:
    """Delete expired rows and count the quarantine, every minute while ready; until cancelled."""
    await health.checked.wait()
    while True:
        if health.readiness.ready:
            try:
                async with asyncio.timeout(EXPIRE_SECONDS):
                    rows = await retention.expire(
                        engine,
                        ledger_days=settings.ledger_days,
                        quarantine_days=settings.quarantine_days,
                    )
                    if rows:
                        log.info("expired", rows=rows)
                    size = await quarantine.size(engine)
                    metrics.quarantine_size.set(size.stuck)
                    metrics.quarantine_retried.set(size.retried)
                    await close_idle(engine)
            except (DatabaseUnavailable, TimeoutError) as error:
                log.warning("housekeeping_failed", error=str(error))
            except Exception:
                log.exception("housekeeping_failed")
        await asyncio.sleep(EXPIRE_SECONDS if health.readiness.ready else READY_SECONDS)


@contextlib.asynccontextmanager
async def open_engine(settings: Settings, *, size: int) -> AsyncIterator[AsyncEngine]:
    """SQLAlchemy's engine, with at most so many connections."""
    engine = engine_of(settings.locate, size=size)
    try:
        yield engine
    finally:
        await engine.dispose()


@contextlib.asynccontextmanager
async def open_clerk(
    settings: Settings, metrics: Metrics, *, patience: float = CLERK_PATIENCE_SECONDS
) -> AsyncIterator[Clerk]:
    """The client of Clerk's API; for `patience` see there.

    Raises InvalidSettings if there is no key.
    """
    secret = settings.clerk_key
    if secret is None:
        raise InvalidSettings([KEYLESS])

    def key() -> str:
        try:
            return secret.read()
        except InvalidSettings as error:
            raise ClerkUnavailable(str(error)) from None

    # Twice over: ranges that are read at once, and pages that are requested ahead.
    connector = aiohttp.TCPConnector(limit=32)
    async with aiohttp.ClientSession(connector=connector) as session:
        # One request is one request: aiohttp would retry by itself, past the rate limit.
        session._retry_connection = False  # noqa: SLF001 -- there is no public way
        yield Clerk(
            session,
            settings.api_url,
            key,
            share=settings.clerk_share,
            metrics=metrics,
            patience=patience,
        )


def connecting(settings: Settings, *, seconds: float) -> Connect:
    """How to open a connection whose round trips end within so many seconds."""

    async def opened() -> Connection:
        try:
            return await connect(settings.locate(), seconds=seconds)
        except InvalidSettings as error:
            raise DatabaseUnavailable(str(error)) from None

    return opened


def database_committer(settings: Settings, metrics: Metrics) -> Committer:
    """The committer of deliveries."""
    return Committer(
        connecting(settings, seconds=settings.deadline_seconds),
        metrics=metrics,
        writers=_writers(settings, settings.writers),
        batch_limit=settings.batch_limit,
        queue_limit=settings.queue_limit,
        # The caller has to learn of it within the deadline.
        hold_seconds=min(HOLD_SECONDS, settings.deadline_seconds / 4),
    )


def _writers(settings: Settings, number: int) -> int:
    # SQLite has one writer at a time: a second would only wait for the first.
    return 1 if settings.locate().path is not None else number


@contextlib.asynccontextmanager
async def _started(committer: Committer, store: Store) -> AsyncIterator[Committer]:
    committer.resume(store)
    committer.start()
    try:
        yield committer
    finally:
        await committer.close()


@contextlib.asynccontextmanager
async def open_committer(settings: Settings, mapping: Mapping) -> AsyncIterator[Committer]:
    """The committer of deliveries without listeners, for commands.

    Raises SchemaMismatch, DatabaseUnavailable.
    """
    async with open_engine(settings, size=1) as engine:
        store = await bind(engine, mapping)
    async with _started(database_committer(settings, new_metrics()), store) as committer:
        yield committer


@contextlib.asynccontextmanager
async def open_ensure(settings: Settings, mapping: Mapping) -> AsyncIterator[Ensure]:
    """What reads one user from Clerk and writes it, for a command.

    Raises InvalidSettings, SchemaMismatch, DatabaseUnavailable.
    """
    async with (
        open_engine(settings, size=1) as engine,
        open_clerk(settings, new_metrics()) as clerk,
    ):
        store = await wait_for_database(lambda: bind(engine, mapping))
        async with _started(database_committer(settings, new_metrics()), store) as committer:
            yield Ensure(clerk, mapping, committer, engine, lambda: store.targets.get("user"))


def runs_of(
    settings: Settings,
    mapping: Mapping,
    clerk: Clerk,
    engine: AsyncEngine,
    store: Store,
    *,
    metrics: Metrics,
    pauses: Sequence[float] = PAUSES,
) -> Runs:
    """The runs of these settings, on what is open already."""
    connect = connecting(settings, seconds=RUN_STATEMENT_SECONDS)

    def open_committer(store: Store) -> contextlib.AbstractAsyncContextManager[Committer]:
        committer = Committer(
            connect,
            metrics=new_metrics(),
            writers=_writers(settings, RUN_WRITERS),
            batch_limit=RUN_BATCH,
            queue_limit=100 * RUN_BATCH,
        )
        return _started(committer, store)

    return Runs(
        mapping,
        clerk,
        engine,
        store,
        connect,
        open_committer,
        metrics,
        settings.instance_id,
        pauses,
    )


@contextlib.asynccontextmanager
async def open_runs(
    settings: Settings,
    mapping: Mapping,
    metrics: Metrics,
    *,
    patience: float = DATABASE_PATIENCE_SECONDS,
) -> AsyncIterator[Runs]:
    """Everything that a run needs. A database that is away is waited for, `patience` seconds.

    Raises InvalidSettings, SchemaMismatch, DatabaseUnavailable.
    """
    async with (
        open_engine(settings, size=3) as engine,
        open_clerk(settings, metrics) as clerk,
    ):
        store = await wait_for_database(lambda: bind(engine, mapping), patience)
        yield runs_of(settings, mapping, clerk, engine, store, metrics=metrics)


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
    checking = engine_of(settings.locate, size=1)
    engine = engine_of(settings.locate, size=max(1, settings.pool_size - 1))

    committer = committer_of(settings, metrics)
    health = Health(checking, mapping, committer, reads=engine)
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
        if health.readiness.ready and not listening.is_set():
            return STARTING
        return health.readiness

    def ready() -> bool:
        return readiness().ready

    def unready(reason: Reason) -> float:
        return readiness().reason is reason

    # What a scrape says is what /readyz says at that moment.
    metrics.ready.set_function(ready)
    for reason in UNREADINESSES:
        metrics.unready.labels(reason.value).set_function(functools.partial(unready, reason))
    scheduler = Scheduler(
        settings,
        lambda: open_runs(settings, mapping, metrics),
        engine,
        metrics,
        ready,
    )
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(webhook.close)
        if tracing is not None:
            stack.push_async_callback(tracing.close)
        ensure = None
        if settings.clerk_key is not None:
            clerk = await stack.enter_async_context(
                open_clerk(settings, metrics, patience=ENSURE_SECONDS)
            )
            ensure = Ensure(clerk, mapping, committer, engine, lambda: health.users)
        internal = InternalListener(
            engine=engine,
            metrics=metrics,
            readiness=readiness,
            users=lambda: health.users,
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
            ready=ready,
        )
        tasks = [
            asyncio.create_task(work)
            for work in (
                health.watch(),
                _expire(engine, settings, metrics, health),
                scheduler.keep(),
                retries.keep(),
                secrets.keep(metrics),
                inside.watch(),
                outside.watch(),
            )
        ]
        stack.push_async_callback(checking.dispose)
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
        await _at_most(health.checked.wait(), FIRST_CHECK_SECONDS)
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
    """Exclude from garbage collection what start-up made, and collect the rest less often.

    `connections` calls the collector when buffers of unverified clients are garbage.
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
