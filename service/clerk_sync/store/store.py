"""Changes become rows: state, ledger and target tables in one transaction.

`apply` takes two round trips for a batch of any size. The first advances the state rows of all
entities in it, in key order, which locks them and decides who is newest; and reads back what
was decided and which deliveries are known. The second writes target rows for those that won,
the ledger, and COMMIT.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from clerk_sync.clerk.catalog import Action
from clerk_sync.database.connection import COMMIT, Connection, Result, Step
from clerk_sync.database.errors import DatabaseUnavailable, RejectedByDatabase, SchemaChanged
from clerk_sync.outcomes import Answer, Outcome, Reason
from clerk_sync.store.sql import Compiler, OwnStatements, Read, union
from clerk_sync.store.values import InvalidValue, as_text, time_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from clerk_sync.mapping.model import Change
    from clerk_sync.store.sql import ForIds
    from clerk_sync.store.target import Target

Key = tuple[str, str]
"""An entity: (kind, Clerk id)."""
Version = tuple[int, int, str]
"""(data.updated_at ms, event time ms, svix-id): compared in this order, so never a tie."""

REMOVED: Final[Version] = (2**63 - 1, 0, "")
"""The version of what is removed for good: no event's is newer."""

APPLIED: Final = Answer(Outcome.APPLIED)
STALE: Final = Answer(Outcome.STALE)
DUPLICATE: Final = Answer(Outcome.DUPLICATE)
IGNORED: Final = Answer(Outcome.IGNORED)


@dataclass(slots=True)
class _Entity:
    """What one batch knows of one entity, and then what the database said."""

    save: Change | None = None
    version: Version = (0, 0, "")
    deleted_at: str | None = None
    # As read back.
    settled: Version = (0, 0, "")
    settled_deleted_at: str | None = None
    moved: bool = False


@dataclass(slots=True)
class _Batch:
    now: str
    entities: dict[Key, _Entity] = field(default_factory=lambda: defaultdict(_Entity))
    rows: dict[Key, list[Any]] = field(default_factory=dict)
    deletes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    known: dict[str, str] = field(default_factory=dict)
    present: set[Key] = field(default_factory=set)
    references: dict[tuple[str, int], list[Any]] = field(default_factory=dict)

    def learn_settled(self, result: Result) -> None:
        """Where entities stand, and, under no kind, which deliveries are in the ledger."""
        for kind, name, version_ms, event_ms, source, deleted_at, synced_at in result.rows:
            if kind:
                entity = self.entities[kind, name]
                entity.settled = (version_ms, event_ms, source)
                entity.settled_deleted_at = _time_read(deleted_at)
                entity.moved = _time_read(synced_at) == self.now
            else:
                self.known[name] = source

    def learn_present(self, kind: str, result: Result) -> None:
        self.present.update((kind, as_text(clerk_id)) for (clerk_id,) in result.rows)

    def learn_references(self, kind: str, place: int, result: Result) -> None:
        self.references[kind, place] = [value for (value,) in result.rows if value is not None]


class _Probes:
    """Which values are in a column, and which of their rows nobody has locked."""

    def __init__(self) -> None:
        self._asked: dict[tuple[ForIds, ForIds], dict[Any, list[int]]] = {}

    def add(self, there: ForIds, free: ForIds, value: object, place: int) -> None:
        """The change at this place needs the row with this value."""
        self._asked.setdefault((there, free), {}).setdefault(value, []).append(place)

    def steps(self) -> list[Step]:
        return [one.of(list(values)) for pair, values in self._asked.items() for one in pair]

    def locked(self, results: Sequence[Result]) -> set[int]:
        """The places of the changes whose rows are there and not free."""
        found = [Counter(_folded(value) for (value,) in result.rows) for result in results]
        locked: set[int] = set()
        for values, there, free in zip(self._asked.values(), found[::2], found[1::2], strict=False):
            taken = there - free
            for value, places in values.items():
                if _folded(value) in taken:
                    locked.update(places)
        return locked


