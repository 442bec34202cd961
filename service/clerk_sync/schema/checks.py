"""The live schema: whether it is what clerk-sync and the mapping need, and making it so.

Only `migrate` runs DDL. `serve` looks at the tables themselves instead of a version number: a
schema that came by a PlanetScale deploy request brings tables, but no rows of a version table.
"""

from __future__ import annotations

import asyncio
import io
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from asyncmy.errors import MySQLError
from sqlalchemy.dialects import mysql

from clerk_sync.clerk import samples
from clerk_sync.database.errors import Contention, DatabaseUnavailable, translate_engine_errors
from clerk_sync.mapping.loader import nearest
from clerk_sync.mapping.model import Mapping, Owned, Place, TableMapping
from clerk_sync.schema import reflection as looked
from clerk_sync.schema.reflection import Live, TableNames
from clerk_sync.store import tables
from clerk_sync.store.lease import LeaseHeld, LeaseLost, held, holder_name
from clerk_sync.store.sql import Compiler
from clerk_sync.store.store import Store
from clerk_sync.store.target import Target, unique_keys
from clerk_sync.store.values import BINARY, InvalidValue, TextOfBytes, fit_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.schema.reflection import Spelling
    from clerk_sync.store.lease import Lease

VERSION_TABLE: Final = "clerk_sync_version"
LEASE: Final = "migrate"
_PATIENCE_SECONDS: Final = 120
_PAUSE_SECONDS: Final = 0.2
_ATTEMPTS: Final = 5
# Somebody else has just made that table, column or index: as by the statement of a process that
# was killed, which its server ends all the same.
_MADE_MEANWHILE: Final = frozenset({1050, 1060, 1061})
RUN_MIGRATE: Final = "run `clerk-sync migrate` (or `clerk-sync migrate --print` for its SQL)"


class SchemaMismatch(Exception):
    """The live schema is not what is needed: one message per fault."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(faults))


async def bound(engine: AsyncEngine, mapping: Mapping) -> Store:
    """A Store on the live schema. Raises SchemaMismatch, or DatabaseUnavailable."""
    live = await looked.inspected(engine, _names(mapping))
    return store_of(mapping, live)


async def reflected(engine: AsyncEngine, mapping: Mapping) -> Live:
    """The live tables that the mapping names. Raises DatabaseUnavailable."""
    return await looked.inspected(engine, _names(mapping))


async def own_faults(engine: AsyncEngine) -> list[str]:
    """What is missing of clerk-sync's own tables. Raises DatabaseUnavailable."""
    return list(_own_faults(await looked.inspected(engine, _own_names())))


def lacks_own(live: Live) -> bool:
    """Whether anything of clerk-sync's own tables is missing."""
    return any(_own_faults(live))


def store_of(mapping: Mapping, live: Live) -> Store:
    """Bind the mapping to the live tables. Raises SchemaMismatch with every fault."""
    faults = [*_own_faults(live), *_mapping_faults(mapping, live)]
    if faults:
        raise SchemaMismatch(faults)
    for table in mapping.tables.values():
        _read_text_of_bytes(table, live)
    compiler = Compiler(live.dialect)
    targets = {
        kind: Target(
            table,
            live.tables[table.table],
            owned={owned.table: live.tables[owned.table] for owned in table.owns},
            owners=_owners(mapping, table),
            compiler=compiler,
        )
        for kind, table in mapping.tables.items()
    }
    return Store(targets, compiler)


def _read_text_of_bytes(table: TableMapping, live: Live) -> None:
    """Have both ways to the database take what the mapping writes for text, also in bytes."""
    there = live.tables[table.table]
    columns = [there.c[one.name] for one in (*table.columns, *table.adopt)]
    columns.append(there.c[table.key])
    columns += [
        live.tables[owned.table].c[owned.column]
        for owned in table.owns
        if owned.references == table.key
    ]
    for column in columns:
        if isinstance(column.type, BINARY):
            column.type = TextOfBytes(column.type)


def advice(mapping: Mapping, live: Live) -> Iterator[str]:
    """What works, but slowly or not as the mapping says."""
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
    """Unique indexes that marked rows still count in, and so keep others out of the table."""
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
                f"{unique}, and a deleted row stays in it: who comes back with the same cannot be "
                f"written: {remedy}"
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
                "that leaves it out: the app's own updates put it out of step with Clerk"
            )


