"""The live schema: whether it is what clerk-sync and the mapping need, and making it so.

Only `migrate` runs DDL. `serve` looks at the tables themselves instead of a version number: a
schema that came by a PlanetScale deploy request brings tables, but no rows of a version table.
"""

from __future__ import annotations

import io
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from clerk_sync import tables
from clerk_sync.columns import Unfit, fit_for
from clerk_sync.database_errors import engine_errors_told
from clerk_sync.mapping import Mapping, Place, TableMapping
from clerk_sync.mapping_file import nearest
from clerk_sync.statements import Compiler
from clerk_sync.store import Store
from clerk_sync.targets import Target, unique_keys

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.ext.asyncio import AsyncEngine

VERSION_TABLE: Final = "clerk_sync_version"
_LOCK: Final = "clerk_sync_migrate"
_LOCK_SECONDS: Final = 120
RUN_MIGRATE: Final = "run `clerk-sync migrate` (or `clerk-sync migrate --print` for its SQL)"


class SchemaFaults(Exception):  # noqa: N818
    """The live schema is not what is needed: one message per fault."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(faults))


@dataclass(frozen=True, slots=True)
class Live:
    """The tables that matter, as they are; a missing one is absent."""

    tables: dict[str, sa.Table]
    dialect: sa.Dialect


async def bound(engine: AsyncEngine, mapping: Mapping) -> Store:
    """A Store on the live schema. Raises SchemaFaults, or Unavailable."""
    live = await _inspected(engine, _names(mapping))
    return store_of(mapping, live)


async def reflected(engine: AsyncEngine, mapping: Mapping) -> Live:
    """The live tables that the mapping names. Raises Unavailable."""
    return await _inspected(engine, _names(mapping))


async def own_faults(engine: AsyncEngine) -> list[str]:
    """What is missing of clerk-sync's own tables. Raises Unavailable."""
    return list(_own_faults(await _inspected(engine, set(tables.metadata.tables))))


def lacks_own(live: Live) -> bool:
    """Whether anything of clerk-sync's own tables is missing."""
    return any(_own_faults(live))


def store_of(mapping: Mapping, live: Live) -> Store:
    """Bind the mapping to the live tables. Raises SchemaFaults with every fault."""
    faults = [*_own_faults(live), *_mapping_faults(mapping, live)]
    if faults:
        raise SchemaFaults(faults)
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
        written = {table.key, table.mark, *(column.name for column in table.columns)}
        for other in there.columns:
            if not other.nullable and other.name not in written and not _filled(other):
                yield (
                    f"{table.at}: `{other.name}` of `{there.name}` may not be null, has no "
                    "default and is not mapped: every new row is refused"
                )
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


def _filled(column: sa.Column[Any]) -> bool:
    """Whether the database fills the column by itself."""
    automatic = column.primary_key and isinstance(column.type, sa.Integer)
    return column.server_default is not None or column.computed is not None or automatic


def _indexed(table: sa.Table, columns: set[str]) -> bool:
    first = [next(iter(index.columns)).name for index in table.indexes if index.columns]
    first += [column.name for column in list(table.primary_key.columns)[:1]]
    return bool(columns & set(first))


def _names(mapping: Mapping) -> set[str]:
    names = set(tables.metadata.tables)
    for table in mapping.tables.values():
        names |= {table.table, *(owned.table for owned in table.owns)}
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


async def _inspected(engine: AsyncEngine, names: set[str]) -> Live:
    def inspect(connection: sa.Connection) -> Live:
        there = set(sa.inspect(connection).get_table_names())
        metadata = sa.MetaData()
        found = {
            name: sa.Table(name, metadata, autoload_with=connection, resolve_fks=False)
            for name in sorted(names & there)
        }
        for table in found.values():
            _complete(connection, table)
        return Live(found, _spelling(connection))

    with engine_errors_told():
        async with engine.connect() as connection:
            return await connection.run_sync(inspect)


def _complete(connection: sa.Connection, table: sa.Table) -> None:
    """Add what SQLAlchemy's reflection leaves out: inline UNIQUEs, and inherited collations."""
    if connection.dialect.name == "sqlite":
        indexes = sa.inspect(connection).get_indexes(table.name, include_auto_indexes=True)
        for index in indexes:
            if index["unique"]:
                table.append_constraint(sa.UniqueConstraint(*filter(None, index["column_names"])))
        return
    collations = connection.exec_driver_sql(
        "SELECT column_name, collation_name FROM information_schema.columns"
        " WHERE table_schema = DATABASE() AND table_name = %s AND collation_name IS NOT NULL",
        (table.name,),
    )
    for column, collation in collations:
        type_ = table.c[column].type
        if isinstance(type_, sa.String):
            type_.collation = collation


def _spelling(connection: sa.Connection) -> sa.Dialect:
    """The dialect to compile for.

    SQLAlchemy writes `VALUES … AS new` for MySQL 8.0.20 and later; not every Vitess that calls
    itself that version understands it, while all understand `VALUES(column)`.
    """
    version = connection.dialect.server_version_info
    if connection.dialect.name != "sqlite":
        text = connection.exec_driver_sql("SELECT VERSION()").scalar_one()
        if version is None or "vitess" in str(text).lower():
            return mysql.asyncmy.dialect()
    return connection.dialect


def _own_faults(live: Live) -> Iterator[str]:
    for name, table in tables.metadata.tables.items():
        if name not in live.tables:
            yield f"table {name} is missing: {RUN_MIGRATE}"
        else:
            for column in sorted(set(table.c.keys()) - set(live.tables[name].c.keys())):
                yield f"{name} has no column {column}, it is older than this version: {RUN_MIGRATE}"


