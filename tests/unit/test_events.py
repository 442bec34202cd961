"""Clerk's envelope: exact about what matters, tolerant of the rest, harmless whatever it holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from clerk_sync.clerk import catalog, samples
from clerk_sync.clerk.catalog import Action
from clerk_sync.clerk.events import Event, InvalidEvent, OtherEvent, parse
from clerk_sync.clerk.signature import Delivery, InvalidSignature
from clerk_sync.mapping import loader
from clerk_sync.mapping.change import Change, Delete, Delivered, Ignore, Quarantine, Upsert
from clerk_sync.mapping.ingest import change_of
from clerk_sync.outcomes import QUARANTINES, Reason
from clerk_sync.store.values import time_text

# In a fresh clone, the first text waits until hypothesis has made its tables of characters.
patient = hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

NOW_MS = 1_767_612_345_678
SENT_AT = 1_767_612_999
MAPPINGS = [loader.load(name) for name in loader.PRESETS]
MAPPED = tuple(catalog.ACTIONS)


def delivery(body: str | dict[str, Any]) -> Delivery:
    return Delivery("msg_1", SENT_AT, body if isinstance(body, str) else json.dumps(body))


def envelope(type_: str = "user.updated", **changes: Any) -> dict[str, Any]:
    return samples.event(type_, clerk_id="user_1", now_ms=NOW_MS) | changes


def with_data(type_: str = "user.updated", **changes: Any) -> dict[str, Any]:
    event = envelope(type_)
    event["data"] |= changes
    return event


def without(event: dict[str, Any], *path: str) -> dict[str, Any]:
    """The event without one field."""
    inner = event
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return event


def refusal(body: str | dict[str, Any]) -> InvalidEvent:
    with pytest.raises(InvalidEvent) as caught:
        parse(delivery(body))
    return caught.value


def event_of(body: str | dict[str, Any]) -> Event:
    event = parse(delivery(body))
    assert isinstance(event, Event)
    return event


def change(
    body: str | dict[str, Any], *, preset: int = 0, instance_id: str | None = None
) -> Change:
    return change_of(delivery(body), MAPPINGS[preset], instance_id=instance_id)


def upsert(body: str | dict[str, Any], *, instance_id: str | None = None) -> Upsert:
    effect = change(body, instance_id=instance_id).effect
    assert isinstance(effect, Upsert)
    return effect


def payload_of(change: Change) -> str | None:
    assert isinstance(change.source, Delivered)
    return change.source.payload


def kept(
    payload: str, reason: Reason, *, clerk_id: str | None = None, type_: str = "user.updated"
) -> Change:
    """A quarantine of an event whose type is known."""
    source = Delivered("msg_1", type_, payload=payload)
    return Change(source, Quarantine(reason, kind="user", clerk_id=clerk_id))


def dropped(reason: Reason) -> Change:
    """A quarantine of what may be a mail with a one-time code."""
    return Change(Delivered("msg_1", "unknown"), Quarantine(reason))


def test_an_event_is_read_whole() -> None:
    body = envelope()
    assert parse(delivery(body)) == Event(
        type="user.updated",
        kind="user",
        action=Action.SAVE,
        clerk_id="user_1",
        version_ms=body["data"]["updated_at"],
        event_ms=NOW_MS,
        data=body["data"],
    )


@pytest.mark.parametrize("type_", MAPPED)
def test_the_type_says_what_to_do_with_what(type_: str) -> None:
    kind, _, what = type_.partition(".")
    event = event_of(envelope(type_))
    assert event.kind == kind
    assert event.action is (Action.DELETE if what == "deleted" else Action.SAVE)
    assert event.clerk_id == "user_1"


@pytest.mark.parametrize("type_", sorted({*catalog.TYPES} - {*MAPPED}))
def test_other_types_of_clerks_are_read_and_ignored(type_: str) -> None:
    assert parse(delivery(envelope(type_))) == OtherEvent(type_)
    assert change(envelope(type_)) == Change(Delivered("msg_1", type_), Ignore())


@pytest.mark.parametrize(
    "type_", ["user.banned", "user", "user.", "User.created", "~!", "x" * 128, "email.created2"]
)
@pytest.mark.parametrize("data", [None, 7, [], {}, {"id": 7}])
def test_unknown_types_are_ignored_whatever_they_hold(type_: str, data: object) -> None:
    ignored = change({"type": type_, "data": data})
    assert ignored == Change(Delivered("msg_1", type_), Ignore())


# Time


@pytest.mark.parametrize(
    ("timestamp", "event_ms"),
    [
        (NOW_MS, NOW_MS),
        (1_716_883_200, 1_716_883_200_000),
        (0, 0),
        (1, 1000),
        (99_999_999_999, 99_999_999_999_000),
        (100_000_000_000, 100_000_000_000),
        (1_767_612_345_678.0, NOW_MS),
        (253_402_300_799_999, 253_402_300_799_999),
        (None, SENT_AT * 1000),
    ],
)
def test_the_envelopes_time_is_milliseconds_or_seconds(
    timestamp: float | None, event_ms: int
) -> None:
    event = event_of(envelope(timestamp=timestamp))
    assert event.event_ms == event_ms
    assert type(event.event_ms) is int


def test_without_a_timestamp_the_attempt_is_the_event() -> None:
    assert event_of(without(envelope(), "timestamp")).event_ms == SENT_AT * 1000


ODD_TIMES = [
    True,
    False,
    -1,
    0.5,
    NOW_MS + 0.5,
    "",
    "1767612345678",
    "2026-01-05T11:25:45Z",
    [],
    [NOW_MS],
    {},
    253_402_300_800_000,
    2**53,
    2**63,
    10**400,
    1e300,
]


@pytest.mark.parametrize("time", ODD_TIMES, ids=lambda time: repr(time)[:20])
def test_an_odd_time_is_unusable_and_not_guessed(time: object) -> None:
    for body in (envelope(timestamp=time), with_data(updated_at=time)):
        error = refusal(body)
        assert (error.reason, error.type) == (Reason.BAD_VERSION, "user.updated")


@pytest.mark.parametrize("digits", ["1e400", "-1e400", "1E999999"])
def test_a_time_beyond_all_numbers_is_unusable(digits: str) -> None:
    body = json.dumps(envelope(timestamp="T")).replace('"T"', digits)
    assert refusal(body).reason in (Reason.BAD_VERSION, Reason.BAD_JSON)


def test_seconds_with_nothing_else_than_zeros_after_the_point_are_a_time() -> None:
    assert event_of(envelope(timestamp=1_716_883_200.0)).event_ms == 1_716_883_200_000


@pytest.mark.parametrize("missing", [True, False])
def test_without_updated_at_the_event_is_the_version(*, missing: bool) -> None:
    body = without(envelope(), "data", "updated_at") if missing else with_data(updated_at=None)
    event = event_of(body)
    assert (event.version_ms, event.event_ms) == (NOW_MS, NOW_MS)


def test_with_neither_time_the_attempt_is_the_version() -> None:
    body = without(without(envelope(), "timestamp"), "data", "updated_at")
    assert event_of(body).version_ms == SENT_AT * 1000


def test_updated_at_is_always_milliseconds() -> None:
    assert event_of(with_data(updated_at=1_716_883_200)).version_ms == 1_716_883_200


@patient
@given(st.integers(0, 253_402_300_799_999))
def test_every_time_that_is_read_is_one_that_can_be_written(timestamp: int) -> None:
    event = event_of(envelope(timestamp=timestamp))
    assert time_text(event.event_ms)


# Identity


@pytest.mark.parametrize("type_", MAPPED)
@pytest.mark.parametrize(
    "clerk_id",
    [None, "", 7, True, [], {}, "user 1", "user_1 ", "user_1\n", "üser", "u" * 129, "a\x00", "🎉"],
)
def test_an_object_without_a_usable_id_is_unusable(type_: str, clerk_id: object) -> None:
    error = refusal(with_data(type_, id=clerk_id))
    assert (error.reason, error.type) == (Reason.BAD_ID, type_)


@pytest.mark.parametrize("type_", MAPPED)
def test_an_object_that_has_no_id_is_unusable(type_: str) -> None:
    assert refusal(without(envelope(type_), "data", "id")).reason is Reason.BAD_ID


@pytest.mark.parametrize("clerk_id", ["u", "user_2xAbcDefGhiJklMnoPqrStuVwxy", "a.b-c", "u" * 128])
def test_any_plain_id_is_taken(clerk_id: str) -> None:
    assert event_of(with_data(id=clerk_id)).clerk_id == clerk_id


def test_a_deleted_membership_is_known_by_its_id_alone() -> None:
    body = with_data("organizationMembership.deleted", id="orgmem_1", updated_at="nonsense")
    assert change(body).effect == Delete(("organizationMembership", "orgmem_1"), NOW_MS)
    bare = {"type": "organizationMembership.deleted", "data": {"id": "orgmem_1"}}
    assert change(bare).clerk_id == "orgmem_1"


@pytest.mark.parametrize("instance_id", ["ins_other", "", "ins_mine ", "INS_MINE"])
def test_another_instances_events_are_rejected(instance_id: str) -> None:
    with pytest.raises(InvalidSignature, match="instance"):
        change(envelope(instance_id=instance_id), instance_id="ins_mine")


@pytest.mark.parametrize("type_", ["session.created", "email.created", "user.deleted", "x.y"])
def test_another_instances_events_are_rejected_whatever_their_type(type_: str) -> None:
    body = {"type": type_, "instance_id": "ins_other", "data": {"id": "x"}}
    with pytest.raises(InvalidSignature, match="instance"):
        change(body, instance_id="ins_mine")


@pytest.mark.parametrize("instance_id", ["ins_mine", None, 7, [], {}])
def test_our_own_events_and_those_that_name_no_instance_pass(instance_id: object) -> None:
    assert upsert(envelope(instance_id=instance_id), instance_id="ins_mine")
    assert upsert(without(envelope(), "instance_id"), instance_id="ins_mine")


@pytest.mark.parametrize("instance_id", [None, ""])
def test_with_none_configured_any_instance_passes(instance_id: str | None) -> None:
    assert upsert(envelope(instance_id="ins_other"), instance_id=instance_id)


# Bodies that are no event


@pytest.mark.parametrize(
    "body",
    [
        "",
        " ",
        "{",
        "{}{}",
        "nope",
        "'a'",
        "\ufeff{}",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"a": NaN}',
        '{"a": Infinity}',
        '{"a": -Infinity}',
        '{"a": "\x01"}',
        '{"a": 1,}',
        '{"a": 01}',
        "\x00",
        '{"type": "user.updated", // no\n}',
    ],
    ids=lambda body: repr(body)[:20],
)
def test_what_is_not_json_is_unusable_and_not_kept(body: str) -> None:
    error = refusal(body)
    assert (error.reason, error.type) == (Reason.BAD_JSON, None)
    assert change(body) == dropped(Reason.BAD_JSON)


@pytest.mark.parametrize(
    "body",
    [
        "null",
        "7",
        '"text"',
        "[]",
        "true",
        "{}",
        '{"data": {"id": "user_1"}}',
        '{"type": null}',
        '{"type": 7}',
        '{"type": ["user.updated"]}',
        '{"type": ""}',
        '{"type": "user updated"}',
        '{"type": "user.updated\\n"}',
        '{"type": "bénutzer"}',
        '{"type": "email.created ", "data": {"otp_code": "424242"}}',
        '{"type": "%s"}' % ("x" * 129),
    ],
)
def test_what_has_no_type_is_unusable_and_not_kept(body: str) -> None:
    error = refusal(body)
    assert (error.reason, error.type) == (Reason.BAD_ENVELOPE, None)
    assert change(body) == dropped(Reason.BAD_ENVELOPE)


@pytest.mark.parametrize("data", [None, 7, "user_1", [], [{"id": "user_1"}], True])
def test_an_event_without_an_object_is_unusable_but_kept(data: object) -> None:
    body = envelope(data=data)
    assert refusal(body).reason is Reason.BAD_ENVELOPE
    assert change(body) == kept(json.dumps(body), Reason.BAD_ENVELOPE)


@pytest.mark.parametrize(
    ("body", "clerk_id", "reason"),
    [
        (with_data(updated_at="odd"), "user_1", Reason.BAD_VERSION),
        (envelope(timestamp="odd"), "user_1", Reason.BAD_VERSION),
        (with_data(id=None), None, Reason.BAD_ID),
        (envelope(data=None), None, Reason.BAD_ENVELOPE),
    ],
)
def test_what_is_unusable_is_told_by_what_is_known_of_it(
    body: dict[str, Any], clerk_id: str | None, reason: Reason
) -> None:
    assert change(body) == kept(json.dumps(body), reason, clerk_id=clerk_id)


def test_of_equal_keys_the_last_counts() -> None:
    event = event_of('{"type":"x","type":"user.deleted","data":{"id":"a","id":"b"}}')
    assert (event.type, event.clerk_id) == ("user.deleted", "b")


def test_escapes_four_byte_characters_and_nul_are_text() -> None:
    body = json.dumps(with_data(first_name="Zoë🎉\x00"), ensure_ascii=True)
    assert event_of(body).data["first_name"] == "Zoë🎉\x00"


def test_unknown_fields_change_nothing() -> None:
    body = with_data(new_field={"a": [1]})
    assert upsert(body | {"new": 1}) == upsert(envelope())


def test_an_object_needs_nothing_but_its_id() -> None:
    saved = upsert({"type": "user.created", "data": {"id": "user_1"}})
    assert set(saved.values.values()) == {None}


# JSON that is valid, and strange


def spelt(event: dict[str, Any], digits: str) -> str:
    """The event's JSON with this text for every value that is `@@`."""
    return json.dumps(event).replace('"@@"', digits)


