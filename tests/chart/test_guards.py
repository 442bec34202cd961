"""Mistakes in values that the schema cannot find: each is stopped by its own sentence."""

from __future__ import annotations

import re
from functools import cache

import pytest

from tests.chart.helm import CHART, LEAST, PARENT, HelmError, merged, render, template
from tests.chart.mistakes import CASES


def sentences() -> list[str]:
    """The sentences of the templates, as they are written there."""
    source = "".join(path.read_text("utf-8") for path in CHART.glob("templates/**/*.*"))
    return [
        text.replace('\\"', '"')
        for text in re.findall(
            r'(?:append \$faults|fail) (?:\(printf )?"(?!\\n\\nclerk-sync cannot)((?:\\"|[^"])+)"',
            source,
        )
    ]


def pattern(sentence: str) -> re.Pattern[str]:
    """A pattern for what a sentence prints."""
    parts = re.split(r"%[svd]", sentence.removeprefix("\\n\\n"))
    return re.compile(".*".join(map(re.escape, parts)), re.DOTALL)


@cache
def printed(case: int) -> tuple[str, ...]:
    """The sentences that a case's values are refused with."""
    with pytest.raises(HelmError) as refused:
        render(merged(LEAST, CASES[case][1]))
    assert "clerk-sync cannot be installed with these values:" in str(refused.value)
    return tuple(re.findall(r"^(?:E\s+)?- (.*)$", str(refused.value), re.MULTILINE))


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: CASES[case][0][:50])
def test_a_mistake_is_told_in_one_sentence(case: int) -> None:
    (said,) = printed(case)
    assert said.startswith(CASES[case][0])
    assert any(pattern(sentence).fullmatch(said) for sentence in sentences())
    assert said.endswith((".", "`")), "a whole sentence"


def test_every_sentence_is_said_by_a_case() -> None:
    said = [text for case in range(len(CASES)) for text in printed(case)] + [included_wrongly()]
    silent = [one for one in sentences() if not any(pattern(one).fullmatch(text) for text in said)]
    assert silent == []
    assert len(sentences()) > 60


def included_wrongly() -> str:
    with pytest.raises(HelmError) as refused:
        template({"clerk-sync": LEAST}, chart=PARENT)
    found = re.search(
        r"clerk-sync: the template `clerk-sync\.sidecar` is included.*", str(refused.value)
    )
    assert found, refused.value
    return found[0]


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(HelmError) as refused:
        render({"ingress": {"enabled": True}, "image": {"repository": "a:b"}})
    said = re.findall(r"^- (.*?)[:,]", str(refused.value), re.MULTILINE)
    assert len(said) == 4, said


def test_no_sentence_repeats_a_secret() -> None:
    """What looks like a secret in the cases above is not in what is printed."""
    for case in range(len(CASES)):
        for text in printed(case):
            assert not re.search(r"u:p@|whsec_c2|sk_test_secret", text)


def test_least_values_are_enough() -> None:
    assert render(LEAST)
