"""Injectors that know no native sidecars, as policies that do to pods what they do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.chart.helm import HELMS, Object
from tests.cluster.access import RefusedError
from tests.cluster.stand_in import ENDLESS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster.space import Space

OUTSIDE: Final[dict[str, Any]] = {"podLabels": {"sidecar.istio.io/inject": "false"}}
ENDING: Final[dict[str, Any]] = {
    "migrations": OUTSIDE,
    "reconcile": {"cronJob": OUTSIDE},
    "probe": OUTSIDE,
    "tests": OUTSIDE,
}
"""As the chart's README has it."""

_PROXY: Final = f"""
[JSONPatch{{op: "add", path: "/spec/containers/-", value: Object.spec.containers{{
  name: "{ENDLESS}",
  image: object.spec.containers[0].image,
  command: ["sleep", "infinity"],
  securityContext: Object.spec.containers.securityContext{{
    allowPrivilegeEscalation: false,
    runAsNonRoot: true,
    capabilities: Object.spec.containers.securityContext.capabilities{{drop: ["ALL"]}},
    seccompProfile: Object.spec.containers.securityContext.seccompProfile{{type: "RuntimeDefault"}}
  }}
}}}}]
"""


@pytest.fixture
def mesh(space: Space, has_policies: None) -> Iterator[Space]:
    """A namespace where each pod gets a proxy that never ends, unless its label says no."""
    name = f"mesh.{space.name}.clerk-sync.test"
    kinds = "mutatingadmissionpolicies,mutatingadmissionpolicybindings"
    try:
        for one in _injector(name, space.name):
            space.cluster.create(one)
        _wait_until_it_injects(space)
        yield space
    finally:
        space.cluster.kubectl("delete", kinds, name, "--ignore-not-found")


def _injector(name: str, namespace: str) -> list[Object]:
    head = {"apiVersion": "admissionregistration.k8s.io/v1", "metadata": {"name": name}}
    namespaced = {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
    rule = {
        "apiGroups": [""],
        "apiVersions": ["v1"],
        "operations": ["CREATE"],
        "resources": ["pods"],
    }
    out = {"key": "sidecar.istio.io/inject", "operator": "NotIn", "values": ["false"]}
    policy = {
        "failurePolicy": "Fail",
        "reinvocationPolicy": "Never",
        "matchConstraints": {
            "namespaceSelector": namespaced,
            "objectSelector": {"matchExpressions": [out]},
            "resourceRules": [rule],
        },
        "mutations": [{"patchType": "JSONPatch", "jsonPatch": {"expression": _PROXY}}],
    }
    return [
        {**head, "kind": "MutatingAdmissionPolicy", "spec": policy},
        {**head, "kind": "MutatingAdmissionPolicyBinding", "spec": {"policyName": name}},
    ]


def _wait_until_it_injects(space: Space) -> None:
    container = {
        "name": "app",
        "image": "example.com/app",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "tried", "namespace": space.name},
        "spec": {"containers": [container]},
    }

    def injected() -> bool:
        admitted = space.cluster.create(pod, "--dry-run=server")
        return len(admitted["spec"]["containers"]) > 1

    space.cluster.until("the policy is at work", injected)


@pytest.mark.parametrize("by", HELMS)
@pytest.mark.parametrize("mode", ["standalone", "sidecar"])
def test_what_has_to_end_ends_in_a_mesh(mesh: Space, mode: str, by: str) -> None:
    mesh.secrets()
    mesh.helm("install", {**ENDING, "mode": mode}, "--wait", by=by)
    where = f"-n={mesh.name}", f"--timeout={mesh.patience}"
    assert "Succeeded" in mesh.cluster.helm("test", "events", *where, by=by)
    for pod in mesh.pods("app.kubernetes.io/component=webhook"):
        assert ENDLESS in {one["name"] for one in pod["spec"]["containers"]}, "it stays in the mesh"


def test_a_test_pod_in_a_mesh_never_ends(mesh: Space) -> None:
    """So it is the label that makes the difference."""
    mesh.secrets()
    less = {name: value for name, value in ENDING.items() if name != "tests"}
    mesh.install(less, "--wait")
    with pytest.raises(RefusedError, match=r"timed out|context deadline exceeded"):
        mesh.cluster.helm("test", "events", f"-n={mesh.name}", "--timeout=8s")
