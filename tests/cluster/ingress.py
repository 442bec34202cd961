"""An Ingress controller in the cluster, for a class of its own, where there are nodes to run it."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.chart.helm import Object
    from tests.cluster.access import Cluster

_IMAGE: Final = os.environ.get("TEST_TRAEFIK_IMAGE") or "traefik:v3.6"
_PORT: Final = 8000
_READ: Final = ["get", "list", "watch"]
# What Traefik asks for, so that it reads nothing but its own kind of routes:
# https://doc.traefik.io/traefik/reference/install-configuration/providers/kubernetes/kubernetes-ingress/
_RULES: Final = [
    {"apiGroups": [""], "resources": ["services", "nodes"], "verbs": _READ},
    {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": _READ},
    {
        "apiGroups": ["networking.k8s.io"],
        "resources": ["ingresses", "ingressclasses"],
        "verbs": _READ,
    },
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
    rbac = "rbac.authorization.k8s.io"
    inside = {"namespace": namespace, "name": "traefik"}
    labels = {"app": "traefik"}
    account = {"kind": "ServiceAccount", **inside}
    role = {"apiGroup": rbac, "kind": "ClusterRole", "name": name}
    ports = [{"port": 80, "targetPort": _PORT}]
    return [
        _thing("v1", "ServiceAccount", inside),
        _thing(f"{rbac}/v1", "ClusterRole", {"name": name}, rules=_RULES),
        _thing(
            f"{rbac}/v1", "ClusterRoleBinding", {"name": name}, roleRef=role, subjects=[account]
        ),
        _thing(
            "networking.k8s.io/v1",
            "IngressClass",
            {"name": name},
            spec={"controller": "traefik.io/ingress-controller"},
        ),
        _thing("v1", "Service", inside, spec={"selector": labels, "ports": ports}),
        _thing(
            "apps/v1",
            "Deployment",
            inside,
            spec={
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": _pod(name)},
            },
        ),
    ]


def _thing(version: str, kind: str, metadata: Object, **more: Any) -> Object:
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **more}


def _pod(ingress_class: str) -> Object:
    container: dict[str, Any] = {
        "name": "traefik",
        "image": _IMAGE,
        "args": [
            f"--entrypoints.web.address=:{_PORT}",
            "--providers.kubernetesingress",
            f"--providers.kubernetesingress.ingressclass={ingress_class}",
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
