"""Every metric, declared once: closed label sets, each series there from the start at 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
)
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from clerk_sync import __version__, samples
from clerk_sync.answers import (
    DRIFTS,
    QUARANTINES,
    REJECTIONS,
    UNAVAILABILITIES,
    Answer,
    Ending,
    Outcome,
)
from clerk_sync.events import LISTED

OTHER: Final = "other"
CLERK_STATUSES: Final = ("200", "404", "429", "4xx", "5xx", "none", "other")
SETTLED: Final = (
    Outcome.APPLIED,
    Outcome.STALE,
    Outcome.DUPLICATE,
    Outcome.IGNORED,
    Outcome.QUARANTINED,
)
_TYPES: Final = frozenset(samples.TYPES)


# They double the series, and Prometheus reads them as gauges of their own.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """One service's metrics in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        registry = self.registry
        self.received = Counter(
            "clerk_sync_received",
            "Requests that reached the webhook listener.",
            registry=registry,
        )
        self.outcomes = Counter(
            "clerk_sync_outcomes",
            "Verified events by Clerk's type and what became of them.",
            ["type", "outcome"],
            registry=registry,
        )
        self.rejected = Counter(
            "clerk_sync_rejected",
            "Requests refused before they were an event, by reason.",
            ["reason"],
            registry=registry,
        )
        self.quarantined = Counter(
            "clerk_sync_quarantined",
            "Events put into quarantine, by reason.",
            ["reason"],
            registry=registry,
        )
        self.unavailable = Counter(
            "clerk_sync_unavailable",
            "Requests answered 503 for the sender to retry, by reason.",
            ["reason"],
            registry=registry,
        )
        self.errors = Counter(
            "clerk_sync_errors",
            "Requests answered 500: a defect of clerk-sync.",
            registry=registry,
        )
        self.quarantine_size = Gauge(
            "clerk_sync_quarantine_events",
            "Events in quarantine now, as of the last look.",
            registry=registry,
        )
        self.batch_size = Histogram(
            "clerk_sync_batch_events",
            "Events committed together in one transaction.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
            registry=registry,
        )
        self.apply_seconds = Histogram(
            "clerk_sync_apply_seconds",
            "Time that one transaction took, COMMIT included.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
            registry=registry,
        )
        self.request_seconds = Histogram(
            "clerk_sync_request_seconds",
            "Time from a webhook's headers to its answer.",
            buckets=(0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
            registry=registry,
        )
        self.event_age = Histogram(
            "clerk_sync_event_age_seconds",
            "Time from Clerk's event to its commit here.",
            buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200, 43200, 100000),
            registry=registry,
        )
        self.contention = Counter(
            "clerk_sync_contention_retries",
            "Transactions run again after a deadlock or a lock wait.",
            registry=registry,
        )
        self.queue_depth = Gauge(
            "clerk_sync_queue_depth", "Events waiting for a writer.", registry=registry
        )
        self.writer_connections = Gauge(
            "clerk_sync_writer_connections",
            "Database connections held by the writers.",
            registry=registry,
        )
        self.pool_in_use = Gauge(
            "clerk_sync_pool_in_use",
            "Connections of the read side's pool in use.",
            registry=registry,
        )
        self.pool_size = Gauge(
            "clerk_sync_pool_size", "Connections the read side's pool may hold.", registry=registry
        )
        self.ready = Gauge(
            "clerk_sync_ready", "1 while the service takes deliveries.", registry=registry
        )
        self.last_success = Gauge(
            "clerk_sync_last_success_timestamp_seconds",
            "When a delivery was last answered 2xx, unix time; 0 before the first.",
            registry=registry,
        )
        self.clerk_requests = Counter(
            "clerk_sync_clerk_requests",
            "Requests to Clerk's API by how they were answered; none is no answer.",
            ["status"],
            registry=registry,
        )
        self.clerk_wait_seconds = Counter(
            "clerk_sync_clerk_wait_seconds",
            "Time that requests to Clerk's API waited for its rate limit, or for our share of it.",
            registry=registry,
        )
        self.clerk_entities = Gauge(
            "clerk_sync_clerk_entities",
            "Objects that Clerk counted when it was last asked.",
            ["kind"],
            registry=registry,
        )
        self.table_entities = Gauge(
            "clerk_sync_table_entities",
            "Rows that the mapped table had at the same time, without marked ones.",
            ["kind"],
            registry=registry,
        )
        self.drift = Gauge(
            "clerk_sync_reconcile_drift_entities",
            "What the last reconcile found out of step, wherever it ran.",
            ["kind", "drift"],
            registry=registry,
        )
        self.reconcile_result = Gauge(
            "clerk_sync_reconcile_result",
            "1 for how the last reconcile ended, wherever it ran.",
            ["result"],
            registry=registry,
        )
        self.reconcile_finished = Gauge(
            "clerk_sync_reconcile_finished_timestamp_seconds",
            "When the last reconcile ended, unix time; 0 before the first.",
            registry=registry,
        )
        self.reconcile_seconds = Gauge(
            "clerk_sync_reconcile_seconds", "Time that the last reconcile took.", registry=registry
        )
        self.lease_held = Gauge(
            "clerk_sync_lease_held",
            "1 while this process reconciles, which one does at a time.",
            registry=registry,
        )
        Info("clerk_sync_build", "The running version.", registry=registry).info(
            {"version": __version__}
        )
        self._outcomes = {
            (type_, outcome): self.outcomes.labels(type_, outcome.value)
            for type_ in (*samples.TYPES, OTHER)
            for outcome in SETTLED
        }
        self._rejected = {reason: self.rejected.labels(reason.value) for reason in REJECTIONS}
        self._quarantined = {
            reason: self.quarantined.labels(reason.value) for reason in QUARANTINES
        }
        self._unavailable = {
            reason: self.unavailable.labels(reason.value) for reason in UNAVAILABILITIES
        }

        self._clerk_requests = {
            status: self.clerk_requests.labels(status) for status in CLERK_STATUSES
        }
        for kind in LISTED:
            self.clerk_entities.labels(kind)
            self.table_entities.labels(kind)
            for drift in DRIFTS:
                self.drift.labels(kind, drift.value)
        for ending in Ending:
            self.reconcile_result.labels(ending.value)

    def clerk_asked(self, status: int | None) -> None:
        """Count one request to Clerk; `status` None is one without an answer."""
        name = "none" if status is None else str(status)
        if name not in CLERK_STATUSES:
            name = f"{name[0]}xx"
        self._clerk_requests.get(name, self._clerk_requests["other"]).inc()

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
        for kind in LISTED:
            for name in DRIFTS:
                self.drift.labels(kind, name.value).set(drift.get(kind, {}).get(name.value, 0))

    def applied(self, events: int, seconds: float) -> None:
        """Count one committed transaction."""
        self.batch_size.observe(events)
        self.apply_seconds.observe(seconds)

    def answered(self, answer: Answer, type_: str | None, seconds: float, now: float) -> None:
        """Count one answered delivery."""
        self.request_seconds.observe(seconds)
        if answer.outcome in SETTLED:
            known = type_ if type_ in _TYPES else OTHER
            self._outcomes[known or OTHER, answer.outcome].inc()
            self.last_success.set(now)
            if answer.outcome is Outcome.QUARANTINED and answer.reason is not None:
                self._quarantined[answer.reason].inc()
        elif answer.outcome is Outcome.REJECTED and answer.reason is not None:
            self._rejected[answer.reason].inc()
        elif answer.outcome is Outcome.UNAVAILABLE and answer.reason is not None:
            self._unavailable[answer.reason].inc()
        else:
            self.errors.inc()
