"""Three ways to run, one container: by itself, included by a chart, injected by the cluster."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.chart import policy, rules, schemas
from tests.chart.helm import (
    CHART,
    FULLNAME,
    LEAST,
    PARENT,
    Object,
    Scenario,
    merged,
    render,
    scenarios,
)

KUBERNETES = "1.37"
ON = f"--kube-version={KUBERNETES}"

# What differs between the modes by intention is set to one value, so that the rest has to agree.
SAME = {
    "listen": {"webhookPort": 18080, "internalPort": 18081},
    "limits": {"writers": 1, "poolSize": 2},
    "reconcile": {"mode": "off"},
    "monitor": {"enabled": False},
    "alerts": {"enabled": False},
}
TOKEN = "clerk-sync-no-token"
TOKENS = "/var/run/secrets/kubernetes.io/serviceaccount"
ONLY_STANDALONE = {"readinessProbe", "lifecycle"}
ONLY_SIDECAR = {"restartPolicy"}

# They say how many pods there are, or what else is in them: an app's pods are the app's business.
_STANDALONE = ("autoscaling", "extraContainers", "extraInitContainers", "sidecar")
ANYWHERE = [one for one in scenarios() if not set(_STANDALONE) & one.values.keys()]
SIDECARS = [one for one in scenarios() if one.is_sidecar]


def in_mode(mode: str, scenario: Scenario) -> dict[str, Any]:
    return merged(merged(scenario.values, SAME), {"mode": mode})


def standalone(values: dict[str, Any]) -> dict[str, Any]:
    """The spec of the Deployment's pods."""
    spec = rules.the(render(values, ON), "Deployment")["spec"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


def included(values: dict[str, Any]) -> Object:
    """The pod that an app's chart makes."""
    objects = render({"clerk-sync": values}, ON, chart=PARENT)
    template = rules.the(objects, "Deployment")["spec"]["template"]
    return as_pod(template)


def injecting(values: dict[str, Any]) -> Object:
    """The policy that the chart makes."""
    enabled = merged(values, {"sidecar": {"injection": {"enabled": True}}})
    return rules.the(render(enabled, ON), "MutatingAdmissionPolicy")


def as_pod(template: dict[str, Any]) -> Object:
    pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(template)}
    pod["metadata"] = {"name": "app-1", "namespace": "shop", **pod["metadata"]}
    return pod


def bare(pod: Object) -> Object:
    """A pod of the app as it was before clerk-sync came, but for its labels."""
    spec = {
        key: value for key, value in pod["spec"].items() if key not in {"initContainers", "volumes"}
    }
    return pod | {"spec": spec}


def busy(pod: Object) -> Object:
    """The same with init containers and volumes of its own."""
    busy = copy.deepcopy(bare(pod))
    first = {**busy["spec"]["containers"][0], "name": "first", "ports": []}
    busy["spec"]["initContainers"] = [
        {**first, "volumeMounts": [{"name": "own", "mountPath": "/own"}]}
    ]
    busy["spec"]["volumes"] = [{"name": "own", "emptyDir": {}}]
    return busy


@pytest.mark.parametrize("scenario", ANYWHERE, ids=str)
def test_a_sidecar_is_the_standalone_container(scenario: Scenario) -> None:
    automount = {"serviceAccount": {"automount": False}}
    alone = standalone(merged(in_mode("standalone", scenario), automount))
    beside = included(merged(in_mode("sidecar", scenario), automount))["spec"]
    (own,), (sidecar,) = alone["containers"], beside["initContainers"]
    assert sidecar.keys() - own.keys() - {"volumeMounts"} == ONLY_SIDECAR
    assert own.keys() - sidecar.keys() == ONLY_STANDALONE
    sidecar["volumeMounts"].remove({"name": TOKEN, "mountPath": TOKENS, "readOnly": True})
    beside["volumes"].remove({"name": TOKEN, "emptyDir": {"sizeLimit": "1Mi"}})
    for key in (own.keys() | sidecar.keys()) - ONLY_STANDALONE - ONLY_SIDECAR:
        assert own.get(key) == (sidecar.get(key) or None), key
    assert alone.get("volumes") == (beside["volumes"] or None)


