"""The dashboard keeps the rules that Grafana's dashboard-linter has, and a few of our own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from clerk_sync.clerk.metrics import new_metrics
from monitoring import dashboard, files
from monitoring.alerts import ALERTS, RUNBOOKS
from monitoring.panels import EVENTS, PANELS
from monitoring.recordings import RECORDINGS
from tests.monitoring.prometheus import promtool

MADE: dict[str, Any] = json.loads(files.DASHBOARD.read_text("utf-8"))
SHOWN: list[dict[str, Any]] = [panel for panel in MADE["panels"] if panel["type"] != "row"]
BY_TITLE = [pytest.param(panel, id=panel["title"]) for panel in SHOWN]
MATCHED = re.compile(r"((?:clerk_sync|process|job|job_kind)[_:][a-z0-9_:]+|ALERTS)(\{[^}]*\})?")
# What an alert judges by is shown over the alert's own window, not over the zoom.
WINDOWS = {"[15m]", "[30m]", "[1h]"}


def queries() -> Iterator[str]:
    for panel in SHOWN:
        for target in panel["targets"]:
            yield target["expr"]
    for annotation in MADE["annotations"]["list"]:
        yield annotation["expr"]


def exposed() -> dict[str, str]:
    """Each series' name and the type of its metric."""
    found = {"ALERTS": "gauge", **{recording.name: "gauge" for recording in RECORDINGS}}
    for metric in new_metrics().registry.collect():
        found |= {sample.name: metric.type for sample in metric.samples}
    return found


def test_it_is_at_its_place_for_good() -> None:
    assert MADE["uid"] == "clerk-sync"
    assert MADE["schemaVersion"] == 42
    assert MADE["editable"] is False
    assert files.DASHBOARD.stat().st_size < 256 * 1024


def test_its_variables_narrow_each_other() -> None:
    source, *variables = MADE["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    assert [one["name"] for one in variables] == ["cluster", "namespace", "job", "pod"]
    for before, one in enumerate(variables):
        assert one["type"] == "query"
        assert one["label"]
        assert one["refresh"] == 2, "the choice follows the time range"
        assert one["multi"]
        assert one["includeAll"]
        assert one["allValue"] == dashboard.VARIABLES[one["name"]]
        assert one["datasource"]["uid"] == "${datasource}"
        for other in variables[:before]:
            assert f'{other["name"]}=~"${other["name"]}"' in one["query"]


@pytest.mark.parametrize("panel", BY_TITLE)
def test_every_panel_explains_itself(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert len(panel["description"].split()) >= 5
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"]["uid"] == "${datasource}"
    assert panel["targets"]
    for target in panel["targets"]:
        assert target["datasource"]["uid"] == "${datasource}"
        assert target.get("legendFormat") or panel["type"] == "table"
        assert target.get("instant") or target.get("range")


def test_titles_and_numbers_are_unique_and_nothing_overlaps() -> None:
    assert len({panel["title"] for panel in SHOWN}) == len(SHOWN) <= 31
    assert len({panel["id"] for panel in MADE["panels"]}) == len(MADE["panels"])
    cells = set[tuple[int, int]]()
    for panel in MADE["panels"]:
        at = panel["gridPos"]
        mine = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & mine, panel["title"]
        assert max(x for x, _ in mine) < 24
        cells |= mine


def test_every_series_exists_and_is_narrowed_by_the_variables() -> None:
    known = exposed()
    for query in queries():
        found = [match for match in MATCHED.finditer(query) if match[1] in known]
        assert found, query
        for match in MATCHED.finditer(query):
            assert match[1] in known, f"{match[1]} in {query}"
            matchers = match[2] or ""
            wanted = list(dashboard.VARIABLES)
            if match[1].startswith(("job", "ALERTS")):
                wanted.remove("pod")
            assert [f'{name}=~"${name}"' in matchers for name in wanted] == [True] * len(wanted), (
                query
            )


def test_counters_are_read_by_their_growth() -> None:
    known = exposed()
    for query in queries():
        for match in MATCHED.finditer(query):
            if known[match[1]] in ("counter", "histogram"):
                assert query[: match.start()].endswith(("rate(", "increase(")), query


def test_ranges_follow_the_scrapes() -> None:
    for query in queries():
        ranges = set(re.findall(r"\[[^\]]*\]", query))
        assert ranges <= {"[$__rate_interval]", *WINDOWS}, query
    alerts = "".join(alert.expr for alert in ALERTS)
    recorded = "".join(recording.expr for recording in RECORDINGS)
    assert {window for window in WINDOWS if window not in alerts + recorded} == set()


def test_every_query_is_one(tmp_path: Path) -> None:
    """With the variables as Grafana fills them."""
    filled = [
        re.sub(r"\$(cluster|namespace|job|pod)\b", "a|b", query).replace("$__rate_interval", "4m")
        for query in queries()
    ]
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(filled)]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    promtool("check", "rules", path)


def test_every_alert_has_a_panel_that_shows_it_and_links_its_runbook() -> None:
    names = {alert.name for alert in ALERTS}
    assert {name for panel in PANELS for name in panel.alerts} == names
    for panel, made in zip(PANELS, SHOWN, strict=True):
        urls = [link["url"] for link in made["links"]]
        assert urls == [f"{RUNBOOKS}/{name}.md" for name in panel.alerts]


def test_what_happened_is_drawn_across_all_panels() -> None:
    drawn = MADE["annotations"]["list"]
    assert [one["name"] for one in drawn] == [event.name for event in EVENTS]
    assert all(one["enable"] and one["useValueForTime"] for one in drawn)


def test_it_is_not_stale() -> None:
    assert files.DASHBOARD.read_text("utf-8") == dashboard.dumped(), "run `make generate`"
