"""Metrics with a label for each of Clerk's event types and kinds."""

from __future__ import annotations

from clerk_sync.clerk.catalog import LISTED, PROBE, TYPES
from clerk_sync.telemetry.metrics import Metrics


def new_metrics() -> Metrics:
    """Return all metrics, at 0, in a registry of their own."""
    return Metrics(event_types=TYPES, probe_type=PROBE, kinds=LISTED)
