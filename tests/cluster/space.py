"""A namespace of a test's own, with what an installation of the chart needs in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.chart.helm import CHART, LEAST, PARENT, merged
from tests.deliveries import SECRET

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.chart.helm import Object
    from tests.cluster.access import Cluster


@dataclass(frozen=True)
class Space:
    """A namespace that enforces `restricted`. The chart is release `events` in it."""

    name: str
    cluster: Cluster
    mysql_url: str
    image: Mapping[str, Any]
    """`image` of the chart's values."""
    patience: str
    """How long Helm may take."""

    def secret(self, name: str, **values: str) -> None:
        literals = [f"--from-literal={key}={value}" for key, value in values.items()]
        self.cluster.kubectl("create", "secret", "generic", name, *literals, f"-n={self.name}")

    def secrets(self) -> None:
        """Make those that `LEAST` names, with Clerk's key beside the signing secret."""
        self.secret("database", url=self.mysql_url)
        self.secret("clerk", **{"signing-secret": SECRET, "secret-key": "sk_test_A"})

    def ensure_secret(self, name: str, **values: str) -> None:
        """Make it, or change it."""
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}}
        apply = "apply", "--server-side", "--filename=-", f"-n={self.name}"
        self.cluster.kubectl(*apply, stdin=json.dumps({**secret, "stringData": values}))

    def ensure_account(self, name: str) -> None:
        """Make a service account, unless it is there: without it no pod is admitted."""
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}}
        apply = "apply", "--server-side", "--filename=-", f"-n={self.name}"
        self.cluster.kubectl(*apply, stdin=json.dumps(account))

    def values(self, values: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return these values with what an installation needs at least."""
        return merged(merged(LEAST, {"image": self.image}), values or {})

    def install(self, values: Mapping[str, Any] | None = None, *options: str) -> str:
        return self.helm("install", values, *options)

    def upgrade(self, values: Mapping[str, Any] | None = None, *options: str) -> str:
        return self.helm("upgrade", values, *options)

    def helm(
        self, verb: str, values: Mapping[str, Any] | None, *options: str, by: str = "helm4"
    ) -> str:
        where = verb, "events", str(CHART), f"--namespace={self.name}", f"--timeout={self.patience}"
        return self.cluster.helm(*where, *options, values=self.values(values), by=by)

    def install_parent(self, values: Mapping[str, Any]) -> str:
        """Install an app's chart that includes the sidecar, as release `shop`."""
        where = "shop", str(PARENT), f"--namespace={self.name}", f"--timeout={self.patience}"
        ours = {"clerk-sync": self.values(values)}
        return self.cluster.helm("install", *where, "--wait", values=ours)

    def uninstall(self, release: str) -> None:
        where = release, f"--namespace={self.name}", "--wait", f"--timeout={self.patience}"
        self.cluster.helm("uninstall", *where)

    def get(self, kind: str, name: str) -> Object:
        return self.cluster.get(kind, name, self.name)

    def find(self, kind: str, selector: str = "") -> list[Object]:
        return self.cluster.find(kind, self.name, selector)

    def pods(self, selector: str = "") -> list[Object]:
        """Return the pods that are there to stay."""
        found = self.find("pods", selector)
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def behind(self, service: str) -> tuple[dict[int, int], set[str]]:
        """Return which port of a Service leads to which of its pods' ports, and those pods."""
        spec = self.get("service", service)["spec"]
        selector = ",".join(f"{name}={value}" for name, value in spec["selector"].items())
        pods = self.pods(selector)
        named = {
            port["name"]: port["containerPort"]
            for pod in pods
            for container in pod["spec"]["containers"] + pod["spec"].get("initContainers", [])
            for port in container.get("ports", [])
        }
        targets = {one["port"]: one["targetPort"] for one in spec["ports"]}
        ports = {port: named.get(target, target) for port, target in targets.items()}
        return ports, {pod["metadata"]["name"] for pod in pods}
