"""Map what became of a delivery to the HTTP response that its sender gets.

The status decides what Svix does next: only a 2xx ends its retries, and a 4xx or 5xx is retried
for about 28 hours (https://docs.svix.com/retries).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from clerk_sync.outcomes import Outcome, Reason

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clerk_sync.outcomes import Answer

RETRY_AFTER_SECONDS: Final = "5"

# A rejection's response depends on its reason, every other on its outcome alone.
_RESPONSES: Final[Mapping[Outcome | Reason, tuple[int, Mapping[str, str]]]] = {
    Outcome.APPLIED: (200, {}),
    Outcome.STALE: (200, {}),
    Outcome.DUPLICATE: (200, {}),
    Outcome.IGNORED: (200, {}),
    Outcome.QUARANTINED: (200, {}),
    Reason.MISSING: (401, {}),
    Reason.MALFORMED: (401, {}),
    Reason.WRONG: (401, {}),
    Reason.EXPIRED: (401, {}),
    # Ends this message's retries: https://docs.svix.com/receiving/delivery-control
    Reason.INSTANCE: (403, {"webhook-delivery": "abort-message"}),
    Reason.PATH: (404, {}),
    Reason.METHOD: (405, {"Allow": "POST"}),
    Reason.TOO_LARGE: (413, {}),
    Outcome.ERROR: (500, {}),
    Outcome.UNAVAILABLE: (503, {"Retry-After": RETRY_AFTER_SECONDS}),
}


@dataclass(frozen=True, slots=True)
class Response:
    """A whole response. Its body is a short JSON object, which Clerk's dashboard shows."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@functools.cache  # there are some thirty
def response_to(answer: Answer) -> Response:
    """Return the response to a delivery with this outcome and reason."""
    outcome, reason = answer.outcome, answer.reason
    decided_by = reason if outcome is Outcome.REJECTED and reason is not None else outcome
    status, headers = _RESPONSES[decided_by]
    body = b'{"outcome": "%b"}' % outcome.encode()
    if reason is not None:
        body = b'{"outcome": "%b", "reason": "%b"}' % (outcome.encode(), reason.encode())
    return Response(status, {"Content-Type": "application/json", **headers}, body)
