"""All objects of a kind, read from Clerk's API page by page, from a checkpoint on.

Users come in the order of their creation, in ranges of it, several of which are read at once.
Organizations and memberships know offsets only, and their pages move up when something before
them is deleted: so pages overlap, and a page that does not continue the one before is read
again, further up.

A listing always ends: every step brings something new or moves on, else it fails and says why.
It does not promise to be complete: the caller compares it with what Clerk counts.
"""

from __future__ import annotations

import asyncio
import itertools
from array import array
from bisect import bisect_left
from collections import deque
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from clerk_sync.clerk.api import PAGE_LIMIT, ClerkRefused, ClerkUnavailable, Read
from clerk_sync.clock import now_ms

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence

    from clerk_sync.clerk.api import Clerk

OVERLAP: Final = 20
AHEAD: Final = 4
"""Pages of a list that are requested before they are needed."""
AT_ONCE: Final = 8
"""Ranges read at the same time."""
# Below this, counting costs more requests than reading in parallel saves.
_WORTH_SPLITTING: Final = 100 * PAGE_LIMIT
_RANGES: Final = 32
_SHORTEST_MS: Final = 1000
# What Clerk answers if it does not accept the limit: none is smaller.
_SMALLEST_LIMIT: Final = 10
# How often at most the same is read again, because its order does not hold.
_SWEEPS: Final = 20
# How often in a row that may bring nothing new, by chance: each finds one that is left with some
# 60 %.
_IDLE: Final = 5
# What a list that moves up may cost, beside eight times its pages.
_SPARE_PAGES: Final = 32
_LOST_CURSOR: Final = (400, 404, 422)
_BUCKETS: Final = 4096
_ENDLESS: Final = (
    "the list of {0}s does not end: {1} pages had {2} different ones, and Clerk counts {3}"
)


