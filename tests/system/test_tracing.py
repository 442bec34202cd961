"""Traces: a delivery's way in spans, for those who ask for them; without, not even an import."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from clerk_sync import __version__
from clerk_sync import app as service
from clerk_sync.cli import serve
from clerk_sync.mapping import loader
from clerk_sync.telemetry.tracing import Tracing
from tests import deliveries
from tests.deliveries import OTHER_SECRET, PATH, event, new_id
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from opentelemetry.sdk.trace import ReadableSpan

    from tests.deliveries import At

TRACE: Final = "0af7651916cd43dd8448eb211c80319c"
PARENT: Final = "b7ad6b7169203331"
OPENMETRICS: Final = {"Accept": "application/openmetrics-text;version=1.0.0"}


class Traced:
    """A service in this process, and the spans that it made."""

    def __init__(self, at: At, exporter: InMemorySpanExporter) -> None:
        self.at = at
        self._exporter = exporter

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        return self._exporter.get_finished_spans()

    def one(self, name: str) -> ReadableSpan:
        (found,) = [span for span in self.spans if span.name == name]
        return found

    async def post(self, what: Any, *, traceparent: str | None = None, **how: Any) -> Any:
        """Sign and deliver, as somebody on the way who traces."""
        body = deliveries.bytes_of(what)
        headers = deliveries.signed(body, **how)
        if traceparent is not None:
            headers["traceparent"] = traceparent
        return await self.at.request("POST", self.at.url + PATH, data=body, headers=headers)

    async def exemplars(self) -> dict[str, set[str]]:
        """Return the trace ids beside each histogram."""
        text = (await self.at.inside("/metrics", headers=OPENMETRICS)).text
        found: dict[str, set[str]] = {}
        for line in text.splitlines():
            if " # {" in line:
                name = re.match(r"clerk_sync_(\w+)_seconds_bucket\{", line)
                trace = re.search(r' # \{.*trace_id="(\w{32})"', line)
                assert name
                assert trace
                found.setdefault(name[1], set()).add(trace[1])
        return found


@asynccontextmanager
async def traced(url: str, **more: Any) -> AsyncIterator[Traced]:
    await deliveries.migrate(url)
    exporter = InMemorySpanExporter()
    async with (
        service.running(
            deliveries.settings_of(url, **more),
            loader.load("mirror"),
            tracing=Tracing(SimpleSpanProcessor(exporter)),
        ) as running,
        deliveries.talking_to(running.url, running.internal_url) as at,
    ):
        await at.until_ready()
        yield Traced(at, exporter)


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Traced]:
    async with traced(f"sqlite:///{tmp_path}/x.db") as running:
        yield running


# --- The spans ---------------------------------------------------------------------------------


async def test_a_delivery_is_a_request_with_its_three_parts(database_url: str) -> None:
    svix_id = new_id()
    async with traced(database_url) as here:
        began = time.time_ns()
        await here.post(event("user.created", "user_a"), svix_id=svix_id)
        ended = time.time_ns()
        request, verify, queue, apply = (
            here.one(name) for name in (f"POST {PATH}", "verify", "queue", "apply")
        )
        assert len(here.spans) == 4
    assert request.parent is None
    assert request.kind is SpanKind.SERVER
    assert request.status.status_code is StatusCode.UNSET
    assert dict(request.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": PATH,
        "http.response.status_code": 200,
        "clerk_sync.outcome": "applied",
        "clerk_sync.svix_id": svix_id,
        "clerk_sync.type": "user.created",
        "clerk_sync.clerk_id": "user_a",
    }
    for part in (verify, queue, apply):
        assert part.parent is not None
        assert part.parent.span_id == request.context.span_id
        assert part.context.trace_id == request.context.trace_id
    assert dict(verify.attributes or {}) == dict(queue.attributes or {}) == {}
    assert dict(apply.attributes or {}) == {"clerk_sync.batch.events": 1}
    times = [
        *(began, request.start_time, verify.start_time, verify.end_time),
        *(queue.start_time, queue.end_time, apply.start_time, apply.end_time),
        *(request.end_time, ended),
    ]
    assert times == sorted(filter(None, times))
    resource = request.resource.attributes
    assert resource["service.name"] == "clerk-sync"
    assert resource["service.version"] == __version__
    assert resource["service.instance.id"] == socket.gethostname()


async def test_those_that_share_a_transaction_tell_so(here: Traced) -> None:
    await asyncio.gather(*(here.post(event("user.created", f"user_{n}")) for n in range(30)))
    applied = [span for span in here.spans if span.name == "apply"]
    assert len(applied) == 30
    assert len({span.context.trace_id for span in applied}) == 30
    sizes = [(span.attributes or {})["clerk_sync.batch.events"] for span in applied]
    assert max(map(int, sizes)) > 1  # type: ignore[arg-type]


async def test_ids_and_codes_are_all_that_they_tell(here: Traced) -> None:
    await here.post(event("user.created", "user_a", username="x" * 300))
    await here.post(b'{"type": 7, "data": "ada@example.com"}')
    await here.post(event("user.created", "user_b"), secret=OTHER_SECRET)
    requests = [dict(span.attributes or {}) for span in here.spans if span.name == f"POST {PATH}"]
    told = [
        {
            name.removeprefix("clerk_sync."): value
            for name, value in one.items()
            if "svix" not in name
        }
        for one in requests
    ]
    common = {"http.request.method": "POST", "http.route": PATH}
    assert told == [
        common
        | {"http.response.status_code": 200, "outcome": "quarantined", "reason": "too_long"}
        | {"type": "user.created", "clerk_id": "user_a"},
        common
        | {"http.response.status_code": 200, "outcome": "quarantined", "reason": "bad_envelope"}
        | {"type": "unknown"},
        common | {"http.response.status_code": 401, "outcome": "rejected", "reason": "wrong"},
    ]
    assert not any(span.events for span in here.spans)


async def test_what_is_not_for_the_webhook_has_no_span(here: Traced) -> None:
    assert (await here.at.post(b"{}", path="/else")).status == 404
    assert (await here.at.request("GET", here.at.url + PATH)).status == 405
    assert here.spans == ()


async def test_trouble_is_an_error_and_a_refusal_is_none(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    async with traced(url, CLERK_SYNC_DEADLINE_SECONDS=0.4) as here:
        await deliveries.rows(url, "DROP TABLE clerk_sync_events")
        reply = await here.post(event("user.created", "user_a"))
        assert reply.said == (503, "unavailable", "schema")
        request, apply = here.one(f"POST {PATH}"), here.one("apply")
        assert request.status.status_code is StatusCode.ERROR
        assert (request.attributes or {})["error.type"] == "schema"
        assert apply.end_time
        assert request.end_time
        assert apply.end_time <= request.end_time
        await here.post(event("user.created", "user_b"), secret=OTHER_SECRET)
        refused = here.spans[-1]
        assert refused.status.status_code is StatusCode.UNSET
        assert "error.type" not in (refused.attributes or {})


# --- Whose trace it is -------------------------------------------------------------------------


async def test_a_trace_that_clerk_s_delivery_comes_with_goes_on(here: Traced) -> None:
    await here.post(event("user.created", "user_a"), traceparent=f"00-{TRACE}-{PARENT}-01")
    request = here.one(f"POST {PATH}")
    assert f"{request.context.trace_id:032x}" == TRACE
    assert request.parent is not None
    assert request.parent.is_remote
    assert f"{request.parent.span_id:016x}" == PARENT
    assert await here.exemplars() == {"request": {TRACE}, "apply": {TRACE}}


async def test_a_stranger_s_trace_is_not_followed(here: Traced) -> None:
    for flags in ("01", "00"):
        await here.post(
            event("user.created", "user_a"),
            traceparent=f"00-{TRACE}-{PARENT}-{flags}",
            secret=OTHER_SECRET,
        )
    assert [span.name for span in here.spans] == ["verify", f"POST {PATH}"] * 2
    assert TRACE not in {f"{span.context.trace_id:032x}" for span in here.spans}
    assert {span.parent for span in here.spans if span.name != "verify"} == {None}


async def test_strangers_do_not_crowd_out_what_is_traced(here: Traced) -> None:
    """A queue to a collector is short, and what is kept there is paid for."""
    for _ in range(30):
        await here.post(event("user.created", "user_a"), secret=OTHER_SECRET)
    requests = [span for span in here.spans if span.name == f"POST {PATH}"]
    assert len(requests) == 10  # as many as have a line in the log
    kept = {f"{span.context.trace_id:032x}" for span in requests}
    assert (await here.exemplars())["request"] <= kept, "none leads to a trace that is not there"
    await here.post(event("user.created", "user_a"))
    assert here.one("apply")


@pytest.mark.parametrize(
    "traceparent", ["", "00", f"00-{'0' * 32}-{PARENT}-01", "\xe9", "x" * 9000]
)
async def test_a_traceparent_that_is_none_begins_a_trace(here: Traced, traceparent: str) -> None:
    reply = await here.post(event("user.created", "user_a"), traceparent=traceparent)
    # Above 8190 bytes no header is taken, by aiohttp itself.
    assert reply.status == (400 if len(traceparent) > 8190 else 200)
    if reply.status == 200:
        assert here.one(f"POST {PATH}").parent is None


async def test_one_that_is_not_kept_is_neither_sent_nor_an_exemplar(here: Traced) -> None:
    reply = await here.post(event("user.created", "user_a"), traceparent=f"00-{TRACE}-{PARENT}-00")
    assert reply.outcome == "applied"
    assert here.spans == ()
    assert await here.exemplars() == {}


async def test_exemplars_are_for_openmetrics_only(here: Traced) -> None:
    await here.post(event("user.created", "user_a"))
    trace = f"{here.one(f'POST {PATH}').context.trace_id:032x}"
    assert await here.exemplars() == {"request": {trace}, "apply": {trace}}
    assert "trace_id" not in (await here.at.inside("/metrics")).text


async def test_without_tracing_there_are_no_exemplars(tmp_path: Path) -> None:
    async with deliveries.served(f"sqlite:///{tmp_path}/x.db") as at:
        await at.post(event("user.created", "user_a"))
        text = (await at.inside("/metrics", headers=OPENMETRICS)).text
    assert "clerk_sync_request_seconds_bucket" in text
    assert " # {" not in text


# --- Sent to a collector -----------------------------------------------------------------------


class Collector:
    """What takes spans by OTLP over HTTP, as a collector does."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.headers: list[Any] = []
        self.url = ""

    async def take(self, request: web.Request) -> web.Response:
        body = await request.read()
        if request.headers.get("Content-Encoding") == "gzip" and body[:2] == b"\x1f\x8b":
            body = gzip.decompress(body)
        self.requests.append(ExportTraceServiceRequest.FromString(body))
        self.headers.append(request.headers)
        return web.Response(
            body=ExportTraceServiceResponse().SerializeToString(),
            content_type="application/x-protobuf",
        )

    def spans(self) -> list[tuple[dict[str, str], Any]]:
        """Each span with its resource's attributes."""
        return [
            ({one.key: one.value.string_value for one in group.resource.attributes}, span)
            for request in self.requests
            for group in request.resource_spans
            for scope in group.scope_spans
            for span in scope.spans
        ]


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    collector = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", collector.take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    collector.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield collector
    finally:
        await runner.cleanup()


