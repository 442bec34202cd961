"""Every metric, declared once, with closed label sets. Each series starts at 0."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from clerk_sync import __version__
from clerk_sync.outcomes import (
    DRIFTS,
    QUARANTINES,
    REJECTIONS,
    UNAVAILABILITIES,
    UNREADINESSES,
    Answer,
    Ending,
    Outcome,
)

OTHER: Final = "other"
CLERK_STATUSES: Final = ("200", "404", "429", "4xx", "5xx", "none", "other")
SETTLED: Final = (
    Outcome.APPLIED,
    Outcome.STALE,
    Outcome.DUPLICATE,
    Outcome.IGNORED,
    Outcome.QUARANTINED,
)
# The settings that may be read from a file.
SECRETS: Final = (
    "database_url",
    "database_host",
    "database_port",
    "database_name",
    "database_username",
    "database_password",
    "signing_secret",
    "secret_key",
    "api_key",
    "app_token",
)
_VERSION: Final = re.compile(r"[0-9]{1,3}(\.[0-9]{1,3}){0,3} *", re.ASCII)

_Made = TypeVar("_Made", bound=MetricWrapperBase)


class Metrics:
    """One service's metrics in a registry of their own.

    Each is declared with its unit and every value that its labels can have, so all of its series
    exist from the start. `units` maps each metric's full name to its unit.
    """

    def __init__(
        self, *, event_types: Iterable[str], probe_type: str, kinds: Iterable[str]
    ) -> None:
        """Declare them for these event types, and for these kinds of objects in Clerk's API.

        An event of `probe_type` is counted, but does not show that Clerk's events arrive.
        """
        types = (*event_types, probe_type, OTHER)
        self._kinds = tuple(kinds)
        self._probe_type = probe_type
        self.registry = CollectorRegistry()
        self.units: dict[str, str] = {}
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self.received = self._counter(
            "received", "Requests that reached the public listener.", "requests"
        )
        self.outcomes = self._counter(
            "outcomes",
            "Verified events by Clerk's type and by outcome. Probes have their own type; types "
            "that clerk-sync does not know are other.",
            "events",
            type=types,
            outcome=SETTLED,
        )
        self.rejected = self._counter(
            "rejected",
            "Requests rejected with 4xx before an event was read.",
            "requests",
            reason=REJECTIONS,
        )
        self.quarantined = self._counter(
            "quarantined", "Events put into quarantine.", "events", reason=QUARANTINES
        )
        self.unavailable = self._counter(
            "unavailable",
            "Deliveries with a valid signature answered 503, for the sender to retry.",
            "requests",
            reason=UNAVAILABILITIES,
        )
        self.unread = self._counter(
            "unread",
            "Requests answered 503 before their signature was verified. Anyone can send them.",
            "requests",
        )
        self.errors = self._counter(
            "errors", "Requests answered 500: a defect of clerk-sync.", "requests"
        )
        self.quarantine_size = self._gauge(
            "quarantine_events",
            "Events in quarantine that a person has to handle, counted once a minute. Events that"
            " are retried automatically count after ten minutes.",
            "events",
        )
        self.quarantine_retried = self._gauge(
            "quarantine_retried_events",
            "Events in quarantine that are retried automatically, counted once a minute.",
            "events",
        )
        self.batch_size = self._histogram(
            "batch_events",
            "Events committed together in one transaction.",
            "events",
            (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        )
        self.apply_seconds = self._histogram(
            "apply_seconds",
            "Duration of a transaction, including COMMIT.",
            "seconds",
            (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
        )
        self.request_seconds = self._histogram(
            "request_seconds",
            "Time from a webhook's headers to its answer.",
            "seconds",
            (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
        )
        self.event_age = self._histogram(
            "event_age_seconds",
            "Time from Clerk's event to its commit here, without probes and duplicates.",
            "seconds",
            # Objectives up to a minute, then Svix's attempts, which end after 28 hours. Older
            # are only manual replays and the examples in Clerk's dashboard.
            (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200, 43200, 100000),
        )
        self.contention = self._counter(
            "contention_retries",
            "Transactions retried after a deadlock or a lock wait.",
            "retries",
        )
        self.queue_depth = self._gauge("queue_depth", "Events waiting for a writer.", "events")
        self.queue_limit = self._gauge(
            "queue_limit", "Events that may wait. At the limit: 503 with queue_full.", "events"
        )
        self.writer_connections = self._gauge(
            "writer_connections", "Database connections held by the writers.", "connections"
        )
        self.pool_in_use = self._gauge(
            "pool_in_use", "Connections in use in the read side's pool.", "connections"
        )
        self.pool_size = self._gauge(
            "pool_size", "Connections the read side's pool may hold.", "connections"
        )
        self.ready = self._gauge(
            "ready", "1 while the service accepts deliveries, as /readyz says.", "1 or 0"
        )
        self.unready = self._gauge(
            "unready",
            "1 for the reason why the service is not ready. All are 0 while it is.",
            "1 or 0",
            reason=UNREADINESSES,
        )
        self.secret_stale = self._gauge(
            "secret_stale",
            "1 while a secret's file is missing, empty or invalid. The last valid one is used.",
            "1 or 0",
            secret=SECRETS,
        )
        self.last_success = self._gauge(
            "last_success_timestamp_seconds",
            "When an event was last answered 200, without probes; 0 before the first.",
            "unix time",
        )
        self.clerk_requests = self._counter(
            "clerk_requests",
            "Requests to Clerk's API by status; none means no answer.",
            "requests",
            status=CLERK_STATUSES,
        )
        self.clerk_wait_seconds = self._counter(
            "clerk_wait_seconds",
            "Time that requests to Clerk's API waited for its rate limit, or for our share of it.",
            "seconds",
        )
        self.clerk_entities = self._gauge(
            "clerk_entities",
            "Clerk's count of objects when any process last asked.",
            "objects",
            kind=self._kinds,
        )
        self.table_entities = self._gauge(
            "table_entities",
            "Rows of the mapped table at the same time, without soft-deleted ones.",
            "rows",
            kind=self._kinds,
        )
        self.drift = self._gauge(
            "reconcile_drift_entities",
            "Rows that the last reconcile found out of sync, in whichever process.",
            "rows",
            kind=self._kinds,
            drift=DRIFTS,
        )
        self.reconcile_result = self._gauge(
            "reconcile_result",
            "1 for the result of the last reconcile, in whichever process.",
            "1 or 0",
            result=Ending,
        )
        self.reconcile_finished = self._gauge(
            "reconcile_finished_timestamp_seconds",
            "When the last reconcile ended; 0 before the first.",
            "unix time",
        )
        self.reconcile_seconds = self._gauge(
            "reconcile_seconds", "Time that the last reconcile took.", "seconds"
        )
        self.lease_held = self._gauge(
            "lease_held",
            "1 while this process backfills or reconciles. Only one process does at a time.",
            "1 or 0",
        )
        self.units["clerk_sync_build"] = "always 1"
        Info("clerk_sync_build", "The running version.", registry=self.registry).info(
            {"version": __version__}
        )
        # Looking up a child by its labels takes a lock, so the hot path has them ready.
        self._outcomes = {
            (type_, outcome): self.outcomes.labels(type_, outcome.value)
            for type_ in types
            for outcome in SETTLED
        }
        self._rejected = {reason: self.rejected.labels(reason.value) for reason in REJECTIONS}
        self._quarantined = {
            reason: self.quarantined.labels(reason.value) for reason in QUARANTINES
        }
        self._unavailable = {
            reason: self.unavailable.labels(reason.value) for reason in UNAVAILABILITIES
        }

    def _counter(self, name: str, tells: str, unit: str, **labels: Iterable[str]) -> Counter:
        return self._made(Counter, name, tells, unit, labels)

    def _gauge(self, name: str, tells: str, unit: str, **labels: Iterable[str]) -> Gauge:
        return self._made(Gauge, name, tells, unit, labels)

    def _histogram(self, name: str, tells: str, unit: str, buckets: Sequence[float]) -> Histogram:
        return self._made(Histogram, name, tells, unit, {}, buckets=buckets)

    def _made(
        self,
        type_: type[_Made],
        name: str,
        tells: str,
        unit: str,
        labels: Mapping[str, Iterable[str]],
        **options: Any,
    ) -> _Made:
        """A metric of the registry, with all of its series."""
        full = f"clerk_sync_{name}"
        self.units[full] = unit
        # OpenMetrics knows a unit only where the name ends with it.
        suffix = "seconds" if unit == "unix time" else unit
        declared = suffix if name.endswith(f"_{suffix}") else ""
        made = type_(full, tells, tuple(labels), registry=self.registry, unit=declared, **options)
        for values in itertools.product(*labels.values()) if labels else ():
            made.labels(*values)
        return made

    def exposed(self, accept: str) -> tuple[bytes, str]:
        """The exposition that a scraper accepts, and its content type.

        OpenMetrics has the times at which series were created, so that a counter's first increase
        counts. In the plain text format they would be extra series, so they are omitted.
        """
        encode, content_type = choose_encoder(_readable(accept))
        if "openmetrics" in content_type:
            return encode(self.registry), content_type
        return encode(_Uncreated(self.registry)), content_type

    def clerk_asked(self, status: int | None) -> None:
        """Count one request to Clerk; `status` None is one without an answer."""
        name = "none" if status is None else str(status)
        for known in (name, f"{name[0]}xx", "other"):
            if known in CLERK_STATUSES:
                self.clerk_requests.labels(known).inc()
                return

    def clerk_waited(self, seconds: float) -> None:
        """Count a wait before a request to Clerk."""
        self.clerk_wait_seconds.inc(seconds)

    def counted(self, kind: str, *, clerk: int, table: int) -> None:
        """Keep what both sides count."""
        self.clerk_entities.labels(kind).set(clerk)
        self.table_entities.labels(kind).set(table)

    def reconciled(
        self,
        ending: Ending,
        *,
        finished: float,
        seconds: float,
        drift: Mapping[str, Mapping[str, int]],
    ) -> None:
        """Keep how the last reconcile ended, and its drift by kind."""
        for one in Ending:
            self.reconcile_result.labels(one.value).set(one is ending)
        self.reconcile_finished.set(finished)
        self.reconcile_seconds.set(seconds)
        for kind in self._kinds:
            for name in DRIFTS:
                self.drift.labels(kind, name.value).set(drift.get(kind, {}).get(name.value, 0))

    def applied(self, events: int, seconds: float, exemplar: dict[str, str] | None = None) -> None:
        """Count one committed transaction; the exemplar is of a trace with it, if one is kept."""
        self.batch_size.observe(events)
        self.apply_seconds.observe(seconds, exemplar)

    def answered(
        self,
        answer: Answer,
        type_: str | None,
        seconds: float,
        now: float,
        exemplar: dict[str, str] | None = None,
        *,
        verified: bool = True,
    ) -> None:
        """Count one answered delivery; the exemplar is of its trace, if that is kept."""
        self.request_seconds.observe(seconds, exemplar)
        if answer.outcome in SETTLED:
            known = self._outcomes.get((type_ or OTHER, answer.outcome))
            (known or self._outcomes[OTHER, answer.outcome]).inc()
            if type_ != self._probe_type:
                self.last_success.set(now)
            if answer.outcome is Outcome.QUARANTINED and answer.reason is not None:
                self._quarantined[answer.reason].inc()
        elif answer.outcome is Outcome.REJECTED and answer.reason is not None:
            self._rejected[answer.reason].inc()
        elif answer.outcome is Outcome.UNAVAILABLE and not verified:
            # Unverified clients that never finish their requests must not use up the error budget.
            self.unread.inc()
        elif answer.outcome is Outcome.UNAVAILABLE and answer.reason is not None:
            self._unavailable[answer.reason].inc()
        else:
            self.errors.inc()


def _readable(accept: str) -> str:
    """Return the part of an `Accept` header that the library can read.

    It compares versions as numbers, fails on others, and repeats them in its answer.
    """
    return ",".join(
        accepted
        for accepted in accept.split(",")
        if all(map(_VERSION.fullmatch, re.findall(r"version=([^;]*)", accepted)))
    )


class _Uncreated(Collector):
    """A registry without the samples that say when a series was created."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [
                sample for sample in metric.samples if sample.name != f"{metric.name}_created"
            ]
            yield metric
