"""Commit batches of changes over one connection.

An event that the database rejects is isolated from the rest of its batch, so that it delays no
other. An event that another one may unblock is held. For one that cannot be written now, the
sender has to retry.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Final, TypeVar

import stamina
import structlog

from clerk_sync.clock import now_ms
from clerk_sync.database.connection import Connection
from clerk_sync.database.errors import (
    Contention,
    DatabaseUnavailable,
    LockWaitTimeout,
    RejectedByDatabase,
    SchemaChanged,
)
from clerk_sync.mapping.change import Change, Delivered, Quarantine, quarantined, without_payload
from clerk_sync.outcomes import Answer, Outcome, Reason
from clerk_sync.store.quarantine import first_retry
from clerk_sync.store.store import FencedOff

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clerk_sync.store.held import Entry, Held
    from clerk_sync.store.store import Store
    from clerk_sync.telemetry.metrics import Metrics

log = structlog.get_logger()

CONTENTION_ATTEMPTS: Final = 8
CONTENTION_SECONDS: Final = 5.0
# A connection older than this is replaced: PlanetScale cuts them after a day, and a rotated
# password is taken up by then at the latest.
CONNECTION_SECONDS: Final = 3600.0
# For so long after a lock was met, every batch looks for locks before it writes: a wait for one
# takes the whole batch's time.
WARY_SECONDS: Final = 5.0
# So many refusals in a row that nobody knows are the connection's fault.
UNKNOWN_LIMIT: Final = 3

_T = TypeVar("_T")
Connect = Callable[[], Awaitable[Connection]]
AWAY: Final = Answer(Outcome.UNAVAILABLE, Reason.DATABASE)


class Trouble(Enum):
    """What a writer met that is not the fault of a change."""

    # The database gave no connection, or did not do what it was asked.
    CONNECTION = auto()
    # A table or a column is not what it was.
    SCHEMA = auto()


@dataclass(slots=True)
class Status:
    """What the writers of one committer share, and nobody else changes.

    `store` is None while the schema is not known to be right. `suspended` is why nothing is to
    be committed, None while all is well. `trouble` and `parked` are what the committer's
    coroutines of these names wait for. `fenced` says that the store's lease belongs to another
    process: nothing is written any more. `commits` counts transactions.
    """

    store: Store | None = None
    suspended: Reason | None = Reason.DATABASE
    trouble: Trouble | None = None
    reported: asyncio.Event = field(default_factory=asyncio.Event)
    parked: asyncio.Event = field(default_factory=asyncio.Event)
    fenced: bool = False
    connections: int = 0
    commits: int = 0
    wary_until: float = 0.0
    # MariaDB before 10.6 and some releases of Vitess do not know SKIP LOCKED.
    skips_locked: bool = True

    def report(self, trouble: Trouble) -> None:
        """Report trouble; of several, SCHEMA is the one that counts."""
        if self.trouble is not Trouble.SCHEMA:
            self.trouble = trouble
        self.reported.set()

    @property
    def refusal(self) -> Answer:
        """The answer to every change while nothing is committed."""
        return Answer(Outcome.UNAVAILABLE, self.suspended or Reason.DATABASE)


class Writer:
    """Commit batches over a connection of its own, which the first batch opens."""

    def __init__(self, connect: Connect, status: Status, held: Held, metrics: Metrics) -> None:
        self._connect = connect
        self._status = status
        self._held = held
        self._metrics = metrics
        self._connection: Connection | None = None
        self._opened = 0.0
        self._unknown = 0

    def close(self) -> None:
        """Close the connection. The next batch opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
            self._status.connections -= 1

    async def write(self, batch: Sequence[Entry]) -> bool:
        """Commit the batch and answer all but the held changes; False without a database."""
        for entry in batch:
            if entry.trace is not None:
                entry.trace.taken()
        return await self._answered(batch, self._commit)

    async def retry(self, batch: Sequence[Entry]) -> bool:
        """Try held changes again: each is answered, or held on."""
        return await self._answered(batch, self._commit_held)

    async def _answered(
        self, batch: Sequence[Entry], work: Callable[[Sequence[Entry]], Awaitable[None]]
    ) -> bool:
        answer = AWAY
        reused = self._connection is not None
        connected = True
        try:
            reused = not await self._open() and reused
            await work(batch)
        except FencedOff:
            self._status.fenced = True
        except (SchemaChanged, RejectedByDatabase) as error:
            # When even the quarantine is rejected, our own tables are wrong.
            log.error("schema_changed", error=str(error))
            self._status.report(Trouble.SCHEMA)
            answer = Answer(Outcome.UNAVAILABLE, Reason.SCHEMA)
        except DatabaseUnavailable as error:
            connected = self._connection is not None
            self.close()
            if reused and not isinstance(error, Contention):
                # It may have been closed while it was idle: try once more, on a new one.
                return await self._answered(_unanswered(batch), work)
            log.error("database_unavailable", error=str(error))
            self._status.report(Trouble.CONNECTION)
        except Exception:
            log.exception("internal_error")
            answer = Answer(Outcome.ERROR, Reason.INTERNAL)
        else:
            return True
        self.close()
        for entry in _unanswered(batch):
            entry.resolve(answer)
        return connected or self._status.connections > 0

    async def _open(self) -> bool:
        """Open a connection unless a usable one is open; return whether it is new."""
        if self._connection is not None:
            if time.monotonic() - self._opened < CONNECTION_SECONDS:
                return False
            self.close()
        self._connection = await self._connect()
        self._opened = time.monotonic()
        self._unknown = 0
        self._status.connections += 1
        return True

    # A batch

    async def _commit(self, batch: Sequence[Entry]) -> None:
        """Commit and answer the batch, taken apart until the change that fails stands alone."""
        batch = _unanswered(batch)  # a caller who is gone costs nothing
        if time.monotonic() < self._status.wary_until:
            batch = await self._past_locks(batch)
        if not batch:
            return
        exemplar = next((entry.trace.exemplar for entry in batch if entry.trace is not None), None)
        try:
            answers = await self._applied(batch, exemplar)
        except LockWaitTimeout as error:
            await self._around_locks(batch, error)
        except Exception as error:
            if isinstance(error, DatabaseUnavailable) and not isinstance(error, SchemaChanged):
                raise
            await self._rollback()
            if len(batch) > 1:
                await self._take_apart(batch)
                return
            if _unknown(error):
                self._count_unknown(error)
            if not self._set_aside(batch[0], error):
                await self._commit(batch)
        else:
            self._unknown = 0
            _resolve(batch, answers)

    async def _around_locks(self, batch: Sequence[Entry], error: LockWaitTimeout) -> None:
        """Commit a batch in which other transactions have locked a row."""
        await self._rollback()
        self._status.wary_until = time.monotonic() + WARY_SECONDS
        free = await self._past_locks(batch)
        if len(free) < len(batch):
            await self._commit(free)
        elif len(batch) > 1:
            # It is not known which change needs the locked row: each waits by itself.
            for entry in batch:
                await self._commit([entry])
        else:
            self._give_up(batch[0], error)

    async def _take_apart(self, batch: Sequence[Entry]) -> None:
        """Commit a batch of which the database rejects some change."""
        refused: dict[int, RejectedByDatabase | SchemaChanged] = {}
        try:
            refused = await self._refusals(batch)
        except LockWaitTimeout as error:
            await self._around_locks(batch, error)
            return
        except (RejectedByDatabase, SchemaChanged):  # no row is to blame
            await self._rollback()
        if len(refused) == len(batch) and all(map(_unknown, refused.values())):
            self._count_unknown(refused[0])
        if not refused:
            middle = len(batch) // 2
            await self._commit(batch[:middle])
            await self._commit(batch[middle:])
            return
        await self._commit(
            [
                entry
                for place, entry in enumerate(batch)
                if place not in refused or not self._set_aside(entry, refused[place])
            ]
        )

    def _set_aside(self, entry: Entry, error: Exception) -> bool:
        """Answer or hold a change that failed alone; False when it is to be quarantined."""
        change = entry.change
        about = {
            "svix_id": change.svix_id,
            "type": change.type,
            "clerk_id": change.clerk_id,
            "error": str(error),
        }
        if isinstance(error, SchemaChanged):
            log.error("schema_changed", **about)
            self._status.report(Trouble.SCHEMA)
            entry.resolve(Answer(Outcome.UNAVAILABLE, Reason.SCHEMA))
        elif not isinstance(error, RejectedByDatabase):
            log.error("internal_error", svix_id=change.svix_id, exc_info=error)
            entry.resolve(Answer(Outcome.ERROR, Reason.INTERNAL))
        elif error.reason is None:
            log.error("rejected_by_database", **about)
            entry.resolve(AWAY)
        elif entry.parked:
            entry.resolve(Answer(Outcome.QUARANTINED, error.reason))
        elif isinstance(change.effect, Quarantine):
            # Larger than the server takes, perhaps: then without the payload.
            smaller = without_payload(change)
            if smaller is None:
                raise error  # not even the quarantine takes it
            entry.change = smaller
            return False
        elif not error.depends or not self._held.hold(entry):
            log.warning("rejected_by_database", reason=error.reason.value, **about)
            again = first_retry(now_ms()) if error.depends else None
            if again is not None:
                self._status.parked.set()
            effect = quarantined(change.effect, error.reason, str(error), retry_at_ms=again)
            entry.change = Change(change.source, effect)
            return False
        return True

    def _count_unknown(self, error: Exception) -> None:
        """Count a batch of which every change was rejected with an unknown number.

        Raises DatabaseUnavailable after UNKNOWN_LIMIT in a row, as the connection is to blame.
        """
        self._unknown += 1
        if self._unknown >= UNKNOWN_LIMIT:
            raise DatabaseUnavailable(
                f"{error}, which is not known, {self._unknown} times in a row"
            )

    async def _past_locks(self, batch: Sequence[Entry]) -> Sequence[Entry]:
        """Return the changes whose rows are not locked; hold the others, or give them up."""
        store = self._status.store
        if store is None or not self._status.skips_locked or not batch:
            return batch
        changes = [entry.change for entry in batch]
        try:
            locked = await self._persistently(lambda: store.locked(self._there, changes))
        except RejectedByDatabase as error:
            await self._rollback()
            if _unknown(error):  # a syntax error
                self._status.skips_locked = False
            return batch
        for place in locked:
            if not self._held.hold(batch[place]):
                self._give_up(
                    batch[place], LockWaitTimeout("a row is locked by another transaction")
                )
        return [entry for place, entry in enumerate(batch) if place not in locked]

    def _give_up(self, entry: Entry, error: LockWaitTimeout) -> None:
        log.warning("row_locked", svix_id=entry.change.svix_id, error=str(error))
        entry.resolve(AWAY)

    # What was held

    async def _commit_held(self, batch: Sequence[Entry]) -> None:
        """Commit the held changes that are accepted by now, in one transaction.

        Its rows may swap unique values.
        """
        tried = await self._past_locks(_unanswered(batch))
        rest: list[Entry] = []
        try:
            refused = await self._refusals(tried)
            swapped = await self._swappable(
                [tried[place] for place, error in refused.items() if _conflicts(error)]
            )
            for place, error in refused.items():
                if tried[place] not in swapped and not self._set_aside(tried[place], error):
                    rest.append(tried[place])
            tried = [one for place, one in enumerate(tried) if place not in refused] + swapped
            if tried:
                _resolve(tried, await self._applied(tried, vacating=swapped))
        except LockWaitTimeout as error:
            await self._rollback()
            for entry in _unanswered(tried):
                if entry not in rest and not self._held.hold(entry):
                    self._give_up(entry, error)
        except (RejectedByDatabase, SchemaChanged):
            await self._rollback()
            waiting = [entry for entry in _unanswered(tried) if entry not in rest]
            rest += [entry for entry in waiting if not self._held.hold(entry)]
        # These go to the quarantine, or their time is over.
        await self._commit(rest)

    async def _swappable(self, conflicting: list[Entry]) -> list[Entry]:
        """Return those that are accepted when all of them first give up their unique values."""
        while len(conflicting) > 1:
            refused = await self._refusals(conflicting, vacating=conflicting)
            if not refused:
                return conflicting
            # A rejected one gives up no value, so without it others may be rejected.
            conflicting = [one for place, one in enumerate(conflicting) if place not in refused]
        return []

    # Transactions

    @property
    def _there(self) -> Connection:
        assert self._connection is not None
        return self._connection

    async def _rollback(self) -> None:
        await self._there.rollback()

    async def _refusals(
        self, batch: Sequence[Entry], *, vacating: Sequence[Entry] = ()
    ) -> dict[int, RejectedByDatabase | SchemaChanged]:
        async def refusals() -> dict[int, RejectedByDatabase | SchemaChanged]:
            store = self._status.store
            if store is None or not batch:
                return {}
            changes = [entry.change for entry in batch]
            moving = [entry.change for entry in vacating]
            return await store.refusals(self._there, changes, now_ms=now_ms(), vacating=moving)

        return await self._persistently(refusals)

    async def _applied(
        self,
        batch: Sequence[Entry],
        exemplar: dict[str, str] | None = None,
        *,
        vacating: Sequence[Entry] = (),
    ) -> list[Answer]:
        """Apply the changes as one transaction."""
        changes = [entry.change for entry in batch]
        moving = [entry.change for entry in vacating]

        async def apply() -> list[Answer]:
            store = self._status.store
            if store is None:
                return [self._status.refusal] * len(changes)
            started = time.perf_counter()
            answers = await store.apply(self._there, changes, now_ms=now_ms(), vacating=moving)
            self._status.commits += 1
            self._metrics.applied(len(changes), time.perf_counter() - started, exemplar)
            committed_ms = now_ms()
            for entry, answer in zip(batch, answers, strict=True):
                source = entry.change.source
                # A replayed event had its effect before, and time spent in quarantine says nothing
                # about how late events arrive.
                known = entry.parked or answer.outcome is Outcome.DUPLICATE
                if isinstance(source, Delivered) and source.event_ms and not known:
                    self._metrics.event_age.observe(max(0, committed_ms - source.event_ms) / 1000)
            return answers

        return await self._persistently(apply)

    async def _persistently(self, work: Callable[[], Awaitable[_T]]) -> _T:
        """Do the work, and retry it after a deadlock."""
        try:
            return await work()
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
                    await self._rollback()
                    return await work()
            raise


def _unknown(error: Exception) -> bool:
    """Return whether the database rejected it with an error number that is not known."""
    return isinstance(error, RejectedByDatabase) and error.reason is None


def _conflicts(error: Exception) -> bool:
    return isinstance(error, RejectedByDatabase) and error.reason is Reason.CONFLICT


def _unanswered(batch: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in batch if not entry.held and not entry.answer.done()]


def _resolve(batch: Sequence[Entry], answers: Sequence[Answer]) -> None:
    for entry, answer in zip(batch, answers, strict=True):
        if entry.trace is not None:
            entry.trace.settled(len(batch))
        entry.resolve(answer)
