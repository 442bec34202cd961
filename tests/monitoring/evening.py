"""One evening: real Prometheus watches the real service through every trouble that it knows.

`make test-evening` runs it, in some seven minutes. In each scene exactly its alerts fire, and clear
after; and the dashboard shows what it is about.
DASHBOARD_PICTURE=docs/images/dashboard.png draws it, and its first rows beside it.
EVENING_SCENES="silence a_defect" plays only these.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from clerk_sync import app
from clerk_sync.mapping import loader
from clerk_sync.mapping.change import Change
from clerk_sync.outcomes import Answer
from clerk_sync.store import committer
from clerk_sync.telemetry.tracing import Trace
from monitoring.alerts import ALERTS
from monitoring.panels import EVENTS, PANELS
from monitoring.thresholds import MINUTE, QUEUE_SHARE, RESTARTS
from tests import clerk_api, deliveries
from tests.conftest import Servers
from tests.deliveries import OTHER_SECRET, SECRET
from tests.monitoring import picture, prometheus
from tests.monitoring.installation import (
    CLOCK,
    KEY,
    LOOKBACK_SECONDS,
    SCRAPE_SECONDS,
    USERS,
    Clerk,
    Deployment,
    Probes,
    history,
    query_of,
    rules,
    seen,
)
from tests.monitoring.prometheus import Watching
from tests.waiting import until
from tools import servers as database_servers
from tools.servers import Managed

CHOSEN: Final = os.environ.get("EVENING_SCENES", "").split()
# Panels that are empty while all is well.
EMPTY_WHEN_WELL: Final = {"Firing alerts"}


@dataclass
class Scene:
    """A part of the evening: what may fire in it, what did, from when to when."""

    name: str
    may: set[str]
    start: float = field(default_factory=time.time)
    end: float = 0.0
    fired: set[str] = field(default_factory=set)


@dataclass
class Evening:
    """What the scenes act on, and what they look at."""

    api: clerk_api.ClerkApi
    clerk: Clerk
    probes: Probes
    deployment: Deployment
    database: Managed
    database_url: str
    watching: Watching
    scenes: list[Scene] = field(default_factory=list)
    lingering: set[str] = field(default_factory=set)

    @contextlib.asynccontextmanager
    async def scene(self, name: str, *fires: str, lingers: str = "") -> AsyncIterator[None]:
        """Play a scene; then wait until nothing fires, but for what `lingers` to the next."""
        scene = Scene(name, {*fires, *self.lingering})
        self.scenes.append(scene)
        yield
        self.lingering = {lingers} - {""}
        await self.until(self.lingering, seconds=120)
        scene.end = time.time()
        print(f"  {scene.end - scene.start:5.0f} s  {name}")

    async def until(self, wanted: set[str], *, seconds: float) -> None:
        """Wait until exactly these fire; meanwhile, nothing but what the scene allows."""
        scene = self.scenes[-1]
        # On a slower clock, everything takes longer.
        deadline = time.monotonic() + seconds * max(1, minutes(2))
        while True:
            now = await self.watching.firing()
            scene.fired |= now
            assert now <= scene.may, f"{scene.name}: {now - scene.may} fire"
            if wanted <= now <= wanted | self.lingering:
                return
            assert time.monotonic() < deadline, f"{scene.name}: {now} fire, not {wanted}"
            await asyncio.sleep(SCRAPE_SECONDS / 2)

    async def fires(self, *names: str, seconds: float) -> None:
        await self.until(set(names), seconds=seconds)

    async def quiet_for(self, seconds: float) -> None:
        """Let time pass in which nothing fires."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            await self.until(set(), seconds=1)
            await asyncio.sleep(SCRAPE_SECONDS)

    async def shows(
        self, title: str, legend: str, fine: Callable[[float], bool], *, seconds: float = 6
    ) -> None:
        """Wait until this panel's series has such a value."""

        async def look() -> dict[str, float]:
            return await seen(self.watching, title)

        def is_fine(values: dict[str, float]) -> bool:
            return legend in values and fine(values[legend])

        await until(look, is_fine, seconds=seconds)