@pytest.mark.parametrize("scenario", [*SIDECARS, *ANYWHERE[::3]], ids=str)
def test_an_injected_container_is_the_included_one(scenario: Scenario) -> None:
    values = in_mode("sidecar", scenario)
    pod = included(values)
    admission = injecting(values)
    for shape in (bare, busy):
        before = shape(pod)
        kept = copy.deepcopy(before)
        after = policy.admit(admission, before)
        assert before == kept
        spec = after["spec"]
        assert spec["initContainers"][0] == pod["spec"]["initContainers"][0]
        assert spec["initContainers"][1:] == before["spec"].get("initContainers", [])
        assert spec["containers"] == before["spec"]["containers"]
        theirs = before["spec"].get("volumes", [])
        assert spec.get("volumes", []) == theirs + pod["spec"].get("volumes", [])
        assert after["metadata"] == before["metadata"]
        assert schemas.native_faults(after, KUBERNETES) == []
        assert list(rules.restricted_faults(spec)) == []
        assert list(rules.duplicates(rules.Pod(after, after["metadata"], spec))) == []
        assert policy.admit(admission, after) == after, "it is there already"


@pytest.mark.parametrize(
    ("value", "refusal"),
    [
        ("Object.spec.volumes{emptyDir: Object.spec.volumes.emptyDir{}}", None),
        ("Object.spec.volumes{emptyDir: Object.spec.emptyDir{}}", "stands at Object.spec.volumes"),
        ("Object.spec.containers{}", "stands at Object.spec.volumes"),
        ("Object.spec.volumes{name: null}", "None at Object.spec.volumes.name"),
        ('Object.spec.volumes{csi: {"a": {"b": "c"}}}', "a map of more than scalars"),
        ('Object.spec.volumes{csi: {"a": 1, "b": "c"}}', "values of different types"),
    ],
)
def test_the_emulation_refuses_what_servers_refuse(value: str, refusal: str | None) -> None:
    """As tried on a server: some of it only when a pod comes, and then the pod is refused."""
    expression = f'[JSONPatch{{op: "add", path: "/spec/volumes/-", value: {value}}}]'
    if refusal is None:
        (operation,) = policy.evaluate(expression, {})
        assert operation["value"] == {"emptyDir": {}}
    else:
        with pytest.raises(TypeError, match=refusal):
            policy.evaluate(expression, {})


def test_pods_without_the_label_are_left_alone() -> None:
    values = merged(LEAST, {"mode": "sidecar"})
    pod = bare(included(values))
    pod["metadata"]["labels"] = {"app": "shop"}
    assert policy.admit(injecting(values), pod) == pod
    pod["metadata"]["labels"] = {"clerk-sync.dev/sidecar": "another-release"}
    assert policy.admit(injecting(values), pod) == pod


def test_the_policy_is_for_new_pods_of_one_namespace() -> None:
    values = merged(LEAST, {"mode": "sidecar", "sidecar": {"injection": {"enabled": True}}})
    objects = render(values, ON)
    made = rules.the(objects, "MutatingAdmissionPolicy")
    binding = rules.the(objects, "MutatingAdmissionPolicyBinding")
    assert made["spec"]["failurePolicy"] == "Ignore"
    (rule,) = made["spec"]["matchConstraints"]["resourceRules"]
    assert (rule["operations"], rule["resources"]) == (["CREATE"], ["pods"])
    assert binding["spec"]["policyName"] == rules.name_of(made)
    selector = binding["spec"]["matchResources"]["namespaceSelector"]
    assert selector == {"matchLabels": {"kubernetes.io/metadata.name": "shop"}}
    assert "shop" in rules.name_of(made), "it belongs to no namespace: two releases must not clash"


