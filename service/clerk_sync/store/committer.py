"""Group commit: concurrent deliveries share one transaction, and one fsync.

Changes wait in one bounded queue; a few writers, each owning one connection, take whatever
waits and commit it together. There is no artificial delay: under light load a batch is one
event. One writer more tries again what was held, so that no batch waits for it.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

from clerk_sync.mapping.change import from_quarantine
from clerk_sync.outcomes import Answer, Outcome, Reason
from clerk_sync.store.held import HOLD_SECONDS, Entry, Held
from clerk_sync.store.store import FencedOff
from clerk_sync.store.writer import AWAY, Connect, Status, Writer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clerk_sync.mapping.change import Change
    from clerk_sync.store.store import Store
    from clerk_sync.store.writer import Trouble
    from clerk_sync.telemetry.metrics import Metrics
    from clerk_sync.telemetry.tracing import Trace

# A batch is two packets to the server, whose limit may be MariaDB's 16 MiB.
BATCH_CHARACTERS: Final = 2_000_000
# Svix sends up to 1 MiB: by count alone, a full queue could take a pod's whole memory.
QUEUE_CHARACTERS: Final = 32_000_000
# How long changes are refused without asking a database that has just failed.
AWAY_SECONDS: Final = 1.0
# The writer of what is held is at work for at most a fifth of the time.
PAUSES_PER_RETRY: Final = 4


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

    async def given(self) -> list[Answer]:
        """All answers, in order, once they are there."""
        await self.all
        return [answer for answer in self.known if answer is not None]


class Committer:
    """The queue and its writers.

    It commits nothing until `resume` gives it a store. `suspend`, `resume` and `close` are the
    only calls that change whether it commits.
    """

    def __init__(
        self,
        connect: Connect,
        *,
        metrics: Metrics,
        writers: int,
        batch_limit: int,
        queue_limit: int,
        hold_seconds: float = HOLD_SECONDS,
    ) -> None:
        self.status = Status()
        self._held = Held(hold_seconds)
        self._writers = [Writer(connect, self.status, self._held, metrics) for _ in range(writers)]
        self._retrier = Writer(connect, self.status, self._held, metrics)
        self._batch_limit = batch_limit
        self._queue: asyncio.Queue[Entry | None] = asyncio.Queue()
        self._queue_limit = queue_limit
        self._closed = False
        self._characters = 0
        self._away_until = 0.0
        self._tasks: list[asyncio.Task[None]] = []
        self._retrying: asyncio.Task[None] | None = None
        metrics.queue_limit.set(queue_limit)
        metrics.queue_depth.set_function(self._queue.qsize)
        metrics.writer_connections.set_function(lambda: self.status.connections)

    @property
    def commits(self) -> int:
        """How many transactions have been committed."""
        return self.status.commits

    def resume(self, store: Store) -> None:
        """Commit to these tables: the database accepts writes, and the schema is right."""
        self.status.store = store
        self._reopen()

    def suspend(self, reason: Reason) -> None:
        """Refuse changes with this reason, including those in the queue, until `resume`.

        SCHEMA: the tables are not what the mapping needs, and nothing is written to them.
        DATABASE: the database does not answer. One change every AWAY_SECONDS is let through, as
        the check that failed may have been wrong; when it is committed, so are all others again.
        """
        if reason is Reason.SCHEMA:
            self.status.store = None
        if self.status.suspended is not reason:
            self.status.suspended = reason
            self._away_until = time.monotonic() + AWAY_SECONDS
        self._refuse_waiting(self.status.refusal)

    async def trouble(self) -> Trouble:
        """Wait for the writers' next trouble. For one caller: each is returned once."""
        await self.status.reported.wait()
        self.status.reported.clear()
        trouble, self.status.trouble = self.status.trouble, None
        assert trouble is not None
        return trouble

    async def parked(self) -> None:
        """Wait until an event has entered the quarantine that is to be retried. For one caller."""
        await self.status.parked.wait()
        self.status.parked.clear()

    def start(self) -> None:
        """Start the writers."""
        self._tasks = [asyncio.create_task(self._write(writer)) for writer in self._writers]
        self._retrying = asyncio.create_task(self._retry_held())

    async def close(self) -> None:
        """Commit what waits, then stop the writers and close their connections."""
        self._closed = True
        for _ in self._tasks:
            self._queue.put_nowait(None)
        await asyncio.gather(*self._tasks)
        self._held.close()
        if self._retrying is not None:
            await self._retrying

    async def commit(self, change: Change, trace: Trace | None = None) -> Answer:
        """The change's answer, once it is committed or cannot be.

        When the caller is cancelled, a change that still waits is dropped; one that is being
        written may be committed all the same, and is then known when it is sent again.
        """
        if (refusal := self._refusal()) is not None:
            return refusal
        characters = change.characters
        if (
            self._queue.qsize() + len(self._held) >= self._queue_limit
            or self._characters + characters > QUEUE_CHARACTERS
        ):
            return Answer(Outcome.UNAVAILABLE, Reason.QUEUE_FULL)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._characters += characters
        self._queue.put_nowait(Entry(change, answer, trace))
        if trace is not None:
            trace.queued()
        try:
            return await answer
        finally:
            self._characters -= characters

    async def commit_all(self, changes: Sequence[Change]) -> list[Answer]:
        """The changes' answers, in order. For objects from Clerk's API, which have no payload.

        Raises FencedOff once the store's lease belongs to another process.
        """
        refusal = self._refusal()
        if refusal is None and self._queue.qsize() + len(changes) > self._queue_limit:
            refusal = Answer(Outcome.UNAVAILABLE, Reason.QUEUE_FULL)
        if refusal is not None or not changes:
            return [refusal or AWAY] * len(changes)
        answers = _Answers(len(changes))
        for place, change in enumerate(changes):
            self._queue.put_nowait(Entry(change, _Together(answers, place)))
        given = await answers.given()
        if self.status.fenced:
            raise FencedOff("another process has taken over the lease")
        return given

    async def retry(self, changes: Sequence[Change]) -> list[Answer]:
        """Try changes from the quarantine, once and together; their answers, in order.

        What is refused again is `quarantined`, and stays there as it is.
        """
        refusal = self._refusal()
        if refusal is not None or not changes:
            return [refusal or AWAY] * len(changes)
        answers = _Answers(len(changes))
        self._held.put(
            Entry(from_quarantine(change), _Together(answers, place), until=0.0, parked=True)
            for place, change in enumerate(changes)
        )
        return await answers.given()

    def _refusal(self) -> Answer | None:
        """What to answer at once, while nothing can be committed."""
        if self._closed:
            return Answer(Outcome.UNAVAILABLE, Reason.DRAINING)
        if self.status.store is None:
            return self.status.refusal
        now = time.monotonic()
        if now < self._away_until:
            return AWAY
        if self.status.suspended is not None:
            self._away_until = now + AWAY_SECONDS  # this one finds out whether it is back
        return None

    def _reopen(self) -> None:
        self.status.suspended = None
        self._away_until = 0.0

    async def _take(self) -> list[Entry] | None:
        """All that waits, up to the limits; None when it is time to stop."""
        entry = await self._queue.get()
        batch: list[Entry] = []
        characters = 0
        while entry is not None:
            if not entry.answer.done():
                batch.append(entry)
                characters += entry.change.characters
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

    async def _write(self, writer: Writer) -> None:
        while (batch := await self._take()) is not None:
            commits = self.status.commits
            if batch and not await writer.write(batch):
                self._away_until = time.monotonic() + AWAY_SECONDS
                self._refuse_waiting(AWAY)
            elif self.status.suspended is Reason.DATABASE and self.status.commits > commits:
                self._reopen()
        writer.close()

    async def _retry_held(self) -> None:
        seconds = 0.0
        while (batch := await self._held.take(least=PAUSES_PER_RETRY * seconds)) is not None:
            started = time.monotonic()
            if any(not entry.answer.done() for entry in batch):
                await self._retrier.retry(batch)
            seconds = time.monotonic() - started
            if not self._held:
                self._retrier.close()
        self._retrier.close()

    def _refuse_waiting(self, refusal: Answer) -> None:
        """Give everything in the queue this answer; the signs to stop remain."""
        entries = [self._queue.get_nowait() for _ in range(self._queue.qsize())]
        for entry in entries:
            if entry is None:
                self._queue.put_nowait(None)
            else:
                entry.resolve(refusal)