def above(limit: float) -> Callable[[float], bool]:
    return lambda value: value > limit


def below(limit: float) -> Callable[[float], bool]:
    return lambda value: value < limit


def exactly(wanted: float) -> Callable[[float], bool]:
    return lambda value: value == wanted


def minutes(many: float) -> float:
    """So many minutes on the rules' clock, in seconds of ours."""
    return many * MINUTE * CLOCK.scale


async def a_normal_evening(evening: Evening) -> None:
    async with evening.scene("a normal evening"):
        await evening.quiet_for(minutes(20))
        for panel in PANELS:
            for query in panel.queries:
                found = await evening.watching.query(query_of(query.expr))
                assert bool(found) != (panel.title in EMPTY_WHEN_WELL), f"{panel.title}: {query}"
        for event in EVENTS:
            assert await evening.watching.query(query_of(event.expr)), event.name
        await evening.shows("Accepts deliveries", "ready", exactly(1))
        await evening.shows("Silence", "of unusual", below(0.5))
        await evening.shows("Failed deliveries", "failed", exactly(0))
        await evening.shows("Late events", "late", exactly(0))
        await evening.shows("Requests", "applied", above(0))


async def a_burst(evening: Evening) -> None:
    async with evening.scene("a burst"):
        await evening.clerk.burst(1500, posters=64)
        await evening.shows("Transactions", "events per transaction", above(2))
        await evening.quiet_for(minutes(10))


async def forged_requests(evening: Evening) -> None:
    async with evening.scene("forged requests among real ones", "ClerkSyncSignatureFailures"):

        async def forge() -> None:
            while True:
                assert evening.clerk.at is not None
                await evening.clerk.at.post(b"{}", secret=OTHER_SECRET)
                await asyncio.sleep(0.05)

        async with doing(forge()):
            await evening.fires("ClerkSyncSignatureFailures", seconds=30)
            await evening.shows("Signed: rejected or accepted", "rejected", above(0))
            await evening.shows("Signed: rejected or accepted", "accepted", above(0))
            await evening.shows("Rejected requests", "wrong", above(0))


async def the_wrong_secret(evening: Evening) -> None:
    async with evening.scene("the wrong secret", "ClerkSyncDeliveriesRejected"):
        evening.clerk.secret = OTHER_SECRET
        await evening.fires("ClerkSyncDeliveriesRejected", seconds=30)
        await evening.shows("Signed: rejected or accepted", "accepted", exactly(0))
        await evening.shows("Firing alerts", "", exactly(1))
        evening.clerk.secret = SECRET
        await evening.clerk.recover()


async def the_database_is_gone(evening: Evening) -> None:
    symptoms = "ClerkSyncNotReady", "ClerkSyncErrorBudgetBurnFast"
    async with evening.scene("the database is gone", *symptoms, "ClerkSyncDatabaseUnreachable"):
        await asyncio.to_thread(evening.database.stop)
        await evening.fires(*symptoms, "ClerkSyncDatabaseUnreachable", seconds=30)
        await evening.shows("Accepts deliveries", "ready", exactly(0))
        await evening.shows("Not ready, and why", "database", exactly(1))
        await evening.shows("Failed deliveries by cause", "503 database", above(0))
        await evening.shows("Failed deliveries", "failed", above(0.072))
        evening.clerk.silent = True
        await asyncio.to_thread(evening.database.start)
        assert evening.clerk.at is not None
        await evening.clerk.at.until_ready()
        evening.clerk.silent = False
        await evening.clerk.recover()


