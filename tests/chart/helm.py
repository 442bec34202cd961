"""Real Helm over the chart: renders are kept for the session, as every test looks at the same."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from tests import tools

ROOT: Final = Path(__file__).parents[2]
CHART: Final = ROOT / "charts" / "clerk-sync"
HELMS: Final = ("helm4", "helm3")

VERSIONS: Final = ("1.29", "1.33", "1.37")
"""Of Kubernetes: the oldest that the chart supports, the newest there is, and one between."""

RELEASE: Final = "events"
NAMESPACE: Final = "shop"

Object = dict[str, Any]
"""A Kubernetes object, as YAML has it."""

_NOTHING: Final = "/dev/null"  # in place of the kubeconfig: no test may find somebody's cluster


class HelmError(Exception):
    """Helm refused. Holds what it printed."""


@dataclass(frozen=True)
class Scenario:
    """A values file with what its comments ask for.

    `# kube-version: 1.36.0` and `# api-versions: a/v1, b/v1`, each a line of its own, are what
    `helm template` is told of the cluster: the oldest version that will do, and what it knows.
    """

    path: Path
    oldest: str | None
    knows: tuple[str, ...]

    def __str__(self) -> str:
        return self.path.name.removesuffix("-values.yaml")

    @staticmethod
    def read(path: Path) -> Scenario:
        said = dict(
            re.findall(r"^# (kube-version|api-versions): (.*)$", path.read_text(), re.MULTILINE)
        )
        knows = re.findall(r"[^\s,]+", said.get("api-versions", ""))
        return Scenario(path, said.get("kube-version"), tuple(knows))

    @property
    def values(self) -> dict[str, Any]:
        return yaml.safe_load(self.path.read_text("utf-8")) or {}

    def options(self, version: str | None = None) -> list[str]:
        version = version or self.oldest
        options = [f"--kube-version={version}"] if version else []
        return options + [f"--api-versions={one}" for one in self.knows]

    def versions(self) -> list[str]:
        """Return the versions of Kubernetes that the scenario is for."""
        oldest = self.oldest or "0.0"
        return [one for one in VERSIONS if _numbers(one) >= _numbers(oldest)[:2]]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def scenarios() -> tuple[Scenario, ...]:
    """Return those that the chart ships, for its users to read and for the tests to render."""
    found = tuple(Scenario.read(path) for path in sorted(CHART.glob("ci/*-values.yaml")))
    if not found:
        raise HelmError(f"{CHART}/ci has no *-values.yaml")
    return found


def helm(name: str, *arguments: str | Path) -> str:
    """Run Helm 4 or 3 with a home of its own, and return what it printed."""
    home = tools.MODULES.parent / "helm-home"
    done = subprocess.run(
        [tools.need(name), *arguments],
        env={
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(home),
            "KUBECONFIG": _NOTHING,
            "HELM_CACHE_HOME": str(home / "cache"),
            "HELM_CONFIG_HOME": str(home / "config"),
            "HELM_DATA_HOME": str(home / "data"),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if done.returncode:
        raise HelmError(done.stderr + done.stdout)
    return done.stdout


@cache
def template(
    values: Path | None = None, *options: str, by: str = "helm4", chart: Path = CHART
) -> str:
    """Return the manifest of a release, hooks and all."""
    files = [f"--values={values}"] if values else []
    return helm(by, "template", RELEASE, chart, f"--namespace={NAMESPACE}", *files, *options)


def render(values: Path | None = None, *options: str, by: str = "helm4") -> list[Object]:
    """Return the objects of a release."""
    return objects(template(values, *options, by=by))


def render_scenario(
    scenario: Scenario, version: str | None = None, *, by: str = "helm4"
) -> list[Object]:
    return render(scenario.path, *scenario.options(version), by=by)


def render_with(values: dict[str, Any], *options: str, by: str = "helm4") -> list[Object]:
    """Return the objects of a release with these values: each is set as JSON."""
    return render(None, *settings(values), *options, by=by)


def settings(values: dict[str, Any]) -> list[str]:
    return [f"--set-json={name}={json.dumps(value)}" for name, value in values.items()]


def objects(manifest: str) -> list[Object]:
    return [one for one in yaml.load_all(manifest, Loader=StrictLoader) if one]


class StrictLoader(yaml.CSafeLoader):
    """Refuses what other parsers read otherwise: a key twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        names = [key.value for key, _ in node.value]
        if twice := {name for name in names if names.count(name) > 1}:
            raise yaml.constructor.ConstructorError(
                None, None, f"{', '.join(sorted(twice))} twice", node.start_mark
            )
        return super().construct_mapping(node, deep)
