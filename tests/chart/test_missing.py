"""A value that is missing or null is not given: it has its default, wherever it stands."""

from __future__ import annotations

import shutil
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import pytest
import yaml

from tests.chart import values
from tests.chart.helm import (
    CHART,
    HELMS,
    LEAST,
    PARENT,
    HelmError,
    merged,
    nested,
    render,
    umbrella,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.chart.helm import Object

ON: Final = "--kube-version=1.37"
MODES: Final[dict[str, dict[str, Any]]] = {
    "standalone": {},
    "sidecar": {"mode": "sidecar"},
    "injection": {"mode": "sidecar", "sidecar": {"injection": {"enabled": True}}},
}
READ: Final = values.read((CHART / "values.yaml").read_text("utf-8"))
DEEPEST: Final = max(len(value.path) for value in values.everything(READ))

# So that what reads these has something to do.
_USED: Final[dict[str, Any]] = {
    "ingress": {"enabled": True, "hosts": ["hooks.example.com"]},
    "httpRoute": {
        "enabled": True,
        "hostnames": ["hooks.example.com"],
        "parentRefs": [{"name": "public"}],
    },
    "networkPolicy": {"enabled": True},
    "monitor": {"enabled": True},
    "alerts": {"enabled": True},
    "dashboard": {"enabled": True},
    "probe": {"enabled": True},
    "clerk": {"secretKey": {"existingSecret": "clerk"}},
    "reconcile": {"mode": "cronJob"},
}


def given(mode: str) -> dict[str, Any]:
    return merged(merged(LEAST, _USED), MODES[mode])


def with_null(depth: int, mode: str) -> dict[str, Any]:
    """Return values with null for each key of this depth, but for what is needed and what is on."""
    nulls: dict[str, Any] = {}
    for value in values.everything(READ):
        if len(value.path) == depth:
            nulls = merged(nulls, nested(value.path, None))
    return merged(nulls, given(mode))


@cache
def whole(mode: str, by: str) -> tuple[Object, ...]:
    return render(given(mode), ON, by=by)


@pytest.mark.parametrize("by", HELMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("depth", range(1, DEEPEST + 1))
def test_null_is_the_default(depth: int, mode: str, by: str) -> None:
    assert render(with_null(depth, mode), ON, by=by) == whole(mode, by)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("root", READ, ids=lambda root: root.name)
def test_a_part_of_null_is_the_default(root: values.Value, mode: str) -> None:
    """It stands alone, so that no other null hides it; and nothing of it is on."""
    wanted = merged(LEAST, MODES[mode])
    if root.name in LEAST:
        with pytest.raises(HelmError, match="clerk-sync cannot be installed with these values"):
            render({**wanted, root.name: None}, ON)
    else:
        less = {name: value for name, value in wanted.items() if name != root.name}
        if root.name == "mode":
            less.pop("sidecar", None)
        assert render({**less, root.name: None}, ON) == render(less, ON)


@pytest.mark.parametrize("by", HELMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("depth", range(DEEPEST))
def test_missing_is_the_default(depth: int, mode: str, by: str, tmp_path: Path) -> None:
    """As with `--reuse-values`, when the chart that was there before had other keys."""
    older = tmp_path / "clerk-sync"
    shutil.copytree(CHART, older)
    (older / "values.yaml").write_text(yaml.safe_dump(as_deep_as(depth, READ)), "utf-8")
    assert render(given(mode), ON, by=by, chart=older) == whole(mode, by)


def as_deep_as(depth: int, read: Sequence[values.Value]) -> dict[str, Any]:
    """Return the defaults without what stands deeper."""
    return {
        value.path[-1]: as_deep_as(depth, value.children) if value.children else value.default
        for value in read
        if len(value.path) <= depth
    }


@pytest.mark.parametrize("by", HELMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("depth", range(1, DEEPEST + 1))
def test_null_is_the_default_in_a_parent_chart(depth: int, mode: str, by: str) -> None:
    chart = umbrella("clerk-sync")
    with_nulls = render({"clerk-sync": with_null(depth, mode)}, ON, by=by, chart=chart)
    assert with_nulls == render({"clerk-sync": given(mode)}, ON, by=by, chart=chart)


@pytest.mark.parametrize("by", HELMS)
@pytest.mark.parametrize("depth", range(1, DEEPEST + 1))
def test_null_is_the_default_in_what_an_app_includes(depth: int, by: str) -> None:
    with_nulls = render({"clerk-sync": with_null(depth, "sidecar")}, ON, by=by, chart=PARENT)
    assert with_nulls == render({"clerk-sync": given("sidecar")}, ON, by=by, chart=PARENT)


@pytest.mark.parametrize("by", HELMS)
def test_an_entry_of_null_is_taken_out_of_a_map(by: str) -> None:
    """As one file of values takes out what another has put in."""
    for path in ("podAnnotations", "commonLabels", "nodeSelector", "extraEnv"):
        entries = {path: {"example.com/a": "b", "c": None}}
        if path == "extraEnv":
            entries = {path: {"A": "b", "C": None}}
        less = {path: {key: value for key, value in entries[path].items() if value}}
        assert render(merged(LEAST, entries), by=by) == render(merged(LEAST, less), by=by)


def test_every_template_completes_the_values_first() -> None:
    """Whichever Helm runs first: so it is no accident that the others find them complete."""
    for path in CHART.glob("templates/**/*.*"):
        if path.suffix != ".tpl":
            first = '{{- include "clerk-sync.values" . -}}'
            assert path.read_text("utf-8").startswith(first), path.name
