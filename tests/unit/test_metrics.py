"""Metrics: closed label sets, all there at 0 from the start, names that say whose they are."""

from __future__ import annotations

import re
import time
from itertools import product

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from clerk_sync import __version__
from clerk_sync.clerk import catalog
from clerk_sync.clerk.catalog import LISTED, PROBE
from clerk_sync.clerk.metrics import new_metrics
from clerk_sync.outcomes import (
    DRIFTS,
    QUARANTINES,
    REJECTIONS,
    UNAVAILABILITIES,
    UNREADINESSES,
    Answer,
    Ending,
    Outcome,
    Reason,
)
from clerk_sync.settings import Secret, Settings
from clerk_sync.telemetry.metrics import CLERK_STATUSES, SECRETS, SETTLED, Metrics

# In a fresh clone, the first text waits until hypothesis has made its tables of characters.
patient = hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

NOW = 1_767_612_345.0
CLOSED = {
    "type",
    "outcome",
    "reason",
    "le",
    "version",
    "status",
    "kind",
    "drift",
    "result",
    "secret",
}
LABELLED = {
    "clerk_sync_outcomes_total": {
        (("outcome", outcome), ("type", type_))
        for outcome, type_ in product(
            ("applied", "stale", "duplicate", "ignored", "quarantined"),
            (*catalog.TYPES, "clerk-sync.probe", "other"),
        )
    },
    "clerk_sync_rejected_total": {(("reason", reason.value),) for reason in REJECTIONS},
    "clerk_sync_quarantined_total": {(("reason", reason.value),) for reason in QUARANTINES},
    "clerk_sync_unavailable_total": {(("reason", reason.value),) for reason in UNAVAILABILITIES},
    "clerk_sync_unready": {(("reason", reason.value),) for reason in UNREADINESSES},
    "clerk_sync_secret_stale": {(("secret", name),) for name in SECRETS},
    "clerk_sync_clerk_requests_total": {(("status", status),) for status in CLERK_STATUSES},
    "clerk_sync_clerk_entities": {(("kind", kind),) for kind in LISTED},
    "clerk_sync_table_entities": {(("kind", kind),) for kind in LISTED},
    "clerk_sync_reconcile_result": {(("result", ending.value),) for ending in Ending},
    "clerk_sync_reconcile_drift_entities": {
        (("drift", drift.value), ("kind", kind)) for drift, kind in product(DRIFTS, LISTED)
    },
}


