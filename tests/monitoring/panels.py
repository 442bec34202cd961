"""What the dashboard shows, as data: rows, panels and their queries.

`$selector` stands for the matchers that the dashboard's variables make, `$installation` for those
without the pod, for series that are recorded by installation. Limits are those of the alerts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from clerk_sync.events import PROBE
from tests.monitoring import recordings, thresholds
from tests.monitoring.rules import INSTALLATION as BY
from tests.monitoring.rules import number
from tests.monitoring.thresholds import LATE_SECONDS

Kind = Literal["stat", "lines", "stacked", "states", "table"]

# What pages is red, what makes a ticket is orange.
PAGE: Final = "red"
TICKET: Final = "orange"


@dataclass(frozen=True, slots=True)
class Query:
    """One query and its legend; `unit` where it is another than the panel's.

    `over` draws it as a line over a stack.
    """

    expr: str
    legend: str
    unit: str | None = None
    over: bool = False


@dataclass(frozen=True, slots=True)
class Level:
    """From this value on, the panel has this colour."""

    value: float
    color: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel; `tells` is for somebody who has never seen it, `alerts` are those it explains."""

    title: str
    kind: Kind
    unit: str
    tells: str
    queries: tuple[Query, ...]
    levels: tuple[Level, ...] = ()
    alerts: tuple[str, ...] = ()
    empty: str = "none"
    texts: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    colors: Mapping[str, str] = field(default_factory=dict)
    top: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


def rate(metric: str, *matchers: str) -> str:
    """The rate of a counter's series."""
    return f"rate({metric}{{{','.join((*matchers, '$selector'))}}}[$__rate_interval])"


def a_minute(by: str, one: str) -> str:
    """Rates of a few a minute are what people can read: their sum by a label, if any."""
    grouped = f"sum by ({by})" if by else "sum"
    return f"{grouped} ({one}) * 60"


def quantile(q: float, histogram: str) -> str:
    return f"histogram_quantile({q}, sum by (le) ({rate(f'{histogram}_bucket')}))"


def within(window: str, metric: str, *matchers: str) -> str:
    return f"sum(increase({metric}{{{','.join((*matchers, '$selector'))}}}[{window}]))"


def of_clerk_sync(expr: str) -> str:
    """What every process exposes, of ours alone."""
    return f"{expr} and on ({BY}, instance) clerk_sync_build_info{{$selector}}"


_LAST_EVENT: Final = (
    f"max by ({BY}) (clerk_sync_last_success_timestamp_seconds{{$selector}} > 0"
    f" or {recordings.LAST_EVENT}{{$installation}})"
)
_UNUSUAL: Final = (
    f"clamp_min({thresholds.SILENCE_FACTOR} * (max by ({BY}) ("
    f"{recordings.USUAL_SILENCE}{{$installation}}) or {_LAST_EVENT} * 0),"
    f" seconds({number(thresholds.SILENCE_FLOOR_SECONDS)}))"
)
_ACCEPTED: Final = f'type!="{PROBE}"'
_REFUSED: Final = 'reason=~"wrong|expired|instance"'
_FAILED: Final = " + ".join(
    within("1h", f"clerk_sync_{name}_total") for name in ("unavailable", "errors", "quarantined")
)
_DELIVERED: Final = " + ".join(
    (
        within("1h", "clerk_sync_outcomes_total", _ACCEPTED),
        within("1h", "clerk_sync_unavailable_total"),
        within("1h", "clerk_sync_errors_total"),
    )
)
_AGE: Final = "clerk_sync_event_age_seconds"
_IN_TIME: Final = f'le="{LATE_SECONDS}"'
_STEPS: Final = f'le=~"1.0|5.0|{LATE_SECONDS}|300.0"'

