"""`make release` sets the version wherever it stands, as the release workflow asks for it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from clerk_sync import __version__
from tools import release

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what a release may change."""
    for name in (*release.PLACES, "tools", "CHANGELOG.md"):
        source = ROOT / name
        if source.is_dir():
            skipped = shutil.ignore_patterns("__pycache__", "_build")
            shutil.copytree(source, tmp_path / name, ignore=skipped)
        else:
            shutil.copy(source, tmp_path / name)
    return tmp_path


def run(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.release", *arguments],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": str(clone / "service")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def texts(clone: Path) -> dict[str, str]:
    paths = [
        path for path in clone.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    return {
        str(path.relative_to(clone)): path.read_bytes().decode("utf-8", "replace") for path in paths
    }


def test_the_version_is_set_everywhere_and_nothing_else_changes(clone: Path) -> None:
    before = texts(clone)
    done = run(clone, "9.8.7")
    assert (done.returncode, done.stderr) == (0, "")
    after = texts(clone)
    assert {name for name in after if before[name] != after[name]} >= {
        "CHANGELOG.md",
        "README.md",
        "charts/clerk-sync/Chart.yaml",
        "compose.yaml",
        "docs/how-to/run-the-image.md",
        "k8s/base/deployment.yaml",
        "service/clerk_sync/__init__.py",
    }
    for name, text in after.items():
        if name != "CHANGELOG.md":
            assert text.replace("9.8.7", __version__) == before[name], name
            assert not re.search(rf"(?<![\w.]){re.escape(__version__)}(?!\w)", text), name


def test_the_workflow_accepts_a_tag_of_it(clone: Path) -> None:
    assert run(clone, "9.8.7-rc.1").returncode == 0
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yaml").read_text())
    (step,) = (one for one in workflow["jobs"]["image"]["steps"] if one.get("id") == "release")
    checks = [line for line in step["run"].splitlines() if line.startswith("grep ")]
    assert len(checks) == 4
    for version, code in (("9.8.7-rc.1", 0), ("9.8.7", 1)):
        done = subprocess.run(
            ["bash", "-c", "\n".join(["set -e", f"version={version}", *checks])],
            cwd=clone,
            timeout=30,
            check=False,
        )
        assert done.returncode == code, version


def test_a_place_that_it_does_not_know_stops_it(clone: Path) -> None:
    page = clone / "docs" / "quickstart.md"
    page.write_text(f"{page.read_text()}\nIt is {__version__} now.\n")
    before = texts(clone)
    done = run(clone, "9.8.7")
    assert (done.returncode, texts(clone)) == (1, before)
    assert "docs/quickstart.md" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["1.2"], ["v1.2.3"], ["latest"]])
def test_a_wrong_version_is_refused(clone: Path, arguments: list[str]) -> None:
    done = run(clone, *arguments)
    assert (done.returncode, done.stderr) == (1, "Name the version: make release VERSION=1.2.3\n")


def test_nothing_to_release_is_refused(clone: Path) -> None:
    path = clone / "CHANGELOG.md"
    path.write_text(path.read_text().replace("Unreleased", "2026-01-01"))
    done = run(clone, "9.8.7")
    assert done.returncode == 1
    assert "has no heading `## Unreleased`" in done.stderr
