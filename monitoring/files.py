"""Which files are made of the rules and the dashboard, and what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from monitoring import dashboard
from monitoring.alerts import ALERTS, RUNBOOKS
from monitoring.recordings import RECORDINGS
from monitoring.rules import Alert, Clock, alerting_rule, dumped, recording_rule, rules_file

ROOT: Final = Path(__file__).parents[1]
CHART_ALERTS: Final = ROOT / "charts/clerk-sync/files/alerts"
DASHBOARD: Final = ROOT / "charts/clerk-sync/files/dashboards/clerk-sync.json"
PLAIN: Final = ROOT / "docs/alerts.yaml"

_MADE: Final = "# Made by `make generate` from monitoring/.\n"


def chart_alert(alert: Alert) -> dict[str, Any]:
    """An alert with its tokens left in: the chart's values fill them."""
    rule = alerting_rule(alert, Clock(), runbooks="$runbooks", limit="$threshold")
    return rule if alert.threshold is None else {"threshold": alert.threshold, **rule}


def generated() -> dict[Path, str]:
    """Each generated file's path and text."""
    recordings = [
        {"why": recording.why, **recording_rule(recording, Clock())} for recording in RECORDINGS
    ]
    return {
        DASHBOARD: dashboard.dumped(),
        PLAIN: _MADE + dumped(rules_file(RECORDINGS, ALERTS, runbooks=RUNBOOKS)),
        CHART_ALERTS / "recordings.yaml": _MADE + dumped(recordings),
        **{
            CHART_ALERTS / f"{alert.name}.yaml": _MADE + dumped(chart_alert(alert))
            for alert in ALERTS
        },
    }
