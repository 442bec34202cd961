"""Make sure that there is all that tests run on: `python -m tools.provision`, before pytest.

What is found is used. A database that is missing comes from Docker, or, for root on Debian or
Ubuntu, from Debian's own packages: in a tree of its own for each flavour, because MySQL and MariaDB
cannot be installed side by side, and because tests have no business starting services on a machine.
Helm and the schemas of custom resources come from npm, by a lock file; Prometheus from Debian.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tools import programs, servers
from tools.servers import CACHE, NAMES, UnavailableError, docker

if TYPE_CHECKING:
    from collections.abc import Iterator

# The releases of Debian that have MySQL 9 and MariaDB 10.11.
_SUITES: Final = {"mysql": "sid", "mariadb": "bookworm"}

# Which layer brings which program. A layer is an archive of Linux programs for x86-64.
_LAYERS: Final = {"helm4": ("v35", "helm"), "helm3": ("v32", "helm"), "kubectl": ("v35", "kubectl")}
_LAYERS_RUN_HERE: Final = (platform.system(), platform.machine()) == ("Linux", "x86_64")


def main() -> int:
    try:
        if not os.environ.get("TEST_DATABASE_URL"):
            provide(servers.wanted())
        found = {source.flavour: source for source in servers.available()}
        provide_tools()
        paths = {name: programs.need(name) for name in programs.TOOLS}
        paths["modules"] = programs.modules()
    except UnavailableError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 1
    for flavour, name in NAMES.items():
        used = f"tests run on {found[flavour]}" if flavour in found else "NOT COVERED by this run"
        print(f"{name + ':':9}{used}")
    for name, path in paths.items():
        print(f"{name + ':':12}{path}")
    return 0


def provide(flavours: tuple[str, ...]) -> None:
    """Get what is missing as far as it can be had; say why where it cannot."""
    with _alone():
        missing = [one for one in flavours if not _have(one)]
        missing = [one for one in missing if not servers.has_to_be_an_image(one)]
        if not missing or os.geteuid() or not shutil.which("apt-get"):
            return
        names = " and ".join(NAMES[flavour] for flavour in missing)
        print(f"Installing {names} into {CACHE}: this takes a minute or two, once.", flush=True)
        try:
            if not shutil.which("debootstrap", path=servers.SEARCH_PATH):
                _run("apt-get", "update", "-qq")
                tools = "debootstrap", "debian-archive-keyring"
                _run("apt-get", "install", "-qq", "--no-install-recommends", *tools)
            with ThreadPoolExecutor() as threads:
                list(threads.map(_install, missing))
        except RuntimeError as error:
            print(error, file=sys.stderr)


def provide_tools() -> None:
    """Get the programs and modules that are missing, as far as they can be had."""
    with _alone():
        try:
            if not programs.MODULES.is_dir() and shutil.which("npm"):
                print(f"Installing Helm and schemas of custom resources into {CACHE}.", flush=True)
                _install_modules()
            if not (programs.find("prometheus") and programs.find("promtool")) and shutil.which(
                "apt-get"
            ):
                print(f"Installing Prometheus into {CACHE}.", flush=True)
                _install_prometheus()
        except RuntimeError as error:
            print(error, file=sys.stderr)
    programs.find.cache_clear()


def _install_modules() -> None:
    """Install what the lock file names, and take the programs out of their layers."""
    partial = CACHE / f"{programs.MODULES.name}.partial"
    _remove(partial)
    try:
        shutil.copytree(programs.NPM, partial)
        _run("npm", "ci", "--silent", "--prefix", str(partial))
        layers = partial / "node_modules/@aws-cdk"
        for name, (layer, program) in _LAYERS.items() if _LAYERS_RUN_HERE else ():
            with zipfile.ZipFile(layers / f"lambda-layer-kubectl-{layer}/lib/layer.zip") as archive:
                partial.joinpath(name).write_bytes(archive.read(f"{program}/{program}"))
            partial.joinpath(name).chmod(0o755)
        _remove(layers)
        partial.rename(programs.MODULES)
    finally:
        _remove(partial)


def _install_prometheus() -> None:
    """Unpack Debian's package: installed as usual, it would start a service."""
    partial = CACHE / "prometheus.partial"
    _remove(partial)
    partial.mkdir()
    try:
        try:
            _run("apt-get", "download", "-qq", "prometheus", folder=partial)
        except RuntimeError:
            _run("apt-get", "update", "-qq")
            _run("apt-get", "download", "-qq", "prometheus", folder=partial)
        (package,) = partial.glob("*.deb")
        _run("dpkg", "-x", str(package), str(partial))
        package.unlink()
        partial.rename(programs.PROMETHEUS)
    finally:
        _remove(partial)


def _have(flavour: str) -> bool:
    """Tell whether the flavour is here; with Docker, it soon is."""
    if servers.find(flavour) is None and servers.docker_runs():
        image = servers.image_of(flavour)
        print(f"Fetching {image}.", flush=True)
        try:
            docker("pull", "--quiet", image)
        except RuntimeError as error:
            print(error, file=sys.stderr)
    return servers.find(flavour) is not None


def _install(flavour: str) -> None:
    """Unpack a minimal Debian with the server in it, under its final name only when complete."""
    tree, partial = CACHE / flavour, CACHE / f"{flavour}.partial"
    _remove(partial)
    packages = f"--include={flavour}-server"
    try:
        _run("debootstrap", "--variant=minbase", packages, _SUITES[flavour], str(partial))
        for package in partial.glob("var/cache/apt/archives/*.deb"):
            package.unlink()
        partial.rename(tree)
    finally:
        _remove(partial)


def _remove(tree: os.PathLike[str]) -> None:
    # An interrupted debootstrap may have left the machine's own /proc mounted in there.
    _run("rm", "-rf", "--one-file-system", os.fspath(tree))


def _run(*command: str, folder: Path | None = None) -> None:
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "PATH": servers.SEARCH_PATH}
    done = subprocess.run(
        command,
        cwd=folder,
        env=quiet,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)} failed:\n{tail}")


@contextmanager
def _alone() -> Iterator[None]:
    """Hold a lock, so that two runs do not install into one folder."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with CACHE.joinpath("lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(main())
