"""Read users with all columns of their rows, and the rows they own."""

from __future__ import annotations

import base64
import json
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from clerk_sync.database.errors import translate_engine_errors

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from clerk_sync.store.target import Target

LIMIT: Final = 30


async def named(engine: AsyncEngine, users: Target, username: str) -> dict[str, Any] | None:
    """Return the user of this name, with owned rows by their table's name; None if there is none.

    Raises LookupError when the mapping has no column for Clerk's `username`, and
    DatabaseUnavailable.
    """
    column = users.mapping.column_of("username")
    if column is None:
        raise LookupError("the mapping fills no column with `username`")
    query = _present(users).where(users.table.c[column] == username).limit(1)
    with translate_engine_errors():
        async with engine.connect() as connection:
            row = (await connection.execute(query)).mappings().first()
            if row is None:
                return None
            user: dict[str, Any] = dict(row)
            for owned, table in users.owned_tables:
                rows = await connection.execute(
                    sa.select(table).where(table.c[owned.column] == row[owned.references])
                )
                user[table.name] = [dict(one) for one in rows.mappings()]
            return user


async def identified(engine: AsyncEngine, users: Target, clerk_id: str) -> dict[str, Any] | None:
    """Return the user of this Clerk id, or None. Raises DatabaseUnavailable."""
    with translate_engine_errors():
        async with engine.connect() as connection:
            return await row_of(connection, users, clerk_id)


async def row_of(
    connection: AsyncConnection, target: Target, clerk_id: str
) -> dict[str, Any] | None:
    """Return the row of this Clerk id; None where there is none, or it is soft-deleted."""
    query = _present(target).where(target.table.c[target.mapping.key] == clerk_id)
    row = (await connection.execute(query)).mappings().first()
    return None if row is None else dict(row)


async def some(engine: AsyncEngine, users: Target) -> list[dict[str, Any]]:
    """Return at most LIMIT users. Raises DatabaseUnavailable."""
    with translate_engine_errors():
        async with engine.connect() as connection:
            rows = await connection.execute(_present(users).limit(LIMIT))
            return [dict(row) for row in rows.mappings()]


def _present(users: Target) -> sa.Select[Any]:
    query = sa.select(users.table).order_by(*users.table.primary_key.columns)
    mark = users.mapping.mark
    return query if mark is None else query.where(users.table.c[mark].is_(None))


def to_json(value: object) -> str:
    """Return the JSON of any value that a table may hold; times are UTC, bytes are base64."""
    text = json.dumps(value, default=_plain, ensure_ascii=False)
    # Half of a surrogate pair, as the app's own JSON may hold, has no UTF-8. This writes it as
    # `\\ud83d`, which is how JSON escapes it.
    return text.encode(errors="backslashreplace").decode()


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.replace(tzinfo=UTC).isoformat()
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value)
