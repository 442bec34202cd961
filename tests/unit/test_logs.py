"""Logs: a JSON object per line; of an error its type and its way, never what it was about."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import stamina
import structlog

from clerk_sync.telemetry import logs

PRIVATE = "ada@example.com"


class Refusal(Exception):
    """A driver's error, which quotes the row."""


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Leave logging as it was found."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    quiet = ("asyncmy", "aiohttp.server", "aiohttp.access", "sqlalchemy")
    levels = {name: logging.getLogger(name).level for name in quiet}
    yield
    stamina.instrumentation.set_on_retry_hooks(None)
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, one in levels.items():
        logging.getLogger(name).setLevel(one)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    captured = capsys.readouterr()
    assert captured.err == ""
    return [json.loads(line) for line in captured.out.splitlines()]


def raise_with_local(address: str) -> None:
    local = f"local {address}"
    raise Refusal(f"Duplicate entry '{local}' for key 'users.email'")


def test_a_line_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    structlog.get_logger().info(
        "delivery", svix_id="msg_1", clerk_id=None, text="a\nb\u2028é\ud800"
    )
    (line,) = lines(capsys)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "delivery",
        "level": "info",
        "svix_id": "msg_1",
        "clerk_id": None,
        "text": "a\nb\u2028é\ud800",
    }


def test_off_a_terminal_it_is_json_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", None)
    structlog.get_logger().info("ready")
    assert lines(capsys)[0]["event"] == "ready"


def test_for_people_it_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "console")
    structlog.get_logger().info("ready", reason="x")
    assert "ready" in (out := capsys.readouterr().out)
    assert "{" not in out


@pytest.mark.parametrize(
    ("level", "heard"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_the_level_is_kept(
    level: str, heard: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(level, "json")
    for name in ("debug", "info", "warning", "error"):
        getattr(structlog.get_logger(), name)("said")
    assert [line["level"] for line in lines(capsys)] == heard


@pytest.mark.parametrize("format_", ["json", "console"])
@pytest.mark.parametrize("how", ["exception", "instance", "tuple"])
def test_an_error_is_told_by_its_type_and_its_way_only(
    format_: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("info", format_)
    log = structlog.get_logger()
    try:
        raise_with_local(PRIVATE)
    except Refusal as error:
        if how == "exception":
            log.exception("internal_error")
        elif how == "instance":
            log.error("internal_error", exc_info=error)
        else:
            log.error("internal_error", exc_info=(type(error), error, error.__traceback__))
    out = capsys.readouterr().out
    assert "Refusal" in out
    assert "raise_with_local" in out
    assert "test_logs.py" in out
    assert PRIVATE not in out
    assert "local ada" not in out


def test_nothing_is_told_of_what_an_error_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    try:
        try:
            raise_with_local(PRIVATE)
        except Refusal as error:
            raise RuntimeError(PRIVATE) from error
    except RuntimeError:
        structlog.get_logger().exception("internal_error")
    (line,) = lines(capsys)
    assert line["error_type"] == "RuntimeError"
    assert PRIVATE not in str(line)
    assert "exc_info" not in line


def test_libraries_are_heard_from_warnings_on_the_same_way(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure("info", "json")
    library = logging.getLogger("some.library")
    library.info("chatter")
    library.warning("trouble with %s", "the pool")
    try:
        raise_with_local(PRIVATE)
    except Refusal:
        library.exception("failed")
    trouble, failed = lines(capsys)
    assert trouble["logger"] == "some.library"
    assert trouble["message"] == "trouble with the pool"
    assert trouble["level"] == "warning"
    assert failed["error_type"] == "Refusal"
    assert PRIVATE not in str(failed)


@pytest.mark.parametrize("name", ["asyncmy", "aiohttp.server", "aiohttp.access", "sqlalchemy.pool"])
def test_libraries_that_quote_rows_or_strangers_are_not(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("debug", "json")
    logging.getLogger(name).error("Duplicate entry %r", PRIVATE)
    assert lines(capsys) == []


def test_what_the_event_loop_says_of_a_lost_error_is_not_its_message(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure("info", "json")
    error = Refusal(PRIVATE)
    logging.getLogger("asyncio").error(
        "Task exception was never retrieved\nfuture: <Task exception=%r>", error, exc_info=error
    )
    (line,) = lines(capsys)
    assert line["error_type"] == "Refusal"
    assert PRIVATE not in str(line)


def test_it_can_be_set_up_again(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    logs.configure("info", "json")
    logging.getLogger("some.library").warning("once")
    assert len(lines(capsys)) == 1


async def test_a_ration_says_how_many_lines_it_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure("info", "json")
    limiter = logs.LogRateLimiter(lines=2, seconds=0.2)

    def allowed(number: int, reason: str) -> int:
        return sum(limiter.allows(outcome="rejected", reason=reason) for _ in range(number))

    assert allowed(7, "wrong") == 2
    assert allowed(2, "path") == 2
    assert allowed(1, "wrong") == 0
    await asyncio.sleep(0.3)
    (line,) = lines(capsys)
    assert (line["event"], line["level"], line["count"]) == ("unlogged", "warning", 6)
    assert (line["outcome"], line["reason"], line["seconds"]) == ("rejected", "wrong", 0.2)
    # And anew; at the end nobody waits for the time to be over.
    assert allowed(5, "wrong") == 2
    limiter.end()
    (line,) = lines(capsys)
    assert line["count"] == 3
    await asyncio.sleep(0.3)
    assert lines(capsys) == []


async def test_another_attempt_is_told_without_what_it_was_about(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure("info", "json")

    @stamina.retry(on=Refusal, attempts=2, wait_initial=0.01)
    async def work(about: str) -> None:
        assert about
        raise Refusal("1213")

    with pytest.raises(Refusal):
        await work(PRIVATE)
    (line,) = lines(capsys)
    del line["timestamp"]
    assert line.pop("wait_seconds") >= 0.01
    assert line == {"event": "retry", "level": "warning", "error": "1213", "attempt": 1}
