"""Alerts and recordings as values, and how they become a rules file.

An expression holds two tokens. `$selector` stands for label matchers, which narrow it to one
installation: the chart fills in its release's, the plain file none. `$threshold` stands for the
alert's limit. A span of time is written in PromQL's brackets, after `offset`, or, as a number, as
`seconds(900)`: so a test may run the very same rules on a faster clock.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

import yaml

Severity = Literal["critical", "warning"]

# What tells installations apart. A label that nobody sets is empty, and changes nothing.
INSTALLATION: Final = "cluster, namespace, job"

_SPAN: Final = re.compile(r"(\d+)(ms|s|m|h|d|w)")
_SPANS: Final = re.compile(r"(?<=\[)[\dsmhdw:]+(?=\])|(?<=offset )\d+[smhdw]+")
_SECONDS: Final = re.compile(r"seconds\(([^)]+)\)")
_UNIT_SECONDS: Final = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


@dataclass(frozen=True, slots=True)
class Recording:
    """A recorded series, and why it is worth keeping."""

    name: str
    expr: str
    why: str


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert. Critical is a symptom that wakes somebody; warning is a cause, for a ticket.

    `threshold` is None where there is nothing to tune. `seconds` says that it is a span of time.
    """

    name: str
    severity: Severity
    pending: str
    expr: str
    summary: str
    description: str
    threshold: float | None = None
    seconds: bool = False


@dataclass(frozen=True, slots=True)
class Clock:
    """How long a rule's second is; 1 in production."""

    scale: float = 1.0

    def span(self, text: str) -> str:
        """A PromQL duration on this clock."""
        if self.scale == 1:
            return text
        number, unit = _SPAN.fullmatch(text).groups()  # type: ignore[union-attr]
        return f"{round(int(number) * _UNIT_SECONDS[unit] * self.scale * 1000)}ms"

    def seconds(self, seconds: float) -> str:
        """A number of seconds on this clock."""
        return number(seconds * self.scale)

    def expr(self, text: str) -> str:
        """An expression with all of its spans on this clock."""
        text = _SECONDS.sub(lambda found: self.seconds(float(found[1])), text)
        return _SPANS.sub(lambda found: ":".join(map(self.span, found[0].split(":"))), text)


def number(value: float) -> str:
    """A number as people write it: 60, 0.5."""
    return f"{value:.10g}"


def selected(expr: str, selector: str) -> str:
    """The expression, narrowed by these label matchers; without any, no braces are left empty."""
    if selector:
        return expr.replace("$selector", selector)
    return expr.replace("{$selector}", "").replace(",$selector", "")


def recording_rule(recording: Recording, clock: Clock) -> dict[str, Any]:
    """A recording as Prometheus reads it, but for its selector."""
    return {"record": recording.name, "expr": clock.expr(recording.expr)}


def alerting_rule(
    alert: Alert, clock: Clock, *, runbooks: str, limit: str | None = None
) -> dict[str, Any]:
    """An alert as Prometheus reads it, but for its selector; `limit` other than its own."""
    if limit is None and alert.threshold is not None:
        limit = clock.seconds(alert.threshold) if alert.seconds else number(alert.threshold)
    limit = limit or ""
    return {
        "alert": alert.name,
        "expr": clock.expr(alert.expr).replace("$threshold", limit),
        "for": clock.span(alert.pending),
        "labels": {"severity": alert.severity},
        "annotations": {
            "summary": alert.summary,
            "description": alert.description.replace("$threshold", limit),
            "runbook_url": f"{runbooks}/{alert.name}.md",
        },
    }


def rules_file(
    recordings: Iterable[Recording],
    alerts: Iterable[Alert],
    *,
    runbooks: str,
    selector: str = "",
    clock: Clock | None = None,
) -> dict[str, Any]:
    """A whole rules file for Prometheus."""
    clock = clock or Clock()
    groups = {
        "clerk-sync.recordings": [recording_rule(one, clock) for one in recordings],
        "clerk-sync.alerts": [alerting_rule(one, clock, runbooks=runbooks) for one in alerts],
    }
    for rules in groups.values():
        for rule in rules:
            rule["expr"] = selected(rule["expr"], selector)
    return {"groups": [{"name": name, "rules": rules} for name, rules in groups.items()]}


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as such, and lists deeper than what they are of."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002, FBT001, FBT002
        super().increase_indent(flow, False)  # noqa: FBT003


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def dumped(value: object) -> str:
    """YAML in the order of its making."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