async def a_poisoned_event(evening: Evening) -> None:
    async with evening.scene("a poisoned event", "ClerkSyncQuarantineNotEmpty"):
        event = evening.clerk.change()
        event["data"] = {**event["data"], "username": "x" * 400}
        event["data"]["updated_at"] += 1
        reply = await evening.clerk.send(event)
        assert reply is not None
        assert reply.said == (200, "quarantined", "too_long")
        await evening.shows("Newly quarantined", "too_long", above(0))
        # The count is looked at once a minute of ours, and at the start.
        await evening.deployment.roll()
        await evening.fires("ClerkSyncQuarantineNotEmpty", seconds=30)
        await evening.shows("In quarantine", "quarantined", exactly(1))
        await database_servers.query(evening.database_url, "DELETE FROM clerk_sync_quarantine")
        await evening.deployment.roll()


async def silence(evening: Evening) -> None:
    names = "ClerkSyncSilent", "ClerkSyncDriftRecurring"
    async with evening.scene("silence, while Clerk's data changes", *names):
        evening.clerk.silent = True

        async def go_on() -> None:
            while True:
                evening.clerk.newcomer()
                await asyncio.sleep(1)

        async with doing(go_on()):
            await evening.quiet_for(minutes(60))
            # Each reconcile repairs, and the next finds drift again.
            await evening.fires(*names, seconds=60)
            await evening.shows("Silence", "of unusual", above(1))
            await evening.shows("Out of sync at the last reconcile", "user missing", above(0))
            await evening.shows("How the last reconcile ended", "mended", exactly(1))
        evening.clerk.silent = False


async def a_reconcile_finds_drift(evening: Evening) -> None:
    async with evening.scene("a reconcile finds drift, once"):
        evening.clerk.newcomer()
        await evening.shows(
            "Out of sync at the last reconcile", "user missing", exactly(1), seconds=20
        )
        await evening.quiet_for(5)