STRANGE = {
    "half a pair": '"cut \\ud83d"',
    "a name of half a pair": '{"\\ud83d": 1}',
    "5000 digits": "9" * 5000,
    "beyond a double": "-1e400",
    "250 levels": "[" * 250 + "]" * 250,
    "100,000 levels": '{"a":' * 100_000 + "1" + "}" * 100_000,
}
strange = pytest.mark.parametrize("digits", STRANGE.values(), ids=STRANGE)


@strange
def test_what_is_strange_and_not_mapped_changes_nothing(digits: str) -> None:
    for body in (with_data(x="@@"), envelope(x="@@"), with_data(email_addresses=[{"x": "@@"}])):
        assert upsert(spelt(body, digits)).entity == ("user", "user_1")
    assert upsert(spelt(with_data(x="@@"), digits)) == upsert(envelope())
    deleted = change(spelt(with_data("user.deleted", x="@@"), digits))
    assert deleted.effect == Delete(("user", "user_1"), NOW_MS)


@strange
def test_what_is_strange_where_a_time_is_expected_is_told_with_its_id(digits: str) -> None:
    for body in (with_data(updated_at="@@"), envelope(timestamp="@@")):
        text = spelt(body, digits)
        assert change(text) == kept(text, Reason.BAD_VERSION, clerk_id="user_1")


