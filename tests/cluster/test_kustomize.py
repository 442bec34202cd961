"""`k8s/` on a server, by the commands of its README, as its readers would type them."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pytest
import yaml

from tests.chart.helm import ROOT
from tests.deliveries import SECRET
from tests.k8s.examples import MARK, app
from tests.k8s.kustomize import commands, example, write
from tools import programs

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cluster.space import Space

IMAGE: Final = "ghcr.io/clerk-sync/clerk-sync"
CLERK: Final = f"signing-secret={SECRET}\nsecret-key=sk_test_A\n"
PAUSE: Final = "registry.k8s.io/pause:3.10"
SERVING: Final = "app.kubernetes.io/name=clerk-sync,app.kubernetes.io/component=webhook"
MIGRATED: Final = "wait --for=condition=complete --timeout=5m job/clerk-sync-migrate"


@dataclass(frozen=True)
class Reader:
    """Somebody with the README and a copy of `k8s/`, who has one namespace for everything."""

    space: Space
    folder: Path

    def types(self, command: str, *, code: int | None = 0) -> str:
        """Run one of the README's commands in the test's namespace, and return what it said.

        Its exit code has to be that one. With None, any will do.
        """
        assert command in commands(), f"the README has no `{command}`"
        for name in ("clerk-sync-development", "clerk-sync", "shop"):
            command = command.replace(f"-n {name} ", f"-n {self.space.name} ")
            command = command.replace(f"/namespaces/{name}/", f"/namespaces/{self.space.name}/")
        kubectl = str(programs.need("kubectl").resolve())
        done = subprocess.run(
            ["sh", "-c", f'kubectl() {{ "{kubectl}" "$@"; }}\n{command}'],
            cwd=self.folder,
            env={**os.environ, "KUBECONFIG": self.space.cluster.kubeconfig},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=330,
        )
        assert code in (None, done.returncode), f"{command}\n{done.stdout}"
        return done.stdout

    def changes(self, file: str, **entries: Any) -> None:
        """Set entries of a kustomization, with the namespace, and the image where there is one."""
        path = self.folder / file / "kustomization.yaml"
        kustomization = yaml.safe_load(path.read_text("utf-8")) | {"namespace": self.space.name}
        if self.space.image:
            repository, tag = self.space.image["repository"], self.space.image["tag"]
            kustomization["images"] = [{"name": IMAGE, "newName": repository, "newTag": tag}]
        path.write_text(yaml.safe_dump(kustomization | entries), "utf-8")

    def writes(self, file: str, text: str) -> None:
        (self.folder / file).write_text(text, "utf-8")


@pytest.fixture
def reader(space: Space, tmp_path: Path) -> Reader:
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    return Reader(space, tmp_path)


def test_in_five_minutes(reader: Reader, nodes: list[str]) -> None:
    reader.changes("k8s/overlays/development")
    said = reader.types("kubectl apply -k k8s/overlays/development")
    assert "would violate" not in said
    reader.types(f"kubectl -n clerk-sync-development {MIGRATED}")

    (pod,) = reader.space.pods("app=shop")
    assert [one["name"] for one in pod["spec"]["initContainers"]] == ["clerk-sync"]
    assert reader.space.behind("clerk-sync") == ({80: 18080}, {pod["metadata"]["name"]})
    assert reader.space.behind("mysql")[1] == {"mysql-0"}
    # Clerk's own secret goes into the file: nothing else changes, and no Job stands in the way.
    secret = "k8s/overlays/development/clerk-sync-development.env"
    text = (reader.folder / secret).read_text("utf-8")
    reader.writes(secret, f"{text.partition('signing-secret=')[0]}signing-secret={SECRET}\n")
    again = reader.types("kubectl apply -k k8s/overlays/development")
    assert {"secret/clerk-sync configured", "job.batch/clerk-sync-migrate unchanged"} <= {
        *again.splitlines()
    }
    if nodes:
        # Readers type slower than all of it starts: until then, events are answered 503.
        where = "deployment/shop", f"-n={reader.space.name}", f"--timeout={reader.space.patience}"
        reader.space.cluster.kubectl("rollout", "status", *where)
        trigger = (
            "kubectl -n clerk-sync-development exec deployment/shop -c clerk-sync -- "
            "clerk-sync trigger user.created"
        )
        applied = '200 {"outcome": "applied"}'
        reader.space.cluster.until(applied, lambda: applied in reader.types(trigger, code=None))
        shown = reader.types(
            "kubectl get --raw /api/v1/namespaces/clerk-sync-development/services/shop:http/proxy/"
        )
        assert shown.startswith("Users: 1\n")


def test_beside_your_app(reader: Reader) -> None:
    reader.writes("clerk-sync.env", f"url={reader.space.mysql_url}\n{CLERK}")
    reader.types("kubectl -n shop create secret generic clerk-sync --from-env-file=clerk-sync.env")
    reader.types("rm clerk-sync.env")
    own = app(**MARK)
    pod = own["spec"]["template"]["spec"]
    del pod["initContainers"]
    pod["containers"][0] |= {"image": PAUSE}
    reader.writes("deployment.yaml", yaml.safe_dump(own))
    write(reader.folder, example("kustomization.yaml"))
    reader.changes(".")
    reader.types("kubectl apply -k .")
    reader.types("kubectl -n shop rollout status deployment/shop")

    (pod,) = reader.space.pods("app=shop")
    (sidecar,) = pod["spec"]["initContainers"]
    assert (sidecar["name"], sidecar["restartPolicy"]) == ("clerk-sync", "Always")
    assert reader.space.behind("clerk-sync") == ({80: 18080}, {pod["metadata"]["name"]})
    (reconcile,) = reader.space.find("cronjobs")
    assert reconcile["metadata"]["name"] == "clerk-sync-reconcile"


def test_production_its_updates_and_its_end(reader: Reader) -> None:
    reader.types("cp -r k8s/overlays/production my-clerk-sync")
    copied = reader.folder / "my-clerk-sync" / "kustomization.yaml"
    copied.write_text(copied.read_text("utf-8").replace("../..", "../k8s"), "utf-8")
    reader.changes("my-clerk-sync")
    reader.writes("database.env", f"url={reader.space.mysql_url}\n")
    reader.writes("clerk.env", CLERK)
    create = "kubectl -n clerk-sync create secret generic"
    reader.types(f"{create} clerk-sync-database --from-env-file=database.env")
    reader.types(f"{create} clerk-sync --from-env-file=clerk.env")

    assert "(server dry run)" in reader.types("kubectl apply -k my-clerk-sync --dry-run=server")
    assert reader.space.find("deployments") == []
    reader.types("kubectl apply -k my-clerk-sync")
    reader.types("kubectl -n clerk-sync rollout status deployment/clerk-sync")
    reader.types(f"kubectl -n clerk-sync {MIGRATED}")
    pods = {pod["metadata"]["name"] for pod in reader.space.pods(SERVING)}
    assert len(pods) == 3
    assert reader.space.behind("clerk-sync") == ({80: 8080}, pods)
    assert reader.space.behind("clerk-sync-internal") == ({8081: 8081}, pods)

    # What does not change stays as it is, the Job included. What does needs a new Job.
    assert "job.batch/clerk-sync-migrate unchanged" in reader.types(
        "kubectl apply -k my-clerk-sync"
    )
    env = [{"name": "LOG_LEVEL", "value": "debug"}]
    spec = {"template": {"spec": {"containers": [{"name": "migrate", "env": env}]}}}
    name = {"metadata": {"name": "clerk-sync-migrate"}}
    patch = yaml.safe_dump({"apiVersion": "batch/v1", "kind": "Job", **name, "spec": spec})
    kustomization = yaml.safe_load(copied.read_text("utf-8"))
    reader.changes("my-clerk-sync", patches=[*kustomization["patches"], {"patch": patch}])
    assert "field is immutable" in reader.types("kubectl apply -k my-clerk-sync", code=1)
    reader.types("kubectl -n clerk-sync delete job clerk-sync-migrate --ignore-not-found")
    assert "debug" in reader.types("kubectl diff -k my-clerk-sync", code=1)
    assert "clerk-sync-migrate created" in reader.types("kubectl apply -k my-clerk-sync")
    reader.types(f"kubectl -n clerk-sync {MIGRATED}")

    reader.types("kubectl delete -k my-clerk-sync")
    reader.types("kubectl -n clerk-sync delete secret clerk-sync clerk-sync-database")
    kinds = "deployments,services,jobs,cronjobs,ingresses,networkpolicies,secrets"
    reader.space.cluster.until("nothing is left", lambda: not reader.space.find(kinds))
