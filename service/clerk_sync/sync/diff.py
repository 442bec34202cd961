"""Compare Clerk's objects with their rows: what differs, and the Change that repairs it.

It only reads. Whether a Change may still be written is decided by `store.apply`, under lock.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from clerk_sync.database.connection import COMMIT
from clerk_sync.mapping.change import ApiRead, Change, Delete
from clerk_sync.outcomes import Verdict
from clerk_sync.store.sql import union
from clerk_sync.store.store import encoded
from clerk_sync.store.values import InvalidValue, as_text, read_time_ms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clerk_sync.database.connection import Connection, Step
    from clerk_sync.mapping.change import Key, Upsert
    from clerk_sync.outcomes import Reason
    from clerk_sync.store.store import Store
    from clerk_sync.store.target import Target

# Clerk's API may lag behind its own webhooks: what they brought within this time stays.
SETTLED_MS: Final = 60_000


@dataclass(frozen=True, slots=True)
class Difference:
    """One column that differs: its name, Clerk's value, the table's."""

    column: str
    wanted: Any
    stored: Any


@dataclass(frozen=True, slots=True)
class Comparison:
    """One object in Clerk, compared with its row.

    `repair` is the Change that gives the row Clerk's content, None if none is needed or
    possible. `ahead` is the state of an entity whose version has been higher than Clerk's for a
    while. `conflict` says that Clerk still lists an entity that was deleted here a while ago.
    """

    clerk_id: str
    verdict: Verdict
    repair: Change | None = None
    differences: tuple[Difference, ...] = ()
    ahead: State | None = None
    conflict: bool = False
    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class State:
    """The state of an entity, as stored; times are unix milliseconds.

    `delivered` says that a webhook brought its content, not Clerk's API.
    """

    version_ms: int
    event_ms: int
    delivered: bool
    deleted_ms: int | None
    synced_ms: int


async def states_of(
    connection: Connection, store: Store, kind: str, ids: Sequence[str]
) -> dict[str, State]:
    """The stored states of these entities, by Clerk id."""
    result, _ = await connection.run([store.own.states[kind].of(ids), COMMIT])
    return {clerk_id: state for (_, clerk_id), state in _states(result.rows).items()}


async def compare(
    connection: Connection, store: Store, kind: str, upserts: Sequence[Upsert], read: ApiRead
) -> list[Comparison]:
    """Compare the upserts of one read of this kind with their rows, in one round trip.

    Raises DatabaseUnavailable.
    """
    if not upserts:
        return []
    target = store.targets[kind]
    rows: dict[str, list[Any] | InvalidValue] = {}
    wanted: dict[str, set[str]] = defaultdict(set)
    for upsert in upserts:
        _, clerk_id = upsert.entity
        wanted[kind].add(clerk_id)
        try:
            row = target.row(clerk_id, upsert.values)
        except InvalidValue as error:
            rows[clerk_id] = error
            continue
        rows[clerk_id] = row
        for owner_kind, owner_id in target.owners_of(row):
            wanted[owner_kind].add(owner_id)
    reads = [store.own.states[kind].of(sorted(ids)) for kind, ids in wanted.items()]
    steps: list[Step] = [union(reads), target.read.of(sorted(wanted[kind])), COMMIT]
    known, stored, _ = await connection.run(steps)
    states = _states(known.rows)
    there = {as_text(row[0]): row for row in stored.rows}
    return [
        _compare_one(one, store, rows[one.entity[1]], there.get(one.entity[1]), states, read=read)
        for one in upserts
    ]


def _states(rows: Sequence[Sequence[Any]]) -> dict[Key, State]:
    return {
        (kind, clerk_id): State(
            version_ms,
            event_ms,
            bool(source),
            read_time_ms(deleted_at),
            read_time_ms(synced_at) or 0,
        )
        for kind, clerk_id, version_ms, event_ms, source, deleted_at, synced_at in rows
    }


def _compare_one(
    upsert: Upsert,
    store: Store,
    row: list[Any] | InvalidValue,
    stored: Sequence[Any] | None,
    states: dict[Key, State],
    *,
    read: ApiRead,
) -> Comparison:
    kind, clerk_id = upsert.entity
    target = store.targets[kind]
    state = states.get(upsert.entity)
    if state is not None and state.deleted_ms is not None:
        conflict = read.began_ms - state.deleted_ms > SETTLED_MS
        delete = Delete(upsert.entity, state.deleted_ms)
        return replace(orphaned(delete, read, target, stored), conflict=conflict)
    if isinstance(row, InvalidValue):
        return Comparison(clerk_id, Verdict.UNFIT, None, reason=row.reason)
    for owner in target.owners_of(row):
        its = states.get(owner)
        if its is not None and store.has_no_row(
            owner[0], its.version_ms, deleted=its.deleted_ms is not None
        ):
            return orphaned(Delete(upsert.entity, read.began_ms), read, target, stored)
    places = target.differing(row, stored) if stored is not None else []
    # An object without a time of its own has the time of the request as its version.
    version_ms, event_ms, _ = upsert.version
    dated = version_ms != event_ms
    behind = state is None or (state.version_ms < version_ms and (dated or bool(places)))
    # A little ahead may be how Clerk writes its times; far ahead would keep real updates out.
    far = state is not None and state.version_ms > version_ms + SETTLED_MS
    if stored is not None and not places and not behind and not far:
        return Comparison(clerk_id, Verdict.SAME)
    change = Change(read, encoded(upsert, row))
    differences = tuple(
        Difference(target.names[place], row[place], stored[place])
        for place in places
        if stored is not None
    )
    if state is None or behind:
        verdict = Verdict.MISSING if stored is None else Verdict.OUTDATED
        return Comparison(clerk_id, verdict, change, differences)
    verdict = Verdict.MISSING if stored is None else Verdict.DRIFTED
    if state.version_ms == version_ms and state.event_ms < event_ms:
        return Comparison(clerk_id, verdict, change, differences)
    if state.synced_ms > event_ms - SETTLED_MS:
        return Comparison(clerk_id, Verdict.NEWER)
    return Comparison(clerk_id, verdict, change, differences, ahead=state)


def orphaned(
    delete: Delete, read: ApiRead, target: Target, stored: Sequence[Any] | None
) -> Comparison:
    """Compare a deleted object with its row, which has to be gone, or marked."""
    _, clerk_id = delete.entity
    mark = target.mapping.mark
    if stored is None or (mark is not None and stored[-1] is not None):
        return Comparison(clerk_id, Verdict.NEWER)
    return Comparison(clerk_id, Verdict.DELETED, Change(read, delete))
