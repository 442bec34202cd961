"""Logging: one JSON object per line, or plain text on a terminal; never a body, never a secret."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

import structlog

if TYPE_CHECKING:
    from collections.abc import MutableMapping


def hush() -> None:
    """Silence the libraries that quote data, or let strangers fill the log."""
    for name in ("asyncmy", "aiohttp.server", "aiohttp.access", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def configure(level: str, format_: str | None, *, file: TextIO | None = None) -> None:
    """Set up structlog, and send what libraries log the same way.

    Libraries are heard from warnings on. The database driver and aiohttp's server are not:
    the one quotes rows, the other lets any stranger fill the log with broken requests.
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
    hush()


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


class _Forward(logging.Handler):
    """Hands a library's record to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger().log(
            record.levelno,
            "library",
            logger=record.name,
            # asyncio goes on, in further lines, with the repr of a lost error: message and all.
            message=record.getMessage().partition("\n")[0],
            exc_info=record.exc_info,
        )
