"""Wait for a condition, for every test that cannot be told of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

_T = TypeVar("_T")


async def until(
    look: Callable[[], Awaitable[_T]],
    fine: Callable[[_T], object] = bool,
    *,
    seconds: float = 20,
    pause: float = 0.02,
) -> _T:
    """Call `look` until what it returns is fine, and return that.

    Raises AssertionError with the last value after so many seconds.
    """
    deadline = time.monotonic() + seconds
    while True:
        found = await look()
        if fine(found):
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s; last seen: {found}")
        await asyncio.sleep(pause)


async def until_true(condition: Callable[[], bool]) -> None:
    """Wait for a condition that needs no await."""

    async def look() -> bool:
        return condition()

    await until(look)
