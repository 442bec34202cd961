"""List all objects of a kind, page by page, resuming where an earlier listing stopped.

Users are listed by creation time, in ranges of it, several at once. Organizations and memberships
have only offsets, which shift when an earlier object is deleted. So pages overlap, and one that
does not overlap the page before it is requested again at a lower offset.

A listing always ends: every step brings something new, advances, or raises an error. It does not
guarantee that it is complete: the caller compares it with Clerk's count.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from array import array
from bisect import bisect_left
from collections import deque
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from clerk_sync.clerk.api import PAGE_LIMIT, ClerkRefused, ClerkUnavailable, Read

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence

    from clerk_sync.clerk.api import Clerk

OVERLAP: Final = 20
AHEAD: Final = 4
"""How many pages of a list are requested ahead."""
AT_ONCE: Final = 8
"""How many parts are listed at the same time."""
# For fewer objects, counting costs more requests than parallel listing saves.
_WORTH_SPLITTING: Final = 100 * PAGE_LIMIT
_PARTS: Final = 32
_SHORTEST_MS: Final = 1000
# How many Clerk returns when it ignores the limit: no page limit is smaller.
_SMALLEST_LIMIT: Final = 10
# How often a listing whose order is not stable is repeated at most.
_SWEEPS: Final = 20
# How many repeats in a row may find nothing new by chance. Each finds a remaining object with a
# probability of some 60 %.
_IDLE: Final = 5
# How many pages a shifting list may cost, in addition to eight times its own.
_SPARE_PAGES: Final = 32
_LOST_CURSOR: Final = (400, 404, 422)
_BUCKETS: Final = 4096
_ENDLESS: Final = (
    "the walk over the list of {0}s does not end: on {1} pages were {2} different ones, and Clerk "
    "counts {3}"
)


@dataclass(frozen=True, slots=True)
class Part:
    """A range of one kind's listing, and how far it was processed.

    For users it is those created in [from_ms, to_ms), in unix milliseconds, where None is open.
    Other kinds have one part. `after` is the last id that was processed, `reached_ms` the creation
    time of that user, and `seen` how many were listed up to it.
    """

    kind: str
    number: int = 0
    from_ms: int | None = None
    to_ms: int | None = None
    after: str | None = None
    reached_ms: int | None = None
    seen: int = 0
    finished: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """Objects of one kind, and the part as it is once they are processed."""

    objects: Sequence[dict[str, Any]]
    began_ms: int
    part: Part


async def parts_of(clerk: Clerk, kind: str, *, count: int) -> list[Part]:
    """Divide the listing of a kind, of which Clerk counts so many objects, into parts."""
    if kind != "user" or count < _WORTH_SPLITTING:
        return [Part(kind)]
    read = await clerk.users(from_ms=None, to_ms=None, limit=1)
    first = read.json
    if not first or not isinstance(first[0].get("created_at"), int):
        return [Part(kind)]
    born = first[0]["created_at"]
    windows = await _split(clerk, born, read.began_ms, count, max(10 * PAGE_LIMIT, count // _PARTS))
    # Open at both ends: users who are created during the listing are in the last part.
    bounds = [None, *(start for start, _ in windows[1:]), None]
    return [
        Part(kind, number, from_ms, to_ms)
        for number, (from_ms, to_ms) in enumerate(itertools.pairwise(bounds))
    ]


async def _split(
    clerk: Clerk, from_ms: int, to_ms: int, count: int, most: int
) -> list[tuple[int, int]]:
    """Halve a range of time until each has at most `most` users; return the ranges in order."""
    if count <= most or to_ms - from_ms <= _SHORTEST_MS:
        return [(from_ms, to_ms)] if count else []
    middle = (from_ms + to_ms) // 2
    # At most `count`: with a count that ignores the time, the halving would never end.
    lower = min(count, await clerk.count_users(from_ms, middle))
    halves = await asyncio.gather(
        _split(clerk, from_ms, middle, lower, most),
        _split(clerk, middle, to_ms, count - lower, most),
    )
    return [window for half in halves for window in half]


async def walk(
    clerk: Clerk,
    parts: Sequence[Part],
    take: Callable[[Page], Awaitable[None]],
    *,
    at_once: int = AT_ONCE,
) -> None:
    """Process every page of these parts, each part's pages in order; the first failure ends it.

    The next pages are requested while a page is processed.
    """
    slots = asyncio.Semaphore(at_once)

    async def one(part: Part) -> None:
        async with slots, aclosing(_pages(clerk, part)) as pages:
            async for page in pages:
                await take(page)

    try:
        async with asyncio.TaskGroup() as group:
            for part in parts:
                if not part.finished:
                    group.create_task(one(part))
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None


def _pages(clerk: Clerk, part: Part) -> AsyncGenerator[Page]:
    return _users(clerk, part) if part.kind == "user" else _listed(clerk, part)


class Met:
    """A set of ids in eight bytes each: a few MiB for a million.

    It stores Python's hash of a text, which has 64 bits and is salted by process. If two ids had
    the same hash, the next run, with another salt, would find the one that this run missed.
    """

    def __init__(self) -> None:
        self._buckets = [array("q") for _ in range(_BUCKETS)]
        self._size = 0

    def add(self, clerk_id: str) -> bool:
        """Add an id, and return whether it is new."""
        number = hash(clerk_id)
        bucket = self._buckets[number % _BUCKETS]
        place = bisect_left(bucket, number)
        if place < len(bucket) and bucket[place] == number:
            return False
        bucket.insert(place, number)
        self._size += 1
        return True

    def __len__(self) -> int:
        return self._size

    def __contains__(self, clerk_id: str) -> bool:
        number = hash(clerk_id)
        bucket = self._buckets[number % _BUCKETS]
        place = bisect_left(bucket, number)
        return place < len(bucket) and bucket[place] == number


async def _users(clerk: Clerk, part: Part) -> AsyncGenerator[Page]:
    """Yield pages of users, each from the creation time that the page before it reached.

    So all users of that moment are listed again, in any order, and it does not matter if one of
    them is deleted meanwhile. Every step reaches a later moment or ends the listing. A page that
    is full and all of one moment, or not in order, is swept. The end is a page that is not full
    and brings nothing new, as the server may have a smaller limit than was requested.
    """
    # All users seen of the moment reached, and those without one, who may be on any page.
    known = {part.after} if part.after is not None else set[str]()
    undated = set[str]()
    longest = _SMALLEST_LIMIT
    lost = False

    def ask(part: Part) -> asyncio.Task[Read]:
        return asyncio.create_task(
            clerk.users(from_ms=_reached(part), to_ms=part.to_ms), name="page of users"
        )

    asked = ask(part)
    try:
        while True:
            read = await asked
            new = [one for one in read.json if _id(one) not in known]
            full = len(read.json) >= longest
            longest = max(longest, len(read.json))
            moment = _last_moment(read.json, since=part.reached_ms)
            if not new and not full:
                # The users of the moment reached have to be on it, unless they were deleted.
                if read.json or lost or part.reached_ms is None:
                    yield Page([], read.began_ms, replace(part, finished=True))
                    return
                lost = True
                asked = ask(part)
                continue
            lost = False
            if moment is None or (full and moment == part.reached_ms):
                # All users of the one moment; or all that are left, where time gives no order.
                to_ms = part.to_ms if moment is None else moment + 1
                async with aclosing(_swept(clerk, part, known, to_ms, moment)) as pages:
                    async for page in pages:
                        part = page.part
                        undated |= {_id(one) for one in page.objects if _created(one) is None}
                        yield page
                if moment is None:
                    yield Page([], time.time_ns() // 1_000_000, replace(part, finished=True))
                    return
                part, known = replace(part, reached_ms=to_ms), {*undated}
                asked = ask(part)
                continue
            undated |= {_id(one) for one in new if _created(one) is None}
            if moment != part.reached_ms:
                known = {*undated}
            known |= _at_the_end(read.json, moment)
            part = replace(
                part, after=_id(read.json[-1]), reached_ms=moment, seen=part.seen + len(new)
            )
            asked = ask(part)
            if new:
                yield Page(new, read.began_ms, part)
    finally:
        await _cancel([asked])


def _at_the_end(objects: Sequence[dict[str, Any]], moment: int | None) -> set[str]:
    """Return the ids at the end of a page that were created at this moment."""
    last = itertools.takewhile(lambda one: _created(one) in (moment, None), reversed(objects))
    return {*map(_id, last)}


def _reached(part: Part) -> int | None:
    return part.from_ms if part.reached_ms is None else part.reached_ms


def _last_moment(objects: Sequence[dict[str, Any]], *, since: int | None) -> int | None:
    """Return when the last was created; None where they are not in that order from `since` on."""
    times = [time for time in map(_created, objects) if time is not None]
    if since is not None:
        times.insert(0, since)
    if not times or any(later < earlier for earlier, later in itertools.pairwise(times)):
        return None
    return times[-1]


async def _swept(
    clerk: Clerk, part: Part, known: set[str], to_ms: int | None, moment: int | None
) -> AsyncGenerator[Page]:
    """Yield all users from the moment a part has reached until `to_ms`, where time gives no order.

    It lists them by cursor and by offset in turn, repeatedly, as users of one moment have no
    stable order from page to page. It ends once there are as many as Clerk counts, or when neither
    way brings anything new.
    """
    met, from_ms, since = {*known}, _reached(part), part.reached_ms or 0
    first = part.after if moment is None else None
    idle = 0
    for sweep in range(_SWEEPS):
        before, longest, pages = len(met), _SMALLEST_LIMIT, 0
        after, offset = first, 0
        # The limit on pages also ends a cursor that leads in circles.
        while pages <= len(met) // longest + 2:
            try:
                read = await clerk.users(
                    from_ms=from_ms,
                    to_ms=to_ms,
                    after=after if sweep % 2 == 0 else None,
                    offset=offset if sweep % 2 and offset else None,
                )
            except ClerkRefused as error:
                if after is not None and error.status in _LOST_CURSOR:
                    break  # the cursor's user was deleted
                raise
            if not read.json:
                break
            pages, longest = pages + 1, max(longest, len(read.json))
            after, offset = _id(read.json[-1]), offset + len(read.json)
            new = [one for one in read.json if _id(one) not in met and _not_before(one, since)]
            if new:
                met |= {_id(one) for one in new}
                part = replace(part, after=_id(new[-1]), seen=part.seen + len(new))
                yield Page(new, read.began_ms, part)
        idle = idle + 1 if len(met) == before else 0
        if idle == _IDLE or len(met) >= await clerk.count_users(from_ms, to_ms):
            return


@dataclass(slots=True)
class _Sweeps:
    """The repeats of a list whose order is not stable."""

    number: int = 1
    found: int = 0
    idle: int = 0
    unordered: bool = False

    def again(self) -> bool:
        """Return whether to repeat a list that has fewer objects than Clerk counts."""
        self.idle = 0 if self.found else self.idle + 1
        if not self.unordered or self.idle >= _IDLE or self.number >= _SWEEPS:
            return False
        self.number, self.found = self.number + 1, 0
        return True


async def _listed(clerk: Clerk, part: Part) -> AsyncGenerator[Page]:
    """Yield a list's pages, several of which are requested at once.

    A page that shares nothing with the end of the page before it has shifted. The end is a page
    that is not full and brings nothing new, whatever Clerk counts. Where more objects are of one
    moment than pages share, their order may change. Then the list is repeated until there are as
    many as Clerk counts, or some repeats bring nothing new.
    """
    asked: deque[tuple[int, asyncio.Task[tuple[Read, int]]]] = deque()
    offset = taken = max(0, part.seen - OVERLAP)
    total = offset + 1  # no page is requested ahead before it is known
    tail = {part.after} if part.after else set[str]()
    met = Met()
    longest, pages, sweeps = _SMALLEST_LIMIT, 0, _Sweeps()

    async def dropped() -> None:
        await _cancel([task for _, task in asked])
        asked.clear()

    try:
        while True:
            while not asked or (len(asked) < AHEAD and offset < total):
                asked.append((offset, asyncio.create_task(clerk.listed(part.kind, offset))))
                offset += PAGE_LIMIT - OVERLAP
            at, task = asked.popleft()
            read, total = await task
            ids = [_id(one) for one in read.json]
            pages += 1
            if pages > _SPARE_PAGES + 8 * sweeps.number * (len(met) + taken) // _step(longest):
                raise ClerkUnavailable(_ENDLESS.format(part.kind, pages, len(met), total))
            if tail and at > 0 and not tail & set(ids):
                await dropped()
                offset = max(0, at - PAGE_LIMIT)
                continue
            new = [one for one, id_ in zip(read.json, ids, strict=True) if met.add(id_)]
            sweeps.found += len(new)
            full = len(ids) >= longest
            longest = max(longest, len(ids))
            overlap = min(OVERLAP, len(ids) // 2)
            sweeps.unordered = sweeps.unordered or _is_cut(read.json, overlap)
            end = at + len(ids)
            # No server has so small a limit that this page could be full.
            small = len(ids) < _SMALLEST_LIMIT and end >= total
            ended = small or (not full and not new)
            again = ended and len(met) + taken < total and sweeps.again()
            ended = ended and not again
            tail = set(ids[-OVERLAP:]) or tail
            part = replace(part, after=ids[-1] if ids else part.after, seen=end, finished=ended)
            if again:
                await dropped()
                offset, taken, tail = 0, 0, set()
            elif not ended and len(ids) < PAGE_LIMIT:  # the end, or a smaller limit
                await dropped()
                offset = max(at + 1, end - overlap)
            yield Page(new, read.began_ms, part)
            if ended:
                return
    finally:
        await dropped()


def _not_before(one: dict[str, Any], since: int) -> bool:
    created = _created(one)
    return created is None or created >= since


def _step(longest: int) -> int:
    """Return by how much a page of this length advances the offset."""
    return max(1, longest - min(OVERLAP, longest // 2))


def _is_cut(objects: Sequence[dict[str, Any]], overlap: int) -> bool:
    """Return whether a page ends among more objects of one moment than it shares with the next."""
    times = [_created(one) for one in objects]
    if not times:
        return False
    return _last_moment(objects, since=None) is None or times[-1 - overlap :][0] == times[-1]


async def later(clerk: Clerk, part: Part) -> Read:
    """Return what Clerk lists now after the end of a part, at most a page of it."""
    if part.kind == "user":
        read = await clerk.users(from_ms=_reached(part), to_ms=part.to_ms)
    else:
        read, _ = await clerk.listed(part.kind, max(0, part.seen - 1))
    ids = [_id(one) for one in read.json]
    if part.after is None:
        return read
    behind = ids.index(part.after) + 1 if part.after in ids else len(ids)
    return Read(read.json[behind:], read.began_ms)


async def _cancel(asked: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel these requests, and ignore their failures."""
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)


def _created(one: dict[str, Any]) -> int | None:
    created = one.get("created_at")
    return created if isinstance(created, int) else None


def _id(one: dict[str, Any]) -> str:
    return str(one.get("id"))
