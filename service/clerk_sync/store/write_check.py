"""Write checks: whether the database takes writes, and whether the account may do them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from clerk_sync.clock import now_utc
from clerk_sync.database.errors import translate_engine_errors
from clerk_sync.store.tables import entities

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine


async def check_writes(engine: AsyncEngine) -> None:
    """Make a write that changes nothing. Raises DatabaseUnavailable.

    After a failover the old primary still answers every SELECT. A server's full disk stops the
    server, or shows in its metrics. SQLite's only shows when pages are written.
    """
    none = entities.c.kind == ""
    nothing = sa.update(entities).where(none).values(synced_at=None)
    with translate_engine_errors():
        async with engine.connect() as connection:
            await connection.execute(nothing)
            if connection.dialect.name == "sqlite":
                now = now_utc()
                row = entities.insert().values(
                    kind="", clerk_id="", version_ms=0, event_ms=0, source="", synced_at=now
                )
                await connection.execute(row)
                await connection.execute(sa.delete(entities).where(none))
                await connection.commit()


async def check_privileges(engine: AsyncEngine) -> None:
    """Use every privilege that `serve` needs on one table. Raises DatabaseUnavailable.

    Privileges are mostly granted for a whole database.
    """
    none = entities.c.kind == ""
    rows = sa.select(entities).where(none)
    with translate_engine_errors():
        async with engine.connect() as connection:
            await connection.execute(sa.insert(entities).from_select(entities.c.keys(), rows))
            await connection.execute(sa.update(entities).where(none).values(synced_at=None))
            await connection.execute(sa.delete(entities).where(none))