def _folded(value: object) -> str:
    """A value for comparison with what the database found, whose collation may ignore case."""
    return as_text(value).casefold()


class FencedOff(DatabaseUnavailable):
    """The lease under which this was to be written is somebody else's now."""


class Store:
    """The tables of one mapping in one database, for any number of connections to it."""

    def __init__(self, targets: Mapping[str, Target], compiler: Compiler) -> None:
        self.targets = targets
        self.own = OwnStatements(compiler)
        self._fence: tuple[str, int] | None = None
        # SQLite locks the whole file.
        self._locks_rows = not compiler.sqlite
        self._parents_first = _parents_first(targets)
        self._tables = {target.table.name for target in targets.values()}

    def fenced(self, lease: str, token: int) -> Store:
        """The same store, whose transactions fail once the lease has another token.

        Raises FencedOff then, also while its holder does not know yet that it lost it.
        """
        store = copy(self)
        store._fence = (lease, token)  # noqa: SLF001 -- our own kind
        return store

    async def apply(
        self,
        connection: Connection,
        changes: Sequence[Change],
        *,
        now_ms: int,
        vacating: Sequence[Change] = (),
    ) -> list[Answer]:
        """Commit all changes in one transaction; their answers, in order.

        The rows of those in `vacating` give up their unique values before they get the new ones,
        so that two may swap them. Raises RejectedByDatabase when the database refuses some of the
        data, DatabaseUnavailable when it cannot take it now; nothing is kept then.
        """
        now = time_text(now_ms)
        checked = [self._checked(change) for change in changes]
        changes = [change for change, _ in checked]
        batch = self._reduced(checked, now)
        await self._decide(connection, batch, changes)
        answers = self._answers(batch, changes)
        won = [change for change, answer in zip(changes, answers, strict=True) if answer is APPLIED]
        steps = self._vacated(vacating)
        steps += await self._writes(connection, batch, won)
        steps += self._ledger(changes, answers, batch.known, now)
        steps.append(COMMIT)
        await connection.run(steps)
        return answers

    async def refusals(
        self,
        connection: Connection,
        changes: Sequence[Change],
        *,
        now_ms: int,
        vacating: Sequence[Change] = (),
    ) -> dict[int, RejectedByDatabase | SchemaChanged]:
        """Which of these changes the database refuses, by their place, and why. Nothing is kept.

        It costs a round trip for each refusal, and one for some changes: halving a batch until
        each refused change stands alone would cost a transaction for nearly each change where
        half of them are refused.
        """
        checked = [self._checked(change) for change in changes]
        changes = [change for change, _ in checked]
        batch = self._reduced(checked, time_text(now_ms))
        await self._decide(connection, batch, changes)
        answers = self._answers(batch, changes)
        won = [place for place, answer in enumerate(answers) if answer is APPLIED]
        await connection.try_each(self._vacated(vacating))
        refused: dict[int, RejectedByDatabase | SchemaChanged] = {}
        steps: list[Step] = []
        places: list[int] = []
        for place in sorted(won, key=lambda place: self._turn(changes[place])):
            try:
                of_one = await self._writes(connection, batch, [changes[place]])
            except (RejectedByDatabase, SchemaChanged) as error:  # of a row that was to be adopted
                refused[place] = error
                continue
            steps += of_one
            places += [place] * len(of_one)
        tried = await connection.try_each(steps)
        await connection.rollback()
        return refused | {places[step]: error for step, error in tried.items()}

    async def locked(self, connection: Connection, changes: Sequence[Change]) -> set[int]:
        """The places of those changes whose rows are locked by somebody else's transaction.

        It waits for no lock, and holds none afterwards: one that is taken a moment later is met
        by `apply`. Not seen are locks on what is in no mapped table, and on unique values.
        """
        if not self._locks_rows:
            return set()
        probes = _Probes()
        for place, (change, row) in enumerate(self._checked(change) for change in changes):
            if change.action is None or change.kind is None or change.clerk_id is None:
                continue
            target, kind = self.targets[change.kind], change.kind
            # Not the states of its owners, which only clerk-sync locks, and for moments.
            probes.add(self.own.present[kind], self.own.free[kind], change.clerk_id, place)
            probes.add(target.present, target.free, change.clerk_id, place)
            for column, table, there, free in target.referred if row is not None else ():
                if table in self._tables and row is not None and row[column] is not None:
                    probes.add(there, free, row[column], place)
            for there, free in target.owned_free if row is None else ():
                probes.add(there, free, change.clerk_id, place)
        results = await connection.run([*probes.steps(), COMMIT])
        return probes.locked(results)

    def _turn(self, change: Change) -> tuple[int, int]:
        """When this change's row is written, in the order of `_writes`."""
        depth = self._parents_first.index(change.kind or "")
        return (0, -depth) if change.action is Action.DELETE else (1, depth)

    async def insert(
        self, connection: Connection, kind: str, changes: Sequence[Change], *, now_ms: int
    ) -> None:
        """Commit rows of one kind that are all new, and their state with them.

        Whether they are is told by the keys: nothing is read, which saves half of what `apply`
        takes. Raises RejectedByDatabase where one is known here, or does not fit, and
        DatabaseUnavailable; nothing is kept then. Not for rows that belong to others, whose state
        would have to be locked.
        """
        target, now = self.targets[kind], time_text(now_ms)
        changes = sorted(changes, key=_clerk_id)  # the order of all locks
        try:
            rows = [target.row(_clerk_id(change), change.row or {}) for change in changes]
        except InvalidValue as error:
            raise RejectedByDatabase(error.reason, f"column {error.column}") from None
        state = [(_clerk_id(one), one.version_ms, one.event_ms, now) for one in changes]
        fence = self._fence_steps()
        results = await connection.run(
            [*fence, (self.own.begin[kind], state), (target.insert, rows)]
        )
        for result in results[: len(fence)]:
            self._check_fence(result)
        await connection.run([COMMIT])

    def _checked(self, change: Change) -> tuple[Change, list[Any] | None]:
        """The change with its row as the columns take it, or as one for the quarantine."""
        if change.action is not Action.SAVE or change.kind is None or change.clerk_id is None:
            return change, None
        if change.fitted is not None:
            return change, [*change.fitted]
        try:
            return change, self.targets[change.kind].row(change.clerk_id, change.row or {})
        except InvalidValue as error:
            return quarantined(change, error.reason, f"column {error.column}"), None

    def _reduced(self, checked: Iterable[tuple[Change, list[Any] | None]], now: str) -> _Batch:
        """At most one save and one deletion per entity: the newest, and the earliest."""
        batch = _Batch(now)
        for change, row in checked:
            if change.action is None or change.kind is None or change.clerk_id is None:
                continue
            key = (change.kind, change.clerk_id)
            entity = batch.entities[key]
            if row is not None:
                version = _version(change)
                if entity.save is None or version > entity.version:
                    entity.save, entity.version = change, version
                    batch.rows[key] = row
                # An owner's state row is locked with ours, so that its deletion cannot pass by.
                for owner in self.targets[change.kind].owners_of(row):
                    batch.entities[owner]
            else:
                deleted_at = time_text(change.event_ms)
                if entity.deleted_at is None or deleted_at < entity.deleted_at:
                    entity.deleted_at = deleted_at
                batch.deletes[change.kind].append(change.clerk_id)
        return batch

    async def _decide(
        self, connection: Connection, batch: _Batch, changes: Sequence[Change]
    ) -> None:
        """The first round trip: advance the state, read back who is newest and what is known."""
        steps: list[Step] = self._fence_steps()
        learn: list[Callable[[Result], None]] = [self._check_fence] * len(steps)
        settled: list[Read] = []
        if batch.entities:
            candidates = []
            ids: dict[str, list[str]] = defaultdict(list)
            for key in sorted(batch.entities):
                entity = batch.entities[key]
                candidates.append((*key, *entity.version, entity.deleted_at, batch.now))
                ids[key[0]].append(key[1])
            steps.append((self.own.advance, candidates))
            learn.append(lambda _: None)
            for kind, of_kind in ids.items():
                settled.append(self.own.states[kind].of(of_kind))
                target = self.targets.get(kind)
                if target is not None and (target.shared or target.mapping.adopt):
                    steps.append(target.present.of(of_kind))
                    learn.append(functools.partial(batch.learn_present, kind))
        deliveries = [change.delivery_id for change in changes if change.delivery_id is not None]
        if deliveries:
            settled.append(self.own.known.of(deliveries))
        if settled:
            steps.append(union(settled))
            learn.append(batch.learn_settled)
        for kind, of_kind in batch.deletes.items():
            target = self.targets[kind]
            for place, (owned, references, _) in enumerate(target.owned):
                if target.mapping.mark is None and owned.references != target.mapping.key:
                    steps.append(references.of(of_kind))
                    learn.append(functools.partial(batch.learn_references, kind, place))
        if steps:
            for learned, result in zip(learn, await connection.run(steps), strict=True):
                learned(result)

    def lower(self, clerk_id: str, kind: str, *, seen: tuple[int, int], to: int) -> Step:
        """Take back a version that was ahead of Clerk's, if it is still the one that was seen.

        The only statement by which a version goes down: what follows has to write the row anew.
        """
        lease, token = self._fence or ("", 0)
        return (self.own.lower, [[to, kind, clerk_id, *seen, lease, token]])

    def moved(self, kind: str, part: int, *, to: Sequence[object]) -> Step:
        """Note how far a part of a backfill has come, in the order of `statements.MOVED`.

        Under a lease that is somebody else's it changes nothing.
        """
        lease, token = self._fence or ("", 0)
        return (self.own.move, [[*to, kind, part, lease, token]])

    def _fence_steps(self) -> list[Step]:
        return [] if self._fence is None else [(self.own.lease, [self._fence[:1]])]

    def _check_fence(self, result: Result) -> None:
        if [token for (token,) in result.rows] != [self._fence and self._fence[1]]:
            raise FencedOff("another process has taken over the lease")

    def _answers(self, batch: _Batch, changes: Sequence[Change]) -> list[Answer]:
        """Each change's answer, as if they had come one by one."""
        answers = []
        seen = set()
        deleted: set[Key] = set()
        for change in changes:
            known = batch.known.get(change.delivery_id or "")
            verdict = self._verdict(batch, change)
            # A delivery that is known but had no effect yet may still get one: after the
            # mapping or a column has changed, "Resend" in Clerk's dashboard works.
            if known in ("applied", "stale") or known == verdict.outcome == Outcome.IGNORED:
                verdict = DUPLICATE
            elif change.delivery_id is not None:
                if change.delivery_id in seen:
                    verdict = DUPLICATE
                seen.add(change.delivery_id)
            if change.action is Action.DELETE and verdict is APPLIED:
                key = (change.kind or "", change.clerk_id or "")
                verdict = STALE if key in deleted else APPLIED
                deleted.add(key)
            answers.append(verdict)
        return answers

    def _verdict(self, batch: _Batch, change: Change) -> Answer:
        if change.reason is not None:
            return Answer(Outcome.QUARANTINED, change.reason)
        if change.action is None or change.kind is None or change.clerk_id is None:
            return IGNORED
        entity = batch.entities[change.kind, change.clerk_id]
        if change.action is Action.DELETE:
            settles = entity.settled_deleted_at == time_text(change.event_ms)
            # A second delivery may tell of the same deletion, at the same time. What is no
            # delivery is here to remove a row that should be gone.
            return APPLIED if settles and (entity.moved or not change.delivery_id) else STALE
        if entity.settled != _version(change) or self._is_gone(batch, change):
            return STALE
        return APPLIED

    def _is_gone(self, batch: _Batch, change: Change) -> bool:
        """Whether the row may no longer be there: deleted itself, or something it belongs to."""
        key = (change.kind or "", change.clerk_id or "")
        row = batch.rows.get(key)
        owners = self.targets[key[0]].owners_of(row) if row is not None else ()
        return any(self._has_no_row(batch, one) for one in (key, *owners))

    def _has_no_row(self, batch: _Batch, key: Key) -> bool:
        entity = batch.entities[key]
        deleted = entity.settled_deleted_at is not None
        return self.has_no_row(key[0], entity.settled[0], deleted=deleted)

    def has_no_row(self, kind: str, version_ms: int, *, deleted: bool) -> bool:
        """Whether an entity in this state has no row, nor those that belong to it."""
        return version_ms == REMOVED[0] or (deleted and self.targets[kind].mapping.mark is None)

    async def _writes(
        self, connection: Connection, batch: _Batch, won: Sequence[Change]
    ) -> list[Step]:
        """The target rows of the changes that won."""
        saves: dict[str, list[Change]] = defaultdict(list)
        deletes: dict[str, list[str]] = defaultdict(list)
        for change in won:
            if change.action is Action.SAVE:
                saves[change.kind or ""].append(change)
            else:
                deletes[change.kind or ""].append(change.clerk_id or "")
        steps: list[Step] = []
        # What is deleted frees what is saved, as a unique value. Foreign keys want children to
        # be deleted before their parents, and saved after them.
        for kind in reversed(self._parents_first):
            if kind in deletes:
                steps += self._deletes(batch, self.targets[kind], deletes[kind])
        for kind in self._parents_first:
            if kind in saves:
                steps += await self._saves(connection, batch, self.targets[kind], saves[kind])
                steps += self._set_late(batch, self.targets[kind], saves[kind])
        return steps

    def _vacated(self, changes: Sequence[Change]) -> list[Step]:
        """What takes their unique values from the rows that are going to get others."""
        ids: dict[str, list[str]] = defaultdict(list)
        for change in changes:
            if change.action is Action.SAVE:
                ids[change.kind or ""].append(change.clerk_id or "")
        vacate = ((self.targets[kind].vacate, of_kind) for kind, of_kind in ids.items())
        return [statement.of(of_kind) for statement, of_kind in vacate if statement is not None]

    async def _saves(
        self, connection: Connection, batch: _Batch, target: Target, saves: Sequence[Change]
    ) -> list[Step]:
        kind = target.mapping.kind
        rows = []
        for change in saves:
            key = (kind, change.clerk_id or "")
            row = batch.rows[key]
            if target.mapping.mark:
                row = target.marked(row, batch.entities[key].settled_deleted_at)
            rows.append((change, row))
        if target.mapping.adopt:
            missing = [(c, row) for c, row in rows if (kind, row[0]) not in batch.present]
            adopted = await self._adopted(connection, target, missing)
            rows = [(change, row) for change, row in rows if row[0] not in adopted]
        if not target.shared:
            return [(target.upsert, [row for _, row in rows])] if rows else []
        there = [row for _, row in rows if (kind, row[0]) in batch.present]
        new = [row for _, row in rows if (kind, row[0]) not in batch.present]
        steps: list[Step] = (
            [(target.update, [[*row[1:], row[0]] for row in there])] if there else []
        )
        return [*steps, (target.insert, new)] if new else steps

    async def _adopted(
        self, connection: Connection, target: Target, missing: Sequence[tuple[Change, list[Any]]]
    ) -> set[str]:
        """Claim rows that the app had before it had Clerk ids; the ids that got one."""
        wanted = [
            (row, claims)
            for change, row in missing
            if (claims := target.claims(change.claims or {})) is not None
        ]
        if not wanted:
            return set()
        found = await connection.run([(target.find, [claims for _, claims in wanted])])
        claimed: list[list[Any]] = []
        for (row, claims), result in zip(wanted, found, strict=True):
            taken = {claim[-1] for claim in claimed}
            for primary, *values in result.rows:
                # The column's collation may hold "jose" and "josé" for equal. We do not.
                same = [as_text(v).casefold() for v in values] == [
                    as_text(v).casefold() for v in claims
                ]
                if same and primary not in taken:
                    claimed.append([*row, primary])
                    break
        if not claimed:
            return set()
        results = await connection.run([(target.claim, claimed)])
        return {
            row[0] for row, result in zip(claimed, results, strict=True) if result.affected == 1
        }

    def _deletes(self, batch: _Batch, target: Target, ids: Sequence[str]) -> list[Step]:
        kind = target.mapping.kind
        if target.mapping.mark:
            marks = [
                target.marking(id_, batch.entities[kind, id_].settled_deleted_at) for id_ in ids
            ]
            return [(target.mark, marks)]
        steps: list[Step] = []
        for place, (owned, _, delete) in enumerate(target.owned):
            values = (
                ids if owned.references == target.mapping.key else batch.references[kind, place]
            )
            if values:
                steps.append(delete.of(values))
        return [*steps, target.delete.of(ids)]

    def _set_late(self, batch: _Batch, target: Target, saves: Sequence[Change]) -> list[Step]:
        """Columns of the app's that a delete sets: once more, as the row may be here only now."""
        if not target.mapping.sets:
            return []
        ids = [_clerk_id(change) for change in saves]
        entities = batch.entities
        late = [one for one in ids if entities[target.mapping.kind, one].settled_deleted_at]
        return self._deletes(batch, target, late) if late else []

    def _ledger(
        self,
        changes: Sequence[Change],
        answers: Sequence[Answer],
        known: Mapping[str, str],
        now: str,
    ) -> list[Step]:
        recorded, detained, released = [], [], []
        for change, answer in zip(changes, answers, strict=True):
            svix_id = change.delivery_id
            if svix_id is None or answer is DUPLICATE:
                continue
            about = (svix_id, change.type, change.kind, change.clerk_id)
            reason = answer.reason.value if answer.reason else None
            event_at = time_text(change.event_ms) if change.event_ms else None
            recorded.append((*about, answer.outcome.value, reason, event_at, now))
            if answer.outcome is Outcome.QUARANTINED:
                again = time_text(change.retry_at_ms) if change.retry_at_ms else None
                detained.append((*about, reason, change.detail, change.payload, now, again))
            elif known.get(svix_id) == Outcome.QUARANTINED:
                released.append(svix_id)
        steps: list[Step] = []
        if recorded:
            steps.append((self.own.record, recorded))
        if detained:
            steps.append((self.own.detain, detained))
        if released:
            steps.append(self.own.release.of(released))
        return steps


