"""Bringing rows to what Clerk's API says: pages in, compared, and what differs written."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

import stamina
import structlog

from clerk_sync.clerk import events
from clerk_sync.clerk.events import InvalidEvent
from clerk_sync.database.connection import COMMIT, NO_PARAMETERS
from clerk_sync.database.errors import (
    Contention,
    DatabaseUnavailable,
    LockWaitTimeout,
    RejectedByDatabase,
    SchemaChanged,
)
from clerk_sync.mapping.change import ApiRead, Upsert
from clerk_sync.mapping.ingest import upsert_of
from clerk_sync.outcomes import DRIFTS, Outcome, Reason, Verdict
from clerk_sync.store.lease import LeaseLost
from clerk_sync.store.store import FencedOff
from clerk_sync.store.values import as_text
from clerk_sync.sync.diff import Compared, compared

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from clerk_sync.database.connection import Connection, Step
    from clerk_sync.mapping.change import Change
    from clerk_sync.mapping.model import Mapping
    from clerk_sync.outcomes import Answer
    from clerk_sync.store.committer import Committer
    from clerk_sync.store.store import Store
    from clerk_sync.store.writer import Connect

log = structlog.get_logger()

_READERS: Final = 2
# How long a database may be away before a walk gives up.
_PATIENCE_SECONDS: Final = 60.0
_FIRST_WAIT: Final = 0.1
_LONGEST_WAIT: Final = 5.0
# Refusals that other rows decide: a key that refers to a row, a value that somebody else has.
_OF_OTHERS: Final = (Reason.REFUSED, Reason.CONFLICT)
_REFUSED_MOST: Final = 10_000

_T = TypeVar("_T")


@dataclass(slots=True)
class Tally:
    """What became of one kind's objects.

    `found` counts verdicts, `written` the rows that were brought into step, `unfit` those that
    the table cannot take.
    """

    read: int = 0
    written: int = 0
    found: Counter[Verdict] = field(default_factory=Counter)

    @property
    def drift(self) -> dict[str, int]:
        """How many were out of step, by how."""
        return {verdict.value: self.found[verdict] for verdict in DRIFTS}

    @property
    def unfit(self) -> int:
        return self.found[Verdict.UNFIT]


class Mending:
    """One run over the tables of one mapping.

    With a `committer` it writes what differs; without one it only looks. `told` hears of every
    row that is out of step, `lost` says that the run has to end.
    """

    def __init__(
        self,
        mapping: Mapping,
        store: Store,
        connect: Connect,
        *,
        committer: Committer | None,
        lost: asyncio.Event,
        told: Callable[[str, Compared], None] = lambda _, __: None,
    ) -> None:
        self.store = store
        self.tallies: dict[str, Tally] = {}
        self._mapping = mapping
        self._connect = connect
        self._committer = committer
        self._lost = lost
        self._told = told
        # The kinds of whose last page nothing was here.
        self._new: set[str] = set()
        # What the database refused for what else is there, or is not: with when it was read.
        self._refused: dict[str, dict[str, tuple[dict[str, Any], int]]] = defaultdict(dict)
        self._idle: list[Connection] = []
        self._turns = asyncio.Semaphore(_READERS)

    def close(self) -> None:
        """Close the connections that it reads by."""
        while self._idle:
            self._idle.pop().close()

    def refused(self, kind: str) -> list[tuple[dict[str, Any], int]]:
        """Objects that the database refused for what other rows hold, and when each was read.

        They are forgotten here.
        """
        return [*self._refused.pop(kind, {}).values()]

    async def take(
        self, kind: str, objects: Sequence[dict[str, Any]], *, began_ms: int, again: bool = False
    ) -> list[Compared]:
        """Bring the rows of these objects into step; those that are `ahead` are left, and given.

        `again` says that they were counted as refused. Raises DatabaseUnavailable when the database
        stays away.
        """
        tally = self.tallies[kind]
        if again:
            tally.found[Verdict.UNFIT] -= len(objects)
        else:
            tally.read += len(objects)
        upserts = self._upserts(kind, objects, began_ms, tally)
        if not upserts:
            return []
        if kind in self._new and await self._inserted(kind, upserts):
            tally.found[Verdict.MISSING] += len(upserts)
            tally.written += len(upserts)
            return []
        read = ApiRead(began_ms)
        found = await self.reading(
            lambda connection: compared(connection, self.store, kind, upserts, read)
        )
        for one in found:
            if one.verdict is Verdict.UNFIT:
                reason = one.reason.value if one.reason else None
                log.warning("invalid_value", kind=kind, clerk_id=one.clerk_id, reason=reason)
            if one.buried:
                log.warning("tombstone_conflict", kind=kind, clerk_id=one.clerk_id)
            if one.mend is None:
                tally.found[one.verdict] += 1
        refused = await self.mend(
            kind, [one for one in found if one.mend is not None and one.ahead is None]
        )
        if refused and not again:
            there = {one.get("id"): one for one in objects}
            kept = self._refused[kind]
            for clerk_id in refused[: max(0, _REFUSED_MOST - len(kept))]:
                kept[clerk_id] = (there[clerk_id], began_ms)
        self._expect(kind, found)
        return [one for one in found if one.ahead is not None]

    def _expect(self, kind: str, found: Sequence[Compared]) -> None:
        """Take it that after a page of which nothing was here, all of the next one is new, too."""
        target = self.store.targets[kind]
        if (
            self._committer is not None
            and not target.owners
            and not target.mapping.adopt
            and all(one.verdict is Verdict.MISSING for one in found)
        ):
            self._new.add(kind)
        else:
            self._new.discard(kind)

    async def _inserted(self, kind: str, upserts: Sequence[Upsert]) -> bool:
        """Write all of these as new; False, and nothing is written, where one is not.

        Then each has to be looked at. Raises LeaseLost.
        """

        async def insert(connection: Connection) -> bool:
            try:
                now_ms = time.time_ns() // 1_000_000
                await self.store.insert(connection, kind, upserts, now_ms=now_ms)
            except FencedOff as error:
                raise LeaseLost(str(error)) from None
            except (RejectedByDatabase, Contention, LockWaitTimeout, SchemaChanged):
                await connection.rollback()
                return False
            return True

        return await self.reading(insert)

    def _upserts(
        self, kind: str, objects: Sequence[dict[str, Any]], began_ms: int, tally: Tally
    ) -> list[Upsert]:
        table = self._mapping.tables[kind]
        upserts: dict[str, Upsert] = {}
        for data in objects:
            try:
                upsert = upsert_of(events.read(kind, data, at_ms=began_ms), table)
            except InvalidEvent as error:
                log.warning(
                    "invalid_value",
                    kind=kind,
                    clerk_id=error.clerk_id,
                    reason=error.reason.value,
                    detail=error.detail,
                )
                tally.found[Verdict.UNFIT] += 1
                continue
            upserts[upsert.entity[1]] = upsert
        return [*upserts.values()]

    async def lower(self, kind: str, one: Compared) -> None:
        """Take back the version of a row that is ahead, so that Clerk's word is newer again."""
        if self._committer is None or one.ahead is None or one.mend is None:
            return
        match one.mend.effect:
            case Upsert(version=(version_ms, _, _)):
                seen = (one.ahead.version_ms, one.ahead.event_ms)
                # With no event's time, so that the repair, which has one, is newer.
                await self.write(self.store.lower(one.clerk_id, kind, seen=seen, to=version_ms))

    async def mend(self, kind: str, found: Sequence[Compared]) -> list[str]:
        """Write these mends, and count what they came to.

        The ids of those that the database refused for what other rows hold.
        """
        refused: list[str] = []
        tally = self.tallies[kind]
        mends = [(one, one.mend) for one in found if one.mend is not None]
        if self._committer is None:
            for one, _ in mends:
                tally.found[one.verdict] += 1
                self._told(kind, one)
            return refused
        answers = await self._committed([change for _, change in mends])
        for (one, _), answer in zip(mends, answers, strict=True):
            match answer.outcome:
                case Outcome.APPLIED:
                    tally.found[one.verdict] += 1
                    tally.written += 1
                    self._told(kind, one)
                case Outcome.QUARANTINED:
                    reason = answer.reason.value if answer.reason else None
                    log.warning("invalid_value", kind=kind, clerk_id=one.clerk_id, reason=reason)
                    tally.found[Verdict.UNFIT] += 1
                    if answer.reason in _OF_OTHERS:
                        refused.append(one.clerk_id)
                case Outcome.ERROR:
                    raise RuntimeError(f"{kind} {one.clerk_id} could not be written")
                case _:  # something newer came between
                    tally.found[Verdict.NEWER] += 1
        return refused

    async def _committed(self, changes: Sequence[Change]) -> list[Answer]:
        """Commit the changes, again and again while the database is away. Raises LeaseLost."""
        assert self._committer is not None
        answers = dict(enumerate(await self._committer.commit_all(changes)))
        deadline = time.monotonic() + _PATIENCE_SECONDS
        wait = _FIRST_WAIT
        while away := [n for n, a in answers.items() if a.outcome is Outcome.UNAVAILABLE]:
            if self._committer.status.fenced or self._lost.is_set():
                raise LeaseLost("another process has taken over the lease")
            if time.monotonic() > deadline:
                raise DatabaseUnavailable("the database took no writes; the log says why")
            await asyncio.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)
            again = await self._committer.commit_all([changes[n] for n in away])
            answers.update(zip(away, again, strict=True))
        return list(answers.values())

    async def rows(self, kind: str) -> int:
        """How many rows of this kind there are, without marked ones."""
        target = self.store.targets[kind]

        async def read(connection: Connection) -> int:
            result, _ = await connection.run([(target.count, NO_PARAMETERS), COMMIT])
            ((rows,),) = result.rows
            return int(rows)

        return await self.reading(read)

    async def ids(self, kind: str, *, after: str) -> list[str]:
        """The ids in the table that follow one of them, in order: IDS_LIMIT of them, or the rest.

        Without those of marked rows.
        """
        target = self.store.targets[kind]

        async def read(connection: Connection) -> Sequence[Sequence[Any]]:
            result, _ = await connection.run([(target.ids, ((after,),)), COMMIT])
            return result.rows

        return [as_text(clerk_id) for (clerk_id,) in await self.reading(read)]

    async def write(self, step: Step) -> None:
        """Commit this one step. Raises DatabaseUnavailable when the database stays away."""

        async def write(connection: Connection) -> None:
            await connection.run([step, COMMIT])

        await self.reading(write)

    async def reading(self, read: Callable[[Connection], Awaitable[_T]]) -> _T:
        """Read by one of a few connections, again on a new one where that fails."""
        async for attempt in stamina.retry_context(
            on=DatabaseUnavailable, attempts=None, timeout=_PATIENCE_SECONDS, wait_max=_LONGEST_WAIT
        ):
            with attempt:
                async with self._connection() as connection:
                    return await read(connection)
        raise AssertionError  # the loop returns or raises

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        async with self._turns:
            connection = self._idle.pop() if self._idle else await self._connect()
            try:
                yield connection
            except BaseException:
                connection.close()
                raise
            self._idle.append(connection)
