"""JSON as values: whatever the standard allows, at any depth, and nothing besides."""

from __future__ import annotations

import json
import math
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from clerk_sync.clerk.decoding import InvalidJson, decoded

# In a fresh clone, the first text waits until hypothesis has made its tables of characters.
patient = hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# More levels than any parser with a stack reads.
LEVELS: Final = 20_000


def deep(text: str) -> str:
    return "[" * LEVELS + text + "]" * LEVELS


def within(value: Any) -> Any:
    """What the innermost of so many lists holds."""
    for _ in range(LEVELS):
        (value,) = value
    return value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('"cut \\ud83d"', "cut \ud83d"),
        ('"\\udc00"', "\udc00"),
        ('"\\ud83d\\ude00"', "😀"),
        ('"\\ud83d\\ud83d\\ude00"', "\ud83d😀"),
        ('{"\\ud83d": 1}', {"\ud83d": 1}),
        ('"\\u0000"', "\x00"),
        ("9" * 4300, (10**4300 - 1)),
        ("9" * 4301, math.inf),
        ("-" + "9" * 4301, -math.inf),
        ("1" + "0" * 4999 + ".5e-4990", 1e9),
        ("1" * 5000 + "e1", math.inf),
        ("1e400", math.inf),
        ("-1e400", -math.inf),
        ("1e-400", 0.0),
        ("-0", 0),
        ("1E2", 100.0),
        ('{"a": 1, "b": 2, "a": 3}', {"a": 3, "b": 2}),
        ('{"": [ ], "a": { }}\r\n\t ', {"": [], "a": {}}),
        (
            '{"a": [[], {"c": [1, "x", null, true, false]}], "b": 1}',
            {"a": [[], {"c": [1, "x", None, True, False]}], "b": 1},
        ),
    ],
    ids=lambda part: repr(part)[:30] if isinstance(part, str) else "",
)
def test_what_is_json_is_read(text: str, value: object) -> None:
    strange = '["\\ud800", ' + text + "]"
    for found in (
        decoded(text),
        decoded(text.encode()),
        decoded(strange)[1],
        within(decoded(deep(text))),
    ):
        assert found == value
        assert type(found) is type(value)


@pytest.mark.parametrize("levels", [200, 201, 900, 1000, 5000, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_depth_is_no_reason(levels: int, opening: str, closing: str) -> None:
    value = decoded(opening * levels + "7" + closing * levels)
    for _ in range(levels):
        (value,) = value if isinstance(value, list) else value.values()
    assert value == 7


NONE: Final = (
    *(
        "",
        " ",
        "{",
        "[",
        '"',
        "nope",
        "'a'",
        "\ufeff{}",
        "\x0b{}",
        "\u00a0{}",
        "\x00",
        "{}{}",
        "1 2",
    ),
    *("[1,]", "[,1]", "[1 2]", "[1", "[1}", '{"a"}', '{"a":}', '{"a":1,}', "{a:1}", "{1:1}"),
    *('{"a":1]', '{"a" 1}', '{,"a":1}', '{"a":1 "b":2}', "[:1]", "[1:2]", "]", "}", ",", ":"),
    *("NaN", "[NaN]", "Infinity", "-Infinity", "[-Infinity]", "nul", "True", "nulll"),
    *("01", "-", "+1", ".5", "5.", "1e", "1e+", "0x1", "-01", "1_000", "٣", "1٣"),
    *('"\x01"', '"\n"', '"\\x"', '"\\u12"', '"\\u12g4"', '"\\"', "// no\n{}", "[1] // no"),
)


@pytest.mark.parametrize("text", NONE, ids=repr)
def test_what_is_not_json_is_refused(text: str) -> None:
    for body in (text, text.encode(), '["\\ud800", ' + text + "]", deep(f"0, {text}")):
        with pytest.raises(InvalidJson):
            decoded(body)


@pytest.mark.parametrize(
    "body", [b"\xff", b'"\xff"', b'"\xc0\xaf"', b'"\xed\xa0\xbd"', b"\xef\xbb\xbf{}"]
)
def test_bytes_are_utf_8_without_a_mark(body: bytes) -> None:
    for more in (body, b'["\\ud800", ' + body + b"]", b"[" * LEVELS + body + b"]" * LEVELS):
        with pytest.raises(InvalidJson):
            decoded(more)


@pytest.mark.parametrize("text", ["[" * 2**21, '{"a":' * 2**18, "[{" * 2**20, " " * 2**21])
def test_what_does_not_end_is_refused(text: str) -> None:
    with pytest.raises(InvalidJson):
        decoded(text)


def test_of_deep_json_no_more_is_read_than_takes_a_moment() -> None:
    assert len(within(decoded(deep("[" + "0," * 400_000 + "0]")))) == 400_001
    with pytest.raises(InvalidJson):
        decoded(deep("[" + "0," * 600_000 + "0]"))
    assert len(decoded("[" + "0," * 600_000 + '"\\ud800"]')) == 600_001


_texts: Final = st.text(st.characters(codec=None, exclude_categories=[]), max_size=8)
_values: Final = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | _texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_texts, inner, max_size=4),
    max_leaves=20,
)


@patient
@given(_values, st.sampled_from([None, 1]))
def test_all_ways_read_the_same(value: object, indent: int | None) -> None:
    text = json.dumps(value, indent=indent)
    wanted = json.loads(text)
    assert decoded(text) == wanted
    assert within(decoded(deep(text))) == wanted


def _no_constant(name: str) -> None:
    raise ValueError(name)


@patient
@given(_values, st.data())
def test_all_ways_refuse_the_same(value: object, data: st.DataObject) -> None:
    text = json.dumps([value])
    at = data.draw(st.integers(1, len(text) - 1))
    text = text[:at] + data.draw(st.sampled_from([*'[]{}",:0-.eE+ntf\\ \n', ""])) + text[at + 1 :]
    try:
        wanted = json.loads(text, parse_constant=_no_constant)
    except ValueError:
        for body in (text, deep(text)):
            with pytest.raises(InvalidJson):
                decoded(body)
        return
    assert decoded(text) == wanted
    assert within(decoded(deep(text))) == wanted