def test_a_sidecar_neither_stops_nor_burdens_the_app() -> None:
    key = {"clerk": {"secretKey": {"existingSecret": "clerk"}}}
    container = included(merged(merged(LEAST, key), {"mode": "sidecar"}))["spec"]["initContainers"][
        0
    ]
    assert "readinessProbe" not in container
    assert "lifecycle" not in container
    assert container["restartPolicy"] == "Always"
    assert container["command"] == ["clerk-sync", "serve"]
    for probe in ("startupProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] == "/livez"
    env = {one["name"]: one.get("value") for one in container["env"]}
    assert (env["CLERK_SYNC_WRITERS"], env["CLERK_SYNC_POOL_SIZE"]) == ("1", "2")
    assert "CLERK_SYNC_RECONCILE_INTERVAL" not in env, "every replica would ask for the lease"
    assert {"8080", "8081"}.isdisjoint({env["CLERK_SYNC_PORT"], env["CLERK_SYNC_INTERNAL_PORT"]})


def test_the_apps_token_is_kept_from_the_sidecar_unless_it_is_asked_for() -> None:
    """Kubernetes mounts a pod's token into each container that has nothing mounted there."""
    for automount in (False, True):
        given = {"mode": "sidecar", "serviceAccount": {"automount": automount}}
        spec = included(merged(LEAST, given))["spec"]
        mounted = {
            one["mountPath"]: one["name"] for one in spec["initContainers"][0]["volumeMounts"]
        }
        assert mounted.get(TOKENS) == (None if automount else TOKEN)
        assert (TOKEN in {one["name"] for one in spec["volumes"]}) is not automount


def test_the_dependency_brings_all_but_the_pods() -> None:
    values = merged(
        LEAST,
        {
            "mode": "sidecar",
            "clerk": {"secretKey": {"existingSecret": "clerk"}},
            "monitor": {"enabled": True},
        },
    )
    objects = render({"clerk-sync": values}, ON, chart=PARENT)
    made = sorted((one["kind"], rules.name_of(one)) for one in objects)
    assert made == [
        ("CronJob", f"{FULLNAME}-reconcile"),
        ("Deployment", "events"),
        ("Job", f"{FULLNAME}-migrate"),
        ("Pod", f"{FULLNAME}-test"),
        ("PodMonitor", FULLNAME),
        ("Service", FULLNAME),
        ("Service", f"{FULLNAME}-internal"),
        ("ServiceAccount", FULLNAME),
    ]


def test_replicas_are_the_autoscalers_where_there_is_one() -> None:
    for type_, kinds in (
        ("none", set()),
        ("hpa", {"HorizontalPodAutoscaler"}),
        ("keda", {"ScaledObject"}),
        ("external", set()),
    ):
        scaling: dict[str, Any] = {"type": type_}
        if type_ == "keda":
            scaling["triggers"] = [{"type": "cpu", "metadata": {"value": "80"}}]
        objects = render(merged(LEAST, {"autoscaling": scaling}))
        scalers = rules.of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject")
        assert {one["kind"] for one in scalers} == kinds
        assert ("replicas" in rules.the(objects, "Deployment")["spec"]) == (type_ == "none")
        for one in scalers:
            assert one["spec"]["scaleTargetRef"]["name"] == FULLNAME


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, True),
        ({"replicas": 1}, False),
        ({"replicas": 0}, False),
        ({"replicas": 1, "autoscaling": {"type": "external"}}, True),
        ({"autoscaling": {"type": "hpa", "minReplicas": 1, "maxReplicas": 1}}, False),
        ({"podDisruptionBudget": {"enabled": False}}, False),
        ({"mode": "sidecar"}, False),
    ],
    ids=str,
)
def test_a_budget_never_blocks_a_drain(given: dict[str, Any], *, wanted: bool) -> None:
    budgets = rules.of_kind(render(merged(LEAST, given)), "PodDisruptionBudget")
    assert len(budgets) == wanted
    for one in budgets:
        assert one["spec"]["maxUnavailable"] == 1
        assert one["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_pods_restart_when_the_mapping_changes_and_only_then(tmp_path: Path) -> None:
    def template(values: dict[str, Any], chart: Path = CHART) -> Any:
        return rules.the(render(values, chart=chart), "Deployment")["spec"]["template"]

    first, second = (
        merged(LEAST, {"config": {"mapping": {"tables": {"user": {"table": name}}}}})
        for name in ("users", "people")
    )
    assert template(first) == template(first)
    assert template(first) != template(second)
    assert template(LEAST) != template(merged(LEAST, {"config": {"preset": "orbytal"}}))

    newer = tmp_path / "clerk-sync"
    shutil.copytree(CHART, newer)
    about = (newer / "Chart.yaml").read_text("utf-8")
    (newer / "Chart.yaml").write_text(about.replace("\nversion: ", "\nversion: 9"), "utf-8")
    assert render(LEAST, chart=newer) != render(LEAST)
    assert template(LEAST, newer) == template(LEAST), "the chart's version is in no pod"