def series(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Everything that a scrape reads."""
    text, _ = metrics.exposed("")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def counted(metrics: Metrics, name: str, **labels: str) -> float:
    return series(metrics)[name, tuple(sorted(labels.items()))]


def test_every_series_is_there_at_0_from_the_start() -> None:
    found = series(new_metrics())
    ours = {key: value for key, value in found.items() if key[0].startswith("clerk_sync_")}
    info = ("clerk_sync_build_info", (("version", __version__),))
    assert ours.pop(info) == 1
    assert set(ours.values()) == {0}
    for name, labels in LABELLED.items():
        assert {of for named, of in ours if named == name} == labels


def test_every_name_says_whose_it_is() -> None:
    names = {name for name, _ in series(new_metrics())}
    assert {name for name in names if not re.match("(clerk_sync|process|python)_", name)} == set()
    assert "process_resident_memory_bytes" in names


def test_every_metric_has_help_and_only_labels_of_closed_sets() -> None:
    for family in text_string_to_metric_families(new_metrics().exposed("")[0].decode()):
        assert family.documentation, family.name
        if family.name.startswith("clerk_sync_"):
            labels = {name for sample in family.samples for name in sample.labels}
            assert labels <= CLOSED, family.name


@pytest.mark.parametrize("name", ["received", "queue_depth", "ready", "errors", "pool_in_use"])
def test_what_dashboards_rest_on_is_there(name: str) -> None:
    names = {named.removesuffix("_total") for named, _ in series(new_metrics())}
    assert f"clerk_sync_{name}" in names


def test_a_known_type_is_counted_by_its_name() -> None:
    metrics = new_metrics()
    metrics.answered(Answer(Outcome.APPLIED), "user.created", 0.01, NOW)
    assert counted(metrics, "clerk_sync_outcomes_total", type="user.created", outcome="applied")
    assert counted(metrics, "clerk_sync_last_success_timestamp_seconds") == NOW
    assert counted(metrics, "clerk_sync_request_seconds_count") == 1


@pytest.mark.parametrize("type_", [None, "unknown", "user.banned", "", 'x"\n', "a" * 128, "other"])
def test_an_unknown_type_is_counted_as_other(type_: str | None) -> None:
    metrics = new_metrics()
    before = series(metrics).keys()
    metrics.answered(Answer(Outcome.IGNORED), type_, 0.01, NOW)
    assert counted(metrics, "clerk_sync_outcomes_total", type="other", outcome="ignored") == 1
    assert series(metrics).keys() == before


def test_a_probe_is_a_type_of_its_own_and_no_sign_of_life_of_clerk() -> None:
    metrics = new_metrics()
    metrics.answered(Answer(Outcome.IGNORED), PROBE, 0.01, NOW)
    assert counted(metrics, "clerk_sync_outcomes_total", type=PROBE, outcome="ignored") == 1
    assert counted(metrics, "clerk_sync_outcomes_total", type="other", outcome="ignored") == 0
    assert counted(metrics, "clerk_sync_request_seconds_count") == 1
    assert counted(metrics, "clerk_sync_last_success_timestamp_seconds") == 0


def test_the_quarantined_are_counted_by_type_and_by_reason() -> None:
    metrics = new_metrics()
    metrics.answered(Answer(Outcome.QUARANTINED, Reason.TOO_LONG), "user.updated", 0.01, NOW)
    assert counted(metrics, "clerk_sync_quarantined_total", reason="too_long") == 1
    assert counted(metrics, "clerk_sync_outcomes_total", type="user.updated", outcome="quarantined")


def test_what_was_not_taken_is_no_outcome_and_no_success() -> None:
    metrics = new_metrics()
    metrics.answered(Answer(Outcome.REJECTED, Reason.WRONG), None, 0.01, NOW)
    metrics.answered(Answer(Outcome.UNAVAILABLE, Reason.DATABASE), "user.created", 0.01, NOW)
    metrics.answered(Answer(Outcome.ERROR, Reason.INTERNAL), "user.created", 0.01, NOW)
    assert counted(metrics, "clerk_sync_rejected_total", reason="wrong") == 1
    assert counted(metrics, "clerk_sync_unavailable_total", reason="database") == 1
    assert counted(metrics, "clerk_sync_errors_total") == 1
    assert counted(metrics, "clerk_sync_last_success_timestamp_seconds") == 0
    assert not [
        key for key, value in series(metrics).items() if value and key[0].startswith("clerk_sync_o")
    ]


_answers = st.sampled_from(
    [
        *map(Answer, (outcome for outcome in SETTLED if outcome is not Outcome.QUARANTINED)),
        *(Answer(Outcome.REJECTED, reason) for reason in REJECTIONS),
        *(Answer(Outcome.QUARANTINED, reason) for reason in QUARANTINES),
        *(Answer(Outcome.UNAVAILABLE, reason) for reason in UNAVAILABILITIES),
        Answer(Outcome.ERROR, Reason.INTERNAL),
    ]
)
_hammered = new_metrics()
_series = series(_hammered).keys()


@patient
@given(_answers, st.none() | st.text() | st.sampled_from(catalog.TYPES))
def test_no_answer_makes_a_new_series(answer: Answer, type_: str | None) -> None:
    _hammered.answered(answer, type_, 0.01, NOW)
    assert series(_hammered).keys() == _series


ACCEPTED = (
    "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
    "application/openmetrics-text; version=1.0.0; charset=utf-8",
)


@pytest.mark.parametrize("accept", ACCEPTED)
def test_openmetrics_says_since_when_a_series_counts(accept: str) -> None:
    before = time.time()
    metrics = new_metrics()
    text, content_type = metrics.exposed(accept)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in openmetrics_families(text.decode())}  # type: ignore[no-untyped-call]
    for name, type_ in (("rejected", "counter"), ("request_seconds", "histogram")):
        family = families[f"clerk_sync_{name}"]
        made = [one for one in family.samples if one.name == f"clerk_sync_{name}_created"]
        assert family.type == type_
        assert len(made) == (len(REJECTIONS) if type_ == "counter" else 1)
        assert all(before - 1 <= one.value <= time.time() for one in made)
    units = {name: family.unit for name, family in families.items()}
    assert units["clerk_sync_request_seconds"] == "seconds"
    assert units["clerk_sync_batch_events"] == "events"
    assert units["clerk_sync_last_success_timestamp_seconds"] == "seconds"
    assert units["clerk_sync_rejected"] == ""


@pytest.mark.parametrize("accept", ["", "*/*", "text/plain", "text/plain;version=0.0.4;q=0.3"])
def test_the_plain_format_has_no_such_series(accept: str) -> None:
    text, content_type = new_metrics().exposed(accept)
    assert content_type.startswith("text/plain; version=0.0.4")
    assert b"clerk_sync_received_total 0.0\n" in text
    assert b"_created" not in text


def test_a_batch_is_counted_with_its_time() -> None:
    metrics = new_metrics()
    metrics.applied(64, 0.02)
    assert counted(metrics, "clerk_sync_batch_events_sum") == 64
    assert counted(metrics, "clerk_sync_apply_seconds_sum") == 0.02


def test_two_services_in_one_process_count_apart() -> None:
    one, other = new_metrics(), new_metrics()
    one.received.inc()
    assert counted(one, "clerk_sync_received_total") == 1
    assert counted(other, "clerk_sync_received_total") == 0


def test_each_secret_has_its_series() -> None:
    fields = Settings.model_fields.items()
    assert {name for name, field in fields if field.annotation == Secret | None} == {*SECRETS}
