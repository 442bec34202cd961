"""Prometheus and its promtool, from the PATH or from what `python -m tests.provision` made."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

from tests.servers import CACHE

PROVISIONED: Final = CACHE / "tools" / "prometheus" / "usr" / "bin"


def program(name: str) -> Path:
    """Find `prometheus` or `promtool`; say how to get it where it is missing."""
    found = shutil.which(name) or shutil.which(name, path=str(PROVISIONED))
    if found is None:
        raise AssertionError(
            f"There is no {name}: install Prometheus so that it is on the PATH, or, on Debian or"
            " Ubuntu, run `make test`, which unpacks it for the tests alone."
        )
    return Path(found)


def promtool(*arguments: str | Path) -> str:
    """Run promtool; what it says, which is about a failure if it fails."""
    done = subprocess.run(
        [program("promtool"), *arguments], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
