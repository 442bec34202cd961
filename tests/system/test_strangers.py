"""What strangers' connections may cost: memory, places and descriptors have bounds that hold.

Each flood runs against `clerk-sync serve` as a process. Its memory is read from the kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import resource
import socket
import sys
import time
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import uvloop
from aiohttp import web

from clerk_sync.http import connections
from tests import deliveries
from tests.deliveries import PATH, event, request
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import pytest

    from tests.deliveries import At, Process

HEAD: Final = f"POST {PATH} HTTP/1.1\r\nhost: test\r\n".encode()
CHUNKED: Final = HEAD + b"transfer-encoding: chunked\r\n\r\n"
CHUNK: Final = b"%x\r\n%b\r\n" % (120_000, b"x" * 120_000)
NOISE: Final = random.Random(7).randbytes(2000)
# Each with how many senders pour it, and whether they leave then or stay for an answer.
FLOODS: Final = {
    "breaks off in a chunk": (CHUNKED + CHUNK + b"zz\r\n", 32, "leave"),
    "a body without its end": (HEAD + b"content-length: 2097152\r\n\r\n" + CHUNK * 17, 300, "stay"),
    "a small body without its end": (HEAD + b"content-length: 99999\r\n\r\n" + NOISE, 990, "stay"),
    "a body begun": (HEAD + b"content-length: 100\r\n\r\nx", 1100, "stay"),
    "waits to go on": (HEAD + b"expect: 100-continue\r\ncontent-length: 9\r\n\r\n", 990, "stay"),
    "a head without its end": (HEAD + (b"h: " + b"x" * 8000 + b"\r\n") * 125, 300, "stay"),
    "many headers": (HEAD + b"".join(b"h%d:x\r\n" % n for n in range(120)), 990, "stay"),
    "tiny chunks": (CHUNKED + b"2\r\nxx\r\n" * 500, 990, "stay"),
    "tiny chunks, then none": (CHUNKED + b"2\r\nxx\r\n" * 20_000 + b"zz\r\n", 60, "stay"),
    "pipelined": (b"GET / HTTP/1.0\r\n\r\n" * 31 + HEAD + b"a:b\r\n" * 120, 990, "stay"),
    "an upgrade": (
        HEAD + b"upgrade: websocket\r\nconnection: upgrade\r\n\r\n" + CHUNK,
        990,
        "stay",
    ),
    "more than is taken": (HEAD + b"content-length: 99999999\r\n\r\n" + CHUNK * 40, 200, "stay"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + NOISE, 100, "leave"),
    "TLS": (bytes.fromhex("160301020001") + NOISE, 100, "leave"),
    "nothing": (b"", 1100, "leave"),
}
INNER: Final = {
    "breaks off in a chunk": (
        CHUNKED.replace(PATH.encode(), b"/ensure/x") + CHUNK + b"zz",
        32,
        "leave",
    ),
    "bodies that nobody reads": (
        b"GET /metrics HTTP/1.1\r\nhost: test\r\ncontent-length: 9999999\r\n\r\n" + CHUNK * 17,
        300,
        "stay",
    ),
    "a body begun": (
        b"POST /ensure/x HTTP/1.1\r\nhost: test\r\ncontent-length: 9\r\n\r\nx",
        1100,
        "stay",
    ),
    "asked once": (b"GET /livez HTTP/1.1\r\nhost: test\r\n\r\n", 1500, "stay"),
}
PROBE: Final = b"GET /livez HTTP/1.1\r\nhost: test\r\n\r\n"
# Beside this: a process takes some 100 MiB under load, up to 200 while it reconciles.
GROWTH_MIB: Final = 100


@contextlib.asynccontextmanager
async def pouring(
    url: str, data: bytes, many: int, mode: str
) -> AsyncIterator[asyncio.Task[bytes]]:
    """Flood this address meanwhile. The task ends when so much is sent that it should show.

    That is by bytes, as a busy machine sends little in any time: enough that it would be over the
    bound by far if all were kept. Of what is small, each sends all of it once.
    """
    address = urlsplit(url)
    enough = 200 * 2**20 if b"x" * 1000 in data else len(data) * min(many, 900)
    where = (str(address.hostname), str(address.port), str(many), mode, str(enough))
    flood = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.flood", *where),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert flood.stdin is not None
        assert flood.stdout is not None
        flood.stdin.write(data)
        flood.stdin.write_eof()
        await flood.stdin.drain()
        yield asyncio.create_task(flood.stdout.read())
        assert flood.returncode is None
    finally:
        flood.kill()
        await flood.wait()


async def fresh(url: str, data: bytes) -> int | None:
    """Ask on a connection of its own, as if somebody else had sent all others; the status."""
    address = urlsplit(url)

    def asked() -> bytes:
        with (
            socket.create_connection((address.hostname, address.port), timeout=20) as sender,
            contextlib.suppress(ConnectionError),
        ):
            sender.sendall(data)
            return sender.recv(65536)
        return b""

    answer = await asyncio.to_thread(asked)
    return int(answer.split()[1]) if answer else None


async def delivered(at: At) -> int | None:
    data = deliveries.bytes_of(event("user.created", "user_good"))
    return await fresh(at.url, request(data))


@contextlib.asynccontextmanager
async def running(
    folder: Path, *, descriptors: int | None = None
) -> AsyncIterator[tuple[Process, At]]:
    """Run a service that may open so many files, and not more."""
    url = f"sqlite:///{folder}/flooded.db"
    await deliveries.migrate(url)
    # A busy machine may take longer than the tests' usual 3 seconds.
    environment = {"DATABASE_URL": url, "CLERK_SYNC_DEADLINE_SECONDS": "12"}
    process = deliveries.Process(folder / "log", environment)
    try:
        if descriptors is not None:
            limits = (descriptors, descriptors)
            resource.prlimit(process.process.pid, resource.RLIMIT_NOFILE, limits)
        async with deliveries.talking_to(*await process.listening()) as at:
            await at.until_ready(seconds=60)
            yield process, at
            assert (await at.metrics())("errors_total") == 0
    finally:
        process.close()


async def cuts(process: Process) -> list[tuple[str, str]]:
    """Return which listener has cut connections, and why, as its log has it."""
    told = [line for line in process.lines() if line["event"] == "connections_cut"]
    return [(line["listener"], line["cause"]) for line in told]


async def test_whatever_is_sent_memory_is_bounded_and_deliveries_get_in(tmp_path: Path) -> None:
    async with running(tmp_path) as (process, at):
        start = process.resident_mib
        grown: dict[str, float] = {}
        for name, (data, many, mode) in FLOODS.items():
            top = 0.0
            statuses: list[int | None] = []
            async with pouring(at.url, data, many, mode) as poured:
                while not poured.done() or len(statuses) < 3:
                    statuses.append(await delivered(at))
                    top = max(top, process.resident_mib)
            assert set(statuses) == {200}, (name, statuses)
            grown[name] = round(top - start)
        assert max(grown.values()) < GROWTH_MIB, grown


async def test_whatever_is_sent_to_the_internal_port_probes_are_answered(tmp_path: Path) -> None:
    async with running(tmp_path) as (process, at):
        start = process.resident_mib
        grown: dict[str, float] = {}
        for name, (data, many, mode) in INNER.items():
            top = 0.0
            statuses: list[int | None] = []
            async with pouring(at.internal_url, data, many, mode) as poured:
                while not poured.done() or len(statuses) < 20:
                    statuses.append(await fresh(at.internal_url, PROBE))
                    top = max(top, process.resident_mib)
                assert await delivered(at) is not None
            assert set(statuses) == {200}, (name, statuses)
            grown[name] = round(top - start)
        assert max(grown.values()) < GROWTH_MIB, grown


async def test_what_breaks_off_is_collected_by_its_bytes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # pytest keeps what is logged, with its traceback; `serve` does not even log it.
    caplog.set_level("CRITICAL", "aiohttp.server")
    broken = CHUNKED + CHUNK + b"zz\r\n"
    gc.collect()
    gc.disable()
    try:
        async with deliveries.served(f"sqlite:///{tmp_path}/x.db") as at:
            for _ in range(100):
                async with deliveries.raw(at) as sender:
                    await sender.send(broken)
            there = sum(isinstance(one, web.RequestHandler) for one in gc.get_objects())
    finally:
        gc.enable()
    assert there < 50


def test_who_comes_does_not_wait_behind_a_full_backlog() -> None:
    there: list[asyncio.Protocol] = []

    def handler() -> asyncio.Protocol:
        there.append(asyncio.Protocol())
        return there[-1]

    async def accepted() -> int:
        async with connections.Connections("public").listening(handler, "127.0.0.1", 0) as address:
            with contextlib.ExitStack() as stack:
                for _ in range(300):
                    stack.enter_context(socket.create_connection(address))
                for _ in range(10):  # turns of the event loop, which has heavier work in each
                    await asyncio.sleep(0)
                return len(there)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(accepted()) == 300


async def test_answers_that_nobody_reads_end_the_connection(tmp_path: Path) -> None:
    delivery = request(deliveries.bytes_of(event("user.created", "user_x")))
    scrape = b"GET /metrics HTTP/1.1\r\nhost: test\r\n\r\n"
    async with running(tmp_path) as (process, at):
        start = process.resident_mib

        async def never_reads(url: str, sent: bytes) -> None:
            address = urlsplit(url)
            with socket.socket() as sender:
                sender.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                sender.settimeout(0)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(sender, (address.hostname, address.port))
                with contextlib.suppress(ConnectionError):
                    while True:
                        await loop.sock_sendall(sender, sent * 32)

        readers = asyncio.gather(
            *(never_reads(at.url, delivery) for _ in range(4)),
            *(never_reads(at.internal_url, scrape) for _ in range(8)),
        )
        async with asyncio.timeout(60):
            await readers
        assert process.resident_mib - start < GROWTH_MIB
        await until(lambda: cuts(process), lambda found: len(found) > 1)
        assert set(await cuts(process)) == {("public", "unread"), ("internal", "unread")}


async def test_few_descriptors_are_enough_for_deliveries(tmp_path: Path) -> None:
    async with (
        running(tmp_path, descriptors=128) as (process, at),
        pouring(at.url, b"", 300, "stay"),
        pouring(at.internal_url, b"", 100, "stay"),
    ):
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            assert await delivered(at) == 200
            assert (await at.inside("/livez", headers={"connection": "close"})).status == 200
        found = await until(lambda: cuts(process), lambda found: len(found) > 1)
        assert sorted(found) == [("internal", "connections"), ("public", "connections")]
        lines = process.lines()
    assert [line["limit"] for line in lines if line["event"] == "few_descriptors"] == [128]
