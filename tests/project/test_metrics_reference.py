"""The page of the metrics is what the code declares, and what a service says to a scrape."""

from __future__ import annotations

import re
import subprocess
from itertools import product
from typing import TYPE_CHECKING, Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from clerk_sync.clerk.metrics import new_metrics
from tests import deliveries
from tests.deliveries import OTHER_SECRET, event
from tools import metrics_reference
from tools.programs import need

if TYPE_CHECKING:
    from pathlib import Path

PLAIN: Final = {"Accept": "text/plain;version=0.0.4"}
OPENMETRICS: Final = {"Accept": "application/openmetrics-text;version=1.0.0"}

Series = tuple[str, frozenset[tuple[str, str]]]


def sections() -> dict[str, str]:
    """The page's sections by the metric that each is about."""
    page = metrics_reference.PAGE.read_text("utf-8")
    _, *found = re.split(r"^## `(\w+)`$", page, flags=re.MULTILINE)
    return dict(zip(found[::2], found[1::2], strict=True))


def promised(name: str, section: str) -> set[Series]:
    """The series of this metric, by its section of the page."""
    labels = {
        label: re.findall(r"`([^`]+)`", values)
        for label, values in re.findall(r"^- `(\w+)`: (.*)$", section, re.MULTILINE)
        if label != "version"
    }
    found = {frozenset(zip(labels, values, strict=True)) for values in product(*labels.values())}
    buckets = re.search(r"^- Buckets: (.*)$", section, re.MULTILINE)
    if buckets is None:
        return {(name, one) for one in found}
    bounds = [str(float(bound)) for bound in buckets[1].split(", ")] + ["+Inf"]
    return {(f"{name}_{part}", frozenset()) for part in ("count", "sum")} | {
        (f"{name}_bucket", frozenset({("le", bound)})) for bound in bounds
    }


def scraped(text: str) -> set[Series]:
    """Our series in a scrape."""
    return {
        (
            sample.name,
            frozenset((key, value) for key, value in sample.labels.items() if key != "version"),
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("clerk_sync_")
    }


def lint(text: str) -> str:
    """Return what promtool has against an exposition."""
    checked = subprocess.run(
        [need("promtool"), "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return checked.stdout + checked.stderr


def test_promtool_can_be_displeased() -> None:
    bad = "# HELP x_milliseconds x\n# TYPE x_milliseconds counter\nx_milliseconds 1\n"
    assert 'counter metrics should have "_total" suffix' in lint(bad)


def test_the_page_is_made_of_the_code() -> None:
    assert metrics_reference.text() == metrics_reference.PAGE.read_text("utf-8"), (
        "run `make generate`"
    )


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#\s]+)", metrics_reference.PAGE.read_text("utf-8"))
    assert links
    assert [link for link in links if not (metrics_reference.PAGE.parent / link).exists()] == []


@pytest.mark.parametrize(
    "name", [metrics_reference.name_of(one) for one in metrics_reference.own(new_metrics())]
)
def test_every_metric_answers_a_question_of_somebody(name: str) -> None:
    panels, alerts = metrics_reference.using(name)
    assert panels or alerts


async def test_a_running_service_has_these_series_from_the_start_and_no_others(
    tmp_path: Path,
) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    await deliveries.migrate(url)
    wanted = {one for name, section in sections().items() for one in promised(name, section)}
    async with deliveries.process(tmp_path, url) as (_, at):
        first = (await at.inside("/metrics", headers=PLAIN)).text
        assert scraped(first) == wanted
        await at.until_ready()
        assert (await at.post(event("user.created", "user_a"))).outcome == "applied"
        assert (await at.post({"type": "user.made_up", "data": {}})).outcome == "ignored"
        assert (await at.post(b"{}", secret=OTHER_SECRET)).status == 401
        assert (await at.post(b"{}", path="/else")).status == 404
        last = (await at.inside("/metrics", headers=PLAIN)).text
        assert scraped(last) == wanted
        rich = (await at.inside("/metrics", headers=OPENMETRICS)).text
    series = int(re.findall(r"has (\d+) series", metrics_reference.PAGE.read_text("utf-8"))[0])
    assert len(wanted) == series
    assert lint(last) == ""
    for name, unit in re.findall(r"^# UNIT (clerk_sync_\w+) (\w+)$", rich, re.MULTILINE):
        assert name.endswith(f"_{unit}")
    assert "# UNIT clerk_sync_request_seconds seconds\n" in rich
    assert rich.endswith("# EOF\n")
