"""The events that the chart's notes ask to be ticked are those that the service acts on."""

from __future__ import annotations

from collections import defaultdict

import yaml

from clerk_sync.events import ACTIONS
from tests.chart.helm import CHART


def test_the_chart_knows_the_events_of_every_object() -> None:
    known = defaultdict(set)
    for type_, (kind, _) in ACTIONS.items():
        known[kind].add(type_.removeprefix(f"{kind}."))
    listed = yaml.safe_load((CHART / "files" / "events.yaml").read_text("utf-8"))
    assert {kind: set(actions) for kind, actions in listed.items()} == known
