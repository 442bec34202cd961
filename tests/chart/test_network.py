"""Who may talk to whom: policies that let through what is needed, and lists of addresses."""

from __future__ import annotations

import ipaddress
import re
from typing import Any

import pytest
import yaml

from tests.chart import rules
from tests.chart.helm import CHART, FULLNAME, LEAST, Object, merged, render

KEY = {"clerk": {"secretKey": {"existingSecret": "clerk"}}, "reconcile": {"mode": "cronJob"}}
ON = {"networkPolicy": {"enabled": True}}
FRONT = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress"}}}]
SVIX = yaml.safe_load((CHART / "files" / "svix-source-ranges.yaml").read_text("utf-8"))


def policies(given: dict[str, Any]) -> tuple[list[Object], list[rules.Pod]]:
    objects = render(merged(merged(LEAST, KEY), merged(ON, given)))
    return rules.of_kind(objects, "NetworkPolicy"), list(rules.pods(objects))


def selects(policy: Object, pod: rules.Pod) -> bool:
    selector = policy["spec"]["podSelector"]
    return rules.matches(selector.get("matchLabels", {}), pod.labels) and all(
        pod.labels.get(one["key"]) not in one["values"]
        for one in selector.get("matchExpressions", [])
        if one["operator"] == "NotIn"
    )


def open_to(found: list[Object], pod: rules.Pod, kind: str) -> dict[int, list[Any] | None]:
    """Return, by port, the peers that a pod may hear (`ingress`) or call: None for anybody."""
    peers = {"ingress": "from", "egress": "to"}[kind]
    return {
        port["port"]: rule.get(peers)
        for one in found
        if selects(one, pod) and kind.capitalize() in one["spec"]["policyTypes"]
        for rule in one["spec"].get(kind) or []
        for port in rule["ports"]
    }


def beforehand(objects: list[Object]) -> list[Object]:
    """Return what is there before the release: what Helm has not made when its Jobs run."""
    return [
        one
        for one in objects
        if "pre-install" in (one["metadata"].get("annotations") or {}).get("helm.sh/hook", "")
    ]


def by_component(pods: list[rules.Pod]) -> dict[str, rules.Pod]:
    return {pod.labels["app.kubernetes.io/component"]: pod for pod in pods}


def test_every_pod_is_covered() -> None:
    found, pods = policies({})
    assert {"webhook", "migrate", "reconcile", "test"} == by_component(pods).keys()
    for pod in pods:
        types = {kind for one in found if selects(one, pod) for kind in one["spec"]["policyTypes"]}
        assert types == {"Ingress", "Egress"}, pod.name


def test_a_hook_has_its_policy_before_it_runs() -> None:
    """In a namespace that denies by default, nothing else lets the first migration out."""
    found, pods = policies({})
    before = beforehand(found)
    weights = {
        pod.name: int(pod.owner["metadata"]["annotations"]["helm.sh/hook-weight"])
        for pod in pods
        if beforehand([pod.owner])
    }
    assert [*weights] == [f"Job {FULLNAME}-migrate"]
    migrate = by_component(pods)["migrate"]
    assert open_to(before, migrate, "egress").keys() == {53, 5353, 3306}
    assert open_to(before, migrate, "ingress") == {}
    for one in before:
        metadata = one["metadata"]["annotations"]
        assert int(metadata["helm.sh/hook-weight"]) < min(weights.values())
        assert "hook-succeeded" in metadata["helm.sh/hook-delete-policy"]
        assert [pod for pod in pods if selects(one, pod)] == [migrate]
    found, pods = policies({"networkPolicy": {"egress": {"enabled": False}}})
    (only,) = beforehand(found)
    assert only["spec"]["policyTypes"] == ["Ingress"]
    assert beforehand(policies({"hooks": {"enabled": False}})[0]) == []


PROBED: dict[str, Any] = {"probe": {"enabled": True, "url": "https://hooks.example.com:8443/in"}}
ELSEWHERE = [{"ipBlock": {"cidr": "203.0.113.0/24"}}]


@pytest.mark.parametrize(
    ("given", "ports"),
    [
        (PROBED, {8443}),
        (merged(PROBED, {"probe": {"url": "http://hooks.example.com/in"}}), {80}),
        (merged(PROBED, {"probe": {"url": "https://hooks.example.com"}}), {443}),
        (merged(PROBED, {"extraEnv": {"HTTPS_PROXY": "http://u:p@proxy:3128"}}), {8443, 3128}),
        (merged(PROBED, {"networkPolicy": {"egress": {"probePorts": [10443]}}}), {10443}),
    ],
    ids=str,
)
def test_the_probe_reaches_its_url_wherever_clerk_is(
    given: dict[str, Any], ports: set[int]
) -> None:
    narrow = {"networkPolicy": {"egress": {"clerk": FRONT, "probe": ELSEWHERE}}}
    found, pods = policies(merged(given, narrow))
    (own,) = [one for one in found if one["metadata"]["name"] == f"{FULLNAME}-probe"]
    probe = by_component(pods)["probe"]
    assert open_to([own], probe, "egress") == dict.fromkeys(ports, ELSEWHERE)
    assert [pod for pod in pods if selects(own, pod)] == [probe]


