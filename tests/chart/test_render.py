"""Every scenario, rendered by both Helms: what is true of all objects, whatever the values."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart import rules, schemas
from tests.chart.helm import (
    CHART,
    HELMS,
    NAMESPACE,
    PARENT,
    VERSIONS,
    Object,
    Scenario,
    helm,
    render_scenario,
    scenarios,
)


@dataclass(frozen=True)
class Case:
    """A scenario: by itself, or in an app's chart that includes the sidecar."""

    scenario: Scenario
    chart: Path

    def __str__(self) -> str:
        return f"{self.scenario}{'-in-parent' if self.chart == PARENT else ''}"

    def objects(self, version: str = VERSIONS[-1], by: str = "helm4") -> tuple[Object, ...]:
        return render_scenario(self.scenario, version, by=by, chart=self.chart)


CASES = [
    *(Case(scenario, CHART) for scenario in scenarios()),
    *(Case(scenario, PARENT) for scenario in scenarios() if scenario.is_sidecar),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)

# Paths of values that hold secrets in plain text.
INLINE = (
    ("database", "url"),
    ("database", "password"),
    ("clerk", "signingSecret", "value"),
    ("clerk", "secretKey", "value"),
    ("appToken", "value"),
)


@pytest.mark.parametrize("by", HELMS)
@pytest.mark.parametrize("scenario", scenarios(), ids=str)
def test_it_passes_strict_lint(scenario: Scenario, by: str) -> None:
    version = [one for one in scenario.options() if one.startswith("--kube-version")]
    helm(by, "lint", "--strict", f"--values={scenario.path}", *version, CHART)


@pytest.mark.parametrize("scenario", scenarios(), ids=str)
def test_it_says_what_to_expect(scenario: Scenario) -> None:
    first = scenario.path.read_text("utf-8").splitlines()[0]
    assert re.fullmatch(r"# [A-Z`].{20,}", first), first


@each_case
def test_both_helms_render_the_same(case: Case) -> None:
    assert case.objects(by="helm4") == case.objects(by="helm3")


@each_case
def test_kubernetes_takes_the_objects(case: Case) -> None:
    faults = {
        f"{version} {one['kind']} {rules.name_of(one)}": found
        for version in case.scenario.versions()
        for one in case.objects(version)
        if schemas.is_native(one) and (found := schemas.native_faults(one, version))
    }
    assert faults == {}


def test_custom_resources_are_those_of_their_definitions() -> None:
    rendered = chain.from_iterable(case.objects() for case in CASES)
    custom = [one for one in rendered if not schemas.is_native(one)]
    kinds = {one["kind"] for one in custom}
    assert kinds >= {"ExternalSecret", "HTTPRoute", "PodMonitor", "ScaledObject", "ServiceMonitor"}
    assert schemas.custom_faults(custom) == {}


@each_case
def test_pods_are_restricted(case: Case) -> None:
    for pod in pods(case):
        assert list(rules.restricted_faults(pod.spec)) == [], pod.name
        for container in pod.containers:
            if container["image"].startswith("ghcr.io/clerk-sync/"):
                assert container["securityContext"]["readOnlyRootFilesystem"] is True
    automount = bool((case.scenario.values.get("serviceAccount") or {}).get("automount"))
    for pod in own_pods(case):
        assert pod.spec["automountServiceAccountToken"] is automount


@each_case
def test_nothing_is_there_twice(case: Case) -> None:
    for pod in pods(case):
        assert list(rules.duplicates(pod)) == [], pod.name
    assert list(rules.objects_twice(case.objects())) == []


@each_case
def test_volumes_are_mounted_and_mounts_have_volumes(case: Case) -> None:
    for pod in pods(case):
        assert list(rules.dangling_mounts(pod)) == [], pod.name


@each_case
def test_selectors_find_what_they_are_for(case: Case) -> None:
    for pod in pods(case):
        selector = (pod.owner["spec"].get("selector") or {}).get("matchLabels") or {}
        assert rules.matches(selector, pod.labels), pod.name
    answering = webhook_pods(case)
    for one in rules.of_kind(case.objects(), "Service", "PodMonitor", "PodDisruptionBudget"):
        selector = selector_of(one)
        found = [pod.name for pod in pods(case) if rules.matches(selector, pod.labels)]
        if answering or one["kind"] == "PodDisruptionBudget":
            assert found == [pod.name for pod in answering], one["kind"]
    for monitor in rules.of_kind(case.objects(), "ServiceMonitor"):
        selector = selector_of(monitor)
        services = rules.of_kind(case.objects(), "Service")
        (service,) = [one for one in services if rules.matches(selector, one["metadata"]["labels"])]
        ports = {port["name"]: port["targetPort"] for port in service["spec"]["ports"]}
        assert [ports[one["port"]] for one in monitor["spec"]["endpoints"]] == [
            listening_on(case)[1]
        ]
        home = {"matchNames": [service["metadata"]["namespace"]]}
        assert monitor["spec"]["namespaceSelector"] == home


