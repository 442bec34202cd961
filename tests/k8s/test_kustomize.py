"""What `kubectl kustomize` makes of `k8s/`, by itself and as users take parts of it."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING, Final

import pytest

from tests.chart import rules, schemas
from tests.chart.helm import ROOT, VERSIONS, Object
from tests.k8s.examples import alone, beside, otherwise
from tests.k8s.generate import K8S, generated
from tests.k8s.kustomize import KustomizeError, build, example, write

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OURS: Final = "ghcr.io/clerk-sync/"
CASES: Final[dict[str, Callable[[Path], Path]]] = {
    "base": lambda _: K8S / "base",
    "development": lambda _: K8S / "overlays" / "development",
    "production": lambda _: K8S / "overlays" / "production",
    "production, otherwise": otherwise,
    "the README's app": lambda folder: write(
        beside(folder), example("kustomization.yaml") | {"namespace": "shop"}
    ),
    "all beside an app": lambda folder: beside(
        folder, "sidecar", "migrate", "reconcile", "pod-monitor", "http-route", "ingress", "mapping"
    ),
    "all of the base": lambda folder: alone(
        folder,
        "reconcile",
        "app-token",
        "service-monitor",
        "http-route",
        "ingress",
        "network-policy",
        "mapping",
    ),
}


@pytest.fixture(scope="module", params=CASES)
def objects(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Object, ...]:
    return build(CASES[request.param](tmp_path_factory.mktemp("case")))


def test_generated_files_are_what_the_chart_says() -> None:
    stale = [
        str(path.relative_to(ROOT))
        for path, text in generated().items()
        if not path.exists() or path.read_text("utf-8") != text
    ]
    assert stale == [], "`make k8s` writes them anew"
    said = {path for path in K8S.rglob("*.yaml") if "# Generated" in path.read_text("utf-8")}
    assert said == set(generated())


def test_files_written_by_hand_say_what_they_are_for() -> None:
    for path in {*K8S.rglob("*.yaml"), *K8S.rglob("*.env")} - set(generated()):
        first = path.read_text("utf-8").splitlines()[0]
        assert re.match(r"# ([A-Z]|clerk-sync ).{20,}", first), path


def test_kubernetes_takes_the_objects(objects: tuple[Object, ...]) -> None:
    faults = {
        f"{version} {one['kind']} {rules.name_of(one)}": found
        for version in VERSIONS
        for one in objects
        if schemas.is_native(one) and (found := schemas.native_faults(one, version))
    }
    assert faults == {}


def test_pods_are_restricted(objects: tuple[Object, ...]) -> None:
    for pod in rules.pods(objects):
        assert list(rules.restricted_faults(pod.spec)) == [], pod.name
        for container in pod.containers:
            if container["image"].startswith(OURS):
                assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_nothing_is_there_twice_or_missing(objects: tuple[Object, ...]) -> None:
    assert list(rules.objects_twice(objects)) == []
    for pod in rules.pods(objects):
        assert list(rules.duplicates(pod)) == [], pod.name
        claims = {"metadata": {}, "spec": _with_claims(pod)}
        assert list(rules.dangling_mounts(rules.Pod(pod.owner, **claims))) == [], pod.name


def _with_claims(pod: rules.Pod) -> Object:
    claims = pod.owner["spec"].get("volumeClaimTemplates") or []
    volumes = [{"name": rules.name_of(claim)} for claim in claims]
    return pod.spec | {"volumes": [*pod.spec.get("volumes", []), *volumes]}


def test_selectors_find_pods_and_services_their_ports(objects: tuple[Object, ...]) -> None:
    pods = list(rules.pods(objects))
    for pod in pods:
        selector = (pod.owner["spec"].get("selector") or {}).get("matchLabels") or {}
        assert rules.matches(selector, pod.labels), pod.name
    for one in rules.of_kind(objects, "Service"):
        found = [pod for pod in pods if rules.matches(one["spec"]["selector"], pod.labels)]
        assert found, rules.name_of(one)
        for pod in found:
            ports = [port for each in pod.containers for port in each.get("ports") or []]
            known = {port[key] for port in ports for key in ("name", "containerPort")}
            targets = {port.get("targetPort", port["port"]) for port in one["spec"]["ports"]}
            assert targets <= known, rules.name_of(one)
    selecting = rules.of_kind(objects, "PodDisruptionBudget", "PodMonitor")
    for selector in [one["spec"]["selector"]["matchLabels"] for one in selecting]:
        assert any(rules.matches(selector, pod.labels) for pod in pods)
    for monitor in rules.of_kind(objects, "ServiceMonitor"):
        service = rules.the(objects, "Service", "-internal")
        selector = monitor["spec"]["selector"]["matchLabels"]
        assert rules.matches(selector, service["metadata"]["labels"])
        assert monitor["spec"].get("namespaceSelector") is None


def test_only_the_webhooks_path_is_published(objects: tuple[Object, ...]) -> None:
    for one in rules.of_kind(objects, "Ingress"):
        (rule,) = one["spec"]["rules"]
        paths = rule["http"]["paths"]
        assert [path["path"] for path in paths] == ["/webhooks/clerk", "/webhooks/clerk/"]
        for path in paths:
            assert path["pathType"] == "Exact"
            assert path["backend"]["service"] == {"name": "clerk-sync", "port": {"number": 80}}
    for one in rules.of_kind(objects, "HTTPRoute"):
        (rule,) = one["spec"]["rules"]
        assert [match["path"] for match in rule["matches"]] == [
            {"type": "Exact", "value": path} for path in ("/webhooks/clerk", "/webhooks/clerk/")
        ]
        assert rule["backendRefs"] == [{"name": "clerk-sync", "port": 80}]


def test_accounts_that_pods_name_are_there(objects: tuple[Object, ...]) -> None:
    there = {rules.name_of(one) for one in rules.of_kind(objects, "ServiceAccount")} | {"default"}
    assert {pod.spec.get("serviceAccountName", "default") for pod in rules.pods(objects)} <= there


def test_nothing_is_left_of_helm(objects: tuple[Object, ...]) -> None:
    found = [text for one in objects for text in rules.strings(one) if "helm" in text.lower()]
    assert found == []


def test_custom_resources_are_those_of_their_definitions(tmp_path: Path) -> None:
    cases = "production, otherwise", "all beside an app", "all of the base"
    custom = []
    for case in cases:
        folder = tmp_path / case
        folder.mkdir()
        custom += [one for one in build(CASES[case](folder)) if not schemas.is_native(one)]
    assert {one["kind"] for one in custom} == {"HTTPRoute", "PodMonitor", "ServiceMonitor"}
    assert schemas.custom_faults(custom) == {}


def test_production_has_no_secrets_and_names_its_own() -> None:
    built = build(K8S / "overlays" / "production")
    assert rules.of_kind(built, "Secret") == []
    for path in (K8S / "overlays" / "production").iterdir():
        assert not re.search(r"whsec_\w|sk_(live|test)_\w|://[^/\s]+:[^/\s]+@", path.read_text())
    sources = {
        pod.owner["kind"]: [
            (source["secret"]["name"], item["key"])
            for volume in pod.spec["volumes"]
            for source in (volume.get("projected") or {"sources": []})["sources"]
            for item in source["secret"]["items"]
        ]
        for pod in rules.pods(built)
    }
    database, signing = ("clerk-sync-database", "url"), ("clerk-sync", "signing-secret")
    assert sources == {"Deployment": [database, signing], "Job": [database], "CronJob": [database]}


def test_production_is_what_its_files_say() -> None:
    built = build(K8S / "overlays" / "production")
    images = {one["image"] for pod in rules.pods(built) for one in pod.containers}
    assert len(images) == 1
    assert re.fullmatch(rf"{OURS}clerk-sync@sha256:[0-9a-f]{{64}}", images.pop())
    deployment = rules.the(built, "Deployment")
    assert deployment["spec"]["replicas"] == 3
    assert rules.the(built, "Ingress")["spec"]["ingressClassName"] == "nginx"
    assert len(rules.of_kind(built, "PodDisruptionBudget")) == 1
    namespaces = {one["metadata"]["namespace"] for one in built}
    assert namespaces == {"clerk-sync"}
    ingress = rules.the(built, "NetworkPolicy", "-ingress")["spec"]["ingress"]
    egress = rules.the(built, "NetworkPolicy", "-egress")["spec"]["egress"]
    assert all(rule["from"] for rule in ingress)
    assert [rule["ports"][0]["port"] for rule in egress if "to" not in rule] == [53, 443]


def test_a_patch_that_has_lost_its_place_stops_the_build(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path, dirs_exist_ok=True)
    policies = tmp_path / "components" / "network-policy" / "network-policies.yaml"
    policies.write_text(policies.read_text("utf-8").replace("port: 3306", "port: 3307"), "utf-8")
    with pytest.raises(KustomizeError, match="/spec/egress/1/ports/0/port"):
        build(tmp_path / "overlays" / "production")
