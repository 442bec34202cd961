"""Walking over all that Clerk lists, page by page, from where it was left off.

Users come by their time of creation, in windows of it, several of which are walked at once.
Organizations and memberships know offsets only, under which a page moves when something before
it is deleted: so pages overlap, and one that does not hold on to the page before it is asked for
again, further up.

A walk always ends: every step brings something new or leads on, or the walk says why not. That
all was met is not its word: whoever walks compares with what Clerk counts.
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
"""Pages of a list that are asked for before they are needed."""
AT_ONCE: Final = 8
"""Parts walked at the same time."""
# Below this, counting costs more requests than walking in parallel saves.
_WORTH_SPLITTING: Final = 100 * PAGE_LIMIT
_PARTS: Final = 32
_SHORTEST_MS: Final = 1000
# What Clerk answers where it does not take the limit: nobody has a smaller one.
_SMALLEST_LIMIT: Final = 10
# How often at most the same is walked again, because its order does not hold.
_SWEEPS: Final = 20
# How often in a row that may bring nothing new, by chance: each finds one that is left with some
# 60 %.
_IDLE: Final = 5
# What a list that moves up may cost, beside eight times its pages.
_SPARE_PAGES: Final = 32
_LOST_CURSOR: Final = (400, 404, 422)
_BUCKETS: Final = 4096
_ENDLESS: Final = (
    "the walk over the list of {0}s does not end: on {1} pages were {2} different ones, and Clerk "
    "counts {3}"
)


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of one kind, and how far it has been walked.

    Users that were created in [from_ms, to_ms), None being open; other kinds have one part.
    `after` is the last id that was taken, `reached_ms` when that user was created, `seen` how
    many came up to it.
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
    """Objects of one kind, and the part as it is once they are taken."""

    objects: Sequence[dict[str, Any]]
    began_ms: int
    part: Part


async def parts_of(clerk: Clerk, kind: str, *, count: int) -> list[Part]:
    """What to walk for one kind, of which Clerk counts so many objects."""
    if kind != "user" or count < _WORTH_SPLITTING:
        return [Part(kind)]
    read = await clerk.users(from_ms=None, to_ms=None, limit=1)
    first = read.json
    if not first or not isinstance(first[0].get("created_at"), int):
        return [Part(kind)]
    born = first[0]["created_at"]
    windows = await _split(clerk, born, read.began_ms, count, max(10 * PAGE_LIMIT, count // _PARTS))
    # Open at both ends: whoever comes while the windows are walked is in the last.
    bounds = [None, *(start for start, _ in windows[1:]), None]
    return [
        Part(kind, number, from_ms, to_ms)
        for number, (from_ms, to_ms) in enumerate(itertools.pairwise(bounds))
    ]


async def _split(
    clerk: Clerk, from_ms: int, to_ms: int, count: int, most: int
) -> list[tuple[int, int]]:
    """Windows with users in them, halved until each has few enough; in order."""
    if count <= most or to_ms - from_ms <= _SHORTEST_MS:
        return [(from_ms, to_ms)] if count else []
    middle = (from_ms + to_ms) // 2
    # No more than there are: a count that does not look at the time would never be split.
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
    """Take every page of these parts, each part's in order; the first failure ends it all.

    While a page is taken, the next ones are on their way.
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
    """The ids that a walk met, in eight bytes each: a few MiB for a million.

    Python's hash of a text has 64 bits, salted by process. Were two ids to share one, the next
    run, whose salt is another, would find what this one missed.
    """

    def __init__(self) -> None:
        self._buckets = [array("q") for _ in range(_BUCKETS)]
        self._size = 0

    def add(self, clerk_id: str) -> bool:
        """Note this id; whether it is new."""
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
    """Pages that each begin at the moment which the one before reached.

    So all of that moment come again, in whatever order, and nothing hangs on a user who may be
    deleted meanwhile. Every step reaches a later moment, or ends the walk: where a page is full
    and all of one moment, or not in order, what is there is swept. The end is a page that is not
    full and brings nothing new: whoever answers may have a smaller limit than was asked for.
    """
    # All that were met of the moment reached; and those without one, who may come on any page.
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
                # Those of the moment reached have to be on it, unless they are gone.
                if read.json or lost or part.reached_ms is None:
                    yield Page([], read.began_ms, replace(part, finished=True))
                    return
                lost = True
                asked = ask(part)
                continue
            lost = False
            if moment is None or (full and moment == part.reached_ms):
                # All of the one moment; or, where time tells nothing, all that is left.
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
    """The ids of those at the end of a page that were created at this moment."""
    last = itertools.takewhile(lambda one: _created(one) in (moment, None), reversed(objects))
    return {*map(_id, last)}


