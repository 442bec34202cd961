"""Series of one installation through one evening, in promtool's notation.

Time begins at 0; a series is one value per step of the case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

MINUTE: Final = 60
HOUR: Final = 60 * MINUTE
DAY: Final = 24 * HOUR

WHERE: Final = {"namespace": "shop", "job": "clerk-sync"}
POD: Final = {**WHERE, "instance": "10.0.0.1:8081", "pod": "clerk-sync-0"}
OTHER_POD: Final = {**WHERE, "instance": "10.0.0.2:8081", "pod": "clerk-sync-1"}

Value = Callable[[float], float | None]


@dataclass(frozen=True)
class Series:
    """One series: its value at each second, None where it was not scraped."""

    name: str
    value: Value
    labels: Mapping[str, str] = field(default_factory=dict)
    target: Mapping[str, str] = field(default_factory=lambda: POD)

    def __str__(self) -> str:
        labels = ",".join(f'{key}="{text}"' for key, text in {**self.target, **self.labels}.items())
        return f"{self.name}{{{labels}}}"

    def values(self, until: float, step: float) -> str:
        """The values in promtool's notation, with repetitions drawn together."""
        runs: list[list[float | int | None]] = []
        for index in range(int(until // step) + 1):
            value = self.value(index * step)
            if runs and runs[-1][0] == value:
                runs[-1][1] += 1  # type: ignore[operator]
            else:
                runs.append([value, 0])
        return " ".join(
            f"{'_' if value is None else f'{value:.10g}'}x{more}"
            if more and value is not None
            else " ".join(["_" if value is None else f"{value:.10g}"] * (int(more or 0) + 1))
            for value, more in runs
        )


def steady(value: float) -> Value:
    return lambda _: value


def until(end: float, before: float | None, after: float | None) -> Value:
    """One value before a time, another from it on."""
    return lambda now: before if now < end else after


def within(start: float, end: float, inside: float, outside: float = 0.0) -> Value:
    return lambda now: inside if start <= now < end else outside


def counting(
    per_minute: float,
    *,
    start: float = 0.0,
    end: float = float("inf"),
    pause: tuple[float, float] = (0.0, 0.0),
) -> Value:
    """A counter that grows between two times, and not in a pause."""

    def value(now: float) -> float:
        paused = max(0.0, min(now, pause[1]) - pause[0])
        return per_minute * max(0.0, min(now, end) - start - paused) / MINUTE

    return value


def every(seconds: float, *, last: float) -> Value:
    """The time of the latest of events that come so often, up to a last one."""
    return lambda now: min(now, last) // seconds * seconds or 1.0


@dataclass(frozen=True)
class Case:
    """One evening of one installation, and which alerts fire at its end.

    `says` is the alert's description as people read it, and `labels` what it carries besides
    its severity.
    """

    alert: str
    title: str
    series: Sequence[Series]
    at: float
    says: str | None = None
    also: Sequence[str] = ()
    labels: Mapping[str, str] = field(default_factory=lambda: WHERE)
    step: float = MINUTE
    here: bool = True

    @property
    def fires(self) -> bool:
        return self.says is not None

    def all_series(self) -> list[Series]:
        """With what every scrape of a healthy process has."""
        healthy = [
            Series("clerk_sync_build_info", steady(1), {"version": "1"}),
            Series("process_start_time_seconds", steady(1)),
            Series("clerk_sync_ready", steady(1)),
        ]
        given = {str(one) for one in self.series}
        return [*(one for one in healthy if self.here and str(one) not in given), *self.series]


def outcomes(value: Value, type_: str = "user.updated", outcome: str = "applied") -> Series:
    return Series("clerk_sync_outcomes_total", value, {"type": type_, "outcome": outcome})


def probes(value: Value) -> Series:
    return outcomes(value, "clerk-sync.probe", "ignored")


def rejected(reason: str, value: Value) -> Series:
    return Series("clerk_sync_rejected_total", value, {"reason": reason})


def unavailable(value: Value, reason: str = "database") -> Series:
    return Series("clerk_sync_unavailable_total", value, {"reason": reason})


def unready(reason: str, value: Value, target: Mapping[str, str] = POD) -> Series:
    return Series("clerk_sync_unready", value, {"reason": reason}, target)


def stale(secret: str, value: Value) -> Series:
    return Series("clerk_sync_secret_stale", value, {"secret": secret})


def quarantined(value: Value) -> Series:
    return Series("clerk_sync_quarantined_total", value, {"reason": "too_long"})


def failing(*, bad: Value, good: Value) -> list[Series]:
    """What the error budget is counted from."""
    return [
        outcomes(good),
        unavailable(bad),
        Series("clerk_sync_errors_total", steady(0)),
        quarantined(steady(0)),
    ]


def ages(*, in_time: Value, late: Value) -> list[Series]:
    """The two series of the histogram that lateness is counted from."""
    name = "clerk_sync_event_age_seconds"

    def both(now: float) -> float:
        return (in_time(now) or 0) + (late(now) or 0)

    return [Series(f"{name}_bucket", in_time, {"le": "60.0"}), Series(f"{name}_count", both)]


def last_success(value: Value, target: Mapping[str, str] = POD) -> Series:
    return Series("clerk_sync_last_success_timestamp_seconds", value, target=target)


def counts(value: Value) -> Series:
    return Series("clerk_sync_clerk_entities", value, {"kind": "user"})


def reconciled(value: Value) -> Series:
    return Series("clerk_sync_reconcile_finished_timestamp_seconds", value)


def drift(name: str, value: Value) -> Series:
    return Series("clerk_sync_reconcile_drift_entities", value, {"kind": "user", "drift": name})


def ended(result: str, value: Value) -> Series:
    return Series("clerk_sync_reconcile_result", value, {"result": result})


def queue(depth: Value) -> list[Series]:
    return [
        Series("clerk_sync_queue_depth", depth),
        Series("clerk_sync_queue_limit", steady(1000)),
    ]