async def test_the_service_sends_them_as_the_standard_s_variables_say(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    await deliveries.migrate(url)
    async with collecting() as collector:
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_EXPORTER_OTLP_HEADERS": "x-tenant=one",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
            "OTEL_SERVICE_NAME": "clerk-sync-eu",
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=live,service.version=9",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        async with deliveries.process(tmp_path, url, **environment) as (process, at):
            await at.until_ready()
            await at.post(event("user.created", "user_a"))

            async def sent() -> list[tuple[dict[str, str], Any]]:
                return collector.spans()

            first = await until(sent, lambda spans: len(spans) == 4)
            # What still waits is sent at the end.
            await at.post(event("user.updated", "user_a"))
            process.signal(signal.SIGTERM)
            assert await process.ended(seconds=8) == 0
            lines = [line for line in process.lines() if line["event"] == "delivery"]
            assert not [line for line in process.lines() if line["event"] == "config_warning"]
        spans = collector.spans()
        assert len(spans) == 8
        assert {headers["x-tenant"] for headers in collector.headers} == {"one"}
        assert {headers["Content-Encoding"] for headers in collector.headers} == {"gzip"}
    assert {span.name for _, span in first} == {f"POST {PATH}", "verify", "queue", "apply"}
    for resource, _ in spans:
        assert resource["service.name"] == "clerk-sync-eu"
        assert resource["service.version"] == "9"
        assert resource["deployment.environment.name"] == "live"
    # Its log line leads to the trace.
    made = {(span.trace_id.hex(), span.span_id.hex()) for _, span in spans if span.kind == 2}
    assert {(line["trace_id"], line["span_id"]) for line in lines} == made


async def test_a_collector_that_is_away_holds_nothing_up(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    await deliveries.migrate(url)
    with socket.socket() as deaf:  # connects, and never answers
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{deaf.getsockname()[1]}",
            "OTEL_BSP_SCHEDULE_DELAY": "50",
        }
        async with deliveries.process(tmp_path, url, **environment) as (process, at):
            await at.until_ready()
            for number in range(5):
                began = time.monotonic()
                reply = await at.post(event("user.created", f"user_{number}"))
                assert reply.outcome == "applied"
                assert time.monotonic() - began < 2
                await asyncio.sleep(0.1)
            began = time.monotonic()
            process.signal(signal.SIGTERM)
            assert await process.ended(seconds=8) == 0
            assert time.monotonic() - began < 5
            assert process.lines()[-1]["event"] == "stopped"


# --- Whether at all ----------------------------------------------------------------------------

ONLY_HTTP: Final = "no traces, because only http/protobuf is supported, usually on port 4318"
ENDPOINT: Final = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "", "OTEL_TRACES_EXPORTER": ""},
        {"OTEL_SERVICE_NAME": "x"},
        ENDPOINT | {"OTEL_SDK_DISABLED": "True"},
        ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"},
    ],
    ids=str,
)
def test_traces_nobody_asks_for_cost_not_even_an_import(environment: dict[str, str]) -> None:
    script = (
        "import sys, json\n"
        "from clerk_sync import app as service\n"
        "from clerk_sync.http import webhook\n"
        "from clerk_sync.store import committer\n"
        "from clerk_sync.cli.serve import tracing_of\n"
        "assert tracing_of(json.loads(sys.argv[1])) == (None, [])\n"
        "print([name for name in sys.modules if name.startswith(('opentelemetry', 'google'))])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(environment)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
    "environment",
    [
        ENDPOINT,
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1/v1/traces"},
        {"OTEL_TRACES_EXPORTER": "console, otlp"},
        ENDPOINT | {"OTEL_SDK_DISABLED": "false", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
        ENDPOINT
        | {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
        | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
    ],
    ids=str,
)
async def test_the_standard_s_variables_ask_for_them(environment: dict[str, str]) -> None:
    tracing, doubts = serve.tracing_of(environment)
    assert doubts == []
    assert tracing is not None
    await tracing.close()


@pytest.mark.parametrize(
    ("environment", "doubt"),
    [
        (
            {"OTEL_TRACES_EXPORTER": "zipkin"},
            "OTEL_TRACES_EXPORTER is zipkin: no traces, because only otlp is supported",
        ),
        (
            ENDPOINT | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            f"OTEL_EXPORTER_OTLP_PROTOCOL is grpc: {ONLY_HTTP}",
        ),
        (
            ENDPOINT
            | {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"}
            | {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
            f"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL is http/json: {ONLY_HTTP}",
        ),
        (
            ENDPOINT | {"OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20hunter2%0Ax"},
            "no traces: OTEL_EXPORTER_OTLP_HEADERS has a line break in it, as %0A or %0D",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_a_doubt(environment: dict[str, str], doubt: str) -> None:
    assert serve.tracing_of(environment) == (None, [doubt])


@pytest.mark.parametrize(
    "headers", ["Bearer hunter2", "Authorization: Basic aHVudGVyMg==", "a=hunter2\nb=c"]
)
async def test_headers_that_would_be_left_out_are_a_doubt(headers: str) -> None:
    tracing, doubts = serve.tracing_of(ENDPOINT | {"OTEL_EXPORTER_OTLP_HEADERS": headers})
    assert doubts == ["OTEL_EXPORTER_OTLP_HEADERS is not a comma-separated list of name=value"]
    assert tracing is not None
    await tracing.close()


async def test_headers_may_stand_on_lines_of_their_own() -> None:
    headers = {"OTEL_EXPORTER_OTLP_HEADERS": "authorization=Basic aHVudGVyMg==,\n  b=c\n"}
    tracing, doubts = serve.tracing_of(ENDPOINT | headers)
    assert doubts == []
    assert tracing is not None
    await tracing.close()


async def test_a_provider_that_is_not_there_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER", "theirs")
    tracing, (doubt,) = serve.tracing_of(ENDPOINT)
    assert tracing is None
    assert doubt.startswith("no traces: Requested component 'theirs' not found")


async def test_faulty_variables_are_told_without_a_token_and_stop_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    await deliveries.migrate(url)
    faulty = ENDPOINT | {"OTEL_EXPORTER_OTLP_HEADERS": "Bearer hunter2"}
    for more, last in (
        ({}, []),
        (
            {"OTEL_BSP_MAX_QUEUE_SIZE": "0"},
            ["no traces: max_queue_size must be a positive integer."],
        ),
    ):
        async with deliveries.process(tmp_path, url, **faulty, **more) as (process, at):
            await at.until_ready()
            assert (await at.post(event("user.updated", "user_a"))).status == 200
            process.signal(signal.SIGTERM)
            assert await process.ended(seconds=8) == 0
        told = [line["detail"] for line in process.lines() if line["event"] == "config_warning"]
        headers = "OTEL_EXPORTER_OTLP_HEADERS is not a comma-separated list of name=value"
        assert told == [headers, *last]
        assert "hunter2" not in process.log


def test_without_the_extra_it_serves_all_the_same() -> None:
    script = (
        "import sys\n"
        "sys.modules['opentelemetry'] = None\n"  # as where it is not installed
        "from clerk_sync.cli.serve import tracing_of\n"
        "print(tracing_of({'OTEL_TRACES_EXPORTER': 'otlp'}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stderr == ""
    assert done.stdout == (
        "(None, ['OTEL_… asks for traces, but clerk-sync[otel] is not installed: no traces'])\n"
    )