@each_case
def test_a_new_version_of_the_chart_restarts_no_pod(case: Case) -> None:
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]
    labels = [pod.labels for pod in own_pods(case)]
    labels += [selector_of(one) for one in rules.of_kind(case.objects(), "Service", "Deployment")]
    for one in labels:
        assert not {"helm.sh/chart", "app.kubernetes.io/version"} & one.keys()
        assert version not in one.values()


@each_case
def test_services_lead_to_ports_by_number(case: Case) -> None:
    for service in rules.of_kind(case.objects(), "Service"):
        for pod in webhook_pods(case):
            open_ports = {port["containerPort"] for port in container_of(pod)["ports"]}
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= open_ports
    for one in rules.of_kind(case.objects(), "NetworkPolicy"):
        listed = [rule for kind in ("ingress", "egress") for rule in one["spec"].get(kind) or []]
        ports = [port["port"] for rule in listed for port in rule.get("ports") or []]
        assert [port for port in ports if not isinstance(port, int)] == []


@each_case
def test_the_internal_listener_stays_inside(case: Case) -> None:
    objects = case.objects()
    webhook, internal = listening_on(case)
    reaching: dict[str, set[int]] = {}
    for service in rules.of_kind(objects, "Service"):
        targets = {port["targetPort"] for port in service["spec"]["ports"]}
        reaching[rules.name_of(service)] = targets
        if internal in targets:
            assert service["spec"]["type"] == "ClusterIP"
            assert targets == {internal}, (
                "one of its own, so that no route reaches it by its number"
            )
    path = case.scenario.values.get("listen", {}).get("path", "/webhooks/clerk")
    for ingress in rules.of_kind(objects, "Ingress"):
        assert "defaultBackend" not in ingress["spec"]
        for rule in ingress["spec"]["rules"]:
            assert rule["host"]
            # The service takes a slash behind its path.
            assert [one["path"] for one in rule["http"]["paths"]] == [path, f"{path}/"]
            for one in rule["http"]["paths"]:
                assert one["pathType"] == "Exact"
                assert reaching[one["backend"]["service"]["name"]] == {webhook}
    for route in rules.of_kind(objects, "HTTPRoute"):
        (rule,) = route["spec"]["rules"]
        assert [one["path"] for one in rule["matches"]] == [
            {"type": "Exact", "value": one} for one in (path, f"{path}/")
        ]
        assert [reaching[one["name"]] for one in rule["backendRefs"]] == [{webhook}]
        assert route["spec"]["hostnames"]


@each_case
def test_secrets_go_by_reference(case: Case) -> None:
    written = [text for path in INLINE if (text := at(case.scenario.values, path))]
    for one in case.objects():
        if one["kind"] == "Secret":
            continue
        for text in rules.strings(one):
            assert not re.search(
                r"whsec_[A-Za-z0-9+/]|sk_(test|live)_[A-Za-z0-9]|://[^/\s]+:[^/\s]+@", text
            )
            assert [secret for secret in written if secret in text] == []


@each_case
def test_secrets_that_are_mentioned_will_be_there(case: Case) -> None:
    """They are the chart's own, or named in the values; what the migration uses comes before it."""
    named = set(rules.strings(case.scenario.values))
    made = {
        one["spec"]["target"]["name"] if one["kind"] == "ExternalSecret" else rules.name_of(one)
        for one in rules.of_kind(case.objects(), "Secret", "ExternalSecret", "ConfigMap")
    }
    hooks = {
        one["spec"]["target"]["name"] if one["kind"] == "ExternalSecret" else rules.name_of(one)
        for one in rules.of_kind(case.objects(), "Secret", "ExternalSecret", "ConfigMap")
        if is_hook(one)
    }
    for pod in pods(case):
        if is_hook(pod.owner) and pod.owner["kind"] == "Job":
            assert mentioned(pod) <= named | hooks, pod.name
        else:
            assert mentioned(pod) <= named | (made - hooks), pod.name


