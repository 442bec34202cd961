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
from clerk_sync.database.connection import Connection, close_idle, connect, engine_of
from clerk_sync.database.errors import DatabaseUnavailable
from clerk_sync.health import READY_SECONDS, STARTING, Health, Readiness
from clerk_sync.http.connections import Connections, listeners
from clerk_sync.http.internal import ENSURE_SECONDS, InternalListener
from clerk_sync.http.webhook import WebhookListener
from clerk_sync.outcomes import UNREADINESSES, Reason
from clerk_sync.rotation import Rotation
from clerk_sync.schema import checks
from clerk_sync.settings import InvalidSettings, Settings
from clerk_sync.store import housekeeping, quarantine
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
    from clerk_sync.telemetry.tracing import Tracing

log = structlog.get_logger()

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
                    rows = await housekeeping.expire(
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
    committer = database_committer(settings, Metrics())
    engine = engine_of(settings.locate, size=1)
    try:
        store = await checks.bound(engine, mapping)
    finally:
        await engine.dispose()
    committer.resume(store)
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
    metrics = Metrics()
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
            ensure = Ensure(clerk, mapping, committer, engine, lambda: health.users)
        internal = InternalListener(
            engine=engine,
            metrics=metrics,
            readiness=readiness,
            users=lambda: health.users,
            ensure=ensure,
            tokens=secrets.tokens,
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
                health.watch(),
                _expire(engine, settings, metrics, health),
                schedule.keep(),
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
        app = internal.app()
        app.middlewares.append(inside.answering)
        probes = web.AppRunner(
            app,
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
    host: str,
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
