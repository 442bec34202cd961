"""Apply changes: state, ledger and mapped tables in one transaction.

`apply` takes two round trips for a batch of any size. The first advances the state rows of all
entities in it, in key order, which locks them and decides which version is newest. It also reads
back that decision, and which deliveries the ledger knows. The second writes the mapped rows of
the changes that won, the ledger, and COMMIT.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from clerk_sync.database.connection import COMMIT, Connection, Result, Step
from clerk_sync.database.errors import DatabaseUnavailable, RejectedByDatabase, SchemaChanged
from clerk_sync.mapping.change import (
    Delete,
    Delivered,
    Ignore,
    Key,
    Quarantine,
    Upsert,
    Version,
    entity_of,
    quarantined,
)
from clerk_sync.outcomes import Answer, Outcome
from clerk_sync.store.adoption import adopt
from clerk_sync.store.sql import Compiler, OwnStatements, union
from clerk_sync.store.values import InvalidValue, as_text, time_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from clerk_sync.mapping.change import Change, Effect
    from clerk_sync.store.sql import ForIds
    from clerk_sync.store.target import Target

REMOVED: Final[Version] = (2**63 - 1, 0, "")
"""The version of an entity that was removed for good: no event has a newer one."""

APPLIED: Final = Answer(Outcome.APPLIED)
STALE: Final = Answer(Outcome.STALE)
DUPLICATE: Final = Answer(Outcome.DUPLICATE)
IGNORED: Final = Answer(Outcome.IGNORED)


@dataclass(frozen=True, slots=True)
class Encoded(Upsert):
    """An upsert with its row, in the order of the target's columns and as they store it."""

    row: Sequence[Any]


def encoded(upsert: Upsert, row: Sequence[Any]) -> Encoded:
    """Return the upsert with its row."""
    return Encoded(upsert.entity, upsert.version, upsert.values, upsert.claims, row)


_Effect = Encoded | Delete | Ignore | Quarantine


@dataclass(slots=True)
class _Entity:
    """One entity in a batch: the newest version and earliest deletion in it, then its state."""

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
    deletes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    known: dict[str, str] = field(default_factory=dict)
    present: set[Key] = field(default_factory=set)
    references: dict[tuple[str, int], list[Any]] = field(default_factory=dict)

    def learn_states(self, result: Result) -> None:
        """Take the entities' states as they are after this batch has advanced them."""
        for kind, clerk_id, version_ms, event_ms, source, deleted_at, synced_at in result.rows:
            entity = self.entities[kind, clerk_id]
            entity.settled = (version_ms, event_ms, source)
            entity.settled_deleted_at = _time_read(deleted_at)
            entity.moved = _time_read(synced_at) == self.now

    def learn_deliveries(self, result: Result) -> None:
        """Take the outcomes of those deliveries that the ledger has."""
        self.known.update((svix_id, outcome) for svix_id, outcome in result.rows)

    def learn_present(self, kind: str, result: Result) -> None:
        self.present.update((kind, as_text(clerk_id)) for (clerk_id,) in result.rows)

    def learn_references(self, kind: str, place: int, result: Result) -> None:
        self.references[kind, place] = [value for (value,) in result.rows if value is not None]


class _Probes:
    """Queries for the rows with some values, and for those of them that nobody has locked."""

    def __init__(self) -> None:
        self._asked: dict[tuple[ForIds, ForIds], dict[Any, list[int]]] = {}

    def add(self, there: ForIds, free: ForIds, value: object, place: int) -> None:
        """Ask about this value, whose row the change at this place needs."""
        self._asked.setdefault((there, free), {}).setdefault(value, []).append(place)

    def steps(self) -> list[Step]:
        return [one.of(list(values)) for pair, values in self._asked.items() for one in pair]

    def locked(self, results: Sequence[Result]) -> set[int]:
        """Return the places of the changes whose rows exist and are locked."""
        found = [Counter(_folded(value) for (value,) in result.rows) for result in results]
        locked: set[int] = set()
        for values, there, free in zip(self._asked.values(), found[::2], found[1::2], strict=False):
            taken = there - free
            for value, places in values.items():
                if _folded(value) in taken:
                    locked.update(places)
        return locked


