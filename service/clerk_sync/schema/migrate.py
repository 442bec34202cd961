"""`migrate`: the only code that runs DDL, or prints it."""

from __future__ import annotations

import asyncio
import io
from typing import TYPE_CHECKING, Final

import sqlalchemy as sa
from asyncmy.errors import MySQLError

from clerk_sync.database.errors import Contention, DatabaseUnavailable, translate_engine_errors
from clerk_sync.schema import reflection
from clerk_sync.schema.reflection import TableNames
from clerk_sync.store import tables
from clerk_sync.store.lease import LeaseHeld, LeaseLost, held, holder_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.mapping.model import Mapping
    from clerk_sync.store.lease import Lease

VERSION_TABLE: Final = "clerk_sync_version"
LEASE: Final = "migrate"
_PATIENCE_SECONDS: Final = 120
_PAUSE_SECONDS: Final = 0.2
_ATTEMPTS: Final = 5
# Somebody else has just made that table, column or index: as by the statement of a process that
# was killed, which its server ends all the same.
_MADE_MEANWHILE: Final = frozenset({1050, 1060, 1061})


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

    spelling = reflection.names_of(mapping)
    there = TableNames.there(connection)

    def live(name: str) -> sa.Table:
        actual = there.of(name) if name in there else name
        return reflection.reflected(connection, actual, spelling[name])

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
