"""A server that reads requests and answers 200, and nothing else.

What the load generator reaches against it is the generator's own ceiling.
"""

from __future__ import annotations

import asyncio
import re
import sys
from typing import Final, cast

import uvloop

_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_ANSWER: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 22\r\n\r\n"
    b'{"outcome": "applied"}'
)


class _Server(asyncio.Protocol):
    def __init__(self) -> None:
        self._held = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._held += data
        head = self._held.find(b"\r\n\r\n")
        length = _LENGTH.search(self._held, 0, head + 2) if head >= 0 else None
        if head < 0 or len(self._held) < head + 4 + (int(length[1]) if length else 0):
            return
        self._held = b""
        self._transport.write(_ANSWER)


async def _main(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Server, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_main(int(sys.argv[1])))
