"""The dashboard as Grafana reads it, made of `panels`.

Classic JSON: what is provisioned from a ConfigMap, and what every Grafana from 11 on reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import count
from typing import Final

from grafana_foundation_sdk.builders import common, prometheus, stat, statetimeline, table
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders import timeseries as lines
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import prometheus as promql

from monitoring.alerts import RUNBOOKS
from monitoring.panel import Event, Level, Panel, Query, Row
from monitoring.panels import EVENTS, ROWS
from monitoring.rules import Clock

UID: Final = "clerk-sync"
README: Final = RUNBOOKS.removesuffix("docs/runbooks") + "README.md"

# The variables, each narrowed by those before it. All of them at once is the default, so that
# labels which a Prometheus does not have exclude nothing.
VARIABLES: Final = {"cluster": ".*", "namespace": ".*", "job": ".+", "pod": ".*"}
SELECTOR: Final = ",".join(f'{name}=~"${name}"' for name in VARIABLES)
INSTALLATION: Final = ",".join(f'{name}=~"${name}"' for name in VARIABLES if name != "pod")

_SOURCE: Final = kinds.DataSourceRef(type_val="prometheus", uid="${datasource}")
_WIDTH: Final = 24
HEIGHTS: Final = {"stat": 4, "table": 5, "lines": 8, "stacked": 8, "states": 8}
# How many stand beside each other, by how many there are in a row.
_BESIDE: Final = {2: (2,), 3: (3,), 4: (4,), 5: (3, 2), 7: (6, 1)}

AnyPanel = stat.Panel | lines.Panel | statetimeline.Panel | table.Panel


def filled(expr: str) -> str:
    """A query with the variables' matchers in it."""
    expr = Clock().expr(expr)
    return expr.replace("$selector", SELECTOR).replace("$installation", INSTALLATION)


def dumped() -> str:
    """The dashboard's JSON."""
    made = json.loads(JSONEncoder(sort_keys=True).encode(dashboard().build()))
    # The library hides links and annotations in a menu; whoever is paged needs them in sight.
    for shown in (made, *made["panels"]):
        for one in (*shown.get("links", ()), *shown.get("annotations", {}).get("list", ())):
            one.pop("placement", None)
    return json.dumps(made, indent=2, ensure_ascii=False) + "\n"