def unfilled(table: TableMapping, live: Live) -> list[str]:
    """The columns that nobody gives a new row's value."""
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


def _own_names() -> Spelling:
    return {name: set(table.c.keys()) for name, table in tables.metadata.tables.items()}


def _names(mapping: Mapping) -> Spelling:
    """The tables that matter, and how the mapping spells their columns."""
    names = _own_names()
    for table in mapping.tables.values():
        columns = names.setdefault(table.table, set())
        columns |= {table.key, *([table.mark] if table.mark else [])}
        columns |= {one.name for one in (*table.columns, *table.adopt)}
        columns |= {one.name for one in table.sets}
        for owned in table.owns:
            columns.add(owned.references)
            names.setdefault(owned.table, set()).add(owned.column)
    return names


def _owners(mapping: Mapping, table: TableMapping) -> list[tuple[str, str]]:
    """The mapped objects whose removal takes rows of this table, with the column that says whose.

    Only where that column holds the owner's Clerk id: then a late row can be told from its
    values alone to have lost its owner.
    """
    return [
        (owner.kind, owned.column)
        for owner in mapping.tables.values()
        for owned in owner.owns
        if owned.table == table.table and owned.references == owner.key
    ]


def _own_faults(live: Live) -> Iterator[str]:
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
    """What `set` asks of columns that cannot take it."""
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
                fit_for(column, json_text=types.get(one.name) == "json", sqlite=sqlite)(one.value)
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
    """A table whose rows cannot be written together with what is known of them."""
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
    """A column's type for people, without what its table says for all of its columns."""
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
    mend = f"ALTER TABLE {name} MODIFY {quoted} DATETIME(3) NULL"
    if mark in live.details[table.name].generated:
        yield from _generated(table, mark, at, live)
    elif not isinstance(column.type, sa.DateTime):
        yield f"{about} is {type_text(column.type, live)}: a mark needs a DATETIME: {mend}"
    elif not column.nullable:
        yield f"{about} may not be null, and is null until the delete: {mend}"
    elif mark in live.details[table.name].stamped:
        yield f"{about} gets the time of every UPDATE, and would mark a row that is alive: {mend}"


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
            f"{at}: `{prefixed}` of `{there.name}` looks at the first {length} characters of "
            f"`{table.key}` only, so that two objects are one row: "
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
    """A column of Clerk ids that does not take them, or takes two of them for one."""
    yield from _generated(table, column, at, live)
    type_ = table.c[column].type
    about = f"{at}: `{column}` of `{table.name}`"
    name, quoted = live.quoted(table.name, column)
    null = "" if table.c[column].nullable else " NOT NULL"
    mend = (
        f"ALTER TABLE {name} MODIFY {quoted} "
        f"VARCHAR({tables.ID_LENGTH}) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin{null}"
    )
    if not isinstance(type_, (sa.String, TextOfBytes, *BINARY)) or isinstance(
        type_, sa.Enum | mysql.SET
    ):
        yield f"{about} is {type_text(type_, live)}, and Clerk's ids are text: {mend}"
        return
    example = samples.IDS[kind]
    try:
        fit_for(table.c[column], json_text=False, sqlite=live.dialect.name == "sqlite")(example)
    except InvalidValue:
        why = f"Clerk's ids have {len(example)} characters and more"
        if isinstance(type_, sa.BINARY):
            why = f"fills up with zeros what is shorter, such as Clerk's ids of {len(example)}"
        yield f"{about} is {type_text(type_, live)}, and {why}: {mend}"
    collation = getattr(type_, "collation", None)
    if isinstance(collation, str) and collation.endswith("_ci"):
        yield f"{about} compares by {collation}, but Clerk's ids are case-sensitive: {mend}"


async def migrate(
    engine: AsyncEngine, mapping: Mapping, *, patience_seconds: float = _PATIENCE_SECONDS
) -> list[str]:
    """Make clerk-sync's tables and those that the mapping asks for; what was done, in words.

    Several at once are safe: one works, the others wait and find nothing to do. The engine needs
    two connections. Raises DatabaseUnavailable, also when it was not our turn within
    `patience_seconds`.
    """
    if engine.dialect.name == "sqlite":
        return await _worked(engine, lambda connection: _migrated_alone(connection, mapping))
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience_seconds
    attempts = 0
    while True:
        try:
            return await _migrated_in_turn(engine, mapping)
        except LeaseHeld as error:
            if loop.time() > deadline:
                raise DatabaseUnavailable(str(error)) from error
        # Another node of a cluster was faster: whatever fails so has changed nothing. Or what one
        # that is dead had begun was ended without it.
        except (Contention, LeaseLost, _MadeMeanwhile) as error:
            attempts += 1
            if attempts == _ATTEMPTS:
                raise DatabaseUnavailable(str(error)) from error
        await asyncio.sleep(_PAUSE_SECONDS)


