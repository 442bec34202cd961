"""Make a Change of a delivery: parse it, map it, or quarantine it. Pure: no I/O, no SQL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clerk_sync.clerk.catalog import ACTIONS, Action
from clerk_sync.clerk.events import InvalidEvent, OtherEvent, parse
from clerk_sync.mapping.change import Change, Delete, Delivered, Ignore, Quarantine, Upsert
from clerk_sync.outcomes import Reason

if TYPE_CHECKING:
    from clerk_sync.clerk.events import Event
    from clerk_sync.clerk.signature import Delivery
    from clerk_sync.mapping.model import Mapping, TableMapping


def change_of(delivery: Delivery, mapping: Mapping, *, instance_id: str | None) -> Change:
    """Return what one delivery changes. An event that cannot be used becomes a quarantine.

    Raises InvalidSignature when the event is of another Clerk instance than `instance_id`.
    """
    try:
        event = parse(delivery, instance_id=instance_id)
        if isinstance(event, OtherEvent):
            return Change(Delivered(delivery.id, event.type), Ignore())
        table = mapping.tables.get(event.kind)
        if table is None:
            return Change(Delivered(delivery.id, event.type, event.event_ms), Ignore())
        source = Delivered(delivery.id, event.type, event.event_ms, delivery.body)
        if event.action is Action.DELETE:
            return Change(source, Delete((event.kind, event.clerk_id), event.event_ms))
        return Change(source, upsert_of(event, table, svix_id=delivery.id))
    except InvalidEvent as error:
        return _unusable(delivery, mapping, error)


def upsert_of(event: Event, table: TableMapping, *, svix_id: str = "") -> Upsert:
    """Return the upsert of a saved object; the id of its delivery completes its version.

    Raises InvalidEvent when an expression fails on the object.
    """
    try:
        values = table.row(event.data)
        claims = table.claims(event.data) if table.adopt else {}
    except Exception as error:  # an expression may fail in any way
        raise InvalidEvent(
            Reason.BAD_EXPRESSION, event.type, event.clerk_id, type(error).__name__
        ) from error
    version = (event.version_ms, event.event_ms, svix_id)
    return Upsert((event.kind, event.clerk_id), version, values, claims)


def _unusable(delivery: Delivery, mapping: Mapping, error: InvalidEvent) -> Change:
    if error.type is None:
        # It could be a mail with a one-time code: such a body is not kept.
        return Change(Delivered(delivery.id, "unknown"), Quarantine(error.reason, error.detail))
    kind, _ = ACTIONS.get(error.type, (None, None))
    if kind not in mapping.tables:
        return Change(Delivered(delivery.id, error.type), Ignore())  # nobody has to repair it
    return Change(
        Delivered(delivery.id, error.type, payload=delivery.body),
        Quarantine(error.reason, error.detail, kind, error.clerk_id),
    )
