"""The site builds without a warning, and a broken link is one."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of this folder as `make docs` does."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    found = re.search(r"sphinx-build (.*) docs docs/_build$", makefile, re.MULTILINE)
    assert found
    return subprocess.run(
        [sys.executable, "-m", "sphinx", *found[1].split(), "docs", out],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


@pytest.fixture
def one_page(tmp_path: Path) -> Path:
    """A repository with the site's configuration and a page or two."""
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(ROOT / "docs" / "conf.py", docs)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "README.md").write_text("# Above\n")
    (docs / "index.md").write_text("# Site\n\n## Pages\n\n- [Other](other.md)\n")
    (docs / "other.md").write_text("# Other\n\n[Above](../README.md)\n\n## Part\n")
    return tmp_path


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    pages = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    for page in pages:
        name = page.parent if page.name == "index.md" else page.with_suffix("")
        assert (tmp_path / name / "index.html").is_file(), page


def test_a_page_that_links_outside_of_the_docs_leads_to_github(one_page: Path) -> None:
    done = build(one_page, one_page / "out")
    assert (done.returncode, done.stderr) == (0, "")
    text = (one_page / "out" / "other" / "index.html").read_text("utf-8")
    assert 'href="https://github.com/clerk-sync/clerk-sync/blob/main/README.md"' in text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[gone](gone.md)", "gone.md"),
        ("[gone](other.md#gone)", "gone"),
        ("![gone](gone.png)", "gone.png"),
    ],
)
def test_a_broken_link_fails_the_build(one_page: Path, text: str, told: str) -> None:
    with (one_page / "docs" / "index.md").open("a", encoding="utf-8") as page:
        page.write(f"\n{text}\n")
    done = build(one_page, one_page / "out")
    assert done.returncode != 0
    assert told in done.stderr


def test_a_page_that_no_list_has_fails_the_build(one_page: Path) -> None:
    (one_page / "docs" / "lost.md").write_text("# Lost\n")
    done = build(one_page, one_page / "out")
    assert done.returncode != 0
    assert "lost.md" in done.stderr
