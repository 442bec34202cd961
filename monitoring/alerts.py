"""Every alert, once. Symptoms page, causes open a ticket.

Each has a runbook of its name in docs/runbooks. `make generate` writes the chart's rules and the
plain file from this list.
"""

from __future__ import annotations

from typing import Final

from clerk_sync.clerk.catalog import PROBE
from monitoring import recordings, thresholds
from monitoring.recordings import failures_ratio
from monitoring.rules import INSTALLATION as BY
from monitoring.rules import Alert, number
from monitoring.thresholds import BURN_EVENTS, BURN_FAILURES, BURN_PAGE, BURN_TICKET

RUNBOOKS: Final = "https://github.com/clerk-sync/clerk-sync/blob/main/docs/runbooks"
WHERE: Final = "{{ $labels.job }}{{ with $labels.namespace }} in {{ . }}{{ end }}"
_ACCEPTED: Final = f"""sum by ({BY}) (
  increase(clerk_sync_outcomes_total{{type!="{PROBE}",$selector}}[15m])
)"""
_SIGNED: Final = f"""sum by ({BY}) (
  increase(clerk_sync_rejected_total{{reason=~"wrong|expired|instance",$selector}}[15m])
)"""
_UNVERIFIED: Final = (
    'clerk_sync_rejected_total{reason=~"missing|malformed|wrong|expired",$selector}'
)

_SECONDS: Final = {
    "5m": 5 * thresholds.MINUTE,
    "30m": 30 * thresholds.MINUTE,
    "2h": 2 * thresholds.HOUR,
    "6h": 6 * thresholds.HOUR,
}


def burning(windows: tuple[tuple[str, str, float], ...]) -> str:
    """A short and a long window both burn, and both have enough events to judge by."""
    failed = {"5m": f"{recordings.FAILURES_RATE}{{$selector}}"} | {
        window: f"avg_over_time({recordings.FAILURES_RATE}{{$selector}}[{window}])"
        for window in ("30m", "2h", "6h")
    }
    counted = {"1h": f"{recordings.DELIVERIES}{{$selector}}"} | {
        window: f"sum_over_time({recordings.DELIVERIES}{{$selector}}[{window}:1h])"
        for window in ("6h", "1d", "3d")
    }
    return "\nor\n".join(
        f"""\
(
  {failures_ratio(short)}{{$selector}} > {number(factor)} * $threshold
  and on ({BY}) {failures_ratio(long)}{{$selector}} > {number(factor)} * $threshold
  and on ({BY}) {counted[long]} >= {BURN_EVENTS}
  and on ({BY}) {failed[short]} * seconds({number(_SECONDS[short])}) >= {BURN_FAILURES}
)"""
        for short, long, factor in windows
    )