def _mapping_faults(mapping: Mapping, live: Live) -> Iterator[str]:
    for table in mapping.tables.values():
        there = live.tables.get(table.table)
        if there is None:
            hint = f": {RUN_MIGRATE}" if table.create else ": the app's own migrations make it"
            yield f"{table.places['table']}: table `{table.table}` is missing{hint}"
            continue
        yield from _key_faults(table, there)
        for column in (*table.columns, *table.adopt):
            hint = f": {RUN_MIGRATE}" if table.create else ""
            yield from _missing(there, column.name, column.at, hint)
        if table.mark:
            yield from _missing(there, table.mark, table.places["on_delete"])
            type_ = there.c[table.mark].type if table.mark in there.c else sa.DateTime()
            if not isinstance(type_, sa.DateTime):
                at = table.places["on_delete"]
                yield f"{at}: `{table.mark}` of `{there.name}` is {type_}: a mark needs a DATETIME"
        yield from _set_faults(table, there, sqlite=live.dialect.name == "sqlite")
        if table.adopt and len(there.primary_key.columns) != 1:
            yield f"{table.places['adopt']}: adopting needs a primary key of one column"
        for owned in table.owns:
            yield from _missing(there, owned.references, owned.at)
            other = live.tables.get(owned.table)
            if other is not None:
                yield from _missing(other, owned.column, owned.at)
                if owned.references == table.key and owned.column in other.c:
                    yield from _case_faults(other, owned.column, owned.at)
            elif owned.table not in {one.table for one in mapping.tables.values()}:
                yield f"{owned.at}: table `{owned.table}` is missing"


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
            except Unfit as error:
                yield (
                    f"{one.at}: `{one.name}` of `{there.name}` is {column.type}, which does not "
                    f"take {one.value!r}: {error.reason}"
                )


def _missing(table: sa.Table, column: str, at: Place, hint: str = "") -> Iterator[str]:
    if column not in table.c:
        hint = hint or nearest(column, table.c.keys())
        yield f"{at}: table `{table.name}` has no column `{column}`{hint}"


def _key_faults(table: TableMapping, there: sa.Table) -> Iterator[str]:
    at = table.places["key"]
    if table.key not in there.c:
        yield f"{at}: table `{there.name}` has no column `{table.key}`: {RUN_MIGRATE}"
        return
    if {table.key} not in unique_keys(there):
        yield (
            f"{at}: `{table.key}` of `{there.name}` must be unique by itself: "
            f"CREATE UNIQUE INDEX {there.name}_{table.key} ON {there.name} ({table.key})"
        )
    yield from _case_faults(there, table.key, at)


def _case_faults(table: sa.Table, column: str, at: Place) -> Iterator[str]:
    """A column of Clerk ids that takes two of them for one."""
    collation = getattr(table.c[column].type, "collation", None)
    if isinstance(collation, str) and collation.endswith("_ci"):
        yield (
            f"{at}: `{column}` of `{table.name}` compares by {collation}, but Clerk's ids are "
            f"case-sensitive: ALTER TABLE {table.name} MODIFY {column} "
            f"VARCHAR({tables.ID_LENGTH}) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
        )


async def migrate(engine: AsyncEngine, mapping: Mapping) -> list[str]:
    """Make clerk-sync's tables and those that the mapping asks for; what was done, in words.

    Several at once are safe: one works, the others wait and find nothing to do. Raises
    Unavailable.
    """

    def work(connection: sa.Connection) -> list[str]:
        with _alone(connection):
            return _migrated(connection, mapping, print_to=None)

    with engine_errors_told():
        async with engine.connect() as connection:
            done = await connection.run_sync(work)
            await connection.commit()
            return done


async def migration_sql(engine: AsyncEngine, mapping: Mapping) -> str:
    """The SQL that `migrate` would run now, for people who may not run it. Raises Unavailable."""
    out = io.StringIO()
    with engine_errors_told():
        async with engine.connect() as connection:
            await connection.run_sync(_migrated, mapping, print_to=out)
    return out.getvalue()


def _migrated(
    connection: sa.Connection, mapping: Mapping, *, print_to: io.StringIO | None
) -> list[str]:
    # Alembic is loaded by this command alone: `serve` starts a tenth of a second sooner.
    from clerk_sync.migrations import Migration  # noqa: PLC0415

    def live(name: str) -> sa.Table:
        return sa.Table(name, sa.MetaData(), autoload_with=connection, resolve_fks=False)

    there = set(sa.inspect(connection).get_table_names())
    own = tables.metadata.tables
    migration = Migration(connection, VERSION_TABLE, print_to)
    done = migration.own_tables(there)
    wanted = [*own.values()]
    for table in mapping.tables.values():
        if table.create:
            wanted.append(tables.made_table(table))
            if table.table not in there:
                done += migration.created(wanted[-1])
        if table.table in there:
            done += migration.keyed(table, live(table.table))
    for one in wanted:
        if print_to is None or one.name in there:
            done += migration.completed(one, live(one.name))
        elif one.name in own:  # only printed: not there to be looked at
            done += migration.indexed(one, there=set())
    return done


@contextmanager
def _alone(connection: sa.Connection) -> Iterator[None]:
    """Hold the migration lock: DDL is no transaction on MySQL, so a lock has to guard it."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(f"PRAGMA busy_timeout={_LOCK_SECONDS * 1000}")
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield
        return
    # Vitess knows GET_LOCK as a bare SELECT only.
    got = connection.exec_driver_sql(f"SELECT GET_LOCK('{_LOCK}', {_LOCK_SECONDS})").scalar()
    if got != 1:
        raise TimeoutError(f"another `clerk-sync migrate` has held its lock for {_LOCK_SECONDS} s")
    try:
        yield
    finally:
        connection.exec_driver_sql(f"SELECT RELEASE_LOCK('{_LOCK}')")
