"""The kinds that operators bring, so that the server judges objects of these kinds, too.

The definitions come from the operators' Go modules: as published, by version and checksum.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.servers import UnavailableError


@dataclass(frozen=True)
class Operator:
    """A Go module, and where in it the definitions are."""

    module: str
    checksum: str
    """As in a go.sum."""
    definitions: tuple[str, ...]


OPERATORS: Final = (
    Operator(
        "sigs.k8s.io/gateway-api@v1.6.3",
        "h1:lKpJa5bGlraC/QeACvCpsHLdmO6y0iKfzVl6gzaFEYc=",
        ("config/crd/standard/gateway.networking.k8s.io_httproutes.yaml",),
    ),
    Operator(
        "github.com/prometheus-operator/prometheus-operator@v0.85.0",
        "h1:M5xLCLEoaW2IJfnuCwFzzpL+jSVQu3KGT84Pye+fW8s=",
        (
            "example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml",
            "example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml",
            "example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml",
        ),
    ),
    Operator(
        "github.com/external-secrets/external-secrets@v1.3.2",
        "h1:u2J8RjlHIeF0oZCqtl92adI/uZWUwOesJIDkfql6LqQ=",
        ("config/crds/bases/external-secrets.io_externalsecrets.yaml",),
    ),
    Operator(
        "github.com/kedacore/keda/v2@v2.21.0",
        "h1:R6z2HZvstK4RLUMxroNACzBj74xGxt3kG59b5Xc+Xps=",
        ("config/crd/bases/keda.sh_scaledobjects.yaml",),
    ),
)


def files() -> list[Path]:
    """Return a file for each definition, `PLURAL.GROUP` being in its name as `GROUP_PLURAL`."""
    if not shutil.which("go"):
        raise UnavailableError(
            "The operators' definitions come from Go modules. Install Go: any version since 1.21"
        )
    return [
        folder / path
        for operator in OPERATORS
        for folder in [_download(operator)]
        for path in operator.definitions
    ]


def name_of(file: Path) -> str:
    """Return the name of the definition: `scaledobjects.keda.sh`."""
    group, _, plural = file.stem.partition("_")
    return f"{plural}.{group}"


def _download(operator: Operator) -> Path:
    with tempfile.TemporaryDirectory() as nowhere:  # outside of any module, which would have a say
        done = subprocess.run(
            ["go", "mod", "download", "-json", operator.module],
            cwd=nowhere,
            env={**os.environ, "GOFLAGS": "", "GOWORK": "off"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
    said = json.loads(done.stdout or "{}")
    if said.get("Error") or not said.get("Dir"):
        raise UnavailableError(f"{operator.module}: {said.get('Error') or done.stderr}")
    assert said["Sum"] == operator.checksum, f"{operator.module} is not what it was: {said['Sum']}"
    return Path(said["Dir"])