def _folded(value: object) -> str:
    """Return a value as a collation that ignores case compares it."""
    return as_text(value).casefold()


class FencedOff(DatabaseUnavailable):
    """The write carried an old fencing token: another process holds the lease now."""


class Store:
    """Apply changes to the tables of one mapping, over any number of connections."""

    def __init__(self, targets: Mapping[str, Target], compiler: Compiler) -> None:
        self.targets = targets
        self.own = OwnStatements(compiler)
        self._fence: tuple[str, int] | None = None
        # SQLite locks the whole file.
        self._locks_rows = not compiler.sqlite
        self._parents_first = _parents_first(targets)
        self._tables = {target.table.name for target in targets.values()}

    def fenced(self, lease: str, token: int) -> Store:
        """Return the same store, fenced: its transactions carry this token of the lease.

        They raise FencedOff once the lease has another token, even before its former holder
        notices that it has lost the lease.
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
        """Commit all changes in one transaction, and return their answers in order.

        The rows of those in `vacating` give up their unique values before they get the new ones,
        so that two rows may swap them. `now_ms` is unix milliseconds. Raises RejectedByDatabase
        when the database rejects some of the data, and DatabaseUnavailable when it cannot write
        now. Then nothing is kept.
        """
        now = time_text(now_ms)
        effects = [self._encoded(change.effect) for change in changes]
        batch = self._reduced(effects, now)
        await self._decide(connection, batch, changes)
        answers = self._answers(batch, changes, effects)
        won = [effect for effect, answer in zip(effects, answers, strict=True) if answer is APPLIED]
        steps = self._vacated(vacating)
        steps += await self._writes(connection, batch, won)
        steps += self._ledger(changes, effects, answers, batch.known, now)
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
        """Find the changes that the database rejects: return the errors by their places.

        Everything is rolled back. It costs a round trip for each rejection. Halving the batch
        until each rejected change stands alone would cost a transaction for nearly every change
        where half of them are rejected.
        """
        effects = [self._encoded(change.effect) for change in changes]
        batch = self._reduced(effects, time_text(now_ms))
        await self._decide(connection, batch, changes)
        answers = self._answers(batch, changes, effects)
        won = [place for place, answer in enumerate(answers) if answer is APPLIED]
        await connection.try_each(self._vacated(vacating))
        refused: dict[int, RejectedByDatabase | SchemaChanged] = {}
        steps: list[Step] = []
        places: list[int] = []
        for place in sorted(won, key=lambda place: self._turn(effects[place])):
            try:
                of_one = await self._writes(connection, batch, [effects[place]])
            except (RejectedByDatabase, SchemaChanged) as error:  # of a row that was to be adopted
                refused[place] = error
                continue
            steps += of_one
            places += [place] * len(of_one)
        tried = await connection.try_each(steps)
        await connection.rollback()
        return refused | {places[step]: error for step, error in tried.items()}

    async def locked(self, connection: Connection, changes: Sequence[Change]) -> set[int]:
        """Return the places of the changes whose rows another transaction has locked.

        It waits for no lock and keeps none, so `apply` may still meet one that was acquired a
        moment later. It does not see locks on unmapped tables, nor on unique values.
        """
        if not self._locks_rows:
            return set()
        probes = _Probes()
        for place, change in enumerate(changes):
            match effect := self._encoded(change.effect):
                case Encoded(entity=(kind, clerk_id)) | Delete(entity=(kind, clerk_id)):
                    target = self.targets[kind]
                case _:
                    continue
            # Not the states of its owners, which only clerk-sync locks, and for moments.
            probes.add(self.own.present[kind], self.own.free[kind], clerk_id, place)
            probes.add(target.present, target.free, clerk_id, place)
            if isinstance(effect, Encoded):
                for column, table, there, free in target.referred:
                    if table in self._tables and effect.row[column] is not None:
                        probes.add(there, free, effect.row[column], place)
            else:
                for there, free in target.owned_free:
                    probes.add(there, free, clerk_id, place)
        results = await connection.run([*probes.steps(), COMMIT])
        return probes.locked(results)

    def _turn(self, effect: _Effect) -> tuple[int, int]:
        """Return a sort key for the order in which `_writes` writes effects."""
        kind, _ = entity_of(effect)
        depth = self._parents_first.index(kind) if kind else 0
        return (0, -depth) if isinstance(effect, Delete) else (1, depth)

    async def insert(
        self, connection: Connection, kind: str, upserts: Sequence[Upsert], *, now_ms: int
    ) -> None:
        """Insert rows of one kind that are all new, with their states, and commit.

        Nothing is read first, which saves half of the time that `apply` takes. Raises
        RejectedByDatabase when a key exists already or a value is invalid, and
        DatabaseUnavailable. Then nothing is kept. Kinds with owners need `apply`, which locks the
        states of their owners.
        """
        target, now = self.targets[kind], time_text(now_ms)
        upserts = sorted(upserts, key=lambda one: one.entity)  # the order of all locks
        try:
            rows = [target.row(one.entity[1], one.values) for one in upserts]
        except InvalidValue as error:
            raise RejectedByDatabase(error.reason, f"column {error.column}") from None
        state = [(one.entity[1], *one.version[:2], now) for one in upserts]
        fence = self._fence_steps()
        results = await connection.run(
            [*fence, (self.own.begin[kind], state), (target.insert, rows)]
        )
        for result in results[: len(fence)]:
            self._check_fence(result)
        await connection.run([COMMIT])

    def _encoded(self, effect: Effect) -> _Effect:
        """Encode an upsert's row; return a quarantine where one of its values is invalid."""
        match effect:
            case Encoded():
                return effect
            case Upsert(entity=(kind, clerk_id), values=values):
                try:
                    return encoded(effect, self.targets[kind].row(clerk_id, values))
                except InvalidValue as error:
                    return quarantined(effect, error.reason, f"column {error.column}")
            case Delete() | Ignore() | Quarantine():
                return effect

    def _reduced(self, effects: Iterable[_Effect], now: str) -> _Batch:
        """Reduce a batch to the newest version and the earliest deletion of each entity."""
        batch = _Batch(now)
        for effect in effects:
            match effect:
                case Encoded(entity=key, version=version, row=row):
                    entity = batch.entities[key]
                    entity.version = max(entity.version, version)
                    # An owner's state row is locked with ours, so that its deletion cannot pass by.
                    for owner in self.targets[key[0]].owners_of(row):
                        batch.entities[owner]
                case Delete(entity=key, deleted_ms=deleted_ms):
                    entity = batch.entities[key]
                    deleted_at = time_text(deleted_ms)
                    if entity.deleted_at is None or deleted_at < entity.deleted_at:
                        entity.deleted_at = deleted_at
                    batch.deletes[key[0]].append(key[1])
        return batch

    async def _decide(
        self, connection: Connection, batch: _Batch, changes: Sequence[Change]
    ) -> None:
        """Advance the states, and read back the newest versions and the known deliveries."""
        steps: list[Step] = self._fence_steps()
        learn: list[Callable[[Result], None]] = [self._check_fence] * len(steps)
        if batch.entities:
            candidates = []
            ids: dict[str, list[str]] = defaultdict(list)
            for key in sorted(batch.entities):
                entity = batch.entities[key]
                candidates.append((*key, *entity.version, entity.deleted_at, batch.now))
                ids[key[0]].append(key[1])
            steps.append((self.own.advance, candidates))
            learn.append(lambda _: None)
            steps.append(union([self.own.states[kind].of(ids[kind]) for kind in ids]))
            learn.append(batch.learn_states)
            for kind, of_kind in ids.items():
                target = self.targets.get(kind)
                if target is not None and (target.shared or target.mapping.adopt):
                    steps.append(target.present.of(of_kind))
                    learn.append(functools.partial(batch.learn_present, kind))
        deliveries = [svix_id for change in changes if (svix_id := change.svix_id) is not None]
        if deliveries:
            # A statement of its own, though a UNION with the states would save a result set: 30 to
            # 75 µs of the service's CPU per batch, which a batch of 8 or more does not notice.
            steps.append(self.own.known.of(deliveries))
            learn.append(batch.learn_deliveries)
        for kind, of_kind in batch.deletes.items():
            target = self.targets[kind]
            for place, (owned, references, _) in enumerate(target.owned):
                if target.mapping.mark is None and owned.references != target.mapping.key:
                    steps.append(references.of(of_kind))
                    learn.append(functools.partial(batch.learn_references, kind, place))
        if steps:
            for learned, result in zip(learn, await connection.run(steps), strict=True):
                learned(result)

    def rewind(self, clerk_id: str, kind: str, *, seen: tuple[int, int], to: int) -> Step:
        """Return the step that rewinds a version which is ahead of Clerk's, if it is still `seen`.

        No other statement lowers a version. The caller has to write the row again afterwards.
        """
        lease, token = self._fence or ("", 0)
        return (self.own.lower, [[to, kind, clerk_id, *seen, lease, token]])

    def moved(self, kind: str, part: int, *, to: Sequence[object]) -> Step:
        """Return the step that advances a checkpoint, with values in the order of `sql.MOVED`.

        It changes nothing when another process holds the lease.
        """
        lease, token = self._fence or ("", 0)
        return (self.own.move, [[*to, kind, part, lease, token]])

    def _fence_steps(self) -> list[Step]:
        return [] if self._fence is None else [(self.own.lease, [self._fence[:1]])]

    def _check_fence(self, result: Result) -> None:
        if [token for (token,) in result.rows] != [self._fence and self._fence[1]]:
            raise FencedOff("another process has taken over the lease")

    def _answers(
        self, batch: _Batch, changes: Sequence[Change], effects: Sequence[_Effect]
    ) -> list[Answer]:
        """Return each change's answer, as if they had arrived one by one."""
        answers = []
        seen = set()
        deleted: set[Key] = set()
        for change, effect in zip(changes, effects, strict=True):
            svix_id = change.svix_id
            answer = self._answer(batch, effect, delivered=svix_id is not None)
            if svix_id is not None:
                known = batch.known.get(svix_id)
                # A delivery that is known but had no effect yet may still get one: after the
                # mapping or a column has changed, "Resend" in Clerk's dashboard works.
                if known in ("applied", "stale") or known == answer.outcome == Outcome.IGNORED:
                    answer = DUPLICATE
                else:
                    if svix_id in seen:
                        answer = DUPLICATE
                    seen.add(svix_id)
            if isinstance(effect, Delete) and answer is APPLIED:
                answer = STALE if effect.entity in deleted else APPLIED
                deleted.add(effect.entity)
            answers.append(answer)
        return answers

    def _answer(self, batch: _Batch, effect: _Effect, *, delivered: bool) -> Answer:
        match effect:
            case Encoded(entity=key, version=version, row=row):
                if batch.entities[key].settled != version:
                    return STALE
                owners = self.targets[key[0]].owners_of(row)
                gone = any(self._has_no_row(batch, one) for one in (key, *owners))
                return STALE if gone else APPLIED
            case Delete(entity=key, deleted_ms=deleted_ms):
                entity = batch.entities[key]
                settles = entity.settled_deleted_at == time_text(deleted_ms)
                # A second delivery may report the same deletion, with the same time. A change
                # without a delivery is there to remove an orphaned row.
                return APPLIED if settles and (entity.moved or not delivered) else STALE
            case Quarantine(reason=reason):
                return Answer(Outcome.QUARANTINED, reason)
            case Ignore():
                return IGNORED

    def _has_no_row(self, batch: _Batch, key: Key) -> bool:
        entity = batch.entities[key]
        deleted = entity.settled_deleted_at is not None
        return self.has_no_row(key[0], entity.settled[0], deleted=deleted)

    def has_no_row(self, kind: str, version_ms: int, *, deleted: bool) -> bool:
        """Return whether an entity in this state has no row, nor do those that it owns."""
        return version_ms == REMOVED[0] or (deleted and self.targets[kind].mapping.mark is None)

    async def _writes(
        self, connection: Connection, batch: _Batch, won: Sequence[_Effect]
    ) -> list[Step]:
        """Return the steps that write the mapped rows of the effects that won."""
        upserts: dict[str, list[Encoded]] = defaultdict(list)
        deletes: dict[str, list[str]] = defaultdict(list)
        for effect in won:
            match effect:
                case Encoded(entity=(kind, _)):
                    upserts[kind].append(effect)
                case Delete(entity=(kind, clerk_id)):
                    deletes[kind].append(clerk_id)
        steps: list[Step] = []
        # What is deleted frees what is saved, as a unique value. Foreign keys want children to
        # be deleted before their parents, and saved after them.
        for kind in reversed(self._parents_first):
            if kind in deletes:
                steps += self._deletes(batch, self.targets[kind], deletes[kind])
        for kind in self._parents_first:
            if kind in upserts:
                steps += await self._upserts(connection, batch, self.targets[kind], upserts[kind])
                steps += self._set_late(batch, self.targets[kind], upserts[kind])
        return steps

    def _vacated(self, changes: Sequence[Change]) -> list[Step]:
        """Return the steps that clear the unique values of rows which are about to get others."""
        ids: dict[str, list[str]] = defaultdict(list)
        for change in changes:
            match change.effect:
                case Upsert(entity=(kind, clerk_id)):
                    ids[kind].append(clerk_id)
        vacate = ((self.targets[kind].vacate, of_kind) for kind, of_kind in ids.items())
        return [statement.of(of_kind) for statement, of_kind in vacate if statement is not None]

    async def _upserts(
        self, connection: Connection, batch: _Batch, target: Target, upserts: Sequence[Encoded]
    ) -> list[Step]:
        kind = target.mapping.kind
        rows = []
        for upsert in upserts:
            row = upsert.row
            if target.mapping.mark:
                row = target.marked(row, batch.entities[upsert.entity].settled_deleted_at)
            rows.append((upsert, row))
        if target.mapping.adopt:
            missing = [(one, row) for one, row in rows if one.entity not in batch.present]
            adopted = await adopt(connection, target, missing)
            rows = [(one, row) for one, row in rows if row[0] not in adopted]
        if not target.shared:
            return [(target.upsert, [row for _, row in rows])] if rows else []
        there = [row for _, row in rows if (kind, row[0]) in batch.present]
        new = [row for _, row in rows if (kind, row[0]) not in batch.present]
        steps: list[Step] = (
            [(target.update, [[*row[1:], row[0]] for row in there])] if there else []
        )
        return [*steps, (target.insert, new)] if new else steps

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

    def _set_late(self, batch: _Batch, target: Target, upserts: Sequence[Encoded]) -> list[Step]:
        """Return the steps that set the columns of `set` again, for rows that exist only now."""
        if not target.mapping.sets:
            return []
        keys = [one.entity for one in upserts]
        late = [
            clerk_id for kind, clerk_id in keys if batch.entities[kind, clerk_id].settled_deleted_at
        ]
        return self._deletes(batch, target, late) if late else []

    def _ledger(
        self,
        changes: Sequence[Change],
        effects: Sequence[_Effect],
        answers: Sequence[Answer],
        known: Mapping[str, str],
        now: str,
    ) -> list[Step]:
        recorded, detained, kept, released = [], [], [], []
        for change, effect, answer in zip(changes, effects, answers, strict=True):
            source = change.source
            if not isinstance(source, Delivered) or answer is DUPLICATE:
                continue
            about = (source.svix_id, source.type, *entity_of(effect))
            reason = answer.reason.value if answer.reason else None
            event_at = time_text(source.event_ms) if source.event_ms else None
            if isinstance(effect, Quarantine):
                again = time_text(effect.retry_at_ms) if effect.retry_at_ms else None
                if source.kept:
                    # An update alone: its person may have been erased since it was read.
                    kept.append((reason, effect.detail, again, source.svix_id))
                    continue
                detained.append((*about, reason, effect.detail, source.payload, now, again))
            elif known.get(source.svix_id) == Outcome.QUARANTINED:
                released.append(source.svix_id)
            recorded.append((*about, answer.outcome.value, reason, event_at, now))
        steps: list[Step] = []
        if recorded:
            steps.append((self.own.record, recorded))
        if detained:
            steps.append((self.own.detain, detained))
        if kept:
            steps.append((self.own.keep, kept))
        if released:
            steps.append(self.own.release.of(released))
        return steps


def _parents_first(targets: Mapping[str, Target]) -> tuple[str, ...]:
    """Sort the kinds so that each comes after those that its foreign keys refer to."""
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


def _time_read(value: object) -> str | None:
    """Return a time from the driver as the text that `time_text` writes."""
    if isinstance(value, datetime):
        return value.isoformat(" ", "microseconds")
    return None if value is None else str(value)