@dataclass(frozen=True, slots=True)
class Range:
    """A range of a listing, and how far it has been read: what a checkpoint saves.

    Users that were created in [from_ms, to_ms), None being open; other kinds have one range.
    `after` is the last id that was read, `reached_ms` when that user was created, `seen` how
    many objects there were up to it.
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
    """Objects of one kind, and their range as it is once they are processed."""

    objects: Sequence[dict[str, Any]]
    began_ms: int
    range: Range


async def ranges_of(clerk: Clerk, kind: str, *, count: int) -> list[Range]:
    """The ranges of a kind, of which Clerk counts so many objects."""
    if kind != "user" or count < _WORTH_SPLITTING:
        return [Range(kind)]
    read = await clerk.users(from_ms=None, to_ms=None, limit=1)
    first = read.json
    if not first or not isinstance(first[0].get("created_at"), int):
        return [Range(kind)]
    born = first[0]["created_at"]
    windows = await _split(
        clerk, born, read.began_ms, count, max(10 * PAGE_LIMIT, count // _RANGES)
    )
    # Open at both ends: whoever signs up meanwhile is in the last range.
    bounds = [None, *(start for start, _ in windows[1:]), None]
    return [
        Range(kind, number, from_ms, to_ms)
        for number, (from_ms, to_ms) in enumerate(itertools.pairwise(bounds))
    ]


async def _split(
    clerk: Clerk, from_ms: int, to_ms: int, count: int, most: int
) -> list[tuple[int, int]]:
    """Windows with users in them, halved until each has few enough; in order."""
    if count <= most or to_ms - from_ms <= _SHORTEST_MS:
        return [(from_ms, to_ms)] if count else []
    middle = (from_ms + to_ms) // 2
    # No more than there are: a count that ignores the time would never be split.
    lower = min(count, await clerk.count_users(from_ms, middle))
    halves = await asyncio.gather(
        _split(clerk, from_ms, middle, lower, most),
        _split(clerk, middle, to_ms, count - lower, most),
    )
    return [window for half in halves for window in half]


async def each_page(
    clerk: Clerk,
    ranges: Sequence[Range],
    take: Callable[[Page], Awaitable[None]],
    *,
    at_once: int = AT_ONCE,
) -> None:
    """Pass every page of these ranges to `take`, each range's in order.

    The first failure ends it all. While a page is processed, the next ones are being read.
    """
    slots = asyncio.Semaphore(at_once)

    async def one(range_: Range) -> None:
        async with slots, aclosing(_pages(clerk, range_)) as pages:
            async for page in pages:
                await take(page)

    try:
        async with asyncio.TaskGroup() as group:
            for range_ in ranges:
                if not range_.finished:
                    group.create_task(one(range_))
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None


def _pages(clerk: Clerk, range_: Range) -> AsyncGenerator[Page]:
    return _users(clerk, range_) if range_.kind == "user" else _listed(clerk, range_)


class SeenIds:
    """The ids that a listing has seen, in eight bytes each: a few MiB for a million.

    Python's hash of a text has 64 bits, salted by process. Were two ids to share one, the next
    run, whose salt is another, would find what this one missed.
    """

    def __init__(self) -> None:
        self._buckets = [array("q") for _ in range(_BUCKETS)]
        self._size = 0

    def add(self, clerk_id: str) -> bool:
        """Add this id; whether it is new."""
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


@dataclass(slots=True)
class _Users:
    """How far the users of a range have been read.

    `known` are those of the moment reached, and `undated`, who may come on any page. `longest` is
    the length of the longest page. `moment` is when the last user was created, None if that page
    was not in order.
    """

    range_: Range
    known: set[str]
    undated: set[str] = field(default_factory=set)
    longest: int = _SMALLEST_LIMIT
    moment: int | None = None

    def advance(self, read: Read, new: Sequence[dict[str, Any]]) -> None:
        """Go on to the last moment of this page, of which these users are new."""
        self.undated |= {_id(one) for one in new if _created(one) is None}
        if self.moment != self.range_.reached_ms:
            self.known = {*self.undated}
        self.known |= _at_the_end(read.json, self.moment)
        self.range_ = replace(
            self.range_,
            after=_id(read.json[-1]),
            reached_ms=self.moment,
            seen=self.range_.seen + len(new),
        )

    def finish(self, began_ms: int) -> Page:
        """The last page, which is empty."""
        self.range_ = replace(self.range_, finished=True)
        return Page([], began_ms, self.range_)


async def _users(clerk: Clerk, range_: Range) -> AsyncGenerator[Page]:
    """Pages by time of creation, and by cursor where that cannot tell users apart."""
    users = _Users(range_, {range_.after} if range_.after is not None else set())
    while not users.range_.finished:
        for read in (_by_creation_time, _by_cursor):
            async with aclosing(read(clerk, users)) as pages:
                async for page in pages:
                    yield page
            if users.range_.finished:
                return


async def _by_creation_time(clerk: Clerk, users: _Users) -> AsyncGenerator[Page]:
    """Pages that each begin at the moment which the one before reached.

    So all users of that moment come again, in whatever order, and nothing depends on one who may
    be deleted meanwhile. It finishes at a page that is not full and brings nothing new: whoever
    answers may have a smaller limit than was asked for. It stops, unfinished, at a page that is
    full and all of one moment, or not in order.
    """

    def request() -> asyncio.Task[Read]:
        range_ = users.range_
        return asyncio.create_task(
            clerk.users(from_ms=_reached(range_), to_ms=range_.to_ms), name="page of users"
        )

    requested, empty = request(), False
    try:
        while True:
            read = await requested
            new = [one for one in read.json if _id(one) not in users.known]
            full = len(read.json) >= users.longest
            users.longest = max(users.longest, len(read.json))
            users.moment = _last_moment(read.json, since=users.range_.reached_ms)
            if new or full:
                if users.moment is None or (full and users.moment == users.range_.reached_ms):
                    return
                users.advance(read, new)
            elif read.json or empty or users.range_.reached_ms is None:
                yield users.finish(read.began_ms)
                return
            # Those of the moment reached are on every page, unless they are gone: ask once more.
            empty = not read.json
            requested = request()
            if new:
                yield Page(new, read.began_ms, users.range_)
    finally:
        await _cancel([requested])


async def _by_cursor(clerk: Clerk, users: _Users) -> AsyncGenerator[Page]:
    """All users of one moment; or, if the order does not hold, all that are left."""
    to_ms = users.range_.to_ms if users.moment is None else users.moment + 1
    swept = _swept(clerk, users.range_, users.known, to_ms, users.moment)
    async with aclosing(swept) as pages:
        async for page in pages:
            users.range_ = page.range
            users.undated |= {_id(one) for one in page.objects if _created(one) is None}
            yield page
    if users.moment is None:
        yield users.finish(now_ms())
    else:
        users.range_ = replace(users.range_, reached_ms=to_ms)
        users.known = {*users.undated}


def _at_the_end(objects: Sequence[dict[str, Any]], moment: int | None) -> set[str]:
    """The ids of those at the end of a page that were created at this moment."""
    last = itertools.takewhile(lambda one: _created(one) in (moment, None), reversed(objects))
    return {*map(_id, last)}


def _reached(range_: Range) -> int | None:
    return range_.from_ms if range_.reached_ms is None else range_.reached_ms


def _last_moment(objects: Sequence[dict[str, Any]], *, since: int | None) -> int | None:
    """When the last of these was created; None where they are not in that order from `since` on."""
    times = [time for time in map(_created, objects) if time is not None]
    if since is not None:
        times.insert(0, since)
    if not times or any(later < earlier for earlier, later in itertools.pairwise(times)):
        return None
    return times[-1]


async def _swept(
    clerk: Clerk, range_: Range, known: set[str], to_ms: int | None, moment: int | None
) -> AsyncGenerator[Page]:
    """All users from the moment reached until `to_ms`, where time cannot tell them apart.

    By cursor and by offset in turn, again and again: those of one moment have no order that
    holds from one page to the next. It ends once there are as many as Clerk counts, or when
    neither way brings anything new.
    """
    met, from_ms, since = {*known}, _reached(range_), range_.reached_ms or 0
    first = range_.after if moment is None else None
    idle = 0
    for sweep in range(_SWEEPS):
        before, longest, pages = len(met), _SMALLEST_LIMIT, 0
        after, offset = first, 0
        # Cursors that lead in a circle bring nothing new, and also end here.
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
                    break  # whose user is gone
                raise
            if not read.json:
                break
            pages, longest = pages + 1, max(longest, len(read.json))
            after, offset = _id(read.json[-1]), offset + len(read.json)
            new = [one for one in read.json if _id(one) not in met and _not_before(one, since)]
            if new:
                met |= {_id(one) for one in new}
                range_ = replace(range_, after=_id(new[-1]), seen=range_.seen + len(new))
                yield Page(new, read.began_ms, range_)
        idle = idle + 1 if len(met) == before else 0
        if idle == _IDLE or len(met) >= await clerk.count_users(from_ms, to_ms):
            return


@dataclass(slots=True)
class _Sweeps:
    """How often a list is read from its beginning, because its order does not hold."""

    number: int = 1
    found: int = 0
    idle: int = 0
    unordered: bool = False

    def again(self) -> bool:
        """Whether to read it once more, as it lists fewer than Clerk counts."""
        self.idle = 0 if self.found else self.idle + 1
        if not self.unordered or self.idle >= _IDLE or self.number >= _SWEEPS:
            return False
        self.number, self.found = self.number + 1, 0
        return True


async def _listed(clerk: Clerk, range_: Range) -> AsyncGenerator[Page]:
    """A list's pages, of which several are requested at once.

    A page that shares nothing with the end of the one before has moved up. The end is a page
    that is not full and brings nothing new, whatever Clerk counts. If more objects have the same
    time than pages share, and so perhaps another order each time, the list is read again until
    there are as many as Clerk counts, or nothing is new for a while.
    """
    asked: deque[tuple[int, asyncio.Task[tuple[Read, int]]]] = deque()
    offset = taken = max(0, range_.seen - OVERLAP)
    total = offset + 1  # nothing is asked for ahead before it is known
    tail = {range_.after} if range_.after else set[str]()
    met = SeenIds()
    longest, pages, sweeps = _SMALLEST_LIMIT, 0, _Sweeps()

    async def dropped() -> None:
        await _cancel([task for _, task in asked])
        asked.clear()

    try:
        while True:
            while not asked or (len(asked) < AHEAD and offset < total):
                asked.append((offset, asyncio.create_task(clerk.listed(range_.kind, offset))))
                offset += PAGE_LIMIT - OVERLAP
            at, task = asked.popleft()
            read, total = await task
            ids = [_id(one) for one in read.json]
            pages += 1
            if pages > _SPARE_PAGES + 8 * sweeps.number * (len(met) + taken) // _step(longest):
                raise ClerkUnavailable(_ENDLESS.format(range_.kind, pages, len(met), total))
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
            # Nobody has so small a limit that this page could be full.
            small = len(ids) < _SMALLEST_LIMIT and end >= total
            ended = small or (not full and not new)
            again = ended and len(met) + taken < total and sweeps.again()
            ended = ended and not again
            tail = set(ids[-OVERLAP:]) or tail
            range_ = replace(
                range_, after=ids[-1] if ids else range_.after, seen=end, finished=ended
            )
            if again:
                await dropped()
                offset, taken, tail = 0, 0, set()
            elif not ended and len(ids) < PAGE_LIMIT:  # the end, or a smaller limit than asked
                await dropped()
                offset = max(at + 1, end - overlap)
            yield Page(new, read.began_ms, range_)
            if ended:
                return
    finally:
        await dropped()


def _not_before(one: dict[str, Any], since: int) -> bool:
    created = _created(one)
    return created is None or created >= since


def _step(longest: int) -> int:
    """How far a page of this length leads."""
    return max(1, longest - min(OVERLAP, longest // 2))


def _is_cut(objects: Sequence[dict[str, Any]], overlap: int) -> bool:
    """Whether the end of a page lies among more of one moment than it shares with the next."""
    times = [_created(one) for one in objects]
    if not times:
        return False
    return _last_moment(objects, since=None) is None or times[-1 - overlap :][0] == times[-1]


async def read_on(clerk: Clerk, range_: Range) -> Read:
    """What Clerk lists by now behind the end of a finished range: one page of it at most."""
    if range_.kind == "user":
        read = await clerk.users(from_ms=_reached(range_), to_ms=range_.to_ms)
    else:
        read, _ = await clerk.listed(range_.kind, max(0, range_.seen - 1))
    ids = [_id(one) for one in read.json]
    if range_.after is None:
        return read
    behind = ids.index(range_.after) + 1 if range_.after in ids else len(ids)
    return Read(read.json[behind:], read.began_ms)


async def _cancel(asked: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel these requests; nobody needs their results, or their errors."""
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)


def _created(one: dict[str, Any]) -> int | None:
    created = one.get("created_at")
    return created if isinstance(created, int) else None


def _id(one: dict[str, Any]) -> str:
    return str(one.get("id"))
