"""The dashboard's rows, from top to bottom, and the events that it draws across all panels."""

from __future__ import annotations

from typing import Final

from monitoring.panel import Event, of_clerk_sync
from monitoring.panels_of_events import ARRIVES, HEALTH, LATE, REJECTED
from monitoring.panels_of_service import DATABASE, PROCESS, QUARANTINE, RECONCILE
from monitoring.rules import INSTALLATION as BY

ROWS: Final = (HEALTH, ARRIVES, LATE, REJECTED, DATABASE, RECONCILE, QUARANTINE, PROCESS)
PANELS: Final = tuple(panel for row in ROWS for panel in row.panels)


EVENTS: Final = (
    Event(
        "Starts",
        of_clerk_sync("process_start_time_seconds{$selector} * 1000"),
        "{{pod}} {{instance}} started",
        "blue",
    ),
    Event(
        "Versions",
        "min by (version) (process_start_time_seconds{$selector} * on (cluster, namespace, job,"
        " instance) group_left (version) clerk_sync_build_info{$selector}) * 1000",
        "version {{version}}",
        "purple",
    ),
    Event(
        "Reconciles",
        f"max by ({BY}) (clerk_sync_reconcile_finished_timestamp_seconds{{$selector}} > 0) * 1000",
        "{{job}} reconciled",
        "green",
    ),
)
