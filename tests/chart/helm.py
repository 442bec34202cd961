"""Real Helm over the chart: renders are kept for the session, as every test looks at the same."""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from tools import programs
from tools.servers import CACHE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ROOT: Final = Path(__file__).parents[2]
CHART: Final = ROOT / "charts" / "clerk-sync"
EXAMPLE: Final = CHART / "examples" / "shop"
"""An app's chart that depends on this one, and includes the sidecar."""

HELMS: Final = ("helm4", "helm3")
RELEASE: Final = "events"
NAMESPACE: Final = "shop"
FULLNAME: Final = f"{RELEASE}-clerk-sync"

VERSIONS: Final = ("1.29", "1.33", "1.37")
"""Of Kubernetes: the oldest that the chart supports, the newest there is, and one between."""

Object = dict[str, Any]
"""A Kubernetes object, as YAML has it."""

LEAST: Final[dict[str, Any]] = {
    "database": {"existingSecret": "database"},
    "clerk": {"signingSecret": {"existingSecret": "clerk"}},
}
"""The values that an installation needs."""

_NOTHING: Final = "/dev/null"  # in place of the kubeconfig: no test may find somebody's cluster


def _parent() -> Path:
    """Set the example up with this chart in it, and without values for it: those are the tests'."""
    folder = Path(tempfile.mkdtemp(prefix="clerk-sync-parent-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    parent = folder / EXAMPLE.name
    shutil.copytree(EXAMPLE, parent, ignore=shutil.ignore_patterns("charts"))
    values = yaml.safe_load((parent / "values.yaml").read_text("utf-8"))
    del values["clerk-sync"]
    (parent / "values.yaml").write_text(yaml.safe_dump(values), "utf-8")
    (parent / "charts").mkdir()
    (parent / "charts" / "clerk-sync").symlink_to(CHART)
    return parent


PARENT: Final = _parent()
"""The example, for values of one's own."""


@cache
def umbrella(*aliases: str) -> Path:
    """Return a chart that depends on this one once under each alias: `clerk-sync` is none."""
    folder = Path(tempfile.mkdtemp(prefix="clerk-sync-umbrella-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    version = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))["version"]
    needs: list[dict[str, str]] = []
    for alias in aliases:
        need = {"name": "clerk-sync", "version": version, "repository": "file://../clerk-sync"}
        needs.append(need if alias == "clerk-sync" else need | {"alias": alias})
    about = {"apiVersion": "v2", "name": "umbrella", "version": "1.0.0", "dependencies": needs}
    (folder / "Chart.yaml").write_text(yaml.safe_dump(about), "utf-8")
    (folder / "charts").mkdir()
    (folder / "charts" / "clerk-sync").symlink_to(CHART)
    return folder


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

    @cached_property
    def values(self) -> dict[str, Any]:
        return yaml.safe_load(self.path.read_text("utf-8")) or {}

    @property
    def is_sidecar(self) -> bool:
        return bool(self.values.get("mode") == "sidecar")

    def options(self, version: str | None = None) -> list[str]:
        version = version or self.oldest
        options = [f"--kube-version={version}"] if version else []
        return options + [f"--api-versions={one}" for one in self.knows]

    def versions(self) -> list[str]:
        """Return the versions of Kubernetes that the scenario is for."""
        oldest = _numbers(self.oldest or "0.0")[:2]
        return [one for one in VERSIONS if _numbers(one) >= oldest]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


@cache
def scenarios() -> tuple[Scenario, ...]:
    """Return those that the chart ships, for its users to read and for the tests to render."""
    found = tuple(Scenario.read(path) for path in sorted(CHART.glob("ci/*-values.yaml")))
    assert found, f"{CHART}/ci has no *-values.yaml"
    return found


def helm(name: str, *arguments: str | Path, text: str = "") -> str:
    """Run Helm 4 or 3, with a home of its own and this input, and return what it printed."""
    home = CACHE / "helm"
    done = subprocess.run(
        [programs.need(name), *arguments],
        env={
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(home),
            "KUBECONFIG": _NOTHING,
            "GOGC": "off",  # a quarter of its time is collecting garbage, of which it has little
            "HELM_CACHE_HOME": str(home / "cache"),
            "HELM_CONFIG_HOME": str(home / "config"),
            "HELM_DATA_HOME": str(home / "data"),
        },
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if done.returncode:
        raise HelmError(done.stderr + done.stdout)
    return done.stdout


def template(
    values: Mapping[str, Any],
    *options: str,
    by: str = "helm4",
    chart: Path = CHART,
    release: str = RELEASE,
) -> str:
    """Return the manifest of a release with these values, hooks and all."""
    return _template(json.dumps(values), *options, by=by, chart=chart, release=release)


@cache
def _template(values: str, *options: str, by: str, chart: Path, release: str) -> str:
    to = f"--namespace={NAMESPACE}"
    return helm(by, "template", release, chart, to, "--values=-", *options, text=values)


def render(
    values: Mapping[str, Any],
    *options: str,
    by: str = "helm4",
    chart: Path = CHART,
    release: str = RELEASE,
) -> tuple[Object, ...]:
    """Return the objects of a release with these values. They are shared: do not change them."""
    return _objects(template(values, *options, by=by, chart=chart, release=release))


def render_scenario(
    scenario: Scenario, version: str | None = None, *, by: str = "helm4", chart: Path = CHART
) -> tuple[Object, ...]:
    """Return the objects of a scenario; with `PARENT`, those of an app's chart that has them."""
    values = {"clerk-sync": scenario.values} if chart == PARENT else scenario.values
    return render(values, *scenario.options(version), by=by, chart=chart)


@cache
def _objects(manifest: str) -> tuple[Object, ...]:
    return tuple(one for one in yaml.load_all(manifest, Loader=StrictLoader) if one)


class StrictLoader(yaml.CSafeLoader):
    """Refuses what other parsers read otherwise: a key twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        names = [key.value for key, _ in node.value]
        if twice := {name for name in names if names.count(name) > 1}:
            raise yaml.constructor.ConstructorError(
                None, None, f"{', '.join(sorted(twice))} twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as Helm merges two files of them: maps by key, all else by the later."""
    both = dict(one)
    for key, value in other.items():
        old = both.get(key)
        both[key] = (
            merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return both


def nested(path: Iterable[str], value: object) -> dict[str, Any]:
    """Return values with this one at its path."""
    first, *rest = path
    return {first: nested(rest, value) if rest else value}