OTLP = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.mark.parametrize(
    ("given", "ports"),
    [
        ({"extraEnv": {OTLP: "http://collector.tracing:4318"}}, {4318}),
        ({"extraEnv": {OTLP: "http://$(NODE):4318/v1"}}, {4318}),
        ({"extraEnv": {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://[fd00::1]:4319"}}, {4319}),
        ({"networkPolicy": {"egress": {"collectorPorts": [4320]}}}, {4320}),
        ({}, set()),
        # The others whose port a value tells.
        ({"clerk": {"apiUrl": "https://clerk.internal:8444/v1"}}, {8444}),
        ({"database": {"existingSecret": "", "url": "mysql://u:p@[::1]:3309/d"}}, {3309}),
    ],
    ids=str,
)
def test_a_port_that_a_value_tells_is_let_out(given: dict[str, Any], ports: set[int]) -> None:
    found, pods = policies(given)
    everywhere = {53, 5353, 8080, 3306, 443}
    assert open_to(found, by_component(pods)["webhook"], "egress").keys() - everywhere == ports


def test_webhooks_come_in_and_only_prometheus_sees_the_internal_port() -> None:
    found, pods = policies({})
    monitoring = [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    ]
    assert open_to(found, by_component(pods)["webhook"], "ingress") == {
        8080: None,
        8081: monitoring,
    }
    for component in ("migrate", "reconcile", "test"):
        assert open_to(found, by_component(pods)[component], "ingress") == {}

    found, pods = policies({"networkPolicy": {"ingress": {"internal": []}}})
    assert open_to(found, by_component(pods)["webhook"], "ingress") == {8080: None}


@pytest.mark.parametrize("tested", [True, False])
def test_who_may_send_webhooks_can_be_said(*, tested: bool) -> None:
    given = {"networkPolicy": {"ingress": {"webhook": FRONT}}, "tests": {"enabled": tested}}
    found, pods = policies(given)
    peers = open_to(found, by_component(pods)["webhook"], "ingress")[8080] or []
    assert [one for one in peers if one in FRONT] == FRONT
    others = [one["podSelector"]["matchLabels"] for one in peers if one not in FRONT]
    assert len(others) == tested
    for pod in pods:
        is_test = pod.labels["app.kubernetes.io/component"] == "test"
        assert any(rules.matches(one, pod.labels) for one in others) == is_test


def test_pods_reach_dns_database_and_clerk_and_no_more() -> None:
    found, pods = policies({"tests": {"enabled": False}})
    for pod in pods:
        assert open_to(found, pod, "egress").keys() == {53, 5353, 3306, 443}, pod.name
    pieces = {
        "database": {
            "port": 3307,
            "keys": {"password": "p"},
            "host": "h",
            "name": "n",
            "username": "u",
        }
    }
    found, pods = policies(pieces)
    assert 3307 in open_to(found, by_component(pods)["migrate"], "egress")
    assert 3306 not in open_to(found, by_component(pods)["migrate"], "egress")
    found, pods = policies(
        {"networkPolicy": {"egress": {"databasePorts": [6446], "database": FRONT}}}
    )
    assert open_to(found, by_component(pods)["webhook"], "egress")[6446] == FRONT
    found, pods = policies({"networkPolicy": {"egress": {"enabled": False}}})
    assert [one for one in found if "Egress" in one["spec"]["policyTypes"]] == []


def test_apps_pods_are_left_alone() -> None:
    found, _ = policies({"mode": "sidecar"})
    app = rules.Pod({}, {"labels": {"app": "shop", "clerk-sync.dev/sidecar": FULLNAME}}, {})
    assert [one for one in found if selects(one, app)] == []


def test_svix_ranges_are_ranges_with_their_date() -> None:
    assert re.fullmatch(r"20\d\d-[01]\d", SVIX["asOf"])
    assert len(SVIX["ranges"]) > 10
    for one in SVIX["ranges"]:
        assert ipaddress.ip_network(one).is_global, one


def test_the_allow_list_is_svix_and_ones_own() -> None:
    own = {"allowList": {"enabled": True, "extraRanges": ["203.0.113.0/24"]}}
    balanced = render(merged(merged(LEAST, own), {"service": {"type": "LoadBalancer"}}))
    ranges = rules.the(balanced, "Service", FULLNAME)["spec"]["loadBalancerSourceRanges"]
    assert ranges == [*SVIX["ranges"], "203.0.113.0/24"]
    ingress = {
        "ingress": {"enabled": True, "hosts": ["hooks.example.com"]},
        "allowList": {"ingressAnnotation": "example.com/ranges"},
    }
    made = rules.the(render(merged(merged(LEAST, own), ingress)), "Ingress")
    assert made["metadata"]["annotations"]["example.com/ranges"] == ",".join(ranges)
    four = merged(own, {"allowList": {"ipv6": False}, "service": {"type": "LoadBalancer"}})
    ranges = rules.the(render(merged(LEAST, four)), "Service", FULLNAME)["spec"][
        "loadBalancerSourceRanges"
    ]
    assert {ipaddress.ip_network(one).version for one in ranges} == {4}
