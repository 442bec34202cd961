"""How long a run waits for a database that is away.

A backfill of a million users should survive a failover; a wrong password should end it at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import stamina
import structlog

from clerk_sync.database.errors import DatabaseUnavailable, is_transient

log = structlog.get_logger()

PATIENCE_SECONDS: Final = 60.0
FIRST_WAIT_SECONDS: Final = 0.1
LONGEST_WAIT_SECONDS: Final = 5.0

_T = TypeVar("_T")

patient: Final = stamina.retry(
    on=DatabaseUnavailable,
    attempts=None,
    timeout=PATIENCE_SECONDS,
    wait_max=LONGEST_WAIT_SECONDS,
)
"""Retries a coroutine function for PATIENCE_SECONDS, whatever keeps the database away."""


async def wait_for_database(
    work: Callable[[], Awaitable[_T]], seconds: float = PATIENCE_SECONDS
) -> _T:
    """Do the first work of a run; retry for so long if the database may soon accept it.

    Raises DatabaseUnavailable, at once if another attempt would have the same result.
    """
    deadline, wait, logged = time.monotonic() + seconds, FIRST_WAIT_SECONDS, False
    while True:
        try:
            return await work()
        except DatabaseUnavailable as error:
            if not is_transient(error) or time.monotonic() + wait > deadline:
                raise
            if not logged:
                logged = True
                log.warning("waiting_for_database", error=str(error), seconds=round(seconds))
        await asyncio.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT_SECONDS)
