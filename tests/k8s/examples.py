"""What users would write: an app of theirs, and kustomizations that take parts of `k8s/`."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING, Final

import yaml

from tests.k8s.generate import K8S
from tests.k8s.kustomize import published, write

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.chart.helm import Object

MARK: Final = {"clerk-sync.dev/sidecar": "clerk-sync"}
"""The label that asks for the sidecar."""

_MAPPING: Final = {
    "configMapGenerator": [{"name": "clerk-sync-mapping", "files": ["mapping.yaml"]}]
}


def app(name: str = "shop", kind: str = "Deployment", **labels: str) -> Object:
    """Return an app with an init container and a volume of its own."""

    def container(name: str) -> Object:
        restricted = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        mounts = [{"name": "own", "mountPath": "/own"}]
        image = "registry.example.com/shop:1"
        return {"name": name, "image": image, "volumeMounts": mounts, "securityContext": restricted}

    spec: Object = {
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "initContainers": [container("first")],
        "containers": [container("app")],
        "volumes": [{"name": "own", "emptyDir": {}}],
    }
    template = {"metadata": {"labels": {"app": name}}, "spec": spec}
    return {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "selector": {"matchLabels": {"app": name}},
            "template": template,
            **({"serviceName": name} if kind == "StatefulSet" else {}),
        },
    }


def beside(folder: Path, *names: str, apps: Sequence[Object] = (app(**MARK),)) -> Path:
    """Write an app with these components."""
    (folder / "deployment.yaml").write_text(yaml.safe_dump_all(apps), "utf-8")
    (folder / "mapping.yaml").write_text("tables: {}\n", "utf-8")
    parts = published(*(f"components/{name}" for name in names))
    more = _MAPPING if "mapping" in names else {}
    return write(folder, {"resources": ["deployment.yaml"], "components": parts, **more})


def alone(folder: Path, *names: str) -> Path:
    """Write the base with these components."""
    (folder / "mapping.yaml").write_text("tables: {}\n", "utf-8")
    parts = {
        "resources": published("base"),
        "components": published(*(f"components/{name}" for name in names)),
    }
    return write(folder, parts | (_MAPPING if "mapping" in names else {}))


def otherwise(folder: Path) -> Path:
    """Write the production overlay with what its comments offer, as its user would."""
    shutil.copytree(K8S, folder, dirs_exist_ok=True)
    overlay = folder / "overlays" / "production"
    text = (overlay / "kustomization.yaml").read_text("utf-8")
    text = text.replace("components/ingress #", "components/http-route #")
    offered = r"^( *)# (- \.\./.*|configMapGenerator:|  - name: .*|    files: .*)$"
    text, count = re.subn(offered, r"\1\2", text, flags=re.MULTILINE)
    assert count == 6
    (overlay / "kustomization.yaml").write_text(text, "utf-8")
    (overlay / "mapping.yaml").write_text("tables: {}\n", "utf-8")
    return overlay
