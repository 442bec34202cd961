"""The load generator: signed Clerk events over keep-alive connections, from its own process.

Every byte of a request exists before the clock starts, and an answer is read with one regular
expression, so that the machine's time goes to the service and its database. Each connection
has one request in flight (Svix waits for the answer too); the results are JSON lines.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import re
import sys
import time
from array import array
from collections import Counter, deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, cast

import uvloop
from svix.webhooks import Webhook

from clerk_sync.clerk import samples

if TYPE_CHECKING:
    from collections.abc import Iterator

SECRET: Final = "whsec_YmVuY2gtYmVuY2gtYmVuY2gtYmVuY2gtYmVuY2g="
PATH: Final = "/webhooks/clerk"
HOST: Final = "127.0.0.1"
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_HANGING_SECONDS: Final = 20


# Clerk's objects that few users have. Without them a user is some 2 kB, as most are.
_RARE: Final[dict[str, Any]] = {
    "enterprise_accounts": [],
    "external_accounts": [],
    "organization_memberships": [],
    "passkeys": [],
    "phone_numbers": [],
    "primary_phone_number_id": None,
    "primary_web3_wallet_id": None,
    "saml_accounts": [],
    "scim": None,
    "web3_wallets": [],
}


def _template(type_: str, *, usernames_in_deletes: bool) -> str:
    """Make a %-template of an event's body: a hundred times faster to fill than to make."""
    event: dict[str, Any] = samples.event(type_, now_ms=int(time.time() * 1000))
    event["timestamp"] = "@(now)d"
    data = event["data"]
    data["id"] = "@(id)s"
    if type_ != "user.deleted":
        data |= _RARE
        data["updated_at"] = "@(now)d"
        data["username"] = "@(username)s"
        # An UPDATE that changes nothing costs MySQL no commit: that would flatter everyone.
        data["first_name"] = "Ada @(turn)d"
        data["external_id"] = "crm_@(username)s"
        primary = data["primary_email_address_id"]
        data["email_addresses"] = [
            address | {"email_address": "@(username)s@example.com"}
            for address in data["email_addresses"]
            if address["id"] == primary
        ]
    elif usernames_in_deletes:
        data["username"] = "@(username)s"
    body = json.dumps(event, separators=(",", ":")).replace("%", "%%")
    return body.replace('"@(now)d"', "%(now)d").replace("@(", "%(")


