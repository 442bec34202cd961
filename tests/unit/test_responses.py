"""One closed vocabulary, and one table from it to what the sender is told."""

from __future__ import annotations

import json
from itertools import chain

import pytest

from clerk_sync.http.responses import response_to
from clerk_sync.outcomes import (
    QUARANTINES,
    REJECTIONS,
    UNAVAILABILITIES,
    Answer,
    Outcome,
    Reason,
)

SETTLED = ("applied", "stale", "duplicate", "ignored")
REASONS = {
    Outcome.REJECTED: REJECTIONS,
    Outcome.QUARANTINED: QUARANTINES,
    Outcome.UNAVAILABLE: UNAVAILABILITIES,
    Outcome.ERROR: (Reason.INTERNAL,),
}
ANSWERS = [
    *(Answer(Outcome(outcome)) for outcome in SETTLED),
    *(Answer(outcome, reason) for outcome, reasons in REASONS.items() for reason in reasons),
]


@pytest.mark.parametrize(
    ("outcome", "reason", "status"),
    [
        ("applied", None, 200),
        ("stale", None, 200),
        ("duplicate", None, 200),
        ("ignored", None, 200),
        ("quarantined", "too_long", 200),
        ("quarantined", "bad_json", 200),
        ("rejected", "missing", 401),
        ("rejected", "malformed", 401),
        ("rejected", "wrong", 401),
        ("rejected", "expired", 401),
        ("rejected", "instance", 403),
        ("rejected", "path", 404),
        ("rejected", "method", 405),
        ("rejected", "too_large", 413),
        ("unavailable", "queue_full", 503),
        ("unavailable", "database", 503),
        ("unavailable", "schema", 503),
        ("unavailable", "deadline", 503),
        ("unavailable", "draining", 503),
        ("error", "internal", 500),
    ],
)
def test_each_outcome_has_its_status(outcome: str, reason: str | None, status: int) -> None:
    answer = Answer(Outcome(outcome), Reason(reason) if reason else None)
    assert response_to(answer).status == status


@pytest.mark.parametrize("answer", ANSWERS, ids=str)
def test_every_response_is_a_short_json_object(answer: Answer) -> None:
    response = response_to(answer)
    assert response.headers["Content-Type"] == "application/json"
    expected = {"outcome": answer.outcome.value}
    if answer.reason:
        expected["reason"] = answer.reason.value
    assert json.loads(response.body) == expected
    assert len(response.body) < 100


def test_the_body_is_as_documented() -> None:
    assert response_to(Answer(Outcome.APPLIED)).body == b'{"outcome": "applied"}'


@pytest.mark.parametrize("answer", ANSWERS, ids=str)
def test_only_what_may_succeed_later_is_to_be_sent_again(answer: Answer) -> None:
    response = response_to(answer)
    assert ("Retry-After" in response.headers) == (response.status == 503)
    assert int(response.headers.get("Retry-After", 1)) > 0


@pytest.mark.parametrize("answer", ANSWERS, ids=str)
def test_only_another_instances_deliveries_are_stopped(answer: Answer) -> None:
    assert response_to(answer).headers.get("webhook-delivery") == (
        "abort-message" if answer.reason is Reason.INSTANCE else None
    )


def test_every_reason_belongs_to_exactly_one_outcome() -> None:
    assert sorted(chain.from_iterable(REASONS.values())) == sorted(Reason)


def test_svix_counts_as_success_only_what_is_settled() -> None:
    successes = {answer.outcome for answer in ANSWERS if response_to(answer).status // 100 == 2}
    assert successes == {*map(Outcome, SETTLED), Outcome.QUARANTINED}
