"""`make demo`: one user's whole story, on a real service of its own, without a second terminal.

The service runs as its own process on an SQLite database in a temporary folder. What is sent
goes over HTTP, signed as Clerk signs it. Exit code 1 if anything ends otherwise than it should.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import secrets
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from clerk_sync.clerk import samples, signature

USER: Final = "user_ada"
QUERY: Final = "SELECT clerk_id, username, full_name, updated_at FROM clerk_users"
PATH: Final = "/webhooks/clerk"
_START_SECONDS: Final = 15
_OURS: Final = ("CLERK_", "DATABASE_", "LOG_")

LOVELACE: Final = "Ada Lovelace"
KING: Final = "Ada King"


class Failed(Exception):
    """The service could not be shown; the message says what it wrote."""


@dataclass(frozen=True, slots=True)
class Post:
    """One event as Clerk would send it; it happened `ago` seconds before the demo's start."""

    svix_id: str
    type: str
    ago: int
    last_name: str | None = None
    forged: bool = False

    def body(self, start_ms: int) -> bytes:
        event = samples.event(self.type, clerk_id=USER, now_ms=start_ms - self.ago * 1000)
        if self.last_name is not None:
            event["data"]["last_name"] = self.last_name
        return json.dumps(event).encode()


@dataclass(frozen=True, slots=True)
class Scene:
    """What is told, what is sent, and how it has to end: the answer, and the name in the row."""

    told: str
    post: Post
    status: int
    answer: dict[str, str]
    name: str | None


_UPDATE: Final = Post("msg_2", "user.updated", ago=30, last_name="King")
SCENES: Final = (
    Scene(
        "Ada signs up.",
        Post("msg_1", "user.created", ago=50),
        200,
        {"outcome": "applied"},
        LOVELACE,
    ),
    Scene(
        "Ada changes her last name to King.",
        _UPDATE,
        200,
        {"outcome": "applied"},
        KING,
    ),
    Scene(
        "An update from before that was held up, and comes only now: it changes nothing.",
        Post("msg_3", "user.updated", ago=40, last_name="Byron"),
        200,
        {"outcome": "stale"},
        KING,
    ),
    Scene(
        "Clerk did not hear the answer to msg_2, and sends it again: known already.",
        _UPDATE,
        200,
        {"outcome": "duplicate"},
        KING,
    ),
    Scene(
        "Ada deletes her account: her row goes.",
        Post("msg_4", "user.deleted", ago=10),
        200,
        {"outcome": "applied"},
        None,
    ),
    Scene(
        "One more update from before the delete arrives: she stays deleted.",
        Post("msg_5", "user.updated", ago=20, last_name="Byron"),
        200,
        {"outcome": "stale"},
        None,
    ),
    Scene(
        "Somebody without the signing secret makes up an event: not taken.",
        Post("msg_6", "user.created", ago=0, last_name="Mallory", forged=True),
        401,
        {"outcome": "rejected", "reason": "wrong"},
        None,
    ),
)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="clerk-sync-demo-") as folder:
        try:
            return show(Path(folder))
        except Failed as error:
            print(f"\nThe demo could not run: {error}", file=sys.stderr)
            return 1


