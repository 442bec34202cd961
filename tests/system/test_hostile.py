"""What strangers send, and what Clerk might: no 500, no hang, no lost neighbour, bounded memory."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gzip
import json
import socket
import time
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clerk_sync.http import webhook
from tests import deliveries
from tests.deliveries import OTHER_SECRET, PATH, event, new_id, request, rows, signed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.deliveries import At

MAPPED: Final = ("user.updated", "organization.updated", "organizationMembership.updated")
HEAD: Final = f"POST {PATH} HTTP/1.1\r\nhost: test\r\n".encode()


@contextlib.asynccontextmanager
async def unharmed(at: At) -> AsyncIterator[None]:
    """Check that good events get through meanwhile, each quickly, and that nothing is a defect."""
    stop = asyncio.Event()

    async def neighbour() -> int:
        count = 0
        while not (stop.is_set() and count):
            begun = time.perf_counter()
            reply = await at.post(event("user.created", f"user_good{count}"))
            assert reply.said == (200, "applied", None)
            assert time.perf_counter() - begun < 2
            count += 1
            await asyncio.sleep(0.02)
        return count

    task = asyncio.create_task(neighbour())
    try:
        yield
    finally:
        stop.set()
        good = await task
    found = await at.metrics()
    assert found("errors_total") == 0
    assert found("outcomes_total", type="user.created", outcome="applied") >= good


@pytest.fixture
async def at(tmp_path: Path) -> AsyncIterator[At]:
    """Return a service on the embedded database, with little patience."""
    url = f"sqlite:///{tmp_path}/embedded.db"
    async with deliveries.served(url, CLERK_SYNC_DEADLINE_SECONDS=1) as running:
        yield running


# --- Any bytes ---------------------------------------------------------------------------------


class Target:
    """A service to be fuzzed, over plain blocking sockets."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._address = (address.hostname or "", address.port or 0)

    def status_of(self, data: bytes, *, seconds: float = 5) -> int | None:
        """Send all and return the status of the first answer; None when there is none."""
        answer = b""
        with (
            socket.create_connection(self._address, timeout=seconds) as connection,
            contextlib.suppress(ConnectionError),
        ):
            connection.sendall(data)
            while b"\r\n" not in answer:
                received = connection.recv(65536)
                if not received:
                    return None
                answer += received
        return int(answer.split()[1]) if answer else None

    def takes_good_ones(self) -> bool:
        body = deliveries.bytes_of(event("user.created", "user_good"))
        return self.status_of(request(body)) == 200


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """Return a process that is fuzzed by several tests; at its end its log knows no defect."""
    folder = tmp_path_factory.mktemp("fuzzed")
    url = f"sqlite:///{folder}/fuzzed.db"
    asyncio.run(deliveries.migrate(url))
    environment = {"DATABASE_URL": url, "CLERK_SYNC_DEADLINE_SECONDS": "1"}
    process = deliveries.Process(folder / "log", environment)
    try:
        yield Target(asyncio.run(process.listening())[0])
        events = {line["event"] for line in process.lines()}
        statuses = {line.get("status") for line in process.lines()}
    finally:
        process.close()
    assert "internal_error" not in events
    assert 500 not in statuses


fuzzing = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

texts = st.text(st.characters(min_codepoint=1, max_codepoint=255, exclude_characters="\r\n"))
names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)
stamps = st.one_of(texts, st.integers().map(str), st.floats().map(str))
tokens = st.one_of(texts, st.binary(max_size=48).map(lambda raw: f"v1,{raw.hex()}"))


@fuzzing
@given(
    svix_id=texts,
    stamp=stamps,
    signature=st.lists(tokens, max_size=4).map(" ".join),
    others=st.lists(st.tuples(names, texts), max_size=4),
    body=st.binary(max_size=200),
)
def test_no_headers_get_in_or_break_it(
    *,
    target: Target,
    svix_id: str,
    stamp: str,
    signature: str,
    others: list[tuple[str, str]],
    body: bytes,
) -> None:
    # Framing is another test's: a longer length than the body only waits for the deadline.
    framing = ("content-length", "transfer-encoding", "upgrade", "expect")
    headers = [
        ("svix-id", svix_id),
        ("svix-timestamp", stamp),
        ("svix-signature", signature),
        *((name, value) for name, value in others if name.lower() not in framing),
    ]
    assert target.status_of(request(body, headers)) in {400, 401}


