"""An installation that is watched: Clerk, the service as processes, a database, Prometheus.

All of it is real but Clerk, and only the rules' clock is a faster one: a minute of theirs is half
a second. A rule that looks back over days has a clock of its own, faster still.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp

from clerk_sync.clerk.signature import signers
from clerk_sync.cli import probe
from monitoring import recordings
from monitoring.alerts import ALERTS, RUNBOOKS
from monitoring.panel import Panel, Query
from monitoring.panels import PANELS
from monitoring.recordings import RECORDINGS
from monitoring.rules import Clock, rules_file
from monitoring.thresholds import DAY, HOUR, MINUTE
from tests import deliveries
from tests.clerk_api import ClerkApi, Event
from tests.deliveries import At, now_ms
from tests.monitoring.prometheus import Labels, Watching
from tools import servers
from tools.servers import LOOPBACK

KEY: Final = "sk_live_c3RhbmQtaW4gb2YgdGhlIHRlc3Rz"
# Seconds of ours for a minute of theirs. A busy machine needs more: the service has to be scraped,
# and started, within theirs.
MINUTE_SECONDS: Final = float(os.environ.get("EVENING_MINUTE_SECONDS", "0.5"))
CLOCK: Final = Clock(MINUTE_SECONDS / MINUTE)
# For rules that look back over days.
DAYS_CLOCK: Final = Clock(CLOCK.scale / 60)
OF_DAYS: Final = ("ClerkSyncReconcileOld", "ClerkSyncDriftRecurring")
SCRAPE_SECONDS: Final = MINUTE_SECONDS
# 5 minutes, as Prometheus has it.
LOOKBACK_SECONDS: Final = 5 * MINUTE_SECONDS
EVENTS_A_SECOND: Final = 3.0
RECONCILE_SECONDS: Final = 5
PROBE_SECONDS: Final = 4 * MINUTE_SECONDS
USUAL_SILENCE: Final = 1 * HOUR
USERS: Final = 60

WHERE: Final = {"namespace": "shop", "job": "clerk-sync"}


def rules() -> dict[str, Any]:
    """The product's rules, each on its clock."""
    slow = [alert for alert in ALERTS if alert.name not in OF_DAYS]
    fast = [alert for alert in ALERTS if alert.name in OF_DAYS]
    made = rules_file(RECORDINGS, slow, runbooks=RUNBOOKS, clock=CLOCK)
    more = rules_file([], fast, runbooks=RUNBOOKS, clock=DAYS_CLOCK)
    made["groups"].append({**more["groups"][1], "name": "clerk-sync.days"})
    return made


def history() -> str:
    """Four good weeks before this evening, as they were recorded."""
    labels = ",".join(f'{name}="{value}"' for name, value in WHERE.items())
    now = time.time()
    by_day = 2 * EVENTS_A_SECOND

    def lines(name: str, value: float, seconds: float, step: float) -> Iterator[str]:
        points = int(seconds * CLOCK.scale / step)
        for point in range(points, 0, -1):
            yield f"{name}{{{labels}}} {value:g} {now - point * step:.3f}"

    yet = (
        *lines(recordings.LONGEST_GAP, USUAL_SILENCE * CLOCK.scale, 28 * DAY, 2.0),
        *lines(recordings.DELIVERIES_RATE, by_day, 3 * DAY, SCRAPE_SECONDS),
        *lines(recordings.FAILURES_RATE, 0, 3 * DAY, SCRAPE_SECONDS),
        *lines(recordings.DELIVERIES, by_day * HOUR * CLOCK.scale, 3 * DAY, SCRAPE_SECONDS),
    )
    return "\n".join((*yet, "# EOF", ""))


@dataclass
class Clerk:
    """Clerk's side: users who change, events of it that are sent, and sent again if refused."""

    api: ClerkApi
    at: At | None = None
    secret: str = deliveries.SECRET
    silent: bool = False
    late_seconds: float = 0.0
    refused: list[Event] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=lambda: iter(range(10**9)))
    _sending: set[asyncio.Task[None]] = field(default_factory=set)

    def newcomer(self, *, ago: float = 0.0) -> Event:
        """A user who signed up so many seconds ago."""
        born = now_ms() - int(ago * 1000)
        return self.api.put_user(f"user_e{next(self._numbers):05d}", created_at=born)

    def change(self) -> Event:
        """A user who changes now."""
        users = list(self.api.users)
        user = users[next(self._numbers) % len(users)]
        self.api.now_ms = now_ms()
        return self.api.update(user, first_name=f"name {now_ms()}")

    async def send(self, event: Event, **how: Any) -> deliveries.Reply | None:
        """Deliver one event; what is not answered 200 waits for `recover`."""
        reply = None
        with contextlib.suppress(OSError, aiohttp.ClientError):
            if self.at is not None:
                reply = await self.at.post(event, secret=self.secret, **how)
        self.answers.append(reply.outcome if reply else "none")
        if reply is None or reply.status != 200:
            self.refused.append(event)
        return reply

    async def go_on(self) -> None:
        """Change and send, until cancelled."""
        while True:
            await asyncio.sleep(1 / EVENTS_A_SECOND)
            if not self.silent:
                late = self.late_seconds
                event = self.newcomer(ago=late) if late else self.change()
                task = asyncio.create_task(self._send(event))
                self._sending.add(task)
                task.add_done_callback(self._sending.discard)

    async def _send(self, event: Event) -> None:
        await self.send(event)

    async def burst(self, events: int, *, posters: int) -> None:
        """So many events at a time, most of them about the same change: they are stale."""
        event = self.change()
        await self.send(event)
        waiting = iter(range(1, events + 1))

        async def poster() -> None:
            nonlocal event
            for number in waiting:
                if number % 500 == 0:
                    # Else the burst would be of events that are late.
                    event = self.change()
                await self.send(event)

        await asyncio.gather(*(poster() for _ in range(posters)))

    async def recover(self) -> None:
        """What "Recover failed messages" in Clerk's dashboard does."""
        again, self.refused = self.refused, []
        for event in again:
            await self.send(event)


