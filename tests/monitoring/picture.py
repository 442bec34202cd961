"""An evening as the dashboard shows it, on one page: each panel at its place, with its limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox

from monitoring import dashboard
from monitoring.alerts import ALERTS
from monitoring.panel import Panel
from monitoring.panels import PANELS
from monitoring.rules import Clock
from monitoring.thresholds import HOUR, MINUTE
from tests.monitoring.installation import CLOCK, DAYS_CLOCK, SCRAPE_SECONDS, legend_of, query_of
from tests.monitoring.prometheus import Watching

# The evening begins at six.
BEGINS: Final = 18 * HOUR
DPI: Final = 100
UNIT: Final = 0.42
WIDTH: Final = 16.0
LINE: Final = 0.3
MORE: Final = 5
# Inches of the first rows, which the README shows.
TOP: Final = 8.75

PAPER, INK, DIM, FAINT = "#111217", "#d8d9da", "#8e9197", "#2c3035"
# Inches left, right, below and above of what is drawn in a panel.
_MARGINS: Final = {
    "stat": (0.08, 0.08, 0.24, 0.95),
    "states": (0.95, 0.2, 0.35, 0.42),
    "table": (1.7, 0.2, 0.3, 0.42),
}
COLORS: Final = {
    "green": "#73bf69",
    "orange": "#ff9830",
    "red": "#f2495c",
    "dark-red": "#c4162a",
    "blue": "#5794f2",
    "light-blue": "#8ab8ff",
    "purple": "#b877d9",
    "yellow": "#fade2a",
    "text": INK,
    "transparent": FAINT,
}
PALETTE: Final = ("#73bf69", "#5794f2", "#ff9830", "#b877d9", "#fade2a", "#8ab8ff", "#ff7383")
PAGING: Final = {alert.name for alert in ALERTS if alert.severity == "critical"}
# Their rule looks back over days: they are on its clock.
ON_DAYS: Final = {"Last reconcile", "Since the last reconcile"}


@dataclass(frozen=True)
class Line:
    """One series over the evening, in the rules' time."""

    legend: str
    unit: str
    over: bool
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Shade:
    """A scene, by its number."""

    number: int
    name: str
    start: float
    end: float


async def lines_of(watching: Watching, panel: Panel, start: float, end: float) -> list[Line]:
    """Ask every query of a panel over the evening."""
    clock = DAYS_CLOCK if panel.title in ON_DAYS else CLOCK
    found = []
    for query in panel.queries:
        unit = query.unit or panel.unit
        factor = _factor(query.expr, unit, clock)
        over = await watching.over(query_of(query.expr), start, end, SCRAPE_SECONDS)
        for labels, points in over.items():
            turned = [(moved(at - start), value * factor) for at, value in points]
            legend = legend_of(query, labels) or dict(labels).get("alertname", "")
            found.append(Line(legend, unit, query.over, turned))
    return found


def moved(seconds: float) -> float:
    """A time of this evening on the clock that people read."""
    return seconds / CLOCK.scale + BEGINS


def _factor(expr: str, unit: str, clock: Clock) -> float:
    """What turns a value of this evening into one of the rules' time."""
    if unit == "cpm":
        return clock.scale
    if unit == "s" and ("time()" in expr or "seconds(" in expr):
        return 1 / clock.scale
    return 1.0


def draw(found: dict[str, list[Line]], shades: Sequence[Shade], path: Path) -> None:
    """Draw the page."""
    head = 0.9 + LINE * math.ceil(len(shades) / 4)
    height = max(place[1] + place[3] for place in _places().values()) * UNIT + head
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    _head(figure, shades, height)
    for title, (x, y, wide, high) in _places().items():
        left, bottom = x / 24 * WIDTH, height - head - (y + high) * UNIT
        box = (left / WIDTH, bottom / height, wide / 24, high * UNIT / height)
        panel = next((one for one in PANELS if one.title == title), None)
        if panel is None:
            figure.text(box[0] + 0.006, box[1] + 0.0008, title, color=INK, size=13, weight="bold")
            continue
        _panel(figure, box, panel, found[title], shades)
    figure.savefig(path)
    top = Bbox.from_extents(0, height - TOP, WIDTH, height)
    figure.savefig(path.with_stem(f"{path.stem}-top"), bbox_inches=top)


