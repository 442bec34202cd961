"""The rows about the service: database, reconcile, quarantine, process."""

from __future__ import annotations

from typing import Final

from monitoring import thresholds
from monitoring.panel import (
    PAGE,
    TICKET,
    Level,
    Panel,
    Query,
    Row,
    a_minute,
    of_clerk_sync,
    quantile,
    rate,
)
from monitoring.rules import INSTALLATION as BY

DATABASE: Final = Row(
    "Database and group commit",
    (
        Panel(
            "Not ready, and why",
            "states",
            "none",
            "Red while a process is not ready for this reason. `draining` is a shutdown.",
            (Query("max by (reason) (clerk_sync_unready{$selector})", "{{reason}}"),),
            alerts=(
                "ClerkSyncNotReady",
                "ClerkSyncDatabaseUnreachable",
                "ClerkSyncSchemaBehind",
            ),
            texts={0: ("", "green"), 1: ("not ready", PAGE)},
        ),
        Panel(
            "Transaction time",
            "lines",
            "s",
            "Duration of a transaction, including COMMIT. When it grows, so does the queue.",
            tuple(
                Query(quantile(q, "clerk_sync_apply_seconds"), f"{q * 100:.0f} %")
                for q in (0.5, 0.9, 0.99)
            ),
        ),
        Panel(
            "Transactions",
            "lines",
            "cpm",
            "Transactions, those retried after a deadlock or a lock wait, and how many events share"
            " one: more when more arrive at once.",
            (
                Query(a_minute("", rate("clerk_sync_batch_events_count")), "transactions"),
                Query(a_minute("", rate("clerk_sync_contention_retries_total")), "retried"),
                Query(
                    f"sum({rate('clerk_sync_batch_events_sum')})"
                    f" / (sum({rate('clerk_sync_batch_events_count')}) > 0)",
                    "events per transaction",
                    unit="none",
                ),
            ),
        ),
        Panel(
            "Queue",
            "lines",
            "percentunit",
            "How full each process' queue is. At 100 %, deliveries are answered 503.",
            (
                Query(
                    "clerk_sync_queue_depth{$selector} / clerk_sync_queue_limit{$selector}",
                    "{{pod}} {{instance}}",
                ),
            ),
            levels=(Level(thresholds.QUEUE_SHARE, TICKET),),
            alerts=("ClerkSyncQueueNearLimit",),
            top=1,
        ),
        Panel(
            "Connections",
            "lines",
            "none",
            "Database connections: the writers' own, and the pool that everything else shares. When"
            " the pool is exhausted, `/profiles`, `/ensure` and housekeeping wait. Readiness has"
            " its own connection.",
            (
                Query("sum(clerk_sync_writer_connections{$selector})", "writers"),
                Query("sum(clerk_sync_pool_in_use{$selector})", "pool, in use"),
                Query("sum(clerk_sync_pool_size{$selector})", "pool, at most"),
            ),
        ),
    ),
)
RECONCILE: Final = Row(
    "Backfill and reconcile",
    (
        Panel(
            "Clerk and the tables",
            "lines",
            "none",
            "How many objects Clerk counts, and how many rows the tables had at that time. Needs"
            " Clerk's secret key.",
            (
                Query(
                    "max by (kind) (clerk_sync_clerk_entities{$selector} > 0)", "Clerk: {{kind}}"
                ),
                Query(
                    "max by (kind) (clerk_sync_table_entities{$selector} > 0)", "table: {{kind}}"
                ),
            ),
            alerts=("ClerkSyncSilent",),
        ),
        Panel(
            "Out of sync at the last reconcile",
            "stacked",
            "none",
            "Rows that it found missing, outdated, drifted (same version, different content) or"
            " orphaned, before it repaired them.",
            (
                Query(
                    f"sum by (kind, drift) (max by ({BY}, kind, drift)"
                    " (clerk_sync_reconcile_drift_entities{$selector}))",
                    "{{kind}} {{drift}}",
                ),
            ),
            alerts=("ClerkSyncDriftRecurring",),
        ),
        Panel(
            "How the last reconcile ended",
            "states",
            "none",
            "Whether a run is in progress, and how the last one ended: in sync, repaired, not fully"
            " repaired, stopped by the deletion guard, or failed.",
            (
                Query("max(clerk_sync_lease_held{$selector})", "running"),
                Query("max by (result) (clerk_sync_reconcile_result{$selector})", "{{result}}"),
            ),
            alerts=("ClerkSyncReconcileFailing", "ClerkSyncReconcileStopped"),
            texts={0: ("", "transparent"), 1: ("so", "blue")},
            colors={"unmended": TICKET, "stopped": TICKET, "failed": TICKET},
        ),
        Panel(
            "Since the last reconcile",
            "lines",
            "s",
            "How long ago it ended, and how long it took.",
            (
                Query(
                    f"time() - max by ({BY}) ("
                    "clerk_sync_reconcile_finished_timestamp_seconds{$selector} > 0)",
                    "ago",
                ),
                Query("max(clerk_sync_reconcile_seconds{$selector})", "took"),
            ),
            levels=(Level(thresholds.RECONCILE_SECONDS, TICKET),),
            alerts=("ClerkSyncReconcileOld",),
        ),
        Panel(
            "Requests to Clerk's API",
            "lines",
            "cpm",
            "Requests by status; `none` means no answer. `waiting` is the average number that"
            " waited for Clerk's rate limit, or for our share of it.",
            (
                Query(a_minute("status", rate("clerk_sync_clerk_requests_total")), "{{status}}"),
                Query(
                    f"sum({rate('clerk_sync_clerk_wait_seconds_total')})", "waiting", unit="none"
                ),
            ),
            alerts=("ClerkSyncReconcileFailing",),
        ),
    ),
)
QUARANTINE: Final = Row(
    "Quarantine",
    (
        Panel(
            "Events in quarantine",
            "lines",
            "none",
            "Counted once a minute. `clerk-sync quarantine list` shows which, and why.",
            (
                Query(f"max by ({BY}) (clerk_sync_quarantine_events{{$selector}})", "{{job}}"),
                Query(
                    f"max by ({BY}) (clerk_sync_quarantine_retried_events{{$selector}})",
                    "{{job}}, retried automatically",
                ),
            ),
            levels=(Level(thresholds.QUARANTINED_EVENTS + 1, TICKET),),
            alerts=("ClerkSyncQuarantineNotEmpty",),
        ),
        Panel(
            "Newly quarantined",
            "stacked",
            "cpm",
            "Why events could not be applied. Many at once mean that the mapping or a column does"
            " not fit.",
            (Query(a_minute("reason", rate("clerk_sync_quarantined_total")), "{{reason}}"),),
            alerts=("ClerkSyncQuarantineNotEmpty", "ClerkSyncErrorBudgetBurnFast"),
        ),
    ),
)
PROCESS: Final = Row(
    "Process",
    (
        Panel(
            "CPU",
            "lines",
            "percentunit",
            "Of one core. A process uses only one: near 100 %, run more processes.",
            (
                Query(
                    of_clerk_sync(rate("process_cpu_seconds_total")),
                    "{{pod}} {{instance}}",
                ),
            ),
        ),
        Panel(
            "Memory",
            "lines",
            "bytes",
            "Resident memory. It should stay flat; endless growth is a defect.",
            (
                Query(
                    of_clerk_sync("process_resident_memory_bytes{$selector}"),
                    "{{pod}} {{instance}}",
                ),
            ),
        ),
        Panel(
            "Processes and starts",
            "lines",
            "none",
            "Processes by version, the most restarts of one process within an hour, and the number"
            " of secret files that are missing, empty or invalid.",
            (
                Query(
                    "count by (version) (clerk_sync_build_info{$selector})", "version {{version}}"
                ),
                Query(
                    # Includes processes that are down now.
                    "max(changes(process_start_time_seconds{$selector}[1h])"
                    f" and on ({BY}, instance)"
                    " last_over_time(clerk_sync_build_info{$selector}[1h]))",
                    "starts of a process",
                ),
                Query("sum(max by (secret) (clerk_sync_secret_stale{$selector}))", "stale secrets"),
            ),
            levels=(Level(thresholds.RESTARTS + 1, TICKET),),
            alerts=("ClerkSyncRestarting", "ClerkSyncAbsent", "ClerkSyncSecretStale"),
        ),
    ),
)
