"""Programs that the tests run besides databases: Helm, kubectl, Prometheus, Node.

A program comes, in this order, from the variable named here, the PATH, or the folder that
`python -m tools.provision` made.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from tools.servers import CACHE, UnavailableError

NPM: Final = Path(__file__).parent / "npm"
"""What comes from npm, by its lock file."""

MODULES: Final = (
    CACHE / f"npm-{hashlib.sha256((NPM / 'package-lock.json').read_bytes()).hexdigest()[:12]}"
)
"""Where it is: another lock file, another folder."""

PROMETHEUS: Final = CACHE / "prometheus"


@dataclass(frozen=True)
class Tool:
    """A program by its `variable`, its names on the PATH, or its place in the cache."""

    variable: str
    names: tuple[str, ...]
    asked: tuple[str, ...]
    """Arguments that make it tell its version."""
    version: str
    """What the version has to begin with, as a pattern."""
    unpacked: Path | None
    advice: str


TOOLS: Final = {
    "helm4": Tool(
        "HELM4",
        ("helm4", "helm"),
        ("version", "--template={{.Version}}"),
        r"v4\.",
        MODULES / "helm4",
        "install Helm 4 (macOS: brew install helm)",
    ),
    "helm3": Tool(
        "HELM3",
        ("helm3", "helm"),
        ("version", "--template={{.Version}}"),
        r"v3\.(1[4-9]|[2-9]\d)",
        MODULES / "helm3",
        "install Helm 3 beside Helm 4 (macOS: brew install helm@3), and name it",
    ),
    "kubectl": Tool(
        "KUBECTL",
        ("kubectl",),
        ("version", "--client"),
        r"Client Version: v1\.",
        MODULES / "kubectl",
        "install kubectl (macOS: brew install kubectl)",
    ),
    "node": Tool(
        "NODE",
        ("node", "nodejs"),
        ("--version",),
        r"v[2-9]\d\.",
        None,
        "install Node 20 or newer with npm (macOS: brew install node)",
    ),
    "prometheus": Tool(
        "PROMETHEUS",
        ("prometheus",),
        ("--version",),
        r"prometheus, version [2-9]\.",
        PROMETHEUS / "usr/bin/prometheus",
        "install Prometheus (macOS: brew install prometheus; Debian: apt-get install prometheus)",
    ),
    "promtool": Tool(
        "PROMTOOL",
        ("promtool",),
        ("--version",),
        r"promtool, version [2-9]\.",
        PROMETHEUS / "usr/bin/promtool",
        "install Prometheus, which brings it (macOS: brew install prometheus; Debian:"
        " apt-get install prometheus)",
    ),
}


@cache
def find(name: str) -> Path | None:
    """Return the program, if it is here and answers as the right version does."""
    tool = TOOLS[name]
    if named := os.environ.get(tool.variable):
        if not _answers(tool, Path(named)):
            raise UnavailableError(f"{tool.variable}: {named} is not the {name} that is needed")
        return Path(named)
    candidates = [Path(found) for one in tool.names if (found := shutil.which(one))]
    candidates += [tool.unpacked] if tool.unpacked and tool.unpacked.is_file() else []
    return next((path for path in candidates if _answers(tool, path)), None)


def need(name: str) -> Path:
    """Return the program; where there is none, say how to get it."""
    if found := find(name):
        return found
    tool = TOOLS[name]
    raise UnavailableError(
        f"There is no {name} to test with. One of these helps:\n"
        f"  - `make test`, or `.venv/bin/python -m tools.provision`: it gets Helm and kubectl by\n"
        f"    Node's npm (Linux, x86-64), and Prometheus on Debian and Ubuntu, all of it into\n"
        f"    {CACHE}\n"
        f"  - {tool.advice}\n"
        f"  - {tool.variable}=/path/to/{name}"
    )


def modules() -> Path:
    """Return the folder with npm's modules; where there is none, say how to get it."""
    if MODULES.is_dir():
        return MODULES
    raise UnavailableError(
        f"What {NPM} locks is not installed. With Node's npm on the PATH, `make test` or\n"
        f"`.venv/bin/python -m tools.provision` installs it in {MODULES}"
    )


def _answers(tool: Tool, path: Path) -> bool:
    try:
        said = subprocess.run(
            [path, *tool.asked], capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return re.match(tool.version, said.stdout or said.stderr) is not None
