"""Every SQL statement of the hot path, declared in SQLAlchemy and compiled once at start.

Compiled, not executed, by SQLAlchemy: a statement costs its async engine some 250 µs of CPU,
and the driver 20.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, sqlite

from clerk_sync.clerk.catalog import KINDS
from clerk_sync.database.connection import Statement
from clerk_sync.store.tables import cursors, entities, events, leases, quarantine

# No name in a database has this character.
_IDS: Final = "\0ids"
# The row template holds placeholders and plain words alone, which no list of names does.
_INSERT: Final = re.compile(r"(.*?\)\sVALUES\s)(\((?:%s|\?|'\w*'|, )+\))(.*)", re.DOTALL)
# SQLAlchemy writes an inserted column's name into text of its own, and so doubles each `%` of it
# twice: in VALUES(`name`), and after the alias of the new row.
_INSERTED: Final = re.compile(r"(?<=[( ])((?:VALUES\(|new\.|new_1\.)`)((?:[^`]|``)*)(?=`)")

New = Any
"""The row that an upsert tries to insert, by column name."""


Read = tuple[Statement, Sequence[Sequence[object]]]


def union(reads: Sequence[Read]) -> Read:
    """Return SELECTs of the same columns, one for each kind, as one statement."""
    text = " UNION ALL ".join([statement.head for statement, _ in reads])
    return Statement(text), [[value for _, ((*values,),) in reads for value in values]]


@dataclass(frozen=True, slots=True)
class ForIds:
    """A statement with one IN list."""

    text: str
    placeholder: str

    def of(self, ids: Sequence[object]) -> Read:
        """Return the statement for these ids, and its parameters."""
        marks = ", ".join([self.placeholder] * len(ids))
        return Statement(self.text.replace(_IDS, marks)), [ids]


def ordered(table: sa.Table, names: Sequence[str]) -> sa.TableClause:
    """Return the table with these columns only, in this order, which SQLAlchemy's INSERT keeps."""
    return sa.table(table.name, *(sa.column(name, table.c[name].type) for name in names))


class Compiler:
    """Statements in one database's spelling."""

    def __init__(self, dialect: sa.Dialect) -> None:
        self.dialect = dialect
        self.sqlite = dialect.name == "sqlite"

    def plain(self, statement: sa.ClauseElement, names: Sequence[str] = ()) -> Statement:
        """Compile a statement whose parameters are `names`, in that order."""
        return Statement(self._text(statement, names))

    def insert(self, statement: sa.Insert, names: Sequence[str]) -> Statement:
        """Compile a multi-row INSERT of these columns."""
        return self._parted(self._text(statement, names))

    def _parted(self, text: str) -> Statement:
        found = _INSERT.fullmatch(text)
        assert found is not None
        head, values, tail = found.groups()
        if self.sqlite:
            return Statement(head, values, tail)
        # Only the row template is formatted again, so the rest must not look like a format.
        return Statement(head % (), values, tail % ())

    def for_ids(self, statement: Callable[[sa.ColumnElement[Any]], sa.ClauseElement]) -> ForIds:
        """Compile a statement around one IN list, given as a function of that list."""
        text = self._text(statement(sa.literal_column(f"({_IDS})")), ())
        return ForIds(text, "?" if self.sqlite else "%s")

    def upsert(
        self,
        table: sa.Table,
        names: Sequence[str],
        key: Sequence[str],
        update: Callable[[New], list[tuple[str, Any]]],
    ) -> Statement:
        """Compile an INSERT of these columns that does `update` where the key exists.

        `update` lists assignments in order: MySQL evaluates them left to right, and later ones
        see what earlier ones assigned
        (https://dev.mysql.com/doc/refman/9.4/en/insert-on-duplicate.html).
        """
        if self.sqlite:
            into = sqlite.insert(ordered(table, names))
            return self.insert(
                into.on_conflict_do_update(
                    index_elements=list(key), set_=dict(update(into.excluded))
                ),
                names,
            )
        insert = mysql.insert(ordered(table, names))
        text = self._text(insert.on_duplicate_key_update(update(insert.inserted)), names)
        return self._parted(
            _INSERTED.sub(lambda found: found[1] + found[2].replace("%%%%", "%%"), text)
        )

    def _text(self, statement: Any, names: Sequence[str]) -> str:
        compiled = statement.compile(dialect=self.dialect, column_keys=list(names) or None)
        order = list(compiled.positiontup or ())
        if order != list(names):  # values would go into each other's columns
            raise RuntimeError(f"parameters come as {order}, not as {list(names)}")
        return str(compiled)


ENTITY: Final = (
    "kind",
    "clerk_id",
    "version_ms",
    "event_ms",
    "source",
    "deleted_at",
    "synced_at",
)
BEGUN: Final = ("clerk_id", "version_ms", "event_ms", "synced_at")
MOVED: Final = ("after", "reached_ms", "seen", "finished", "moved_at")
LEDGER: Final = (
    "svix_id",
    "type",
    "kind",
    "clerk_id",
    "outcome",
    "reason",
    "event_at",
    "committed_at",
)
QUARANTINE: Final = (
    "svix_id",
    "type",
    "kind",
    "clerk_id",
    "reason",
    "detail",
    "payload",
    "quarantined_at",
    "retry_at",
)
KEPT: Final = ("reason", "detail", "retry_at")


