"""Upgrades and rollbacks: what is there is what the chart renders, and nobody quarrels over it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest
import yaml

from tests.chart.helm import FULLNAME, StrictLoader, merged
from tests.cluster.access import RefusedError

if TYPE_CHECKING:
    from tests.chart.helm import Object
    from tests.cluster.space import Space

_CHANGES: Final[dict[str, dict[str, Any]]] = {
    "replicas": {"replicas": 3},
    "autoscaling": {"autoscaling": {"type": "hpa", "maxReplicas": 4}},
    "labels": {"commonLabels": {"team": "platform"}, "podLabels": {"tier": "edge"}},
    "network": {"networkPolicy": {"enabled": True}, "ingress": {"enabled": True, "hosts": ["a.b"]}},
    "no budget": {"podDisruptionBudget": {"enabled": False}},
    "port": {"listen": {"webhookPort": 9090}, "service": {"port": 8000}},
    "extras": {"extraEnv": {"A": "b"}, "secretsAs": "env", "preStopSleepSeconds": 0},
}


@pytest.mark.parametrize("change", _CHANGES.values(), ids=list(_CHANGES))
def test_an_upgrade_and_the_way_back(space: Space, change: dict[str, Any]) -> None:
    space.secrets()
    space.install({}, "--wait")
    first = _live(space)

    space.upgrade(change, "--wait", "--server-side=true")
    _is_as_rendered(space)
    before = _generations(space)
    space.upgrade(change, "--wait", "--server-side=true")
    assert _generations(space) == before, "an upgrade without a change changed something"

    where = "events", "1", f"--namespace={space.name}", "--wait", f"--timeout={space.patience}"
    space.cluster.helm("rollback", *where)
    _is_as_rendered(space)
    assert _live(space).keys() == first.keys()


def test_a_digest_and_the_way_back(space: Space) -> None:
    """Without waiting: nowhere is there such an image."""
    space.secrets()
    space.install({}, "--wait")
    digest = f"sha256:{'a' * 64}"
    space.upgrade({"image": {"digest": digest}, "migrations": {"enabled": False}})

    _is_as_rendered(space)
    (container,) = space.get("deployment", FULLNAME)["spec"]["template"]["spec"]["containers"]
    assert container["image"].endswith(f"@{digest}")
    where = "events", "1", f"--namespace={space.name}", "--wait", f"--timeout={space.patience}"
    space.cluster.helm("rollback", *where)
    _is_as_rendered(space)


def test_helm_4_takes_over_from_helm_3(space: Space) -> None:
    space.secrets()
    space.helm("install", {}, "--wait", by="helm3")
    _is_as_rendered(space)

    space.upgrade({"replicas": 3}, "--wait")
    _is_as_rendered(space)
    space.upgrade({"extraEnv": {"A": "b"}}, "--wait", "--server-side=true")
    _is_as_rendered(space)
    before = _generations(space)
    space.upgrade({"extraEnv": {"A": "b"}}, "--wait", "--server-side=true")
    assert _generations(space) == before


def test_the_autoscaler_and_helm_do_not_quarrel(space: Space) -> None:
    """Whatever the autoscaler decides stays, over upgrades, until autoscaling is turned off."""
    space.secrets()
    scaling = {"autoscaling": {"type": "hpa", "minReplicas": 3, "maxReplicas": 4}}
    space.install(scaling, "--wait")
    _scaled(space, 3)
    space.upgrade(merged(scaling, {"podLabels": {"tier": "edge"}}), "--wait", "--server-side=true")
    _scaled(space, 3)

    space.upgrade({"replicas": 2}, "--wait", "--server-side=true")
    _scaled(space, 2)


def test_who_scaled_by_hand_is_asked_before_an_upgrade_undoes_it(space: Space) -> None:
    space.secrets()
    space.install({}, "--wait")
    space.cluster.kubectl("scale", "deployment", FULLNAME, "--replicas=5", f"-n={space.name}")
    change = {"podLabels": {"tier": "edge"}}

    with pytest.raises(RefusedError, match=r'conflict with "kubectl".*\.spec\.replicas'):
        space.upgrade(change, "--server-side=true")
    _scaled(space, 5)
    space.upgrade(change, "--wait", "--server-side=true", "--force-conflicts")
    _scaled(space, 2)
    space.upgrade(change, "--wait", "--server-side=true")


def _scaled(space: Space, pods: int) -> None:
    def replicas() -> bool:
        return bool(space.get("deployment", FULLNAME)["spec"]["replicas"] == pods)

    space.cluster.until(f"there are {pods} pods", replicas)


def _rendered(space: Space) -> list[Object]:
    """Return what the release has, in the last revision, but for hooks."""
    manifest = space.cluster.helm("get", "manifest", "events", f"-n={space.name}")
    return [one for one in yaml.load_all(manifest, Loader=StrictLoader) if one]


def _live(space: Space) -> dict[tuple[str, str], Object]:
    return {
        (one["kind"], one["metadata"]["name"]): space.get(one["kind"], one["metadata"]["name"])
        for one in _rendered(space)
    }


def _generations(space: Space) -> dict[tuple[str, str], int]:
    """Return how often each object's spec was changed. Some kinds are not counted."""
    return {key: one["metadata"].get("generation", 0) for key, one in _live(space).items()}


def _is_as_rendered(space: Space) -> None:
    live = _live(space)
    for thing in _rendered(space):
        key = thing["kind"], thing["metadata"]["name"]
        for where, rendered, found in _differences("", thing, live[key]):
            pytest.fail(f"{key} {where}: rendered {rendered!r}, and found {found!r}")


def _differences(where: str, rendered: Any, found: Any) -> list[tuple[str, Any, Any]]:
    """Return where the one is not in the other, which has the server's defaults beside it."""
    if isinstance(rendered, dict) and isinstance(found, dict):
        return [
            difference
            for key, value in rendered.items()
            if value not in (None, {}, [])  # the server leaves these out
            for difference in _differences(f"{where}.{key}", value, found.get(key))
        ]
    if isinstance(rendered, list) and isinstance(found, list) and len(rendered) == len(found):
        return [
            difference
            for number, pair in enumerate(zip(rendered, found, strict=True))
            for difference in _differences(f"{where}[{number}]", *pair)
        ]
    return [] if rendered == found else [(where, rendered, found)]
