"""The sidecar that the cluster adds: the policy's CEL is the server's own to check and to run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.chart.helm import FULLNAME, merged
from tests.cluster.access import RefusedError
from tests.cluster.test_sidecar import VALUES, token_volumes

if TYPE_CHECKING:
    from tests.chart.helm import Object
    from tests.cluster.space import Space

LABEL: Final = {"clerk-sync.dev/sidecar": FULLNAME}
INJECTING: Final = merged(VALUES, {"sidecar": {"injection": {"enabled": True}}})
_RESTRICTED: Final[dict[str, Any]] = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "seccompProfile": {"type": "RuntimeDefault"},
}
_IMAGE: Final = "registry.k8s.io/pause:3.10"


def _container(name: str, **more: Any) -> Object:
    return {"name": name, "image": _IMAGE, "securityContext": _RESTRICTED, **more}


def _pod(labels: dict[str, str], name: str = "app", **more: Any) -> Object:
    spec = {"containers": [_container(name)], **more}
    metadata = {"generateName": "app-", "labels": {"app": "shop", **labels}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def deployment(labels: dict[str, str]) -> Object:
    """Return the Deployment of an app that knows nothing of clerk-sync but a label."""
    pod = _pod(labels)
    template = {"metadata": {"labels": pod["metadata"]["labels"]}, "spec": pod["spec"]}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "shop"},
        "spec": {"selector": {"matchLabels": {"app": "shop"}}, "template": template},
    }


@pytest.fixture
def injecting(space: Space, has_policies: None) -> Space:
    """A namespace where the policy is at work: that takes the server a few seconds."""
    space.secrets()
    space.install(INJECTING, "--wait")
    space.cluster.until("the policy is at work", lambda: is_injected(space))
    return space


def is_injected(space: Space) -> bool:
    return "initContainers" in _admit(space)


def _admit(space: Space, pod: Object | None = None) -> Object:
    """Have a pod admitted, without keeping it, and return its spec."""
    pod = pod or _pod(LABEL)
    options = f"-n={space.name}", "--dry-run=server"
    spec: Object = space.cluster.create(pod, *options)["spec"]
    return spec


def _names(things: list[Object]) -> list[str]:
    return [one["name"] for one in things]


def test_a_labelled_pod_has_it_once(injecting: Space) -> None:
    spec = _admit(injecting)
    (sidecar,) = spec["initContainers"]
    assert sidecar["name"] == "clerk-sync"
    assert sidecar["restartPolicy"] == "Always"
    mounted = {mount["name"] for mount in sidecar["volumeMounts"]}
    assert mounted <= set(_names(spec["volumes"]))
    assert _names(spec["containers"]) == ["app"]


def test_it_comes_before_the_pods_own_and_leaves_them_alone(injecting: Space) -> None:
    own: dict[str, Any] = {
        "initContainers": [_container("prepare")],
        "volumes": [{"name": "own", "emptyDir": {"sizeLimit": "1Mi"}}],
    }
    without, having = _admit(injecting, _pod({}, **own)), _admit(injecting, _pod(LABEL, **own))
    assert _names(having["initContainers"]) == ["clerk-sync", "prepare"]
    assert _names(having["volumes"])[0] == "own"
    assert having["initContainers"][1:] == _comparable(without["initContainers"], without, having)


def _comparable(containers: list[Object], old: Object, new: Object) -> list[Object]:
    """Return containers as they would be in the other pod, whose token has another name."""
    (was,) = [name for name in _names(old["volumes"]) if name.startswith("kube-api-access-")]
    (now,) = [name for name in _names(new["volumes"]) if name.startswith("kube-api-access-")]
    mounts = [
        [{**mount, "name": now if mount["name"] == was else mount["name"]} for mount in mounts]
        for mounts in (one.get("volumeMounts", []) for one in containers)
    ]
    return [{**one, "volumeMounts": own} for one, own in zip(containers, mounts, strict=True)]


def test_a_pod_that_has_one_keeps_it(injecting: Space) -> None:
    created = injecting.cluster.create(_pod(LABEL), f"-n={injecting.name}")
    copy = {**_pod(LABEL), "spec": created["spec"]}
    assert _names(_admit(injecting, copy)["initContainers"]) == ["clerk-sync"]
    assert _names(_admit(injecting, copy)["volumes"]) == _names(created["spec"]["volumes"])
    # A container of that name that is the app's own.
    assert "initContainers" not in _admit(injecting, _pod(LABEL, name="clerk-sync"))


def test_a_pod_whose_volume_has_the_name_is_refused(injecting: Space) -> None:
    """It would be without the container, and nobody would be told."""
    own = [{"name": "clerk-sync-secrets", "emptyDir": {"sizeLimit": "1Mi"}}]
    with pytest.raises(RefusedError, match='Duplicate value: "clerk-sync-secrets"'):
        _admit(injecting, _pod(LABEL, volumes=own))
    assert _admit(injecting, _pod({}, volumes=own))


def test_other_pods_are_not_touched(injecting: Space, shared_space: Space) -> None:
    assert "initContainers" not in _admit(injecting, _pod({}))
    assert "initContainers" not in _admit(injecting, _pod({"clerk-sync.dev/sidecar": "another"}))
    assert "initContainers" not in _admit(shared_space)


def test_a_deployments_pods_have_it_and_get_webhooks(injecting: Space) -> None:
    injecting.cluster.create(deployment(LABEL), f"-n={injecting.name}")
    where = "deployment/shop", f"-n={injecting.name}", f"--timeout={injecting.patience}"
    injecting.cluster.kubectl("rollout", "status", *where)

    (pod,) = injecting.pods("app=shop")
    assert _names(pod["spec"]["initContainers"]) == ["clerk-sync"]
    # What belongs to the template is the app's alone: an update of the app takes nothing away.
    kept = injecting.get("deployment", "shop")["spec"]["template"]["spec"]
    assert "initContainers" not in kept
    assert injecting.behind(FULLNAME) == ({80: 18080}, {pod["metadata"]["name"]})


def test_it_is_the_container_that_an_apps_chart_includes(injecting: Space) -> None:
    injecting.install_parent(merged(VALUES, {"fullnameOverride": "shop-sync"}))

    included = injecting.pods("clerk-sync.dev/sidecar=shop-sync")[0]["spec"]["initContainers"]
    assert _admit(injecting)["initContainers"] == included


def test_the_apps_token_is_not_the_sidecars(injecting: Space) -> None:
    spec = _admit(injecting)
    assert token_volumes(spec["containers"][0])
    assert not token_volumes(spec["initContainers"][0])


def test_an_upgrade_reaches_new_pods(injecting: Space) -> None:
    # No node has that image, which the migration would need.
    newer = {"image": {"tag": "9.9.9"}, "migrations": {"enabled": False}}
    injecting.upgrade(merged(INJECTING, newer))
    injecting.cluster.until(
        "new pods have the new image",
        lambda: _admit(injecting)["initContainers"][0]["image"].endswith(":9.9.9"),
    )


def test_an_uninstall_takes_the_policy_with_it(injecting: Space) -> None:
    injecting.uninstall("events")
    injecting.cluster.until(
        "pods are left alone", lambda: "initContainers" not in _admit(injecting)
    )


@pytest.mark.usefixtures("has_policies")
def test_what_the_server_would_refuse_in_every_pod_is_refused_as_values(space: Space) -> None:
    """`failurePolicy: Ignore` is no help there: a field that a pod does not have stops the app."""
    wrong = {"resources": {"limit": {"memory": "256Mi"}}}
    with pytest.raises(RefusedError, match="resources"):
        space.install(merged(INJECTING, wrong))
