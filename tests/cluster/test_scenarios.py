"""A server judges every scenario of the chart: by its schemas, its rules and Pod Security."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.chart.helm import ROOT, Scenario, render_scenario, scenarios
from tests.k8s.kustomize import build

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.chart.helm import Object
    from tests.cluster.space import Space

_OVERLAYS = sorted(one.parent for one in ROOT.glob("k8s/overlays/*/kustomization.yaml"))


@pytest.mark.parametrize("scenario", scenarios(), ids=str)
@pytest.mark.usefixtures("operators")
def test_a_scenario_is_accepted_without_a_warning(shared_space: Space, scenario: Scenario) -> None:
    version = shared_space.cluster.version()
    if scenario.oldest and _numbers(scenario.oldest) > _numbers(version):
        pytest.skip(f"the scenario is for Kubernetes {scenario.oldest} and newer")
    _is_accepted(shared_space, render_scenario(scenario, version))


@pytest.mark.parametrize("overlay", _OVERLAYS, ids=lambda one: one.name)
@pytest.mark.usefixtures("operators")
def test_an_overlay_is_accepted_without_a_warning(shared_space: Space, overlay: Path) -> None:
    _is_accepted(shared_space, build(overlay))


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")[:2]]


def _is_accepted(space: Space, objects: Iterable[Object]) -> None:
    things = [_moved(one, space.name) for one in objects]
    for pod in (one for one in things if one["kind"] == "Pod"):
        space.ensure_account(pod["spec"]["serviceAccountName"])
    assert things
    assert space.cluster.warnings(things, space.name) == ""


def _moved(thing: Object, namespace: str) -> Object:
    """Take out of an object what a pod's admission looks up, and is not ours to make."""
    moved = copy.deepcopy(thing)
    if "namespace" in moved["metadata"]:
        moved["metadata"]["namespace"] = namespace
    if moved["kind"] == "Pod":
        moved["spec"].pop("priorityClassName", None)
    return moved
