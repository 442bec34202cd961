"""The rows about Clerk's deliveries and their outcomes."""

from __future__ import annotations

from typing import Final

from clerk_sync.clerk.catalog import PROBE
from monitoring import recordings, thresholds
from monitoring.panel import (
    PAGE,
    TICKET,
    Level,
    Panel,
    Query,
    Row,
    a_minute,
    quantile,
    rate,
    within,
)
from monitoring.rules import INSTALLATION as BY
from monitoring.rules import number
from monitoring.thresholds import LATE_SECONDS

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
            "Accepts deliveries",
            "stat",
            "none",
            "Whether any process accepts deliveries. While none does, Clerk retries them for 28"
            " hours.",
            (Query(f"min(max by ({BY}) (clerk_sync_ready{{$selector}}))", "ready"),),
            alerts=("ClerkSyncNotReady", "ClerkSyncAbsent"),
            empty="ABSENT",
            texts={0: ("NO", PAGE), 1: ("yes", "green")},
        ),
        Panel(
            "Silence",
            "stat",
            "s",
            "Time since Clerk's last event, absolute and relative to the longest silence that is"
            " usual here. Above 100 %, it pages if Clerk's data has changed since.",
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
            f"The share of the last 30 minutes' events that were committed more than"
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
            "The share of the last hour's deliveries that had no effect: answered 503 or 500, or"
            " quarantined. Clerk retries those answered 503.",
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
            "Events that could not be applied and that a person has to handle. Clerk does not retry"
            " them.",
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
            "Time since the last reconcile ended, in whichever process.",
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
            "Firing alerts",
            "table",
            "none",
            "Alerts that are firing now. Each name links to its runbook. Needs the alert rules from"
            " the chart or from docs/alerts.yaml.",
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
    "Deliveries and outcomes",
    (
        Panel(
            "Requests",
            "stacked",
            "cpm",
            "Requests by outcome. `applied` changed the tables. `stale`, `duplicate` and `ignored`"
            " are normal. The line shows all requests received.",
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
            "Events by Clerk's type. Types that clerk-sync does not know are `other`; its own"
            f" probes are `{PROBE}`.",
            (Query(f"{a_minute('type', rate('clerk_sync_outcomes_total'))} > 0", "{{type}}"),),
        ),
        Panel(
            "Failed deliveries by cause",
            "stacked",
            "cpm",
            "Deliveries answered 503, by reason, which Clerk retries, and those answered 500, which"
            " are a defect. `unread` requests were not verified, so anyone may have sent them.",
            (
                Query(a_minute("reason", rate("clerk_sync_unavailable_total")), "503 {{reason}}"),
                Query(a_minute("", rate("clerk_sync_unread_total")), "503 unread"),
                Query(a_minute("", rate("clerk_sync_errors_total")), "500"),
            ),
            alerts=(
                "ClerkSyncErrorBudgetBurnFast",
                "ClerkSyncErrorBudgetBurnSlow",
                "ClerkSyncInternalErrors",
            ),
            colors={
                "503 database": PAGE,
                "503 schema": TICKET,
                "503 queue_full": "purple",
                "503 deadline": "yellow",
                "503 draining": "blue",
                "503 unread": "gray",
                "500": "dark-red",
            },
        ),
        Panel(
            "Silence and probes",
            "lines",
            "s",
            "Time since the last event, and the limit above which it is unusual here. Time since"
            " the last probe, if probes run: they show that the public URL works.",
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
    "Latency",
    (
        Panel(
            "Age at commit",
            "lines",
            "s",
            "Time from the change in Clerk to the commit here, without probes and duplicates, at"
            " the 50th, 90th and 99th percentile.",
            tuple(Query(quantile(q, _AGE), f"{q * 100:.0f} %") for q in (0.5, 0.9, 0.99)),
            levels=(Level(LATE_SECONDS, PAGE),),
            alerts=("ClerkSyncEventsLate",),
        ),
        Panel(
            "On time",
            "lines",
            "percentunit",
            "The share of events committed within these numbers of seconds of the change in Clerk."
            f" It pages when fewer than half are within {number(LATE_SECONDS)}.",
            (
                Query(
                    # Prometheus extrapolates the two rates separately, so a share may exceed 1.
                    f"clamp_max(sum by (le) ({rate(f'{_AGE}_bucket', _STEPS)})"
                    f" / ignoring (le) group_left () (sum ({rate(f'{_AGE}_count')}) > 0), 1)",
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
    "Rejected: an attack, or the wrong secret?",
    (
        Panel(
            "Rejected requests",
            "stacked",
            "cpm",
            "Why requests were rejected. `wrong`: another secret. `expired`: a wrong clock."
            " `instance`: another Clerk instance. The rest is what the internet sends to any URL.",
            (Query(a_minute("reason", rate("clerk_sync_rejected_total")), "{{reason}}"),),
            alerts=("ClerkSyncDeliveriesRejected", "ClerkSyncSignatureFailures"),
            colors={
                "wrong": PAGE,
                "expired": TICKET,
                "instance": "purple",
                "missing": "blue",
                "malformed": "light-blue",
                "too_large": "yellow",
                "method": "#808080",
                "path": "#606060",
            },
        ),
        Panel(
            "Signed: rejected or accepted",
            "lines",
            "none",
            "Signed requests within 15 minutes. Both: somebody forges requests, or a second"
            " endpoint has another secret. Only rejected: the secret, the clock or"
            " the instance is wrong.",
            (
                Query(within("15m", "clerk_sync_rejected_total", _REFUSED), "rejected"),
                Query(within("15m", "clerk_sync_outcomes_total", _ACCEPTED), "accepted"),
            ),
            alerts=("ClerkSyncDeliveriesRejected", "ClerkSyncSignatureFailures"),
            colors={"rejected": PAGE, "accepted": "green"},
        ),
    ),
)
