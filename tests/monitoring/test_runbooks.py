"""A runbook for every alert, without a word in it that the code does not know."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from clerk_sync.cli import cli
from clerk_sync.outcomes import Ending, Outcome, Reason, Verdict
from clerk_sync.settings import Settings
from clerk_sync.telemetry.metrics import CLERK_STATUSES
from monitoring import files
from monitoring.alerts import ALERTS
from monitoring.panels import PANELS
from tests.monitoring.prometheus import promtool
from tests.monitoring.test_dashboard import exposed
from tests.project.test_docs import SOURCE
from tools.cli_reference import commands

FOLDER = files.ROOT / "docs" / "runbooks"
BY_NAME = {alert.name: alert for alert in ALERTS}
SECTIONS = ["What it means", "How to see it", "What to do", "When it clears"]
each_page = pytest.mark.parametrize("page", sorted(FOLDER.glob("*.md")), ids=lambda page: page.stem)
each_runbook = pytest.mark.parametrize("name", sorted(BY_NAME))


@cache
def text_of(page: Path) -> str:
    return page.read_text("utf-8")


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```$", text_of(page), re.DOTALL | re.MULTILINE)
    return [re.sub(r"^ {3}", "", block, flags=re.MULTILINE) for block in found]


@cache
def log_events() -> set[str]:
    source = "".join(path.read_text("utf-8") for path in SOURCE.rglob("*.py"))
    return set(re.findall(r"""\.(?:info|warning|error|exception)\(\s*"([a-z_]+)\"""", source))


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    assert {page.stem for page in FOLDER.glob("*.md")} == {*BY_NAME, "README"}


@each_runbook
def test_its_sections_are_all_there_and_none_is_empty(name: str) -> None:
    head, *parts = re.split(r"^## ", text_of(FOLDER / f"{name}.md"), flags=re.MULTILINE)
    assert head.startswith(f"# {name}\n\n`{BY_NAME[name].severity}`: ")
    assert [part.partition("\n")[0] for part in parts] == SECTIONS
    for part in parts:
        assert len(part.partition("\n")[2].split()) >= 5, part


@each_runbook
def test_it_names_a_panel_that_shows_the_alert(name: str) -> None:
    page = FOLDER / f"{name}.md"
    bold = set(re.findall(r"\*\*([^*]+)\*\*", text_of(page)))
    shown = {panel.title for panel in PANELS if name in panel.alerts}
    assert bold & shown, f"one of {shown}"


def test_the_list_is_that_of_the_alerts() -> None:
    row = r"^\| \[(\w+)\]\((\w+)\.md\) \| (\w+) \| (.*) \|$"
    rows = re.findall(row, text_of(README), re.MULTILINE)
    assert rows == [(one.name, one.name, one.severity, one.summary) for one in ALERTS]


README = FOLDER / "README.md"
# What is bold and no panel: a button, a page or a column of Clerk's dashboard or Prometheus.
ELSEWHERE = {
    "Recover failed messages",
    "Resend",
    "Webhooks",
    "Message attempts",
    "Status, Targets",
    "every",
    "The history of an installation",
    "A rate of few events says nothing.",
    "Counters may reset.",
    "Several installations",
    "A probe that never arrived",
}


@each_page
def test_every_panel_that_is_named_exists(page: Path) -> None:
    bold = set(re.findall(r"\*\*([^*]+)\*\*", text_of(page).replace("\n", " ").replace("  ", " ")))
    assert bold <= {panel.title for panel in PANELS} | ELSEWHERE


@each_page
def test_every_query_is_one_of_series_that_exist(page: Path, tmp_path: Path) -> None:
    queries = [line for block in blocks(page, "promql") for line in block.splitlines()]
    assert queries or page == README
    known = {*exposed(), "up"}
    for query in queries:
        names = re.findall(r"\b(?:clerk_sync_|process_|job:|job_kind:)[a-z0-9_:]+", query)
        assert set(names) <= known, query
    rules = [{"record": f"q:{number}", "expr": query} for number, query in enumerate(queries)]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    promtool("check", "rules", path)


@each_page
def test_every_log_line_that_is_searched_for_exists(page: Path) -> None:
    for query in blocks(page, "logql"):
        assert query.startswith('{namespace="shop", container="clerk-sync"} | json | ')
        for _, words in re.findall(r'\bevent(=~?)"([^"]+)"', query):
            for word in words.split("|"):
                found = [event for event in log_events() if re.fullmatch(word, event)]
                assert found, word
        for words in re.findall(r'\boutcome=~?"([^"]+)"', query):
            assert set(words.split("|")) <= set(Outcome), words
        for words in re.findall(r'\breason=~?"([^"]+)"', query):
            assert set(words.split("|")) <= set(Reason), words


@each_page
def test_every_command_and_option_that_is_named_exists(page: Path) -> None:
    known = commands(cli, "clerk-sync")
    shown = [*re.findall(r"`([^`\n]+)`", text_of(page)), *"".join(blocks(page, "sh")).splitlines()]
    for line in shown:
        for words in (part.split() for part in re.findall(r"clerk-sync [a-z].*", line)):
            if words[1] not in {name.split()[1] for name in known}:
                assert "-c" in line.split() or "=" in line, line
                continue
            command = known.get(" ".join(words[:3])) or known.get(" ".join(words[:2]))
            assert command, line
            options = {option for one in command.params for option in one.opts} | {"--help"}
            assert {word for word in words if word.startswith("--")} <= options, line


@each_page
def test_every_word_of_code_is_one(page: Path) -> None:
    """Reasons, outcomes, endings, log events, settings, metrics, values of the chart."""
    known = {*Reason, *Outcome, *Ending, *Verdict, *log_events(), *CLERK_STATUSES, *exposed()}
    known |= {str(field.validation_alias) for field in Settings.model_fields.values()}
    known |= BY_NAME.keys() | WORDS
    for word in re.findall(r"`([A-Za-z0-9_]+)`", text_of(page)):
        assert word in known, word


WORDS = {
    *("critical", "warning", "cluster", "namespace", "job", "kind", "reason", "threshold"),
    *("clerk_id", "svix_id", "age_seconds", "traceback", "preStop", "list", "OOMKilled"),
    *("namespaceSelector", "clerk", "serve", "reconcile", "RELEASE", "REVISION", "exec"),
}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s#]+)", text_of(page)):
        assert (FOLDER / link).exists(), link
