"""Log one JSON object per line, or plain text on a terminal; never a body, never a secret."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

import stamina
import structlog

if TYPE_CHECKING:
    from collections.abc import MutableMapping


def silence_noisy_loggers() -> None:
    """Silence the libraries that quote data or secrets, or log what unverified clients send."""
    # The last one quotes headers that it cannot read, and they hold a collector's token.
    quoting = ("asyncmy", "sqlalchemy", "opentelemetry.util.re")
    for name in (*quoting, "aiohttp.server", "aiohttp.access"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def configure(level: str, format_: str | None, *, file: TextIO | None = None) -> None:
    """Set up structlog, and send what libraries log the same way.

    Libraries are logged from warnings on. The database driver and aiohttp's server are not: the
    one quotes rows, and with the other any client could fill the log with broken requests.
    """
    file = file or sys.stdout
    as_json = (format_ or ("console" if file.isatty() else "json")) == "json"
    processors: list[Any] = [_stamped, structlog.dev.ConsoleRenderer(colors=file.isatty())]
    if as_json:
        # An encoder made once: json.dumps makes one per line when it is given a `default`.
        encode = json.JSONEncoder(default=str).encode
        processors[-1] = lambda _, __, event: encode(event)
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=file),
        cache_logger_on_first_use=True,
    )
    handler = _Forward(logging.WARNING)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    stamina.instrumentation.set_on_retry_hooks([_retried])
    silence_noisy_loggers()


def _stamped(_: Any, level: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Add level and time; an exception as its type and frames.

    Messages and local variables of exceptions hold people's data, and are left out. One
    processor instead of three: there is a line for every delivery.
    """
    error = event.pop("exc_info", None)
    if error is True:
        error = sys.exc_info()
    if isinstance(error, tuple):
        error = error[1]
    if isinstance(error, BaseException):
        event["error_type"] = type(error).__name__
        event["traceback"] = "".join(traceback.format_tb(error.__traceback__))
    event["level"] = "error" if level == "exception" else level
    event["timestamp"] = datetime.now(UTC).isoformat(timespec="milliseconds")[:-6] + "Z"
    return event


def _retried(details: stamina.instrumentation.RetryDetails) -> None:
    """Log a retry in our own words, as the library's line quotes the arguments of the call."""
    structlog.get_logger().warning(
        "retry",
        error=str(details.caused_by),
        attempt=details.retry_num,
        wait_seconds=round(details.wait_for, 2),
    )


class LogRateLimiter:
    """Limits the lines per kind and minute, and then logs how many were dropped.

    A kind is the fields that its lines have in common. There have to be few kinds.
    """

    def __init__(self, *, lines: int = 10, seconds: float = 60.0) -> None:
        self._lines = lines
        self._seconds = seconds
        self._counts: dict[tuple[tuple[str, str | None], ...], int] = {}

    def allows(self, **kind: str | None) -> bool:
        """Count a line of this kind, and return whether it may be logged."""
        key = tuple(kind.items())
        if key not in self._counts:
            self._counts[key] = 0
            asyncio.get_running_loop().call_later(self._seconds, self._end, key)
        self._counts[key] += 1
        return self._counts[key] <= self._lines

    def end(self) -> None:
        """Log now how many lines were dropped."""
        for key in [*self._counts]:
            self._end(key)

    def _end(self, key: tuple[tuple[str, str | None], ...]) -> None:
        count = self._counts.pop(key, 0) - self._lines
        if count > 0:
            structlog.get_logger().warning(
                "unlogged", **dict(key), count=count, seconds=self._seconds
            )


class _Forward(logging.Handler):
    """Passes a library's records to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger().log(
            record.levelno,
            "library",
            logger=record.name,
            # asyncio goes on, in further lines, with the repr of a lost error: message and all.
            message=record.getMessage().partition("\n")[0],
            exc_info=record.exc_info,
        )