class Probes:
    """The chart's CronJob."""

    def __init__(self) -> None:
        self.at: At | None = None
        self._signers = signers(deliveries.SECRET)

    async def go_on(self) -> None:
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            if self.at is not None:
                url = probe.address(self.at.url + deliveries.PATH)
                await probe.send(url, self._signers, seconds=0.5)


@dataclass(frozen=True)
class Slot:
    """Where a process may run: a pod by its two ports."""

    number: int
    port: int = field(default_factory=servers.free_port)
    internal_port: int = field(default_factory=servers.free_port)

    @property
    def target(self) -> dict[str, str]:
        instance = f"{LOOPBACK}:{self.internal_port}"
        return {**WHERE, "instance": instance, "pod": f"clerk-sync-{self.number}"}


class Deployment:
    """One pod that serves, and takes turns with another when it is replaced."""

    def __init__(self, folder: Path, database_url: str, clerk: Clerk, probes: Probes) -> None:
        self.slots = [Slot(0), Slot(1), Slot(2)]
        self._folder = folder
        self._database_url = database_url
        self._clerk = clerk
        self._probes = probes
        self._turn = 1
        self._pod = contextlib.AsyncExitStack()

    @contextlib.asynccontextmanager
    async def pod(
        self, slot: Slot, environment: Mapping[str, str] | None = None, *, crashes: bool = False
    ) -> AsyncIterator[At]:
        """Run one process in this slot, until it is told to stop or `crashes`."""
        settings = {
            "CLERK_SECRET_KEY": KEY,
            "CLERK_API_URL": f"{self._clerk.api.url}/v1",
            "CLERK_SYNC_CLERK_SHARE": "1",
            "CLERK_SYNC_PORT": str(slot.port),
            "CLERK_SYNC_INTERNAL_PORT": str(slot.internal_port),
            **(environment or {}),
        }
        running = deliveries.process(self._folder, self._database_url, **settings)
        async with running as (process, at):
            await at.until_ready(seconds=20)
            yield at
            if not crashes:
                process.signal(signal.SIGTERM)
                await process.ended(seconds=20)

    async def roll(self, *, reconciles: bool = True, **environment: str) -> None:
        """Start a pod, send it what comes, and stop the one before."""
        if reconciles:
            environment["CLERK_SYNC_RECONCILE_INTERVAL"] = f"{RECONCILE_SECONDS}s"
        self._turn = 1 - self._turn
        new = contextlib.AsyncExitStack()
        at = await new.enter_async_context(self.pod(self.slots[self._turn], environment))
        old, self._pod = self._pod, new
        self._clerk.at = self._probes.at = at
        await old.aclose()

    @property
    def spare(self) -> Slot:
        return self.slots[1 - self._turn]

    async def stop(self) -> None:
        self._clerk.at = self._probes.at = None
        await self._pod.aclose()


def query_of(expr: str) -> str:
    """A query of the dashboard as Grafana sends it, on this evening's clock."""
    matchers = ",".join(f'{name}="{value}"' for name, value in WHERE.items())
    expr = CLOCK.expr(expr).replace("$installation", matchers)
    interval = f"{round(4 * SCRAPE_SECONDS * 1000)}ms"
    return expr.replace("$selector", matchers).replace("$__rate_interval", interval)


def panel_of(title: str) -> Panel:
    return next(panel for panel in PANELS if panel.title == title)


def legend_of(query: Query, labels: Labels) -> str:
    """A series' name under a panel."""
    text = query.legend
    for name, value in labels:
        text = text.replace(f"{{{{{name}}}}}", value)
    return text.replace("{{pod}}", "").replace("{{instance}}", "").strip()


async def seen(prometheus: Watching, title: str) -> dict[str, float]:
    """What a panel shows now, by its legends."""
    return {
        legend_of(query, labels): value
        for query in panel_of(title).queries
        for labels, value in (await prometheus.query(query_of(query.expr))).items()
    }
