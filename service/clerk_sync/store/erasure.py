"""Remove rows for good: purge soft-deleted rows, and erase a person.

The state of a removed entity gets a version that no event can exceed. So late events are `stale`,
even where a delete only marks the row, and after the row itself is gone.
"""

from __future__ import annotations

import functools
import re
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, TypeVar

import sqlalchemy as sa
import stamina

from clerk_sync.clerk.catalog import USER_PATHS
from clerk_sync.clerk.events import CLERK_ID
from clerk_sync.database.errors import Contention, LockWaitTimeout, translate_engine_errors
from clerk_sync.store.store import REMOVED, Store
from clerk_sync.store.tables import entities, events, quarantine
from clerk_sync.store.values import time_text

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from clerk_sync.mapping.change import Key
    from clerk_sync.mapping.model import Owned
    from clerk_sync.store.target import Target

_CHUNK: Final = 200
# Payloads may be a MiB each.
_PAYLOADS: Final = 8
_ATTEMPTS: Final = 6

_T = TypeVar("_T")


async def purge(
    engine: AsyncEngine, store: Store, *, now_ms: int, dry_run: bool = False
) -> dict[str, int]:
    """Purge the rows that were soft-deleted longer ago than `purge_after`; return counts by kind.

    A row has to be due both by its mark and by its tombstone, as the app may have cleared the
    mark, or set one itself. Owned rows are removed with it. With `dry_run`, rows are only counted.
    Raises DatabaseUnavailable.
    """
    counts = {}
    for kind, target in store.targets.items():
        after_ms = target.mapping.purge_after_ms
        if after_ms is None:
            continue
        before = datetime.fromisoformat(time_text(now_ms - after_ms))
        counts[kind] = 0
        async for ids in _marked(engine, target, before):
            if dry_run:
                counts[kind] += len(await _read(engine, _due(kind, ids, before)))
            else:
                purged = functools.partial(
                    _purge, store=store, kind=kind, ids=ids, before=before, now_ms=now_ms
                )
                counts[kind] += await _transacted(engine, purged)
    return counts


async def erase(engine: AsyncEngine, store: Store, user_id: str, *, now_ms: int) -> dict[str, int]:
    """Remove a person from clerk-sync's tables and every mapped one; return row counts by table.

    That is the user's row, also where a delete only marks; what it owns; rows of other objects
    with a column that says they are this user's, and what those own; the ledger's rows of all
    these, and what quarantine has of them or with the user's id in it. What stays is the
    state: ids and the time of deletion, by which late events are `stale`. A user who is
    nowhere gets that, too. It is done in steps, each a transaction: after a failure, run it
    again. It reads the whole ledger and quarantine, which have no index for it.

    What comes late about an id that was in no table before is `stale`, too, where the mapping
    has the user own it: in `mirror`, new memberships and sessions. Other objects are written,
    and what cannot be applied is in quarantine: run it again for them. The ledger gets the ids
    of late events, as of all events.

    Out of its reach: a mapped row in which no column is exactly the user's id (`out_of_reach`
    tells of which kinds), or that is not adopted yet; rows with no id but an e-mail address, as
    of the waitlist; the id where somebody else's row mentions it (`created_by`, `inviter_id`);
    state and ledger of what went before, when Clerk deleted the user, which are ids and times;
    what the app copied elsewhere; backups, binlogs, logs, and Clerk itself. Raises ValueError
    for what is no id, and DatabaseUnavailable.
    """
    if not CLERK_ID.fullmatch(user_id):
        raise ValueError("not an id of Clerk's")
    user = ("user", user_id)
    advance = functools.partial(_advance, store=store, now_ms=now_ms)
    # First, so that nothing that the user owns is added while the rest is looked for.
    await _transacted(engine, functools.partial(advance, keys=[user]))
    with translate_engine_errors():
        async with engine.connect() as connection:
            everything = await everything_of(connection, store, user)
    for keys in _chunks(sorted(everything)):
        await _transacted(engine, functools.partial(advance, keys=keys))
    # The rows go last: by them the rest is found again if this stops half-way.
    removed: Counter[str] = Counter()
    for ids in _chunks([clerk_id for _, clerk_id in everything]):
        for table in (events, quarantine):
            removed[table.name] += await _forget(engine, table, table.c.clerk_id.in_(ids))
    removed[quarantine.name] += await _forget_mentions(engine, user_id)
    for keys in _chunks(everything[::-1]):
        removed += await _transacted(engine, functools.partial(delete_rows, store=store, keys=keys))
    return dict(removed)


