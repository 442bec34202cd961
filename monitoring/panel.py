"""The parts of a dashboard panel, and how its queries are built.

`$selector` stands for the matchers from the dashboard's variables. `$installation` stands for the
same without the pod, for series recorded per installation. Limits are those of the alerts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from monitoring.rules import INSTALLATION as BY

Kind = Literal["stat", "lines", "stacked", "states", "table"]

# Red pages, orange opens a ticket.
PAGE: Final = "red"
TICKET: Final = "orange"


@dataclass(frozen=True, slots=True)
class Query:
    """One query and its legend; `unit` if it differs from the panel's.

    `over` draws it as a line over a stack.
    """

    expr: str
    legend: str
    unit: str | None = None
    over: bool = False


@dataclass(frozen=True, slots=True)
class Level:
    """From this value on, the panel has this colour."""

    value: float
    color: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel; `tells` is for somebody who has never seen it, `alerts` are those it explains."""

    title: str
    kind: Kind
    unit: str
    tells: str
    queries: tuple[Query, ...]
    levels: tuple[Level, ...] = ()
    alerts: tuple[str, ...] = ()
    empty: str = "none"
    texts: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    colors: Mapping[str, str] = field(default_factory=dict)
    top: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


def rate(metric: str, *matchers: str) -> str:
    """The rate of a counter's series."""
    return f"rate({metric}{{{','.join((*matchers, '$selector'))}}}[$__rate_interval])"


def a_minute(by: str, one: str) -> str:
    """A rate per minute, which is easier to read: the sum by a label, if any."""
    grouped = f"sum by ({by})" if by else "sum"
    return f"{grouped} ({one}) * 60"


def quantile(q: float, histogram: str) -> str:
    return f"histogram_quantile({q}, sum by (le) ({rate(f'{histogram}_bucket')}))"


def within(window: str, metric: str, *matchers: str) -> str:
    return f"sum(increase({metric}{{{','.join((*matchers, '$selector'))}}}[{window}]))"


def of_clerk_sync(expr: str) -> str:
    """Restrict a metric that every process exposes to clerk-sync's processes."""
    return f"{expr} and on ({BY}, instance) clerk_sync_build_info{{$selector}}"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, drawn across all panels. The value is a time, in milliseconds."""

    name: str
    expr: str
    text: str
    color: str
