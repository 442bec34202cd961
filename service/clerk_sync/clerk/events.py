"""Parse Clerk's envelope: strict about the few fields that are used, blind to the rest.

Clerk's payloads have one version that keeps gaining fields, and its own examples do not
validate against its own schema, so nothing here asks for more than it uses
(https://clerk.com/docs/guides/development/webhooks/overview).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from clerk_sync.clerk.catalog import ACTIONS, Action
from clerk_sync.clerk.decoding import InvalidJson, decoded
from clerk_sync.clerk.signature import Delivery, InvalidSignature
from clerk_sync.outcomes import Reason

# Live deliveries carry milliseconds; the examples that Clerk's dashboard sends carry seconds.
_SECONDS_BELOW: Final = 100_000_000_000
# The end of the year 9999, the latest that a DATETIME and Python's own can hold.
_LATEST_MS: Final = 253_402_300_799_999
# Printable and without spaces: MySQL's utf8mb4_bin pads, so "a" and "a " would be one key.
CLERK_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
_TYPE: Final = re.compile(r"[\x21-\x7e]{1,128}")

READ: Final = "api.read"
"""What stands for the event type of an object that was read from Clerk's API."""


class Event(NamedTuple):
    """An event about an object of a kind that a mapping can name.

    `version_ms` is `data.updated_at`, and the event's time where it has none, or deletes.
    `event_ms` is the envelope's time; for an object that was read from Clerk's API, the time when
    the request began. Both are unix milliseconds.

    One is made for every delivery: a frozen dataclass of as many fields costs three times as much.
    """

    type: str
    kind: str
    action: Action
    clerk_id: str
    version_ms: int
    event_ms: int
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class OtherEvent:
    """An event of a type that no mapping can name. Nothing but its type is read."""

    type: str


class InvalidEvent(Exception):
    """A verified event that cannot be used: `reason` says why; the rest is None if not known."""

    def __init__(
        self,
        reason: Reason,
        type_: str | None = None,
        clerk_id: str | None = None,
        detail: str | None = None,
    ) -> None:
        super().__init__(reason.value)
        self.reason = reason
        self.type = type_
        self.clerk_id = clerk_id
        self.detail = detail


def parse(delivery: Delivery, *, instance_id: str | None = None) -> Event | OtherEvent:
    """Read Clerk's envelope. Raises InvalidEvent, or InvalidSignature for another instance's event.

    An event that names no instance passes: Clerk's older ones do not.
    """
    try:
        envelope = decoded(delivery.body)
    except InvalidJson:
        raise InvalidEvent(Reason.BAD_JSON) from None
    if not isinstance(envelope, dict):
        raise InvalidEvent(Reason.BAD_ENVELOPE)
    type_ = envelope.get("type")
    if not isinstance(type_, str) or not _TYPE.fullmatch(type_):
        raise InvalidEvent(Reason.BAD_ENVELOPE)
    instance = envelope.get("instance_id")
    if instance_id and isinstance(instance, str) and instance != instance_id:
        raise InvalidSignature(Reason.INSTANCE)
    if type_ not in ACTIONS:
        return OtherEvent(type_)
    kind, action = ACTIONS[type_]
    data = envelope.get("data")
    if not isinstance(data, dict):
        raise InvalidEvent(Reason.BAD_ENVELOPE, type_)
    clerk_id = data.get("id")
    if not isinstance(clerk_id, str) or not CLERK_ID.fullmatch(clerk_id):
        raise InvalidEvent(Reason.BAD_ID, type_)
    try:
        event_ms = _milliseconds(envelope.get("timestamp"))
        version_ms = _milliseconds(data.get("updated_at")) if action is Action.SAVE else None
    except ValueError:
        raise InvalidEvent(Reason.BAD_VERSION, type_, clerk_id) from None
    if event_ms is None:
        event_ms = delivery.sent_at * 1000
    elif event_ms < _SECONDS_BELOW:
        event_ms *= 1000
    return Event(
        type_,
        kind,
        action,
        clerk_id,
        event_ms if version_ms is None else version_ms,
        event_ms,
        data,
    )


def read(kind: str, data: dict[str, Any], *, at_ms: int) -> Event:
    """Return a save of an object from Clerk's API, read at this time. Raises InvalidEvent."""
    clerk_id = data.get("id")
    if not isinstance(clerk_id, str) or not CLERK_ID.fullmatch(clerk_id):
        raise InvalidEvent(Reason.BAD_ID, READ)
    try:
        version_ms = _milliseconds(data.get("updated_at"))
    except ValueError:
        raise InvalidEvent(Reason.BAD_VERSION, READ, clerk_id) from None
    version_ms = at_ms if version_ms is None else version_ms
    return Event(READ, kind, Action.SAVE, clerk_id, version_ms, at_ms, data)


def _milliseconds(value: object) -> int | None:
    """Return a time as Clerk writes it, or None. Raises ValueError if it is no whole number."""
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LATEST_MS:
        raise ValueError("not a time")
    return value
