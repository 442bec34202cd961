"""The cluster of `$KUBECONFIG` as the tests speak to it: kubectl, and Helm of both ages."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tools import programs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from tests.chart.helm import Object

COMMAND_SECONDS: Final = 180
SETTLE_SECONDS: Final = 60


class RefusedError(Exception):
    """A command failed. Its text is what the command said."""


@dataclass(frozen=True)
class Cluster:
    """One cluster, and a folder for what its clients like to keep."""

    kubeconfig: str
    folder: Path

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return self._run([str(programs.need("kubectl")), *arguments], stdin).stdout

    def version(self) -> str:
        """Return the server's version as the chart may see it: `1.37.0`."""
        said = json.loads(self.kubectl("get", "--raw=/version"))
        # A vendor's build has a minor version such as `33+`.
        return f"{said['major']}.{said['minor'].rstrip('+')}.0"

    def get(self, kind: str, name: str, namespace: str = "") -> Object:
        found: Object = json.loads(self.kubectl("get", kind, name, "-o=json", *_in(namespace)))
        return found

    def find(self, kind: str, namespace: str = "", selector: str = "") -> list[Object]:
        """Return all objects of a kind, or of several (`kind,kind`), that the selector selects."""
        where = ["--selector", selector] if selector else []
        said = self.kubectl("get", kind, "-o=json", *_in(namespace), *where)
        found: list[Object] = json.loads(said)["items"]
        return found

    def create(self, thing: Object, *options: str) -> Object:
        """Create an object as strictly as the server can, and return it as it was admitted."""
        command = "create", "--filename=-", "-o=json", "--validate=strict", *options
        admitted: Object = json.loads(self.kubectl(*command, stdin=json.dumps(thing)))
        return admitted

    def warnings(self, things: Sequence[Object], namespace: str) -> str:
        """Have the server judge objects without keeping them, and return what it warns of."""
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": things})
        apply = "apply", "--server-side", "--dry-run=server", "--validate=strict", "--filename=-"
        said = self._run([str(programs.need("kubectl")), *apply, *_in(namespace)], text).stderr
        lines = (line for line in said.splitlines() if "version difference" not in line)
        return "\n".join(lines)

    def helm(
        self,
        verb: str,
        *arguments: str,
        values: Mapping[str, Any] | None = None,
        by: str = "helm4",
    ) -> str:
        more = ["--values=-"] if values is not None else []
        text = json.dumps(values) if values is not None else None
        return self._run([str(programs.need(by)), verb, *arguments, *more], text).stdout

    def until(self, what: str, told: Callable[[], Any], seconds: float = SETTLE_SECONDS) -> Any:
        """Ask until the answer is a true one, and return it."""
        deadline = time.monotonic() + seconds
        while not (answer := told()):
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
            time.sleep(0.3)
        return answer

    def _run(self, command: list[str], stdin: str | None) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            env={
                **os.environ,
                "KUBECONFIG": self.kubeconfig,
                # Repositories and plugins of whoever runs this stay out of it.
                "HELM_CACHE_HOME": str(self.folder / "cache"),
                "HELM_CONFIG_HOME": str(self.folder / "config"),
                "HELM_DATA_HOME": str(self.folder / "data"),
            },
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_SECONDS,
        )
        if done.returncode:
            raise RefusedError(f"{' '.join(command[1:])}\n{done.stderr}{done.stdout}")
        return done


def _in(namespace: str) -> list[str]:
    return ["--namespace", namespace] if namespace else []
