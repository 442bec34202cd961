"""Write the parts of `k8s/` that say what the chart says, from the chart: `make k8s`.

Each is what real Helm renders, without what belongs to Helm alone. A component that changes what is
there already is the difference between two renders. A test compares all of it with what is
committed.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from tests.chart import rules
from tests.chart.helm import CHART, PARENT, ROOT, HelmError, Object, StrictLoader, helm, merged
from tools import provision
from tools.servers import UnavailableError

K8S: Final = ROOT / "k8s"
RELEASE: Final = "clerk-sync"
OLDEST: Final = "1.29"
"""What is written for the oldest Kubernetes is good for all that came after it."""

_VALUES: Final = Path(__file__).parent / "values"
_HEAD: Final = "# Generated from charts/clerk-sync by `make k8s`. Change it by a patch, not here.\n"
_MONITORS: Final = ("ServiceMonitor", "PodMonitor")
_OF_HELM: Final = ("app.kubernetes.io/managed-by", "helm.sh/")
# An image's tag tells the version, also when `images:` of a kustomization has set another one. And
# a generated ConfigMap has a name of its own for each content: that restarts pods.
_UNTRUE: Final = ("app.kubernetes.io/version", "clerk-sync.dev/mapping")

# How the items of a list are told apart when it is merged. Other lists are replaced as a whole.
_KEYS: Final = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
}


class UnmergeableError(Exception):
    """Two renders differ by more than an addition. Says where."""


def main() -> int:
    try:
        provision.provide_tools()
        files = generated()
    except (HelmError, UnavailableError, UnmergeableError) as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 1
    for path, text in files.items():
        if not path.exists() or path.read_text("utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    return 0


def generated() -> dict[Path, str]:
    """Return the text of every generated file."""
    alone, beside = standalone(), sidecar()
    keyed, keyed_beside = standalone("reconcile"), sidecar("reconcile")
    mapped, mapped_beside = standalone("reconcile", "mapping"), sidecar("mapping")
    asked = standalone("app-token")
    public, watched = standalone("exposure", "monitor"), sidecar("monitor")
    files = {
        "base/deployment.yaml": rules.of_kind(alone, "Deployment"),
        "base/services.yaml": rules.of_kind(alone, "Service"),
        "base/service-account.yaml": rules.of_kind(alone, "ServiceAccount"),
        "base/disruption-budget.yaml": rules.of_kind(alone, "PodDisruptionBudget"),
        "components/migrate/job.yaml": rules.of_kind(alone, "Job"),
        "components/sidecar/pods.yaml": rules.of_kind(beside, "Deployment"),
        "components/sidecar/service.yaml": rules.of_kind(beside, "Service"),
        "components/reconcile/cron-job.yaml": rules.of_kind(keyed_beside, "CronJob"),
        "components/reconcile/deployment.yaml": [addition(alone, keyed, "Deployment")],
        "components/reconcile/sidecar.yaml": [addition(beside, keyed_beside, "Deployment")],
        "components/mapping/deployment.yaml": [addition(keyed, mapped, "Deployment")],
        "components/mapping/sidecar.yaml": [addition(beside, mapped_beside, "Deployment")],
        "components/mapping/job.yaml": [addition(keyed, mapped, "Job")],
        "components/mapping/cron-job.yaml": [addition(keyed, mapped, "CronJob")],
        "components/app-token/deployment.yaml": [addition(alone, asked, "Deployment")],
        "components/ingress/ingress.yaml": rules.of_kind(public, "Ingress"),
        "components/http-route/http-route.yaml": rules.of_kind(public, "HTTPRoute"),
        "components/network-policy/network-policies.yaml": rules.of_kind(public, "NetworkPolicy"),
        "components/service-monitor/service-monitor.yaml": rules.of_kind(public, "ServiceMonitor"),
        "components/pod-monitor/pod-monitor.yaml": rules.of_kind(watched, "PodMonitor"),
    }
    return {K8S / name: _text(objects) for name, objects in files.items()}


def standalone(*names: str) -> list[Object]:
    """Return what the chart makes with the values of these names."""
    return [_plain(one) for one in _render(json.dumps(_values(*names)), CHART)]


def sidecar(*names: str) -> list[Object]:
    """Return the same in sidecar mode; and, as a Deployment, what it adds to an app's."""
    objects = _render(json.dumps({"clerk-sync": _values("sidecar", *names)}), PARENT)
    app = rules.the(objects, "Deployment")
    template = app["spec"]["template"]
    own = app["spec"]["selector"]["matchLabels"].keys()
    labels = {key: value for key, value in template["metadata"]["labels"].items() if key not in own}
    added = {key: template["spec"][key] for key in ("initContainers", "volumes")}
    what = {"template": {"metadata": {"labels": labels}, "spec": added}}
    patch = {**_identity(app), "metadata": {"name": "any"}, "spec": what}
    return [patch, *(_plain(one) for one in objects if one is not app)]


