"""Clerk's envelope, typed: exact about the few fields that matter, blind to the rest.

Clerk's payloads have one version that keeps gaining fields, and its own examples do not
validate against its own schema, so nothing here asks for more than it uses
(https://clerk.com/docs/guides/development/webhooks/overview).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from clerk_sync.clerk.decoding import InvalidJson, decoded
from clerk_sync.clerk.signature import Delivery, InvalidSignature
from clerk_sync.outcomes import Reason

# Live deliveries carry milliseconds; the examples that Clerk's dashboard sends carry seconds.
_SECONDS_BELOW: Final = 100_000_000_000
# The end of the year 9999: what a DATETIME, and Python's own, can hold.
_LATEST_MS: Final = 253_402_300_799_999
# Printable and without spaces: MySQL's utf8mb4_bin pads, so "a" and "a " would be one key.
CLERK_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
_TYPE: Final = re.compile(r"[\x21-\x7e]{1,128}")

# One-time codes and whole mails: never stored, never mapped.
SECRET_KINDS: Final = frozenset({"email", "sms"})
SECRET_TYPES: Final = frozenset({f"{kind}.created" for kind in SECRET_KINDS})


class Action(Enum):
    """What an event asks of the tables."""

    SAVE = "save"
    DELETE = "delete"


# What ends, is revoked or removed stays an object of Clerk's with a status, sent whole: a save.
# Only `deleted` says that it is no more
# (https://github.com/clerk/openapi-specs/blob/main/webhooks/2025-04-15.yml).
_SAVES: Final = {
    "user": ("created", "updated"),
    "organization": ("created", "updated"),
    "organizationMembership": ("created", "updated"),
    "organizationInvitation": ("created", "accepted", "revoked"),
    "organizationDomain": ("created", "updated"),
    "role": ("created", "updated"),
    "permission": ("created", "updated"),
    "session": ("created", "pending", "ended", "removed", "revoked"),
    "waitlistEntry": ("created", "updated"),
    "subscription": ("created", "updated", "active", "pastDue"),
    "subscriptionItem": (
        *("created", "updated", "active", "abandoned", "canceled", "ended"),
        *("freeTrialEnding", "incomplete", "pastDue", "upcoming"),
    ),
    "paymentAttempt": ("created", "updated"),
}
# A deleted membership is a full object, whose updated_at is the last update's, and so may
# roles and permissions be: only the id of what is deleted may be trusted.
_DELETED: Final = (
    *("user", "organization", "organizationMembership"),
    *("organizationDomain", "role", "permission"),
)
KINDS: Final = tuple(_SAVES)
ACTIONS: Final[dict[str, tuple[str, Action]]] = {
    f"{kind}.{what}": (kind, Action.SAVE) for kind, saves in _SAVES.items() for what in saves
} | {f"{kind}.deleted": (kind, Action.DELETE) for kind in _DELETED}

# Where an object says whose it is: the member, who accepted, who signed in, who pays. Who only
# made or sent something (`created_by`, `inviter_id`) is not asked, and a waitlist entry knows
# an e-mail address, but no user
# (https://github.com/clerk/openapi-specs/blob/main/webhooks/2025-04-15.yml).
USER_PATHS: Final[dict[str, tuple[str, ...]]] = {
    "organizationMembership": ("public_user_data.user_id",),
    "organizationInvitation": ("user_id",),
    "session": ("user_id", "user.id"),
    "subscription": ("payer.user_id",),
    "subscriptionItem": ("payer.user_id",),
    "paymentAttempt": ("payer.user_id",),
}


# The kinds that Clerk's API can list by itself, those that others belong to first.
LISTED: Final = ("user", "organization", "organizationMembership")
# What stands for the type of an event where Clerk's API was asked instead.
READ: Final = "api.read"
# What `clerk-sync probe` sends. It is no type of Clerk's, so that no mapping can name it.
PROBE: Final = "clerk-sync.probe"
# With what its svix-ids begin, so that its rows are found by the ledger's key. Svix's: `msg_`.
PROBE_IDS: Final = "probe_"


@dataclass(frozen=True, slots=True)
class Event:
    """One Clerk event.

    `kind`, `action`, `clerk_id` are None for types that no mapping can name. `version_ms` is
    `data.updated_at`, `event_ms` the envelope's time, both unix milliseconds. `delivery_id` is
    None for an object that was read from Clerk's API: `event_ms` is then when it was asked for.
    """

    delivery_id: str | None
    type: str
    instance_id: str | None
    kind: str | None
    action: Action | None
    clerk_id: str | None
    version_ms: int
    event_ms: int
    data: dict[str, Any]


class InvalidEvent(Exception):
    """A verified event that cannot be applied; `reason` says why, `type` where it is known."""

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


def parse(delivery: Delivery, *, instance_id: str | None = None) -> Event:
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
    if not isinstance(instance, str):
        instance = None
    if instance_id and instance not in (None, instance_id):
        raise InvalidSignature(Reason.INSTANCE)
    if type_ not in ACTIONS:
        return Event(delivery.id, type_, instance, None, None, None, 0, 0, {})
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
        delivery.id,
        type_,
        instance,
        kind,
        action,
        clerk_id,
        event_ms if version_ms is None else version_ms,
        event_ms,
        data,
    )


def read(kind: str, data: dict[str, Any], *, at_ms: int) -> Event:
    """An object as Clerk's API gave it when it was asked at this time. Raises InvalidEvent."""
    clerk_id = data.get("id")
    if not isinstance(clerk_id, str) or not CLERK_ID.fullmatch(clerk_id):
        raise InvalidEvent(Reason.BAD_ID, READ)
    try:
        version_ms = _milliseconds(data.get("updated_at"))
    except ValueError:
        raise InvalidEvent(Reason.BAD_VERSION, READ, clerk_id) from None
    version_ms = at_ms if version_ms is None else version_ms
    return Event(None, READ, None, kind, Action.SAVE, clerk_id, version_ms, at_ms, data)


def _milliseconds(value: object) -> int | None:
    """A time as Clerk writes it; null is absent. Raises ValueError for what is no whole number."""
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LATEST_MS:
        raise ValueError("not a time")
    return value
