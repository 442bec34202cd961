"""The connections of a listener: limits on their number, and on the memory that they may use.

Whoever has not signed anything is a stranger, and may be cut at any time. That is what makes
every bound here hold: what is too much is not refused politely, it is cut, the oldest first.
A request that was read to its end is never cut.

The transport calls a Peer, and the Peer calls aiohttp's protocol. So nothing here depends on
how aiohttp buffers: what a connection sent counts as held until it is known to be released.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import gc
import itertools
import math
import os
import resource
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from enum import IntEnum
from typing import Final, cast

import structlog
from aiohttp import web

log = structlog.get_logger()

# Of each listener.
CONNECTION_LIMIT: Final = 1000
# What the process opens itself: its database, files, Clerk's API, and what it listens with.
OWN_DESCRIPTORS: Final = 64
BACKLOG: Final = 1024
# Each has a socket of its own: one for both would tell IPv4 peers as `::ffff:10.0.0.1`.
EVERY_ADDRESS: Final = ("0.0.0.0", "::")  # noqa: S104 -- of a pod
# What a kernel says that has one of the two families only.
NO_SUCH_FAMILY: Final = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
# At most, in each turn of the event loop.
ACCEPTS: Final = 64
# The kernel's memory for answers counts as the container's.
SEND_BUFFER: Final = 64 * 1024
# No whole request after so long: the connection is ended. Nothing read of an answer: the same.
SILENT_SECONDS: Final = 15.0
UNREAD_SECONDS: Final = 5.0
CHECK_SECONDS: Final = 1.0
TELL_SECONDS: Final = 60.0

# What all connections of a listener may make it hold, in bytes of memory as estimated below.
BUDGET: Final = 24 * 1024 * 1024
# Up to here a connection is cut only when no larger one is left.
SMALL: Final = 64 * 1024
# A connection that costs more sends what nobody reads, such as chunks behind a broken one.
PEER_LIMIT: Final = 8 * 1024 * 1024
# A byte is held twice, as received and as parsed. A line is a header, or part of a chunk or a
# request, and becomes some objects. aiohttp 3.14 has at most 32 requests of 128 headers parsed
# ahead, or 4096 chunks.
LINE_COST: Final = 512
LINES_LIMIT: Final = 4096
# Connections that broke off leave reference cycles with their buffers: aiohttp keeps errors,
# whose tracebacks keep its frames. Beyond this the collector runs: it counts objects, not bytes.
COLLECT_LIMIT: Final = 8 * 1024 * 1024
# After so many turns of the event loop, nothing runs any more for a connection that was cut, and
# the handler has read all that one sent before it ended its side.
TURNS: Final = 8

CAUSES: Final = {
    "connections": "all places are taken: the oldest went that had nothing verified under way",
    "memory": "unverified requests hold too much: the oldest large one went",
    "unread": "answers are not read",
    "descriptors": "no file can be opened: raise `ulimit -n`, LimitNOFILE= or fs.file-max",
}


class Rank(IntEnum):
    """The order in which connections are closed, lowest first."""

    LEAVING = 0  # answered, and about to be closed
    STRANGER = 1  # nothing verified yet
    KNOWN = 2  # what came before was verified


class Peer(asyncio.Protocol):
    """One connection, between the transport and aiohttp's protocol."""

    __slots__ = (
        "_connections",
        "_handler",
        "cost",
        "ended",
        "gone",
        "heard",
        "last",
        "rank",
        "since",
        "transport",
        "unread",
        "unread_since",
    )

    def __init__(self, connections: Connections, handler: asyncio.Protocol) -> None:
        self._connections = connections
        self._handler = handler
        self.transport: asyncio.Transport
        self.cost = 0
        self.ended = False
        self.gone = False
        self.heard = False
        self.last = 0
        self.rank: Rank | None = None
        self.since = 0.0
        self.unread = 0
        self.unread_since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        # An answer is handed to the kernel whole, or there is somebody who does not read.
        self.transport.set_write_buffer_limits(high=0)
        self._handler.connection_made(transport)
        self._connections.met(self, self._handler)

    def data_received(self, data: bytes) -> None:
        # Who is leaving may go on sending for a moment, to see the answer: it goes nowhere.
        if self.rank is not Rank.LEAVING and self._connections.takes(self, data):
            self._handler.data_received(data)

    def eof_received(self) -> bool:
        # aiohttp closes the connection here: https://github.com/aio-libs/aiohttp/issues/3659
        return self._connections.ended(self)

    def pause_writing(self) -> None:
        self._handler.pause_writing()
        self.unread_since = asyncio.get_running_loop().time()
        self._connections.unread(self, self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._connections.unread(self, 0)
        self._handler.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.parted(self, self._handler)
        self._handler.connection_lost(exc)


class _Listening:
    """A listening socket, from which many are accepted at once.

    uvloop 0.23 accepts one in each turn of its event loop: behind a full backlog, a delivery
    would wait for a thousand turns.
    """

    def __init__(self, bound: socket.socket, made: Callable[[], Peer], at_once: int) -> None:
        self._made = made
        self._at_once = at_once
        self._loop = asyncio.get_running_loop()
        self._connecting: set[asyncio.Task[None]] = set()
        self._paused: asyncio.TimerHandle | None = None
        self._socket = socket.socket(bound.family, bound.type, bound.proto, os.dup(bound.fileno()))
        # Connections inherit it.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._socket.settimeout(0)

    @property
    def address(self) -> tuple[str, int]:
        host, port, *_ = self._socket.getsockname()
        return host, port

    def start(self) -> None:
        self._socket.listen(BACKLOG)
        self._resume()

    def _resume(self) -> None:
        self._loop.add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        for _ in range(self._at_once):
            try:
                accepted, _ = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:  # no descriptor is left: `watch` makes room
                self._loop.remove_reader(self._socket)
                self._paused = self._loop.call_later(CHECK_SECONDS, self._resume)
                return
            accepted.settimeout(0)
            task = self._loop.create_task(self._connect(accepted))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connect(self, accepted: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it is gone already
            await self._loop.connect_accepted_socket(self._made, accepted)

    async def close(self) -> None:
        if self._paused is not None:
            self._paused.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()
        await asyncio.gather(*self._connecting)


class Connections:
    """All connections of one listener; at most `room`."""

    def __init__(self, listener: str, *, room: int = CONNECTION_LIMIT) -> None:
        self._listener = listener
        self._room = room
        self._peers: dict[object, Peer] = {}
        self._ranks: tuple[dict[Peer, None], ...] = tuple({} for _ in Rank)
        self._count = 0
        self._held = 0
        self._lost = 0
        self._collecting = False
        self._cuts: Counter[str] = Counter()
        self._told: dict[str, float] = {}

    @contextlib.asynccontextmanager
    async def listening(
        self, handlers: Callable[[], asyncio.Protocol], host: str | None, port: int
    ) -> AsyncIterator[tuple[str, int]]:
        """Listen; `handlers` makes each connection's protocol. Yields the address. Raises OSError.

        Without a host, on every address of both families, at the same port.
        """

        def made() -> Peer:
            return Peer(self, handlers())

        loop = asyncio.get_running_loop()
        servers: list[asyncio.Server] = []
        listening: list[_Listening] = []
        # Each can be read to its end before those behind it have filled all places.
        at_once = max(1, min(ACCEPTS, self._room // TURNS))
        try:
            for address in (host,) if host else EVERY_ADDRESS:
                try:
                    server = await loop.create_server(
                        made, address, port, start_serving=False, reuse_address=True
                    )
                except OSError as error:
                    if host or error.errno not in NO_SUCH_FAMILY:
                        raise
                    continue
                servers.append(server)
                listening += (_Listening(one, made, at_once) for one in server.sockets)
                port = listening[0].address[1] if listening else port
            if not listening:
                raise OSError(errno.EADDRNOTAVAIL, f"no address {host or 'of any family'}")
            for one in listening:
                one.start()
            yield listening[0].address
        finally:
            for server in servers:
                server.close()
            for one in listening:
                await one.close()

    def peer(self, handler: object) -> Peer:
        """The peer of aiohttp's protocol, which is `request.protocol`."""
        found = self._peers.get(handler)
        if found is None:
            # It went while its request was waiting.
            found = Peer(self, asyncio.Protocol())
            found.gone = True
        return found

    def read(self, peer: Peer, request: web.BaseRequest, size: int) -> None:
        """Charge this peer for a request's head, and for so much of its body.

        And what came last: if it was no HTTP, an error that waits for its turn keeps it.
        """
        head = sum(len(name) + len(value) for name, value in request.raw_headers)
        cost = 2 * (head + size) + LINE_COST * len(request.raw_headers) + peer.last
        self._charge(peer, cost - peer.cost)

    def keep(self, peer: Peer) -> None:
        """Do not close this connection any more: its request was read to the end."""
        self._move(peer, None)

    def verified(self, peer: Peer) -> None:
        """Stop charging for what it sent: the request is verified."""
        self._charge(peer, -peer.cost)

    def ranked(self, peer: Peer, rank: Rank) -> None:
        """Give the connection this rank, as the last of it to be closed."""
        self._move(peer, rank)
        if peer.ended:
            self._close_soon(peer)

    @web.middleware
    async def answering(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        """A middleware for a listener without signatures: the least recently used closes first.

        Whoever has asked is no better than who comes to ask, such as a probe.
        """
        peer = self.peer(request.protocol)
        peer.heard = True
        self.ranked(peer, Rank.STRANGER)
        try:
            return await handler(request)
        finally:
            self.verified(peer)

    # --- What a Peer tells ---------------------------------------------------------------------

    def met(self, peer: Peer, handler: asyncio.Protocol) -> None:
        """Add a connection, and make room for it if there is none."""
        self._peers[handler] = peer
        self._count += 1
        peer.since = asyncio.get_running_loop().time()
        self._move(peer, Rank.STRANGER)
        if self._count > self._room:
            others = (one for one in self._cuttable() if one is not peer)
            self._cut(next(others, peer), "connections")

    def parted(self, peer: Peer, handler: asyncio.Protocol) -> None:
        """Remove a connection that is closed."""
        del self._peers[handler]
        self._forget(peer)

    def takes(self, peer: Peer, data: bytes) -> bool:
        """Whether there is room for what was received; it is charged if so."""
        if peer.gone:
            return False
        lines = min(data.count(b"\n"), LINES_LIMIT)
        peer.last = 2 * len(data) + LINE_COST * lines
        self._charge(peer, peer.last)
        self._fit()
        wasteful = peer.cost > PEER_LIMIT or (peer.cost > SMALL and self._lost > 2 * COLLECT_LIMIT)
        if wasteful and peer.rank is not None:
            self._cut(peer, "memory")
        return not peer.gone

    def ended(self, peer: Peer) -> bool:
        """Whether a connection whose client sends no more stays open for an answer.

        A client that half-closes after its request waits for the answer, but looks the same as
        one that is gone. So only a request that was read to its end is waited for; others have
        the next few turns of the event loop.
        """
        if peer.gone or peer.rank is Rank.LEAVING or not (peer.cost or peer.rank is None):
            return False
        peer.ended = True
        self._close_soon(peer)
        return True

    def unread(self, peer: Peer, size: int) -> None:
        """Charge for what the kernel has not sent, because the peer does not read."""
        if not peer.gone:
            self._charge(peer, size - peer.unread)
            peer.unread = size
            self._fit()

    # --- Who is cut ----------------------------------------------------------------------------

    async def watch(self) -> None:
        """Close connections that send nothing or read nothing, until cancelled."""
        try:
            while True:
                await asyncio.sleep(CHECK_SECONDS)
                self._look(asyncio.get_running_loop().time())
        finally:
            self._tell([*self._cuts])

    def _look(self, now: float) -> None:
        for peer in [*self._peers.values()]:
            if peer.gone:
                continue
            if peer.unread:
                size = peer.transport.get_write_buffer_size()
                if size < peer.unread:
                    peer.unread_since = now
                    self.unread(peer, size)
                elif now - peer.unread_since > UNREAD_SECONDS:
                    self._cut(peer, "unread")
            elif not peer.heard and now - peer.since > SILENT_SECONDS:
                self._cut(peer, None)
        try:
            socket.socket().close()
        except OSError:
            for peer in [*itertools.islice(self._cuttable(), OWN_DESCRIPTORS // 2)]:
                self._cut(peer, "descriptors")
        due = [one for one in self._cuts if now - self._told.get(one, -math.inf) > TELL_SECONDS]
        self._told |= dict.fromkeys(due, now)
        self._tell(due)

    def _tell(self, causes: Iterable[str]) -> None:
        for cause in causes:
            log.warning(
                "connections_cut",
                listener=self._listener,
                cause=cause,
                count=self._cuts.pop(cause),
                connections=self._count,
                detail=CAUSES[cause],
            )

    def _cuttable(self, *, above: int = -1) -> Iterator[Peer]:
        """The peers that cost more, in the order in which they are to be closed."""
        return (peer for rank in self._ranks for peer in rank if peer.cost > above)

    def _fit(self) -> None:
        while self._held > BUDGET:
            large = next(self._cuttable(above=SMALL), None)
            victim = large or next(self._cuttable(above=0), None)
            if victim is None:
                return
            self._cut(victim, "memory")

    def _cut(self, peer: Peer, cause: str | None) -> None:
        """Abort the connection. The log shows `cause`, at most once a minute."""
        self._forget(peer)
        # Not at once: its transport may be in the middle of a call.
        asyncio.get_running_loop().call_soon(peer.transport.abort)
        if cause is not None:
            self._cuts[cause] += 1

    def _close_soon(self, peer: Peer) -> None:
        """Close it, unless a request is read to its end by then."""

        def close() -> None:
            if peer.rank is not None:
                peer.transport.close()

        _after(TURNS, close)

    def _forget(self, peer: Peer) -> None:
        if peer.gone:
            return
        self._move(peer, None)
        self._count -= 1
        self._lost += peer.cost
        self._charge(peer, -peer.cost)
        peer.gone = True
        self._collect_soon()

    def _collect_soon(self) -> None:
        if self._lost > COLLECT_LIMIT and not self._collecting:
            self._collecting = True
            _after(TURNS + 1, functools.partial(self._collect, self._lost))

    def _collect(self, lost: int) -> None:
        gc.collect()
        self._lost -= lost
        self._collecting = False
        self._collect_soon()

    def _charge(self, peer: Peer, cost: int) -> None:
        if not peer.gone:
            peer.cost += cost
            self._held += cost

    def _move(self, peer: Peer, rank: Rank | None) -> None:
        if peer.gone:
            return
        if peer.rank is not None:
            del self._ranks[peer.rank][peer]
        if rank is not None:
            self._ranks[rank][peer] = None
        peer.rank = rank


def _after(turns: int, work: Callable[[], None]) -> None:
    """Do the work after so many turns of the event loop."""
    if turns:
        asyncio.get_running_loop().call_soon(_after, turns - 1, work)
    else:
        work()


def listeners(own: int) -> tuple[Connections, Connections]:
    """The public listener's connections and the internal one's, within the limit of descriptors.

    The limit is raised as far as it helps. `own` are the descriptors that the process needs for
    its database, beside a few dozen for the rest.
    """
    own += OWN_DESCRIPTORS
    wanted = 2 * CONNECTION_LIMIT + own
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < wanted:
        soft = min(wanted, hard) if hard >= 0 else wanted
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    # Below 0 there is no limit.
    free = max(2, soft - own) if soft >= 0 else wanted
    internal = min(CONNECTION_LIMIT, max(1, free // 4))
    public = min(CONNECTION_LIMIT, free - internal)
    if public < CONNECTION_LIMIT:
        log.warning(
            "few_descriptors",
            detail="for more connections raise the limit of open files: `ulimit -n`, LimitNOFILE=",
            limit=soft,
            connections=public,
        )
    return Connections("public", room=public), Connections("internal", room=internal)
