"""Made-up Clerk objects and events, complete: `trigger` sends them, the tests deliver them.

`sample_data` has one file per kind of object, with every field that Clerk describes for it
(https://github.com/clerk/openapi-specs). They are written as seen on one fixed day; `event`
moves their times to now and fills in the ids: `{user.id}` is an id, `{user.tail}` what an
e-mail address or a slug takes from it to be as distinct, `{user}` the whole object.
"""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import json
import re
import secrets
import string
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from clerk_sync.clerk.catalog import TYPES

if TYPE_CHECKING:
    from collections.abc import Mapping

# The day of the files: their `updated_at`, in unix milliseconds as all of their times.
_NOW: Final = 1_767_612_345_678
_HOUR: Final = 3_600_000
_DAY: Final = 24 * _HOUR
# Live deliveries leave 12 to 18 ms after the change that they report.
_LAG: Final = 15
_BASE62: Final = string.digits + string.ascii_letters
_PLACEHOLDER: Final = re.compile(r"\{(\w+)(?:\.(id|tail))?\}")

_INSTANCE_ID: Final = "ins_3bWS9BcHns0UTKwm2XcPiKcYmpv"
# One of each kind, for the objects that an event mentions besides its own.
IDS: Final[Mapping[str, str]] = {
    "user": "user_3HOG1Qx8xuFPYjHxEQM8q0EQBkX",
    "organization": "org_3SLgjjNIs2STyGHlop2iQ8S7R4L",
    "organizationMembership": "orgmem_3pkb7sQQR273JQ02stZ6BblWIvW",
    "organizationInvitation": "orginv_30p3L3TzFAKA315w36ttQtDxN04",
    "organizationDomain": "orgdmn_3whTDCFfmDkT5kmLAQdDquiCjla",
    "role": "role_3Vnu2HE2DL4BOI3bmSmcW4uqfeg",
    "permission": "perm_3T5VjxJ90Ut3fSr6Ld0HR6006Qe",
    "session": "sess_3hw8vuXzEkmoitFFyxhqHaIQP9j",
    "waitlistEntry": "wle_3SwFGEUvGYltDzZ8OWBnOlRZNHm",
    "email": "ema_3syAPnBHnGsHHwhrsLBEMLHNSrV",
    "sms": "sms_3LMhPIGx62l9X0TY0spQzY0d8Rm",
    "subscription": "csub_3yAcUzBtvMuZ92KQmm6gQkMtzmK",
    "subscriptionItem": "csub_item_30ksSQn72Krc5J5qsy8zTWYepEp",
    "paymentAttempt": "pa_39fWSwawPGMvcQdwkXbzg8oiZIQ",
}

# What sets an event's object apart from the one in the file of its kind, where anything does.
_CHANGES: Final[Mapping[str, Mapping[str, Any]]] = {
    "user.created": {
        "backup_code_enabled": False,
        "mfa_enabled_at": None,
        "organization_memberships": [],
        "passkeys": [],
        "totp_enabled": False,
        "two_factor_enabled": False,
    },
    "user.updated": {"last_name": "King"},
    "organization.created": {"members_count": 1, "pending_invitations_count": 0},
    "organization.updated": {"name": "Analytical Engine Works"},
    "organizationMembership.updated": {
        "permissions": ["org:sys_memberships:manage", "org:notes:manage"],
        "role": "org:admin",
        "role_name": "Admin",
    },
    "organizationInvitation.accepted": {"status": "accepted", "user_id": "{user.id}"},
    "organizationInvitation.revoked": {"status": "revoked"},
    "organizationDomain.created": {
        "affiliation_verification": {"attempts": 0, "status": "unverified", "verified_at": None},
        "ownership_verification": {"attempts": 0, "status": "unverified", "verified_at": None},
        "total_pending_invitations": 0,
        "verification": {"attempts": 0, "status": "unverified", "verified_at": None},
    },
    "organizationDomain.updated": {
        "enrollment_mode": "automatic_suggestion",
        "total_pending_suggestions": 4,
    },
    "role.updated": {"name": "Lead programmer"},
    "permission.updated": {"name": "Read all notes"},
    # Clerk's description knows no such status; its own example of the event has it.
    "session.pending": {"last_active_organization_id": None, "status": "pending"},
    "session.ended": {"status": "ended"},
    "session.removed": {"status": "removed"},
    "session.revoked": {"status": "revoked"},
    "waitlistEntry.created": {"invitation": None, "status": "pending"},
    "subscription.updated": {"items": [{"seats": {"quantity": 8}}]},
    "subscription.pastDue": {
        "items": [{"status": "past_due"}],
        "past_due_at": _NOW,
        "status": "past_due",
    },
    "subscriptionItem.updated": {"seats": {"quantity": 8}},
    "subscriptionItem.abandoned": {"status": "abandoned"},
    "subscriptionItem.canceled": {"status": "canceled"},
    "subscriptionItem.ended": {"period_end": _NOW, "status": "ended"},
    "subscriptionItem.freeTrialEnding": {"is_free_trial": True, "period_end": _NOW + 3 * _DAY},
    "subscriptionItem.incomplete": {"status": "incomplete"},
    "subscriptionItem.pastDue": {"status": "past_due"},
    "subscriptionItem.upcoming": {
        "period_end": _NOW + 60 * _DAY,
        "period_start": _NOW + 29 * _DAY,
        "status": "upcoming",
    },
    "paymentAttempt.created": {"paid_at": None, "status": "pending"},
}