@each_case
def test_hooks_clean_up_after_themselves(case: Case) -> None:
    for one in filter(is_hook, case.objects()):
        annotations = one["metadata"]["annotations"]
        policy = annotations["helm.sh/hook-delete-policy"]
        assert policy.split(",") == ["before-hook-creation", "hook-succeeded"], rules.name_of(one)
        hooks = annotations["helm.sh/hook"]
        assert hooks == ("test" if one["kind"] == "Pod" else "pre-install,pre-upgrade")
    hooked = (case.scenario.values.get("hooks") or {}).get("enabled", True)
    assert hooked or not any(map(is_hook, case.objects()))
    for job in rules.of_kind(case.objects(), "Job") if hooked else ():
        assert is_hook(job), "a Job cannot be changed: a second release would fail"
        before = [one for one in case.objects() if is_hook(one) and weight(one) < weight(job)]
        kinds = {"Secret", "ExternalSecret", "ConfigMap", "NetworkPolicy"}
        assert {one["kind"] for one in before} <= kinds
        account = job["spec"]["template"]["spec"]["serviceAccountName"]
        assert account not in {
            rules.name_of(one) for one in rules.of_kind(case.objects(), "ServiceAccount")
        }, "it is made after the hook"


@each_case
def test_objects_say_whose_they_are(case: Case) -> None:
    values = case.scenario.values
    extra = len(values.get("extraObjects") or {})
    namespace = values.get("namespaceOverride") or NAMESPACE
    common = values.get("commonLabels") or {}
    without = []
    for one in case.objects():
        metadata = one["metadata"]
        labels = metadata.get("labels") or {}
        if "app.kubernetes.io/instance" not in labels:
            without.append(rules.name_of(one))
            continue
        assert labels["app.kubernetes.io/name"]
        assert common.items() <= labels.items()
        if one["kind"] not in {"MutatingAdmissionPolicy", "MutatingAdmissionPolicyBinding"}:
            watching = [values.get(key) or {} for key in ("monitor", "alerts", "dashboard")]
            elsewhere = {one["namespace"] for one in watching if one.get("namespace")}
            assert metadata["namespace"] in {namespace, *elsewhere}
    assert len(without) == extra + (case.chart == PARENT), without


@each_case
def test_resources_are_asked_for(case: Case) -> None:
    for pod in own_pods(case):
        for container in pod.spec["containers"]:
            if container["image"].startswith("ghcr.io/clerk-sync/"):
                resources = container["resources"]
                assert resources["requests"].keys() == {"cpu", "memory"}
                assert "memory" in resources["limits"]
                assert "cpu" not in resources["limits"]


def pods(case: Case) -> list[rules.Pod]:
    return list(rules.pods(case.objects()))


def own_pods(case: Case) -> list[rules.Pod]:
    return [pod for pod in pods(case) if "app" not in pod.labels]


def webhook_pods(case: Case) -> list[rules.Pod]:
    """The pods that run the service: none, where the app's chart is not at hand."""
    return [pod for pod in pods(case) if pod.owner["kind"] == "Deployment" and has_container(pod)]


def has_container(pod: rules.Pod) -> bool:
    return any(one["name"] == "clerk-sync" for one in pod.containers)


def container_of(pod: rules.Pod) -> dict[str, Any]:
    return next(one for one in pod.containers if one["name"] == "clerk-sync")


def listening_on(case: Case) -> tuple[int, int]:
    listen = case.scenario.values.get("listen", {})
    first = 18080 if case.scenario.is_sidecar else 8080
    return listen.get("webhookPort") or first, listen.get("internalPort") or first + 1


def selector_of(one: Object) -> dict[str, str]:
    selector = one["spec"]["selector"]
    return dict(selector.get("matchLabels", {}) if one["kind"] != "Service" else selector)


def is_hook(one: Object) -> bool:
    return "helm.sh/hook" in (one["metadata"].get("annotations") or {})


def weight(one: Object) -> int:
    return int(one["metadata"]["annotations"].get("helm.sh/hook-weight", 0))


def mentioned(pod: rules.Pod) -> set[str]:
    """Names of the Secrets and ConfigMaps that clerk-sync's containers and volumes mention."""
    found: set[str] = set()
    for one in walk({**pod.spec, "imagePullSecrets": None}):
        for key in ("secretKeyRef", "configMapKeyRef", "secretRef", "configMapRef", "configMap"):
            if isinstance(one.get(key), dict):
                found.add(one[key]["name"])
        if isinstance(one.get("secret"), dict):
            found.add(one["secret"].get("name") or one["secret"]["secretName"])
    return found


def walk(tree: object) -> list[dict[str, Any]]:
    if isinstance(tree, dict):
        return [tree, *chain.from_iterable(map(walk, tree.values()))]
    return list(chain.from_iterable(map(walk, tree))) if isinstance(tree, list) else []


def at(values: dict[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        values = (values or {}).get(key) or {}
    return values or None
