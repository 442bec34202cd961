"""What became of a delivery, why, and what the sender is told; and of a comparison with Clerk.

One closed vocabulary: these words are the answer's body, the metric labels and the log
fields. The statuses decide what Svix does next: only a 2xx ends its retries, and a 4xx or
5xx is retried for about 28 hours (https://docs.svix.com/retries).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

RETRY_AFTER_SECONDS: Final = "5"


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
    """How an object in Clerk and its row stand to each other."""

    SAME = "same"
    # In step by what is known here: the row is newer than what was read, or was deleted.
    NEWER = "newer"
    MISSING = "missing"
    OUTDATED = "outdated"
    # The versions agree, or ours is ahead of Clerk's for no reason; the content does not.
    DRIFTED = "drifted"
    # The row is there, although it or what it belongs to is deleted.
    DELETED = "deleted"
    # The values do not fit the columns.
    UNFIT = "unfit"


DRIFTS: Final = (Verdict.MISSING, Verdict.OUTDATED, Verdict.DRIFTED, Verdict.DELETED)


class Ending(StrEnum):
    """How a backfill or a reconcile ended."""

    IN_STEP = "in_step"
    # There was drift, and it is gone.
    MENDED = "mended"
    # Some of it could not be.
    UNMENDED = "unmended"
    # The breaker kept it from deleting.
    STOPPED = "stopped"
    FAILED = "failed"


STATUS: Final[dict[Outcome | Reason, int]] = {
    Outcome.APPLIED: 200,
    Outcome.STALE: 200,
    Outcome.DUPLICATE: 200,
    Outcome.IGNORED: 200,
    Outcome.QUARANTINED: 200,
    Outcome.UNAVAILABLE: 503,
    Outcome.ERROR: 500,
    Reason.MISSING: 401,
    Reason.MALFORMED: 401,
    Reason.WRONG: 401,
    Reason.EXPIRED: 401,
    Reason.INSTANCE: 403,
    Reason.TOO_LARGE: 413,
    Reason.METHOD: 405,
    Reason.PATH: 404,
}


@dataclass(frozen=True, slots=True)
class Answer:
    """One delivery's outcome, with the reason where there is one."""

    outcome: Outcome
    reason: Reason | None = None

    @property
    def status(self) -> int:
        """The HTTP status: by the reason where that is a rejection, else by the outcome."""
        if self.outcome is Outcome.REJECTED and self.reason is not None:
            return STATUS[self.reason]
        return STATUS[self.outcome]

    @property
    def body(self) -> bytes:
        """A short JSON object; Svix keeps it and shows it in Clerk's dashboard."""
        if self.reason is None:
            return b'{"outcome": "%b"}' % self.outcome.encode()
        return b'{"outcome": "%b", "reason": "%b"}' % (self.outcome.encode(), self.reason.encode())

    @property
    def headers(self) -> dict[str, str]:
        """`Retry-After` where a retry helps; Svix's stop header where it never will."""
        headers = {"Content-Type": "application/json"}
        if self.outcome is Outcome.UNAVAILABLE:
            headers["Retry-After"] = RETRY_AFTER_SECONDS
        elif self.reason is Reason.INSTANCE:
            # https://docs.svix.com/receiving/delivery-control: ends this message's retries.
            headers["webhook-delivery"] = "abort-message"
        elif self.reason is Reason.METHOD:
            headers["Allow"] = "POST"
        return headers
