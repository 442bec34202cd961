"""Every alert fires when it should and not when it nearly should, by Prometheus' own judgement."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitoring import files
from monitoring.alerts import ALERTS, RUNBOOKS
from monitoring.recordings import RECORDINGS
from monitoring.rules import Clock, number, rules_file
from tests.monitoring.cases import CASES
from tests.monitoring.prometheus import promtool
from tests.monitoring.series import Case

BY_NAME = {alert.name: alert for alert in ALERTS}


def test_of(case: Case) -> dict[str, Any]:
    """A case in promtool's form: every alert that fires, and what people read of this one."""
    alert = BY_NAME[case.alert]
    firing = sorted([*([case.alert] if case.fires else []), *case.also])
    annotations = {
        "summary": alert.summary,
        "description": case.says,
        "runbook_url": f"{RUNBOOKS}/{alert.name}.md",
    }
    labels = {"severity": alert.severity, **case.labels}
    at = f"{number(case.at)}s"
    return {
        "name": f"{case.alert}: {case.title}",
        "interval": f"{number(case.step)}s",
        "input_series": [
            {"series": str(one), "values": one.values(case.at, case.step)}
            for one in case.all_series()
        ],
        "alert_rule_test": [
            {
                "eval_time": at,
                "alertname": case.alert,
                "exp_alerts": [{"exp_labels": labels, "exp_annotations": annotations}]
                if case.fires
                else [],
            }
        ],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": at,
                "exp_samples": [
                    {"labels": f'{{alertname="{name}"}}', "value": 1} for name in firing
                ],
            }
        ],
    }


test_of.__test__ = False  # type: ignore[attr-defined]


def steps() -> Iterator[tuple[float, list[Case]]]:
    by_step = sorted(CASES, key=lambda case: case.step)
    for step, cases in groupby(by_step, key=lambda case: case.step):
        yield step, list(cases)


@pytest.mark.parametrize(
    ("step", "cases"), [pytest.param(*one, id=f"{one[0]:.0f}s") for one in steps()]
)
def test_each_alert_fires_when_it_should_and_only_then(
    step: float, cases: list[Case], tmp_path: Path
) -> None:
    tests = {
        "rule_files": [str(files.PLAIN)],
        "evaluation_interval": f"{number(step)}s",
        # Else the order is anybody's, and at steps of an hour the last recording is stale.
        "group_eval_order": ["clerk-sync.recordings", "clerk-sync.alerts"],
        "tests": [test_of(case) for case in cases],
    }
    path = tmp_path / "tests.yaml"
    path.write_text(yaml.safe_dump(tests))
    promtool("test", "rules", path)


def test_each_alert_has_a_case_that_fires_it_and_a_near_miss() -> None:
    assert {case.alert for case in CASES if case.fires} == set(BY_NAME)
    assert {case.alert for case in CASES if not case.fires} == set(BY_NAME)


def test_the_rules_pass_prometheus_own_lint() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", files.PLAIN)


def test_narrowed_rules_on_a_faster_clock_are_rules_too(tmp_path: Path) -> None:
    narrowed = rules_file(
        RECORDINGS,
        ALERTS,
        runbooks="https://example.org",
        selector='namespace="shop",job="clerk-sync"',
        clock=Clock(1 / 120),
    )
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(narrowed))
    promtool("check", "rules", "--lint=all", "--lint-fatal", path)
    rules = [rule for group in narrowed["groups"] for rule in group["rules"]]
    assert [rule["expr"] for rule in rules if 'job="clerk-sync"' not in rule["expr"]] == []
    assert "$" not in "".join(rule["expr"] for rule in rules)


def test_generated_files_are_not_stale() -> None:
    for path, text in files.generated().items():
        assert path.read_text("utf-8") == text, f"{path} is stale: run `make generate`"
    there = set(files.CHART_ALERTS.iterdir())
    assert there <= files.generated().keys()