def addition(before: list[Object], after: list[Object], kind: str) -> Object:
    """Return the patch that makes the object of a kind what it is afterwards."""
    one, other = rules.the(before, kind), rules.the(after, kind)
    return {**_identity(other), **_added(one, other, kind)}


def _identity(one: Object) -> Object:
    return {
        "apiVersion": one["apiVersion"],
        "kind": one["kind"],
        "metadata": {"name": rules.name_of(one)},
    }


def _added(one: Object, other: Object, where: str) -> Object:
    if gone := one.keys() - other.keys():
        raise UnmergeableError(f"{where}: {', '.join(gone)} went away")
    added = {}
    for name, value in other.items():
        old, place = one.get(name), f"{where}.{name}"
        if name not in one:
            added[name] = value
        elif old == value:
            continue
        elif isinstance(old, dict) and isinstance(value, dict):
            added[name] = _added(old, value, place)
        elif isinstance(old, list) and isinstance(value, list):
            added[name] = _added_items(old, value, _KEYS.get(name), place)
        else:
            added[name] = value
    return added


def _added_items(one: list[Any], other: list[Any], key: str | None, where: str) -> list[Any]:
    if key is None:
        raise UnmergeableError(f"{where} is a list that cannot be merged, and differs")
    old = {item[key]: item for item in one}
    if gone := old.keys() - {item[key] for item in other}:
        raise UnmergeableError(f"{where}: {', '.join(gone)} went away")
    return [
        {key: item[key], **_added(old.get(item[key], {}), item, f"{where}[{item[key]}]")}
        for item in other
        if item != old.get(item[key])
    ]


def _values(*names: str) -> Object:
    values: Object = {}
    for name in ("secrets", *names):
        text = (_VALUES / f"{name}.yaml").read_text("utf-8")
        values = merged(values, yaml.safe_load(text))
    return values


@cache
def _render(values: str, chart: Path) -> tuple[Object, ...]:
    options = f"--kube-version={OLDEST}", "--values=-"
    manifest = helm("helm4", "template", RELEASE, chart, *options, text=values)
    return tuple(one for one in yaml.load_all(manifest, Loader=StrictLoader) if one)


def _plain(one: Object) -> Object:
    """Return the object without what is Helm's, and without a namespace: the user sets it."""
    plain: Object = _bare(one)
    plain["metadata"].pop("namespace", None)
    if one["kind"] == "Job":
        plain["metadata"]["name"] = f"{RELEASE}-migrate"  # a patch has to find it in every version
    if one["kind"] in _MONITORS:
        del plain["spec"]["namespaceSelector"]  # not set, it means the monitor's own
    return plain


def _bare(tree: Any) -> Any:
    """Return the same with no label and annotation that says something of Helm or untrue."""
    if isinstance(tree, list):
        return [_bare(one) for one in tree]
    if not isinstance(tree, dict):
        return tree
    bare = {}
    for key, value in tree.items():
        kept = _kept(value) if key in ("labels", "annotations") else value
        if kept or not value:
            bare[key] = _bare(kept)
    return bare


def _kept(entries: dict[str, str]) -> dict[str, str]:
    return {
        key: value
        for key, value in entries.items()
        if not key.startswith(_OF_HELM) and key not in _UNTRUE
    }


def _text(objects: list[Object]) -> str:
    dumped = yaml.dump_all(
        objects, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=100
    )
    return _HEAD + dumped


class _Dumper(yaml.SafeDumper):
    """Indents lists, as the files beside them do, and repeats what is there twice."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002, FBT001, FBT002
        super().increase_indent(flow, False)  # noqa: FBT003

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002
        return True


if __name__ == "__main__":
    sys.exit(main())
