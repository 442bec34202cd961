"""The public listener: one path, one method, one answer to each POST."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from clerk_sync.clerk import signature
from clerk_sync.clerk.signature import InvalidSignature
from clerk_sync.http.connections import Rank
from clerk_sync.http.responses import response_to
from clerk_sync.mapping.ingest import change_of
from clerk_sync.outcomes import Answer, Outcome, Reason
from clerk_sync.telemetry.logs import LogRateLimiter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from standardwebhooks import Webhook

    from clerk_sync.clerk.signature import Delivery
    from clerk_sync.http.connections import Connections, Peer
    from clerk_sync.mapping.change import Change
    from clerk_sync.mapping.model import Mapping
    from clerk_sync.store.committer import Committer
    from clerk_sync.telemetry.metrics import Metrics
    from clerk_sync.telemetry.tracing import Trace, Tracing

log = structlog.get_logger()

# Svix sends up to 1 MiB. A 413 would be retried for 28 hours, so the limit lies well above.
BODY_LIMIT: Final = 2 * 1024 * 1024
KEEPALIVE_SECONDS: Final = 75.0
LINGER_SECONDS: Final = 2.0
_SPELLINGS: Final = tuple(
    tuple(f"{prefix}-{part}" for part in ("id", "timestamp", "signature"))
    for prefix in ("svix", "webhook")
)


@dataclass(slots=True)
class _Seen:
    """What is known of a delivery when it is answered, for its log line."""

    delivery: Delivery | None = None
    change: Change | None = None
    trace: Trace | None = None


class WebhookListener:
    """Receives deliveries: verify, parse, map, commit, answer; one log line each."""

    def __init__(
        self,
        *,
        path: str,
        signers: Callable[[], Sequence[Webhook]],
        mapping: Mapping,
        instance_id: str | None,
        committer: Committer,
        metrics: Metrics,
        deadline_seconds: float,
        connections: Connections,
        tracing: Tracing | None = None,
    ) -> None:
        self.draining = False
        self._path = path
        self._signers = signers
        self._mapping = mapping
        self._instance_id = instance_id
        self._committer = committer
        self._metrics = metrics
        self._deadline = deadline_seconds
        self._tracing = tracing
        self._connections = connections
        self._log_limiter = LogRateLimiter()

    def server(self) -> web.Server:
        """The plain server of aiohttp: there is one route, and every answer is a JSON of ours."""
        return web.Server(
            self.receive,
            access_log=None,
            # The signature is over the bytes as sent: nothing may unpack them.
            auto_decompress=False,
            keepalive_timeout=KEEPALIVE_SECONDS,
            read_bufsize=2**16,
            # A refused body is read a little longer, so that its sender sees the answer.
            lingering_time=LINGER_SECONDS,
        )

    async def receive(self, request: web.BaseRequest) -> web.Response:
        """Answer one request. Only a defect of clerk-sync makes this a 500."""
        peer = self._connections.peer(request.protocol)
        peer.heard = True
        seen = _Seen()
        rank = Rank.LEAVING
        try:
            response = await self._receive(request, peer, seen)
            # A connection stays for whoever has signed: a stranger's holds nothing of his longer.
            if seen.delivery is None:
                response.force_close()
            elif response.keep_alive is not False:
                rank = Rank.KNOWN
            return response
        finally:
            self._connections.ranked(peer, rank)

    async def _receive(self, request: web.BaseRequest, peer: Peer, seen: _Seen) -> web.Response:
        started = time.perf_counter()
        self._metrics.received.inc()
        try:
            async with asyncio.timeout(self._deadline):
                answer = await self._answer(request, peer, seen)
        except TimeoutError:
            answer = Answer(Outcome.UNAVAILABLE, Reason.DEADLINE)
        except InvalidSignature as error:
            seen.delivery = seen.delivery or error.delivery
            answer = Answer(Outcome.REJECTED, error.reason)
        except (ConnectionError, web.RequestPayloadError):
            # The sender disconnected, or its chunks are malformed: the answer reaches nobody.
            answer = Answer(Outcome.REJECTED, Reason.MALFORMED)
        except Exception:
            log.exception("internal_error", svix_id=seen.delivery.id if seen.delivery else None)
            answer = Answer(Outcome.ERROR, Reason.INTERNAL)
        given = response_to(answer)
        self._report(answer, given.status, seen, time.perf_counter() - started)
        response = web.Response(
            body=given.body,
            status=given.status,
            headers=CIMultiDict(given.headers, Server="clerk-sync"),
        )
        if self.draining or answer.reason in (Reason.TOO_LARGE, Reason.DEADLINE):
            response.force_close()
        return response

    async def _answer(self, request: web.BaseRequest, peer: Peer, seen: _Seen) -> Answer:
        if request.path.removesuffix("/") != self._path.removesuffix("/"):
            raise InvalidSignature(Reason.PATH)
        if request.method != "POST":
            raise InvalidSignature(Reason.METHOD)
        trace = None
        if self._tracing is not None:
            trace = seen.trace = self._tracing.trace(self._path)
        if self.draining:
            return Answer(Outcome.UNAVAILABLE, Reason.DRAINING)
        if (request.content_length or 0) > BODY_LIMIT:
            raise InvalidSignature(Reason.TOO_LARGE)
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        body = await self._body(request, peer)
        if trace is not None:
            trace.verifying()
        headers = _signed_headers(request.headers)
        delivery = signature.verify(headers, body, signers=self._signers(), now=time.time())
        seen.delivery = delivery
        self._connections.verified(peer)
        if trace is not None:
            trace.verified(request.headers)
        change = change_of(delivery, self._mapping, instance_id=self._instance_id)
        seen.change = change
        return await self._committer.commit(change, trace)

    async def _body(self, request: web.BaseRequest, peer: Peer) -> bytes:
        """The raw body. Once it is complete, the connection is not closed to make room."""
        content = request.content
        body = bytearray()
        try:
            while not content.at_eof():
                body += await content.readany()
                if len(body) > BODY_LIMIT:
                    raise InvalidSignature(Reason.TOO_LARGE)
                if not content.at_eof():
                    self._connections.read(peer, request, len(body))
            self._connections.keep(peer)
            return bytes(body)
        finally:
            # What readany() raises is kept by the stream, and its traceback keeps this frame.
            body.clear()

    def _report(self, answer: Answer, status: int, seen: _Seen, seconds: float) -> None:
        change, exemplar = seen.change, None
        outcome, reason = answer.outcome.value, answer.reason.value if answer.reason else None
        # Anybody can be refused as often as they like: log and traces are not theirs to fill.
        strange = answer.outcome is Outcome.REJECTED or seen.delivery is None
        shown = not strange or self._log_limiter.allows(outcome=outcome, reason=reason)
        if seen.trace is not None and shown:
            seen.trace.answered(
                status,
                outcome,
                reason,
                svix_id=seen.delivery.id if seen.delivery else None,
                type_=change.type if change else None,
                clerk_id=change.clerk_id if change else None,
            )
            exemplar = seen.trace.exemplar
        self._metrics.answered(
            answer,
            change.type if change else None,
            seconds,
            time.time(),
            exemplar,
            verified=seen.delivery is not None,
        )
        if shown:
            # If stdout is closed, Clerk still gets its answer.
            with contextlib.suppress(OSError, ValueError):
                self._log(answer, status, seen, round(seconds * 1000, 1), exemplar)

    def _log(
        self,
        answer: Answer,
        status: int,
        seen: _Seen,
        ms: float,
        exemplar: dict[str, str] | None,
    ) -> None:
        delivery, change = seen.delivery, seen.change
        if answer.reason is Reason.EXPIRED and delivery is not None:
            age = round(time.time()) - delivery.sent_at
            log.warning("clock_skew", svix_id=delivery.id, age_seconds=age)
        log.info(
            "delivery",
            svix_id=delivery.id if delivery else None,
            type=change.type if change else None,
            clerk_id=change.clerk_id if change else None,
            outcome=answer.outcome.value,
            reason=answer.reason.value if answer.reason else None,
            status=status,
            ms=ms,
            **(exemplar or {}),
        )

    def close(self) -> None:
        """Log how many lines were dropped."""
        self._log_limiter.end()


def _signed_headers(headers: CIMultiDictProxy[str]) -> dict[str, str]:
    """The three headers of a signature, in one of their two spellings. Raises InvalidSignature."""
    found: dict[str, str] = {}
    for names in _SPELLINGS:
        for name in names:
            values = headers.getall(name, ())
            if len(values) > 1:
                raise InvalidSignature(Reason.MALFORMED)
            if values:
                found[name] = values[0].strip()
        if found:
            break
    return found
