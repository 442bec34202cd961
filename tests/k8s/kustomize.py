"""Real Kustomize, as kubectl has it, over `k8s/` and what its README tells users to write."""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from typing import TYPE_CHECKING, Final

import yaml

from tests.chart.helm import CHART, Object, StrictLoader
from tests.k8s.generate import K8S
from tools import programs

if TYPE_CHECKING:
    from pathlib import Path

README: Final = K8S / "README.md"
VERSION: Final = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))["appVersion"]

_PUBLISHED: Final = "https://github.com/clerk-sync/clerk-sync//k8s/{}?ref=v" + VERSION
_PARTS: Final = ("resources", "components")


class KustomizeError(Exception):
    """Kustomize refused. Holds what it printed."""


@cache
def build(folder: Path) -> tuple[Object, ...]:
    """Return the objects of a kustomization. They are shared: do not change them."""
    done = subprocess.run(
        [programs.need("kubectl"), "kustomize", folder],
        # Since 1.34 it looks for preferences, and warns when it has no home for them.
        env={"PATH": os.environ.get("PATH", os.defpath), "HOME": os.devnull, "KUBERC": "off"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if done.returncode:
        raise KustomizeError(done.stderr)
    # Kustomize warns of fields that it is about to drop, and goes on.
    assert done.stderr == "", done.stderr
    return tuple(yaml.load_all(done.stdout, Loader=StrictLoader))


def published(*names: str) -> list[str]:
    """Return where users take these parts of `k8s/` from."""
    return [_PUBLISHED.format(name) for name in names]


def write(folder: Path, kustomization: Object) -> Path:
    """Write a kustomization, which takes published parts from this checkout, as if it were that."""
    here, end = (re.escape(one) for one in _PUBLISHED.split("{}"))
    local = {
        name: [
            re.sub(f"{here}(.+){end}$", rf"{os.path.relpath(K8S, folder)}/\1", one) for one in value
        ]
        if name in _PARTS
        else value
        for name, value in kustomization.items()
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(local), "utf-8")
    return folder


def example(name: str) -> Object:
    """Return the YAML of the README that is marked `<!-- file: NAME -->`."""
    marked = rf"<!-- file: {name} -->\n( *)```yaml\n(.*?)\n\1```"
    found = re.search(marked, README.read_text("utf-8"), re.DOTALL)
    assert found, f"{README} has no file marked `{name}`"
    read: Object = yaml.load(found[2], Loader=StrictLoader)
    return read


def commands() -> list[str]:
    """Return the commands of the README, in its order: each is one line."""
    text = README.read_text("utf-8")
    blocks = re.findall(r"^( *)```sh\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE)
    return [line.strip() for _, block in blocks for line in block.splitlines()]
