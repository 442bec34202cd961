"""Clusters that have rules, and hands other than Helm's: each refusal says why."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.chart.helm import CHART, FULLNAME, HELMS, merged
from tests.cluster.access import RefusedError
from tests.cluster.test_injection import INJECTING
from tests.cluster.test_sidecar import VALUES as SIDECAR
from tests.deliveries import SECRET
from tools import programs

if TYPE_CHECKING:
    from tests.chart.helm import Object
    from tests.cluster.space import Space
    from tests.cluster.stand_in import StandIn

MIGRATE: Final = f"{FULLNAME}-migrate"
MAPPING: Final = "tables: {user: {table: users, key: clerk_id}}"
MODES: Final[dict[str, dict[str, Any]]] = {
    "standalone": {},
    "included": SIDECAR,
    "injected": INJECTING,
}
each_helm = pytest.mark.parametrize("by", HELMS)
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))

RULES: Final[dict[str, tuple[Object, str]]] = {
    "quota": (
        {"kind": "ResourceQuota", "spec": {"hard": {"limits.memory": "64Mi"}}},
        "exceeded quota: rule",
    ),
    "limit": (
        {
            "kind": "LimitRange",
            "spec": {"limits": [{"type": "Container", "max": {"memory": "64Mi"}}]},
        },
        "maximum memory usage per Container is 64Mi",
    ),
}


@each_helm
@pytest.mark.parametrize("rule", RULES)
def test_what_keeps_the_migration_from_starting_is_in_its_events(
    space: Space, rule: str, by: str
) -> None:
    """No pod, no log: the README says to ask the Job. What is mended then is taken up."""
    space.secrets()
    thing, said = RULES[rule]
    made = {"apiVersion": "v1", "metadata": {"name": "rule"}, **thing}
    space.cluster.create(made, f"-n={space.name}")
    hasty = {"migrations": {"activeDeadlineSeconds": 5}}
    with pytest.raises(RefusedError, match="pre-install"):
        space.helm("install", hasty, by=by)
    told = space.cluster.kubectl("describe", "job", MIGRATE, f"-n={space.name}")
    assert said in told
    assert "DeadlineExceeded" in told
    space.cluster.kubectl("delete", thing["kind"], "rule", f"-n={space.name}")
    space.helm("upgrade", {}, "--install", "--wait", by=by)


@each_mode
def test_policies_of_the_migration_go_when_it_is_through(
    space: Space, mode: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    if mode is INJECTING:
        request.getfixturevalue("has_policies")
    space.secrets()
    space.install(merged(mode, {"networkPolicy": {"enabled": True}}), "--wait")
    hooks = json.loads(space.cluster.helm("status", "events", f"-n={space.name}", "-o=json"))
    ran = [
        (one["kind"], one["last_run"]["phase"]) for one in hooks["hooks"] if one["kind"] != "Pod"
    ]
    assert ran == [("NetworkPolicy", "Succeeded"), ("Job", "Succeeded")]
    left = {one["metadata"]["name"] for one in space.find("networkpolicies,jobs")}
    assert MIGRATE not in left
    assert f"{FULLNAME}-egress" in left


@each_helm
@each_mode
def test_what_helm_renders_is_applied_again_and_again(
    space: Space, mode: dict[str, Any], by: str, request: pytest.FixtureRequest
) -> None:
    if mode is INJECTING:
        request.getfixturevalue("has_policies")
    space.secrets()
    values = merged(mode, {"hooks": {"enabled": False}, "networkPolicy": {"enabled": True}})

    def rendered(more: dict[str, Any]) -> str:
        version = f"--kube-version={space.cluster.version()}"
        where = "events", str(CHART), f"-n={space.name}", version
        return space.cluster.helm(
            "template", *where, values=space.values(merged(values, more)), by=by
        )

    def kubectl(verb: str, manifest: str) -> str:
        where = "--filename=-", f"-n={space.name}"
        return space.cluster.kubectl(verb, *where, stdin=manifest)

    first, second = rendered({}), rendered({"config": {"mapping": MAPPING}})
    try:
        for _ in range(2):
            kubectl("apply", first)
            assert kubectl("diff", first) == ""
        kubectl("apply", second)
        assert kubectl("diff", second) == ""
        assert len(space.find("jobs")) == 2
        assert not space.find("pods", "app.kubernetes.io/component=test")
        if not mode:
            where = f"deployment/{FULLNAME}", f"-n={space.name}", f"--timeout={space.patience}"
            space.cluster.kubectl("rollout", "status", *where)
    finally:
        kubectl("delete", second)


@each_helm
def test_a_secret_that_is_a_variable_reaches_the_pods(space: Space, by: str) -> None:
    def given(secret: str) -> dict[str, Any]:
        return {
            "secretsAs": "env",
            "database": {"existingSecret": "", "url": space.mysql_url},
            "clerk": {"signingSecret": {"existingSecret": "", "value": secret}},
        }

    def generation() -> int:
        return int(space.get("deployment", FULLNAME)["metadata"]["generation"])

    space.helm("install", given(SECRET), "--wait", by=by)
    before = generation()
    space.helm("upgrade", given(SECRET), "--wait", by=by)
    assert generation() == before
    space.helm("upgrade", given("whsec_b3RoZXI="), "--wait", by=by)
    assert generation() == before + 1


LOST: Final = {
    "helm3": f'no Ingress with the name "{FULLNAME}" found',
    "helm4": f'original object Ingress with the name "{FULLNAME}" not found',
}


@each_helm
def test_a_rollback_after_a_failed_migration_may_have_to_be_given_twice(
    space: Space, stand_in: StandIn | None, by: str
) -> None:
    """Helm's doing: it compares with the revision that failed. Another upgrade does not.

    Where a newer Helm does it the first time, what docs/how-to/helm-upgrade.md says of it can go.
    """
    space.secrets()
    published = {"ingress": {"enabled": True, "hosts": ["hooks.example.com"]}}
    space.helm("install", published, "--wait", by=by)

    def fail(*options: str) -> str:
        space.ensure_secret("broken", url="mysql://nobody@127.0.0.1:9/nothing")
        broken = {"existingSecret": "broken", "backoffLimit": 0}
        if stand_in:
            stand_in.jobs_fail = True
        try:
            with pytest.raises(RefusedError) as refused:
                space.helm("upgrade", {"migrations": broken}, *options, by=by)
        finally:
            if stand_in:
                stand_in.jobs_fail = False
        return str(refused.value)

    rollback = "rollback", "events", "1", f"--namespace={space.name}"
    lost = LOST[by]
    assert "pre-upgrade" in fail()
    assert space.get("ingress", FULLNAME)
    space.helm("upgrade", published, "--wait", by=by)
    fail()
    with pytest.raises(RefusedError, match=lost):
        space.cluster.helm(*rollback, by=by)
    assert space.get("ingress", FULLNAME)
    space.cluster.helm(*rollback, "--wait", f"--timeout={space.patience}", by=by)
    assert space.get("ingress", FULLNAME)
    by_itself = "--rollback-on-failure" if by == "helm4" else "--atomic"
    assert lost in fail(by_itself)
    space.helm("upgrade", published, "--wait", by=by)


@each_helm
def test_a_first_install_that_was_killed_is_uninstalled(
    space: Space, stand_in: StandIn | None, by: str
) -> None:
    space.secrets()
    if stand_in:
        stand_in.namespaces.discard(space.name)
    where = "install", "events", str(CHART), f"--namespace={space.name}", "--values=-"
    values = space.values({"nodeSelector": {"example.com/none": "such"}})
    with subprocess.Popen(
        [programs.need(by), *where, f"--kubeconfig={space.cluster.kubeconfig}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as helm:
        assert helm.stdin
        helm.stdin.write(json.dumps(values))
        helm.stdin.close()
        space.cluster.until("the migration is there", lambda: space.find("jobs"))
        helm.kill()
    if stand_in:
        stand_in.namespaces.add(space.name)
    with pytest.raises(RefusedError, match="another operation"):
        space.helm("upgrade", {}, "--install", by=by)
    space.cluster.helm("uninstall", "events", f"--namespace={space.name}", by=by)
    space.helm("upgrade", {}, "--install", "--wait", by=by)
    assert not space.find("jobs")


@pytest.mark.parametrize(
    ("command", "field"),
    [
        (("set", "image", f"deployment/{FULLNAME}", "clerk-sync=example.com/a:1"), r"\.image"),
        (("set", "env", f"deployment/{FULLNAME}", "LOG_LEVEL=debug"), r"\.env"),
        (("set", "resources", f"deployment/{FULLNAME}", "--limits=memory=1Gi"), r"\.memory"),
    ],
    ids=["image", "env", "resources"],
)
def test_who_changed_something_by_hand_is_asked_before_an_upgrade_undoes_it(
    space: Space, command: tuple[str, ...], field: str
) -> None:
    space.secrets()
    space.install({}, "--wait")
    space.cluster.kubectl(*command, f"-n={space.name}")
    change = {"podLabels": {"tier": "edge"}}
    with pytest.raises(RefusedError, match=rf'conflict with "kubectl[-\w]*"[\s\S]*{field}'):
        space.upgrade(change, "--server-side=true")
    space.upgrade(change, "--wait", "--server-side=true", "--force-conflicts")