def show(folder: Path) -> int:
    """Play all scenes and print them; 1 if one of them ended otherwise than it should."""
    secret = new_secret()
    database = folder / "demo.db"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(_OURS)},
        "DATABASE_URL": f"sqlite:///{database}",
        "CLERK_WEBHOOK_SIGNING_SECRET": secret,
        "CLERK_SYNC_HOST": "127.0.0.1",
        "CLERK_SYNC_PORT": "0",
        "CLERK_SYNC_INTERNAL_PORT": "0",
        "LOG_FORMAT": "json",
    }
    migrate(environment)
    unexpected = 0
    with serving(environment, folder / "service.log") as url:
        print(f"clerk-sync listens on {url}{PATH}, and its tables are empty.")
        print("After each event that it is sent, this is what the app reads:\n")
        print(f"  {QUERY}\n")
        start_ms = time.time_ns() // 1_000_000
        for number, scene in enumerate(SCENES, start=1):
            key = new_secret() if scene.post.forged else secret
            status, answer = send(url, scene.post, scene.post.body(start_ms), key)
            rows = read(database, QUERY)
            print(f"{number}. {scene.told}")
            at = datetime.fromtimestamp(start_ms / 1000 - scene.post.ago, UTC)
            print(f"   sent      {scene.post.type} of {at:%H:%M:%S} as {scene.post.svix_id}")
            print(f"   answered  {status} {answer}")
            for row in rows or [("(none)",)]:
                print(f"   row       {'  '.join(map(shown, row))}")
            ends = status, json.loads(answer), [row[2] for row in rows]
            wanted = scene.status, scene.answer, [] if scene.name is None else [scene.name]
            if ends != wanted:
                unexpected += 1
                print(f"   UNEXPECTED: {wanted} was to be seen")
            print()
    told = read(database, "SELECT svix_id, type, outcome FROM clerk_sync_events ORDER BY svix_id")
    print("The ledger has each event that was taken, once:\n")
    print("  SELECT svix_id, type, outcome FROM clerk_sync_events\n")
    for svix_id, type_, outcome in told:
        print(f"   {svix_id}  {type_:<12}  {outcome}")
    if [row[0] for row in told] != [f"msg_{number}" for number in range(1, 6)]:
        unexpected += 1
        print("   UNEXPECTED: msg_1 to msg_5 were to be seen")
    if unexpected:
        print(f"\n{unexpected} of these ended otherwise than it should.", file=sys.stderr)
        return 1
    print("\nThe service has stopped, and its database is gone. Next:\n")
    print("  make run     keeps one running, for you to send events to")
    print("  README.md    says how to point Clerk, and your own tables, at it")
    return 0


def new_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(24)).decode()


def migrate(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "clerk_sync", "migrate"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Failed(f"`clerk-sync migrate` ended with {done.returncode}\n{done.stderr}")


@contextlib.contextmanager
def serving(environment: dict[str, str], log: Path) -> Iterator[str]:
    """Run `clerk-sync serve` on ports that are free; yields its URL. Raises Failed."""
    with log.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "clerk_sync", "serve"],
            env=environment,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        try:
            yield listening(process, log)
            process.terminate()
            if process.wait(10):
                raise Failed(f"the service ended with {process.returncode}\n{log.read_text()}")
        finally:
            process.kill()
            process.wait()


def listening(process: subprocess.Popen[bytes], log: Path) -> str:
    """The URL that the service's own log line names, once it does."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text().splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if event.get("event") == "listening":
                    return str(event["url"])
        time.sleep(0.02)
    raise Failed(f"the service did not start\n{log.read_text()}")


def send(url: str, post: Post, body: bytes, secret: str) -> tuple[int, str]:
    """Post one event, signed with the secret; the status and the answer."""
    sent_at = datetime.fromtimestamp(int(time.time()), UTC)
    (signer,) = signature.signers(secret)
    headers = {
        "Content-Type": "application/json",
        "svix-id": post.svix_id,
        "svix-timestamp": str(int(sent_at.timestamp())),
        "svix-signature": signer.sign(post.svix_id, sent_at, body.decode()),
    }
    with contextlib.closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)) as client:
        try:
            client.request("POST", PATH, body, headers)
            response = client.getresponse()
            return response.status, response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise Failed(f"{url}: {type(error).__name__}: {error}") from error


def read(database: Path, query: str) -> list[tuple[Any, ...]]:
    """Ask the database directly, as the app does."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute(query).fetchall()


def shown(value: object) -> str:
    """A column's text; of a time, no more than its seconds."""
    return str(value).partition(".")[0]


if __name__ == "__main__":
    sys.exit(main())
