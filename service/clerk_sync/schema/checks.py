"""The live tables against what clerk-sync and the mapping need: faults, and advice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from clerk_sync.clerk import samples
from clerk_sync.mapping.loader import nearest
from clerk_sync.store import tables
from clerk_sync.store.target import unique_keys
from clerk_sync.store.values import BINARY, InvalidValue, TextOfBytes, encoder_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clerk_sync.mapping.model import Mapping, Owned, Place, TableMapping
    from clerk_sync.schema.reflection import Live

RUN_MIGRATE: Final = "run `clerk-sync migrate` (or `clerk-sync migrate --print` for its SQL)"


class SchemaMismatch(Exception):
    """The live tables are not what the mapping needs: one message per fault."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(faults))


def faults(mapping: Mapping, live: Live) -> list[str]:
    """Return everything that keeps the mapping from being bound to the live tables."""
    return [*own_faults(live), *_mapping_faults(mapping, live)]


def own_faults(live: Live) -> Iterator[str]:
    """Yield what is missing or unusable in clerk-sync's own tables."""
    for name, table in tables.metadata.tables.items():
        if name not in live.tables:
            yield f"table {name} is missing: {RUN_MIGRATE}"
        else:
            if (engine := live.details[name].engine) is not None:
                yield (
                    f"{name} is a table of the engine {engine}, which has no transactions: "
                    f"ALTER TABLE {name} ENGINE=InnoDB"
                )
            for column in sorted(set(table.c.keys()) - set(live.tables[name].c.keys())):
                yield f"{name} has no column {column}, it is older than this version: {RUN_MIGRATE}"


def _mapping_faults(mapping: Mapping, live: Live) -> Iterator[str]:
    for table in mapping.tables.values():
        there = live.tables.get(table.table)
        if there is None:
            hint = RUN_MIGRATE if table.create else "the app's own migrations make it"
            yield f"{table.places['table']}: {_absence(table.table, live, hint)}"
            continue
        yield from _engine_faults(there, live, table.places["table"])
        yield from _key_faults(table, there, live)
        for column in (*table.columns, *table.adopt):
            hint = f": {RUN_MIGRATE}" if table.create else ""
            yield from _missing(there, column.name, column.at, hint)
        for column in table.columns:
            yield from _generated(there, column.name, column.at, live)
        if table.mark:
            yield from _mark_faults(there, table.mark, table.places["on_delete"], live)
        yield from _set_faults(table, there, sqlite=live.dialect.name == "sqlite")
        if table.adopt and len(there.primary_key.columns) != 1:
            yield f"{table.places['adopt']}: adopting needs a primary key of one column"
        for owned in table.owns:
            yield from _missing(there, owned.references, owned.at)
            other = live.tables.get(owned.table)
            if other is not None:
                yield from _owned_faults(table, owned, there, other, live)
            elif owned.table not in {one.table for one in mapping.tables.values()}:
                yield f"{owned.at}: {_absence(owned.table, live)}"


def _absence(name: str, live: Live, hint: str = "") -> str:
    if name in live.views:
        return f"`{name}` is a view, and events need a table: name the one behind it"
    near = next((one for one in sorted(live.names) if one.lower() == name.lower()), None)
    if near is not None:
        return f"table `{name}` is missing; did you mean `{near}`?"
    return f"table `{name}` is missing" + (f": {hint}" if hint else "")


def _set_faults(table: TableMapping, there: sa.Table, *, sqlite: bool) -> Iterator[str]:
    """Yield the values of `set` that their columns cannot take."""
    types = {column.name: column.type for column in table.columns}
    for one in table.sets:
        yield from _missing(there, one.name, one.at)
        if one.name not in there.c:
            continue
        column = there.c[one.name]
        if column.computed is not None:
            yield f"{one.at}: `{one.name}` of `{there.name}` is generated: nothing can be set there"
        elif one.value is None:
            if not column.nullable:
                yield (
                    f"{one.at}: `{one.name}` of `{there.name}` may not be null: let it be null, or "
                    "set something else"
                )
        else:
            try:
                encoder_for(column, json_text=types.get(one.name) == "json", sqlite=sqlite)(
                    one.value
                )
            except InvalidValue as error:
                yield (
                    f"{one.at}: `{one.name}` of `{there.name}` is {column.type}, which does not "
                    f"take {one.value!r}: {error.reason}"
                )


def _missing(table: sa.Table, column: str, at: Place, hint: str = "") -> Iterator[str]:
    if column not in table.c:
        hint = hint or nearest(column, table.c.keys())
        yield f"{at}: table `{table.name}` has no column `{column}`{hint}"


def _engine_faults(table: sa.Table, live: Live, at: Place) -> Iterator[str]:
    """Yield a storage engine without transactions: rows and state could not be kept together."""
    if (engine := live.details[table.name].engine) is not None:
        (name,) = live.quoted(table.name)
        yield (
            f"{at}: `{table.name}` is a table of the engine {engine}, which has no transactions: "
            f"ALTER TABLE {name} ENGINE=InnoDB"
        )


