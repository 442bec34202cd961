"""`migrate`: the only code that runs DDL, or prints it.

What is missing follows from comparing the live tables with the declared ones: clerk-sync's own, in
`store.tables`, and those that the mapping declares with `create: true`. No version is recorded.
Tables, columns and indexes are only ever added, so a schema that a newer version has extended, or
that is half done, needs no case of its own.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import sqlalchemy as sa
from asyncmy.constants import ER
from asyncmy.errors import MySQLError

from clerk_sync.database.errors import Contention, DatabaseUnavailable, translate_engine_errors
from clerk_sync.schema import reflection
from clerk_sync.schema.reflection import TableNames
from clerk_sync.store import tables
from clerk_sync.store.lease import LeaseHeld, LeaseLost, held, holder_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.mapping.model import Mapping
    from clerk_sync.store.lease import Lease

LEASE: Final = "migrate"
_PATIENCE_SECONDS: Final = 120
_PAUSE_SECONDS: Final = 0.2
_ATTEMPTS: Final = 5
# Another process has just added that table, column or index. The server finishes the statement of
# a client that was killed.
_ADDED_MEANWHILE: Final = frozenset({ER.TABLE_EXISTS_ERROR, ER.DUP_FIELDNAME, ER.DUP_KEYNAME})


@dataclass(frozen=True, slots=True)
class Step:
    """DDL that adds one missing thing; `done` says so in the past tense, for people.

    The statements are in the driver's spelling, where MySQL's double each `%`.
    """

    done: str
    statements: tuple[str, ...]


async def migrate(
    engine: AsyncEngine, mapping: Mapping, *, patience_seconds: float = _PATIENCE_SECONDS
) -> list[str]:
    """Create or extend clerk-sync's own tables and those that the mapping declares.

    Returns what was done, one sentence each. Several processes may migrate at once: one works, the
    others wait and find nothing to do. Needs two connections of the engine. Raises
    DatabaseUnavailable, also when the others take longer than `patience_seconds`.
    """
    if engine.dialect.name == "sqlite":
        return await _transaction(engine, lambda connection: _migrate_sqlite(connection, mapping))
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience_seconds
    attempts = 0
    while True:
        try:
            return await _migrate_under_lease(engine, mapping)
        except LeaseHeld as error:
            if loop.time() > deadline:
                raise DatabaseUnavailable(str(error)) from error
        # Another node of a cluster was faster, so that this one changed nothing; or the server
        # finished what a killed process had begun.
        except (Contention, LeaseLost, _AddedMeanwhile) as error:
            attempts += 1
            if attempts == _ATTEMPTS:
                raise DatabaseUnavailable(str(error)) from error
        await asyncio.sleep(_PAUSE_SECONDS)


async def migration_sql(engine: AsyncEngine, mapping: Mapping) -> str:
    """Return the SQL that `migrate` would run now, for an account that may not run it.

    Raises DatabaseUnavailable.
    """

    def printed(connection: sa.Connection) -> str:
        mysql = connection.dialect.name != "sqlite"
        return "".join(
            f"{statement.replace('%%', '%') if mysql else statement};\n\n"
            for step in missing(connection, mapping)
            for statement in step.statements
        )

    with translate_engine_errors():
        async with engine.connect() as connection:
            return await connection.run_sync(printed)


class _AddedMeanwhile(Exception):
    """Another process has added what this one was about to add."""


async def _transaction(
    engine: AsyncEngine, work: Callable[[sa.Connection], list[str]]
) -> list[str]:
    with translate_engine_errors():
        async with engine.connect() as connection:
            try:
                done = await connection.run_sync(work)
            except sa.exc.DBAPIError as error:
                if isinstance(error.orig, MySQLError) and error.orig.args[0] in _ADDED_MEANWHILE:
                    raise _AddedMeanwhile(str(error.orig)) from error
                raise
            await connection.commit()
            return done


async def _migrate_under_lease(engine: AsyncEngine, mapping: Mapping) -> list[str]:
    """Migrate under a lease: MySQL commits DDL at once, so that no transaction guards it.

    GET_LOCK would not do: a cluster of several writers cannot keep it, and Percona's refuses it.
    The table of leases is the only thing that is created without the lease. Raises LeaseHeld,
    Contention or LeaseLost.
    """

    def prepare(connection: sa.Connection) -> list[str]:
        if tables.leases.name in TableNames.there(connection):
            return []
        connection.execute(sa.schema.CreateTable(tables.leases, if_not_exists=True))
        return [f"created table {tables.leases.name}"]

    prepared = await _transaction(engine, prepare)
    async with held(engine, LEASE, holder_name(), patience=False) as lease:
        done = await _transaction(engine, lambda connection: _run(connection, mapping, lease))
    # Of several processes that did not see the table yet, the first to hold the lease reports it.
    return [*prepared, *done] if lease.token == 1 else done


def _migrate_sqlite(connection: sa.Connection, mapping: Mapping) -> list[str]:
    connection.exec_driver_sql(f"PRAGMA busy_timeout={_PATIENCE_SECONDS * 1000}")
    connection.exec_driver_sql("BEGIN IMMEDIATE")
    return _run(connection, mapping)


def _run(connection: sa.Connection, mapping: Mapping, lease: Lease | None = None) -> list[str]:
    """Run every step. Raises LeaseLost between two of them once another process has the lease."""
    done = []
    for step in missing(connection, mapping):
        for statement in step.statements:
            if lease is not None:
                lease.check()
            connection.exec_driver_sql(statement)
        done.append(step.done)
    return done


def missing(connection: sa.Connection, mapping: Mapping) -> Iterator[Step]:
    """Yield what the live schema lacks, table by table, each compared when its turn comes."""
    spelling = reflection.names_of(mapping)
    names = TableNames.there(connection)
    dialect = connection.dialect

    def live(name: str) -> sa.Table | None:
        if name not in names:
            return None
        return reflection.reflected(connection, names.of(name), spelling[name])

    for declared in tables.metadata.tables.values():
        yield from _declared(declared, live(declared.name), dialect)
    for table in mapping.tables.values():
        found = live(table.table)
        if found is not None:
            yield from _key(table.key, found, dialect)
        if table.create:
            yield from _declared(tables.made_table(table), found, dialect, key=table.key)


def _declared(
    declared: sa.Table, live: sa.Table | None, dialect: sa.Dialect, *, key: str | None = None
) -> Iterator[Step]:
    """Yield the steps from a live table, or none, to the declared one.

    A column that is added takes null, as the rows before it have no value. `key` is not added: it
    is `_key`'s.
    """
    indexes = sorted(declared.indexes, key=lambda index: str(index.name))
    if live is None:
        create = _compiled(sa.schema.CreateTable(declared), dialect)
        index = [_compiled(sa.schema.CreateIndex(one), dialect) for one in indexes]
        yield Step(f"created table {declared.name}", (create, *index))
        return
    table = dialect.identifier_preparer.quote(live.name)
    for column in declared.columns:
        if column.name not in live.c and column.name != key:
            added = _compiled(sa.schema.CreateColumn(sa.Column(column.name, column.type)), dialect)
            yield Step(
                f"added column {live.name}.{column.name}",
                (f"ALTER TABLE {table} ADD COLUMN {added}",),
            )
    there = {str(index.name).lower() for index in live.indexes}  # case makes no other name of it
    for one in indexes:
        if str(one.name).lower() not in there:
            create = _compiled(sa.schema.CreateIndex(one), dialect)
            yield Step(f"added index {one.name}", (create,))


def _key(key: str, live: sa.Table, dialect: sa.Dialect) -> Iterator[Step]:
    """Add the key column to a table of the app's: unique, and null in the rows before it."""
    # Names that differ by case alone are one to the database.
    if key.lower() in {column.name.lower() for column in live.columns}:
        return
    quote = dialect.identifier_preparer.quote
    table, column, index = quote(live.name), quote(key), quote(f"{live.name}_{key}")
    type_ = tables.key_type().compile(dialect)
    add = f"ALTER TABLE {table} ADD COLUMN {column} {type_}"
    if dialect.name == "sqlite":
        statements: tuple[str, ...] = (add, f"CREATE UNIQUE INDEX {index} ON {table} ({column})")
    else:  # one statement, so that it is there whole or not at all
        statements = (f"{add} NULL, ADD UNIQUE INDEX {index} ({column})",)
    yield Step(f"added column {live.name}.{key}", statements)


def _compiled(ddl: sa.ClauseElement, dialect: sa.Dialect) -> str:
    return str(ddl.compile(dialect=dialect)).replace("\t", "    ").strip()
