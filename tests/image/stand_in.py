"""What the image is built on where its real base cannot be pulled: Debian, with Debian's Python.

It has what the build and the run rely on: `/usr/local/bin/python3` of the same minor version, no
bytecode in the standard library, `venv`, CA certificates. What is not the same: the patch version
of Python, where its library is, and its size.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.image.engine import ROOT, system
from tools.servers import SEARCH_PATH, UnavailableError

if TYPE_CHECKING:
    from tests.image.engine import Engine

NAME: Final = "localhost/clerk-sync-base:trixie"
_PACKAGES: Final = "ca-certificates,netbase,python3,python3-venv,tzdata"
_CERTIFICATES: Final = "etc/ssl/certs/ca-certificates.crt"


def base() -> str:
    """Return the base that the Dockerfile names."""
    found = re.search(r"^ARG BASE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert found
    return found[1]


def usable_base(engine: Engine) -> str:
    """Return the real base, or a stand-in made here."""
    if engine.pull(base()):
        return base()
    if os.geteuid() or not shutil.which("apt-get"):
        raise UnavailableError(f"{base()} cannot be pulled: is there a way to its registry?")
    if not engine.has(NAME):
        _make(engine)
    return NAME


def _make(engine: Engine) -> None:
    if not shutil.which("debootstrap", path=SEARCH_PATH):
        system("apt-get", "update", "-qq")
        system("apt-get", "install", "-qq", "--no-install-recommends", "debootstrap")
    print(f"Making {NAME}: this takes two minutes, once.", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="clerk-sync-base-"))
    tree, archive = folder / "tree", folder / "base.tar"
    try:
        system("debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "trixie", str(tree))
        (tree / "usr/local/bin/python3").symlink_to("/usr/bin/python3")
        for bytecode in tree.glob("usr/lib/python3*/**/*.pyc"):
            bytecode.unlink()
        # This machine may trust more than Debian does, such as a company's proxy.
        shutil.copy(Path("/", _CERTIFICATES), tree / _CERTIFICATES)
        left_out = [f"--exclude=./{path}/*" for path in ("var/cache/apt", "var/lib/apt/lists")]
        system("tar", "-C", str(tree), *left_out, "-cf", str(archive), ".")
        engine("import", str(archive), NAME, timeout=300)
    finally:
        system("rm", "-rf", "--one-file-system", str(folder))  # it may have /proc mounted
