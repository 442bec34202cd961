"""The chart's Deployment: what is there after an install, a failure, a test and an uninstall."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.chart.helm import FULLNAME
from tests.cluster.access import RefusedError
from tests.deliveries import SECRET

if TYPE_CHECKING:
    from tests.cluster.space import Space
    from tests.cluster.stand_in import StandIn

_OURS = "app.kubernetes.io/instance=events"
_WEBHOOK = f"{_OURS},app.kubernetes.io/component=webhook"


def test_it_is_installed_where_restricted_is_enforced(space: Space) -> None:
    space.secrets()
    told = space.install({}, "--wait")

    assert "/webhooks/clerk" in told
    pods = space.pods(_WEBHOOK)
    assert [pod["spec"]["automountServiceAccountToken"] for pod in pods] == [False, False]
    everyone = {pod["metadata"]["name"] for pod in pods}
    assert space.behind(FULLNAME) == ({80: 8080}, everyone)
    assert space.behind(f"{FULLNAME}-internal") == ({8081: 8081}, everyone)


def test_a_drain_takes_one_pod_at_a_time(space: Space) -> None:
    space.secrets()
    space.install({}, "--wait")

    def allowed() -> int:
        status = space.get("poddisruptionbudget", FULLNAME).get("status", {})
        return int(status.get("disruptionsAllowed", 0))

    space.cluster.until("a drain may take one", lambda: allowed() == 1)
    # With one pod, a budget that were not `maxUnavailable` would block for ever.
    space.upgrade({"autoscaling": {"type": "external"}}, "--wait")
    space.cluster.kubectl("scale", "deployment", FULLNAME, "--replicas=1", f"-n={space.name}")
    space.cluster.until("one pod is left", lambda: len(space.pods(_WEBHOOK)) == 1)
    space.cluster.until("a drain may take it", lambda: allowed() == 1)


def test_a_migration_that_fails_stops_the_upgrade(space: Space, stand_in: StandIn | None) -> None:
    space.secrets()
    space.install({}, "--wait")
    before = space.get("deployment", FULLNAME)["metadata"]["generation"]
    space.secret("broken", url="mysql://nobody@127.0.0.1:9/nothing")
    change: dict[str, Any] = {"podAnnotations": {"example.com/change": "1"}}
    if stand_in:
        stand_in.jobs_fail = True
    try:
        broken = {"existingSecret": "broken", "backoffLimit": 0}
        with pytest.raises(RefusedError, match="pre-upgrade hooks failed"):
            space.upgrade({**change, "migrations": broken})
    finally:
        if stand_in:
            stand_in.jobs_fail = False

    assert space.get("deployment", FULLNAME)["metadata"]["generation"] == before
    # Its pod is there for whoever wants to know why.
    assert space.find("pods", "app.kubernetes.io/component=migrate")

    space.upgrade(change, "--wait")
    assert space.get("deployment", FULLNAME)["metadata"]["generation"] > before
    assert not space.find("jobs")


def test_secrets_in_the_values_are_there_before_the_migration(space: Space) -> None:
    inline: dict[str, Any] = {
        "database": {"existingSecret": "", "url": space.mysql_url},
        "clerk": {"signingSecret": {"existingSecret": "", "value": SECRET}},
    }
    space.install(inline, "--wait")

    hooks = json.loads(space.cluster.helm("status", "events", f"-n={space.name}", "-o=json"))
    phases = {one["name"]: one["last_run"]["phase"] for one in hooks["hooks"]}
    assert phases[f"{FULLNAME}-migrate"] == "Succeeded"
    (kept,) = space.find("secrets", _OURS)  # the hook's copy is gone
    assert kept["metadata"]["name"] != f"{FULLNAME}-migrate"


def test_helm_test_is_admitted_and_passes(space: Space) -> None:
    space.secrets()
    space.install({}, "--wait")
    where = f"-n={space.name}", f"--timeout={space.patience}"
    assert "Succeeded" in space.cluster.helm("test", "events", *where)


def test_an_uninstall_leaves_only_what_was_there_before(space: Space) -> None:
    space.secrets()
    space.ensure_account("events-clerk-sync-other")
    before = names(space)
    space.install({"reconcile": {"mode": "cronJob"}, **_KEY, "networkPolicy": {"enabled": True}})
    assert names(space) > before
    space.uninstall("events")

    space.cluster.until("nothing of the chart is left", lambda: names(space) == before)


_KEY: Any = {
    "clerk": {
        "signingSecret": {"existingSecret": "clerk"},
        "secretKey": {"existingSecret": "clerk"},
    }
}


def names(space: Space) -> set[tuple[str, str]]:
    """Return kind and name of all that is in the namespace and stays there."""
    listed = space.cluster.kubectl(
        "api-resources", "--namespaced", "--verbs=list,create", "--output=name"
    ).split()
    passing = {"events", "events.events.k8s.io", "endpoints", "pods.metrics.k8s.io"}
    found = space.find(",".join(sorted(set(listed) - passing)))
    return {(one["kind"], one["metadata"]["name"]) for one in found}
