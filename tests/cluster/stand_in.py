"""What stands in for the nodes, on a cluster that has none.

Pods would wait for ever there: no Deployment would become available, and no hook of Helm's would
end. So this reports, through the pods' status alone as a kubelet does, that each pod of the tests'
namespaces runs and is ready, or, if it is one that ends, that it has ended. No container runs
anywhere: what depends on one is asserted only where there are nodes.
"""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime
from threading import Thread
from typing import TYPE_CHECKING, Any, Final, Self

from tests.cluster.access import RefusedError
from tools import programs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.chart.helm import Object
    from tests.cluster.access import Cluster

ENDLESS: Final = "proxy"
"""The name of a container that never ends, and so keeps its pod from ending."""


class StandIn:
    """Watches pods, and reports on those whose namespace is in `namespaces`."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.namespaces: set[str] = set()
        self.jobs_fail = False
        self._watch: subprocess.Popen[str] | None = None
        self._thread = Thread(target=self._work, daemon=True)

    def __enter__(self) -> Self:
        self._watch = subprocess.Popen(
            [
                programs.need("kubectl"),
                f"--kubeconfig={self._cluster.kubeconfig}",
                "get",
                "pods",
                "--all-namespaces",
                "--watch",
                "--output=json",
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._watch:
            with self._watch:  # which closes its output, when the thread has read all of it
                self._watch.terminate()
                self._thread.join()

    def _work(self) -> None:
        for pod in self._pods():
            metadata = pod["metadata"]
            if (
                metadata["namespace"] in self.namespaces
                and pod["status"].get("phase", "Pending") == "Pending"
                and "deletionTimestamp" not in metadata
            ):
                self._report(pod)

    def _pods(self) -> Iterator[Object]:
        """Read the objects that the watch prints, one after the other."""
        decoder = json.JSONDecoder()
        text = ""
        for line in self._watch.stdout if self._watch and self._watch.stdout else ():
            text += line
            if line == "}\n":
                pod, _ = decoder.raw_decode(text)
                text = ""
                yield pod

    def _report(self, pod: Object) -> None:
        names = {container["name"] for container in pod["spec"]["containers"]}
        ends = pod["spec"]["restartPolicy"] != "Always" and ENDLESS not in names
        status = _ended(pod, failed=self.jobs_fail) if ends else _ready(pod)
        name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
        where = [name, f"--namespace={namespace}", "--subresource=status", "--type=merge"]
        try:
            self._cluster.kubectl("patch", "pod", *where, f"--patch={json.dumps(status)}")
        except RefusedError as refusal:
            if "not found" not in str(refusal):  # deleted since: nothing to report on
                raise


def _ready(pod: Object) -> Object:
    return _status(pod, "Running", {"running": {"startedAt": _now()}}, ready=True)


def _ended(pod: Object, *, failed: bool) -> Object:
    end = {"exitCode": int(failed), "reason": "Error" if failed else "Completed"}
    times = {"startedAt": _now(), "finishedAt": _now()}
    phase = "Failed" if failed else "Succeeded"
    return _status(pod, phase, {"terminated": {**end, **times}}, ready=False)


def _status(pod: Object, phase: str, state: Object, *, ready: bool) -> Object:
    def of(container: Object) -> Object:
        about: dict[str, Any] = {"name": container["name"], "image": container["image"]}
        return {**about, "imageID": "", "restartCount": 0, "ready": ready, "state": state}

    met = {"status": "True" if ready else "False", "lastTransitionTime": _now()}
    kinds = "PodScheduled", "Initialized", "ContainersReady", "Ready"
    status = {
        "phase": phase,
        "startTime": _now(),
        "conditions": [{"type": kind, **met} for kind in kinds],
        "containerStatuses": [of(one) for one in pod["spec"]["containers"]],
    }
    return {"status": status}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
