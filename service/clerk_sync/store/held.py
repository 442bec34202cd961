"""Changes that only time lets in: held for a moment, and tried again beside all others.

A membership may overtake its user, a new account the deletion of the old one with its address,
and the app may hold the lock of a row. Nearly always that is over within milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

    from clerk_sync.mapping.change import Change
    from clerk_sync.outcomes import Answer
    from clerk_sync.telemetry.tracing import Trace

HOLD_SECONDS: Final = 1.0
FIRST_PAUSE: Final = 0.01
LONGEST_PAUSE: Final = 0.2
# So that each is tried again in time, also by a database that is some milliseconds away.
HOLD_LIMIT: Final = 100


class Waiter(Protocol):
    """Where an answer goes, such as a future."""

    def done(self) -> bool: ...

    def set_result(self, answer: Answer, /) -> None: ...


@dataclass(slots=True, eq=False)
class Entry:
    """A change on its way, and who waits for its answer.

    `until` is when it is given up, by the monotonic clock, once something was in its way; `held`
    says that it is going to be tried again. `parked` says that it comes from the quarantine,
    which keeps it, whatever comes of this.
    """

    change: Change
    answer: Waiter
    trace: Trace | None = None
    until: float | None = None
    held: bool = False
    parked: bool = False

    def resolve(self, answer: Answer) -> None:
        """Give this answer to who waits, if it is not known yet."""
        if not self.answer.done():
            self.answer.set_result(answer)


class Held:
    """The changes of one committer that are tried again soon."""

    def __init__(self, seconds: float = HOLD_SECONDS) -> None:
        self._seconds = seconds
        self._entries: list[Entry] = []
        self._some = asyncio.Event()
        self._closed = asyncio.Event()
        self._pause = FIRST_PAUSE

    def __len__(self) -> int:
        return len(self._entries)

    def hold(self, entry: Entry) -> bool:
        """Have it tried again; False when its time is over, or too many wait already."""
        now = time.monotonic()
        if entry.until is None:
            entry.until = now + self._seconds
            self._pause = FIRST_PAUSE
        if self._closed.is_set() or now >= entry.until:
            return False
        if len(self._entries) >= HOLD_LIMIT:
            self._entries = [one for one in self._entries if not one.answer.done()]
            if len(self._entries) >= HOLD_LIMIT:
                return False
        self.put([entry])
        return True

    def put(self, entries: Iterable[Entry]) -> None:
        """Have these tried, at least once."""
        for entry in entries:
            entry.held = True
            self._entries.append(entry)
        self._some.set()

    async def take(self, *, least: float) -> list[Entry] | None:
        """All that are held, after a pause; None once it is closed and nothing is.

        The pause doubles while nothing new is held: each try may use up a number of the
        database's own, and is work in any case. It is never shorter than `least` seconds, nor
        longer than HOLD_SECONDS.
        """
        await self._some.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(max(least, self._pause), HOLD_SECONDS)):
                await self._closed.wait()
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        if not self._closed.is_set():
            self._some.clear()
        elif not self._entries:
            return None
        taken, self._entries = self._entries, []
        for entry in taken:
            entry.held = False
        return taken

    def close(self) -> None:
        """Hold nothing any more: what is tried from now on gets its answer."""
        self._closed.set()
        self._some.set()
