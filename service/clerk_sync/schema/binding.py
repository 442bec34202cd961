"""The mapping bound to the live tables: a Store.

The tables themselves are checked, not a version number: a schema that came by a PlanetScale deploy
request brings tables and no rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clerk_sync.schema import reflection
from clerk_sync.schema.checks import SchemaMismatch, faults
from clerk_sync.store.sql import Compiler
from clerk_sync.store.store import Store
from clerk_sync.store.target import Target
from clerk_sync.store.values import BINARY, TextOfBytes

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.mapping.model import Mapping, TableMapping
    from clerk_sync.schema.reflection import Live


async def bind(engine: AsyncEngine, mapping: Mapping) -> Store:
    """Bind the mapping to the live tables. Raises SchemaMismatch or DatabaseUnavailable."""
    return store_of(mapping, await reflection.live_tables(engine, mapping))


def store_of(mapping: Mapping, live: Live) -> Store:
    """Bind the mapping to the live tables. Raises SchemaMismatch with every fault."""
    if found := faults(mapping, live):
        raise SchemaMismatch(found)
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
    """Make both the driver and SQLAlchemy read and write text in the mapped columns of bytes."""
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


def _owners(mapping: Mapping, table: TableMapping) -> list[tuple[str, str]]:
    """Return the kinds that own rows of this table, each with the column that says whose.

    Only where that column holds the owner's Clerk id, so that a row's values alone show whether its
    owner was deleted.
    """
    return [
        (owner.kind, owned.column)
        for owner in mapping.tables.values()
        for owned in owner.owns
        if owned.table == table.table and owned.references == owner.key
    ]
