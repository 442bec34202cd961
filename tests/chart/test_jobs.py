"""The chart's Jobs: how they run with hooks and without, and what they say when they cannot."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

import pytest

from clerk_sync.schema.migrate import migrate
from tests.chart import rules
from tests.chart.helm import CHART, FULLNAME, HELMS, LEAST, PARENT, Object, merged, render

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HELM_SECONDS: Final = 300
"""How long Helm waits by itself: `--timeout`."""

KEY: Final[dict[str, Any]] = {"clerk": {"secretKey": {"existingSecret": "clerk"}}}
ALL: Final = merged(
    merged(LEAST, KEY),
    {
        "reconcile": {"mode": "cronJob"},
        "probe": {"enabled": True, "url": "https://hooks.example.com/in"},
        "config": {"existingConfigMap": {"name": "mapping"}},
        "database": {
            "keys": {"password": "pw", "username": "user"},
            "host": "mysql",
            "name": "shop",
            "tls": {"ca": {"existingSecret": "ca"}},
        },
    },
)
"""All Jobs, with everything that they can take from Secrets and ConfigMaps of others."""

INLINE: Final[dict[str, Any]] = {
    "database": {"url": "mysql://u:p@db/app"},
    "clerk": {"signingSecret": {"value": "whsec_c2VjcmV0"}},
    "config": {"mapping": {"tables": {"user": {"table": "users", "key": "clerk_id"}}}},
}
UNHOOKED: Final = {"hooks": {"enabled": False}}


def pods(given: dict[str, Any]) -> dict[str, rules.Pod]:
    """Return the chart's pods by what they are."""
    found = rules.pods(render(given))
    return {pod.labels["app.kubernetes.io/component"]: pod for pod in found}


def sources(pod: rules.Pod) -> Iterator[dict[str, Any]]:
    """Yield what volumes take from Secrets and ConfigMaps."""
    for volume in pod.spec.get("volumes") or []:
        for one in volume.get("projected", {}).get("sources", [volume]):
            yield from (one[kind] for kind in ("secret", "configMap") if kind in one)


def test_a_job_does_not_wait_for_what_is_missing() -> None:
    """It would until its deadline, when Kubernetes deletes its pod: no log would ever say why."""
    found = pods(ALL)
    assert found.keys() == {"webhook", "migrate", "reconcile", "probe", "test"}
    for component, pod in found.items():
        wanted = component != "webhook"
        assert {one.get("optional", False) for one in sources(pod)} == {wanted}, component


def test_what_comes_by_itself_is_waited_for() -> None:
    """What an operator makes takes its time; so does what is applied together with the Job."""
    fetched = {"database": {"existingSecret": "", "externalSecret": {"url": {"key": "a"}}}}
    given = merged(merged(LEAST, fetched), {"externalSecrets": {"store": {"name": "vault"}}})
    for values in (given, merged(ALL, UNHOOKED)):
        assert not any(one.get("optional") for one in sources(pods(values)["migrate"]))


MISSING: Final = {
    "database": "/secrets/database/user: No such file",
    "ca": "/database-ca/ca.crt",
    "mapping": "/mapping/mapping.yaml",
}