def _generated(table: sa.Table, column: str, at: Place, live: Live) -> Iterator[str]:
    if column in live.details[table.name].generated:
        name, quoted = live.quoted(table.name, column)
        type_ = type_text(table.c[column].type, live)
        yield (
            f"{at}: `{column}` of `{table.name}` is GENERATED, and only the database writes it: "
            f"leave it out of the mapping, or ALTER TABLE {name} DROP COLUMN {quoted}, "
            f"ADD COLUMN {quoted} {type_}"
        )


def type_text(type_: sa.types.TypeEngine[Any], live: Live) -> str:
    """Return a column's type for people, without the table's character set and collation."""
    try:
        text = type_.compile(live.dialect)
    except sa.exc.CompileError:  # a type that SQLAlchemy does not know
        text = type(type_).__name__
    return text.partition(" CHARACTER SET ")[0].partition(" COLLATE ")[0]


def _mark_faults(table: sa.Table, mark: str, at: Place, live: Live) -> Iterator[str]:
    if mark not in table.c:
        yield from _missing(table, mark, at)
        return
    column, about = table.c[mark], f"{at}: `{mark}` of `{table.name}`"
    name, quoted = live.quoted(table.name, mark)
    remedy = f"ALTER TABLE {name} MODIFY {quoted} DATETIME(3) NULL"
    if mark in live.details[table.name].generated:
        yield from _generated(table, mark, at, live)
    elif not isinstance(column.type, sa.DateTime):
        yield f"{about} is {type_text(column.type, live)}: a mark needs a DATETIME: {remedy}"
    elif not column.nullable:
        yield f"{about} may not be null, and is null until the delete: {remedy}"
    elif mark in live.details[table.name].stamped:
        yield f"{about} gets the time of every UPDATE, and would mark a row that is alive: {remedy}"


def _key_faults(table: TableMapping, there: sa.Table, live: Live) -> Iterator[str]:
    at = table.places["key"]
    if table.key not in there.c:
        # Where it differs by case alone, `migrate` cannot add it.
        folded = {name.lower() for name in there.c.keys()}  # noqa: SIM118 -- no dict
        hint = "" if table.key.lower() in folded else f": {RUN_MIGRATE}"
        yield from _missing(there, table.key, at, hint)
        return
    name, key = live.quoted(there.name, table.key)
    (index,) = live.quoted(f"{there.name}_{table.key}")
    makes = f"CREATE UNIQUE INDEX {index} ON {name} ({key})"
    short = [
        (index, length)
        for index, column, length in live.details[there.name].prefixes
        if column == table.key and length < tables.ID_LENGTH
    ]
    for prefixed, length in short:
        primary = prefixed == "PRIMARY"
        drops = "PRIMARY KEY" if primary else f"INDEX {live.quoted(prefixed)[0]}"
        adds = "PRIMARY KEY" if primary else f"UNIQUE INDEX {index}"
        yield (
            f"{at}: `{prefixed}` of `{there.name}` covers only the first {length} characters of "
            f"`{table.key}`, so that two objects could share a row: "
            f"ALTER TABLE {name} DROP {drops}, ADD {adds} ({key})"
        )
    if not short and {table.key} not in unique_keys(there):
        yield f"{at}: `{table.key}` of `{there.name}` must be unique by itself: {makes}"
    yield from _id_faults(there, table.key, at, live, kind=table.kind)


def _owned_faults(
    table: TableMapping, owned: Owned, there: sa.Table, other: sa.Table, live: Live
) -> Iterator[str]:
    yield from _engine_faults(other, live, owned.at)
    yield from _missing(other, owned.column, owned.at)
    if owned.column not in other.c or owned.references not in there.c:
        return
    if owned.references == table.key:
        yield from _id_faults(other, owned.column, owned.at, live, kind=table.kind)
        return
    ours, theirs = there.c[owned.references].type, other.c[owned.column].type
    if _is_number(ours) != _is_number(theirs):
        yield (
            f"{owned.at}: `{owned.column}` of `{other.name}` is {type_text(theirs, live)}, and "
            f"`{owned.references}` of `{there.name}` is {type_text(ours, live)}: the database "
            "would take one for the other by rules of its own"
        )


def _is_number(type_: sa.types.TypeEngine[Any]) -> bool:
    return isinstance(type_, sa.Integer | sa.Numeric | sa.Float | sa.Boolean)