def _places() -> dict[str, tuple[int, int, int, int]]:
    """Where the dashboard has each row and panel: left, top, width, height.

    The table of alerts is a line for each that fired here, and needs more room.
    """
    found, below = {}, 0
    for one in dashboard.dashboard().build().panels or ():
        at = one.grid_pos
        if at is not None:
            more = MORE if one.type_val == "table" else 0
            found[one.title or ""] = (at.x, at.y + below, at.w, at.h + more)
            below += more
    return found


def _head(figure: Figure, shades: Sequence[Shade], height: float) -> None:
    say = "clerk-sync: one evening of trouble, as the dashboard shows it"
    figure.text(0.008, 1 - 0.35 / height, say, color=INK, size=17, weight="bold")
    many = math.ceil(len(shades) / 4)
    for index, shade in enumerate(shades):
        x, y = index // many * 0.25 + 0.008, 0.8 + index % many * LINE
        text = f"{shade.number}  {_clock(shade.start)}  {shade.name}"
        figure.text(x, 1 - y / height, text, color=INK, size=9.5)


def _panel(
    figure: Figure,
    box: tuple[float, float, float, float],
    panel: Panel,
    lines: Sequence[Line],
    shades: Sequence[Shade],
) -> None:
    left, bottom, wide, high = box
    inch = high / _inches(panel)
    before, after, below, above = _MARGINS.get(panel.kind, (0.62, 0.55, 0.62, 0.42))
    axes = figure.add_axes(
        (
            left + before / WIDTH,
            bottom + inch * below,
            wide - (before + after) / WIDTH,
            high - inch * (below + above),
        ),
        facecolor=PAPER,
    )
    figure.text(
        left + 0.005, bottom + high - inch * 0.26, panel.title, color=INK, size=10, weight="bold"
    )
    axes.set_xlim(shades[0].start, shades[-1].end)
    for spine in axes.spines.values():
        spine.set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=7.5, length=2)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 1.8, 3.6, 7.2]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _clock(value)))
    for shade in shades:
        if shade.number % 2:
            axes.axvspan(shade.start, shade.end, color="#ffffff", alpha=0.06, lw=0)
        if panel.kind != "stat" and _is_wide(shade, shades):
            axes.annotate(
                str(shade.number),
                ((shade.start + shade.end) / 2, 1.01),
                xycoords=("data", "axes fraction"),
                ha="center",
                color=DIM,
                size=6.5,
            )
    if panel.kind == "stat":
        _stat(axes, panel, lines)
    elif panel.kind in ("states", "table"):
        _states(axes, panel, lines)
    else:
        _graph(axes, panel, lines)


def _is_wide(shade: Shade, shades: Sequence[Shade]) -> bool:
    return (shade.end - shade.start) * 50 > shades[-1].end - shades[0].start


def _inches(panel: Panel) -> float:
    return (dashboard.HEIGHTS[panel.kind] + (MORE if panel.kind == "table" else 0)) * UNIT


def _stat(axes: Axes, panel: Panel, lines: Sequence[Line]) -> None:
    """The value at the end, and its colour over the evening."""
    axes.set_yticks([])
    axes.set_ylim(0, 1)
    axes.set_xticks([])
    judged = lines[-1:] if len(lines) > 1 else lines
    for line in judged:
        for at, value in line.points:
            color = _level(panel, value)
            axes.axvspan(at, at + SCRAPE_SECONDS / CLOCK.scale, color=color, lw=0)
    said = [_said(panel, line, line.points[-1][1]) for line in lines if line.points]
    worst = [_said(panel, line, _worst(panel, line)) for line in judged if line.points]
    for text, size, y in (
        (" · ".join(said) or panel.empty, 15, 1.25),
        (f"worst: {', '.join(worst)}", 7.5, -0.35),
    ):
        axes.text(0, y, text, color=INK, size=size, weight="bold", transform=axes.transAxes)


def _worst(panel: Panel, line: Line) -> float:
    values = [value for _, value in line.points if not math.isnan(value)]
    return min(values) if panel.texts else max(values)


def _said(panel: Panel, line: Line, value: float) -> str:
    if int(value) in panel.texts:
        return panel.texts[int(value)][0]
    return _unit(line.unit)(value, 0)


def _level(panel: Panel, value: float) -> str:
    if panel.texts:
        return COLORS[panel.texts[int(value)][1]]
    passed = [level.color for level in panel.levels if value >= level.value]
    return COLORS[passed[-1] if passed else "green"]


