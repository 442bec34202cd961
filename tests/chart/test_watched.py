"""What watches a release: its rules are those that promtool tests, and find what is scraped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from monitoring import files
from monitoring.alerts import ALERTS, RUNBOOKS
from monitoring.recordings import PROBE_EXPECTED, RECORDINGS
from monitoring.rules import rules_file
from tests.chart.helm import FULLNAME, LEAST, NAMESPACE, Object, merged, render
from tests.monitoring.prometheus import promtool

INGRESS: Final = {"ingress": {"enabled": True, "hosts": ["hooks.example.com"]}}
ROUTE: Final = {
    "httpRoute": {
        "enabled": True,
        "hostnames": ["route.example.com"],
        "parentRefs": [{"name": "gateway"}],
    }
}
SELECTOR: Final = f'namespace="{NAMESPACE}",job="{FULLNAME}"'
MODES: Final = [pytest.param({}, id="standalone"), pytest.param({"mode": "sidecar"}, id="sidecar")]


def watched(values: Mapping[str, Any]) -> dict[str, list[Object]]:
    """The objects by kind."""
    found: dict[str, list[Object]] = {}
    for one in render(merged(LEAST, values)):
        found.setdefault(one["kind"], []).append(one)
    return found


def groups(values: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    (rule,) = watched(merged({"alerts": {"enabled": True}}, values))["PrometheusRule"]
    return {group["name"]: group["rules"] for group in rule["spec"]["groups"]}


def alerts(**values: Any) -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in groups({"alerts": values})["clerk-sync.alerts"]}


def plain() -> dict[str, list[dict[str, Any]]]:
    made = rules_file(RECORDINGS, ALERTS, runbooks=RUNBOOKS, selector=SELECTOR)
    return {group["name"]: group["rules"] for group in made["groups"]}


def of_probes(values: Mapping[str, Any]) -> list[Object]:
    crons = watched(values).get("CronJob", [])
    return [one for one in crons if one["metadata"]["name"].endswith("-probe")]


def test_nothing_is_made_unasked() -> None:
    assert {"PrometheusRule", "CronJob", "ServiceMonitor"} & watched({}).keys() == set()


@pytest.mark.parametrize("mode", MODES)
def test_the_rules_are_those_that_are_tested_narrowed_to_the_release(mode: dict[str, Any]) -> None:
    made = groups(mode)
    assert made.keys() == plain().keys()
    for name, rules in plain().items():
        key = "alert" if name.endswith("alerts") else "record"
        assert {rule[key]: rule for rule in made[name]} == {rule[key]: rule for rule in rules}
        assert [rule["expr"] for rule in made[name] if SELECTOR not in rule["expr"]] == []


@pytest.mark.parametrize("mode", MODES)
def test_the_rules_find_what_the_monitor_scrapes(mode: dict[str, Any]) -> None:
    made = watched(merged(mode, {"monitor": {"enabled": True}, "alerts": {"enabled": True}}))
    ((monitor,),) = [found for kind, found in made.items() if kind.endswith("Monitor")]
    spec = monitor["spec"]
    (endpoint,) = spec.get("endpoints") or spec["podMetricsEndpoints"]
    assert {"targetLabel": "job", "replacement": FULLNAME} in endpoint["relabelings"]
    assert spec["namespaceSelector"] == {"matchNames": [NAMESPACE]}


def test_rules_of_the_operator_are_rules_of_prometheus(tmp_path: Path) -> None:
    (rule,) = watched({"alerts": {"enabled": True}, "probe": {"enabled": True}, **INGRESS})[
        "PrometheusRule"
    ]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(rule["spec"]))
    promtool("check", "rules", "--lint=all", "--lint-fatal", path)
    assert "$selector" not in path.read_text()
    assert "$threshold" not in path.read_text()
    assert "$runbooks" not in path.read_text()


def test_alerts_can_be_left_out() -> None:
    name = "ClerkSyncReconcileOld"
    assert name in alerts()
    assert name not in alerts(excludeRules=[name])
    assert name not in alerts(rules={name: {"enabled": False}})
    assert len(alerts(excludeRules=[name])) == len(ALERTS) - 1
    none = groups({"alerts": {"excludeRules": [alert.name for alert in ALERTS]}})
    assert none.keys() == {"clerk-sync.recordings"}


def test_alerts_can_be_tuned() -> None:
    name, other = "ClerkSyncQuarantineNotEmpty", "ClerkSyncErrorBudgetBurnFast"
    own = {"for": "1h", "severity": "info", "threshold": 7, "labels": {"team": "accounts"}}
    made = alerts(
        additionalLabels={"team": "platform", "page": "yes"},
        rules={name: own, other: {"threshold": 0.02}},
        runbookUrl="https://runbooks.example.com/",
    )
    tuned, kept = made[name], made["ClerkSyncAbsent"]
    assert tuned["for"] == "1h"
    assert tuned["labels"] == {"severity": "info", "team": "accounts", "page": "yes"}
    assert tuned["expr"].endswith("> 7")
    assert kept["labels"] == {"severity": "critical", "team": "platform", "page": "yes"}
    url = tuned["annotations"]["runbook_url"]
    assert url == "https://runbooks.example.com/ClerkSyncQuarantineNotEmpty.md"
    assert made[other]["expr"].count("> 14.4 * 0.02") == 2
    assert "above the 0.02 that is allowed" in made[other]["annotations"]["description"]


def test_the_dashboard_is_the_one_that_is_tested() -> None:
    values = {"dashboard": {"enabled": True, "labels": {"grafana_dashboard": "1"}}}
    (made,) = [
        one for one in watched(values)["ConfigMap"] if one["metadata"]["name"].endswith("dashboard")
    ]
    assert made["data"]["clerk-sync.json"] == files.DASHBOARD.read_text("utf-8")
    assert made["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert len(json.dumps(made)) < 256 * 1024


def test_the_dashboard_leads_to_ones_own_runbooks() -> None:
    values = {
        "dashboard": {"enabled": True, "labels": {"of": "grafana"}, "namespace": "grafana"},
        "alerts": {"runbookUrl": "https://runbooks.example.com"},
    }
    (made,) = [one for one in watched(values)["ConfigMap"] if "of" in one["metadata"]["labels"]]
    assert made["metadata"]["namespace"] == "grafana"
    text = made["data"]["clerk-sync.json"]
    assert RUNBOOKS not in text
    for alert in ALERTS:
        assert f"https://runbooks.example.com/{alert.name}.md" in text


@pytest.mark.parametrize(
    ("values", "url"),
    [
        pytest.param(INGRESS, "https://hooks.example.com/webhooks/clerk", id="ingress"),
        pytest.param(ROUTE, "https://route.example.com/webhooks/clerk", id="route"),
        pytest.param(
            {**INGRESS, "probe": {"url": "https://other.example.com/x"}},
            "https://other.example.com/x",
            id="given",
        ),
    ],
)
def test_the_probe_goes_the_way_of_clerk(values: dict[str, Any], url: str) -> None:
    (made,) = of_probes(merged({"probe": {"enabled": True}}, values))
    (container,) = made["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["clerk-sync", "probe", "--url", url, "--seconds", "30"]


@pytest.mark.parametrize("mode", MODES)
def test_the_probe_knows_the_signing_secret_and_nothing_else(mode: dict[str, Any]) -> None:
    probe = {"enabled": True, "url": "https://hooks.example.com/webhooks/clerk"}
    (made,) = of_probes(merged(mode, {"probe": probe, "clerk": {"instanceId": "ins_1"}}))
    (container,) = made["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    names = {variable["name"] for variable in container["env"]}
    secrets = {name for name in names if "SECRET" in name or "DATABASE" in name}
    assert secrets == {"CLERK_WEBHOOK_SIGNING_SECRET_FILE"}
    assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_a_probe_that_runs_is_expected() -> None:
    def recorded(**probe: Any) -> list[str]:
        rules = groups({**INGRESS, "probe": probe})["clerk-sync.recordings"]
        return [rule["expr"] for rule in rules if rule["record"] == PROBE_EXPECTED]

    (expected,) = recorded(enabled=True)
    assert SELECTOR in expected
    assert recorded(enabled=True, suspend=True) == []
    assert recorded(enabled=False) == []