def _id_faults(table: sa.Table, column: str, at: Place, live: Live, *, kind: str) -> Iterator[str]:
    """Yield what keeps a column from holding Clerk ids, or makes two of them equal."""
    yield from _generated(table, column, at, live)
    type_ = table.c[column].type
    about = f"{at}: `{column}` of `{table.name}`"
    name, quoted = live.quoted(table.name, column)
    null = "" if table.c[column].nullable else " NOT NULL"
    remedy = (
        f"ALTER TABLE {name} MODIFY {quoted} "
        f"VARCHAR({tables.ID_LENGTH}) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin{null}"
    )
    if not isinstance(type_, (sa.String, TextOfBytes, *BINARY)) or isinstance(
        type_, sa.Enum | mysql.SET
    ):
        yield f"{about} is {type_text(type_, live)}, and Clerk's ids are text: {remedy}"
        return
    example = samples.IDS[kind]
    try:
        encoder_for(table.c[column], json_text=False, sqlite=live.dialect.name == "sqlite")(example)
    except InvalidValue:
        why = f"Clerk's ids have {len(example)} characters and more"
        if isinstance(type_, sa.BINARY):
            why = f"fills up with zeros what is shorter, such as Clerk's ids of {len(example)}"
        yield f"{about} is {type_text(type_, live)}, and {why}: {remedy}"
    collation = getattr(type_, "collation", None)
    if isinstance(collation, str) and collation.endswith("_ci"):
        yield f"{about} compares by {collation}, but Clerk's ids are case-sensitive: {remedy}"


def advice(mapping: Mapping, live: Live) -> Iterator[str]:
    """Yield what works, but slowly or not as the mapping says."""
    for table in mapping.tables.values():
        there = live.tables.get(table.table)
        if there is None:
            continue
        if table.adopt and not _indexed(there, {column.name for column in table.adopt}):
            names = ", ".join(column.name for column in table.adopt)
            yield (
                f"{table.places['adopt']}: no index of `{there.name}` begins with {names}: "
                "every new user scans the table"
            )
        for name in unfilled(table, live):
            yield (
                f"{table.at}: `{name}` of `{there.name}` may not be null, has no "
                "default and is not mapped: every new row is refused"
            )
        yield from _advice_on_history(table, live)
        yield from _kept_unique(table, there)
        for owned in table.owns:
            theirs = live.tables.get(owned.table)
            if theirs is not None and not _indexed(theirs, {owned.column}):
                yield (
                    f"{owned.at}: no index of `{owned.table}` begins with {owned.column}: "
                    "every delete scans the table"
                )
        for column in table.columns if table.create else ():
            if column.type is None or column.name not in there.c:
                continue
            wanted = getattr(tables.column_type(column.type), "length", None)
            length = getattr(there.c[column.name].type, "length", None)
            if wanted and length and wanted != length:
                yield (
                    f"{column.at}: `{column.name}` of `{there.name}` holds {length} characters, "
                    f"not {wanted}: ALTER TABLE {there.name} MODIFY {column.name} VARCHAR({wanted})"
                )


def _kept_unique(table: TableMapping, there: sa.Table) -> Iterator[str]:
    """Yield unique indexes in which soft-deleted rows can collide with others."""
    if table.mark is None:
        return
    at = table.places["on_delete"]
    constants = {one.name: one.value for one in table.sets}
    # Rows in which one of these differs, or is null, never collide.
    apart = {table.key, table.mark, *(name for name, value in constants.items() if value is None)}
    for names in sorted({tuple(sorted(names)) for names in unique_keys(there)}):
        mapped = [one.name for one in table.columns if one.name in names]
        if not mapped or apart.intersection(names):
            continue
        unique = f"{at}: `{', '.join(names)}` of `{there.name}` is unique"
        nullable = there.c[mapped[0]].nullable
        remedy = ("" if nullable else "let it be null, and ") + f"add `set: {{{mapped[0]}: null}}`"
        if constants.keys() & {*names}:
            yield f"{unique}, and `set` can make deleted rows the same in it: {remedy}"
        else:
            yield (
                f"{unique}, and a deleted row stays in it: no other row can have the same value: "
                f"{remedy}"
            )


def _advice_on_history(table: TableMapping, live: Live) -> Iterator[str]:
    there, details = live.tables[table.table], live.details[table.table]
    if details.versioned:
        yield (
            f"{table.places['table']}: `{there.name}` keeps the history of its rows "
            "(SYSTEM VERSIONING): what is deleted or erased stays in it"
        )
    for column in table.columns:
        if column.name in details.stamped:
            yield (
                f"{column.at}: `{column.name}` of `{there.name}` gets the time of every UPDATE "
                "that leaves it out: the app's own updates make it drift from Clerk"
            )


def unfilled(table: TableMapping, live: Live) -> list[str]:
    """Return the columns that get no value in a new row."""
    written = {table.key, table.mark, *(column.name for column in table.columns)}
    return [
        column.name
        for column in live.tables[table.table].columns
        if not column.nullable and column.name not in written and not _filled(column)
    ]


def _filled(column: sa.Column[Any]) -> bool:
    """Whether the database fills the column by itself."""
    # MySQL says of every integer whether it does; SQLite counts its INTEGER PRIMARY KEY.
    automatic = column.autoincrement is True or (
        column.autoincrement == "auto"
        and column.primary_key
        and isinstance(column.type, sa.Integer)
    )
    return column.server_default is not None or column.computed is not None or automatic


def _indexed(table: sa.Table, columns: set[str]) -> bool:
    first = [next(iter(index.columns)).name for index in table.indexes if index.columns]
    first += [column.name for column in list(table.primary_key.columns)[:1]]
    return bool(columns & set(first))
