"""Walking over all that Clerk lists, page by page, from where it was left off.

Users come by a cursor, in windows of their time of creation, several of which are walked at
once. Organizations and memberships know offsets only, under which a page moves when something
before it is deleted: so pages overlap, and one that does not hold on to the page before it is
asked for again, further up.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from clerk_sync.clerk import PAGE_LIMIT, ClerkRefused, ClerkUnavailable, Read

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence

    from clerk_sync.clerk import Clerk

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
_NO_CURSOR: Final = "CLERK_API_URL: what answers there does not list users beyond a page"


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
    read = await clerk.users(after=None, from_ms=None, to_ms=None, limit=1)
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
    lower = await clerk.count_users(from_ms, middle)
    halves = await asyncio.gather(
        _split(clerk, from_ms, middle, lower, most),
        _split(clerk, middle, to_ms, max(0, count - lower), most),
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


async def _users(clerk: Clerk, part: Part) -> AsyncGenerator[Page]:
    """A cursor's pages: only when one is here can the next be asked for.

    Clerk does not say what becomes of a cursor whose user is deleted meanwhile. Where it is
    refused, or leads to the end or back, the walk goes on by time of creation instead; so it does
    once at the end, which is an empty page, not a short one: whoever answers may have a limit of
    its own.
    """

    def ask(part: Part) -> asyncio.Task[Read | None]:
        return asyncio.create_task(_after(clerk, part))

    # The ids of the last page, and all that were met of the moment reached.
    known: set[str] = set()
    fullest = _SMALLEST_LIMIT
    # Nothing was new since the walk went back to the moment reached.
    looking = astray = False
    asked = ask(part)
    try:
        while True:
            read = await asked
            if read is None:
                if looking and part.after and await clerk.one("user", part.after) is not None:
                    yield Page([], time.time_ns() // 1_000_000, replace(part, finished=True))
                    return
                start = part.from_ms if part.reached_ms is None else part.reached_ms
                read = await clerk.users(after=None, from_ms=start, to_ms=part.to_ms)
                looking = True
            ids = [_id(one) for one in read.json]
            new = [one for one in read.json if _id(one) not in known]
            if new and _leads_back(read, part):
                if astray:
                    raise ClerkUnavailable(_NO_CURSOR)
                # Whoever answers does not look at the time: then the cursor has to tell.
                astray = looking = True
                asked = ask(part)
                continue
            looking = looking and not new
            if looking and len(ids) < fullest:
                yield Page([], read.began_ms, replace(part, finished=True))
                return
            fullest = max(fullest, len(ids))
            reached_ms = _created(read.json[-1])
            known = {*ids, *known} if reached_ms == part.reached_ms else {*ids}
            part = replace(part, after=ids[-1], reached_ms=reached_ms, seen=part.seen + len(new))
            # A short page is likely the last; not where more are of one moment than it holds.
            by_cursor = looking or len(ids) >= PAGE_LIMIT
            asked = ask(part if by_cursor else replace(part, after=None))
            if new:
                yield Page(new, read.began_ms, part)
    finally:
        await _cancel([asked])


async def _after(clerk: Clerk, part: Part) -> Read | None:
    """The page after the part's cursor; None when there is no cursor, or it led nowhere."""
    if part.after is None:
        return None
    try:
        read = await clerk.users(after=part.after, from_ms=part.from_ms, to_ms=part.to_ms)
    except ClerkRefused as error:
        if error.status in (400, 404, 422):
            return None
        raise
    return None if _leads_back(read, part) or not read.json else read


def _leads_back(read: Read, part: Part) -> bool:
    """Whether a page begins before the place that the walk had reached."""
    return bool(read.json) and (_created(read.json[0]) or 0) < (part.reached_ms or 0)


async def _listed(clerk: Clerk, part: Part) -> AsyncGenerator[Page]:
    """A list's pages, several on their way at once.

    One that shares nothing with the end of the page before it has moved up.
    """
    asked: deque[tuple[int, asyncio.Task[tuple[Read, int]]]] = deque()
    offset = max(0, part.seen - OVERLAP)
    total = offset + 1  # nothing is asked for ahead before it is known
    tail = {part.after} if part.after else set()

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
            if tail and at > 0 and not tail & set(ids):
                await dropped()
                offset = max(0, at - PAGE_LIMIT)
                continue
            new = [one for one, id_ in zip(read.json, ids, strict=True) if id_ not in tail]
            end = at + len(ids)
            ended = not ids or end >= total
            tail = set(ids[-OVERLAP:]) or tail
            part = replace(
                part,
                after=ids[-1] if ids else part.after,
                seen=end,
                finished=ended,
            )
            if not ended and len(ids) < PAGE_LIMIT:  # whoever answers has a limit of its own
                await dropped()
                offset = max(at + 1, end - OVERLAP)
            yield Page(new, read.began_ms, part)
            if ended:
                return
    finally:
        await dropped()


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
