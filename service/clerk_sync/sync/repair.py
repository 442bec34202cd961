"""Bringing rows to what Clerk's API says: pages in, compare, and what differs written."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

import stamina
import structlog

from clerk_sync.clerk import events
from clerk_sync.clerk.events import InvalidEvent
from clerk_sync.clock import now_ms
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
from clerk_sync.outcomes import Outcome, Reason, Verdict
from clerk_sync.store.lease import LeaseLost
from clerk_sync.store.store import FencedOff
from clerk_sync.store.values import as_text
from clerk_sync.sync.diff import Comparison, compare
from clerk_sync.sync.patience import (
    FIRST_WAIT_SECONDS,
    LONGEST_WAIT_SECONDS,
    PATIENCE_SECONDS,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from clerk_sync.database.connection import Connection, Step
    from clerk_sync.mapping.change import Change
    from clerk_sync.mapping.model import Mapping
    from clerk_sync.outcomes import Answer
    from clerk_sync.store.committer import Committer
    from clerk_sync.store.store import Store
    from clerk_sync.store.writer import Connect
    from clerk_sync.sync.report import Tally

log = structlog.get_logger()

_READERS: Final = 2
# Rejections because of other rows: a foreign key without its row, a value that another row has.
_OTHER_ROWS: Final = (Reason.REFUSED, Reason.CONFLICT)
_REJECTED_LIMIT: Final = 10_000

_T = TypeVar("_T")


class Repairer:
    """Repairs the rows of one mapping's tables, for one run.

    Without a `committer` it writes nothing: a dry run. `on_drift` is called with the kind and the
    comparison of every row that differs. `lost` is the lease's: the run has to end.
    """

    def __init__(
        self,
        mapping: Mapping,
        store: Store,
        connect: Connect,
        *,
        committer: Committer | None,
        lost: asyncio.Event,
        on_drift: Callable[[str, Comparison], None] = lambda _, __: None,
    ) -> None:
        self.store = store
        self.tallies: dict[str, Tally] = {}
        self._mapping = mapping
        self._connect = connect
        self._committer = committer
        self._lost = lost
        self._on_drift = on_drift
        # Kinds whose previous page was entirely new.
        self._all_new: set[str] = set()
        # Objects rejected because of other rows, by kind and id, with when each was read.
        self._rejected: dict[str, dict[str, tuple[dict[str, Any], int]]] = defaultdict(dict)
        self._idle: list[Connection] = []
        self._turns = asyncio.Semaphore(_READERS)

    def close(self) -> None:
        """Close the connections."""
        while self._idle:
            self._idle.pop().close()

    def take_rejected(self, kind: str) -> list[tuple[dict[str, Any], int]]:
        """Take out the objects that were rejected because of other rows, and when each was read."""
        return [*self._rejected.pop(kind, {}).values()]

    async def repair(
        self, kind: str, objects: Sequence[dict[str, Any]], *, began_ms: int, again: bool = False
    ) -> list[Comparison]:
        """Repair the rows of these objects. Those that are `ahead` are not touched, but returned.

        `again` says that these were rejected, and counted so. Raises LeaseLost, and
        DatabaseUnavailable if the database stays away.
        """
        tally = self.tallies[kind]
        if again:
            tally.found[Verdict.UNFIT] -= len(objects)
        else:
            tally.read += len(objects)
        upserts = self._upserts(kind, objects, began_ms, tally)
        if not upserts:
            return []
        if kind in self._all_new and await self._insert(kind, upserts):
            tally.found[Verdict.MISSING] += len(upserts)
            tally.written += len(upserts)
            return []
        read = ApiRead(began_ms)
        found = await self.reading(
            lambda connection: compare(connection, self.store, kind, upserts, read)
        )
        for one in found:
            if one.verdict is Verdict.UNFIT:
                reason = one.reason.value if one.reason else None
                log.warning("invalid_value", kind=kind, clerk_id=one.clerk_id, reason=reason)
            if one.conflict:
                log.warning("tombstone_conflict", kind=kind, clerk_id=one.clerk_id)
            if one.repair is None:
                tally.found[one.verdict] += 1
        rejected = await self.apply(
            kind, [one for one in found if one.repair is not None and one.ahead is None]
        )
        if rejected and not again:
            there = {one.get("id"): one for one in objects}
            kept = self._rejected[kind]
            for clerk_id in rejected[: max(0, _REJECTED_LIMIT - len(kept))]:
                kept[clerk_id] = (there[clerk_id], began_ms)
        self._predict(kind, found)
        return [one for one in found if one.ahead is not None]

    def _predict(self, kind: str, found: Sequence[Comparison]) -> None:
        """Predict whether the kind's next page is entirely new: it is if this one was."""
        target = self.store.targets[kind]
        if (
            self._committer is not None
            and not target.owners
            and not target.mapping.adopt
            and all(one.verdict is Verdict.MISSING for one in found)
        ):
            self._all_new.add(kind)
        else:
            self._all_new.discard(kind)

    async def _insert(self, kind: str, upserts: Sequence[Upsert]) -> bool:
        """Insert all of these; False, and nothing is written, if one of them is not new.

        Raises LeaseLost.
        """

        async def insert(connection: Connection) -> bool:
            try:
                await self.store.insert(connection, kind, upserts, now_ms=now_ms())
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

    async def rewind(self, kind: str, one: Comparison) -> None:
        """Lower the version of an entity that is ahead, so that Clerk's is newer again."""
        if self._committer is None or one.ahead is None or one.repair is None:
            return
        match one.repair.effect:
            case Upsert(version=(version_ms, _, _)):
                seen = (one.ahead.version_ms, one.ahead.event_ms)
                # Without an event's time, so that the repair, which has one, is newer.
                await self.write(self.store.rewind(one.clerk_id, kind, seen=seen, to=version_ms))

    async def apply(self, kind: str, found: Sequence[Comparison]) -> list[str]:
        """Write these repairs, and count what became of them.

        Returns the ids of those that the database rejected because of other rows.
        """
        rejected: list[str] = []
        tally = self.tallies[kind]
        repairs = [(one, one.repair) for one in found if one.repair is not None]
        if self._committer is None:
            for one, _ in repairs:
                tally.found[one.verdict] += 1
                self._on_drift(kind, one)
            return rejected
        answers = await self._committed([change for _, change in repairs])
        for (one, _), answer in zip(repairs, answers, strict=True):
            match answer.outcome:
                case Outcome.APPLIED:
                    tally.found[one.verdict] += 1
                    tally.written += 1
                    self._on_drift(kind, one)
                case Outcome.QUARANTINED:
                    reason = answer.reason.value if answer.reason else None
                    log.warning("invalid_value", kind=kind, clerk_id=one.clerk_id, reason=reason)
                    tally.found[Verdict.UNFIT] += 1
                    if answer.reason in _OTHER_ROWS:
                        rejected.append(one.clerk_id)
                case Outcome.ERROR:
                    raise RuntimeError(f"{kind} {one.clerk_id} could not be written")
                case _:  # something newer came between
                    tally.found[Verdict.NEWER] += 1
        return rejected

    async def _committed(self, changes: Sequence[Change]) -> list[Answer]:
        """Commit the changes; retry while the database is away. Raises LeaseLost."""
        answers = dict(enumerate(await self._commit(changes)))
        deadline = time.monotonic() + PATIENCE_SECONDS
        wait = FIRST_WAIT_SECONDS
        while away := [n for n, a in answers.items() if a.outcome is Outcome.UNAVAILABLE]:
            if time.monotonic() > deadline:
                raise DatabaseUnavailable("the database took no writes; the log says why")
            await asyncio.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)
            again = await self._commit([changes[n] for n in away])
            answers.update(zip(away, again, strict=True))
        return list(answers.values())

    async def _commit(self, changes: Sequence[Change]) -> list[Answer]:
        """Commit the changes once. Raises LeaseLost."""
        assert self._committer is not None
        if self._lost.is_set():
            raise LeaseLost("another process has taken over the lease")
        try:
            return await self._committer.commit_all(changes)
        except FencedOff as error:
            raise LeaseLost(str(error)) from None

    async def rows(self, kind: str) -> int:
        """Count the rows of a kind, without soft-deleted ones."""
        target = self.store.targets[kind]

        async def read(connection: Connection) -> int:
            result, _ = await connection.run([(target.count, NO_PARAMETERS), COMMIT])
            ((rows,),) = result.rows
            return int(rows)

        return await self.reading(read)

    async def ids(self, kind: str, *, after: str) -> list[str]:
        """The next IDS_LIMIT ids in the table, in order; fewer at its end.

        Without those of soft-deleted rows.
        """
        target = self.store.targets[kind]

        async def read(connection: Connection) -> Sequence[Sequence[Any]]:
            result, _ = await connection.run([(target.ids, ((after,),)), COMMIT])
            return result.rows

        return [as_text(clerk_id) for (clerk_id,) in await self.reading(read)]

    async def write(self, step: Step) -> None:
        """Commit this one step. Raises DatabaseUnavailable if the database stays away."""

        async def write(connection: Connection) -> None:
            await connection.run([step, COMMIT])

        await self.reading(write)

    async def reading(self, read: Callable[[Connection], Awaitable[_T]]) -> _T:
        """Read on one of a few connections; retry on a new one if that fails."""
        async for attempt in stamina.retry_context(
            on=DatabaseUnavailable,
            attempts=None,
            timeout=PATIENCE_SECONDS,
            wait_max=LONGEST_WAIT_SECONDS,
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
