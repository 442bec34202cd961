"""What the tests on a cluster may ask for. All that they make there, they take away again."""

from __future__ import annotations

import json
import os
import secrets
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.cluster import custom_resources, database
from tests.cluster.access import Cluster
from tests.cluster.space import Space
from tests.cluster.stand_in import StandIn
from tools import provision

if TYPE_CHECKING:
    from collections.abc import Iterator

RUN: Final = secrets.token_hex(3)
"""Tells what this run made from what others did."""


def pytest_sessionstart() -> None:
    """Say once, and before anything else, what is missing."""
    if not os.environ.get("KUBECONFIG"):
        pytest.exit(
            "KUBECONFIG names no cluster to test on. Get one with `make cluster`, which runs a "
            "control plane here and prints what to set, or with kind: `kind create cluster`, then "
            "`export KUBECONFIG=~/.kube/config`.",
            returncode=2,
        )
    provision.provide_tools()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(os.environ["KUBECONFIG"], tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="session")
def nodes(cluster: Cluster) -> list[str]:
    """Return those that containers can run on."""
    return [
        node["metadata"]["name"]
        for node in cluster.find("nodes")
        for condition in node["status"].get("conditions", [])
        if condition["type"] == "Ready" and condition["status"] == "True"
    ]


@pytest.fixture(scope="session")
def image() -> dict[str, Any]:
    """Return the chart's `image` values: that of TEST_IMAGE, or none, and so the chart's own."""
    named = os.environ.get("TEST_IMAGE")
    if not named:
        return {}
    repository, _, tag = named.rpartition(":")
    return {"repository": repository, "tag": tag}


@pytest.fixture(scope="session")
def stand_in(cluster: Cluster, nodes: list[str]) -> Iterator[StandIn | None]:
    if nodes:
        yield None
        return
    with StandIn(cluster) as running:
        yield running


@pytest.fixture(scope="session")
def database_space(cluster: Cluster, nodes: list[str]) -> Iterator[str]:
    """The namespace of the database, where there is one."""
    if not nodes:
        yield ""
        return
    with _namespace(cluster) as name:
        yield name


@pytest.fixture(scope="session")
def mysql_url(cluster: Cluster, database_space: str) -> str:
    if not database_space:
        return "mysql://shop:word@mysql.example.com/shop"
    return database.start(cluster, database_space)


@pytest.fixture
def space(
    cluster: Cluster, stand_in: StandIn | None, mysql_url: str, image: dict[str, Any]
) -> Iterator[Space]:
    with _space(cluster, stand_in, mysql_url, image) as made:
        yield made


@pytest.fixture(scope="module")
def shared_space(
    cluster: Cluster, stand_in: StandIn | None, mysql_url: str, image: dict[str, Any]
) -> Iterator[Space]:
    """A namespace for tests that leave nothing in it."""
    with _space(cluster, stand_in, mysql_url, image) as made:
        yield made


@contextmanager
def _space(
    cluster: Cluster, stand_in: StandIn | None, mysql_url: str, image: dict[str, Any]
) -> Iterator[Space]:
    with _namespace(cluster) as name, ExitStack() as cleaning:
        if stand_in:
            stand_in.namespaces.add(name)
            cleaning.callback(stand_in.namespaces.discard, name)
        made = Space(name, cluster, mysql_url, image, "60s" if stand_in else "170s")
        yield made
        for release in json.loads(cluster.helm("list", "-o=json", f"-n={name}")) or []:
            made.uninstall(release["name"])  # with what belongs to no namespace


@contextmanager
def _namespace(cluster: Cluster) -> Iterator[str]:
    """Make a namespace that enforces `restricted`, and wait until a pod is admitted there."""
    name = f"clerk-sync-test-{RUN}-{secrets.token_hex(3)}"
    levels = {f"pod-security.kubernetes.io/{what}": "restricted" for what in ("enforce", "warn")}
    metadata = {"name": name, "labels": {"clerk-sync.test/run": RUN, **levels}}
    cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    try:
        account = "get", "serviceaccount", "default", "--ignore-not-found", f"-n={name}"
        cluster.until("a service account", lambda: cluster.kubectl(*account))
        yield name
    finally:
        cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="session", autouse=True)
def _nothing_left(cluster: Cluster) -> Iterator[None]:
    """Fail the run when something of it is left: it may be somebody's cluster."""
    yield
    ours = f"clerk-sync.test/run={RUN}"
    cluster.until("all gone", lambda: not cluster.find("namespaces", selector=ours), seconds=180)
    left = [
        one["metadata"]["name"] for kind in _known_policies(cluster) for one in cluster.find(kind)
    ]
    assert not [name for name in left if RUN in name]


@pytest.fixture(scope="session")
def has_policies(cluster: Cluster) -> None:
    if not _known_policies(cluster):
        pytest.skip("this cluster is older than Kubernetes 1.36, which has the policy")


def _known_policies(cluster: Cluster) -> list[str]:
    """Return the kinds of the policy, if the cluster is new enough to have them."""
    group = cluster.kubectl("get", "--raw=/apis/admissionregistration.k8s.io/v1")
    names = [one["name"] for one in json.loads(group)["resources"]]
    return [name for name in names if name.startswith("mutatingadmissionpolic")]


@pytest.fixture(scope="session")
def operators(cluster: Cluster) -> Iterator[None]:
    """Make the cluster know the kinds of the operators that the chart has objects for."""
    with ExitStack() as cleaning:
        for file in custom_resources.files():
            name = custom_resources.name_of(file)
            if not cluster.kubectl("get", "crd", name, "--ignore-not-found"):
                # Not `apply`, whose annotation would be too long.
                cluster.kubectl("create", f"--filename={file}")
                cleaning.callback(cluster.kubectl, "delete", "crd", name)
                cluster.until(f"{name} is known", partial(_established, cluster, name))
        yield


def _established(cluster: Cluster, name: str) -> bool:
    conditions = cluster.get("crd", name).get("status", {}).get("conditions") or []
    return ("Established", "True") in {(one["type"], one["status"]) for one in conditions}