_NEW: Final = frozenset({*(t for t in TYPES if t.endswith(".created")), "session.pending"})
# Of these Clerk sends the whole object, as it was before the delete.
_DELETED_WHOLE: Final = frozenset({"organizationMembership.deleted"})


def _kind(type_: str) -> str:
    return type_.partition(".")[0]


@functools.cache
def _object(kind: str) -> dict[str, Any]:
    """Read the file of a kind. Its object is shared: nobody may change it."""
    files = importlib.resources.files("clerk_sync.clerk") / "sample_data"
    found: dict[str, Any] = json.loads((files / f"{kind}.json").read_text("utf-8"))
    return found


def fields_of(kind: str) -> frozenset[str]:
    """Return the names of the fields that Clerk's objects of this kind have of their own."""
    changed = (change for type_, change in _CHANGES.items() if _kind(type_) == kind)
    return frozenset(_object(kind)).union(*changed)


class UnknownEventType(ValueError):
    """Not an event type of Clerk's; the message names the nearest one."""

    def __init__(self, type_: str) -> None:
        by_folded = {known.casefold(): known for known in TYPES}
        near = difflib.get_close_matches(type_.casefold(), by_folded, n=1)
        hint = f"did you mean `{by_folded[near[0]]}`?" if near else f"there is: {', '.join(TYPES)}"
        super().__init__(f"Clerk has no event type `{type_}`; {hint}")


def event(
    type: str,  # noqa: A002 -- Clerk's own name for it
    *,
    clerk_id: str | None = None,
    now_ms: int,
    instance_id: str = _INSTANCE_ID,
) -> dict[str, Any]:
    """Return Clerk's whole envelope for an event that happens now. Raises UnknownEventType.

    Without a `clerk_id` it is about a new object, with a random one. With one, everything
    that is not a time is the same on each call.
    """
    if type not in TYPES:
        raise UnknownEventType(type)
    kind = _kind(type)
    if clerk_id is None:
        prefix, _, _ = IDS[kind].rpartition("_")
        clerk_id = f"{prefix}_{''.join(secrets.choice(_BASE62) for _ in range(27))}"
    return {
        "data": data_of(type, {**IDS, kind: clerk_id}, now_ms=now_ms, instance_id=instance_id),
        "event_attributes": {
            "http_request": {
                "client_ip": "203.0.113.24",
                "user_agent": "Mozilla/5.0 (X11; Linux x86_64; rv:147.0) Firefox/147.0",
            }
        },
        "instance_id": instance_id,
        "object": "event",
        "timestamp": now_ms,
        "type": type,
    }


def data_of(
    type: str,  # noqa: A002
    ids: Mapping[str, str],
    *,
    now_ms: int,
    instance_id: str = _INSTANCE_ID,
) -> dict[str, Any]:
    """Return the object of an event of this type. `ids` has an id for each kind it mentions."""
    kind = _kind(type)
    age = 9 * _DAY if type in _DELETED_WHOLE else 0
    scene = _Scene(
        ids=ids,
        instance_id=instance_id,
        shift=now_ms - _LAG - age - _NOW,
        born=_object(kind).get("created_at") if type in _NEW else None,
    )
    data = _changed(_object(kind), _CHANGES.get(type, {}))
    if type.endswith(".deleted") and type not in _DELETED_WHOLE:
        kept = ("external_id", "id", "object", "slug")
        data = {"deleted": True, **{name: data[name] for name in kept if name in data}}
    found: dict[str, Any] = scene.of(data)
    return found


def _changed(value: Any, change: Any) -> Any:
    """Merge `change` into `value`; a list becomes as long as its change."""
    if isinstance(value, dict) and isinstance(change, dict):
        return value | {name: _changed(value.get(name), new) for name, new in change.items()}
    if isinstance(value, list) and isinstance(change, list) and len(change) <= len(value):
        return [_changed(*pair) for pair in zip(value, change, strict=False)]
    return change


def _tail(clerk_id: str) -> str:
    """Take the end of an id as a username allows it, and four digits for what that drops.

    Ids that differ only in case or only in front need those digits to stay apart.
    """
    end = re.sub(r"[^0-9a-z]", "", clerk_id[-6:].lower())
    return f"{end}{zlib.crc32(clerk_id.encode()) & 0xFFFF:04x}"


@dataclass(frozen=True, slots=True)
class _Scene:
    """Who and when an event is about.

    `shift` moves the day of the files to today, in milliseconds. `born` is the file's `created_at`
    where the object is to be new: all later times in the file are then moved to now.
    """

    ids: Mapping[str, str]
    instance_id: str
    shift: int
    born: int | None

    def of(self, value: Any) -> Any:
        """Copy `value`, with its placeholders and its times filled in."""
        match value:
            case dict():
                return {name: self.of(part) for name, part in value.items()}
            case list():
                return [self.of(part) for part in value]
            case str() if "{" in value:
                if (kind := value[1:-1]) in IDS:
                    return replace(self, born=None).of(_object(kind))
                return _PLACEHOLDER.sub(self._text, value)
            # Nothing else in the files is as large as a time.
            case int() if value > _NOW // 2:
                return self._time(value)
            case _:
                return value

    def _text(self, match: re.Match[str]) -> str:
        kind, part = match.groups()
        if part is None:
            return self.instance_id
        return self.ids[kind] if part == "id" else _tail(self.ids[kind])

    def _time(self, time_ms: int) -> int:
        if self.born is not None and time_ms < _NOW:
            age = time_ms - self.born
            # A new object is saved a few milliseconds after its `created_at`.
            time_ms = _NOW + age - 11 if age < _HOUR else _NOW
        return time_ms + self.shift
