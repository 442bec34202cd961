"""Where the two listeners are: on every address of IPv4 and IPv6, unless the settings name one."""

from __future__ import annotations

import contextlib
import socket
import sys
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import aiohttp
import pytest

from tests import deliveries
from tests.deliveries import Process

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

IPV4, IPV6 = "127.0.0.1", "[::1]"
WITHOUT_IPV6: Final = (sys.executable, "-m", "tests.without_ipv6")
HOSTS: Final = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


@contextlib.asynccontextmanager
async def running(
    folder: Path, *, host: str = "", prefix: Sequence[str] = (), port: int = 0
) -> AsyncIterator[Process]:
    url = f"sqlite:///{folder}/listening.db"
    await deliveries.migrate(url)
    environment = {
        "DATABASE_URL": url,
        "CLERK_SYNC_HOST": host,
        "CLERK_SYNC_PORT": str(port),
        "CLERK_SYNC_DEADLINE_SECONDS": "1",
    }
    process = Process(folder / "log", environment, prefix=prefix)
    try:
        yield process
    finally:
        process.close()


async def answers(process: Process) -> dict[str, list[int | None]]:
    """Return the status of an answer of both listeners, by the address that they are asked at."""
    found: dict[str, list[int | None]] = {IPV4: [], IPV6: []}
    async with aiohttp.ClientSession() as client:
        for url, path in zip(await process.listening(), ("/", "/livez"), strict=True):
            for host, statuses in found.items():
                try:
                    async with client.get(f"http://{host}:{urlsplit(url).port}{path}") as answer:
                        statuses.append(answer.status)
                except aiohttp.ClientConnectorError:
                    statuses.append(None)
    return found


async def test_without_a_host_it_is_reached_by_both_families(tmp_path: Path) -> None:
    async with running(tmp_path) as process:
        assert await answers(process) == {IPV4: [404, 200], IPV6: [404, 200]}
        assert {urlsplit(url).hostname for url in await process.listening()} == {"127.0.0.1"}


async def test_a_kernel_without_ipv6_is_no_trouble(tmp_path: Path) -> None:
    async with running(tmp_path, prefix=WITHOUT_IPV6) as process:
        assert await answers(process) == {IPV4: [404, 200], IPV6: [None, None]}


@pytest.mark.parametrize(
    ("host", "reached"), [("127.0.0.1", IPV4), ("0.0.0.0", IPV4), ("::1", IPV6), ("::", IPV6)]
)
async def test_with_a_host_it_is_there_alone(tmp_path: Path, host: str, reached: str) -> None:
    async with running(tmp_path, host=host) as process:
        wanted = {address: [None, None] for address in (IPV4, IPV6)} | {reached: [404, 200]}
        assert await answers(process) == wanted


async def test_a_host_of_a_family_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    async with running(tmp_path, host="::", prefix=WITHOUT_IPV6) as process:
        assert await process.ended(seconds=60) == 1
        assert "cannot listen" in process.log


@pytest.mark.parametrize("family", HOSTS, ids=lambda family: family.name)
async def test_a_port_that_one_family_has_given_away_is_an_error(
    tmp_path: Path, family: socket.AddressFamily
) -> None:
    """Half of the deliveries would reach somebody else."""
    with socket.socket(family) as taken:
        taken.bind((HOSTS[family], 0))
        taken.listen()
        async with running(tmp_path, port=taken.getsockname()[1]) as process:
            assert await process.ended(seconds=60) == 1
            assert "address already in use" in process.log