def _states(axes: Axes, panel: Panel, lines: Sequence[Line]) -> None:
    shown = sorted(lines, key=lambda line: line.legend, reverse=True)
    axes.set_ylim(-0.5, max(len(shown), 1) - 0.5)
    axes.set_yticks(range(len(shown)), [line.legend.removeprefix("ClerkSync") for line in shown])
    for row, line in enumerate(shown):
        for at, value in line.points:
            color = COLORS["red" if line.legend in PAGING else "orange"]
            if panel.texts:
                color = COLORS[panel.texts[int(value)][1]]
                if value and line.legend in panel.colors:
                    color = COLORS[panel.colors[line.legend]]
            axes.barh(row, SCRAPE_SECONDS / CLOCK.scale, left=at, height=0.7, color=color, lw=0)
    axes.tick_params(axis="y", labelsize=6.5)


def _graph(axes: Axes, panel: Panel, lines: Sequence[Line]) -> None:
    colors = {line.legend: _named(panel, line.legend, index) for index, line in enumerate(lines)}
    stacked = [line for line in lines if panel.kind == "stacked" and not line.over]
    if stacked:
        times = sorted({at for line in stacked for at, _ in line.points})
        by_line = [dict(line.points) for line in stacked]
        heights = [[_finite(points.get(at, 0.0)) for at in times] for points in by_line]
        axes.stackplot(
            times, *heights, colors=[colors[line.legend] for line in stacked], alpha=0.75, lw=0
        )
    for line in lines:
        if line not in stacked:
            at, values = zip(*_with_gaps(line.points), strict=True)
            same = line.unit == panel.unit
            (axes if same else _beside(axes, line)).plot(
                at, values, color=colors[line.legend], lw=1.1, ls="-" if same else ":"
            )
    for level in panel.levels:
        axes.axhline(level.value, color=COLORS[level.color], ls="--", lw=1)
    top = max(
        (_finite(v) for line in lines for _, v in line.points if line.unit == panel.unit), default=1
    )
    highest = axes.get_ylim()[1] if stacked and top else top * 1.1
    axes.set_ylim(0, max(highest, panel.top or 0) or 1)
    axes.yaxis.set_major_formatter(FuncFormatter(_unit(panel.unit)))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(color=FAINT, lw=0.6)
    _legend(axes, lines, colors)


def _legend(axes: Axes, lines: Sequence[Line], colors: dict[str, str]) -> None:
    some = [line for line in lines if any(_finite(value) for _, value in line.points)]
    handles = [Line2D([], [], color=colors[line.legend], lw=2) for line in some[:8]]
    axes.legend(
        handles,
        [line.legend or "value" for line in some],
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.09),
        ncols=8,
        frameon=False,
        fontsize=7,
        labelcolor=INK,
        handlelength=0.8,
        handletextpad=0.4,
        columnspacing=1.0,
    )


def _beside(axes: Axes, line: Line) -> Axes:
    twin = axes.twinx()
    twin.tick_params(colors=INK, labelsize=7, length=2)
    twin.yaxis.set_major_formatter(FuncFormatter(_unit(line.unit)))
    return twin


def _named(panel: Panel, legend: str, index: int) -> str:
    color = panel.colors.get(legend)
    if color is None:
        return PALETTE[index % len(PALETTE)]
    return COLORS.get(color, color)


def _with_gaps(points: Sequence[tuple[float, float]]) -> Iterable[tuple[float, float]]:
    """The points, with nothing between those that are not neighbours."""
    last = points[0][0]
    for at, value in points:
        if at - last > 3 * SCRAPE_SECONDS / CLOCK.scale:
            yield last, math.nan
        yield at, value
        last = at


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _clock(seconds: float) -> str:
    minutes = round(seconds / MINUTE)
    return f"{minutes // 60 % 24:02}:{minutes % 60:02}"


def _unit(unit: str) -> Callable[[float, object], str]:
    known: dict[str, Callable[[float, object], str]] = {
        "s": _seconds,
        "percentunit": _percent,
        "bytes": _mib,
        "cpm": _a_minute,
    }
    return known.get(unit, _plain)


def _plain(value: float, _: object) -> str:
    return f"{value:.6g}"


def _seconds(value: float, _: object) -> str:
    for size, name in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if abs(value) >= size:
            return f"{value / size:.3g} {name}"
    return f"{value * 1000:.3g} ms" if value else "0"


def _percent(value: float, _: object) -> str:
    return f"{value * 100:.3g} %"


def _mib(value: float, _: object) -> str:
    return f"{value / 2**20:.0f} MiB"


def _a_minute(value: float, _: object) -> str:
    return f"{value:.3g}/min"
