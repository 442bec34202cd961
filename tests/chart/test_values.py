"""values.yaml, its schema and the README's tables say the same, and say all of it."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import yaml

from tests.chart import generate, values
from tests.chart.helm import (
    CHART,
    HELMS,
    LEAST,
    HelmError,
    merged,
    nested,
    render,
    scenarios,
    template,
)
from tests.chart.values import Value


@cache
def documented() -> tuple[Value, ...]:
    return values.read((CHART / "values.yaml").read_text("utf-8"))


@cache
def validator() -> Any:
    schema = values.schema(documented())
    values.DRAFT.check_schema(schema)
    return values.DRAFT(schema)


def refusals(given: dict[str, Any]) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in validator().iter_errors(given)]


def leaves() -> list[Value]:
    return [value for value in values.everything(documented()) if not value.children]


def test_what_follows_from_values_is_up_to_date() -> None:
    stale = [
        path.name for path, text in generate.documents().items() if path.read_text("utf-8") != text
    ]
    assert stale == [], "run `make chart`"


def test_every_value_is_documented() -> None:
    silent = [value.name for value in leaves() if len(value.text) < 4]
    assert silent == []


def test_texts_do_not_end_in_the_middle() -> None:
    """A line below a text that has lost its `#`, or its place, is found by what it leaves."""
    for value in values.everything(documented()):
        assert value.text.count("`") % 2 == 0, value.name
        assert value.text.count("(") == value.text.count(")"), value.name
        assert not re.search(r"[,(:]$|@\w+ ", value.text), value.name


def test_defaults_and_scenarios_are_allowed() -> None:
    assert refusals(yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))) == []
    for scenario in scenarios():
        assert refusals(scenario.values) == [], scenario


def test_a_misspelt_key_is_refused_wherever_it_stands() -> None:
    """But in `global`, which holds other charts' values, too."""
    passed = [
        value.name
        for value in values.everything(documented())
        if value.path[0] != "global" or len(value.path) == 1
        if not refusals(nested((*value.path[:-1], value.path[-1] + "s_"), value.default))
    ]
    assert passed == []


def test_a_value_of_another_type_is_refused() -> None:
    wrong = [["x"], [["x"]], "a b", 3.5, {"x": [[]]}, True]
    passed = [
        value.name
        for value in leaves()
        if all(not refusals(nested(value.path, one)) for one in wrong)
    ]
    assert passed == []
    strings = [value for value in leaves() if value.default == "" or isinstance(value.default, int)]
    assert [value.name for value in strings if not refusals(nested(value.path, ["x"]))] == []


@pytest.mark.parametrize("by", HELMS)
@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"replica": 3}, "replica"),
        ({"database": {"existingSecrets": "x"}}, "database"),
        ({"clerk": {"signingSecret": {"secret": "x"}}}, "signingSecret"),
        ({"replicas": "two"}, "replicas"),
        ({"mode": "sidekick"}, "mode"),
        ({"image": {"digest": "sha256:123"}}, "digest"),
        ({"service": {"port": 70000}}, "port"),
        ({"extraEnv": [{"name": "A", "value": "b"}]}, "extraEnv"),
    ],
    ids=str,
)
def test_helm_itself_refuses_them(by: str, given: dict[str, Any], named: str) -> None:
    with pytest.raises(HelmError, match=rf"(?s)don't meet the specifications.*{named}"):
        template(merged(LEAST, given), by=by)


@pytest.mark.parametrize("by", HELMS)
def test_null_takes_a_default_away(by: str) -> None:
    """Helm's way to do it: the schema has to let it through."""
    objects = render(merged(LEAST, {"resources": {"limits": None}}), by=by)
    (deployment,) = [one for one in objects if one["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["resources"].keys() == {"requests"}


def used_paths() -> set[tuple[str, ...]]:
    """What templates read below `.Values`, by that name or by the variable `$values`."""
    found: set[tuple[str, ...]] = set()
    for path in CHART.glob("templates/**/*.*"):
        prefix: tuple[str, ...] = ()
        for alias, below, read in re.findall(
            r"(\$values := [\w.$]*)Values((?:\.\w+)*)|(?:\.Values|\$values)\.([a-zA-Z][\w.]*)",
            path.read_text("utf-8"),
        ):
            if alias:
                prefix = tuple(below.split(".")[1:])
            elif read:
                found.add((*prefix, *read.strip(".").split(".")))
    return found


def test_used_values_are_documented() -> None:
    known = {value.path for value in values.everything(documented())}
    opened = {value.path for value in leaves() if isinstance(value.default, dict) or value.is_open}
    strangers = [
        ".".join(path)
        for path in used_paths()
        if path not in known and not any(path[: len(one)] == one for one in opened)
    ]
    assert strangers == []
