"""Connections to a database that accepts and then says nothing."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import pytest

from clerk_sync.database.connection import engine_of
from clerk_sync.database.session import open_mysql
from clerk_sync.database.url import Target

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def silent() -> Iterator[Target]:
    """Where every connection is let in, and nobody ever says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield Target(host="127.0.0.1", port=server.getsockname()[1], name="app", username="app")


@pytest.mark.parametrize("turns", range(1, 40))
async def test_a_cancelled_connect_ends_whenever_that_comes(silent: Target, turns: int) -> None:
    opening = asyncio.create_task(open_mysql(silent))
    for _ in range(turns):
        await asyncio.sleep(0)
    opening.cancel()
    done, _ = await asyncio.wait({opening}, timeout=1)
    assert done, f"it goes on waiting, when cancelled {turns} turns of the loop after its start"
    assert opening.cancelled()


async def test_the_pool_gives_up_a_silent_server_with_the_caller(silent: Target) -> None:
    engine = engine_of(lambda: silent, size=1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1), engine.connect():
            pass
    await engine.dispose()


async def test_a_server_that_never_answers_is_given_up_and_named(silent: Target) -> None:
    with pytest.raises(TimeoutError, match=rf"127\.0\.0\.1:{silent.port} did not let us in"):
        await open_mysql(silent)
