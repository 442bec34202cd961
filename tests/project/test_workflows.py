"""What the workflows are held to beyond their linters: pins, rights, and the versions promised."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))


def read(path: Path) -> dict[str, Any]:
    # YAML 1.1 reads the key `on` as true.
    found: dict[Any, Any] = yaml.safe_load(path.read_text())
    return {("on" if key is True else key): value for key, value in found.items()}


def jobs() -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{path.name}: {name}", job)
        for path in WORKFLOWS
        for name, job in read(path)["jobs"].items()
    ]


# Who may write, and what: each right has its reason beside it.
WRITERS = {
    "docs.yaml: publish": {"pages", "id-token"},
    "release.yaml: image": {"packages", "id-token", "attestations"},
    "release.yaml: chart": {"packages", "id-token", "attestations"},
    "release.yaml: notes": {"contents"},
}


def test_there_are_four() -> None:
    assert [path.stem for path in WORKFLOWS] == ["chart", "docs", "release", "test"]


def test_an_action_is_one_commit_and_says_its_version() -> None:
    used: dict[str, set[tuple[str, str]]] = {}
    for path in WORKFLOWS:
        for line in path.read_text().splitlines():
            if found := re.search(r"\buses: (?!\./)(\S+)(.*)", line):
                action, _, commit = found[1].partition("@")
                assert re.fullmatch(r"[0-9a-f]{40}", commit), line
                assert re.fullmatch(r" # v\d+\.\d+\.\d+", found[2]), line
                used.setdefault(action, set()).add((commit, found[2]))
    assert used
    assert {action: pins for action, pins in used.items() if len(pins) > 1} == {}


@pytest.mark.parametrize(("name", "job"), jobs())
def test_a_job_has_the_rights_it_names_and_an_end(name: str, job: dict[str, Any]) -> None:
    assert isinstance(job["permissions"], dict)
    assert "uses" in job or job["timeout-minutes"] <= 60
    written = {right for right, level in job["permissions"].items() if level == "write"}
    assert written == WRITERS.get(name, set())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_nothing_is_allowed_but_by_a_job(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {}
    assert "pull_request_target" not in workflow["on"]
    assert "group" in workflow["concurrency"]


@pytest.mark.parametrize(("name", "job"), jobs())
def test_a_script_takes_values_by_environment_alone(name: str, job: dict[str, Any]) -> None:
    for step in job.get("steps", []):
        assert "${{" not in step.get("run", ""), f"{name}: an expression in a script is code"


def test_every_verb_that_is_run_exists() -> None:
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    run = "\n".join(step.get("run", "") for _, job in jobs() for step in job.get("steps", []))
    assert set(re.findall(r"\bmake ([a-z-]+)", run)) <= verbs


def test_databases_are_those_that_are_promised() -> None:
    matrix = read(ROOT / ".github/workflows/test.yaml")["jobs"]["databases"]["strategy"]["matrix"]
    assert {entry["database"] for entry in matrix["include"]} == {
        "mysql:8.4",
        "mysql:9",
        "mariadb:10.11",
        "mariadb:11.8",
    }
    oldest = re.search(r'requires-python = ">=(\S+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest
    assert oldest[1] in {entry["python"] for entry in matrix["include"]}


def test_clusters_are_of_every_minor_without_a_gap() -> None:
    matrix = read(ROOT / ".github/workflows/chart.yaml")["jobs"]["cluster"]["strategy"]["matrix"]
    minors = []
    for entry in matrix["include"]:
        node = re.fullmatch(r"kindest/node:v1\.(\d+)\.\d+@sha256:[0-9a-f]{64}", entry["node"])
        assert node, entry
        assert entry["kubernetes"] == f"1.{node[1]}"
        minors.append(int(node[1]))
    assert minors == list(range(29, 38))
