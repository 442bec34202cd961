"""Which Clerk object goes to which table, and how an Event becomes a Change.

Pure: it knows names and expressions, no SQL. `schema` binds the names to the live tables.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clerk_sync.clerk.catalog import ACTIONS, SECRET_TYPES, Action
from clerk_sync.clerk.events import Event, InvalidEvent, parse
from clerk_sync.outcomes import Reason

if TYPE_CHECKING:
    from collections import abc
    from collections.abc import Callable

    from clerk_sync.clerk.signature import Delivery


@dataclass(frozen=True, slots=True)
class Place:
    """A line of the mapping file, for errors that name it."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Column:
    """One column and the expression that fills it.

    `type` and `index` are for columns that `migrate` makes.
    """

    name: str
    expression: str
    type: str | None
    index: bool
    at: Place


@dataclass(frozen=True, slots=True)
class Owned:
    """Rows of another table that go with the row: `column` there equals `references` here."""

    table: str
    column: str
    references: str
    at: Place


@dataclass(frozen=True, slots=True)
class Constant:
    """A column, mapped or not, and what a delete that marks the row writes to it."""

    name: str
    value: str | float | bool | None
    at: Place


@dataclass(frozen=True, slots=True)
class TableMapping:
    """One Clerk object's table.

    `mark` is the column that a delete stamps, None where a delete removes the row; `sets` are
    further columns that it writes then. `purge_after_ms` is how long a marked row may stay, None
    for ever. `adopt` pairs columns with expressions. `create` says that `migrate` makes the table.
    """

    kind: str
    table: str
    key: str
    columns: tuple[Column, ...]
    adopt: tuple[Column, ...]
    mark: str | None
    sets: tuple[Constant, ...]
    purge_after_ms: int | None
    owns: tuple[Owned, ...]
    create: bool
    at: Place
    places: abc.Mapping[str, Place]
    row: Callable[[abc.Mapping[str, Any]], dict[str, Any]] = field(repr=False)
    claims: Callable[[abc.Mapping[str, Any]], dict[str, Any]] = field(repr=False)

    def column_of(self, expression: str) -> str | None:
        """The column that holds exactly this Clerk field, if one does."""
        return next((c.name for c in self.columns if c.expression == expression), None)


@dataclass(frozen=True, slots=True)
class Mapping:
    """A whole mapping file, read and compiled."""

    source: str
    tables: abc.Mapping[str, TableMapping]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """What the tables should become because of one event.

    `action` None changes nothing: an ignored event (no `reason`) or an unusable one (with
    it), which still get their ledger row. `row` and `claims` are a SAVE's column values, the
    latter those by which it may adopt an existing row; `fitted` is the row as the table's
    columns take it, where that is known already. `delivery_id` is None for facts that
    come from Clerk's API instead of a delivery. `payload` is kept only if the event ends in
    quarantine; `detail` then says where it failed, such as the column, and holds no data;
    `retry_at_ms` when it is tried again by itself, None where that would not help.
    """

    delivery_id: str | None
    type: str
    kind: str | None = None
    action: Action | None = None
    clerk_id: str | None = None
    version_ms: int = 0
    event_ms: int = 0
    row: abc.Mapping[str, Any] | None = None
    claims: abc.Mapping[str, Any] | None = None
    reason: Reason | None = None
    payload: str | None = None
    detail: str | None = None
    fitted: list[Any] | None = None
    retry_at_ms: int | None = None


def change_for(event: Event, mapping: Mapping, *, payload: str | None = None) -> Change:
    """What this event changes. Raises InvalidEvent when an expression fails on its data."""
    table = mapping.tables.get(event.kind or "")
    if table is None:
        return Change(event.delivery_id, event.type, event_ms=event.event_ms)
    row = claims = None
    if event.action is Action.SAVE:
        try:
            row = table.row(event.data)
            claims = table.claims(event.data) if table.adopt else None
        except Exception as error:  # an expression may fail in any way
            raise InvalidEvent(
                Reason.BAD_EXPRESSION, event.type, event.clerk_id, type(error).__name__
            ) from error
    return Change(
        event.delivery_id,
        event.type,
        event.kind,
        event.action,
        event.clerk_id,
        event.version_ms,
        event.event_ms,
        row,
        claims,
        None,
        payload,
    )


def change_of(delivery: Delivery, mapping: Mapping, *, instance_id: str | None) -> Change:
    """What one delivery changes; one that is unusable becomes a Change for the quarantine.

    Raises InvalidSignature when it is another Clerk instance's than `instance_id`.
    """
    try:
        event = parse(delivery, instance_id=instance_id)
        payload = None if event.type in SECRET_TYPES else delivery.body
        return change_for(event, mapping, payload=payload)
    except InvalidEvent as error:
        kind, _ = ACTIONS.get(error.type or "", (None, None))
        if error.type is not None and kind not in mapping.tables:
            return Change(delivery.id, error.type)  # nobody asked for it, so nobody has to mend it
        # Without a type it could be a mail with a one-time code: such a body is not kept.
        payload = delivery.body if error.type is not None else None
        return Change(
            delivery.id,
            error.type or "unknown",
            kind,
            None,
            error.clerk_id,
            reason=error.reason,
            payload=payload,
            detail=error.detail,
        )
