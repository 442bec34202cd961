"""Where containers run: a signed event, sent from outside, and the row that it becomes."""

from __future__ import annotations

import json
import re
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from clerk_sync.clerk import samples
from tests.chart.helm import FULLNAME
from tests.cluster import database, ingress
from tests.cluster.test_injection import INJECTING, LABEL, deployment, is_injected
from tests.cluster.test_sidecar import VALUES as SIDECAR
from tests.deliveries import PATH, new_id, now_ms, signed
from tools import programs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster.space import Space

_HOST: Final = "clerk-sync.example.test"


@pytest.fixture(autouse=True)
def _containers_run(nodes: list[str]) -> None:
    if not nodes:
        pytest.skip("no container runs on this cluster: it has no node that is ready")


def test_a_deployment_takes_an_event(space: Space, database_space: str) -> None:
    space.secrets()
    space.install({}, "--wait")
    assert _post(space, FULLNAME, unsigned=True) == 401
    _event_becomes_a_row(space, FULLNAME, database_space)
    where = f"-n={space.name}", f"--timeout={space.patience}"
    assert "Succeeded" in space.cluster.helm("test", "events", *where)


def test_an_included_sidecar_takes_an_event(space: Space, database_space: str) -> None:
    space.secrets()
    space.install_parent(SIDECAR)
    _event_becomes_a_row(space, "shop-clerk-sync", database_space)


@pytest.mark.usefixtures("has_policies")
def test_an_injected_sidecar_takes_an_event(space: Space, database_space: str) -> None:
    space.secrets()
    space.install(INJECTING, "--wait")
    space.cluster.until("the policy is at work", lambda: is_injected(space))
    space.cluster.create(deployment(LABEL), f"-n={space.name}")
    where = "deployment/shop", f"-n={space.name}", f"--timeout={space.patience}"
    space.cluster.kubectl("rollout", "status", *where)
    _event_becomes_a_row(space, FULLNAME, database_space)


def test_an_ingress_takes_an_event_and_nothing_else(space: Space, database_space: str) -> None:
    space.secrets()
    with ingress.running(space.cluster, space.name) as name:
        tls = {"enabled": False}  # in front of it, as with many a load balancer
        published = {"enabled": True, "className": name, "hosts": [_HOST], "tls": tls}
        space.install({"ingress": published}, "--wait")

        def unsigned() -> int:
            return _post(space, "traefik", unsigned=True)

        space.cluster.until("there is a route", lambda: unsigned() == 401)
        _event_becomes_a_row(space, "traefik", database_space)
        for path in ("/metrics", "/profiles", "/readyz", "/", f"{PATH}/more"):
            assert _post(space, "traefik", path=path) == 404


def _event_becomes_a_row(space: Space, service: str, database_space: str) -> None:
    user = f"user_{new_id().removeprefix('msg_')}"
    assert _post(space, service, user) == 200
    sql = f"SELECT username FROM clerk_users WHERE clerk_id = '{user}'"
    assert len(database.query(space.cluster, database_space, sql)) == 1


def _post(
    space: Space, service: str, user: str = "user_1", *, path: str = PATH, unsigned: bool = False
) -> int:
    """Post an event to a pod behind the Service, and return the answer's status."""
    body = json.dumps(samples.event("user.created", clerk_id=user, now_ms=now_ms())).encode()
    headers = {"Content-Type": "application/json", "Host": _HOST}
    headers |= {} if unsigned else signed(body)
    with _forwarded(space, service) as url:
        try:
            with urlopen(Request(url + path, body, headers), timeout=20) as answer:
                return int(answer.status)
        except HTTPError as refusal:
            return refusal.code


@contextmanager
def _forwarded(space: Space, service: str) -> Iterator[str]:
    """Yield a URL on this machine that leads to a pod behind the Service.

    For one request: kubectl gives up when a server closes a connection without reading all of it.
    """
    forward = "port-forward", f"service/{service}", ":80", f"--namespace={space.name}"
    command: list[Any] = [programs.need("kubectl"), *forward]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            found = re.match(r"Forwarding from (\S+) ->", line)
            assert found, f"no port was forwarded: {line}"
            yield f"http://{found[1]}"
        finally:
            process.terminate()