ALERTS: Final = (
    Alert(
        "ClerkSyncAbsent",
        "critical",
        "5m",
        f"""\
(
  group by ({BY}) (last_over_time(clerk_sync_build_info{{$selector}}[1d]))
  unless on ({BY}) clerk_sync_build_info{{$selector}}
)
or on () absent(clerk_sync_build_info{{$selector}})""",
        "Prometheus scrapes no process of clerk-sync.",
        f"No process of {WHERE} has been scraped for 5 minutes. It is down, or Prometheus does not"
        " find it. Its state is unknown, and no other alert can fire.",
    ),
    Alert(
        "ClerkSyncNotReady",
        "critical",
        "5m",
        f"max by ({BY}) (clerk_sync_ready{{$selector}}) == 0",
        "clerk-sync is not ready: it accepts no deliveries.",
        f"No process of {WHERE} accepts deliveries. Clerk retries them for 28 hours; until then,"
        " users' changes do not reach the tables.",
    ),
    Alert(
        "ClerkSyncSilent",
        "critical",
        "5m",
        f"""\
time() - {recordings.LAST_EVENT}{{$selector}}
> clamp_min(
  $threshold * (
    {recordings.USUAL_SILENCE}{{$selector}}
    or {recordings.LAST_EVENT}{{$selector}} * 0
  ),
  seconds({number(thresholds.SILENCE_FLOOR_SECONDS)})
)
and on ({BY}) (
  {recordings.COUNTS_MOVED}{{$selector}}
  > {recordings.LAST_EVENT}{{$selector}} + seconds({number(thresholds.COUNTS_LAG_SECONDS)})
  or
  (
    {recordings.DRIFT}{{$selector}} > 0
    and on ({BY})
    {recordings.RECONCILED}{{$selector}}
    > {recordings.LAST_EVENT}{{$selector}}
  )
)""",
        "Clerk's events no longer arrive, although Clerk's data changes.",
        f"{WHERE} got its last event {{{{ $value | humanizeDuration }}}} ago. That is more than"
        " $threshold times its usual longest silence. Since then, Clerk's counts changed, or a"
        " reconcile found drift.",
        threshold=thresholds.SILENCE_FACTOR,
    ),
    Alert(
        "ClerkSyncProbeFailing",
        "critical",
        "5m",
        f"""\
time() - {recordings.LAST_PROBE}{{$selector}} > $threshold
and on ({BY}) (
  sum by ({BY}) (increase(clerk_sync_outcomes_total{{type="{PROBE}",$selector}}[1d]))
  >= {thresholds.PROBES_A_DAY}
  or
  {recordings.PROBE_EXPECTED}{{$selector}}
)""",
        "Probes no longer reach clerk-sync.",
        f"The last probe through the public URL reached {WHERE}"
        " {{ $value | humanizeDuration }} ago. Clerk's events take the same path.",
        threshold=thresholds.PROBE_SECONDS,
        seconds=True,
    ),
    Alert(
        "ClerkSyncEventsLate",
        "critical",
        "10m",
        f"""\
1 - (
  sum by ({BY}) (
    increase(clerk_sync_event_age_seconds_bucket{{le="{thresholds.LATE_SECONDS}",$selector}}[30m])
  )
  / sum by ({BY}) (increase(clerk_sync_event_age_seconds_count{{$selector}}[30m]))
) > $threshold
and on ({BY})
  sum by ({BY}) (increase(clerk_sync_event_age_seconds_count{{$selector}}[30m]))
  >= {thresholds.LATE_EVENTS}""",
        f"Clerk's events arrive more than {number(thresholds.LATE_SECONDS)} seconds late.",
        "{{ $value | humanizePercentage }} of the events of the last 30 minutes were committed by"
        f" {WHERE} over {number(thresholds.LATE_SECONDS)} seconds after they happened in Clerk.",
        threshold=thresholds.LATE_SHARE,
    ),
    Alert(
        "ClerkSyncDeliveriesRejected",
        "critical",
        "5m",
        f"""\
{_SIGNED} >= $threshold
unless on ({BY}) {_ACCEPTED} > 0""",
        "clerk-sync rejects every delivery: wrong secret, clock or instance.",
        f"{WHERE} rejected {{{{ $value | humanize }}}} signed requests within 15 minutes, and"
        " accepted none. `reason` of clerk_sync_rejected_total says why.",
        threshold=thresholds.REJECTED_DELIVERIES,
    ),
    Alert(
        "ClerkSyncErrorBudgetBurnFast",
        "critical",
        "2m",
        burning(BURN_PAGE),
        "Many of Clerk's deliveries fail.",
        "{{ $value | humanizePercentage }} of the deliveries to "
        f"{WHERE} failed or went into quarantine, far above the $threshold that is allowed.",
        threshold=thresholds.ERROR_BUDGET,
    ),
    Alert(
        "ClerkSyncErrorBudgetBurnSlow",
        "warning",
        "15m",
        burning(BURN_TICKET),
        "Some of Clerk's deliveries keep failing.",
        "{{ $value | humanizePercentage }} of the deliveries to "
        f"{WHERE} failed or went into quarantine, above the $threshold that is allowed.",
        threshold=thresholds.ERROR_BUDGET,
    ),
    Alert(
        "ClerkSyncDatabaseUnreachable",
        "warning",
        "2m",
        f'max by ({BY}) (clerk_sync_unready{{reason="database",$selector}}) == 1',
        "clerk-sync cannot write to its database.",
        f"A process of {WHERE} cannot reach its database, or the database accepts no writes.",
    ),
    Alert(
        "ClerkSyncSchemaBehind",
        "warning",
        "5m",
        f'max by ({BY}) (clerk_sync_unready{{reason="schema",$selector}}) == 1',
        "The database lacks a table or column that clerk-sync needs.",
        f"A process of {WHERE} waits for a table or column: a migration did not run, or it was"
        " dropped or renamed.",
    ),
    Alert(
        "ClerkSyncSecretStale",
        "warning",
        "5m",
        f"max by ({BY}, secret) (clerk_sync_secret_stale{{$selector}}) == 1",
        "A secret's file is gone, empty or invalid.",
        f"A process of {WHERE} cannot use the file of {{{{ $labels.secret }}}}. It continues with"
        " the last valid content, until it restarts or that secret is revoked.",
    ),
    Alert(
        "ClerkSyncQuarantineNotEmpty",
        "warning",
        "15m",
        f"max by ({BY}) (clerk_sync_quarantine_events{{$selector}}) > $threshold",
        "Events in quarantine need attention.",
        f"{{{{ $value }}}} events of {WHERE} are in quarantine. They were answered 200, so Clerk"
        " will not send them again: their users are out of sync.",
        threshold=thresholds.QUARANTINED_EVENTS,
    ),
    Alert(
        "ClerkSyncSignatureFailures",
        "warning",
        "15m",
        f"""\
(
  sum by ({BY}) (
    increase({_UNVERIFIED}[15m])
  )
  > $threshold + {thresholds.SIGNATURE_FAILURES_FACTOR} * (
    sum by ({BY}) (
      increase({_UNVERIFIED}[1d] offset 15m)
    ) / 96
    or sum by ({BY}) ({_UNVERIFIED}) * 0
  )
)
unless on ({BY}) (
  {_SIGNED} >= {thresholds.REJECTED_DELIVERIES}
  unless on ({BY}) {_ACCEPTED} > 0
)""",
        "Far more requests than usual have no valid signature.",
        f"{WHERE} rejected {{{{ $value | humanize }}}} requests within 15 minutes for their"
        " signature, while Clerk's own events were accepted or none arrived. Somebody forges"
        " requests, or a second endpoint in Clerk has another secret.",
        threshold=thresholds.SIGNATURE_FAILURES,
    ),
    Alert(
        "ClerkSyncReconcileOld",
        "warning",
        "15m",
        f"""\
time() - {recordings.RECONCILED}{{$selector}} > $threshold
and on ({BY}) changes({recordings.RECONCILED}{{$selector}}[4w]) >= 2""",
        "clerk-sync no longer reconciles.",
        f"The last reconcile of {WHERE} ended {{{{ $value | humanizeDuration }}}} ago. It had run"
        " several times before. Missed webhooks are not found.",
        threshold=thresholds.RECONCILE_SECONDS,
        seconds=True,
    ),
    Alert(
        "ClerkSyncReconcileFailing",
        "warning",
        "30m",
        f"""\
max by ({BY}, result) (clerk_sync_reconcile_result{{result=~"failed|unmended",$selector}}) == 1""",
        "The last reconcile failed, or could not repair everything.",
        f"The last reconcile of {WHERE} ended with the result {{{{ $labels.result }}}}.",
    ),
    Alert(
        "ClerkSyncReconcileStopped",
        "warning",
        "5m",
        f"""\
max by ({BY}) (clerk_sync_reconcile_result{{result="stopped",$selector}}) == 1""",
        "The deletion guard stopped a reconcile: it would have deleted too much.",
        f"The last reconcile of {WHERE} would have deleted too much of a table, and deleted"
        " nothing. Somebody has to decide whether the rows may go.",
    ),
    Alert(
        "ClerkSyncDriftRecurring",
        "warning",
        "15m",
        f"""\
min_over_time({recordings.DRIFT}{{$selector}}[3d])
> $threshold + {thresholds.IN_FLIGHT_SECONDS} * (
  avg_over_time({recordings.DELIVERIES_RATE}{{$selector}}[3d])
  or {recordings.DRIFT}{{$selector}} * 0
)
and on ({BY}) changes({recordings.RECONCILED}{{$selector}}[3d]) >= 2""",
        "Every reconcile finds drift.",
        f"For 3 days, every reconcile of {WHERE} found at least {{{{ $value }}}} rows that were"
        " missing, outdated or not deleted. Events are being lost.",
        threshold=thresholds.DRIFT_ENTITIES,
    ),
    Alert(
        "ClerkSyncQueueNearLimit",
        "warning",
        "5m",
        """\
avg_over_time(clerk_sync_queue_depth{$selector}[5m])
/ avg_over_time(clerk_sync_queue_limit{$selector}[5m])
> $threshold""",
        "Events arrive faster than the database commits them.",
        f"The queue of {{{{ or $labels.pod $labels.instance }}}} ({WHERE}) is"
        " {{ $value | humanizePercentage }} full. At its limit, deliveries are answered 503.",
        threshold=thresholds.QUEUE_SHARE,
    ),
    Alert(
        "ClerkSyncRestarting",
        "warning",
        "0s",
        f"""\
changes(process_start_time_seconds{{$selector}}[1h]) > $threshold
and on ({BY}, instance) last_over_time(clerk_sync_build_info{{$selector}}[1h])""",
        "A process of clerk-sync keeps restarting.",
        f"{{{{ or $labels.pod $labels.instance }}}} ({WHERE}) started {{{{ $value }}}} times within"
        " an hour.",
        threshold=thresholds.RESTARTS,
    ),
    Alert(
        "ClerkSyncInternalErrors",
        "warning",
        "0s",
        f"sum by ({BY}) (increase(clerk_sync_errors_total{{$selector}}[15m])) > $threshold",
        "clerk-sync has a defect: it answered 500.",
        f"{WHERE} answered {{{{ $value | humanize }}}} deliveries with 500 within 15 minutes. Its"
        " log has the tracebacks.",
        threshold=thresholds.INTERNAL_ERRORS,
    ),
)
