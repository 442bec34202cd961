"""A flood, as a process of its own: `python -m tests.flood HOST PORT CONNECTIONS leave|stay BYTES`.

It keeps so many connections open. Each sends what came on stdin, and then leaves, or stays for
an answer. One that ends is opened again. Once so many bytes are sent, in all, it closes its
stdout. It ends by a kill.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import sys
from typing import Final

SLICE: Final = 256 * 1024
AT_ONCE: Final = 50


def flood(address: tuple[str, int], data: bytes, many: int, *, leave: bool, enough: int) -> None:
    """Pour, until killed."""
    sent, told = 0, False
    poll = select.epoll()
    there: dict[int, tuple[socket.socket, memoryview]] = {}
    while True:
        if sent >= enough and not told:
            told = True
            os.close(1)
        for _ in range(min(AT_ONCE, many - len(there))):
            sender = socket.socket()
            sender.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                sender.connect(address)
            there[sender.fileno()] = sender, memoryview(data)
            poll.register(sender.fileno(), select.EPOLLIN | select.EPOLLOUT)
        for number, what in itertools.islice(poll.poll(0.01), 4 * AT_ONCE):
            sender, rest = there[number]
            gone = False
            try:
                if what & ~select.EPOLLOUT:
                    gone = not sender.recv(SLICE)
                elif what & select.EPOLLOUT:
                    taken = sender.send(rest[:SLICE]) if rest else 0
                    sent += taken
                    rest = rest[taken:]
                    there[number] = sender, rest
                    gone = leave and not rest
                    if not rest:
                        poll.modify(number, select.EPOLLIN)
            except BlockingIOError:
                pass
            except OSError:
                gone = True
            if gone:
                del there[number]
                sender.close()


if __name__ == "__main__":
    host, port, connections, mode, enough = sys.argv[1:]
    flood(
        (host, int(port)),
        sys.stdin.buffer.read(),
        int(connections),
        leave=mode == "leave",
        enough=int(enough),
    )
