"""Verify a signed POST: it becomes a Delivery, or raises InvalidSignature.

`standardwebhooks` computes the signature over the raw bytes, as it does for Svix's own library.
Only its `sign` is used. Its `verify` raises plain ValueErrors on hostile headers, reads timestamps
such as "1_0.5" with float(), stops at the first malformed signature although a good one follows,
and accepts no clock. The checks here are stricter, and whatever `sign` raises is a rejection.
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from standardwebhooks import Webhook

from clerk_sync.outcomes import Reason

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TOLERANCE_SECONDS: Final = 300
# Svix's message ids are short; the ledger's key column holds 255. The specification forbids
# the dot, which separates the parts of what is signed: with it, one signature would fit two
# different (id, timestamp, body) triples.
_ID: Final = re.compile(r"[\x21-\x2d\x2f-\x7e]{1,255}")
_TIMESTAMP: Final = re.compile(r"[1-9][0-9]{0,11}")
_TOKEN: Final = re.compile(r"[A-Za-z0-9]{1,16},[A-Za-z0-9+/=]{1,256}")
_SECRET: Final = re.compile(r"(?:whsec_)?[A-Za-z0-9+/]{16,128}={0,2}")


@dataclass(frozen=True, slots=True)
class Delivery:
    """One POST that Clerk signed. Only `verify` and `recorded` construct it.

    `id` is the `svix-id`, the same over retries and replays; `sent_at` is unix seconds of
    this attempt; `body` is what was signed, decoded.
    """

    id: str
    sent_at: int
    body: str


def signed(
    body: str, *, svix_id: str, sent_at: datetime, signers: Sequence[Webhook]
) -> dict[str, str]:
    """Return the headers of a delivery of our own, signed with every secret."""
    return {
        "Content-Type": "application/json",
        "svix-id": svix_id,
        "svix-timestamp": str(int(sent_at.timestamp())),
        "svix-signature": " ".join(signer.sign(svix_id, sent_at, body) for signer in signers),
    }


class InvalidSignature(Exception):
    """The POST is not a valid delivery; `reason` says why in one word."""

    def __init__(self, reason: Reason, delivery: Delivery | None = None) -> None:
        super().__init__(reason.value)
        self.reason = reason
        # Set where only its age is wrong, as nothing else reveals a wrong clock.
        self.delivery = delivery


class InvalidSecret(ValueError):
    """A signing secret that cannot be one. The message never repeats it."""


def signers(secrets: str) -> tuple[Webhook, ...]:
    """Return the signers of `whsec_…` secrets, separated by spaces or commas.

    Raises InvalidSecret.
    """
    found = [word for word in re.split(r"[\s,]+", secrets) if word]
    if not found:
        raise InvalidSecret("is empty: paste the endpoint's Signing Secret from Clerk (whsec_…)")
    made = []
    for place, secret in enumerate(found, start=1):
        try:
            if not _SECRET.fullmatch(secret):
                raise InvalidSecret
            made.append(Webhook(secret))
        except ValueError:
            raise InvalidSecret(
                f"secret {place} of {len(found)} is not `whsec_` and base64: "
                "copy the endpoint's Signing Secret from Clerk's dashboard again"
            ) from None
    return tuple(made)


def verify(
    headers: Mapping[str, str], body: bytes, *, signers: Sequence[Webhook], now: float
) -> Delivery:
    """Verify one POST against every secret, and return its Delivery.

    `headers` has lower-case names, `svix-*` or the standard's `webhook-*`; `now` is unix
    seconds. Raises InvalidSignature, and nothing else, whatever the bytes.
    """
    delivery = recorded(headers, body, signers=signers)
    if abs(now - delivery.sent_at) > TOLERANCE_SECONDS:
        raise InvalidSignature(Reason.EXPIRED, delivery)
    return delivery


def recorded(headers: Mapping[str, str], body: bytes, *, signers: Sequence[Webhook]) -> Delivery:
    """Verify a POST that was recorded earlier, whatever its age. Raises InvalidSignature."""
    svix_id = headers.get("svix-id") or headers.get("webhook-id")
    timestamp = headers.get("svix-timestamp") or headers.get("webhook-timestamp")
    signature = headers.get("svix-signature") or headers.get("webhook-signature")
    if not (svix_id and timestamp and signature):
        raise InvalidSignature(Reason.MISSING)
    tokens = [token for token in signature.split(" ") if _TOKEN.fullmatch(token)]
    if not _ID.fullmatch(svix_id) or not _TIMESTAMP.fullmatch(timestamp) or not tokens:
        raise InvalidSignature(Reason.MALFORMED)
    try:
        text = body.decode()
        sent_at = datetime.fromtimestamp(int(timestamp), tz=UTC)
        expected = [signer.sign(svix_id, sent_at, text).encode() for signer in signers]
        given = [token.encode() for token in tokens]
    except Exception:  # noqa: BLE001 -- whatever fails in there, it is no valid signature
        raise InvalidSignature(Reason.MALFORMED) from None
    # Every pair is compared, in constant time each: nothing tells which secret came close.
    if not sum(hmac.compare_digest(mine, theirs) for mine in expected for theirs in given):
        raise InvalidSignature(Reason.WRONG)
    return Delivery(svix_id, int(timestamp), text)
