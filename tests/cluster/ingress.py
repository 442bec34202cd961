"""An Ingress controller in the cluster, for a class of its own, where there are nodes to run it."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.chart.helm import Object
    from tests.cluster.access import Cluster

_IMAGE: Final = os.environ.get("TEST_TRAEFIK_IMAGE") or "traefik:v3.7"
_PORT: Final = 8000
_READ: Final = ["get", "list", "watch"]
# What it asks for, which is less than its manual says when it looks at one namespace only.
_EVERYWHERE: Final = [
    {"apiGroups": [""], "resources": ["nodes"], "verbs": _READ},
    {"apiGroups": ["networking.k8s.io"], "resources": ["ingressclasses"], "verbs": _READ},
]
_HERE: Final = [
    {"apiGroups": [""], "resources": ["services", "secrets"], "verbs": _READ},
    {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": _READ},
    {"apiGroups": ["networking.k8s.io"], "resources": ["ingresses"], "verbs": _READ},
    {"apiGroups": ["networking.k8s.io"], "resources": ["ingresses/status"], "verbs": ["update"]},
]


@contextmanager
def running(cluster: Cluster, namespace: str) -> Iterator[str]:
    """Run Traefik in the namespace; yield the name of its class, which its Service has, too."""
    name = namespace  # what belongs to no namespace needs a name of its own
    with ExitStack() as cleaning:
        for thing in _things(name, namespace):
            metadata = thing["metadata"]
            if "namespace" not in metadata:
                delete = "delete", thing["kind"], metadata["name"]
                cleaning.callback(cluster.kubectl, *delete)
            cluster.create(thing)
        where = "deployment/traefik", f"-n={namespace}", "--timeout=170s"
        cluster.kubectl("rollout", "status", *where)
        yield name


def _things(name: str, namespace: str) -> list[Object]:
    inside = {"namespace": namespace, "name": "traefik"}
    labels = {"app": "traefik"}
    service = {"selector": labels, "ports": [{"port": 80, "targetPort": _PORT}]}
    template = {"metadata": {"labels": labels}, "spec": _pod(name, namespace)}
    deployment = {"selector": {"matchLabels": labels}, "template": template}
    controller = {"controller": "traefik.io/ingress-controller"}
    return [
        _thing("v1", "ServiceAccount", inside),
        *_rights("ClusterRole", {"name": name}, _EVERYWHERE, inside),
        *_rights("Role", inside, _HERE, inside),
        _thing("networking.k8s.io/v1", "IngressClass", {"name": name}, spec=controller),
        _thing("v1", "Service", inside, spec=service),
        _thing("apps/v1", "Deployment", inside, spec=deployment),
    ]


def _rights(kind: str, metadata: Object, rules: list[Any], account: Object) -> list[Object]:
    """Return a role, and what gives it to the account."""
    group = "rbac.authorization.k8s.io"
    role = {"apiGroup": group, "kind": kind, "name": metadata["name"]}
    subjects = [{"kind": "ServiceAccount", **account}]
    return [
        _thing(f"{group}/v1", kind, metadata, rules=rules),
        _thing(f"{group}/v1", f"{kind}Binding", metadata, roleRef=role, subjects=subjects),
    ]


def _thing(version: str, kind: str, metadata: Object, **more: Any) -> Object:
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **more}


def _pod(ingress_class: str, namespace: str) -> Object:
    container: dict[str, Any] = {
        "name": "traefik",
        "image": _IMAGE,
        "args": [
            f"--entrypoints.web.address=:{_PORT}",
            "--providers.kubernetesingress",
            f"--providers.kubernetesingress.ingressclass={ingress_class}",
            f"--providers.kubernetesingress.namespaces={namespace}",
            "--ping",
            "--ping.entrypoint=web",
            "--global.checknewversion=false",
            "--global.sendanonymoususage=false",
        ],
        "readinessProbe": {"httpGet": {"path": "/ping", "port": _PORT}, "periodSeconds": 1},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    return {"serviceAccountName": "traefik", "containers": [container]}