@strange
def test_what_is_strange_is_no_id_and_no_object(digits: str) -> None:
    text = spelt(with_data(id="@@"), digits)
    assert change(text) == kept(text, Reason.BAD_ID)
    text = spelt(envelope(data="@@"), digits)
    assert change(text) in [kept(text, reason) for reason in (Reason.BAD_ENVELOPE, Reason.BAD_ID)]


@strange
def test_what_is_strange_is_no_type_and_such_a_body_is_not_kept(digits: str) -> None:
    for body in (spelt(envelope(type="@@"), digits), digits, f"[{digits}]", f'{{"a": {digits}}}'):
        assert change(body) == dropped(Reason.BAD_ENVELOPE)


def test_half_a_pair_is_another_instance() -> None:
    with pytest.raises(InvalidSignature, match="instance"):
        change(spelt(envelope(instance_id="@@"), '"ins_\\ud83d"'), instance_id="ins_mine")


@strange
@pytest.mark.parametrize("type_", ["email.created", "sms.created", "user.banned"])
def test_what_is_strange_in_what_is_ignored_is_not_kept(type_: str, digits: str) -> None:
    for body in (
        with_data("email.created", code="@@") | {"type": type_},
        {"type": type_, "data": "@@"},
    ):
        assert change(spelt(body, digits)) == Change(Delivered("msg_1", type_), Ignore())


