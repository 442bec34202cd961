"""Deliveries as Svix makes them: signed, and posted over real HTTP.

And what became of them, as seen from outside: in answers, tables, metrics and the log.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import io
import json
import os
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import urlsplit

import aiohttp
from asyncmy.errors import MySQLError
from prometheus_client.parser import text_string_to_metric_families

from clerk_sync import app
from clerk_sync.clerk import samples
from clerk_sync.database.connection import engine_of
from clerk_sync.mapping import loader
from clerk_sync.mapping import model as mappings
from clerk_sync.schema import migrate as ddl
from clerk_sync.settings import Secret, Settings
from tests.waiting import until
from tools import servers

PATH: Final = "/webhooks/clerk"


def secret_of(seed: str) -> str:
    """Make a signing secret of Clerk's form, the same for the same seed."""
    return "whsec_" + base64.b64encode(hashlib.sha256(seed.encode()).digest()).decode()


SECRET: Final = secret_of("tests")
OTHER_SECRET: Final = secret_of("somebody else")

Event = dict[str, Any]


def new_id() -> str:
    """Make a svix-id."""
    return f"msg_{secrets.token_hex(12)}"


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def signature(body: bytes, *, svix_id: str, sent_at: int | str, secret: str = SECRET) -> str:
    """Sign as Svix describes it, over any bytes, without Svix's own library."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = f"{svix_id}.{sent_at}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(key, signed, "sha256")).decode()


def signed(
    body: bytes,
    *,
    svix_id: str | None = None,
    sent_at: int | None = None,
    secret: str = SECRET,
    family: str = "svix",
) -> dict[str, str]:
    """Return the headers of one delivery of these bytes."""
    svix_id = svix_id or new_id()
    sent_at = int(time.time()) if sent_at is None else sent_at
    return {
        "content-type": "application/json",
        f"{family}-id": svix_id,
        f"{family}-timestamp": str(sent_at),
        f"{family}-signature": signature(body, svix_id=svix_id, sent_at=sent_at, secret=secret),
    }


def bytes_of(event: Event | bytes) -> bytes:
    if isinstance(event, bytes):
        return event
    # Half of a surrogate pair goes as JSON's own escape: no other way is left to it.
    return json.dumps(event, ensure_ascii=False).encode(errors="backslashreplace")


def event(
    type_: str, clerk_id: str, *, version: int | None = None, at_ms: int | None = None, **data: Any
) -> Event:
    """Make Clerk's event, with these fields in its object. `version` is `data.updated_at`."""
    made = samples.event(type_, clerk_id=clerk_id, now_ms=at_ms or now_ms())
    if version is not None:
        made["data"]["updated_at"] = version
    made["data"] |= data
    return made


