"""What is pushed to a registry: the chart, and nothing that lay beside it."""

from __future__ import annotations

import re
import tarfile
from typing import TYPE_CHECKING

import pytest
import yaml

from clerk_sync import __version__
from tests.chart.helm import CHART, HELMS, LEAST, ROOT, helm, render

if TYPE_CHECKING:
    from pathlib import Path

ABOUT = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))

# What Helm reads, what the templates read, and what people read where a registry shows it.
PACKED = (
    r"Chart\.yaml|values\.yaml|values\.schema\.json|README\.md|LICENSE|"
    r"templates/(tests/)?[\w.]+|files/[-\w./]+"
)

# https://artifacthub.io/docs/topics/annotations/helm/
CATEGORIES = {
    "ai-machine-learning",
    "database",
    "integration-delivery",
    "monitoring-logging",
    "networking",
    "security",
    "storage",
    "streaming-messaging",
    "skip-prediction",
}
KINDS = {"added", "changed", "deprecated", "removed", "fixed", "security"}


@pytest.mark.parametrize("by", HELMS)
def test_the_package_holds_the_chart_and_no_more(by: str, tmp_path: Path) -> None:
    for stray in (".DS_Store", "a.orig", "x.tgz", "values.yaml~", ".secret.env"):
        assert not (CHART / stray).exists()
    helm(by, "package", CHART, f"--destination={tmp_path}")
    package = tmp_path / f"clerk-sync-{ABOUT['version']}.tgz"
    with tarfile.open(package) as archive:
        names = [name.removeprefix("clerk-sync/") for name in archive.getnames()]
    assert [name for name in names if not re.fullmatch(PACKED, name)] == []
    sources = *CHART.glob("templates/**/*.*"), *CHART.glob("files/**/*.*")
    read = {path.relative_to(CHART).as_posix() for path in sources}
    assert read | {"Chart.yaml", "values.yaml", "values.schema.json", "README.md"} <= {*names}
    assert render(LEAST, by=by, chart=package) == render(LEAST, by=by)


def test_strays_stay_out() -> None:
    ignored = (CHART / ".helmignore").read_text("utf-8").splitlines()
    patterns = {line for line in ignored if line and not line.startswith("#")}
    assert {".git/", ".DS_Store", "*.orig", "*~", "ci/", "examples/"} <= patterns


def test_the_chart_installs_this_version() -> None:
    assert ABOUT["appVersion"] == __version__
    annotations = ABOUT["annotations"]
    (image,) = yaml.safe_load(annotations["artifacthub.io/images"])
    repository = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))["image"]["repository"]
    assert image["image"] == f"{repository}:{__version__}"


def test_the_icon_is_in_the_repository() -> None:
    raw = ABOUT["home"].replace("https://github.com/", "https://raw.githubusercontent.com/")
    icon = ROOT / ABOUT["icon"].removeprefix(f"{raw}/main/")
    assert icon.suffix == ".svg"
    assert re.match(r'<svg xmlns="http://www.w3.org/2000/svg" [^>]*>', icon.read_text("utf-8"))


def test_artifact_hub_understands_the_annotations() -> None:
    annotations = ABOUT["annotations"]
    assert annotations["artifacthub.io/category"] in CATEGORIES
    assert annotations["artifacthub.io/license"] == "Apache-2.0"
    for change in yaml.safe_load(annotations["artifacthub.io/changes"]):
        assert change.keys() <= {"kind", "description", "links"}
        assert change["kind"] in KINDS
    for link in yaml.safe_load(annotations["artifacthub.io/links"]):
        assert link.keys() == {"name", "url"}
        local = re.fullmatch(rf"{re.escape(ABOUT['home'])}/blob/main/(\S+?)(#\S+)?", link["url"])
        assert not local or (ROOT / local[1]).exists(), link["url"]
