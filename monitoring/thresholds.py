"""The limits that alerts and dashboard share: what is red on the one pages by the other.

Each is the default of an alert's `threshold`, which the chart's values can tune.
"""

from __future__ import annotations

from typing import Final

MINUTE: Final = 60.0
HOUR: Final = 60 * MINUTE
DAY: Final = 24 * HOUR

# An event that commits later than this after Clerk's change is late. A bucket of
# clerk_sync_event_age_seconds has to end here.
LATE_SECONDS: Final = 60.0
# So much of what came may be late before it is a symptom, from so many events on.
LATE_SHARE: Final = 0.5
LATE_EVENTS: Final = 5

# Of 1000 deliveries, 995 have their effect at the first attempt.
ERROR_BUDGET: Final = 0.005
# Fewer deliveries than this in a window say nothing about a rate.
BURN_EVENTS: Final = 20
# Nor is one failed event, with its repetitions, a trouble that goes on.
BURN_FAILURES: Final = 3
# https://sre.google/workbook/alerting-on-slos/: 2 % of a month's budget in 1 h, 5 % in 6 h,
# 10 % in a day, and what would use it up exactly.
BURN_PAGE: Final = (("5m", "1h", 14.4), ("30m", "6h", 6.0))
BURN_TICKET: Final = (("2h", "1d", 3.0), ("6h", "3d", 1.0))

# Silence is judged by the installation's own: this much longer than its usual longest stretch.
SILENCE_FACTOR: Final = 1.25
# The stretch that nine days in ten do not exceed, over four weeks. So a weekend counts as usual,
# and one outage does not.
SILENCE_QUANTILE: Final = 0.9
# A busy installation has no stretches to speak of. Shorter silence than this is never reported.
SILENCE_FLOOR_SECONDS: Final = 1 * HOUR
# Clerk's counts are asked for every 5 minutes and seen as moved for 10: within that time of an
# event, it is the event that moved them.
COUNTS_LAG_SECONDS: Final = 20 * MINUTE

# The chart's probe runs every 5 minutes.
PROBE_SECONDS: Final = 20 * MINUTE
# Somebody who tries the command a few times has no schedule.
PROBES_A_DAY: Final = 6

REJECTED_DELIVERIES: Final = 3
# More refused signatures than this in a quarter of an hour, on top of what is usual here.
SIGNATURE_FAILURES: Final = 20
SIGNATURE_FAILURES_FACTOR: Final = 4

QUARANTINED_EVENTS: Final = 0
QUEUE_SHARE: Final = 0.8
INTERNAL_ERRORS: Final = 0
RESTARTS: Final = 2

# Two runs of a daily reconcile.
RECONCILE_SECONDS: Final = 2 * DAY
DRIFT_ENTITIES: Final = 0
# What changes while a reconcile looks is on its way: so much of the usual traffic is no drift.
IN_FLIGHT_SECONDS: Final = 10
