"""Series that the alerts need to remember: no single scrape contains them."""

from __future__ import annotations

from typing import Final

from clerk_sync.clerk.catalog import PROBE
from monitoring.rules import INSTALLATION as BY
from monitoring.rules import Recording
from monitoring.thresholds import SILENCE_QUANTILE

INSTALLED: Final = f"group by ({BY}) (clerk_sync_build_info{{$selector}})"
# In a plain rules file, `process_start_time_seconds` matches every process.
LINE: Final = "\n"
_STARTED: Final = f"""min by ({BY}) (
    process_start_time_seconds{{$selector}}
    and on ({BY}, instance)
    clerk_sync_build_info{{$selector}}
  )"""

LAST_EVENT: Final = "job:clerk_sync_last_event_timestamp_seconds:max"
LAST_PROBE: Final = "job:clerk_sync_last_probe_timestamp_seconds:max"
PROBE_EXPECTED: Final = "job:clerk_sync_probe_expected:group"
GAP: Final = "job:clerk_sync_event_gap_seconds:max5m"
LONGEST_GAP: Final = "job:clerk_sync_event_gap_seconds:max1d"
USUAL_SILENCE: Final = "job:clerk_sync_event_gap_seconds:quantile4w"
COUNTS: Final = "job_kind:clerk_sync_clerk_entities:max"
COUNTS_MOVED: Final = "job:clerk_sync_counts_moved_timestamp_seconds:max"
RECONCILED: Final = "job:clerk_sync_reconcile_finished_timestamp_seconds:max"
DRIFT: Final = "job:clerk_sync_reconcile_drift_entities:sum"
DELIVERIES_RATE: Final = "job:clerk_sync_deliveries:rate5m"
DELIVERIES: Final = "job:clerk_sync_deliveries:increase1h"
FAILURES_RATE: Final = "job:clerk_sync_failures:rate5m"


def failures_ratio(window: str) -> str:
    """Return the name of the series with the share of deliveries that failed in this window."""
    return f"job:clerk_sync_failures:ratio_rate{window}"


def deliveries(what: str) -> str:
    """All deliveries that were Clerk's; `what` is such as `rate … [5m]`, around each counter."""
    function, _, window = what.partition(" ")
    return "\n+ ".join(
        f"sum by ({BY}) ({function}({counter}{window}))"
        for counter in (
            f'clerk_sync_outcomes_total{{type!="{PROBE}",$selector}}',
            "clerk_sync_unavailable_total{$selector}",
            "clerk_sync_errors_total{$selector}",
        )
    )


def failures(what: str) -> str:
    """Deliveries without effect at that attempt: answered 503 or 500, or quarantined."""
    function, _, window = what.partition(" ")
    return "\n+ ".join(
        f"sum by ({BY}) ({function}({counter}{{$selector}}{window}))"
        for counter in (
            "clerk_sync_unavailable_total",
            "clerk_sync_errors_total",
            "clerk_sync_quarantined_total",
        )
    )


RECORDINGS: Final = (
    Recording(
        LAST_EVENT,
        f"""\
(
  max by ({BY}) (
    clerk_sync_last_success_timestamp_seconds{{$selector}} > 0
    or
    last_over_time({LAST_EVENT}{{$selector}}[1d])
    or
    {_STARTED.replace(LINE, LINE + "  ")}
  )
)
and on ({BY}) clerk_sync_build_info{{$selector}}""",
        "The gauge is 0 after a restart. Before the first event, this is the start time.",
    ),
    Recording(
        GAP,
        f"{LAST_EVENT}{{$selector}} - ({LAST_EVENT}{{$selector}} offset 5m)",
        "A period without events, for five minutes after the event that ends it. An ongoing one is "
        "not included, so that it cannot raise its own limit.",
    ),
    Recording(
        LONGEST_GAP,
        f"max_over_time({GAP}{{$selector}}[1d])",
        "The longest period of a day.",
    ),
    Recording(
        USUAL_SILENCE,
        f"quantile_over_time({SILENCE_QUANTILE}, {LONGEST_GAP}{{$selector}}[4w:1d])",
        "The longest silence that is usual for this installation.",
    ),
    Recording(
        COUNTS,
        f"max by ({BY}, kind) (clerk_sync_clerk_entities{{$selector}} > 0)",
        "Clerk's count, from the replica that asked last. 0 means that it has not asked yet.",
    ),
    Recording(
        COUNTS_MOVED,
        f"""\
(
  (sum by ({BY}) (changes({COUNTS}{{$selector}}[10m])) > 0) * 0 + time()
  or
  last_over_time({COUNTS_MOVED}{{$selector}}[1d])
)
and on ({BY}) clerk_sync_build_info{{$selector}}""",
        "When Clerk's count last changed.",
    ),
    Recording(
        LAST_PROBE,
        f"""\
(
  (sum by ({BY}) (increase(clerk_sync_outcomes_total{{type="{PROBE}",$selector}}[5m])) > 0) * 0
  + time()
  or
  last_over_time({LAST_PROBE}{{$selector}}[1d])
  or
  {_STARTED}
)
and on ({BY}) clerk_sync_build_info{{$selector}}""",
        "When a probe last arrived. Before the first, this is the start time.",
    ),
    Recording(
        RECONCILED,
        f"max by ({BY}) (clerk_sync_reconcile_finished_timestamp_seconds{{$selector}} > 0)",
        "All replicas show the same run within a minute. 0 means that one has not read it yet.",
    ),
    Recording(
        DRIFT,
        f"""\
sum by ({BY}) (
  max by ({BY}, kind, drift) (
    clerk_sync_reconcile_drift_entities{{drift!="drifted",$selector}}
  )
)
and on ({BY}) {RECONCILED}{{$selector}}""",
        "Drift from missed events. Not `drifted`: some of Clerk's fields change without an event, "
        "and somebody may write to a mapped column.",
    ),
    Recording(
        DELIVERIES_RATE,
        deliveries("rate [5m]"),
        "All deliveries of the error budget, without probes.",
    ),
    Recording(FAILURES_RATE, failures("rate [5m]"), "Deliveries that use up the error budget."),
    Recording(
        DELIVERIES,
        deliveries("increase [1h]"),
        "The number of deliveries: a ratio of few says nothing.",
    ),
    Recording(
        failures_ratio("5m"),
        f"{FAILURES_RATE}{{$selector}} / ({DELIVERIES_RATE}{{$selector}} > 0)",
        "The share that failed.",
    ),
    *(
        Recording(
            failures_ratio(window),
            f"avg_over_time({FAILURES_RATE}{{$selector}}[{window}])\n"
            f"/ (avg_over_time({DELIVERIES_RATE}{{$selector}}[{window}]) > 0)",
            "The same over a longer window, from few series instead of many.",
        )
        for window in ("30m", "1h", "2h", "6h", "1d", "3d")
    ),
)
