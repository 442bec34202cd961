"""Every metric, declared once: closed label sets, each series there from the start at 0."""

from __future__ import annotations

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
    QUARANTINES,
    REJECTIONS,
    UNAVAILABILITIES,
    Answer,
    Outcome,
)

OTHER: Final = "other"
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
