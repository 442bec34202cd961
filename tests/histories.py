"""Clerk's events as Changes, and a real database to apply them to: what several tests share."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, Final, Self

from clerk_sync.clerk.metrics import new_metrics
from clerk_sync.clerk.signature import Delivery
from clerk_sync.database.connection import connect, engine_of
from clerk_sync.database.errors import Contention, RejectedByDatabase, SchemaChanged
from clerk_sync.database.url import target_of
from clerk_sync.mapping import loader
from clerk_sync.mapping.change import Change, Upsert
from clerk_sync.mapping.ingest import change_of
from clerk_sync.schema.binding import bind
from clerk_sync.store import tables
from clerk_sync.store.committer import Committer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.database.connection import Connection, Result, Step
    from clerk_sync.mapping.model import Mapping
    from clerk_sync.outcomes import Answer
    from clerk_sync.store.store import Store

T0: Final = 1_700_000_000_000
NOW: Final = T0 + 90_000_000
OWN: Final = tuple(tables.metadata.tables)


def at(moment: int) -> int:
    """Unix milliseconds of the moment-th second of every history here."""
    return T0 + moment * 1000


def mapped(text: str) -> Mapping:
    return loader.read(text, source="test.yaml")


class Clerk:
    """Says what Clerk would say, as Changes of one mapping; every event has a svix-id of its own.

    `version` is `data.updated_at`, `event` the envelope's time, both as moments of `at`.
    """

    def __init__(self, mapping: Mapping) -> None:
        self.mapping = mapping
        self._ids = count(1)

    def event(
        self, type_: str, data: dict[str, Any], *, event: int, svix_id: str | None = None
    ) -> Change:
        body = json.dumps({"type": type_, "timestamp": at(event), "data": data})
        delivery = Delivery(svix_id or f"msg_{next(self._ids):06}", at(event) // 1000, body)
        return change_of(delivery, self.mapping, instance_id=None)

    def save(
        self,
        kind: str,
        clerk_id: str,
        version: int = 1,
        event: int | None = None,
        svix_id: str | None = None,
        **fields: Any,
    ) -> Change:
        data = {"id": clerk_id, "updated_at": at(version), **fields}
        moment = version if event is None else event
        return self.event(f"{kind}.updated", data, event=moment, svix_id=svix_id)

    def user(self, clerk_id: str, version: int = 1, **fields: Any) -> Change:
        return self.save("user", clerk_id, version, **fields)

    def membership(
        self, clerk_id: str, user: str, organization: str, version: int = 1, **fields: Any
    ) -> Change:
        fields |= {"organization": {"id": organization}, "public_user_data": {"user_id": user}}
        return self.save("organizationMembership", clerk_id, version, **fields)

    def deleted(
        self, clerk_id: str, event: int = 9, *, kind: str = "user", svix_id: str | None = None
    ) -> Change:
        data = {"id": clerk_id, "deleted": True}
        return self.event(f"{kind}.deleted", data, event=event, svix_id=svix_id)


def upsert_of(change: Change) -> Upsert:
    assert isinstance(change.effect, Upsert)
    return change.effect


def told(answers: Iterable[Answer]) -> list[str]:
    """The answers as short words: `applied`, `quarantined: too_long`."""
    return [": ".join(filter(None, (answer.outcome, answer.reason))) for answer in answers]


@dataclass
class Database:
    """One database as the app sees it, and connections to it as clerk-sync makes them."""

    url: str
    engine: AsyncEngine
    connections: list[Connection] = field(default_factory=list)

    @classmethod
    @asynccontextmanager
    async def at(cls, url: str) -> AsyncIterator[Self]:
        target = target_of(url)
        database = cls(url, engine_of(lambda: target, size=8))
        try:
            yield database
        finally:
            for connection in database.connections:
                connection.close()
            await database.engine.dispose()

    @property
    def sqlite(self) -> bool:
        return self.url.startswith("sqlite")

    async def connect(self, seconds: float = 10) -> Connection:
        connection = await connect(target_of(self.url), seconds=seconds)
        self.connections.append(connection)
        return connection

    async def execute(self, *statements: str) -> None:
        async with self.engine.begin() as connection:
            for statement in statements:
                await connection.exec_driver_sql(statement)

    async def rows(self, query: str) -> list[tuple[Any, ...]]:
        async with self.engine.connect() as connection:
            return [tuple(row) for row in await connection.exec_driver_sql(query)]

    async def value(self, query: str) -> Any:
        ((value,),) = await self.rows(query)
        return value

    async def ddl(self, *statements: str) -> None:
        """Run DDL in whose text these words stand for what only MySQL's family has."""
        words = {
            "SERIAL": "BIGINT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY",
            "EXACT": "CHARACTER SET utf8mb4 COLLATE utf8mb4_bin",
            "NARROW": "CHARACTER SET utf8mb3",  # MySQL's old `utf8`, without emoji
            "LATIN": "CHARACTER SET latin1",
            "OPTIONS": "ENGINE=InnoDB DEFAULT CHARSET=utf8mb4",
        }
        if self.sqlite:
            words = dict.fromkeys(words, "") | {"SERIAL": "INTEGER PRIMARY KEY"}
        for statement in statements:
            await self.execute(re.sub("|".join(words), lambda word: words[word[0]], statement))

    async def empty(self, *names: str) -> None:
        await self.execute(*(f"DELETE FROM {name}" for name in (*OWN, *names)))

    async def store(self, mapping: Mapping) -> Store:
        return await bind(self.engine, mapping)

    async def apply(
        self,
        store: Store,
        *changes: Change,
        connection: Connection | None = None,
        now_ms: int = NOW,
    ) -> list[str]:
        """Apply the changes as one batch, again while another transaction is in the way."""
        if connection is None:
            if not self.connections:
                await self.connect()
            connection = self.connections[0]
        while True:
            try:
                return told(await store.apply(connection, changes, now_ms=now_ms))
            except Contention:
                await connection.rollback()
            except Exception:
                await connection.rollback()
                raise

    async def outcomes(self) -> dict[str, str]:
        return dict(await self.rows("SELECT svix_id, outcome FROM clerk_sync_events"))

    async def quarantined(self) -> dict[str, str]:
        return dict(await self.rows("SELECT svix_id, reason FROM clerk_sync_quarantine"))

    async def snapshot(self, *names: str) -> dict[str, list[str]]:
        """What a reader sees: these tables, the state without its times of writing, the ids."""
        queries = {name: f"SELECT * FROM {name}" for name in names} | {
            "state": "SELECT kind, clerk_id, version_ms, event_ms, source, deleted_at"
            " FROM clerk_sync_entities",
            "ledger": "SELECT svix_id FROM clerk_sync_events",
        }
        return {what: sorted(map(repr, await self.rows(text))) for what, text in queries.items()}


