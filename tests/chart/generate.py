"""Write what follows from the chart's values.yaml and templates: `make chart`.

The schema of values, their defaults, the tables in the chart's README, and the rendered manifests
that reviewers read as a difference. A test compares them with what is committed.
"""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Final

import yaml

from tests.chart import values
from tests.chart.helm import CHART, HelmError, Scenario, template
from tools import provision
from tools.servers import UnavailableError

if TYPE_CHECKING:
    from pathlib import Path

GOLDEN: Final = CHART.parents[1] / "tests" / "chart" / "golden"
DEFAULTS_HEAD: Final = (
    "# Generated from values.yaml by `make chart`, for templates: see _values.tpl.\n"
)
BEGIN, END = "<!-- values -->", "<!-- /values -->"


def main() -> int:
    try:
        provision.provide_tools()
        # In this order: manifests are rendered by values that the schema has to know.
        written = [
            path
            for make in (documents, manifests)
            for path, text in make().items()
            if _write(path, text)
        ]
    except (values.UnreadableError, HelmError, UnavailableError) as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(f"wrote {path.relative_to(CHART.parents[1])}")
    return 0


def generated() -> dict[Path, str]:
    """Return the text of every generated file."""
    return documents() | manifests()


def documents() -> dict[Path, str]:
    """Return the schema, the defaults, and the README with its tables."""
    read = values.read((CHART / "values.yaml").read_text("utf-8"))
    schema = json.dumps(values.schema(read), indent=2, ensure_ascii=False)
    readme = CHART / "README.md"
    before, begin, rest = readme.read_text("utf-8").partition(f"{BEGIN}\n")
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise values.UnreadableError(f"{readme} needs the lines `{BEGIN}` and `{END}`")
    return {
        CHART / "values.schema.json": f"{schema}\n",
        CHART / "files" / "defaults.yaml": f"{DEFAULTS_HEAD}{values.defaults(read)}",
        readme: f"{before}{begin}\n{values.tables(read)}\n{end}{after}",
    }


def frozen() -> tuple[Scenario, ...]:
    """Return the values files that have to keep working: they are added to, never changed."""
    return tuple(Scenario.read(path) for path in sorted(GOLDEN.glob("*/values.yaml")))


def manifests() -> dict[Path, str]:
    """Return what the frozen values files render to."""
    return {
        scenario.path.with_name("manifest.yaml"): unversioned(
            template(scenario.values, *scenario.options())
        )
        for scenario in frozen()
    }


def unversioned(manifest: str) -> str:
    """Blank the versions out: a release is no change of a manifest."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))
    manifest = manifest.replace(f"clerk-sync-{chart['version']}", "clerk-sync-VERSION")
    return re.sub(rf"([:\"' ])v?{re.escape(chart['appVersion'])}\b", r"\1APP_VERSION", manifest)


def _write(path: Path, text: str) -> bool:
    if path.exists() and path.read_text("utf-8") == text:
        return False
    path.write_text(text, "utf-8")
    return True


if __name__ == "__main__":
    sys.exit(main())