@dataclass(frozen=True)
class Reply:
    """One answer over HTTP."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def outcome(self) -> str:
        return str(self.json["outcome"])

    @property
    def said(self) -> tuple[int, str, str | None]:
        """The status, the outcome and the reason."""
        return self.status, self.json["outcome"], self.json.get("reason")


@dataclass(frozen=True)
class At:
    """A service that runs at these two addresses, and the session that talks to it."""

    url: str
    internal_url: str
    http: aiohttp.ClientSession

    async def request(self, method: str, url: str, **options: Any) -> Reply:
        async with self.http.request(method, url, **options) as response:
            return Reply(response.status, response.headers, await response.text())

    async def post(
        self,
        event: Event | bytes,
        *,
        svix_id: str | None = None,
        path: str = PATH,
        **how: Any,
    ) -> Reply:
        """Sign and deliver; `how` is for `signed`."""
        body = bytes_of(event)
        headers = signed(body, svix_id=svix_id, **how)
        # Of bytes as such aiohttp warns when they are many.
        return await self.request("POST", self.url + path, data=io.BytesIO(body), headers=headers)

    async def until_taken(self, event: Event, *, seconds: float) -> Reply:
        """Deliver until it gets 2xx: a moment may pass until trouble is known to be over."""
        svix_id = new_id()
        reply: Reply = await until(
            lambda: self.post(event, svix_id=svix_id), lambda r: r.status == 200, seconds=seconds
        )
        return reply

    async def inside(self, path: str, **options: Any) -> Reply:
        """GET from the internal listener."""
        return await self.request("GET", self.internal_url + path, **options)

    async def metrics(self) -> Metrics:
        reply = await self.inside("/metrics")
        return Metrics(
            {
                (sample.name, frozenset(sample.labels.items())): sample.value
                for family in text_string_to_metric_families(reply.text)
                for sample in family.samples
            }
        )

    async def until_ready(self, ready: bool = True, *, seconds: float = 10) -> Reply:  # noqa: FBT001, FBT002
        """Wait until `/readyz` says so."""
        reply: Reply = await until(
            lambda: self.inside("/readyz"), lambda r: (r.status == 200) == ready, seconds=seconds
        )
        return reply


@dataclass(frozen=True)
class Metrics:
    """One scrape."""

    samples: Mapping[tuple[str, frozenset[tuple[str, str]]], float] = field(repr=False)

    def __call__(self, name: str, **labels: str) -> float:
        """Return the value of one series, which has to be there."""
        return self.samples[f"clerk_sync_{name}", frozenset(labels.items())]

    def grown_since(self, before: Metrics, *, but: Iterable[str] = ()) -> dict[str, float]:
        """Return the counters that moved, as `name{label=value}` without the common prefix."""
        grown = {}
        for (name, labels), value in self.samples.items():
            short = name.removeprefix("clerk_sync_")
            if not name.startswith("clerk_sync_") or not name.endswith("_total") or short in but:
                continue
            moved = value - before.samples[name, labels]
            if moved:
                inner = ",".join(f"{key}={text}" for key, text in sorted(labels))
                grown[short.removesuffix("_total") + (f"{{{inner}}}" if inner else "")] = moved
        return grown


def settings_of(database_url: str, **more: Any) -> Settings:
    """Make settings for this database, on free loopback ports; `more` by variables' names."""
    values: dict[str, Any] = {
        "DATABASE_URL": Secret("DATABASE_URL", value=database_url),
        "CLERK_WEBHOOK_SIGNING_SECRET": Secret("CLERK_WEBHOOK_SIGNING_SECRET", value=SECRET),
        "CLERK_SYNC_HOST": "127.0.0.1",
        "CLERK_SYNC_PORT": 0,
        "CLERK_SYNC_INTERNAL_PORT": 0,
        "CLERK_SYNC_DEADLINE_SECONDS": 3,
        **more,
    }
    return Settings(**{name: value for name, value in values.items() if value is not None})


_embedded: Final[list[str]] = []


async def migrate(database_url: str, mapping: mappings.Mapping | None = None) -> None:
    """Do what the command `migrate` does; for a new embedded database, copy what it did once."""
    path = database_url.removeprefix("sqlite:///")
    copied = mapping is None and path != database_url and not os.path.exists(path)  # noqa: ASYNC240, PTH110
    if copied and _embedded:
        shutil.copy(_embedded[0], path)
        return
    engine = engine_of(settings_of(database_url).locate, size=1)
    try:
        await ddl.migrate(engine, mapping or loader.load("mirror"))
    finally:
        await engine.dispose()
    if copied:
        _embedded.append(shutil.copy(path, tempfile.mkdtemp(prefix="clerk-sync-")))


