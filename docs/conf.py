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
    """Give each part of an index page its links as a table of contents, not shown twice."""
    parts = []
    listed: set[str] = set()
    for part in page.split("\n## "):
        title, _, text = part.partition("\n")
        links = dict.fromkeys(path for path, _ in LINK.findall(text) if ".." not in path)
        new = [path for path in links if path.endswith(".md") and path not in listed]
        listed.update(new)
        tree = ["```{toctree}", ":hidden:", f":caption: {title.strip()}", "", *new, "```"]
        parts.append("\n".join([part, "", *tree, ""]) if new else part)
    return "\n## ".join(parts)


def prepare(_app: Sphinx, name: str, source: list[str]) -> None:
    """Turn a page as GitHub shows it into one for Sphinx, in place."""
    page = DOCS / f"{name}.md"

    def outside(link: re.Match[str]) -> str:
        target = (page.parent / link[1]).resolve()
        if target.is_relative_to(DOCS):
            return link[0]
        kind = "tree" if target.is_dir() else "blob"
        return f"{REPOSITORY}/{kind}/main/{target.relative_to(ROOT)}{link[2]}"

    text = contents(source[0]) if page.name in INDEXES else source[0]
    source[0] = LINK.sub(outside, text)


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", prepare)
    return {"parallel_read_safe": True}