def out_of_reach(store: Store) -> tuple[str, ...]:
    """Return the mapped kinds whose rows may be a user's, but have no column that says whose."""
    user = store.targets.get("user")
    owned = {table.name for _, table in user.owned_tables} if user else set()
    return tuple(
        kind
        for kind, target in store.targets.items()
        if kind in USER_PATHS and not _user_columns(target) and target.table.name not in owned
    )


def _user_columns(target: Target) -> list[sa.Column[Any]]:
    paths = USER_PATHS.get(target.mapping.kind, ())
    return [
        target.table.c[one.name]
        for one in target.mapping.columns
        if one.expression.strip() in paths
    ]


# Purging


async def _marked(
    engine: AsyncEngine, target: Target, before: datetime
) -> AsyncIterator[Sequence[str]]:
    """Yield the ids of rows marked before then, some at a time."""
    key, mark = _key_and_mark(target)
    page = sa.select(key).where(key.is_not(None), mark < before).order_by(key).limit(_CHUNK)
    ids = await _read(engine, page)
    while ids:
        yield ids
        ids = await _read(engine, page.where(key > ids[-1]))


def _key_and_mark(target: Target) -> tuple[sa.Column[Any], sa.Column[Any]]:
    key, mark = target.mapping.key, target.mapping.mark
    assert mark is not None
    return target.table.c[key], target.table.c[mark]


def _due(kind: str, ids: Sequence[str], before: datetime) -> sa.Select[Any]:
    return sa.select(entities.c.clerk_id).where(*_is_due(kind, ids, before))


def _is_due(kind: str, ids: Sequence[str], before: datetime) -> tuple[Any, ...]:
    state = entities.c
    return (state.kind == kind, state.clerk_id.in_(ids), state.deleted_at < before)


async def _purge(
    connection: AsyncConnection,
    *,
    store: Store,
    kind: str,
    ids: Sequence[str],
    before: datetime,
    now_ms: int,
) -> int:
    """Purge those of these rows that are due and still marked; return how many."""
    target = store.targets[kind]
    key, mark = _key_and_mark(target)
    # A write that changes nothing: it locks, as SQLite's SELECT cannot.
    lock = sa.update(entities).where(*_is_due(kind, ids, before))
    await connection.execute(lock.values(source=entities.c.source))
    due = await _column(connection, _due(kind, ids, before))
    marked = sa.select(key).where(key.in_(due), mark < before).with_for_update()
    gone = await _column(connection, marked)
    everything = await _with_owned(connection, store, [(kind, one) for one in gone])
    await _advance(connection, store=store, keys=everything, now_ms=now_ms)
    await delete_rows(connection, store=store, keys=everything[::-1])
    return len(gone)


# Erasing


async def everything_of(connection: AsyncConnection, store: Store, user: Key) -> list[Key]:
    """Return the user, then the entities with a column that names the user, then what they own."""
    found = [user]
    for kind, target in store.targets.items():
        key = target.table.c[target.mapping.key]
        for column in _user_columns(target):
            rows = await connection.execute(
                sa.select(key, column).where(column == user[1], key.is_not(None))
            )
            # The column's collation may consider another id equal. We do not.
            found += [(kind, one) for one, whose in rows if whose == user[1]]
    return await _with_owned(connection, store, found)


async def _forget(engine: AsyncEngine, table: sa.Table, which: sa.ColumnElement[bool]) -> int:
    """Delete these rows of the ledger or quarantine, by scanning the table; return how many."""
    svix_id = table.c.svix_id
    page = sa.select(svix_id).where(which).order_by(svix_id).limit(_CHUNK)
    gone = 0
    found = await _read(engine, page)
    while found:
        gone += await _transacted(engine, functools.partial(_drop, table=table, ids=found))
        found = await _read(engine, page.where(svix_id > found[-1]))
    return gone


async def _forget_mentions(engine: AsyncEngine, user_id: str) -> int:
    """Delete the quarantined events whose payload names exactly this id; return how many."""
    whole = re.compile(rf"(?<![0-9A-Za-z]){re.escape(user_id)}(?![0-9A-Za-z])")
    svix_id, payload = quarantine.c.svix_id, quarantine.c.payload
    # To LIKE, the `_` in every id would match any character.
    mentions = sa.select(svix_id, payload).where(sa.func.instr(payload, user_id) > 0)
    page = mentions.order_by(svix_id).limit(_PAYLOADS)
    gone = 0
    found = await _rows(engine, page)
    while found:
        ids = [one for one, text in found if whole.search(text)]
        gone += await _transacted(engine, functools.partial(_drop, table=quarantine, ids=ids))
        found = await _rows(engine, page.where(svix_id > found[-1][0]))
    return gone