class Committing:
    """A real Committer on a database, with what it counts."""

    def __init__(self, database: Database, store: Store | None, **options: Any) -> None:
        self.metrics = new_metrics()
        self.seconds = options.pop("seconds", 5)
        target = target_of(database.url)
        opened = options.pop("connect", lambda: connect(target, seconds=self.seconds))
        limits = {"writers": 1, "batch_limit": 256, "queue_limit": 1000, **options}
        self.committer = Committer(opened, metrics=self.metrics, **limits)
        if store is not None:
            self.committer.resume(store)

    async def __aenter__(self) -> Self:
        self.committer.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.committer.close()

    async def commit(self, *changes: Change) -> list[str]:
        """Hand all changes in at once, in order, and wait for every answer."""
        return told(await asyncio.gather(*map(self.committer.commit, changes)))

    def counted(self, name: str) -> float:
        return self.metrics.registry.get_sample_value(name) or 0

    @property
    def transactions(self) -> float:
        return self.counted("clerk_sync_batch_events_count")


class Halting:
    """A real connection that waits between deciding and writing until it is told to go on."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._trips = 0
        self.decided = asyncio.Event()
        self.go_on = asyncio.Event()

    async def run(self, steps: Sequence[Step]) -> list[Result]:
        if self._trips == 1:
            self.decided.set()
            await self.go_on.wait()
        self._trips += 1
        return await self._connection.run(steps)

    async def try_each(
        self, steps: Sequence[Step]
    ) -> dict[int, RejectedByDatabase | SchemaChanged]:
        return await self._connection.try_each(steps)

    async def rollback(self) -> None:
        await self._connection.rollback()

    def close(self) -> None:
        self._connection.close()
