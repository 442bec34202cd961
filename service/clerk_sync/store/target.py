"""One mapped table, bound to the live schema: its statements and its columns' encoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from clerk_sync.outcomes import Reason
from clerk_sync.store.sql import Compiler, ForIds, ordered
from clerk_sync.store.values import Encode, InvalidValue, Same, encoder_for, same_for

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from clerk_sync.mapping.model import Constant, Owned, TableMapping

IDS_LIMIT: Final = 2000
# Clerk's ids have some 32 characters.
_ID_LENGTH: Final = 40


class Target:
    """A mapped table.

    `shared` says that upserts may not rely on its key alone: the table has other unique keys,
    so that MySQL could update another's row. `names` are the columns of a written row,
    the key among them, in the order of every statement's parameters. `parents` are the tables
    to which foreign keys of this one lead.
    """

    def __init__(
        self,
        mapping: TableMapping,
        table: sa.Table,
        *,
        owned: Mapping[str, sa.Table],
        owners: Sequence[tuple[str, str]],
        compiler: Compiler,
    ) -> None:
        self.mapping = mapping
        self.table = table
        # Clerk objects whose removal takes rows of this table along: (kind, column here).
        self.owners = tuple(owners)
        key = table.c[mapping.key]
        primary = next(iter(table.primary_key.columns), key)
        written = [column.name for column in mapping.columns]
        if mapping.mark:
            written.append(mapping.mark)
        self.names = (mapping.key, *written)
        self._owners = [(kind, self.names.index(column)) for kind, column in self.owners]
        others = [one for one in unique_keys(table) if one != {mapping.key}]
        self.shared = not compiler.sqlite and bool(others)
        self.parents = {_referred(one) for one in table.foreign_keys} - {table.name}
        self._encoders = self._encoders_of(compiler)
        self._column_encoders = [self._encoders[column.name] for column in mapping.columns]
        self._sames = [self._same_of(column.name, column.type) for column in mapping.columns]
        self._not_null = {column.name for column in table.columns if not column.nullable}

        values: list[tuple[sa.Column[Any], sa.ColumnElement[Any]]] = [
            (table.c[name], sa.bindparam(f"new_{name}")) for name in written
        ]
        new = [f"new_{name}" for name in written]
        self.upsert = compiler.upsert(
            table,
            self.names,
            (mapping.key,),
            lambda row: [(name, row[name]) for name in written or (mapping.key,)],
        )
        self.insert = compiler.insert(sa.insert(ordered(table, self.names)), self.names)
        self.update = compiler.plain(
            sa.update(table)
            .ordered_values(*(values or [(key, key)]))
            .where(key == sa.bindparam("old_key")),
            [*new, "old_key"],
        )
        self.present = compiler.for_ids(lambda ids: sa.select(key).where(key.op("IN")(ids)))
        self.vacate = _vacating(table, key, others, set(written), compiler)
        # What an upsert locks: its own row, and the rows that its foreign keys refer to.
        self.free = compiler.for_ids(lambda ids: _unlocked(sa.select(key), key.op("IN")(ids)))
        self.referred = tuple(
            (self.names.index(one.parent.name), _referred(one), *_sharable(one, compiler))
            for one in sorted(table.foreign_keys, key=lambda one: one.parent.name)
            if one.parent.name in self.names and _is_whole(one)
        )
        self.read = compiler.for_ids(
            lambda ids: sa.select(*(table.c[name] for name in self.names)).where(key.op("IN")(ids))
        )
        unmarked = table.c[mapping.mark].is_(None) if mapping.mark else sa.true()
        self.ids = compiler.plain(
            sa.select(key)
            .where(key > sa.bindparam("after"), unmarked)
            .order_by(key)
            .suffix_with(f"LIMIT {IDS_LIMIT}"),  # as a parameter, SQLite's has an OFFSET
            ["after"],
        )
        self.count = compiler.plain(sa.select(sa.func.count(key)).where(unmarked))
        self.delete = compiler.for_ids(lambda ids: sa.delete(table).where(key.op("IN")(ids)))
        sets = {one.name: self._constant(one) for one in mapping.sets}
        self._sets = tuple(sets.values())
        self._sets_in_row = [(self.names.index(n), v) for n, v in sets.items() if n in self.names]
        self.mark = compiler.plain(
            sa.update(table)
            .ordered_values(
                (table.c[mapping.mark or mapping.key], sa.bindparam("new_mark")),
                *((table.c[name], sa.bindparam(f"set_{name}")) for name in sets),
            )
            .where(key == sa.bindparam("old_key")),
            ["new_mark", *(f"set_{name}" for name in sets), "old_key"],
        )
        claims = [column.name for column in mapping.adopt]
        self.adoptable = compiler.plain(
            sa.select(primary, *(table.c[name] for name in claims))
            .where(key.is_(None), *(table.c[name] == sa.bindparam(f"is_{name}") for name in claims))
            .order_by(primary),
            [f"is_{name}" for name in claims],
        )
        self.adopt = compiler.plain(
            sa.update(table)
            .ordered_values((key, sa.bindparam("new_key")), *values)
            .where(primary == sa.bindparam("old_primary"), key.is_(None)),
            ["new_key", *new, "old_primary"],
        )
        self.owned_tables = tuple((owned_, owned[owned_.table]) for owned_ in mapping.owns)
        # Owned rows: the SELECT of what they refer to, and their DELETE.
        self.owned: tuple[tuple[Owned, ForIds, ForIds], ...] = tuple(
            (owned_, *_owned_statements(table, key, owned_, other, compiler))
            for owned_, other in self.owned_tables
        )
        # The keys whose owned rows exist, once for each row, and those whose rows are not locked.
        self.owned_free = tuple(
            _owned_lockable(table, key, owned_, other, compiler)
            for owned_, other in self.owned_tables
        )

    def _encoders_of(self, compiler: Compiler) -> dict[str, Encode]:
        types = {column.name: column.type for column in self.mapping.columns}
        adopt, sets = self.mapping.adopt, self.mapping.sets
        names = {*self.names, *(one.name for one in adopt), *(one.name for one in sets)}
        return {
            name: encoder_for(
                self.table.c[name],
                json_text=types.get(name) == "json",
                sqlite=compiler.sqlite,
            )
            for name in names
        }

    def _same_of(self, name: str, type_: str | None) -> Same:
        return same_for(self.table.c[name], json_text=type_ == "json")

    def row(self, clerk_id: str, values: Mapping[str, Any]) -> list[Any]:
        """Return a row in the order of `names`, its mark still empty. Raises InvalidValue."""
        name = self.mapping.key
        try:
            row = [self._encoders[name](clerk_id)]
            for (name, value), encode in zip(values.items(), self._column_encoders, strict=True):
                if value is not None:
                    row.append(encode(value))
                else:
                    self._take_null(name)
                    row.append(None)
        except InvalidValue as error:
            raise InvalidValue(error.reason, name) from None
        if self.mapping.mark:
            row.append(None)
        return row

    def _constant(self, one: Constant) -> Any:
        return None if one.value is None else self._encoders[one.name](one.value)

    def marked(self, row: Sequence[Any], deleted_at: str | None) -> list[Any]:
        """Return the row with its mark, and where deleted, with the values that `set` says."""
        marked = [*row[:-1], deleted_at]
        if deleted_at is not None:
            for place, value in self._sets_in_row:
                marked[place] = value
        return marked

    def marking(self, clerk_id: str, deleted_at: str | None) -> tuple[Any, ...]:
        """Return the parameters of `mark`."""
        return (deleted_at, *self._sets, clerk_id)

    def _take_null(self, name: str) -> None:
        if name in self._not_null:
            raise InvalidValue(Reason.NOT_NULL)

    def differing(self, row: Sequence[Any], stored: Sequence[Any]) -> list[int]:
        """Return the places of `names` in which a live row differs from the stored one."""
        places = [
            place
            for place, same in enumerate(self._sames, start=1)
            if row[place] != stored[place] and not _same(same, row[place], stored[place])
        ]
        if self.mapping.mark and stored[-1] is not None:
            places.append(len(row) - 1)
        return places

    def claims(self, values: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """Return the values by which to adopt a row, or None where one is missing or invalid."""
        if not values or None in values.values():
            return None
        try:
            return tuple(self._encoders[name](value) for name, value in values.items())
        except InvalidValue:
            return None

    def owners_of(self, row: Sequence[Any]) -> list[tuple[str, str]]:
        """Return the entities, as (kind, id), that this row cannot outlive: its owners.

        An empty id is skipped: Clerk's payers are a user or an organization, and the other one's id
        is empty.
        """
        return [
            (kind, value)
            for kind, place in self._owners
            if isinstance(value := row[place], str) and value
        ]


def _same(same: Same, encoded: object, stored: object) -> bool:
    if encoded is None or stored is None:
        return encoded is stored
    try:
        return same(encoded, stored)
    # The column holds no such value, as SQLite allows, or JSON that is too deep to be parsed.
    except (ValueError, TypeError, RecursionError):
        return False


def unique_keys(table: sa.Table) -> list[set[str]]:
    """Return the columns of each unique key of a live table, including its primary key."""
    keys = [{column.name for column in index.columns} for index in table.indexes if index.unique]
    return keys + [
        {column.name for column in constraint.columns}
        for constraint in table.constraints
        if isinstance(constraint, sa.UniqueConstraint | sa.PrimaryKeyConstraint)
    ]


def _referred(foreign_key: sa.ForeignKey) -> str:
    """Return the name of the table that a reflected foreign key refers to."""
    return foreign_key.target_fullname.rpartition(".")[0]


def _is_whole(foreign_key: sa.ForeignKey) -> bool:
    """Whether its column alone refers to a row."""
    return foreign_key.constraint is not None and len(foreign_key.constraint.columns) == 1


def _unlocked(query: sa.Select[Any], which: sa.ColumnElement[bool]) -> sa.Select[Any]:
    return query.where(which).with_for_update(skip_locked=True)


def _sharable(foreign_key: sa.ForeignKey, compiler: Compiler) -> tuple[ForIds, ForIds]:
    """Return SELECTs of the values that the referred column has, and of those not locked.

    A foreign key takes a shared lock of its parent, and so do those of the other writers.
    """
    mariadb = getattr(compiler.dialect, "is_mariadb", False)
    share = "LOCK IN SHARE MODE" if mariadb else "FOR SHARE"
    name, _, column_name = foreign_key.target_fullname.rpartition(".")
    column: sa.ColumnClause[Any] = sa.column(column_name)
    query = sa.select(column).select_from(sa.table(name, column))
    return (
        compiler.for_ids(lambda ids: query.where(column.op("IN")(ids))),
        compiler.for_ids(
            lambda ids: query.where(column.op("IN")(ids)).suffix_with(f"{share} SKIP LOCKED")
        ),
    )


def _holds_id(type_: sa.types.TypeEngine[Any]) -> bool:
    return isinstance(type_, sa.String) and (type_.length or 0) >= _ID_LENGTH


def _vacating(
    table: sa.Table,
    key: sa.Column[Any],
    unique: Sequence[set[str]],
    written: set[str],
    compiler: Compiler,
) -> ForIds | None:
    """Return an UPDATE by which rows give up their values in unique keys, during a swap.

    Null collides with nothing. Where no column of a key may be null, a text takes its place that no
    other row has: one made of the row's own Clerk id. None where there is nothing to give up.
    """
    given_up: dict[str, Any] = {}
    for names in unique:
        columns = [table.c[name] for name in sorted(names & written)]
        nullable = next((one for one in columns if one.nullable), None)
        text = next((one for one in columns if _holds_id(one.type)), None)
        if nullable is not None:
            given_up[nullable.name] = sa.null()
        elif text is not None:
            given_up[text.name] = sa.literal_column("'~'").concat(key)
    if not given_up:
        return None
    return compiler.for_ids(lambda ids: sa.update(table).values(given_up).where(key.op("IN")(ids)))


def _owned_lockable(
    table: sa.Table, key: sa.Column[Any], owned: Owned, other: sa.Table, compiler: Compiler
) -> tuple[ForIds, ForIds]:
    joined = table.join(other, other.c[owned.column] == table.c[owned.references])
    query = sa.select(key).select_from(joined)
    return (
        compiler.for_ids(lambda ids: query.where(key.op("IN")(ids))),
        compiler.for_ids(lambda ids: _unlocked(query, key.op("IN")(ids))),
    )


def _owned_statements(
    table: sa.Table,
    key: sa.Column[Any],
    owned: Owned,
    other: sa.Table,
    compiler: Compiler,
) -> tuple[ForIds, ForIds]:
    references = table.c[owned.references]
    column = other.c[owned.column]
    return (
        compiler.for_ids(lambda ids: sa.select(references).where(key.op("IN")(ids))),
        compiler.for_ids(lambda ids: sa.delete(other).where(column.op("IN")(ids))),
    )
