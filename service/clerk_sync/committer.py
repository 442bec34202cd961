"""Group commit: concurrent deliveries share one transaction, and one fsync.

Changes wait in one bounded queue; a few writers, each owning one connection, take whatever
waits and commit it together. There is no artificial delay: under light load a batch is one
event. A batch that the database refuses is halved until the bad event stands alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import stamina
import structlog

from clerk_sync.answers import Answer, Outcome, Reason
from clerk_sync.database import Connection
from clerk_sync.database_errors import Contention, LockWait, Refused, SchemaChanged, Unavailable
from clerk_sync.store import Fenced, quarantined

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clerk_sync.mapping import Change
    from clerk_sync.metrics import Metrics
    from clerk_sync.store import Store
    from clerk_sync.tracing import Trace

log = structlog.get_logger()

# A batch is two packets to the server, whose limit may be MariaDB's 16 MiB.
BATCH_CHARACTERS: Final = 2_000_000
# Svix sends up to 1 MiB: by count alone, a full queue could take a pod's whole memory.
QUEUE_CHARACTERS: Final = 32_000_000
CONTENTION_ATTEMPTS: Final = 8
CONTENTION_SECONDS: Final = 5.0
# How long a database that was just found away is taken to be away without asking again.
AWAY_SECONDS: Final = 1.0
# A connection older than this is replaced: PlanetScale cuts them after a day, and a rotated
# password is taken up by then at the latest.
CONNECTION_SECONDS: Final = 3600.0

Connect = Callable[[], Awaitable[Connection]]


class _Together:
    """One answer of several that are waited for together: a future for each would cost more."""

    __slots__ = ("_answers", "_place")

    def __init__(self, answers: _Answers, place: int) -> None:
        self._answers = answers
        self._place = place

    def done(self) -> bool:
        return self._answers.all.done() or self._answers.known[self._place] is not None

    def set_result(self, answer: Answer) -> None:
        self._answers.known[self._place] = answer
        self._answers.missing -= 1
        if not self._answers.missing:
            self._answers.all.set_result(None)


class _Answers:
    def __init__(self, number: int) -> None:
        self.known: list[Answer | None] = [None] * number
        self.missing = number
        self.all: asyncio.Future[None] = asyncio.get_running_loop().create_future()


@dataclass(slots=True)
class _Entry:
    change: Change
    answer: asyncio.Future[Answer] | _Together
    trace: Trace | None = None


@dataclass(frozen=True, slots=True)
class _Session:
    connection: Connection
    opened: float


class Committer:
    """The queue and its writers. `store` is None until the schema is known to be right."""

    def __init__(
        self,
        connect: Connect,
        *,
        metrics: Metrics,
        writers: int,
        batch_limit: int,
        queue_limit: int,
    ) -> None:
        self.store: Store | None = None
        # What to answer while there is none.
        self.storeless = Reason.DATABASE
        # Set when the schema or the database turns out not to be there, for who looks after them.
        self.trouble = asyncio.Event()
        self.doubtful = False
        # Set when the store's lease turned out to be somebody else's: nothing is written any more.
        self.fenced = False
        self._connect = connect
        self._metrics = metrics
        self._writers = writers
        self._batch_limit = batch_limit
        self._queue: asyncio.Queue[_Entry | None] = asyncio.Queue()
        self._queue_limit = queue_limit
        self._closed = False
        self._characters = 0
        self._away_until = 0.0
        self._sessions = 0
        self._tasks: list[asyncio.Task[None]] = []
        metrics.queue_limit.set(queue_limit)
        metrics.queue_depth.set_function(self._queue.qsize)
        metrics.writer_connections.set_function(lambda: self._sessions)

    def start(self) -> None:
        """Start the writers."""
        self._tasks = [asyncio.create_task(self._write()) for _ in range(self._writers)]

    async def close(self) -> None:
        """Commit what waits, then stop the writers and close their connections."""
        self._closed = True
        for _ in self._tasks:
            self._queue.put_nowait(None)
        await asyncio.gather(*self._tasks)

    async def commit(self, change: Change, trace: Trace | None = None) -> Answer:
        """The change's answer, once it is committed or cannot be.

        When the caller is cancelled, a change that still waits is dropped; one that is being
        written may be committed all the same, and is then known when it is sent again.
        """
        if (refusal := self._refusal()) is not None:
            return refusal
        characters = len(change.payload or "")
        if (
            self._queue.qsize() >= self._queue_limit
            or self._characters + characters > QUEUE_CHARACTERS
        ):
            return Answer(Outcome.UNAVAILABLE, Reason.QUEUE_FULL)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._characters += characters
        self._queue.put_nowait(_Entry(change, answer, trace))
        if trace is not None:
            trace.queued()
        try:
            return await answer
        finally:
            self._characters -= characters

    async def commit_all(self, changes: Sequence[Change]) -> list[Answer]:
        """The changes' answers, in order. For facts from Clerk's API, which have no payload."""
        if not changes:
            return []
        refusal = self._refusal()
        if refusal is None and self._queue.qsize() + len(changes) > self._queue_limit:
            refusal = Answer(Outcome.UNAVAILABLE, Reason.QUEUE_FULL)
        if refusal is not None:
            return [refusal] * len(changes)
        answers = _Answers(len(changes))
        for place, change in enumerate(changes):
            self._queue.put_nowait(_Entry(change, _Together(answers, place)))
        await answers.all
        return [answer for answer in answers.known if answer is not None]

    def _refusal(self) -> Answer | None:
        """What to answer at once, while nothing can be committed."""
        if self._closed:
            return Answer(Outcome.UNAVAILABLE, Reason.DRAINING)
        if self.store is None:
            return Answer(Outcome.UNAVAILABLE, self.storeless)
        if time.monotonic() < self._away_until:
            return Answer(Outcome.UNAVAILABLE, Reason.DATABASE)
        return None

    def back(self) -> None:
        """The database answers again: try it at once."""
        self._away_until = 0.0

    async def _take(self) -> list[_Entry] | None:
        """All that waits, up to the limits; None when it is time to stop."""
        entry = await self._queue.get()
        batch: list[_Entry] = []
        characters = 0
        while entry is not None:
            if not entry.answer.done():
                batch.append(entry)
                characters += len(entry.change.payload or "")
            if (
                self._queue.empty()
                or len(batch) >= self._batch_limit
                or characters >= BATCH_CHARACTERS
            ):
                return batch
            entry = self._queue.get_nowait()
        if batch:
            self._queue.put_nowait(None)  # the other writers', or ours for the next time
            return batch
        return None

    async def _write(self) -> None:
        session: _Session | None = None
        while (batch := await self._take()) is not None:
            if batch:
                session = await self._settle(session, batch)
        if session is not None:
            self._drop(session)

    async def _settle(self, session: _Session | None, batch: list[_Entry]) -> _Session | None:
        """Answer the whole batch; the session to go on with, if it is still good."""
        answer = Answer(Outcome.UNAVAILABLE, Reason.DATABASE)
        for entry in batch:
            if entry.trace is not None:
                entry.trace.taken()
        old, session = session, None
        try:
            session = await self._session(old)
            await self._commit(session.connection, batch)
        except Fenced:
            self.fenced = True
        except Unavailable as error:
            waiting = [entry for entry in batch if not entry.answer.done()]
            if session and session is old and waiting and not isinstance(error, Contention):
                # It may have been cut while it lay idle: once more, on a new one.
                self._drop(session)
                return await self._settle(None, waiting)
            log.error("database_unavailable", error=str(error), queue_depth=self._queue.qsize())
            self.trouble.set()
            if session is None and not self._sessions:
                self._away_until = time.monotonic() + AWAY_SECONDS
                batch += self._waiting()
        except Refused as error:
            # Not even the quarantine is taken: our own tables are not what they should be.
            log.error("schema_changed", error=str(error))
            self._doubt()
            answer = Answer(Outcome.UNAVAILABLE, Reason.SCHEMA)
        except Exception:
            log.exception("defect")
            answer = Answer(Outcome.ERROR, Reason.INTERNAL)
        else:
            return session
        if session is not None:
            self._drop(session)
        for entry in batch:
            _resolve(entry, answer)
        return None

    async def _session(self, session: _Session | None) -> _Session:
        if session is not None:
            if time.monotonic() - session.opened < CONNECTION_SECONDS:
                return session
            self._drop(session)
        session = _Session(await self._connect(), time.monotonic())
        self._sessions += 1
        return session

    def _drop(self, session: _Session) -> None:
        session.connection.close()
        self._sessions -= 1

    def _doubt(self) -> None:
        """Have the schema looked at again, now."""
        self.doubtful = True
        self.trouble.set()

    def _waiting(self) -> list[_Entry]:
        """Take everything out of the queue but the signs to stop."""
        entries = [self._queue.get_nowait() for _ in range(self._queue.qsize())]
        for _ in range(entries.count(None)):
            self._queue.put_nowait(None)
        return [entry for entry in entries if entry is not None]

    async def _commit(self, connection: Connection, batch: list[_Entry]) -> None:
        """Commit and answer the batch, taken apart until what fails stands alone."""
        changes = [entry.change for entry in batch]
        exemplar = next((entry.trace.exemplar for entry in batch if entry.trace is not None), None)
        try:
            answers = await self._applied(connection, changes, exemplar)
        except LockWait as error:
            await connection.rollback()
            if len(batch) > 1:
                # One by one at once: each part with the locked row in it waits its full time.
                for entry in batch:
                    await self._commit(connection, [entry])
                return
            log.warning("row_locked", svix_id=changes[0].delivery_id, error=str(error))
            answers = [Answer(Outcome.UNAVAILABLE, Reason.DATABASE)]
        except Exception as error:
            if isinstance(error, Unavailable) and not isinstance(error, SchemaChanged):
                raise
            await connection.rollback()
            if len(batch) > 1:
                middle = len(batch) // 2
                await self._commit(connection, batch[:middle])
                await self._commit(connection, batch[middle:])
                return
            answers = [await self._failed(connection, changes[0], error)]
        for entry, answer in zip(batch, answers, strict=True):
            if entry.trace is not None:
                entry.trace.settled(len(batch))
            _resolve(entry, answer)

    async def _failed(self, connection: Connection, change: Change, error: Exception) -> Answer:
        """The answer to a change that failed all alone."""
        about = {
            "svix_id": change.delivery_id,
            "type": change.type,
            "clerk_id": change.clerk_id,
            "error": str(error),
        }
        if isinstance(error, SchemaChanged):
            log.error("schema_changed", **about)
            self._doubt()
            return Answer(Outcome.UNAVAILABLE, Reason.SCHEMA)
        if not isinstance(error, Refused):
            log.error("defect", svix_id=change.delivery_id, exc_info=error)
            return Answer(Outcome.ERROR, Reason.INTERNAL)
        if error.reason is None:
            log.error("refused", **about)
            return Answer(Outcome.UNAVAILABLE, Reason.DATABASE)
        log.warning("refused", reason=error.reason.value, **about)
        kept = quarantined(change, error.reason, str(error))
        try:
            (answer,) = await self._applied(connection, [kept])
        except Refused:
            # Larger than the server takes, perhaps: then without the payload.
            await connection.rollback()
            (answer,) = await self._applied(connection, [replace(kept, payload=None)])
        return answer

    async def _applied(
        self,
        connection: Connection,
        changes: list[Change],
        exemplar: dict[str, str] | None = None,
    ) -> list[Answer]:
        """Apply the changes as one transaction, again while others are in its way."""
        try:
            return await self._apply(connection, changes, exemplar)
        except Contention:
            async for attempt in stamina.retry_context(
                on=Contention,
                attempts=CONTENTION_ATTEMPTS,
                timeout=CONTENTION_SECONDS,
                wait_initial=0.01,
                wait_max=0.5,
            ):
                with attempt:
                    self._metrics.contention.inc()
                    await connection.rollback()
                    return await self._apply(connection, changes, exemplar)
            raise

    async def _apply(
        self, connection: Connection, changes: list[Change], exemplar: dict[str, str] | None
    ) -> list[Answer]:
        if self.store is None:
            return [Answer(Outcome.UNAVAILABLE, self.storeless)] * len(changes)
        started = time.perf_counter()
        now_ms = time.time_ns() // 1_000_000
        answers = await self.store.apply(connection, changes, now_ms=now_ms)
        self._metrics.applied(len(changes), time.perf_counter() - started, exemplar)
        committed_ms = time.time_ns() // 1_000_000
        for change, answer in zip(changes, answers, strict=True):
            # One that is sent again, by Svix or by hand, had its effect before.
            known = answer.outcome is Outcome.DUPLICATE
            if change.event_ms and change.delivery_id is not None and not known:
                self._metrics.event_age.observe(max(0, committed_ms - change.event_ms) / 1000)
        return answers


def _resolve(entry: _Entry, answer: Answer) -> None:
    if not entry.answer.done():
        entry.answer.set_result(answer)
