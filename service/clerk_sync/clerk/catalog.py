"""The kinds of Clerk's objects, the types of its events, and where an object names its user.

Source of every table here, unless it says otherwise:
https://github.com/clerk/openapi-specs/blob/main/webhooks/2025-04-15.yml
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping


class Action(Enum):
    """What an event does to its object in Clerk."""

    SAVE = "save"
    DELETE = "delete"


# What ends, is revoked or is removed remains an object of Clerk's with a status, and is sent whole.
# Only `deleted` says that the object is gone.
_EVENTS: Final[Mapping[str, tuple[str, ...]]] = {
    "user": ("created", "updated", "deleted"),
    "organization": ("created", "updated", "deleted"),
    "organizationMembership": ("created", "updated", "deleted"),
    "organizationInvitation": ("created", "accepted", "revoked"),
    "organizationDomain": ("created", "updated", "deleted"),
    "role": ("created", "updated", "deleted"),
    "permission": ("created", "updated", "deleted"),
    "session": ("created", "pending", "ended", "removed", "revoked"),
    "waitlistEntry": ("created", "updated"),
    "email": ("created",),
    "sms": ("created",),
    "subscription": ("created", "updated", "active", "pastDue"),
    "subscriptionItem": (
        # Only Clerk's JavaScript SDK names the first.
        *("created", "updated", "active", "abandoned", "canceled", "ended"),
        *("freeTrialEnding", "incomplete", "pastDue", "upcoming"),
    ),
    "paymentAttempt": ("created", "updated"),
}
TYPES: Final = tuple(f"{kind}.{what}" for kind, ones in _EVENTS.items() for what in ones)

# Their events carry one-time codes and whole mails: never stored, never mapped.
SECRET_KINDS: Final = frozenset({"email", "sms"})
SECRET_TYPES: Final = frozenset(one for one in TYPES if one.partition(".")[0] in SECRET_KINDS)

KINDS: Final = tuple(kind for kind in _EVENTS if kind not in SECRET_KINDS)
"""The kinds that a mapping can name."""
ACTIONS: Final[Mapping[str, tuple[str, Action]]] = {
    f"{kind}.{what}": (kind, Action.DELETE if what == "deleted" else Action.SAVE)
    for kind in KINDS
    for what in _EVENTS[kind]
}
"""The kind and the action of each event type that a mapping can name."""

LISTED: Final = ("user", "organization", "organizationMembership")
"""The kinds that Clerk's API lists on their own, owners first."""

# The member, who accepted, who signed in, who pays. Who only made or sent something
# (`created_by`, `inviter_id`) is not the object's user, and a waitlist entry names an e-mail
# address, but no user.
USER_PATHS: Final[Mapping[str, tuple[str, ...]]] = {
    "organizationMembership": ("public_user_data.user_id",),
    "organizationInvitation": ("user_id",),
    "session": ("user_id", "user.id"),
    "subscription": ("payer.user_id",),
    "subscriptionItem": ("payer.user_id",),
    "paymentAttempt": ("payer.user_id",),
}
"""The fields by which an object of each kind names the user it belongs to."""

PROBE: Final = "clerk-sync.probe"
"""The type of the events that `clerk-sync probe` sends. Clerk has none like it."""
PROBE_IDS: Final = "probe_"
"""The prefix of their `svix-id`s, which the ledger's key finds. Svix's own begin with `msg_`."""
