"""Hold changes that another event may unblock, and try them again for up to a second.

A membership may arrive before its user, and a new account before the deletion of the old one with
its address. The app may have locked a row. Nearly always that is over within milliseconds.
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
    """The receiver of an answer, such as a future."""

    def done(self) -> bool: ...

    def set_result(self, answer: Answer, /) -> None: ...


@dataclass(slots=True, eq=False)
class Entry:
    """A waiting change, and the receiver of its answer.

    `until` is the monotonic time at which it is given up, None until it is first held. `held` says
    that it will be tried again. `parked` says that it comes from the quarantine, and stays there
    unless it is applied.
    """

    change: Change
    answer: Waiter
    trace: Trace | None = None
    until: float | None = None
    held: bool = False
    parked: bool = False

    def resolve(self, answer: Answer) -> None:
        """Give the receiver this answer, unless it has one already."""
        if not self.answer.done():
            self.answer.set_result(answer)


class Held:
    """The held changes of one committer."""

    def __init__(self, seconds: float = HOLD_SECONDS) -> None:
        self._seconds = seconds
        self._entries: list[Entry] = []
        self._some = asyncio.Event()
        self._closed = asyncio.Event()
        self._pause = FIRST_PAUSE

    def __len__(self) -> int:
        return len(self._entries)

    def hold(self, entry: Entry) -> bool:
        """Hold the change; False when its time is over, or too many are held already."""
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
        """Add changes that have to be tried at least once."""
        for entry in entries:
            entry.held = True
            self._entries.append(entry)
        self._some.set()

    async def take(self, *, least: float) -> list[Entry] | None:
        """Wait for a pause, then return all held changes; None once closed and empty.

        The pause doubles while no change is added, as each try may use up an AUTO_INCREMENT
        number. It lasts at least `least` seconds, and at most HOLD_SECONDS.
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
        """Accept no more changes. The next try answers those that are held."""
        self._closed.set()
        self._some.set()
