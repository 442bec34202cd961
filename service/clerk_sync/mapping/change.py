"""What one event, or one object read from Clerk's API, changes in the tables.

A Change is its source and its effect. Values only: `ingest` makes them, `store` applies them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from clerk_sync.clerk.events import READ

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clerk_sync.outcomes import Reason

Key = tuple[str, str]
"""An entity: (kind, Clerk id)."""
Version = tuple[int, int, str]
"""(data.updated_at ms, event time ms, svix-id): compared in this order, so never a tie."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """A delivery as the source of a change.

    `type` is the event's, or `unknown`. `event_ms` is the event's time in unix milliseconds, None
    where it was not read. `payload` is stored if the event ends in quarantine, None where the body
    must not be. `kept` deliveries come from the quarantine: what is gone from it stays away.
    """

    svix_id: str
    type: str
    event_ms: int | None = None
    payload: str | None = None
    kept: bool = False


@dataclass(frozen=True, slots=True)
class ApiRead:
    """A read of Clerk's API as the source; `began_ms` is when it began, in unix milliseconds."""

    began_ms: int


@dataclass(frozen=True, slots=True)
class Upsert:
    """Insert or update the entity's row, if this version is the newest.

    `values` are by column. So are `claims`, by which it may adopt an existing row; empty where the
    mapping adopts none.
    """

    entity: Key
    version: Version
    values: Mapping[str, Any]
    claims: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete the entity's row, or mark it as deleted at this time in unix milliseconds."""

    entity: Key
    deleted_ms: int


@dataclass(frozen=True, slots=True)
class Ignore:
    """Change nothing: the mapping does not name the event's kind."""


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Keep the event aside, as it cannot be applied.

    `kind` and `clerk_id` are None where the event does not give them. `detail` says where it
    failed, such as the column, without data. `retry_at_ms` is when it is retried, in unix
    milliseconds; None where that would not help.
    """

    reason: Reason
    detail: str | None = None
    kind: str | None = None
    clerk_id: str | None = None
    retry_at_ms: int | None = None


Source = Delivered | ApiRead
Effect = Upsert | Delete | Ignore | Quarantine


@dataclass(frozen=True, slots=True)
class Change:
    """One effect, and where it comes from."""

    source: Source
    effect: Effect

    @property
    def svix_id(self) -> str | None:
        """The delivery's id; None for a read of Clerk's API."""
        return self.source.svix_id if isinstance(self.source, Delivered) else None

    @property
    def type(self) -> str:
        """The event's type; `api.read` for a read of Clerk's API."""
        return self.source.type if isinstance(self.source, Delivered) else READ

    @property
    def clerk_id(self) -> str | None:
        """The entity's id, as far as the event gives one."""
        return entity_of(self.effect)[1]

    @property
    def characters(self) -> int:
        """The length of the payload, which is most of what a waiting change holds in memory."""
        return len(self.source.payload or "") if isinstance(self.source, Delivered) else 0


def entity_of(effect: Effect) -> tuple[str | None, str | None]:
    """Return the kind and the Clerk id, None for what is not known."""
    match effect:
        case Upsert() | Delete():
            return effect.entity
        case Quarantine():
            return effect.kind, effect.clerk_id
        case Ignore():
            return None, None


def quarantined(
    effect: Effect, reason: Reason, detail: str, *, retry_at_ms: int | None = None
) -> Quarantine:
    """Return the quarantine of what was to have this effect."""
    return Quarantine(reason, detail, *entity_of(effect), retry_at_ms)


def from_quarantine(change: Change) -> Change:
    """Return the same change, as one whose delivery is in quarantine already."""
    assert isinstance(change.source, Delivered)
    return Change(replace(change.source, kept=True), change.effect)


def without_payload(change: Change) -> Change | None:
    """Return the same quarantine without its payload, and so without a retry.

    None where it is no quarantine, or has no payload.
    """
    match change:
        case Change(Delivered(payload=str()) as source, Quarantine() as effect):
            return Change(replace(source, payload=None), replace(effect, retry_at_ms=None))
    return None