def _parents_first(targets: Mapping[str, Target]) -> tuple[str, ...]:
    """The kinds in an order in which each comes after those that its foreign keys lead to."""
    kinds = {target.table.name: kind for kind, target in targets.items()}
    order: dict[str, None] = {}
    under_way: set[str] = set()

    def add(kind: str) -> None:
        if kind in order or kind in under_way:  # in a circle: where it was entered comes last
            return
        under_way.add(kind)
        for parent in sorted(targets[kind].parents & kinds.keys()):
            add(kinds[parent])
        order[kind] = None

    for kind in targets:
        add(kind)
    return tuple(order)


def _clerk_id(change: Change) -> str:
    return change.clerk_id or ""


def _version(change: Change) -> Version:
    return (change.version_ms, change.event_ms, change.delivery_id or "")


def _time_read(value: object) -> str | None:
    """A time as the driver gives it, in the text that `time_text` writes."""
    if isinstance(value, datetime):
        return value.isoformat(" ", "microseconds")
    return None if value is None else str(value)


def quarantined(
    change: Change, reason: Reason, detail: str, *, retry_at_ms: int | None = None
) -> Change:
    """The same delivery, to be kept aside for this reason, and tried again at this time."""
    return replace(change, action=None, reason=reason, detail=detail, retry_at_ms=retry_at_ms)
