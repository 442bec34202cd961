"""Trace a delivery in spans: the request, and in it verify, queue and apply.

Imported only where traces are asked for. While it is under way a delivery only notes times;
spans are made once it is known who sent it, so that a stranger's `traceparent` is never
followed. They carry ids and the words of the answer, and nothing else of an event.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from typing import TYPE_CHECKING, Final, Self

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import (
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    format_span_id,
    format_trace_id,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from clerk_sync import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.sdk.trace import SpanProcessor

# What waits to be sent when the process ends has this long.
_FLUSH_SECONDS: Final = 2.0
_PROPAGATOR: Final = TraceContextTextMapPropagator()


class Tracing:
    """Where spans go: to `processor`, under this service's resource."""

    def __init__(self, processor: SpanProcessor) -> None:
        own = {
            "service.name": "clerk-sync",
            "service.version": __version__,
            "service.instance.id": socket.gethostname(),  # a pod's name
        }
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say more, and say it better.
        resource = Resource.create().merge(Resource(own)).merge(OTELResourceDetector().detect())
        # At the end of the process it would wait for a collector that is away.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("clerk_sync", __version__)

    @classmethod
    def by_environment(cls) -> Self:
        """Batches to the collector that the standard's OTEL_* variables name, by HTTP."""
        return cls(BatchSpanProcessor(OTLPSpanExporter()))

    def trace(self, path: str) -> Trace:
        """The trace of a request to this path that begins now."""
        return Trace(self._tracer, path)

    async def close(self) -> None:
        """Send what waits, for a short while."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, _FLUSH_SECONDS)


class Trace:
    """One delivery's times, which become spans. Each is unix nanoseconds; 0 is not yet."""

    __slots__ = (
        "_batch",
        "_began",
        "_path",
        "_queued",
        "_settled",
        "_span",
        "_taken",
        "_tracer",
        "_verified",
        "_verifying",
    )

    def __init__(self, tracer: Tracer, path: str) -> None:
        self._tracer = tracer
        self._path = path
        self._began = time.time_ns()
        self._verifying = self._verified = self._queued = self._taken = self._settled = 0
        self._batch = 0
        self._span: Span | None = None

    def verifying(self) -> None:
        """Note that the body is read, and its signature is being verified."""
        self._verifying = time.time_ns()

    def verified(self, headers: Mapping[str, str]) -> None:
        """Note that the signature is valid, and continue the trace that the headers name."""
        self._verified = time.time_ns()
        self._span = self._request(_PROPAGATOR.extract(headers, Context()))

    def queued(self) -> None:
        """Note that it waits for a writer."""
        self._queued = time.time_ns()

    def taken(self) -> None:
        """Note that a writer has it. A second attempt changes nothing."""
        self._taken = self._taken or time.time_ns()

    def settled(self, events: int) -> None:
        """Note that its transaction, with so many events, is over."""
        self._settled = time.time_ns()
        self._batch = events

    @property
    def exemplar(self) -> dict[str, str] | None:
        """The labels that lead from a metric to this trace; None if it is not sampled."""
        context = self._span.get_span_context() if self._span is not None else None
        if context is None or not context.trace_flags.sampled:
            return None
        return {
            "trace_id": format_trace_id(context.trace_id),
            "span_id": format_span_id(context.span_id),
        }

    def answered(
        self,
        status: int,
        outcome: str,
        reason: str | None,
        *,
        svix_id: str | None,
        type_: str | None,
        clerk_id: str | None,
    ) -> None:
        """End the request's span with its HTTP status and outcome, and make those of its parts."""
        now = time.time_ns()
        span = self._span = self._span or self._request(Context())
        if not span.is_recording():
            return
        about: dict[str, str | int | None] = {
            "http.response.status_code": status,
            "clerk_sync.outcome": outcome,
            "clerk_sync.reason": reason,
            "clerk_sync.svix_id": svix_id,
            "clerk_sync.type": type_,
            "clerk_sync.clerk_id": clerk_id,
        }
        span.set_attributes({name: value for name, value in about.items() if value is not None})
        if status >= 500:  # noqa: PLR2004 -- of a 4xx the caller is at fault
            span.set_status(Status(StatusCode.ERROR))
            span.set_attribute("error.type", reason or outcome)
        context = set_span_in_context(span, Context())
        self._part("verify", context, self._verifying, self._verified or now)
        self._part("queue", context, self._queued, self._taken or now)
        events = {"clerk_sync.batch.events": self._batch} if self._settled else None
        self._part("apply", context, self._taken, self._settled or now, events)
        span.end(now)

    def _request(self, context: Context) -> Span:
        return self._tracer.start_span(
            f"POST {self._path}",
            context,
            SpanKind.SERVER,
            {"http.request.method": "POST", "http.route": self._path},
            start_time=self._began,
        )

    def _part(
        self,
        name: str,
        context: Context,
        began: int,
        ended: int,
        attributes: Mapping[str, int] | None = None,
    ) -> None:
        if began:
            self._tracer.start_span(name, context, attributes=attributes, start_time=began).end(
                ended
            )
