"""Name what became of a delivery, of a comparison with Clerk, and of a run, and why.

One closed vocabulary: responses, metrics, logs and tables use these words and no others.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Outcome(StrEnum):
    """What became of one delivery."""

    APPLIED = "applied"
    STALE = "stale"
    DUPLICATE = "duplicate"
    IGNORED = "ignored"
    QUARANTINED = "quarantined"
    REJECTED = "rejected"
    UNAVAILABLE = "unavailable"
    ERROR = "error"


class Reason(StrEnum):
    """Why it was not simply applied."""

    # rejected: the signature
    MISSING = "missing"
    MALFORMED = "malformed"
    WRONG = "wrong"
    EXPIRED = "expired"
    # rejected: the request
    INSTANCE = "instance"
    TOO_LARGE = "too_large"
    METHOD = "method"
    PATH = "path"
    # quarantined: the event itself
    BAD_JSON = "bad_json"
    BAD_ENVELOPE = "bad_envelope"
    BAD_ID = "bad_id"
    BAD_VERSION = "bad_version"
    # quarantined: its values and the table
    BAD_EXPRESSION = "bad_expression"
    TOO_LONG = "too_long"
    WRONG_TYPE = "wrong_type"
    OUT_OF_RANGE = "out_of_range"
    NOT_NULL = "not_null"
    CONFLICT = "conflict"
    REFUSED = "refused"
    # unavailable: the sender shall try again
    QUEUE_FULL = "queue_full"
    DATABASE = "database"
    SCHEMA = "schema"
    DEADLINE = "deadline"
    DRAINING = "draining"
    # error: a defect of ours
    INTERNAL = "internal"


REJECTIONS: Final = (
    Reason.MISSING,
    Reason.MALFORMED,
    Reason.WRONG,
    Reason.EXPIRED,
    Reason.INSTANCE,
    Reason.TOO_LARGE,
    Reason.METHOD,
    Reason.PATH,
)
QUARANTINES: Final = (
    Reason.BAD_JSON,
    Reason.BAD_ENVELOPE,
    Reason.BAD_ID,
    Reason.BAD_VERSION,
    Reason.BAD_EXPRESSION,
    Reason.TOO_LONG,
    Reason.WRONG_TYPE,
    Reason.OUT_OF_RANGE,
    Reason.NOT_NULL,
    Reason.CONFLICT,
    Reason.REFUSED,
)
UNAVAILABILITIES: Final = (
    Reason.QUEUE_FULL,
    Reason.DATABASE,
    Reason.SCHEMA,
    Reason.DEADLINE,
    Reason.DRAINING,
)

# Why a process takes no deliveries at all.
UNREADINESSES: Final = (Reason.DATABASE, Reason.SCHEMA, Reason.DRAINING)


class Verdict(StrEnum):
    """The result of comparing an object in Clerk with its row."""

    SAME = "same"
    # In sync by the state: the row is newer than what was read, or was deleted.
    NEWER = "newer"
    MISSING = "missing"
    OUTDATED = "outdated"
    # The versions agree, or ours is ahead of Clerk's for no reason; the content does not.
    DRIFTED = "drifted"
    # The row exists, although its entity or an owner of it is deleted.
    DELETED = "deleted"
    # A value is invalid for its column.
    UNFIT = "unfit"


DRIFTS: Final = (Verdict.MISSING, Verdict.OUTDATED, Verdict.DRIFTED, Verdict.DELETED)


class Ending(StrEnum):
    """How a backfill or a reconcile ended."""

    IN_STEP = "in_step"
    # There was drift, and it was repaired.
    MENDED = "mended"
    # Some of it could not be repaired.
    UNMENDED = "unmended"
    # The deletion guard stopped it.
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Answer:
    """One delivery's outcome, with the reason where there is one."""

    outcome: Outcome
    reason: Reason | None = None