def _reached(part: Part) -> int | None:
    return part.from_ms if part.reached_ms is None else part.reached_ms


def _last_moment(objects: Sequence[dict[str, Any]], *, since: int | None) -> int | None:
    """When the last of these was created; None where they are not in that order from `since` on."""
    times = [time for time in map(_created, objects) if time is not None]
    if since is not None:
        times.insert(0, since)
    if not times or any(later < earlier for earlier, later in itertools.pairwise(times)):
        return None
    return times[-1]


async def _swept(
    clerk: Clerk, part: Part, known: set[str], to_ms: int | None, moment: int | None
) -> AsyncGenerator[Page]:
    """All from the moment that a part has reached until this one, when time cannot tell them apart.

    By cursor and by offset in turn, again and again: those of one moment have no order that
    holds from one page to the next. It ends once there are as many as Clerk counts, or when
    neither way brings anything new.
    """
    met, from_ms, since = {*known}, _reached(part), part.reached_ms or 0
    first = part.after if moment is None else None
    idle = 0
    for sweep in range(_SWEEPS):
        before, longest, pages = len(met), _SMALLEST_LIMIT, 0
        after, offset = first, 0
        # A way that leads back and forth brings nothing new, and ends here, too.
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
                part = replace(part, after=_id(new[-1]), seen=part.seen + len(new))
                yield Page(new, read.began_ms, part)
        idle = idle + 1 if len(met) == before else 0
        if idle == _IDLE or len(met) >= await clerk.count_users(from_ms, to_ms):
            return


@dataclass(slots=True)
class _Sweeps:
    """How often a list is walked from its beginning, because its order does not hold."""

    number: int = 1
    found: int = 0
    idle: int = 0
    unordered: bool = False

    def again(self) -> bool:
        """Whether to walk it once more, as it lists fewer than Clerk counts."""
        self.idle = 0 if self.found else self.idle + 1
        if not self.unordered or self.idle >= _IDLE or self.number >= _SWEEPS:
            return False
        self.number, self.found = self.number + 1, 0
        return True


async def _listed(clerk: Clerk, part: Part) -> AsyncGenerator[Page]:
    """A list's pages, several on their way at once.

    One that shares nothing with the end of the page before it has moved up. The end is a page
    that is not full and brings nothing new, whatever Clerk counts. Where more are of one moment
    than pages share, and so perhaps in another order each time, the list is walked again until
    there are as many as Clerk counts, or nothing is new for a while.
    """
    asked: deque[tuple[int, asyncio.Task[tuple[Read, int]]]] = deque()
    offset = taken = max(0, part.seen - OVERLAP)
    total = offset + 1  # nothing is asked for ahead before it is known
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
            # Nobody has so small a limit that this page could be full.
            small = len(ids) < _SMALLEST_LIMIT and end >= total
            ended = small or (not full and not new)
            again = ended and len(met) + taken < total and sweeps.again()
            ended = ended and not again
            tail = set(ids[-OVERLAP:]) or tail
            part = replace(part, after=ids[-1] if ids else part.after, seen=end, finished=ended)
            if again:
                await dropped()
                offset, taken, tail = 0, 0, set()
            elif not ended and len(ids) < PAGE_LIMIT:  # the end, or a smaller limit than asked
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
    """How far a page of this length leads."""
    return max(1, longest - min(OVERLAP, longest // 2))


def _is_cut(objects: Sequence[dict[str, Any]], overlap: int) -> bool:
    """Whether the end of a page lies among more of one moment than it shares with the next."""
    times = [_created(one) for one in objects]
    if not times:
        return False
    return _last_moment(objects, since=None) is None or times[-1 - overlap :][0] == times[-1]


async def later(clerk: Clerk, part: Part) -> Read:
    """What Clerk lists by now behind the end of a part that was walked: a page of it at most."""
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
    """End these requests; that one has failed is no news where nobody needs it any more."""
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)


def _created(one: dict[str, Any]) -> int | None:
    created = one.get("created_at")
    return created if isinstance(created, int) else None


def _id(one: dict[str, Any]) -> str:
    return str(one.get("id"))
