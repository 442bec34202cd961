"""Values files of today keep working, and what changes in their manifests is seen in a review.

The files in `golden/` are added to, never changed: they are users' files. `copied` is what somebody
has who copied all of values.yaml to edit it. `make chart` rewrites the manifests.
"""

from __future__ import annotations

import pytest

from tests.chart import values
from tests.chart.generate import frozen, manifests
from tests.chart.helm import CHART, Scenario, render_scenario


def test_manifests_are_those_that_were_reviewed() -> None:
    changed = [
        path.parent.name
        for path, text in manifests().items()
        if not path.exists() or path.read_text("utf-8") != text
    ]
    assert changed == [], "run `make chart`, and look at the difference"


@pytest.mark.parametrize("scenario", frozen(), ids=lambda scenario: scenario.path.parent.name)
def test_both_helms_take_the_file(scenario: Scenario) -> None:
    assert render_scenario(scenario) == render_scenario(scenario, by="helm3")


def test_every_key_of_today_is_kept() -> None:
    copied = next(one for one in frozen() if one.path.parent.name == "copied")
    for value in values.everything(values.read((CHART / "values.yaml").read_text("utf-8"))):
        given: object = copied.values
        for key in value.path:
            assert isinstance(given, dict)
            assert key in given, f"{value.name}: add the key to golden/copied/values.yaml"
            given = given[key]
