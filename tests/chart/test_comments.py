"""How the comments of values.yaml are read."""

from __future__ import annotations

import pytest

from tests.chart import values
from tests.chart.values import Value


def read(text: str) -> Value:
    (value,) = values.read(text)
    return value


def test_a_text_goes_on_over_lines() -> None:
    value = read("# Prose.\n# -- One\n# two.\n# @default -- three\na: 1\n#  b: example\n")
    assert (value.text, value.shown, value.default) == ("One two.", "three", 1)


def test_a_block_that_does_not_touch_its_key_is_not_its() -> None:
    assert read("# -- One\n\na: 1\n").text == ""


def test_keywords_may_stand_behind_the_value() -> None:
    value = read("a: x # @schema type:[string, null]; pattern:^(a|b; c: d)$\n")
    assert value.schema == {"type": ["string", "null"], "pattern": "^(a|b; c: d)$"}


def test_an_open_map_is_one_value() -> None:
    value = read("# -- R\na: # @schema additionalProperties:true\n  limits: {cpu: 1}\n")
    assert value.children == ()
    assert values.schema([value])["properties"]["a"]["default"] == {"limits": {"cpu": 1}}


def test_an_object_is_closed() -> None:
    schema = values.schema([read("a:\n  # -- B\n  b: 1\n")])
    assert schema["properties"]["a"]["additionalProperties"] is False


def test_what_cannot_be_told_is_asked_for() -> None:
    for text, sentence in (
        ("a:\n", "a has no default: give its type"),
        ("a: {}\n", "say what the map holds"),
        ("a: []\n", "say what the list holds"),
        ("a: x # @schema patern:^x$\n", "no keyword begins `patern:"),
        ("- a\n", "has to be a mapping"),
    ):
        with pytest.raises(values.UnreadableError, match=sentence):
            values.schema(values.read(text))


def test_a_table_shows_defaults_as_they_are_written() -> None:
    text = "# @section -- S\na:\n  # -- B|c\n  b: x\n  # -- D\n  d: null # @schema type:string\n"
    assert values.tables(values.read(text)) == (
        "### S\n\n| Value | Default | Meaning |\n|---|---|---|\n"
        "| `a.b` | `x` | B\\|c |\n| `a.d` |  | D |\n"
    )
