"""The baseline: the well-known tutorial's function, in Python, as a service.

It does what that function does: one JSON body, one statement or three, each its own commit,
users found by username. `--as-published` is the function as the tutorial prints it: nothing
verified, no index besides the primary keys. Without it, the function gets what anyone
would add first: Svix's verification and an index on what it looks rows up by. Both get uvloop,
kept-open connections and a pool, which the function on its own has not.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

import asyncmy
import uvloop
from aiohttp import web
from svix.webhooks import Webhook, WebhookVerificationError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

EXISTING_USERS: Final = 10_000  # a modest app
_USERS: Final = """CREATE TABLE users (
  id bigint unsigned NOT NULL AUTO_INCREMENT PRIMARY KEY,
  username varchar(255), tagline varchar(255), display_name varchar(255), img_url varchar(500))"""
_BLOCKS: Final = """CREATE TABLE blocks (
  id bigint unsigned NOT NULL AUTO_INCREMENT PRIMARY KEY,
  url varchar(200), type int, user_id int, label varchar(200))"""


def connection(url: str) -> dict[str, Any]:
    """Arguments of asyncmy for a `mysql://` URL."""
    parts = urlsplit(url)
    return {
        "host": parts.hostname or "127.0.0.1",
        "port": parts.port or 3306,
        "user": unquote(parts.username or "root"),
        "password": unquote(parts.password or ""),
        "db": parts.path.strip("/") or None,
        "charset": "utf8mb4",
        "autocommit": True,
    }


async def prepare(url: str, *, as_published: bool) -> None:
    """Create the tutorial's tables and the users that the app already has, two blocks each."""
    async with asyncmy.connect(**connection(url)) as connected, connected.cursor() as cursor:
        await cursor.execute(_USERS)
        await cursor.execute(_BLOCKS)
        if not as_published:
            await cursor.execute("CREATE INDEX users_username ON users (username)")
            await cursor.execute("CREATE INDEX blocks_user_id ON blocks (user_id)")
        users = [
            (f"user{n}", f"User {n}", f"https://img.clerk.com/{n:0150}")
            for n in range(EXISTING_USERS)
        ]
        await cursor.executemany(
            "INSERT INTO users (username, display_name, img_url) VALUES (%s, %s, %s)", users
        )
        await cursor.execute(
            "INSERT INTO blocks (url, type, user_id, label)"
            " SELECT 'https://example.com', kind, users.id, 'Home'"
            " FROM users, (SELECT 1 AS kind UNION SELECT 2) AS kinds"
        )


class _Tutorial:
    def __init__(self, pool: Any, signer: Webhook | None) -> None:
        self._pool = pool
        self._signer = signer

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.read()
        if self._signer:
            try:
                self._signer.verify(body, dict(request.headers))
            except WebhookVerificationError:
                return web.Response(status=401)
        event = json.loads(body)
        user = event["data"]
        async with self._pool.acquire() as connected, connected.cursor() as cursor:
            match event["type"]:
                case "user.created":
                    await cursor.execute(
                        "INSERT INTO users (username, display_name, img_url) VALUES (%s, %s, %s)",
                        (user["username"], _display_name(user), user["image_url"]),
                    )
                case "user.updated":
                    await cursor.execute(
                        "UPDATE users SET display_name = %s, img_url = %s WHERE username = %s",
                        (_display_name(user), user["image_url"], user["username"]),
                    )
                case "user.deleted":
                    # Clerk's user.deleted carries no username, so the published function
                    # deletes nothing. The bench sends it one: it is to do its work here.
                    await cursor.execute(
                        "SELECT id FROM users WHERE username = %s", (user["username"],)
                    )
                    if found := await cursor.fetchone():
                        await cursor.execute("DELETE FROM users WHERE id = %s", found)
                        await cursor.execute("DELETE FROM blocks WHERE user_id = %s", found)
        return web.Response(text="ok")


def _display_name(user: dict[str, Any]) -> str:
    return f"{user['first_name']} {user['last_name']}"


async def _ready(_: web.Request) -> web.Response:
    return web.Response(text="ok")


async def _application(args: argparse.Namespace) -> web.Application:
    signer = None if args.as_published else Webhook(os.environ["CLERK_WEBHOOK_SIGNING_SECRET"])

    async def pooled(app: web.Application) -> AsyncIterator[None]:
        async with asyncmy.create_pool(
            minsize=args.pool, maxsize=args.pool, **connection(os.environ["DATABASE_URL"])
        ) as pool:
            app.router.add_post("/webhooks/clerk", _Tutorial(pool, signer).handle)
            yield

    app = web.Application()
    app.router.add_get("/readyz", _ready)
    app.cleanup_ctx.append(pooled)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tutorial", description=__doc__)
    parser.add_argument("--as-published", action="store_true")
    parser.add_argument("--pool", type=int, default=16, help="connections to the database")
    args = parser.parse_args()
    web.run_app(
        _application(args),
        host="127.0.0.1",
        port=int(os.environ["CLERK_SYNC_PORT"]),
        access_log=None,
        print=None,
        loop=uvloop.new_event_loop(),
    )


if __name__ == "__main__":
    main()
