"""What a panel of the dashboard is made of, and how its queries are put together.

`$selector` stands for the matchers that the dashboard's variables make, `$installation` for those
without the pod, for series that are recorded by installation. Limits are those of the alerts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from monitoring.rules import INSTALLATION as BY

Kind = Literal["stat", "lines", "stacked", "states", "table"]

# What pages is red, what makes a ticket is orange.
PAGE: Final = "red"
TICKET: Final = "orange"


@dataclass(frozen=True, slots=True)
class Query:
    """One query and its legend; `unit` where it is another than the panel's.

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
    """Rates of a few a minute are what people can read: their sum by a label, if any."""
    grouped = f"sum by ({by})" if by else "sum"
    return f"{grouped} ({one}) * 60"


def quantile(q: float, histogram: str) -> str:
    return f"histogram_quantile({q}, sum by (le) ({rate(f'{histogram}_bucket')}))"


def within(window: str, metric: str, *matchers: str) -> str:
    return f"sum(increase({metric}{{{','.join((*matchers, '$selector'))}}}[{window}]))"


def of_clerk_sync(expr: str) -> str:
    """What every process exposes, of ours alone."""
    return f"{expr} and on ({BY}, instance) clerk_sync_build_info{{$selector}}"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, drawn across all panels. The value is a time, in milliseconds."""

    name: str
    expr: str
    text: str
    color: str