@pytest.mark.parametrize("missing", [*MISSING, "clerk"])
def test_a_job_says_what_it_has_not(missing: str, tmp_path: Path) -> None:
    """With the Secret's name and its key, as both are in the path."""
    said = MISSING.get(missing, "/secrets/clerk/signing-secret: No such file")
    pod = pods(ALL)["probe" if missing == "clerk" else "migrate"]
    (container,) = pod.containers
    for volume in pod.spec["volumes"]:
        folder = tmp_path / volume["name"].removeprefix("clerk-sync-")
        for one in volume.get("projected", {}).get("sources", [volume]):
            (source,) = (one[kind] for kind in ("secret", "configMap") if kind in one)
            for item in source["items"] if source["name"] != missing else ():
                (folder / item["path"]).parent.mkdir(parents=True, exist_ok=True)
                (folder / item["path"]).write_text(CONTENT.get(item["path"], "something"))
    env = {
        one["name"]: one["value"].replace("/etc/clerk-sync", str(tmp_path))
        for one in container["env"]
    }
    env |= {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    command = [sys.executable, "-m", "clerk_sync", *container["command"][1:]]
    done = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert said in done.stderr


CONTENT: Final = {"mapping.yaml": "tables: {user: {table: users, key: clerk_id}}\n"}


def test_the_migration_is_given_up_after_itself_and_before_helm() -> None:
    """So that its log says what is wrong, and Helm says that it is the Job's end."""
    spec = rules.the(render(LEAST), "Job")["spec"]
    patience = inspect.signature(migrate).parameters["patience_seconds"].default
    assert patience + 30 < spec["activeDeadlineSeconds"] < HELM_SECONDS - 60
    assert spec["backoffLimit"] <= 1
    # A failed pod stays, with its log; the kubelet's restart would hide it.
    for component, pod in pods(ALL).items():
        if component != "webhook":
            assert pod.spec["restartPolicy"] == "Never"


def test_helm_prints_the_log_of_a_hook_that_failed() -> None:
    """Helm 4 does. Helm 3 does not know the annotation."""
    for one in render(ALL):
        annotations = one["metadata"].get("annotations") or {}
        if "helm.sh/hook" in annotations and one["kind"] in {"Job", "Pod"}:
            assert annotations["helm.sh/hook-output-log-policy"] == "hook-failed"


@pytest.mark.parametrize("by", HELMS)
def test_without_hooks_there_is_none(by: str) -> None:
    objects = render(merged(INLINE, UNHOOKED), by=by)
    assert not [one for one in objects if "helm.sh/hook" in str(one["metadata"])]
    kinds = [one["kind"] for one in objects]
    assert (kinds.count("Secret"), kinds.count("ConfigMap"), kinds.count("Pod")) == (1, 1, 0)
    job = rules.the(objects, "Job")
    assert re.fullmatch(rf"{FULLNAME}-migrate-[0-9a-f]{{8}}", rules.name_of(job))
    assert job["spec"]["ttlSecondsAfterFinished"] == 86400
    made = {rules.name_of(one) for one in objects if one["kind"] in {"Secret", "ConfigMap"}}
    (pod,) = [pod for pod in rules.pods(objects) if pod.owner is job]
    assert {one["name"] for one in sources(pod)} == made
    account = rules.the(objects, "ServiceAccount")
    assert pod.spec["serviceAccountName"] == rules.name_of(account)
    assert not rules.of_kind(render(merged(UNHOOKED, LEAST), chart=CHART), "Pod")
    parent = render(
        {"clerk-sync": merged(merged(LEAST, UNHOOKED), {"mode": "sidecar"})}, chart=PARENT
    )
    assert not [one for one in parent if "helm.sh/hook" in str(one["metadata"])]


@pytest.mark.parametrize(
    "change",
    [
        {"image": {"tag": "9.9.9"}},
        {"database": {"url": "mysql://u:p@other/app"}},
        {"config": {"mapping": {"tables": {"user": {"table": "people", "key": "clerk_id"}}}}},
        {"migrations": {"backoffLimit": 3}},
        {"podLabels": {"a": "b"}},
    ],
    ids=str,
)
def test_without_hooks_another_migration_is_another_job(change: dict[str, Any]) -> None:
    """A Job cannot be changed: a second `kubectl apply` would be refused."""

    def job(values: dict[str, Any]) -> Object:
        return rules.the(render(merged(INLINE, merged(UNHOOKED, values))), "Job")

    first, second = job({}), job(change)
    assert rules.name_of(first) != rules.name_of(second)
    for harmless in ({"replicas": 3}, {"commonAnnotations": {"a": "b"}}):
        same = job(harmless)
        assert (rules.name_of(same), same["spec"]) == (rules.name_of(first), first["spec"])


def template(given: dict[str, Any]) -> Any:
    return rules.the(render(given), "Deployment")["spec"]["template"]


def test_pods_restart_when_a_secret_that_they_have_as_a_variable_changes() -> None:
    as_env = merged(INLINE, {"secretsAs": "env"})
    for change in (
        {"database": {"url": "mysql://u:other@db/app"}},
        {"clerk": {"signingSecret": {"value": "whsec_b3RoZXI="}}},
        {"clerk": {"secretKey": {"value": "sk_test_other"}}},
        {"appToken": {"value": "a-token-of-the-app-1234"}},
    ):
        assert template(as_env) == template(dict(as_env))
        first, second = (
            template(values)["metadata"] for values in (as_env, merged(as_env, change))
        )
        assert first != second
    # Included, the annotation comes with the includes.
    in_parent = merged(as_env, {"mode": "sidecar"})
    one, other = (
        rules.the(render({"clerk-sync": values}, chart=PARENT), "Deployment")
        for values in (in_parent, merged(in_parent, {"database": {"url": "mysql://u:x@db/app"}}))
    )
    assert one != other
    # As files they are read again, and nothing has to restart.
    files = merged(INLINE, {"database": {"url": "mysql://u:other@db/app"}})
    assert template(files) == template(INLINE)


def test_what_tells_of_a_secret_does_not_tell_it() -> None:
    """Whoever may read pods may try passwords: a plain hash of a short one would give it away."""
    metadata = template(merged(INLINE, {"secretsAs": "env"}))["metadata"]
    told = metadata["annotations"]["clerk-sync.dev/secrets"]
    assert re.fullmatch("[0-9a-f]{16}", told)
    other = rules.the(
        render(merged(INLINE, {"secretsAs": "env", "fullnameOverride": "other"})), "Deployment"
    )
    annotations = other["spec"]["template"]["metadata"]["annotations"]
    assert annotations["clerk-sync.dev/secrets"] != told, "the same in two releases has another"
