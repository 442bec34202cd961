"""What Kustomize makes of the base and the components is what the chart makes of its values."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.chart import rules
from tests.k8s.examples import MARK, alone, app, beside
from tests.k8s.generate import K8S, UnmergeableError, addition, sidecar, standalone
from tests.k8s.kustomize import build, example, published, write

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from tests.chart.helm import Object


each_choice = pytest.mark.parametrize(
    "names", [(), ("reconcile",), ("mapping",), ("reconcile", "mapping")], ids="-".join
)


def without_key(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return what makes the migration, which has no use for Clerk's key."""
    return tuple(name for name in names if name != "reconcile")


def test_the_base_is_the_chart() -> None:
    built = {_key(one): one for one in build(K8S / "base")}
    charted = {_key(one): one for one in standalone() if one["kind"] != "Pod"}  # but for its test
    assert built.keys() == charted.keys()
    for key, one in charted.items():
        made = copy.deepcopy(built[key])
        if one["kind"] == "Job":
            assert made["metadata"].pop("annotations").keys().isdisjoint({"helm.sh/hook"})
        assert made == one


@each_choice
def test_components_make_of_the_base_what_values_make_of_the_chart(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    built, charted = build(alone(tmp_path, *names)), standalone(*names)
    assert _pods(built, "Deployment") == _pods(charted, "Deployment")
    assert _pods(built, "Job") == _pods(standalone(*without_key(names)), "Job")
    if "reconcile" in names:
        assert _pods(built, "CronJob") == _pods(sidecar(*names), "CronJob")


def test_the_app_s_token_comes_to_the_pods_and_to_nothing_else(tmp_path: Path) -> None:
    built, charted = build(alone(tmp_path, "reconcile", "app-token")), standalone("app-token")
    (tmp_path / "own").mkdir()
    own = build(alone(tmp_path / "own", "app-token"))
    assert _pods(own, "Deployment") == _pods(charted, "Deployment")
    assert _pods(own, "Job") == _pods(standalone(), "Job")
    assert "CLERK_SYNC_APP_TOKEN_FILE" in str(_pods(built, "Deployment"))
    assert "CLERK_SYNC_APP_TOKEN" not in str(_pods(built, "CronJob"))


@each_choice
@pytest.mark.parametrize("kind", ["Deployment", "StatefulSet"])
def test_the_sidecar_is_the_charts(names: tuple[str, ...], kind: str, tmp_path: Path) -> None:
    own = app(kind=kind, **MARK)
    built = build(beside(tmp_path, "sidecar", "migrate", *names, apps=[own]))
    before, after = own["spec"]["template"], rules.the(built, kind)["spec"]["template"]
    added = _pods(sidecar(*names), "Deployment")
    assert after["metadata"]["labels"] == before["metadata"]["labels"] | MARK
    first, *others = after["spec"]["initContainers"]
    assert _sorted(first) == added["initContainers"][0]
    assert others == before["spec"]["initContainers"]
    assert after["spec"]["containers"] == before["spec"]["containers"]
    volumes = [*before["spec"]["volumes"], *added["volumes"]]
    assert _sorted(after["spec"])["volumes"] == _sorted({"volumes": volumes})["volumes"]
    assert after["spec"].keys() == before["spec"].keys()
    assert _pods(built, "Job") == _pods(standalone(*without_key(names)), "Job")


def test_only_apps_with_the_label_get_the_sidecar(tmp_path: Path) -> None:
    apps = [app("shop", **MARK), app("jobs"), app("store", "StatefulSet", **MARK)]
    built = build(beside(tmp_path, "sidecar", "reconcile", "mapping", apps=apps))
    marked = {
        pod.name: {one["name"] for one in pod.containers}
        for pod in rules.pods(built)
        if pod.owner["kind"] != "CronJob"
    }
    assert marked == {
        "Deployment shop": {"clerk-sync", "first", "app"},
        "Deployment jobs": {"first", "app"},
        "StatefulSet store": {"clerk-sync", "first", "app"},
    }
    assert apps[1] in built


def test_a_mapping_has_a_name_of_its_own_for_each_content(tmp_path: Path) -> None:
    names = []
    for number, text in enumerate(("tables: {}\n", "tables: {user: {}}\n")):
        folder = tmp_path / str(number)
        folder.mkdir()
        kustomization = beside(folder, "sidecar", "migrate", "reconcile", "mapping")
        (folder / "mapping.yaml").write_text(text, "utf-8")
        built = build(kustomization)
        name = rules.name_of(rules.the(built, "ConfigMap"))
        assert name.startswith("clerk-sync-mapping-")
        assert all(name in set(rules.strings(pod.spec)) for pod in rules.pods(built))
        names.append(name)
    assert len(set(names)) == 2


def test_the_migration_can_be_left_out(tmp_path: Path) -> None:
    kustomization = {"resources": published("base")} | example("without-migrate")
    kinds = {one["kind"] for one in build(write(tmp_path, kustomization))}
    assert kinds == {one["kind"] for one in build(K8S / "base")} - {"Job"}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"a": 1}, {}, "Job: a went away"),
        ({"env": [{"name": "A"}]}, {"env": []}, "Job.env: A went away"),
        ({"command": ["a"]}, {"command": ["b"]}, "Job.command is a list that cannot be merged"),
    ],
)
def test_what_a_patch_cannot_say_is_refused(before: Object, after: Object, said: str) -> None:
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "one"}}
    with pytest.raises(UnmergeableError, match=re.escape(said)):
        addition([job | before], [job | after], "Job")


def _key(one: Object) -> tuple[str, str]:
    return one["kind"], rules.name_of(one)


def _pods(objects: Iterable[Object], kind: str) -> Any:
    """Return the spec of the pods of the one object of this kind, in a fixed order."""
    spec = rules.the(objects, kind)["spec"]
    if kind == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    return _sorted(spec["template"]["spec"])


def _sorted(tree: Any) -> Any:
    """Return the same, with lists in one order where theirs means nothing."""
    if isinstance(tree, list):
        return [_sorted(one) for one in tree]
    if isinstance(tree, str):
        return re.sub(r"^(clerk-sync-mapping)-[a-z0-9]{10}$", r"\1", tree)
    if not isinstance(tree, dict):
        return tree
    made = {key: _sorted(value) for key, value in tree.items()}
    for key in ("env", "volumes", "volumeMounts"):
        if key in made:
            made[key].sort(key=lambda item: item["name"])
    return made
