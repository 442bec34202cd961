r"""Decode JSON: whatever RFC 8259 allows, in bounded time, and nothing else.

pydantic's parser is the fast one, and refuses what is valid all the same: half of a surrogate
pair (`\ud83d`, as a name has that was cut in the middle of an emoji), integers of more than 4300
digits, more than 200 levels (https://docs.rs/jiter). One such value in a place that nobody maps
must not cost the event its type and id. So a text that it refuses is read again: by Python's own
parser, and without recursion where even that one stops, at some 1000 levels.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from pydantic_core import from_json

# Python reads and writes no longer ones, as that takes quadratic time
# (https://docs.python.org/3/library/stdtypes.html#integer-string-conversion-length-limitation).
_DIGITS: Final = 4300
# The parser without recursion takes half a second for so many, while everything else waits. A
# page of 500 users has fewer than half as many.
_VALUES: Final = 500_000

_SPACE: Final = r"[ \t\n\r]*+"
_START: Final = re.compile(_SPACE + r"(?:\[(?:" + _SPACE + r"\])?|\{(?:" + _SPACE + r"\})?)?")
_NAME: Final = re.compile(_SPACE + '(?=")')
_COLON: Final = re.compile(_SPACE + ":")
_NEXT: Final = re.compile(_SPACE + r"([,\]}])")
_END: Final = re.compile(_SPACE + r"\Z")


class InvalidJson(ValueError):
    """The text is not JSON, or has too many values."""


def decoded(text: str | bytes) -> Any:
    """Return the value of a JSON text; bytes are UTF-8. Raises InvalidJson.

    Of equal names the last counts. A number that neither a double nor 4300 digits can express is
    infinite. Text may hold lone surrogates, which cannot be encoded.
    """
    try:
        return from_json(text, allow_inf_nan=False, cache_strings="keys")
    except ValueError:
        pass
    try:
        characters = text.decode() if isinstance(text, bytes) else text
    except UnicodeDecodeError:
        raise InvalidJson from None
    try:
        return _slow.decode(characters)
    except RecursionError:
        return _decode_iteratively(characters)
    except ValueError:
        raise InvalidJson from None


def _integer(digits: str) -> int | float:
    # Of more digits, float() makes an infinity.
    return int(digits) if len(digits) <= _DIGITS else float(digits)


def _constant(_: str) -> None:
    raise InvalidJson  # NaN and Infinity, which Python takes for JSON


_slow: Final = json.JSONDecoder(parse_int=_integer, parse_constant=_constant)


def _decode_iteratively(text: str) -> Any:
    """Decode JSON of any depth, but of at most _VALUES values. Raises InvalidJson."""
    whole: list[Any] = []
    opened: list[list[Any] | dict[str, Any]] = [whole]
    name = ""
    at = 0
    for _ in range(_VALUES):
        found, at = _match(_START, text, at)
        value, at, ended = _begin(text, at, found[0][-1:])
        here = opened[-1]
        if isinstance(here, dict):
            here[name] = value
        else:
            here.append(value)
        if ended:
            at = _close(text, at, opened)
        else:
            opened.append(value)
        if len(opened) == 1:
            _match(_END, text, at)
            return whole[0]
        if isinstance(opened[-1], dict):
            _, at = _match(_NAME, text, at)
            name, at = _scalar(text, at)
            _, at = _match(_COLON, text, at)
    raise InvalidJson


def _begin(text: str, at: int, last: str) -> tuple[Any, int, bool]:
    """Return a value (empty for a list or an object that follows), its end, and if it is whole."""
    match last:
        case "[":
            return [], at, False
        case "{":
            return {}, at, False
        case "]":
            return [], at, True
        case "}":
            return {}, at, True
    return *_scalar(text, at), True


def _close(text: str, at: int, opened: list[list[Any] | dict[str, Any]]) -> int:
    """Close the lists and objects that end here, and skip the comma before the next value."""
    while len(opened) > 1:
        found, at = _match(_NEXT, text, at)
        if found[1] == ",":
            break
        if (found[1] == "}") is not isinstance(opened.pop(), dict):
            raise InvalidJson
    return at


def _match(pattern: re.Pattern[str], text: str, at: int) -> tuple[re.Match[str], int]:
    """Match what has to come here, and return its end. Raises InvalidJson."""
    found = pattern.match(text, at)
    if found is None:
        raise InvalidJson
    return found, found.end()


def _scalar(text: str, at: int) -> tuple[Any, int]:
    """Decode a text, a number or a word, and return its end. Raises InvalidJson."""
    try:
        return _slow.raw_decode(text, at)
    except ValueError:
        raise InvalidJson from None