class OwnStatements:
    """Statements on clerk-sync's own tables."""

    def __init__(self, compiler: Compiler) -> None:
        self.advance = compiler.upsert(entities, ENTITY, ("kind", "clerk_id"), _advanced)
        self.begin = {
            kind: compiler.insert(
                sa.insert(ordered(entities, ("kind", "source", *BEGUN))).values(
                    kind=sa.literal_column(f"'{kind}'"), source=sa.literal_column("''")
                ),
                BEGUN,
            )
            for kind in KINDS
        }
        self.states = {kind: compiler.for_ids(functools.partial(_state, kind)) for kind in KINDS}
        self.present = {kind: compiler.for_ids(functools.partial(_there, kind)) for kind in KINDS}
        self.free = {kind: compiler.for_ids(functools.partial(_free, kind)) for kind in KINDS}
        self.known = compiler.for_ids(_known)
        # The lock keeps another process from acquiring the lease before this transaction ends.
        self.lease = compiler.plain(
            sa.select(leases.c.token)
            .where(leases.c.name == sa.bindparam("lease"))
            .with_for_update(read=True),
            ["lease"],
        )
        self.lower = compiler.plain(
            sa.update(entities)
            .ordered_values(
                (entities.c.version_ms, sa.bindparam("to")),
                (entities.c.event_ms, sa.literal_column("0")),
                (entities.c.source, sa.literal_column("''")),
            )
            .where(
                entities.c.kind == sa.bindparam("of_kind"),
                entities.c.clerk_id == sa.bindparam("id"),
                entities.c.version_ms == sa.bindparam("seen_version"),
                entities.c.event_ms == sa.bindparam("seen_event"),
                entities.c.deleted_at.is_(None),
                sa.exists().where(
                    leases.c.name == sa.bindparam("lease"), leases.c.token == sa.bindparam("token")
                ),
            ),
            ["to", "of_kind", "id", "seen_version", "seen_event", "lease", "token"],
        )
        self.move = compiler.plain(
            sa.update(cursors)
            .ordered_values(*((cursors.c[name], sa.bindparam(f"new_{name}")) for name in MOVED))
            .where(
                cursors.c.kind == sa.bindparam("of_kind"),
                cursors.c.part == sa.bindparam("of_part"),
                sa.exists().where(
                    leases.c.name == sa.bindparam("lease"), leases.c.token == sa.bindparam("token")
                ),
            ),
            [*(f"new_{name}" for name in MOVED), "of_kind", "of_part", "lease", "token"],
        )
        self.record = compiler.upsert(events, LEDGER, ("svix_id",), _recorded)
        self.detain = compiler.upsert(
            quarantine,
            QUARANTINE,
            ("svix_id",),
            lambda new: [(name, new[name]) for name in ("reason", "detail", "payload", "retry_at")],
        )
        self.keep = compiler.plain(
            sa.update(quarantine)
            .ordered_values(*((quarantine.c[name], sa.bindparam(f"new_{name}")) for name in KEPT))
            .where(quarantine.c.svix_id == sa.bindparam("id")),
            [*(f"new_{name}" for name in KEPT), "id"],
        )
        self.release = compiler.for_ids(
            lambda ids: sa.delete(quarantine).where(quarantine.c.svix_id.op("IN")(ids))
        )


def _state(kind: str, ids: sa.ColumnElement[Any]) -> sa.Select[Any]:
    name: sa.ColumnElement[str] = sa.literal_column(f"'{kind}'")
    return sa.select(
        name.label("kind"),
        entities.c.clerk_id,
        entities.c.version_ms,
        entities.c.event_ms,
        entities.c.source,
        entities.c.deleted_at,
        entities.c.synced_at,
    ).where(entities.c.kind == name, entities.c.clerk_id.op("IN")(ids))


def _there(kind: str, ids: sa.ColumnElement[Any]) -> sa.Select[Any]:
    name: sa.ColumnElement[str] = sa.literal_column(f"'{kind}'")
    return sa.select(entities.c.clerk_id).where(
        entities.c.kind == name, entities.c.clerk_id.op("IN")(ids)
    )


def _free(kind: str, ids: sa.ColumnElement[Any]) -> sa.Select[Any]:
    """Select those whose state is not locked."""
    return _there(kind, ids).with_for_update(skip_locked=True)


def _known(ids: sa.ColumnElement[Any]) -> sa.Select[Any]:
    return sa.select(events.c.svix_id, events.c.outcome).where(events.c.svix_id.op("IN")(ids))


def _advanced(new: New) -> list[tuple[str, Any]]:
    """Return the guard: an entity's newest content and its deletion each move forward only.

    The order of the assignments carries the guard on MySQL: the least significant part of the
    version goes first, so that the comparison still holds for those after it.
    """
    old = entities.c
    newer = sa.tuple_(new.version_ms, new.event_ms, new.source) > sa.tuple_(
        old.version_ms, old.event_ms, old.source
    )
    deleted = sa.and_(
        new.deleted_at.is_not(None),
        sa.or_(old.deleted_at.is_(None), new.deleted_at < old.deleted_at),
    )
    return [
        ("synced_at", sa.case((sa.or_(newer, deleted), new.synced_at), else_=old.synced_at)),
        ("deleted_at", sa.case((deleted, new.deleted_at), else_=old.deleted_at)),
        ("source", sa.case((newer, new.source), else_=old.source)),
        ("event_ms", sa.case((newer, new.event_ms), else_=old.event_ms)),
        ("version_ms", sa.case((newer, new.version_ms), else_=old.version_ms)),
    ]


def _recorded(new: New) -> list[tuple[str, Any]]:
    """Return the update of a ledger row, which is final once its event has had an effect."""
    open_ = events.c.outcome.op("IN")(sa.literal_column("('ignored', 'quarantined')"))
    names = ("kind", "clerk_id", "reason", "event_at", "committed_at", "outcome")
    return [(name, sa.case((open_, new[name]), else_=events.c[name])) for name in names]