async def _drop(connection: AsyncConnection, *, table: sa.Table, ids: Sequence[str]) -> int:
    return (await connection.execute(sa.delete(table).where(table.c.svix_id.in_(ids)))).rowcount


# Both


async def _with_owned(connection: AsyncConnection, store: Store, keys: Sequence[Key]) -> list[Key]:
    """Expand the entities with everything they own, transitively, without duplicates."""
    kinds = {target.table.name: kind for kind, target in store.targets.items()}
    found = dict.fromkeys(keys)
    waiting = _by_kind(found)
    while waiting:
        kind, ids = waiting.popitem()
        target = store.targets.get(kind)
        for owned, table in target.owned_tables if target else ():
            theirs = store.targets.get(kinds.get(table.name, ""))
            if target is None or theirs is None:
                continue
            key = table.c[theirs.mapping.key]
            for chunk in _chunks(ids):
                values = await _references(connection, target, owned, chunk)
                rows = sa.select(key).where(table.c[owned.column].in_(values), key.is_not(None))
                for clerk_id in await _column(connection, rows):
                    one = (theirs.mapping.kind, clerk_id)
                    if one not in found:
                        found[one] = None
                        waiting[one[0]].append(clerk_id)
    return list(found)


async def _references(
    connection: AsyncConnection, target: Target, owned: Owned, ids: Sequence[str]
) -> Sequence[Any]:
    """Return the values by which owned rows refer to the rows of these ids."""
    if owned.references == target.mapping.key:
        return ids
    column = target.table.c[owned.references]
    key = target.table.c[target.mapping.key]
    return await _column(connection, sa.select(column).where(key.in_(ids), column.is_not(None)))


async def _advance(
    connection: AsyncConnection, *, store: Store, keys: Sequence[Key], now_ms: int
) -> None:
    """Set the states of these entities to a version that no event exceeds; keep deletion times."""
    if keys:
        now = time_text(now_ms)
        advance = store.own.advance
        # In key order, as every transaction locks them.
        rows = [(*key, *REMOVED, now, now) for key in sorted(keys)]
        await connection.exec_driver_sql(f"{advance.head}{advance.values}{advance.tail}", rows)


async def delete_rows(
    connection: AsyncConnection, *, store: Store, keys: Sequence[Key]
) -> Counter[str]:
    """Delete the rows of these entities with their owned rows; return counts by table."""
    removed: Counter[str] = Counter()

    async def delete(column: sa.Column[Any], values: Sequence[Any]) -> None:
        gone = await connection.execute(sa.delete(column.table).where(column.in_(values)))
        removed[column.table.name] += gone.rowcount

    for kind, of_kind in _by_kind(keys).items():
        target = store.targets.get(kind)
        if target is None:
            continue
        for ids in _chunks(of_kind):
            for owned, table in target.owned_tables:
                values = await _references(connection, target, owned, ids)
                await delete(table.c[owned.column], values)
            await delete(target.table.c[target.mapping.key], ids)
    return removed


def _by_kind(keys: Iterable[Key]) -> defaultdict[str, list[str]]:
    by_kind = defaultdict(list)
    for kind, clerk_id in keys:
        by_kind[kind].append(clerk_id)
    return by_kind


def _chunks(items: Sequence[_T]) -> Iterator[Sequence[_T]]:
    for start in range(0, len(items), _CHUNK):
        yield items[start : start + _CHUNK]


async def _column(connection: AsyncConnection, query: sa.Select[Any]) -> Sequence[Any]:
    return list(await connection.scalars(query))


async def _read(engine: AsyncEngine, query: sa.Select[Any]) -> Sequence[Any]:
    return [value for (value,) in await _rows(engine, query)]


async def _rows(engine: AsyncEngine, query: sa.Select[Any]) -> list[tuple[Any, ...]]:
    with translate_engine_errors():
        async with engine.connect() as connection:
            return [tuple(row) for row in await connection.execute(query)]


async def _transacted(engine: AsyncEngine, work: Callable[[AsyncConnection], Awaitable[_T]]) -> _T:
    """Do the work in one transaction, and retry it after a deadlock or a lock wait timeout."""

    async def once() -> _T:
        with translate_engine_errors():
            async with engine.begin() as connection:
                return await work(connection)

    again = stamina.AsyncRetryingCaller(attempts=_ATTEMPTS, wait_initial=0.05, wait_max=1)
    return await again((Contention, LockWaitTimeout), once)