@contextlib.asynccontextmanager
async def talking_to(url: str, internal_url: str) -> AsyncIterator[At]:
    """Open a session with as many connections as are asked for."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=30)
    ) as http:
        yield At(url, internal_url, http)


@contextlib.asynccontextmanager
async def serving(settings: Settings, mapping: mappings.Mapping | None = None) -> AsyncIterator[At]:
    """Run the service in this process, and a session that talks to it."""
    async with (
        app.running(settings, mapping or loader.load("mirror")) as running,
        talking_to(running.url, running.internal_url) as at,
    ):
        yield at


@contextlib.asynccontextmanager
async def served(
    database_url: str, mapping: mappings.Mapping | None = None, **more: Any
) -> AsyncIterator[At]:
    """Run the service on this database in this process, migrated and ready."""
    await migrate(database_url, mapping)
    async with serving(settings_of(database_url, **more), mapping) as at:
        await at.until_ready()
        yield at


async def rows(database_url: str, sql: str) -> list[tuple[Any, ...]]:
    """Read with a connection of its own, which sees what is committed and nothing else."""
    if database_url.startswith("sqlite"):
        path = database_url.removeprefix("sqlite:///")
        with contextlib.closing(sqlite3.connect(path, timeout=5)) as connection:
            found = connection.execute(sql).fetchall()
            connection.commit()
            return found
    return [tuple(row) for row in await servers.query(database_url, sql)]


async def ledger(database_url: str) -> dict[str, str]:
    """Return svix-id → outcome, as committed."""
    return dict(await rows(database_url, "SELECT svix_id, outcome FROM clerk_sync_events"))


class Process:
    """`clerk-sync serve` as a process of its own, with its log in a file.

    `prefix` is a program, with arguments, that becomes the one behind it.
    """

    def __init__(
        self, log: Path, environment: Mapping[str, str], *, prefix: Sequence[str] = ()
    ) -> None:
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        self._log = log
        self._environment = {
            **kept,
            "CLERK_WEBHOOK_SIGNING_SECRET": SECRET,
            "CLERK_SYNC_HOST": "127.0.0.1",
            "CLERK_SYNC_PORT": "0",
            "CLERK_SYNC_INTERNAL_PORT": "0",
            "CLERK_SYNC_DEADLINE_SECONDS": "3",
            "PYTHONPATH": os.pathsep.join(sys.path),
            **environment,
        }
        for name in [name for name in self._environment if f"{name}_FILE" in environment]:
            del self._environment[name]
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "clerk_sync", "serve"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    @property
    def log(self) -> str:
        return self._log.read_text(errors="surrogateescape")

    def lines(self) -> list[dict[str, Any]]:
        """Parse the log: each line has to be a JSON object."""
        return [json.loads(line) for line in self.log.splitlines()]

    async def listening(self) -> tuple[str, str]:
        """Wait until it listens, and return its two addresses."""

        async def look() -> list[dict[str, Any]]:
            if self.process.poll() is not None:
                raise AssertionError(f"ended at once:\n{self.log}")
            whole = self.log.rpartition("\n")[0].splitlines()
            return [line for line in map(json.loads, whole) if line["event"] == "listening"]

        found = await until(look, bool, seconds=60)
        return found[-1]["url"], found[-1]["internal_url"]

    async def ended(self, *, seconds: float) -> int:
        """Wait for the end; the exit code."""
        return await asyncio.to_thread(self.process.wait, seconds)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    @property
    def resident_mib(self) -> float:
        status = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(self.process.pid)],
            check=True,
            capture_output=True,
            text=True,
        )
        return int(status.stdout) / 1024

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@contextlib.asynccontextmanager
async def process(
    folder: Path, database_url: str | None = None, **environment: str
) -> AsyncIterator[tuple[Process, At]]:
    """Run the service as a process on this database."""
    if database_url is not None:
        environment["DATABASE_URL"] = database_url
    started = Process(folder / f"log-{secrets.token_hex(4)}", environment)
    try:
        async with talking_to(*await started.listening()) as at:
            yield started, at
    finally:
        started.close()


@dataclass(frozen=True)
class Sent:
    """One event under the one svix-id that it keeps over all attempts."""

    svix_id: str
    clerk_id: str
    turn: int
    event: Event


def histories(users: int, turns: int, *, prefix: str = "user_h") -> list[Sent]:
    """Make users' histories, one turn of all after the other; `first_name` tells the turn."""
    begin = now_ms() - 100_000
    made = [event(type_, prefix) for type_ in ("user.created", "user.updated")]
    sent = []
    for turn in range(turns):
        one = made[min(turn, 1)]
        for user in range(users):
            data = {
                **one["data"],
                "id": f"{prefix}{user:04d}",
                "username": f"{prefix}{user}",
                "first_name": f"turn {turn}",
                "updated_at": begin + turn,
            }
            whole = {**one, "timestamp": begin + turn, "data": data}
            sent.append(Sent(new_id(), data["id"], turn, whole))
    return sent