def dashboard() -> build.Dashboard:
    """The dashboard, every panel at its fixed place, under its fixed number."""
    made = (
        build.Dashboard("clerk-sync")
        .uid(UID)
        .description("Is the sync between Clerk and the tables healthy?")
        .tags(["clerk-sync"])
        .readonly()
        .refresh("1m")
        .time("now-6h", "now")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .links([_link("Runbooks", f"{RUNBOOKS}/README.md"), _link("README", README)])
        .with_variable(
            build.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
    )
    for variable in _variables():
        made.with_variable(variable)
    for event in EVENTS:
        made.annotation(_annotation(event))
    ids, top = count(1), 0
    for row in ROWS:
        made.with_row(build.Row(row.title).id(next(ids)).grid_pos(_place(0, top, _WIDTH, 1)))
        top = _add(made, row, ids, top + 1)
    return made


def _add(made: build.Dashboard, row: Row, ids: count[int], top: int) -> int:
    """Add a row's panels; where the next row begins."""
    panels = iter(row.panels)
    for beside in _BESIDE[len(row.panels)]:
        line = [next(panels) for _ in range(beside)]
        height = HEIGHTS[line[0].kind]
        for index, panel in enumerate(line):
            width = _WIDTH // beside
            place = _place(index * width, top, width, height)
            made.with_panel(_panel(panel).id(next(ids)).grid_pos(place))
        top += height
    return top


def _place(x: int, y: int, w: int, h: int) -> models.GridPos:
    return models.GridPos(x=x, y=y, w=w, h=h)


def _link(title: str, url: str) -> build.DashboardLink:
    return (
        build.DashboardLink(title)
        .type(models.DashboardLinkType.LINK)
        .url(url)
        .icon("doc")
        .target_blank(target_blank=True)
    )


def _variables() -> list[build.QueryVariable]:
    made, narrowing = [], list[str]()
    for name, every in VARIABLES.items():
        query = f"label_values(clerk_sync_build_info{{{','.join(narrowing)}}}, {name})"
        made.append(
            build.QueryVariable(name)
            .label(name.capitalize())
            .datasource(_SOURCE)
            .query(query.replace("{}", ""))
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(models.VariableSort.ALPHABETICAL_ASC)
            .multi(multi=True)
            .include_all(include_all=True)
            .all_value(every)
            .current(models.VariableOption(selected=True, text="All", value="$__all"))
        )
        narrowing.append(f'{name}=~"${name}"')
    return made


def _annotation(event: Event) -> build.AnnotationQuery:
    return (
        build.AnnotationQuery()
        .name(event.name)
        .datasource(_SOURCE)
        .enable(enable=True)
        .icon_color(event.color)
        .expr(filled(event.expr))
        .title_format(event.text)
        .step("60s")
        .use_value_for_time(use_value_for_time=True)
    )


def _panel(panel: Panel) -> AnyPanel:
    made = _SHAPES[panel.kind](panel)
    made.title(panel.title).description(panel.tells).unit(panel.unit).datasource(_SOURCE)
    made.thresholds(_thresholds(panel.levels))
    made.links([_link(f"If it fires: {name}", f"{RUNBOOKS}/{name}.md") for name in panel.alerts])
    if panel.texts:
        made.mappings([_texts(panel)])
    for name, color in panel.colors.items():
        fixed = {"mode": "fixed", "fixedColor": color}
        made.override_by_name(name, [models.DynamicConfigValue("color", fixed)])
    for letter, query in zip("ABCDEFGH", panel.queries, strict=False):
        made.with_target(_target(query, letter, panel))
        if properties := _properties(query):
            made.override_by_query(letter, properties)
    return made


def _properties(query: Query) -> list[models.DynamicConfigValue]:
    """What one query's series have otherwise than the rest of their panel."""
    properties = []
    if query.unit is not None:
        properties.append(models.DynamicConfigValue("unit", query.unit))
    if query.over:
        properties += [
            models.DynamicConfigValue("custom.stacking", {"mode": "none"}),
            models.DynamicConfigValue("custom.fillOpacity", 0),
        ]
    return properties


def _target(query: Query, letter: str, panel: Panel) -> prometheus.Dataquery:
    target = prometheus.Dataquery().expr(filled(query.expr)).ref_id(letter).datasource(_SOURCE)
    if panel.kind in ("stat", "table"):
        target.instant()
    else:
        target.range()
    if panel.kind == "table":
        target.format(promql.PromQueryFormat.TABLE)
    return target.legend_format(query.legend) if query.legend else target


def _thresholds(levels: tuple[Level, ...]) -> build.ThresholdsConfig:
    steps = [models.Threshold(value=None, color="green")]
    steps += [models.Threshold(value=level.value, color=level.color) for level in levels]
    return build.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def _texts(panel: Panel) -> models.ValueMap:
    return models.ValueMap(
        options={
            str(value): models.ValueMappingResult(text=text or None, color=color, index=index)
            for index, (value, (text, color)) in enumerate(panel.texts.items())
        }
    )


def _stat(panel: Panel) -> AnyPanel:
    return (
        stat.Panel()
        .color_mode(kinds.BigValueColorMode.BACKGROUND)
        .graph_mode(kinds.BigValueGraphMode.NONE)
        .text_mode(
            kinds.BigValueTextMode.VALUE_AND_NAME
            if len(panel.queries) > 1
            else kinds.BigValueTextMode.VALUE
        )
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .no_value(panel.empty)
    )


def _lines(panel: Panel) -> AnyPanel:
    made = (
        lines.Panel()
        .legend(
            common.VizLegendOptions()
            .display_mode(kinds.LegendDisplayMode.LIST)
            .placement(kinds.LegendPlacement.BOTTOM)
            .show_legend(show_legend=True)
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(kinds.TooltipDisplayMode.MULTI)
            .sort(kinds.SortOrder.DESCENDING)
        )
        .show_points(kinds.VisibilityMode.AUTO)
        .min(0)
    )
    if panel.kind == "stacked":
        made.fill_opacity(60).line_width(1)
        made.stacking(common.StackingConfig().mode(kinds.StackingMode.NORMAL))
    if panel.top is not None:
        made.axis_soft_max(panel.top)
    if panel.levels:
        made.thresholds_style(
            common.GraphThresholdsStyleConfig().mode(kinds.GraphThresholdsStyleMode.DASHED)
        )
    return made


def _states(_: Panel) -> AnyPanel:
    return (
        statetimeline.Panel()
        .show_value(kinds.VisibilityMode.NEVER)
        .merge_values(merge_values=True)
        .legend(common.VizLegendOptions().show_legend(show_legend=False))
    )


def _table(_: Panel) -> AnyPanel:
    runbook = [
        {
            "title": "Runbook",
            "url": f"{RUNBOOKS}/${{__data.fields.alertname}}.md",
            "targetBlank": True,
        }
    ]
    hidden = [models.DynamicConfigValue("custom.hidden", True)]  # noqa: FBT003
    return (
        table.Panel()
        .override_by_name("alertname", [models.DynamicConfigValue("links", runbook)])
        .override_by_name("Time", hidden)
        .override_by_name("Value", hidden)
    )


_SHAPES: Final[dict[str, Callable[[Panel], AnyPanel]]] = {
    "stat": _stat,
    "lines": _lines,
    "stacked": _lines,
    "states": _states,
    "table": _table,
}