class Events:
    """Signed requests of an endless history: 30 % created, 60 % updated, 10 % deleted.

    The users take turns, so that consecutive events are of different users and a user's next
    event never overtakes the one before.
    """

    def __init__(self, *, seed: int, port: int, usernames_in_deletes: bool) -> None:
        self._random = random.Random(seed)
        self._signer = Webhook(SECRET)
        self._templates = {
            type_: _template(type_, usernames_in_deletes=usernames_in_deletes)
            for type_ in ("user.created", "user.updated", "user.deleted")
        }
        self._live: deque[str] = deque()
        self._made = 0
        self._head = (
            f"POST {PATH} HTTP/1.1\r\nhost: {HOST}:{port}\r\naccept: */*\r\n"
            "user-agent: Svix-Webhooks/1.84.0 (sender-9YMgn; +https://www.svix.com/http-sender/)"
            "\r\ncontent-type: application/json\r\n"
        )

    def created(self, count: int) -> list[bytes]:
        return [self._created() for _ in range(count)]

    def mixed(self, count: int) -> list[bytes]:
        return [self._any() for _ in range(count)]

    def _any(self) -> bytes:
        chance = self._random.random()
        if chance < 0.3 or not self._live:
            return self._created()
        clerk_id = self._live.popleft()
        if chance < 0.9:
            self._live.append(clerk_id)
            return self._request("user.updated", clerk_id)
        return self._request("user.deleted", clerk_id)

    def _created(self) -> bytes:
        clerk_id = f"user_2x{self._random.getrandbits(100):025x}"
        self._live.append(clerk_id)
        return self._request("user.created", clerk_id)

    def _request(self, type_: str, clerk_id: str) -> bytes:
        self._made += 1
        now = time.time()
        body = self._templates[type_] % {
            "id": clerk_id,
            "username": clerk_id[5:],
            "turn": self._made,
            "now": int(now * 1000),
        }
        svix_id = f"msg_2x{self._random.getrandbits(100):025x}"
        signature = self._signer.sign(svix_id, datetime.fromtimestamp(now, tz=UTC), body)
        content = body.encode()
        head = (
            f"{self._head}svix-id: {svix_id}\r\nsvix-timestamp: {int(now)}\r\n"
            f"svix-signature: {signature}\r\ncontent-length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content


class Load:
    """What the connections of one run share: the requests still to send, and the tallies."""

    def __init__(self, port: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._port = port
        self._clients: list[_Client] = []
        self._requests: Iterator[bytes] = iter(())
        self._deadline = 0.0
        self._busy = 0
        self._done = self._loop.create_future()
        self.latencies = array("d")
        self.answers: Counter[bytes] = Counter()
        self.seconds = 0.0

    async def connect(self, connections: int) -> None:
        for _ in range(connections):
            client = _Client(self)
            await self.reconnect(client)
            self._clients.append(client)

    async def reconnect(self, client: _Client) -> None:
        await self._loop.create_connection(lambda: client, HOST, self._port)

    async def run(self, requests: list[bytes], *, seconds: float) -> None:
        """Send them all, or what the seconds allow; tallies add up over several runs."""
        self._requests = iter(requests)
        self._done = self._loop.create_future()
        self._busy = len(self._clients)
        start = time.perf_counter()
        self._deadline = start + seconds
        for client in self._clients:
            client.send()
        try:
            await asyncio.wait_for(self._done, seconds + _HANGING_SECONDS)
        except TimeoutError:
            self.answers[b"no answer"] += self._busy
        self.seconds += time.perf_counter() - start

    def forget(self) -> None:
        """Start the tallies again: what came before was warming up."""
        self.latencies = array("d")
        self.answers.clear()
        self.seconds = 0.0

    def next(self) -> bytes | None:
        """Give a connection its next request, or None when it is done."""
        request = next(self._requests, None) if time.perf_counter() < self._deadline else None
        if request is None:
            self._busy -= 1
            if not self._busy and not self._done.done():
                self._done.set_result(None)
        return request

    def lost(self, client: _Client, *, unanswered: bool) -> None:
        """Connect again; the client then takes another request."""
        if unanswered:
            self.answers[b"connection lost"] += 1
        self._loop.create_task(self.reconnect(client)).add_done_callback(self._reconnected)

    def _reconnected(self, task: asyncio.Task[None]) -> None:
        if (error := task.exception()) and not self._done.done():
            self._done.set_exception(error)

    def result(self, *, expect: str) -> dict[str, Any]:
        """`expect` is what a good answer's body contains."""
        texts: Counter[str] = Counter()
        for answer, count in self.answers.items():
            texts[answer.decode(errors="replace")] += count
        good = sum(n for t, n in texts.items() if t.startswith("200 ") and expect in t)
        statuses: Counter[str] = Counter()
        for text, count in texts.items():
            statuses[text[:3] if text[:3].isdigit() else text] += count
        ordered = sorted(self.latencies) or [0.0]
        return {
            "connections": len(self._clients),
            "seconds": round(self.seconds, 3),
            "good": good,
            "other": texts.total() - good,
            "per_second": round(good / self.seconds, 1),
            "p50_ms": round(ordered[len(ordered) // 2] * 1000, 2),
            "p99_ms": round(ordered[len(ordered) * 99 // 100] * 1000, 2),
            "max_ms": round(ordered[-1] * 1000, 2),
            "statuses": dict(statuses),
            "answers": dict(texts.most_common(5)),
            "first_bad": next(
                (t for t in texts if not (t.startswith("200 ") and expect in t)), None
            ),
        }


class _Client(asyncio.Protocol):
    """One keep-alive connection with one request in flight."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._transport: asyncio.Transport | None = None
        self._held = b""
        self._sent_at = 0.0
        self._waiting = False
        self._send_when_connected = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if self._send_when_connected:
            self._send_when_connected = False
            self.send()

    def connection_lost(self, _: Exception | None) -> None:
        self._transport = None
        self._held = b""
        if self._waiting:
            self._waiting = False
            self._send_when_connected = True
            self._load.lost(self, unanswered=True)

    def send(self) -> None:
        if self._transport is None:  # closed by the service between two requests
            self._send_when_connected = True
            self._load.lost(self, unanswered=False)
        elif request := self._load.next():
            self._waiting = True
            self._sent_at = time.perf_counter()
            self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._held:
            data = self._held + data
        head = data.find(b"\r\n\r\n")
        length = _LENGTH.search(data, 0, head + 2) if head >= 0 else None
        if head < 0 or len(data) < head + 4 + (int(length[1]) if length else 0):
            self._held = data
            return
        self._held = b""
        self._waiting = False
        self._load.latencies.append(now - self._sent_at)
        self._load.answers[data[9:13] + data[head + 4 : head + 204]] += 1
        self.send()


async def _main(args: argparse.Namespace) -> None:
    events = Events(seed=args.seed, port=args.port, usernames_in_deletes=args.usernames_in_deletes)
    load = Load(args.port)
    await load.connect(args.connections)
    await load.run(events.created(args.users) + events.mixed(200), seconds=args.seconds)
    load.forget()
    left = args.events
    while left > 0:
        requests = events.mixed(min(left, args.chunk))
        left -= len(requests)
        gc.collect()
        gc.freeze()
        gc.disable()
        await load.run(requests, seconds=args.seconds)
        gc.enable()
        gc.unfreeze()
        print(json.dumps(load.result(expect=args.expect)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--events", type=int, default=16_000, help="at most so many")
    parser.add_argument("--seconds", type=float, default=4, help="at most so long, per chunk")
    parser.add_argument("--chunk", type=int, default=20_000, help="events signed ahead at a time")
    parser.add_argument("--users", type=int, default=1_000, help="created before the clock starts")
    parser.add_argument("--expect", default="", help="what the body of a good answer contains")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other users and ids")
    parser.add_argument("--usernames-in-deletes", action="store_true")
    try:
        uvloop.run(_main(parser.parse_args()))
    except OSError as error:
        sys.exit(f"the service is gone: {error}")


if __name__ == "__main__":
    main()