@dataclass
class Load:
    """Posters over keep-alive connections, each with one delivery in flight, as Svix is."""

    waiting: list[Sent]
    taken: dict[str, Sent] = field(default_factory=dict)
    untaken: list[Sent] = field(default_factory=list)
    statuses: list[int | None] = field(default_factory=list)
    slowest: float = 0.0
    stopped: bool = False

    async def run(self, at: At, *, posters: int = 32) -> Self:
        """Post all that waits; what gets no 2xx is kept for the next time."""
        await asyncio.gather(*(self._poster(at) for _ in range(posters)))
        return self

    async def _poster(self, at: At) -> None:
        while self.waiting and not self.stopped:
            sent = self.waiting.pop(0)
            started = time.perf_counter()
            status = None
            with contextlib.suppress(aiohttp.ClientError, OSError):
                status = (await at.post(sent.event, svix_id=sent.svix_id)).status
                self.slowest = max(self.slowest, time.perf_counter() - started)
            self.statuses.append(status)
            if status is not None and 200 <= status < 300:
                self.taken[sent.svix_id] = sent
            else:
                self.untaken.append(sent)
                await asyncio.sleep(0.01)

    async def sent_again(self, at: At) -> None:
        """Post all that got no 2xx, as often as it takes."""
        for _ in range(20):
            self.waiting, self.untaken, self.stopped = [*self.untaken, *self.waiting], [], False
            if not self.waiting:
                return
            await self.run(at)
            if self.untaken:
                await asyncio.sleep(0.5)
        raise AssertionError(f"{len(self.untaken)} events are still not taken")

    async def check(self, database_url: str) -> None:
        """Check that every event that got 2xx is in the ledger and in the tables."""
        recorded = await ledger(database_url)
        missing = self.taken.keys() - recorded.keys()
        assert not missing, f"{len(missing)} answered 2xx, but not in the ledger"
        there = await turns(database_url)
        for sent in self.taken.values():
            assert there.get(sent.clerk_id, -1) >= sent.turn


async def turns(database_url: str) -> dict[str, int]:
    """Return Clerk id → turn, from the users' table."""
    found = await rows(database_url, "SELECT clerk_id, first_name FROM clerk_users")
    return {clerk_id: int(name.split()[1]) for clerk_id, name in found}


async def patiently(work: Callable[[], Awaitable[Any]], *, seconds: float = 20) -> Any:
    """Do it again until the database is there."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return await work()
        except (OSError, EOFError, MySQLError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)


class Raw:
    """A connection on which any bytes may be sent at any pace."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, *pieces: bytes, pause: float = 0.0) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            if pause:
                await asyncio.sleep(pause)

    async def reply(self, *, seconds: float = 10) -> Reply | None:
        """Read one answer; None when the connection ends without."""
        try:
            async with asyncio.timeout(seconds):
                head = await self.reader.readuntil(b"\r\n\r\n")
                status, *lines = head.decode("latin-1").strip().split("\r\n")
                names = [line.partition(":") for line in lines]
                headers = {name.strip().lower(): value.strip() for name, _, value in names}
                body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return Reply(int(status.split()[1]), headers, body.decode("latin-1"))

    async def rest(self, *, seconds: float) -> bytes:
        """Read to the end of the connection."""
        async with asyncio.timeout(seconds):
            with contextlib.suppress(ConnectionError):
                return await self.reader.read()
        return b""


@contextlib.asynccontextmanager
async def raw(at: At) -> AsyncIterator[Raw]:
    """Connect to the public listener."""
    address = urlsplit(at.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        yield Raw(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def request(
    body: bytes,
    headers: Mapping[str, str] | Sequence[tuple[str, str]] | None = None,
    *,
    start: str = f"POST {PATH} HTTP/1.1",
    length: bool = True,
) -> bytes:
    """Write one request; signed, unless other headers are given."""
    given = signed(body) if headers is None else headers
    pairs = list(given.items()) if isinstance(given, Mapping) else list(given)
    if length:
        pairs.append(("content-length", str(len(body))))
    lines = [start, "host: test", *(f"{name}: {value}" for name, value in pairs)]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body
