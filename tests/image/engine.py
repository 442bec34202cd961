"""Docker or podman, to build images and to run them with as few rights as a cluster gives."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tools.servers import SEARCH_PATH, UnavailableError, docker_runs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT: Final = Path(__file__).parents[2]
NOBODY: Final = 65532

# Pod Security "restricted" with a read-only root file system, and not even a /tmp to write to.
_CONFINED: Final = (
    "--read-only",
    f"--user={NOBODY}:{NOBODY}",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
)
_HYBRID_CGROUPS: Final = Path("/sys/fs/cgroup/unified")


class FailedError(Exception):
    """A command of the engine, or of a container, that did not end well: with what it said."""


class Engine:
    """One of the two programs, by its name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._run_options = ["--pull=never", "--network=host"]
        self.build_options: list[str] = []
        self._confined = list(_CONFINED)
        if name == "podman":
            # It asks for more open files and processes than it may have where limits are strict.
            self._run_options += ["--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024"]
            self._confined += ["--read-only-tmpfs=false", "--passwd=false"]
            self.build_options = ["--isolation=chroot"]
            if _HYBRID_CGROUPS.is_dir():  # crun refuses them
                self._run_options.append("--runtime=runc")

    def __call__(self, *arguments: str, timeout: float = 120) -> str:
        """Run the engine's command; what it wrote to stdout."""
        done = subprocess.run(
            [self.name, *arguments], capture_output=True, text=True, check=False, timeout=timeout
        )
        if done.returncode:
            words = " ".join([self.name, *arguments[:2]])
            raise FailedError(f"{words}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def has(self, image: str) -> bool:
        try:
            self("image", "inspect", image)
        except FailedError:
            return False
        return True

    def pull(self, image: str) -> bool:
        """Tell whether the image could be had."""
        try:
            self("pull", "--quiet", image, timeout=600)
        except FailedError:
            return False
        return True

    def run(
        self,
        image: str,
        *command: str,
        environment: Mapping[str, str] | None = None,
        entrypoint: str | None = None,
        options: tuple[str, ...] = (),
        confined: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a container to its end; what it said on either stream, and its exit code."""
        arguments = [
            *(self._confined if confined else ()),
            *([f"--entrypoint={entrypoint}"] if entrypoint else ()),
            *options,
            *_set(environment),
            image,
            *command,
        ]
        return subprocess.run(
            [self.name, "run", "--rm", *self._run_options, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    @contextmanager
    def started(
        self,
        image: str,
        *command: str,
        environment: Mapping[str, str] | None = None,
        options: tuple[str, ...] = (),
    ) -> Iterator[Container]:
        """Run a container beside the test, and remove it after."""
        arguments = [*self._confined, *options, *_set(environment), image, *command]
        container = Container(self, self("run", "--detach", *self._run_options, *arguments))
        try:
            yield container
        finally:
            self("rm", "--force", container.id)


def _set(environment: Mapping[str, str] | None) -> list[str]:
    return [f"--env={name}={value}" for name, value in (environment or {}).items()]


class Container:
    """A container that runs beside the test."""

    def __init__(self, engine: Engine, id_: str) -> None:
        self._engine = engine
        self.id = id_

    def logs(self) -> str:
        done = subprocess.run(
            [self._engine.name, "logs", self.id], capture_output=True, text=True, check=True
        )
        return done.stdout + done.stderr

    def execute(self, *command: str) -> str:
        return self._engine("exec", self.id, *command)

    def terminate(self) -> None:
        """SIGTERM to PID 1, as a kubelet does it."""
        self._engine("kill", "--signal=TERM", self.id)

    def ended(self) -> int:
        """Wait for the end; the exit code."""
        return int(self._engine("wait", self.id, timeout=60))

    def written(self) -> list[str]:
        """What differs from the image, mount points left out."""
        changes = self._engine("diff", self.id).splitlines()
        return [line for line in changes if not re.match(r"[AC] /(dev|etc|proc|run|sys)\b", line)]


def system(*command: str) -> None:
    """Run a command of this machine."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "PATH": SEARCH_PATH}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    if done.returncode:
        raise FailedError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def engine() -> Engine:
    """Return the engine that is here; for root on Debian or Ubuntu, get one."""
    named = os.environ.get("ENGINE")
    if named:
        return Engine(named)
    if docker_runs():
        return Engine("docker")
    if not shutil.which("podman") and not os.geteuid() and shutil.which("apt-get"):
        system("apt-get", "update", "-qq")
        system("apt-get", "install", "-qq", "--no-install-recommends", "podman", "runc")
    if shutil.which("podman"):
        return Engine("podman")
    raise UnavailableError(
        "There is no container engine to build an image with. One of these helps:\n"
        "  - start Docker\n"
        "  - install podman (Debian, Ubuntu: apt-get install podman runc)"
    )
