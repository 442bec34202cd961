"""The site, built by `make docs`: the same pages that GitHub shows.

Two things are done to a page before Sphinx reads it. The lists of links on an index page become
the table of contents, so that it is written once. Links to files outside of docs/ lead to GitHub.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS = Path(__file__).parent
ROOT = DOCS.parent
REPOSITORY = "https://github.com/clerk-sync/clerk-sync"
INDEXES = ("index.md", "README.md")
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)([^)\s]*)(?=\))")

project = str(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["name"])
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
nitpicky = True
myst_heading_anchors = 4
suppress_warnings = ["misc.highlighting_failure"]  # examples of YAML and JSON are cut off by …
html_theme = "furo"
html_title = "clerk-sync"
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
    "light_css_variables": {"color-brand-primary": "#5b3df5", "color-brand-content": "#5b3df5"},
    "dark_css_variables": {"color-brand-primary": "#a996ff", "color-brand-content": "#a996ff"},
}


def contents(page: str) -> str:
    """The links of a part of an index page, as a table of contents that is not shown twice."""
    title, _, text = page.partition("\n")
    pages = [path for path, _ in LINK.findall(text) if path.endswith(".md") and ".." not in path]
    if not pages:
        return ""
    names = "\n".join(dict.fromkeys(pages))
    return f"\n\n```{{toctree}}\n:hidden:\n:caption: {title.strip()}\n\n{names}\n```\n"


def prepare(_app: Sphinx, name: str, source: list[str]) -> None:
    """Turn a page as GitHub shows it into one for Sphinx, in place."""
    page = DOCS / f"{name}.md"

    def outside(link: re.Match[str]) -> str:
        target = (page.parent / link[1]).resolve()
        if target.is_relative_to(DOCS):
            return link[0]
        kind = "tree" if target.is_dir() else "blob"
        return f"{REPOSITORY}/{kind}/main/{target.relative_to(ROOT)}{link[2]}"

    text = source[0]
    if page.name in INDEXES:
        text = "\n## ".join(part + contents(part) for part in text.split("\n## "))
    source[0] = LINK.sub(outside, text)


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", prepare)
    return {"parallel_read_safe": True}
