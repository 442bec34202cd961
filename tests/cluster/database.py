"""A MySQL in the cluster, where there are nodes to run it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tests.chart.helm import Object
    from tests.cluster.access import Cluster

_IMAGE: Final = os.environ.get("TEST_MYSQL_IMAGE") or "mysql:8.4"
_PASSWORD: Final = "word"  # of a database that lives for minutes, with nothing in it
_DATABASE: Final = "shop"
_USER: Final = 999  # as in the image


def start(cluster: Cluster, namespace: str) -> str:
    """Start MySQL in the namespace, wait until it answers, and return its URL."""
    cluster.create(_service(), f"-n={namespace}")
    cluster.create(_deployment(), f"-n={namespace}")
    where = "deployment/mysql", f"-n={namespace}", "--timeout=170s"
    cluster.kubectl("rollout", "status", *where)
    return f"mysql://root:{_PASSWORD}@mysql.{namespace}.svc:3306/{_DATABASE}?tls=disable"


def query(cluster: Cluster, namespace: str, sql: str) -> list[list[str]]:
    """Return the rows of a query, each value as text."""
    client = "mysql", "-uroot", f"-p{_PASSWORD}", "--batch", "--skip-column-names", _DATABASE
    inside = "exec", "deployment/mysql", f"-n={namespace}", "--", *client, f"--execute={sql}"
    return [line.split("\t") for line in cluster.kubectl(*inside).splitlines()]


def _service() -> Object:
    spec = {"selector": {"app": "mysql"}, "ports": [{"port": 3306}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "mysql"}, "spec": spec}


def _deployment() -> Object:
    answers = ["mysqladmin", "ping", "-h127.0.0.1", "-uroot", f"-p{_PASSWORD}"]
    container: dict[str, Any] = {
        "name": "mysql",
        "image": _IMAGE,
        "env": [
            {"name": "MYSQL_ROOT_PASSWORD", "value": _PASSWORD},
            {"name": "MYSQL_DATABASE", "value": _DATABASE},
        ],
        "readinessProbe": {"exec": {"command": answers}, "periodSeconds": 2, "timeoutSeconds": 2},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": [
            {"name": "data", "mountPath": "/var/lib/mysql"},
            {"name": "run", "mountPath": "/var/run/mysqld"},
        ],
    }
    pod = {
        "securityContext": {"fsGroup": _USER},
        "containers": [container],
        "volumes": [{"name": name, "emptyDir": {}} for name in ("data", "run")],
    }
    labels = {"app": "mysql"}
    template = {"metadata": {"labels": labels}, "spec": pod}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "mysql"},
        "spec": {"selector": {"matchLabels": labels}, "template": template},
    }
