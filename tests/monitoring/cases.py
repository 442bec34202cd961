"""For each alert, series that fire it and series that nearly do: what promtool is given.

A case lists every alert that fires at its moment, so that a near miss of one is no hit of
another.
"""

from __future__ import annotations

from typing import Final

from tests.monitoring.series import (
    DAY,
    HOUR,
    MINUTE,
    OTHER_POD,
    POD,
    WHERE,
    Case,
    Series,
    ages,
    counting,
    counts,
    drift,
    ended,
    every,
    failing,
    last_success,
    outcomes,
    probes,
    quarantined,
    queue,
    reconciled,
    rejected,
    stale,
    steady,
    unavailable,
    unready,
    until,
    within,
)

# A day with an event every 4 hours, the last of them at its end.
_QUIET: Final = last_success(every(4 * HOUR, last=DAY))
_ACTIVE: Final = last_success(every(MINUTE, last=99 * DAY))
_MOVED: Final = counts(until(DAY + 2 * HOUR, 100, 101))

CASES: Final = (
    Case(
        "ClerkSyncAbsent",
        "the one process is not scraped any more",
        [
            Series("clerk_sync_build_info", until(10 * MINUTE, 1, None), {"version": "1"}),
        ],
        25 * MINUTE,
        "No process of clerk-sync in shop has been scraped for 5 minutes. It is down, or Prometheus"
        " does not find it. Its state is unknown, and no other alert can fire.",
        here=False,
    ),
    Case(
        "ClerkSyncAbsent",
        "none was ever there",
        [],
        6 * MINUTE,
        "No process of  has been scraped for 5 minutes. It is down, or Prometheus"
        " does not find it. Its state is unknown, and no other alert can fire.",
        labels={},
        here=False,
    ),
    Case(
        "ClerkSyncAbsent",
        "one pod takes another's place",
        [
            Series("clerk_sync_build_info", until(10 * MINUTE, 1, None), {"version": "1"}),
            Series(
                "clerk_sync_build_info",
                until(12 * MINUTE, None, 1),
                {"version": "2"},
                target=OTHER_POD,
            ),
        ],
        30 * MINUTE,
        here=False,
    ),
    Case(
        "ClerkSyncNotReady",
        "no replica is ready",
        [
            Series("clerk_sync_ready", until(10 * MINUTE, 1, 0)),
            Series("clerk_sync_ready", steady(0), target=OTHER_POD),
        ],
        16 * MINUTE,
        "No process of clerk-sync in shop accepts deliveries. Clerk retries them for 28 hours;"
        " until then, users' changes do not reach the tables.",
    ),
    Case(
        "ClerkSyncNotReady",
        "one of two replicas is ready",
        [
            Series("clerk_sync_ready", steady(0)),
            Series("clerk_sync_ready", steady(1), target=OTHER_POD),
        ],
        30 * MINUTE,
    ),
    Case(
        "ClerkSyncNotReady",
        "a restart takes two minutes",
        [Series("clerk_sync_ready", within(10 * MINUTE, 12 * MINUTE, 0, 1))],
        12 * MINUTE,
    ),
    Case(
        "ClerkSyncSilent",
        "silent for longer than usual while Clerk's counts move",
        [_QUIET, _MOVED],
        DAY + 6 * HOUR,
        "clerk-sync in shop got its last event 6h 0m 0s ago. That is more than 1.25 times its usual"
        " longest silence. Since then, Clerk's counts changed, or a reconcile"
        " found drift.",
        step=5 * MINUTE,
    ),
    Case(
        "ClerkSyncSilent",
        "silent while a reconcile finds what was missed, over a restart",
        [
            last_success(lambda now: None if now >= DAY else every(4 * HOUR, last=DAY * 99)(now)),
            last_success(until(DAY, None, 0), OTHER_POD),
            Series("clerk_sync_build_info", until(DAY, 1, None), {"version": "1"}),
            Series("clerk_sync_build_info", until(DAY, None, 1), {"version": "1"}, OTHER_POD),
            Series("process_start_time_seconds", until(DAY, None, DAY), target=OTHER_POD),
            Series("clerk_sync_ready", until(DAY, None, 1), target=OTHER_POD),
            reconciled(until(DAY + 2 * HOUR, HOUR, DAY + 2 * HOUR)),
            drift("missing", until(DAY + 2 * HOUR, 0, 3)),
        ],
        DAY + 2 * HOUR + 10 * MINUTE,
        "clerk-sync in shop got its last event 6h 10m 0s ago. That is more than 1.25 times its"
        " usual longest silence. Since then, Clerk's counts changed, or a reconcile"
        " found drift.",
        step=5 * MINUTE,
    ),
    Case(
        "ClerkSyncSilent",
        "there never was an event, and Clerk's counts move",
        [last_success(steady(0)), counts(until(HOUR, 100, 101))],
        2 * HOUR,
        "clerk-sync in shop got its last event 1h 59m 59s ago. That is more than 1.25 times its"
        " usual longest silence. Since then, Clerk's counts changed, or a reconcile"
        " found drift.",
    ),
    Case(
        "ClerkSyncSilent",
        "as silent, but nothing happens in Clerk either",
        [_QUIET, counts(steady(100))],
        DAY + 8 * HOUR,
        step=5 * MINUTE,
    ),
    Case(
        "ClerkSyncSilent",
        "Clerk's counts moved with the last event and not after it",
        [_QUIET, counts(until(DAY + 5 * MINUTE, 100, 101))],
        DAY + 8 * HOUR,
        step=5 * MINUTE,
    ),
    Case(
        "ClerkSyncSilent",
        "Clerk's counts move, and the silence is of the usual length",
        [_QUIET, _MOVED],
        DAY + 4 * HOUR + 30 * MINUTE,
        step=5 * MINUTE,
    ),
    Case(
        "ClerkSyncSilent",
        "a process that starts has not counted yet",
        [
            last_success(steady(1)),
            counts(within(2 * HOUR, 2 * HOUR + 5 * MINUTE, 0, 100)),
        ],
        4 * HOUR,
    ),
    Case(
        "ClerkSyncProbeFailing",
        "a probe came every five minutes, and then none",
        [probes(counting(0.2, end=HOUR))],
        HOUR + 32 * MINUTE,
        "The last probe through the public URL reached clerk-sync in shop 28m 0s ago."
        " Clerk's events take the same path.",
    ),
    Case(
        "ClerkSyncProbeFailing",
        "one is expected, and none ever came",
        [
            probes(steady(0)),
            Series("job:clerk_sync_probe_expected:group", steady(1), target=WHERE),
        ],
        30 * MINUTE,
        "The last probe through the public URL reached clerk-sync in shop 29m 59s ago."
        " Clerk's events take the same path.",
    ),
    Case(
        "ClerkSyncProbeFailing",
        "somebody tried three probes by hand",
        [probes(counting(1, end=3 * MINUTE))],
        3 * HOUR,
    ),
    Case(
        "ClerkSyncProbeFailing",
        "two probes in a row were lost",
        [probes(counting(0.2, pause=(HOUR, HOUR + 16 * MINUTE)))],
        HOUR + 26 * MINUTE,
    ),
    Case(
        "ClerkSyncEventsLate",
        "most events are over a minute old",
        ages(in_time=counting(1), late=counting(3, start=10 * MINUTE)),
        60 * MINUTE,
        "75% of the events of the last 30 minutes were committed by clerk-sync in shop over 60"
        " seconds after they happened in Clerk.",
    ),
    Case(
        "ClerkSyncEventsLate",
        "a third of them is: retries of a trouble that is over",
        ages(in_time=counting(2), late=counting(1)),
        60 * MINUTE,
    ),
    Case(
        "ClerkSyncEventsLate",
        "all are, but they are few",
        ages(in_time=steady(0), late=counting(0.1)),
        60 * MINUTE,
    ),
    Case(
        "ClerkSyncDeliveriesRejected",
        "the secret is another one",
        [
            outcomes(counting(2, end=20 * MINUTE)),
            rejected("wrong", counting(0.5, start=20 * MINUTE)),
        ],
        45 * MINUTE,
        "clerk-sync in shop rejected 7.5 signed requests within 15 minutes, and accepted none."
        " `reason` of clerk_sync_rejected_total says why.",
    ),
    Case(
        "ClerkSyncDeliveriesRejected",
        "the secret is another one, and the probe's is the same as ours",
        [probes(counting(0.2)), rejected("wrong", counting(0.5, start=20 * MINUTE))],
        45 * MINUTE,
        "clerk-sync in shop rejected 7.5 signed requests within 15 minutes, and accepted none."
        " `reason` of clerk_sync_rejected_total says why.",
    ),
    Case(
        "ClerkSyncDeliveriesRejected",
        "as many are refused, and others are accepted",
        [outcomes(counting(0.2)), rejected("wrong", counting(0.5, start=20 * MINUTE))],
        45 * MINUTE,
    ),
    Case(
        "ClerkSyncDeliveriesRejected",
        "a scanner without a signature on a quiet night",
        [outcomes(steady(3)), rejected("missing", counting(0.5)), rejected("path", counting(9))],
        45 * MINUTE,
    ),
    Case(
        "ClerkSyncErrorBudgetBurnFast",
        "a tenth of the deliveries fails for an hour",
        failing(good=counting(9), bad=counting(1)),
        60 * MINUTE,
        "10% of the deliveries to clerk-sync in shop failed or went into quarantine, far above the"
        " 0.005 that is allowed.",
    ),
    Case(
        "ClerkSyncErrorBudgetBurnFast",
        "a mapping sends half of them into quarantine",
        [*failing(good=counting(10), bad=steady(0))[:3], quarantined(counting(5))],
        60 * MINUTE,
        "50% of the deliveries to clerk-sync in shop failed or went into quarantine, far above the"
        " 0.005 that is allowed.",
    ),
    Case(
        "ClerkSyncErrorBudgetBurnFast",
        "everything fails, on a quiet night",
        failing(good=steady(0), bad=counting(0.2)),
        60 * MINUTE,
    ),
    Case(
        "ClerkSyncErrorBudgetBurnFast",
        "everything failed, and it is over",
        failing(good=counting(10), bad=counting(10, start=20 * MINUTE, end=26 * MINUTE)),
        60 * MINUTE,
    ),
    Case(
        "ClerkSyncErrorBudgetBurnFast",
        "half an hour after an outage, one event fails on a quiet evening",
        [
            outcomes(counting(1)),
            unavailable(counting(3, start=20 * MINUTE, end=30 * MINUTE)),
            Series("clerk_sync_errors_total", steady(0)),
            quarantined(until(60 * MINUTE, 0, 1)),
        ],
        64 * MINUTE,
    ),
    Case(
        "ClerkSyncErrorBudgetBurnSlow",
        "one in fifty fails all day",
        failing(good=counting(0.98), bad=counting(0.02)),
        3 * HOUR,
        "2% of the deliveries to clerk-sync in shop failed or went into quarantine, above the 0.005"
        " that is allowed.",
    ),
    Case(
        "ClerkSyncErrorBudgetBurnSlow",
        "one in three hundred does",
        failing(good=counting(2.99), bad=counting(0.01)),
        3 * HOUR,
    ),
    Case(
        "ClerkSyncDatabaseUnreachable",
        "one replica does not reach it",
        [unready("database", until(10 * MINUTE, 0, 1)), unready("database", steady(0), OTHER_POD)],
        13 * MINUTE,
        "A process of clerk-sync in shop cannot reach its database, or the database accepts"
        " no writes.",
    ),
    Case(
        "ClerkSyncDatabaseUnreachable",
        "a failover takes a minute",
        [unready("database", within(10 * MINUTE, 11 * MINUTE, 1))],
        11 * MINUTE,
    ),
    Case(
        "ClerkSyncSchemaBehind",
        "a column is missing",
        [unready("schema", until(10 * MINUTE, 0, 1))],
        16 * MINUTE,
        "A process of clerk-sync in shop waits for a table or column: a migration did not run, or"
        " it was dropped or renamed.",
    ),
    Case(
        "ClerkSyncSchemaBehind",
        "a migration runs beside the start",
        [unready("schema", within(0, 4 * MINUTE, 1))],
        5 * MINUTE,
    ),
    Case(
        "ClerkSyncSecretStale",
        "a file was emptied",
        [stale("app_token", until(10 * MINUTE, 0, 1)), stale("signing_secret", steady(0))],
        16 * MINUTE,
        "A process of clerk-sync in shop cannot use the file of app_token. It continues with"
        " the last valid content, until it restarts or that secret is revoked.",
        labels={**WHERE, "secret": "app_token"},
    ),
    Case(
        "ClerkSyncSecretStale",
        "it was repaired in time",
        [stale("app_token", within(0, 4 * MINUTE, 1))],
        5 * MINUTE,
    ),
    Case(
        "ClerkSyncQuarantineNotEmpty",
        "two events wait",
        [Series("clerk_sync_quarantine_events", until(10 * MINUTE, 0, 2))],
        26 * MINUTE,
        "2 events of clerk-sync in shop are in quarantine. They were answered 200, so Clerk will"
        " not send them again: their users are out of sync.",
    ),
    Case(
        "ClerkSyncQuarantineNotEmpty",
        "they were replayed in time",
        [Series("clerk_sync_quarantine_events", within(10 * MINUTE, 20 * MINUTE, 2))],
        26 * MINUTE,
    ),
    Case(
        "ClerkSyncSignatureFailures",
        "forged requests among real ones",
        [outcomes(counting(1)), rejected("wrong", counting(4, start=60 * MINUTE))],
        90 * MINUTE,
        "clerk-sync in shop rejected 60 requests within 15 minutes for their signature, while"
        " Clerk's own events were accepted or none arrived. Somebody forges requests, or a second"
        " endpoint in Clerk has another secret.",
    ),
    Case(
        "ClerkSyncSignatureFailures",
        "unsigned requests when nothing else comes",
        [rejected("missing", counting(4, start=60 * MINUTE))],
        90 * MINUTE,
        "clerk-sync in shop rejected 60 requests within 15 minutes for their signature, while"
        " Clerk's own events were accepted or none arrived. Somebody forges requests, or a second"
        " endpoint in Clerk has another secret.",
    ),
    Case(
        "ClerkSyncSignatureFailures",
        "as many as there always were",
        [outcomes(counting(1)), rejected("missing", counting(4))],
        6 * HOUR,
        step=5 * MINUTE,
    ),
    Case(
        "ClerkSyncReconcileOld",
        "a daily reconcile has not run for over two days",
        [reconciled(every(DAY, last=3 * DAY))],
        5 * DAY + 2 * HOUR,
        "The last reconcile of clerk-sync in shop ended 2d 2h 0m 0s ago. It had run several times"
        " before. Missed webhooks are not found.",
        step=HOUR,
    ),
    Case(
        "ClerkSyncReconcileOld",
        "somebody ran one by hand, once",
        [reconciled(until(DAY, 0, DAY))],
        4 * DAY,
        step=HOUR,
    ),
    Case(
        "ClerkSyncReconcileOld",
        "one daily run was missed",
        [reconciled(every(DAY, last=3 * DAY))],
        5 * DAY - HOUR,
        step=HOUR,
    ),
    Case(
        "ClerkSyncReconcileFailing",
        "the last one failed",
        [reconciled(steady(1)), ended("failed", until(10 * MINUTE, 0, 1))],
        41 * MINUTE,
        "The last reconcile of clerk-sync in shop ended with the result failed.",
        labels={**WHERE, "result": "failed"},
    ),
    Case(
        "ClerkSyncReconcileFailing",
        "the second attempt, a quarter of an hour later, repaired all",
        [
            reconciled(steady(1)),
            ended("failed", within(10 * MINUTE, 26 * MINUTE, 1)),
            ended("mended", until(26 * MINUTE, 0, 1)),
        ],
        41 * MINUTE,
    ),
    Case(
        "ClerkSyncReconcileStopped",
        "the breaker tripped",
        [reconciled(steady(1)), ended("stopped", until(10 * MINUTE, 0, 1))],
        16 * MINUTE,
        "The last reconcile of clerk-sync in shop would have deleted too much of a table, and"
        " deleted nothing. Somebody has to decide whether the rows may go.",
    ),
    Case(
        "ClerkSyncReconcileStopped",
        "it repaired what it found",
        [reconciled(steady(1)), ended("mended", steady(1)), ended("stopped", steady(0))],
        30 * MINUTE,
    ),
    Case(
        "ClerkSyncDriftRecurring",
        "each of the daily runs found something missing",
        [
            _ACTIVE,
            reconciled(every(DAY, last=99 * DAY)),
            drift("missing", lambda now: 1 + now // DAY),
        ],
        5 * DAY,
        "For 3 days, every reconcile of clerk-sync in shop found at least 3 rows that were missing,"
        " outdated or not deleted. Events are being lost.",
        step=HOUR,
    ),
    Case(
        "ClerkSyncDriftRecurring",
        "one of them found nothing",
        [
            _ACTIVE,
            reconciled(every(DAY, last=99 * DAY)),
            drift("missing", lambda now: 0 if 3 * DAY <= now < 4 * DAY else 2),
        ],
        5 * DAY,
        step=HOUR,
    ),
    Case(
        "ClerkSyncDriftRecurring",
        "columns that Clerk changes without an event",
        [
            _ACTIVE,
            reconciled(every(DAY, last=99 * DAY)),
            drift("drifted", steady(7)),
            drift("missing", steady(0)),
        ],
        5 * DAY,
        step=HOUR,
    ),
    Case(
        "ClerkSyncDriftRecurring",
        "a busy one: a second's events are on their way whenever it looks",
        [
            _ACTIVE,
            *failing(good=counting(5 * MINUTE), bad=steady(0)),
            reconciled(every(6 * HOUR, last=99 * DAY)),
            drift("outdated", steady(5)),
        ],
        3 * DAY + 2 * HOUR,
        step=5 * MINUTE,
    ),
    Case(
        "ClerkSyncQueueNearLimit",
        "the queue stays full",
        queue(until(10 * MINUTE, 0, 950)),
        22 * MINUTE,
        "The queue of clerk-sync-0 (clerk-sync in shop) is 95% full. At its limit, deliveries"
        " are answered 503.",
        labels=POD,
    ),
    Case(
        "ClerkSyncQueueNearLimit",
        "a burst fills it for a moment",
        queue(within(10 * MINUTE, 12 * MINUTE, 1000)),
        16 * MINUTE,
    ),
    Case(
        "ClerkSyncRestarting",
        "it starts every ten minutes",
        [Series("process_start_time_seconds", lambda now: now // 600 * 600 + 1)],
        55 * MINUTE,
        "clerk-sync-0 (clerk-sync in shop) started 5 times within an hour.",
        labels=POD,
    ),
    Case(
        "ClerkSyncRestarting",
        "two restarts by hand",
        [Series("process_start_time_seconds", lambda now: min(now // 600, 2) * 600 + 1)],
        55 * MINUTE,
    ),
    Case(
        "ClerkSyncRestarting",
        "something else in the same Prometheus restarts",
        [
            Series(
                "process_start_time_seconds",
                lambda now: now // 600 * 600 + 1,
                target={"namespace": "shop", "job": "shop", "instance": "10.0.0.9:80"},
            )
        ],
        55 * MINUTE,
    ),
    Case(
        "ClerkSyncInternalErrors",
        "one 500",
        [Series("clerk_sync_errors_total", until(10 * MINUTE, 0, 1))],
        15 * MINUTE,
        "clerk-sync in shop answered 1 deliveries with 500 within 15 minutes. Its log has the"
        " tracebacks.",
    ),
    Case(
        "ClerkSyncInternalErrors",
        "the process that answered 500 is restarted, and counts from 0",
        [Series("clerk_sync_errors_total", until(10 * MINUTE, 5, 0))],
        15 * MINUTE,
    ),
)
