"""Writes docs/reference/metrics.md from the declarations: `python -m tools.reference`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from prometheus_client import Metric

from clerk_sync import __version__
from clerk_sync.clerk.metrics import new_metrics
from clerk_sync.telemetry.metrics import Metrics
from monitoring.alerts import ALERTS
from monitoring.panels import PANELS
from monitoring.recordings import RECORDINGS

PAGE: Final = Path(__file__).parents[1] / "docs" / "reference" / "metrics.md"

_HEAD: Final = """\
# Metrics

Port 8081 serves `/metrics`. Every series exists from the start, at 0, so the first event is an
increase. Labels have the values that are listed here and no others, whatever clients send.

Values are those of one process. Values that come from the database are the same in every process:
the counts of both sides, the quarantine, and how the last reconcile ended. Take their maximum
over processes, not their sum.

A process has {series} series of its own, besides the Prometheus client's `process_*` and
`python_*`. A scraper that asks for OpenMetrics, as Prometheus does, also gets units, exemplars if
[traces](tracing.md) are on, and the start time of each counter and histogram. Prometheus uses
those times with the feature `created-timestamp-zero-ingestion`. Without it, it stores them as
series, unless its scrape configuration drops them:

```yaml
metric_relabel_configs:
  - {{source_labels: [__name__], regex: clerk_sync_.*_created, action: drop}}
```

`make generate` writes this page from the code.
"""


def name_of(metric: Metric) -> str:
    """The name by which queries know a metric; a histogram's series have suffixes to it."""
    return metric.name + {"counter": "_total", "info": "_info"}.get(metric.type, "")


def own(metrics: Metrics) -> list[Metric]:
    """What a new process exposes of ours."""
    return [one for one in metrics.registry.collect() if one.name.startswith("clerk_sync_")]


def _exposed(metric: Metric) -> list[str]:
    return [one.name for one in metric.samples if one.name != f"{metric.name}_created"]


def _labels(metric: Metric) -> dict[str, list[str]]:
    """Each label's values, in the order in which they are declared."""
    found: dict[str, dict[str, None]] = {}
    for sample in metric.samples:
        for label, value in sample.labels.items():
            if label not in ("le", "version"):
                found.setdefault(label, {})[value] = None
    return {label: [*values] for label, values in found.items()}


def _uses(name: str, expr: str, recorded: dict[str, str], seen: frozenset[str]) -> bool:
    """Whether a query is about this metric, also by what is recorded of it."""
    if re.search(rf"(?<![\w:]){name}(?:_bucket|_sum|_count)?\b", expr):
        return True
    return any(
        _uses(name, recorded[one], recorded, seen | {one})
        for one in recorded.keys() - seen
        if one in expr
    )


def using(name: str) -> tuple[list[str], list[str]]:
    """The titles of the panels and the names of the alerts that use this metric."""
    recorded = {one.name: one.expr for one in RECORDINGS}

    def uses(exprs: Iterable[str]) -> bool:
        return any(_uses(name, expr, recorded, frozenset()) for expr in exprs)

    panels = [one.title for one in PANELS if uses(query.expr for query in one.queries)]
    return panels, [one.name for one in ALERTS if uses([one.expr])]


def _section(metric: Metric, unit: str) -> str:
    name = name_of(metric)
    type_ = "gauge" if metric.type == "info" else metric.type
    lines = [f"## `{name}`", "", f"**{type_.title()}, {unit}.** {metric.documentation}", ""]
    for label, values in _labels(metric).items():
        lines.append(f"- `{label}`: {', '.join(f'`{value}`' for value in values)}")
    if metric.type == "info":
        lines.append(f"- `version`: such as `{__version__}`")
    if metric.type == "histogram":
        bounds = [one.labels["le"] for one in metric.samples if "le" in one.labels][:-1]
        lines.append(f"- Buckets: {', '.join(bound.removesuffix('.0') for bound in bounds)}")
    panels, alerts = using(name)
    if panels:
        lines.append(f"- Panels: {', '.join(panels)}")
    if alerts:
        links = (f"[{alert}](../runbooks/{alert}.md)" for alert in alerts)
        lines.append(f"- Alerts: {', '.join(links)}")
    return "\n".join(lines).rstrip() + "\n"


def text() -> str:
    """The whole page."""
    metrics = new_metrics()
    found = own(metrics)
    series = sum(len(_exposed(metric)) for metric in found)
    sections = [_section(metric, metrics.units[metric.name]) for metric in found]
    return "\n".join([_HEAD.format(series=series), *sections])


if __name__ == "__main__":
    PAGE.write_text(text(), "utf-8")
