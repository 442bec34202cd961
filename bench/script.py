"""The baseline of the walks: the script that people write to bring their users over.

Pages of 500, one after the other, each one statement and one commit. It keeps no state, so after
a crash it begins anew; it compares nothing, so it overwrites what a webhook wrote meanwhile; and
it does not notice who was deleted. Its table has the columns and indexes of clerk-sync's, and it
gets uvloop.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from typing import Any, Final

import aiohttp
import asyncmy
import uvloop

from bench.tutorial import connection

PAGE: Final = 500
COLUMNS: Final = (
    *("clerk_id", "username", "first_name", "last_name", "full_name", "email", "phone"),
    *("image_url", "external_id", "banned", "locked", "public_metadata"),
    *("last_sign_in_at", "created_at", "updated_at"),
)


def _time(milliseconds: int | None) -> datetime | None:
    return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, tz=UTC)


def _row(user: dict[str, Any]) -> tuple[Any, ...]:
    emails = {one["id"]: one["email_address"] for one in user["email_addresses"]}
    phones = {one["id"]: one["phone_number"] for one in user["phone_numbers"]}
    return (
        user["id"],
        user["username"],
        user["first_name"],
        user["last_name"],
        " ".join(filter(None, (user["first_name"], user["last_name"]))) or None,
        emails.get(user["primary_email_address_id"]),
        phones.get(user["primary_phone_number_id"]),
        user["image_url"],
        user["external_id"],
        user["banned"],
        user["locked"],
        json.dumps(user["public_metadata"]),
        _time(user["last_sign_in_at"]),
        _time(user["created_at"]),
        _time(user["updated_at"]),
    )


def _statement(version: str) -> str:
    # MySQL warns of VALUES(), which costs a round trip, and MariaDB has nothing else.
    alias, new = ("", "VALUES(%s)") if "MariaDB" in version else (" AS new", "new.%s")
    marks = ", ".join(["%s"] * len(COLUMNS))
    updates = ", ".join(f"{name} = {new % name}" for name in COLUMNS[1:])
    return (
        f"INSERT INTO clerk_users ({', '.join(COLUMNS)}) VALUES ({marks}){alias}"
        f" ON DUPLICATE KEY UPDATE {updates}"
    )


async def _main() -> None:
    url = f"{os.environ['CLERK_API_URL']}/users"
    headers = {"Authorization": f"Bearer {os.environ['CLERK_SECRET_KEY']}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        asyncmy.connect(**connection(os.environ["DATABASE_URL"])) as connected,
        connected.cursor() as cursor,
    ):
        await cursor.execute("SELECT VERSION()")
        statement = _statement((await cursor.fetchone())[0])
        offset = 0
        while True:
            query: dict[str, str | int] = {
                "limit": PAGE,
                "offset": offset,
                "order_by": "created_at",
            }
            async with session.get(url, params=query) as response:
                users = await response.json()
            if not users:
                return
            await cursor.executemany(statement, [_row(user) for user in users])
            offset += len(users)


if __name__ == "__main__":
    uvloop.run(_main())
