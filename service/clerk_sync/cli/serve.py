"""`clerk-sync serve`."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import structlog

from clerk_sync import app
from clerk_sync.cli.common import command, load
from clerk_sync.cli.exits import fail
from clerk_sync.telemetry import logs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clerk_sync.telemetry.tracing import Tracing


@command("CLERK_WEBHOOK_SIGNING_SECRET=whsec_… DATABASE_URL=mysql://… clerk-sync serve")
async def serve() -> int:
    """Receive Clerk's webhooks until SIGTERM.

    It never changes the schema: if that is missing or old, it is live, not ready, and says what
    to run.
    """
    settings, mapping = load(signing=True, token=True)
    logs.configure(settings.log_level, settings.log_format)
    tracing, warnings = tracing_of(os.environ)
    for warning in (*settings.warnings(os.environ), *mapping.warnings, *warnings):
        structlog.get_logger().warning("config_warning", detail=warning)
    try:
        await app.serve(settings, mapping, tracing=tracing)
    except OSError as error:
        fail(
            f"cannot listen: {error.strerror or error}: "
            "CLERK_SYNC_PORT and CLERK_SYNC_INTERNAL_PORT name other ports"
        )
    return 0


def tracing_of(environ: Mapping[str, str]) -> tuple[Tracing | None, list[str]]:
    """Tracing, if OpenTelemetry's variables ask for it, and warnings about them.

    They may be in every pod of a cluster: none of them keeps the service from starting.
    """
    endpoints = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    default = "otlp" if any(environ.get(name) for name in endpoints) else "none"
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip() or default
    if exporter == "none" or environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None, []
    if "otlp" not in re.split(r"[\s,]+", exporter):
        return None, [
            f"OTEL_TRACES_EXPORTER is {exporter}: no traces, because only otlp is supported"
        ]
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = environ.get(name, "").strip()
        if protocol == "http/protobuf":
            break
        if protocol:
            only = "no traces, because only http/protobuf is supported, usually on port 4318"
            return None, [f"{name} is {protocol}: {only}"]
    try:
        from clerk_sync.telemetry.tracing import Tracing  # noqa: PLC0415 -- off, it costs nothing
    except ImportError:
        return None, ["OTEL_… asks for traces, but clerk-sync[otel] is not installed: no traces"]
    warnings = []
    for name in ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS"):
        headers = environ.get(name, "")
        # It would be refused at each attempt, in words that quote it, and it holds a token.
        if re.search("%0[ad]", headers, re.IGNORECASE):
            return None, [f"no traces: {name} has a line break in it, as %0A or %0D"]
        parts = (part for part in headers.split(",") if part.strip())
        if not all(re.fullmatch(r"\s*[^\s:=]+\s*=.*\s*", part) for part in parts):
            warnings.append(f"{name} is not a comma-separated list of name=value")
    try:
        return Tracing.by_environment(), warnings
    except (ValueError, RuntimeError) as error:
        return None, [*warnings, f"no traces: {error}"]
