"""The sidecar that an app's chart includes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tests.cluster.space import Space

VALUES: Final[dict[str, Any]] = {
    "mode": "sidecar",
    "clerk": {"secretKey": {"existingSecret": "clerk"}},
}


def test_an_apps_chart_has_it_in_its_pods(space: Space) -> None:
    space.secrets()
    space.install_parent(VALUES)

    pods = space.pods("app=shop")
    assert len(pods) == 2
    for pod in pods:
        (sidecar,) = pod["spec"]["initContainers"]
        assert sidecar["name"] == "clerk-sync"
        assert sidecar["restartPolicy"] == "Always"
        assert "readinessProbe" not in sidecar
    names = {pod["metadata"]["name"] for pod in pods}
    # By number: a Service finds names of ports in sidecars only since Kubernetes 1.32.
    assert target_ports(space, "shop-clerk-sync") == [18080]
    assert target_ports(space, "shop-clerk-sync-internal") == [18081]
    assert space.behind("shop-clerk-sync") == ({80: 18080}, names)
    assert [one["metadata"]["name"] for one in space.find("deployments")] == ["shop"]


def test_the_apps_token_is_not_the_sidecars(space: Space) -> None:
    space.secrets()
    space.install_parent(VALUES)
    mounting = {"spec": {"template": {"spec": {"automountServiceAccountToken": True}}}}
    patch = f"--patch={json.dumps(mounting)}", f"--namespace={space.name}"
    space.cluster.kubectl("patch", "deployment", "shop", *patch)
    where = f"--timeout={space.patience}", f"--namespace={space.name}"
    space.cluster.kubectl("rollout", "status", "deployment/shop", *where)

    for pod in space.pods("app=shop"):
        assert token_volumes(pod["spec"]["containers"][0])
        assert not token_volumes(pod["spec"]["initContainers"][0])


def token_volumes(container: Any) -> list[str]:
    """Return the volumes with a service account's token that the container mounts."""
    mounted = [mount["name"] for mount in container.get("volumeMounts", ())]
    return [name for name in mounted if name.startswith("kube-api-access-")]


def target_ports(space: Space, service: str) -> list[int | str]:
    return [port["targetPort"] for port in space.get("service", service)["spec"]["ports"]]