@fuzzing
@given(line=st.one_of(texts, st.tuples(names, texts).map(lambda p: f"{p[0]} {p[1]} HTTP/1.1")))
def test_no_request_line_breaks_it(target: Target, line: str) -> None:
    data = request(b"", {"connection": "close"}, start=line)
    assert target.status_of(data) in {400, 401, 404, 405, None}


@fuzzing
@given(data=st.binary(min_size=1, max_size=300))
def test_no_bytes_break_it(target: Target, data: bytes) -> None:
    assert target.status_of(data + b"\r\n\r\n\r\n\r\n") in {400, 404, 405, None}


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(allow_nan=True),
        st.text(st.characters(codec="utf-8"), max_size=30),
        st.sampled_from(["\x00", "\U0001f600", "\u202e", "'; DROP TABLE users; --", "%s", "\\"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
fields = st.sampled_from(sorted(event("user.updated", "user_x")["data"]))


@fuzzing
@given(changes=st.dictionaries(fields, json_values, max_size=5), top=json_values)
def test_no_signed_values_break_it(target: Target, changes: dict[str, Any], top: Any) -> None:
    made = event("user.updated", "user_fuzzed", **changes)
    assert target.status_of(request(json.dumps(made).encode())) == 200
    for name in ("data", "timestamp", "type", "instance_id", "object", "event_attributes"):
        assert target.status_of(request(json.dumps({**made, name: top}).encode())) == 200


@fuzzing
@given(body=st.binary(max_size=100))
def test_no_signed_bytes_break_it(target: Target, body: bytes) -> None:
    assert target.status_of(request(body)) in {200, 401}


def test_the_fuzzed_service_still_takes_events(target: Target) -> None:
    assert target.takes_good_ones()


# --- Signed, but strange -----------------------------------------------------------------------

STRANGE: Final[tuple[Any, ...]] = (
    None,
    True,
    -1,
    2**63,
    1.5,
    "",
    "x" * 70_000,
    "a\x00b\U0001f600\u202e'\"\\%s",
    [],
    [None, [{}]],
    {},
    {"id": {"id": []}},
)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    children: Any = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value[:1])
    for key, child in children:
        yield from paths_of(child, (*path, key))


def with_change(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    changed = copy.copy(value)
    changed[path[0]] = with_change(value[path[0]], path[1:], new)
    return changed


async def test_wrong_types_in_every_field_hurt_nobody(database_url: str) -> None:
    """Each field of each mapped object, with several values that do not belong there."""
    bodies = []
    for type_ in MAPPED:
        made = event(type_, f"{type_.partition('.')[0]}_x")
        for place, path in enumerate(paths_of(made)):
            values = (
                STRANGE if path[:1] == ("data",) and len(path) == 2 else STRANGE[place % 5 :: 5]
            )
            bodies += [deliveries.bytes_of(with_change(made, path, new)) for new in values]
    assert len(bodies) > 900
    async with deliveries.served(database_url, CLERK_SYNC_DEADLINE_SECONDS=10) as at:
        said: set[tuple[int, str, str | None]] = set()

        async def poster() -> None:
            while bodies:
                said.add((await at.post(bodies.pop())).said)

        async with unharmed(at):
            await asyncio.gather(*(poster() for _ in range(16)))
        assert {status for status, _, _ in said} == {200}
        assert {reason for _, _, reason in said} >= {"bad_id", "too_long", "wrong_type"}


@pytest.mark.parametrize(
    ("written", "outcome"),
    [
        (b"9" * 5000, "quarantined"),
        (b"1e999", "quarantined"),
        (b"-0", "applied"),
        (b"NaN", "quarantined"),
        (b'"\\ud800"', "quarantined"),
        (b'"\\ud83d\\ude00"', "applied"),
        (b"[" * 5000 + b"]" * 5000, "quarantined"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "quarantined"),
        (b"[" * 100_000, "quarantined"),
        (b'"first", "username": "second"', "applied"),
        (b'"a", "id": "user_other"', "applied"),
        (b'"\xef\xbb\xbf"', "applied"),
    ],
)
async def test_odd_json_is_taken_or_put_aside(at: At, written: bytes, outcome: str) -> None:
    made = deliveries.bytes_of(event("user.updated", "user_x", username="@@"))
    reply = await at.post(made.replace(b'"@@"', written))
    assert (reply.status, reply.outcome) == (200, outcome)
    assert (await at.metrics())("errors_total") == 0


async def test_who_sent_strange_json_is_told_and_what_fits_is_written(database_url: str) -> None:
    """Valid JSON that hardly any parser reads: whose it is, and which column it is about."""
    strange = {
        "half": (b'"cut \\ud83d"', "wrong_type"),
        "name": (b'{"\\ud83d": 1}', "wrong_type"),
        "digits": (b"9" * 5000, "out_of_range"),
        "double": (b"1e400", "out_of_range"),
        "levels": (b"[" * 5000 + b"]" * 5000, "wrong_type"),
    }
    async with deliveries.served(database_url, CLERK_SYNC_DEADLINE_SECONDS=10) as at, unharmed(at):

        async def post(name: str, field: str) -> tuple[int, str, str | None]:
            made = event("user.updated", f"user_{name}")
            made["data"][field] = "@@"
            body = deliveries.bytes_of(made).replace(b'"@@"', strange[name][0])
            return (await at.post(body, svix_id=f"msg_{name}_{field}")).said

        for field in ("first_name", "public_metadata"):
            said = await asyncio.gather(*(post(name, field) for name in strange))
            assert said == [(200, "quarantined", reason) for _, reason in strange.values()]
        said = await asyncio.gather(*(post(name, "not_mapped") for name in strange))
        assert set(said) == {(200, "applied", None)}
        kept = await rows(
            database_url,
            "SELECT svix_id, type, clerk_id, reason, detail, payload FROM clerk_sync_quarantine",
        )
        assert {row[:5] for row in kept} == {
            (f"msg_{name}_{field}", "user.updated", f"user_{name}", reason, f"column {field}")
            for name, (_, reason) in strange.items()
            for field in ("first_name", "public_metadata")
        }
        assert all(strange[svix_id.split("_")[1]][0].decode() in text for svix_id, *_, text in kept)
        ids = await rows(database_url, "SELECT clerk_id FROM clerk_users")
        assert {one for (one,) in ids if "good" not in one} == {f"user_{name}" for name in strange}


@pytest.mark.parametrize("levels", [30, 150, 900])
async def test_json_deeper_than_the_database_takes_is_one_events_trouble(
    database_url: str, levels: int
) -> None:
    """MySQL reads 100 levels, MariaDB 32, SQLite all: refused or written, but never a 503."""
    async with deliveries.served(database_url, CLERK_SYNC_DEADLINE_SECONDS=10) as at, unharmed(at):
        made = event("user.updated", "user_deep", public_metadata="@@")
        written = b"[" * levels + b"]" * levels
        reply = await at.post(deliveries.bytes_of(made).replace(b'"@@"', written), svix_id="msg_d")
        assert reply.status == 200
        kept = await rows(
            database_url, "SELECT type, clerk_id FROM clerk_sync_quarantine WHERE svix_id = 'msg_d'"
        )
        assert kept == ([] if reply.outcome == "applied" else [("user.updated", "user_deep")])
        assert levels > 32 or reply.outcome == "applied"


async def test_nul_and_four_byte_characters_arrive_as_they_are(database_url: str) -> None:
    name = "a\x00b\U0001f600\u202e'\"\\%s\u00e9\n;--"
    svix_id = "msg'\"\\%s;--`{}"
    async with deliveries.served(database_url) as at:
        made = event(
            "user.created", "user'\"\\%s;--`", first_name=name, public_metadata={name: name}
        )
        assert (await at.post(made, svix_id=svix_id)).outcome == "applied"
        assert await rows(database_url, "SELECT clerk_id, first_name FROM clerk_users") == [
            ("user'\"\\%s;--`", name)
        ]
        assert (await deliveries.ledger(database_url)) == {svix_id: "applied"}
        (user,) = (await at.inside("/profiles")).json
        metadata = user["public_metadata"]
        assert (json.loads(metadata) if isinstance(metadata, str) else metadata) == {name: name}


async def test_a_mebibyte_that_is_signed_is_taken(database_url: str) -> None:
    async with deliveries.served(database_url, CLERK_SYNC_DEADLINE_SECONDS=10) as at:
        large = event("user.created", "user_large", private_metadata="\\'" * 150_000)
        assert len(deliveries.bytes_of(large)) > 450_000
        large["data"]["unsafe_metadata"] = "x" * (2**20 - len(deliveries.bytes_of(large)))
        async with unharmed(at):
            assert (await at.post(large)).outcome == "applied"
            large["data"]["public_metadata"] = {"k": large["data"].pop("unsafe_metadata")}
            large["data"]["updated_at"] += 1
            assert (await at.post(large)).outcome == "applied"
            large["data"]["username"] = "x" * 300
            refused = [new_id() for _ in range(8)]
            replies = await asyncio.gather(*(at.post(large, svix_id=one) for one in refused))
            assert {reply.said for reply in replies} == {(200, "quarantined", "too_long")}
        kept = await rows(database_url, "SELECT svix_id, payload FROM clerk_sync_quarantine")
        assert {svix_id for svix_id, _ in kept} == set(refused)
        assert json.loads(kept[0][1]) == large


# --- The wire ----------------------------------------------------------------------------------


async def test_more_than_two_mebibytes_are_413_however_they_come(at: At) -> None:
    limit = webhook.BODY_LIMIT
    fits = deliveries.bytes_of(event("user.created", "user_fits")).ljust(limit)
    async with unharmed(at):
        assert (await at.post(fits)).outcome == "applied"
        for size in (limit + 1, 3 * limit):
            async with deliveries.raw(at) as told:
                # Before a byte of it is read.
                await told.send(HEAD + f"content-length: {size}\r\n\r\n".encode())
                reply = await told.reply(seconds=1)
                assert reply is not None
                assert reply.said == (413, "rejected", "too_large")
        async with deliveries.raw(at) as chunked:
            await chunked.send(HEAD + b"transfer-encoding: chunked\r\n\r\n")
            piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
            with contextlib.suppress(ConnectionError):
                await chunked.send(*[piece] * (limit // 65536 + 1))
            reply = await chunked.reply()
            assert reply is not None
            assert reply.said == (413, "rejected", "too_large")
            assert reply.headers["connection"] == "close"


async def test_a_chunked_delivery_is_as_good(at: At) -> None:
    body = deliveries.bytes_of(event("user.created", "user_chunks"))
    head = request(b"", {**signed(body), "transfer-encoding": "chunked"}, length=False)
    chunks = [b"%x;ext=1\r\n%b\r\n" % (len(part), part) for part in (body[:7], body[7:])]
    async with deliveries.raw(at) as sender:
        await sender.send(head, *chunks, b"0\r\n", b"\r\n", pause=0.01)
        reply = await sender.reply()
        assert reply is not None
        assert reply.said == (200, "applied", None)


@pytest.mark.parametrize(
    "pieces",
    [
        [b"transfer-encoding: chunked\r\n\r\n", b"zz\r\nbody\r\n"],
        [b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n", b"-1\r\n\r\n"],
        [b"transfer-encoding: chunked\r\n\r\n5\r\nhel", b"lo, and more than was said\r\n0\r\n\r\n"],
        [b"transfer-encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFFFFF\r\n", b"x"],
        [b"transfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n", b"0\r\n\r\n"],
        [b"transfer-encoding: gzip\r\n\r\n", b"x"],
        [b"transfer-encoding: identity, chunked\r\n\r\n", b"0\r\n\r\n"],
        [b"content-length: 3\r\ncontent-length: 4\r\n\r\n", b"abcd"],
        [b"content-length: -3\r\n\r\n", b"abcd"],
        [b"content-length: 3, 3\r\n\r\n", b"abc"],
        [b"content-length: +3\r\n\r\n", b"abc"],
        [b"content-length: 99999999999999999999999\r\n\r\n", b"abc"],
        [b"no colon\r\n\r\n"],
        [b" folded: x\r\n\r\n"],
        [b"x" * 20_000 + b": y\r\n\r\n"],
        [b"a: " + b"y" * 20_000 + b"\r\n\r\n"],
        [*[b"a: b\r\n"] * 2000, b"\r\n"],
        [b"upgrade: websocket\r\nconnection: upgrade\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"],
        [b"upgrade: h2c\r\nconnection: upgrade\r\ncontent-length: 2\r\n\r\n", b"{}"],
        [b"expect: the-unexpected\r\ncontent-length: 2\r\n\r\n", b"{}"],
    ],
)
async def test_broken_framing_is_the_senders_loss(at: At, pieces: list[bytes]) -> None:
    async with deliveries.raw(at) as sender:
        with contextlib.suppress(ConnectionError):
            await sender.send(HEAD, *pieces, pause=0.002)
        reply = await sender.reply(seconds=3)
        assert reply is None or reply.status in {400, 401, 413, 503}
    assert (await at.post(event("user.created", "user_good"))).outcome == "applied"
    assert (await at.metrics())("errors_total") == 0


async def test_a_sender_that_goes_in_the_middle_is_no_defect(at: At) -> None:
    whole = request(deliveries.bytes_of(event("user.created", "user_gone")))
    async with unharmed(at):
        for end in (5, 100, len(whole) - 20, len(whole)):
            async with deliveries.raw(at) as sender:
                await sender.send(whole[:end])
        async with deliveries.raw(at) as sender:
            await sender.send(HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nhel")
    await asyncio.sleep(0.05)
    assert (await at.metrics())("errors_total") == 0


async def test_slow_senders_hold_up_nobody_and_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "KEEPALIVE_SECONDS", 1.0)
    body = deliveries.bytes_of(event("user.created", "user_slow"))
    whole = request(body)
    url = f"sqlite:///{tmp_path}/x.db"
    async with (
        deliveries.served(url, CLERK_SYNC_DEADLINE_SECONDS=1) as at,
        contextlib.AsyncExitStack() as stack,
        unharmed(at),
    ):

        async def slow(start: int, pace: float) -> tuple[float, bytes]:
            sender = await stack.enter_async_context(deliveries.raw(at))
            begun = time.perf_counter()
            await sender.send(whole[:start])

            async def drip() -> None:
                for place in range(start, len(whole)):
                    with contextlib.suppress(ConnectionError):
                        await sender.send(whole[place : place + 1], pause=pace)

            dripping = asyncio.create_task(drip())
            answer = await sender.rest(seconds=6)
            dripping.cancel()
            return time.perf_counter() - begun, answer

        ends = await asyncio.gather(
            *(slow(0, 10) for _ in range(20)),  # says nothing
            *(slow(10, 0.1) for _ in range(20)),  # drips its headers
            *(slow(len(whole) - 200, 0.1) for _ in range(20)),  # drips its body
        )
        assert max(seconds for seconds, _ in ends) < 5
        assert {answer for _, answer in ends[:40]} == {b""}
        assert all(answer.startswith(b"HTTP/1.1 503 ") for _, answer in ends[40:])
        assert all(b'"deadline"' in answer for _, answer in ends[40:])
        metrics = await at.metrics()
        assert metrics("unread_total") == 20
        assert metrics("unavailable_total", reason="deadline") == 0, "it is no event that failed"


async def test_nothing_is_unpacked(at: At) -> None:
    body = deliveries.bytes_of(event("user.created", "user_zipped"))

    async def posted(sent: bytes, signed_bytes: bytes, encoding: str) -> Any:
        headers = [*signed(signed_bytes).items(), ("content-encoding", encoding)]
        async with deliveries.raw(at) as sender:
            await sender.send(request(sent, headers))
            return await sender.reply()

    # The signature is of what is on the wire, whatever it is said to be.
    assert (await posted(gzip.compress(body), body, "gzip")).said[0] == 401
    for encoding in ("gzip", "deflate", "br", "zstd", "nonsense"):
        named = deliveries.bytes_of(event("user.created", f"user_{encoding}"))
        assert (await posted(named, named, encoding)).said == (200, "applied", None)


async def test_expect_100_continue_is_told_to_go_on(at: At) -> None:
    body = deliveries.bytes_of(event("user.created", "user_polite"))
    whole = request(body, {**signed(body), "expect": "100-continue"})
    async with deliveries.raw(at) as sender:
        await sender.send(whole[: -len(body)])
        async with asyncio.timeout(0.5):
            assert await sender.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await sender.send(body)
        reply = await sender.reply()
        assert reply is not None
        assert reply.said == (200, "applied", None)


async def test_many_idle_connections_are_no_trouble(at: At) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(400):
            await stack.enter_async_context(deliveries.raw(at))
        async with unharmed(at):
            replies = await asyncio.gather(
                *(at.post(event("user.updated", f"user_{n}")) for n in range(100))
            )
    assert {reply.said for reply in replies} == {(200, "applied", None)}


async def test_doubled_signature_headers_are_refused(at: At) -> None:
    body = deliveries.bytes_of(event("user.created", "user_x"))
    good, foreign = signed(body), signed(body, secret=OTHER_SECRET)
    for family in ("svix", "webhook"):
        good, foreign = signed(body, family=family), signed(body, secret=OTHER_SECRET)
        for part in ("id", "timestamp", "signature"):
            name = f"{family}-{part}"
            for pairs in (
                [*good.items(), (name, good[name])],
                [(name.upper(), foreign.get(name, "x")), *good.items()],
            ):
                async with deliveries.raw(at) as sender:
                    await sender.send(request(body, pairs))
                    reply = await sender.reply()
                    assert reply is not None
                    assert reply.said == (401, "rejected", "malformed")


async def test_pipelined_deliveries_are_answered_in_order(at: At) -> None:
    good = [deliveries.bytes_of(event("user.created", f"user_{n}")) for n in range(30)]
    requests = [request(body) for body in good]
    async with deliveries.raw(at) as sender:
        await sender.send(b"".join(requests))
        replies = [await sender.reply() for _ in requests]
    assert [reply.said for reply in replies if reply] == [(200, "applied", None)] * 30


async def test_a_connection_stays_only_for_whoever_has_signed(at: At) -> None:
    body = deliveries.bytes_of(event("user.created", "user_x"))
    wrong = request(body, signed(body, secret=OTHER_SECRET))
    async with deliveries.raw(at) as sender:
        await sender.send(request(body) + wrong + request(body))
        first, second = await sender.reply(), await sender.reply()
        assert first is not None
        assert second is not None
        assert (first.status, second.status) == (200, 401)
        assert second.headers["connection"] == "close"
        assert await sender.rest(seconds=1) == b""
    for start in (f"GET {PATH} HTTP/1.1", "GET / HTTP/1.1"):
        async with deliveries.raw(at) as sender:
            await sender.send(request(b"", {}, start=start))
            assert b"\r\nConnection: close\r\n" in await sender.rest(seconds=1)


@pytest.mark.parametrize("many", [1, 3])
async def test_a_sender_that_ends_its_side_gets_its_answers(at: At, many: int) -> None:
    # A body that takes several reads: the end comes after the handler has begun.
    sent = [event("user.created", f"user_{n}", bio="x" * 300_000) for n in range(many)]
    async with unharmed(at), deliveries.raw(at) as sender:
        sender.writer.write(b"".join(request(deliveries.bytes_of(one)) for one in sent))
        sender.writer.write_eof()
        for _ in sent:
            reply = await sender.reply()
            assert reply is not None
            assert reply.said == (200, "applied", None)
        assert await sender.rest(seconds=1) == b""


@pytest.mark.parametrize("part", [0.1, 0.9])
async def test_a_sender_that_ends_its_side_too_early_is_let_go_at_once(at: At, part: float) -> None:
    whole = request(deliveries.bytes_of(event("user.created", "user_x")))
    async with unharmed(at), deliveries.raw(at) as sender:
        await sender.send(request(deliveries.bytes_of(event("user.created", "user_y"))))
        assert await sender.reply() is not None
        await sender.send(whole[: int(part * len(whole))])
        sender.writer.write_eof()
        assert await sender.rest(seconds=1) == b""


async def test_http_1_0_is_answered_and_closed(at: At) -> None:
    body = deliveries.bytes_of(event("user.created", "user_old"))
    async with deliveries.raw(at) as sender:
        await sender.send(request(body, start=f"POST {PATH} HTTP/1.0"))
        answer = await sender.rest(seconds=3)
    assert answer.split(b"\r\n")[0].endswith(b" 200 OK")
    assert b'"applied"' in answer
