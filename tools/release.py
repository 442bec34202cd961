"""Sets the version wherever it stands, and dates the changelog: `make release VERSION=x.y.z`."""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from clerk_sync import __version__

ROOT: Final = Path(__file__).parents[1]
# Lock files and the changelog name other versions as well.
PLACES: Final = ("README.md", "compose.yaml", "service", "charts", "k8s", "docs")
SUFFIXES: Final = {".md", ".py", ".yaml", ".json", ".txt", ".tpl"}
# What stands before a version of ours.
BEFORE: Final = (
    '__version__ = "',
    "version: ",
    "appVersion: ",
    "--version ",
    "clerk-sync:",
    "ref=v",
    "tags/v",
    "such as `",
)


def files() -> list[Path]:
    """Every file in which the version may stand."""
    found = [path for place in PLACES for path in (ROOT / place, *(ROOT / place).rglob("*"))]
    return [one for one in found if one.suffix in SUFFIXES and one.is_file()]


def places_of(version: str) -> re.Pattern[str]:
    before = "|".join(map(re.escape, BEFORE))
    return re.compile(rf"(?<![\w-])({before}){re.escape(version)}(?![\w.]\w|[\w-])")


def released(changelog: str, version: str, day: str) -> str | None:
    """The changelog with its unreleased part under this version; None if there is none."""
    text, number = re.subn(
        r"^## (?:\S+ - )?Unreleased$", f"## {version} - {day}", changelog, flags=re.MULTILINE
    )
    return text if number == 1 else None


def faults(version: str) -> list[str]:
    """Where the old version would still stand, in a way that this program does not know."""
    if version == __version__:
        return []
    old = re.compile(rf"(?<![\w.]){re.escape(__version__)}(?![\w.]\w|\w)")
    pattern = places_of(__version__)
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files()
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if old.search(pattern.sub("", line))
    ]


def main(arguments: list[str]) -> int | str:
    """Return 0, or the sentence that says why nothing was changed."""
    if len(arguments) != 1 or not re.fullmatch(r"\d+\.\d+\.\d+(-[0-9A-Za-z.]+)?", arguments[0]):
        return "Name the version: make release VERSION=1.2.3"
    version = arguments[0]
    path = ROOT / "CHANGELOG.md"
    day = datetime.now(UTC).date().isoformat()
    changelog = released(path.read_text("utf-8"), version, day)
    if changelog is None:
        return "CHANGELOG.md has no heading `## Unreleased`: say there what changes for operators."
    if unknown := faults(version):
        lines = "\n".join(unknown)
        return f"{__version__} also stands here; teach tools/release.py about it:\n{lines}"
    path.write_text(changelog, "utf-8")
    pattern = places_of(__version__)
    for file in files():
        text = file.read_text("utf-8")
        changed = pattern.sub(rf"\g<1>{version}", text)
        if changed != text:
            file.write_text(changed, "utf-8")
            print(f"wrote {file.relative_to(ROOT)}")
    print(f"Review `git diff`, commit it, and tag it v{version}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