class _MadeMeanwhile(Exception):
    """Somebody else made what was to be made."""


async def _worked(engine: AsyncEngine, work: Callable[[sa.Connection], list[str]]) -> list[str]:
    with translate_engine_errors():
        async with engine.connect() as connection:
            try:
                done = await connection.run_sync(work)
            except sa.exc.DBAPIError as error:
                if isinstance(error.orig, MySQLError) and error.orig.args[0] in _MADE_MEANWHILE:
                    raise _MadeMeanwhile(str(error.orig)) from error
                raise
            await connection.commit()
            return done


async def _migrated_in_turn(engine: AsyncEngine, mapping: Mapping) -> list[str]:
    """Migrate under a lease: DDL is no transaction on MySQL, so that something has to guard it.

    Not by GET_LOCK, which a cluster of several writers cannot keep, and Percona's refuses. The
    lease's own table is the one thing that is made without it. Raises LeaseHeld, Contention or
    LeaseLost.
    """

    def prepare(connection: sa.Connection) -> list[str]:
        if tables.leases.name in TableNames.there(connection):
            return []
        connection.execute(sa.schema.CreateTable(tables.leases, if_not_exists=True))
        return [tables.leases.name]

    made = await _worked(engine, prepare)
    async with held(engine, LEASE, holder_name(), patience=False) as lease:
        # Who comes second may have seen that the table was not there yet.
        new = {*made} if lease.token == 1 else set()
        return await _worked(
            engine,
            lambda connection: _migrated(connection, mapping, print_to=None, new=new, lease=lease),
        )


def _migrated_alone(connection: sa.Connection, mapping: Mapping) -> list[str]:
    connection.exec_driver_sql(f"PRAGMA busy_timeout={_PATIENCE_SECONDS * 1000}")
    connection.exec_driver_sql("BEGIN IMMEDIATE")
    return _migrated(connection, mapping, print_to=None)


async def migration_sql(engine: AsyncEngine, mapping: Mapping) -> str:
    """The SQL that `migrate` would run now, for people who may not run it.

    Raises DatabaseUnavailable.
    """
    out = io.StringIO()
    with translate_engine_errors():
        async with engine.connect() as connection:
            await connection.run_sync(_migrated, mapping, print_to=out)
    return out.getvalue()


def _migrated(
    connection: sa.Connection,
    mapping: Mapping,
    *,
    print_to: io.StringIO | None,
    new: set[str] | None = None,
    lease: Lease | None = None,
) -> list[str]:
    """Bring the schema to what is wanted; `new` tables were made just now, and are empty.

    Raises LeaseLost between two steps once the lease is somebody else's.
    """
    # Alembic is loaded by this command alone: `serve` starts a tenth of a second sooner.
    from clerk_sync.schema.migrations import Migration  # noqa: PLC0415

    spelling = _names(mapping)
    there = TableNames.there(connection)

    def live(name: str) -> sa.Table:
        actual = there.of(name) if name in there else name
        return looked.reflected(connection, actual, spelling[name])

    def in_turn() -> None:
        if lease is not None:
            lease.check()

    own = tables.metadata.tables
    migration = Migration(connection, VERSION_TABLE, print_to)
    done = migration.own_tables({*there} - (new or set()))
    wanted = [*own.values()]
    for table in mapping.tables.values():
        in_turn()
        if table.create:
            wanted.append(tables.made_table(table))
            if table.table not in there:
                done += migration.created(wanted[-1])
        if table.table in there:
            done += migration.keyed(table, live(table.table))
    for one in wanted:
        in_turn()
        if print_to is None or one.name in there:
            done += migration.completed(one, live(one.name))
        elif one.name in own:  # only printed: not there to be looked at
            done += migration.completed(one, migration.first_made(one))
    return done