HEALTH: Final = Row(
    "Is the sync healthy?",
    (
        Panel(
            "Takes events",
            "stat",
            "none",
            "Whether any process accepts deliveries. While none does, Clerk keeps them and sends"
            " them again for a day and a quarter.",
            (Query(f"min(max by ({BY}) (clerk_sync_ready{{$selector}}))", "ready"),),
            alerts=("ClerkSyncNotReady", "ClerkSyncAbsent"),
            empty="ABSENT",
            texts={0: ("NO", PAGE), 1: ("yes", "green")},
        ),
        Panel(
            "Silence",
            "stat",
            "s",
            "Time since the last event of Clerk, and how far that is on the way to unusual for this"
            " installation. Beyond 100 % it pages, if Clerk's data changes meanwhile.",
            (
                Query(f"max(time() - {_LAST_EVENT})", "last event", unit="s"),
                Query(
                    f"max((time() - {_LAST_EVENT}) / {_UNUSUAL})",
                    "of unusual",
                    unit="percentunit",
                ),
            ),
            levels=(Level(1, PAGE),),
            alerts=("ClerkSyncSilent", "ClerkSyncProbeFailing"),
            empty="no event yet",
        ),
        Panel(
            "Late events",
            "stat",
            "percentunit",
            f"Of the events of the last 30 minutes, those that reached the tables more than"
            f" {number(LATE_SECONDS)} seconds after they happened in Clerk.",
            (
                Query(
                    f"1 - {within('30m', f'{_AGE}_bucket', _IN_TIME)}"
                    f" / ({within('30m', f'{_AGE}_count')} > 0)",
                    "late",
                ),
            ),
            levels=(Level(thresholds.LATE_SHARE, PAGE),),
            alerts=("ClerkSyncEventsLate",),
            empty="no events",
        ),
        Panel(
            "Failed deliveries",
            "stat",
            "percentunit",
            "Of Clerk's deliveries of the last hour, those that had no effect: answered 503 or 500,"
            " or put into quarantine. A 503 is sent again by Clerk.",
            (Query(f"({_FAILED}) / (({_DELIVERED}) > 0)", "failed"),),
            levels=(
                Level(thresholds.ERROR_BUDGET, TICKET),
                Level(thresholds.BURN_PAGE[0][2] * thresholds.ERROR_BUDGET, PAGE),
            ),
            alerts=("ClerkSyncErrorBudgetBurnFast", "ClerkSyncErrorBudgetBurnSlow"),
            empty="no events",
        ),
        Panel(
            "In quarantine",
            "stat",
            "none",
            "Events that could not be applied and wait for somebody to look. They do not come again"
            " by themselves.",
            (
                Query(
                    f"sum(max by ({BY}) (clerk_sync_quarantine_events{{$selector}}))", "quarantined"
                ),
            ),
            levels=(Level(thresholds.QUARANTINED_EVENTS + 1, TICKET),),
            alerts=("ClerkSyncQuarantineNotEmpty",),
        ),
        Panel(
            "Last reconcile",
            "stat",
            "s",
            "Time since the tables were last compared with Clerk as a whole, wherever that ran.",
            (
                Query(
                    f"max(time() - max by ({BY}) ("
                    "clerk_sync_reconcile_finished_timestamp_seconds{$selector} > 0))",
                    "ago",
                ),
            ),
            levels=(Level(thresholds.RECONCILE_SECONDS, TICKET),),
            alerts=("ClerkSyncReconcileOld",),
            empty="never",
        ),
        Panel(
            "Alerts that fire",
            "table",
            "none",
            "What is known to be wrong now. Each name leads to its runbook. Needs the rules, of the"
            " chart or of docs/alerts.yaml.",
            (
                Query(
                    "max by (alertname, severity, namespace, job)"
                    ' (ALERTS{alertname=~"ClerkSync.+",alertstate="firing",$installation})',
                    "",
                ),
            ),
            empty="none",
        ),
    ),
)
ARRIVES: Final = Row(
    "What arrives, and what becomes of it",
    (
        Panel(
            "Requests",
            "stacked",
            "cpm",
            "Requests by what became of them. `applied` changed the tables. `stale`, `duplicate`"
            " and `ignored` are right as they are. The line is all that was received.",
            (
                Query(
                    a_minute("outcome", rate("clerk_sync_outcomes_total")),
                    "{{outcome}}",
                ),
                Query(a_minute("", rate("clerk_sync_rejected_total")), "rejected"),
                Query(a_minute("", rate("clerk_sync_unavailable_total")), "unavailable"),
                Query(a_minute("", rate("clerk_sync_errors_total")), "error"),
                Query(a_minute("", rate("clerk_sync_received_total")), "received", over=True),
            ),
            colors={
                "applied": "green",
                "stale": "blue",
                "duplicate": "light-blue",
                "ignored": "#808080",
                "quarantined": TICKET,
                "rejected": "purple",
                "unavailable": PAGE,
                "error": "dark-red",
                "received": "text",
            },
        ),
        Panel(
            "Events by type",
            "stacked",
            "cpm",
            "Which of Clerk's events come. Types that clerk-sync does not know are `other`, its own"
            f" probes are `{PROBE}`.",
            (Query(f"{a_minute('type', rate('clerk_sync_outcomes_total'))} > 0", "{{type}}"),),
        ),
        Panel(
            "Put off or failed",
            "stacked",
            "cpm",
            "Deliveries answered 503 by reason, which Clerk sends again, and those answered 500,"
            " which are a defect.",
            (
                Query(a_minute("reason", rate("clerk_sync_unavailable_total")), "503 {{reason}}"),
                Query(a_minute("", rate("clerk_sync_errors_total")), "500"),
            ),
            alerts=(
                "ClerkSyncErrorBudgetBurnFast",
                "ClerkSyncErrorBudgetBurnSlow",
                "ClerkSyncInternalErrors",
            ),
        ),
        Panel(
            "Silence and probes",
            "lines",
            "s",
            "Time since the last event, and from where on it is unusual for this installation. Time"
            " since the last probe, where probes run: they show that the way is open.",
            (
                Query(f"time() - {_LAST_EVENT}", "last event"),
                Query(_UNUSUAL, "unusual from here"),
                Query(f"time() - {recordings.LAST_PROBE}{{$installation}}", "last probe"),
            ),
            levels=(),
            alerts=("ClerkSyncSilent", "ClerkSyncProbeFailing"),
            colors={"unusual from here": PAGE, "last event": "green", "last probe": "blue"},
        ),
    ),
)
LATE: Final = Row(
    "How late",
    (
        Panel(
            "Age at commit",
            "lines",
            "s",
            "Time from the change in Clerk to the commit here, without probes and repetitions. Half"
            " of the events, nine in ten and 99 in a hundred were faster.",
            tuple(Query(quantile(q, _AGE), f"{q * 100:.0f} %") for q in (0.5, 0.9, 0.99)),
            levels=(Level(LATE_SECONDS, PAGE),),
            alerts=("ClerkSyncEventsLate",),
        ),
        Panel(
            "In time",
            "lines",
            "percentunit",
            "The share of events that were in the tables within so many seconds of the change in"
            f" Clerk. It pages when less than half are within {number(LATE_SECONDS)}.",
            (
                Query(
                    f"sum by (le) ({rate(f'{_AGE}_bucket', _STEPS)})"
                    f" / ignoring (le) group_left () (sum ({rate(f'{_AGE}_count')}) > 0)",
                    "within {{le}} s",
                ),
            ),
            alerts=("ClerkSyncEventsLate",),
            top=1,
        ),
        Panel(
            "Time to answer",
            "lines",
            "s",
            "From a request's headers to its answer. Clerk gives up after 15 seconds, clerk-sync"
            " before that.",
            tuple(
                Query(quantile(q, "clerk_sync_request_seconds"), f"{q * 100:.0f} %")
                for q in (0.5, 0.9, 0.99)
            ),
        ),
    ),
)
REJECTED: Final = Row(
    "Refused: an attack, or the wrong secret?",
    (
        Panel(
            "Refused requests",
            "stacked",
            "cpm",
            "Why requests were refused. `wrong` is another secret, `expired` a wrong clock,"
            " `instance` another Clerk application. The rest is what the internet sends to any"
            " URL.",
            (Query(a_minute("reason", rate("clerk_sync_rejected_total")), "{{reason}}"),),
            alerts=("ClerkSyncDeliveriesRejected", "ClerkSyncSignatureFailures"),
        ),
        Panel(
            "Signed: refused or accepted",
            "lines",
            "none",
            "Signed deliveries within 15 minutes. Both: somebody forges, or a second endpoint has"
            " another secret. Only refused ones: the secret, the clock or the instance is wrong.",
            (
                Query(within("15m", "clerk_sync_rejected_total", _REFUSED), "refused"),
                Query(within("15m", "clerk_sync_outcomes_total", _ACCEPTED), "accepted"),
            ),
            alerts=("ClerkSyncDeliveriesRejected", "ClerkSyncSignatureFailures"),
            colors={"refused": PAGE, "accepted": "green"},
        ),
    ),
)
DATABASE: Final = Row(
    "Database and group commit",
    (
        Panel(
            "Not ready, and why",
            "states",
            "none",
            "Red while a process takes no deliveries for this reason. `draining` is a shutdown.",
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
            "How long one transaction takes, COMMIT included. When it grows, the queue does.",
            tuple(
                Query(quantile(q, "clerk_sync_apply_seconds"), f"{q * 100:.0f} %")
                for q in (0.5, 0.9, 0.99)
            ),
        ),
        Panel(
            "Transactions",
            "lines",
            "cpm",
            "Transactions, those run again after a deadlock or a lock wait, and how many events"
            " share one: more when more arrive at a time.",
            (
                Query(a_minute("", rate("clerk_sync_batch_events_count")), "transactions"),
                Query(a_minute("", rate("clerk_sync_contention_retries_total")), "run again"),
                Query(
                    f"sum({rate('clerk_sync_batch_events_sum')})"
                    f" / (sum({rate('clerk_sync_batch_events_count')}) > 0)",
                    "events in one",
                    unit="none",
                ),
            ),
        ),
        Panel(
            "Queue",
            "lines",
            "percentunit",
            "How full each process' queue is. Beyond 100 %, deliveries are answered 503.",
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
            "Database connections: the writers' own, and those of the pool that everything else"
            " uses. A pool in full use makes readiness and housekeeping wait.",
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
            "Out of step at the last reconcile",
            "stacked",
            "none",
            "What it found, before it mended it: rows missing, of an older version, with other"
            " content, or of what Clerk has no more.",
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
            "Whether one runs now, and how the last one ended: in step, mended, not all mended,"
            " stopped by its breaker, or failed.",
            (
                Query("max(clerk_sync_lease_held{$selector})", "runs now"),
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
            "By how they were answered; `none` is no answer. `waiting` is how many waited at a time"
            " for Clerk's rate limit, or for our share of it.",
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
            "Counted once a minute. `clerk-sync quarantine list` tells which, and why.",
            (Query(f"max by ({BY}) (clerk_sync_quarantine_events{{$selector}})", "{{job}}"),),
            levels=(Level(thresholds.QUARANTINED_EVENTS + 1, TICKET),),
            alerts=("ClerkSyncQuarantineNotEmpty",),
        ),
        Panel(
            "Put into quarantine",
            "stacked",
            "cpm",
            "Why events could not be applied. Many at once are a mapping or a column that does not"
            " fit.",
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
            "Of one core. One process uses one: near 100 %, run more of them.",
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
            "Resident memory. It stays flat; what grows without end is a defect.",
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
            "Processes by version, and how often one of them started anew within an hour.",
            (
                Query(
                    "count by (version) (clerk_sync_build_info{$selector})", "version {{version}}"
                ),
                Query(
                    f"max({of_clerk_sync('changes(process_start_time_seconds{$selector}[1h])')})",
                    "starts of one",
                ),
            ),
            levels=(Level(thresholds.RESTARTS + 1, TICKET),),
            alerts=("ClerkSyncRestarting", "ClerkSyncAbsent"),
        ),
    ),
)

ROWS: Final = (HEALTH, ARRIVES, LATE, REJECTED, DATABASE, RECONCILE, QUARANTINE, PROCESS)
PANELS: Final = tuple(panel for row in ROWS for panel in row.panels)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, drawn across all panels. The value is a time, in milliseconds."""

    name: str
    expr: str
    text: str
    color: str


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