# Secrets


@pytest.mark.parametrize("type_", ["email.created", "sms.created"])
@pytest.mark.parametrize("preset", [0, 1])
def test_mails_and_messages_are_never_kept(type_: str, preset: int) -> None:
    body = json.dumps(envelope(type_))
    assert change(body, preset=preset) == Change(Delivered("msg_1", type_), Ignore())
    for broken in (body[:-1], body.replace("event", "\\ud800"), body.replace(type_, type_ + " ")):
        assert payload_of(change(broken, preset=preset)) is None
    contents: tuple[object, ...] = (None, 7, [], {"id": None}, {"body": "Your code is 424242"})
    for data in contents:
        assert payload_of(change(envelope(type_, data=data), preset=preset)) is None


def test_what_may_end_in_quarantine_carries_its_payload() -> None:
    body = json.dumps(envelope())
    assert payload_of(change(body)) == body


# Whatever the fields hold

JUNK: tuple[object, ...] = (
    None,
    7,
    -1.5,
    "text",
    [],
    [None, {"id": None}],
    {},
    {"id": {"a": 1}},
    True,
)


def paths(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(inner, (*path, key))


def replaced(value: Any, path: tuple[str | int, ...], junk: object) -> Any:
    copy = deepcopy(value)
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = junk
    return copy


def settled(body: dict[str, Any], *, instance_id: str | None) -> None:
    """The body becomes a sensible Change on every mapping, or is another instance's."""
    for of in MAPPINGS:
        try:
            found = change_of(delivery(body), of, instance_id=instance_id)
        except InvalidSignature:
            assert body["instance_id"] != instance_id
            continue
        assert found.svix_id == "msg_1"
        match found.effect:
            case Quarantine(reason=reason):
                assert reason in QUARANTINES
            case Upsert(entity=(kind, clerk_id)) | Delete(entity=(kind, clerk_id)):
                assert kind in of.tables
                assert clerk_id


@pytest.mark.parametrize("type_", catalog.TYPES)
def test_any_field_may_hold_anything(type_: str) -> None:
    event = envelope(type_)
    for path in paths(event):
        if len(path) > 2 and type_ not in MAPPED:
            continue  # of these nothing but the envelope is read
        for junk in JUNK:
            body = replaced(event, path, junk)
            settled(body, instance_id=event["instance_id"])


@pytest.mark.parametrize("type_", MAPPED)
def test_any_field_may_be_missing(type_: str) -> None:
    event = envelope(type_)
    for path in paths(event):
        if isinstance(path[-1], str):
            body = deepcopy(event)
            inner: Any = body
            for key in path[:-1]:
                inner = inner[key]
            del inner[path[-1]]
            settled(body, instance_id=event["instance_id"])


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(sorted(samples.fields_of("user"))) | st.text(max_size=5),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@patient
@given(
    st.fixed_dictionaries(
        {"type": st.sampled_from(catalog.TYPES) | _json},
        optional={"data": _json, "timestamp": _json, "instance_id": _json, "object": _json},
    )
)
def test_any_object_becomes_a_change(body: dict[str, Any]) -> None:
    settled(body, instance_id=None)


@patient
@given(st.text(max_size=200))
def test_any_text_becomes_a_change(body: str) -> None:
    assert change(body).svix_id == "msg_1"
