"""The time, in the two forms in which it is stored."""

from __future__ import annotations

import time
from datetime import UTC, datetime


def now_ms() -> int:
    """Milliseconds since 1970, as Clerk's timestamps."""
    return time.time_ns() // 1_000_000


def now_utc() -> datetime:
    """The time in UTC, without a time zone, as the database's columns."""
    return datetime.now(UTC).replace(tzinfo=None)