async def the_breaker_trips(evening: Evening) -> None:
    async with evening.scene("the breaker trips", "ClerkSyncReconcileStopped"):
        gone = [evening.api.delete(user) for user in list(evening.api.users)[: USERS // 3]]
        await evening.fires("ClerkSyncReconcileStopped", seconds=30)
        await evening.shows("How the last reconcile ended", "stopped", exactly(1))
        for event in gone:
            await evening.clerk.send(event)


async def clerk_refuses_the_key(evening: Evening) -> None:
    async with evening.scene("Clerk refuses the key", "ClerkSyncReconcileFailing"):
        evening.api.key = "sk_live_another"
        await evening.fires("ClerkSyncReconcileFailing", seconds=60)
        await evening.shows("How the last reconcile ended", "failed", exactly(1))
        await evening.shows("Requests to Clerk's API", "4xx", above(0), seconds=10)
        evening.api.key = KEY


async def the_schedule_ends(evening: Evening) -> None:
    async with evening.scene("nobody reconciles any more", "ClerkSyncReconcileOld"):
        await evening.deployment.roll(reconciles=False)
        await evening.fires("ClerkSyncReconcileOld", seconds=60)
        await evening.shows("Last reconcile", "ago", above(30))
        await evening.deployment.roll()


async def events_come_late(evening: Evening) -> None:
    async with evening.scene("events come late", "ClerkSyncEventsLate"):
        evening.clerk.late_seconds = 90
        await evening.fires("ClerkSyncEventsLate", seconds=60)
        await evening.shows("Late events", "late", above(0.5))
        await evening.shows("Age at commit", "50 %", above(60))
        evening.clerk.late_seconds = 0


async def the_way_is_closed(evening: Evening) -> None:
    async with evening.scene("nothing gets through", "ClerkSyncProbeFailing"):
        at, evening.clerk.at, evening.probes.at = evening.clerk.at, None, None
        await evening.fires("ClerkSyncProbeFailing", seconds=40)
        await evening.shows("Silence and probes", "last probe", above(minutes(20)))
        evening.clerk.at = evening.probes.at = at
        await evening.clerk.recover()


async def a_column_is_gone(evening: Evening) -> None:
    names = "ClerkSyncSchemaBehind", "ClerkSyncNotReady"
    rename = "ALTER TABLE clerk_users RENAME COLUMN {} TO {}"
    async with evening.scene("a column is gone", *names):
        evening.clerk.silent = True
        await asyncio.sleep(1)
        url = evening.database_url
        await database_servers.query(url, rename.format("first_name", "given_name"))
        reply = await evening.clerk.send(evening.clerk.change())
        assert reply is not None
        assert reply.said == (503, "unavailable", "schema")
        await evening.fires(*names, seconds=30)
        await evening.shows("Not ready, and why", "schema", exactly(1))
        await database_servers.query(url, rename.format("given_name", "first_name"))
        assert evening.clerk.at is not None
        await evening.clerk.at.until_ready()
        evening.clerk.silent = False
        await evening.clerk.recover()


async def the_queue_is_long(evening: Evening) -> None:
    async with evening.scene("the queue stays near its limit", "ClerkSyncQueueNearLimit"):
        await evening.deployment.roll(
            CLERK_SYNC_BATCH_LIMIT="1", CLERK_SYNC_QUEUE_LIMIT="40", CLERK_SYNC_WRITERS="1"
        )
        async with doing(evening.clerk.burst(10**6, posters=36)):
            await evening.fires("ClerkSyncQueueNearLimit", seconds=30)
            await until(
                lambda: seen(evening.watching, "Queue"),
                lambda shown: max(shown.values(), default=0) > QUEUE_SHARE,
            )
        await evening.deployment.roll()


class Defective(committer.Committer):
    """A defect of ours, made on purpose."""

    async def commit(self, change: Change, trace: Trace | None = None) -> Answer:  # noqa: ARG002
        raise RuntimeError(f"{change.type}: on purpose")


async def a_defect(evening: Evening) -> None:
    slot = evening.deployment.slots[2]

    def defective(settings: Any, metrics: Any) -> committer.Committer:
        return Defective(
            lambda: asyncio.sleep(0, None),  # type: ignore[arg-type]
            metrics=metrics,
            writers=settings.writers,
            batch_limit=settings.batch_limit,
            queue_limit=settings.queue_limit,
        )

    async with evening.scene("a defect", "ClerkSyncInternalErrors"):
        settings = deliveries.settings_of(
            evening.database_url,
            CLERK_SYNC_PORT=slot.port,
            CLERK_SYNC_INTERNAL_PORT=slot.internal_port,
        )
        running = app.running(settings, loader.load("mirror"), committer_of=defective)
        async with running as urls, deliveries.talking_to(urls.url, urls.internal_url) as at:
            await at.until_ready()
            await asyncio.sleep(2 * SCRAPE_SECONDS)
            assert (await at.post(evening.clerk.change())).status == 500
            await evening.fires("ClerkSyncInternalErrors", seconds=20)
            await evening.shows("Failed deliveries by cause", "500", above(0))


async def a_crash_loop(evening: Evening) -> None:
    name = "ClerkSyncRestarting"
    async with evening.scene("one of two crashes again and again", name, lingers=name):
        for _ in range(4):
            async with evening.deployment.pod(evening.deployment.spare, crashes=True):
                await asyncio.sleep(2 * SCRAPE_SECONDS)
        await evening.fires(name, seconds=10)
        await evening.shows("Processes and starts", "starts of a process", above(RESTARTS))


async def nobody_is_there(evening: Evening) -> None:
    async with evening.scene("nobody is there", "ClerkSyncAbsent"):
        await evening.deployment.stop()
        await evening.fires("ClerkSyncAbsent", seconds=30)
        shown = await seen(evening.watching, "Accepts deliveries")
        assert not shown, "the stat says ABSENT where there is no value"
        await evening.deployment.roll()
        await evening.clerk.recover()


async def the_database_stays_away(evening: Evening) -> None:
    first = "ClerkSyncNotReady", "ClerkSyncDatabaseUnreachable", "ClerkSyncErrorBudgetBurnFast"
    # On its own clock, the last one is two days later.
    then = "ClerkSyncErrorBudgetBurnSlow", "ClerkSyncProbeFailing", "ClerkSyncReconcileOld"
    async with evening.scene("the database stays away", *first, *then):
        await asyncio.to_thread(evening.database.stop)
        await evening.fires(*first, *then, seconds=60)
        await asyncio.to_thread(evening.database.start)
        assert evening.clerk.at is not None
        await evening.clerk.at.until_ready()
        # The budget is a share: what is well dilutes what was not.
        await evening.clerk.burst(15_000, posters=64)
        await evening.clerk.recover()


SCENES: Final[tuple[Callable[[Evening], Awaitable[None]], ...]] = (
    a_normal_evening,
    a_burst,
    forged_requests,
    the_wrong_secret,
    the_database_is_gone,
    a_poisoned_event,
    events_come_late,
    a_reconcile_finds_drift,
    silence,
    the_breaker_trips,
    clerk_refuses_the_key,
    the_schedule_ends,
    the_way_is_closed,
    a_column_is_gone,
    the_queue_is_long,
    a_defect,
    a_crash_loop,
    nobody_is_there,
    the_database_stays_away,
)


@contextlib.asynccontextmanager
async def doing(work: Any) -> AsyncIterator[None]:
    """Do this meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.asynccontextmanager
async def beginning(folder: Path, database: Managed) -> AsyncIterator[Evening]:
    """Everything runs, and is in sync."""
    database_url = database.create_database("clerk_sync_evening")
    await deliveries.migrate(database_url)
    async with clerk_api.running(key=KEY, tick_ms=1) as api:
        clerk, probes = Clerk(api), Probes()
        deployment = Deployment(folder, database_url, clerk, probes)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(deployment.stop)
            await deployment.roll()
            for _ in range(USERS):
                await clerk.send(clerk.newcomer())
            watching = await stack.enter_async_context(
                prometheus.watching(
                    folder,
                    targets=[slot.target for slot in deployment.slots],
                    rules=rules(),
                    seconds=SCRAPE_SECONDS,
                    lookback=LOOKBACK_SECONDS,
                    history=history(),
                )
            )
            # Prometheus finds its targets 5 seconds after it starts.
            await until(lambda: watching.query("clerk_sync_build_info"), bool, seconds=30)
            await until(watching.firing, lambda names: not names)
            evening = Evening(api, clerk, probes, deployment, database, database_url, watching)
            async with doing(clerk.go_on()), doing(probes.go_on()):
                yield evening


@pytest.mark.timeout(900)
async def test_each_alert_fires_in_its_scene_and_no_other_does(
    servers: Servers, tmp_path: Path
) -> None:
    source = database_servers.available()[0]
    assert source.managed, "the evening stops its database: unset TEST_DATABASE_URL"
    database = servers[source.flavour]
    assert isinstance(database, Managed)
    async with beginning(tmp_path, database) as evening:
        try:
            for play in SCENES:
                if play.__name__ in CHOSEN or not CHOSEN:
                    await play(evening)
            fired = {name for scene in evening.scenes for name in scene.fired}
            assert CHOSEN or fired == {alert.name for alert in ALERTS}
            await as_judged(evening)
        finally:
            if path := os.environ.get("DASHBOARD_PICTURE"):
                await drawn(evening, Path(path))


async def as_judged(evening: Evening) -> None:
    """What Prometheus kept agrees: in each scene nothing fired but its own, at no moment."""
    for scene in evening.scenes:
        found = await evening.watching.over(
            'ALERTS{alertstate="firing"}', scene.start, scene.end, SCRAPE_SECONDS
        )
        assert {dict(labels)["alertname"] for labels in found} <= scene.may, scene


async def drawn(evening: Evening, path: Path) -> None:
    """Draw what the dashboard showed."""
    evening.scenes[-1].end = evening.scenes[-1].end or time.time()
    first, last = evening.scenes[0].start, evening.scenes[-1].end
    found = {
        panel.title: await picture.lines_of(evening.watching, panel, first, last)
        for panel in PANELS
    }
    shades = [
        picture.Shade(
            number, scene.name, *(picture.moved(at - first) for at in (scene.start, scene.end))
        )
        for number, scene in enumerate(evening.scenes, 1)
    ]
    picture.draw(found, shades, path)
