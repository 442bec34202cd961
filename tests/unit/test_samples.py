"""The made-up events must be what Clerk would send: `trigger` and this suite rest on them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from clerk_sync.clerk import catalog, samples

if TYPE_CHECKING:
    from collections.abc import Iterator

NOW = 1_800_000_000_000
DAY = 86_400_000
SMALL_DELETES = {
    "user.deleted": {"deleted", "external_id", "id", "object"},
    "organization.deleted": {"deleted", "id", "object", "slug"},
    "organizationDomain.deleted": {"deleted", "id", "object"},
    "role.deleted": {"deleted", "id", "object"},
    "permission.deleted": {"deleted", "id", "object"},
}
PREFIXES = {
    "user": "user",
    "organization": "org",
    "organizationMembership": "orgmem",
    "organizationInvitation": "orginv",
    "organizationDomain": "orgdmn",
    "role": "role",
    "permission": "perm",
    "session": "sess",
    "waitlistEntry": "wle",
    "email": "ema",
    "sms": "sms",
    "subscription": "csub",
    "subscriptionItem": "csub_item",
    "paymentAttempt": "pa",
}
OBJECTS = {
    "organizationMembership": "organization_membership",
    "organizationInvitation": "organization_invitation",
    "organizationDomain": "organization_domain",
    "waitlistEntry": "waitlist_entry",
    "sms": "sms_message",
    "subscription": "commerce_subscription",
    "subscriptionItem": "commerce_subscription_item",
    "paymentAttempt": None,  # Clerk's has no `object`
}
# What is meant to lie ahead when an event is sent.
AHEAD = {"abandon_at", "expire_at", "expires_at", "period_end", "period_start"}


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    match value:
        case dict():
            for key, part in value.items():
                yield from leaves(part, key)
        case list():
            for part in value:
                yield from leaves(part, name)
        case _:
            yield name, value


def data_of(type_: str, **options: Any) -> dict[str, Any]:
    data: dict[str, Any] = samples.event(type_, now_ms=NOW, **options)["data"]
    return data


def test_every_type_that_clerk_documents_is_there_once() -> None:
    assert len(catalog.TYPES) == len(set(catalog.TYPES)) == 46
    assert {type_.partition(".")[0] for type_ in catalog.TYPES} == set(PREFIXES)
    assert set(catalog.TYPES) >= catalog.ACTIONS.keys() | catalog.SECRET_TYPES
    assert "subscriptionItem.created" in catalog.TYPES


@pytest.mark.parametrize("type_", catalog.TYPES)
def test_an_envelope_is_whole(type_: str) -> None:
    kind = type_.partition(".")[0]
    envelope = samples.event(type_, now_ms=NOW)
    assert envelope.keys() == {
        "data",
        "event_attributes",
        "instance_id",
        "object",
        "timestamp",
        "type",
    }
    assert envelope["object"] == "event"
    assert envelope["type"] == type_
    assert envelope["timestamp"] == NOW
    assert re.fullmatch("ins_[0-9A-Za-z]{27}", envelope["instance_id"])
    assert envelope["event_attributes"]["http_request"].keys() == {"client_ip", "user_agent"}
    data = envelope["data"]
    assert re.fullmatch(PREFIXES[kind] + "_[0-9A-Za-z]{27}", data["id"])
    assert data.get("object") == OBJECTS.get(kind, kind)
    assert data.keys() <= samples.fields_of(kind) | {"deleted"}
    assert json.loads(json.dumps(envelope)) == envelope


@pytest.mark.parametrize("type_", catalog.TYPES)
def test_nothing_is_left_to_fill_in(type_: str) -> None:
    envelope = samples.event(type_, now_ms=NOW)
    assert not re.search(r"\{\w+(\.\w+)?\}", json.dumps(envelope))


@pytest.mark.parametrize("type_", catalog.TYPES)
def test_nothing_has_happened_that_is_yet_to_come(type_: str) -> None:
    data = data_of(type_)
    changed = data.get("updated_at", NOW - 15)
    for name, value in leaves(data):
        if not isinstance(value, int) or not name.endswith(("_at", "_ms", "_date", "_start")):
            continue
        assert value > 1e12, name
        if name not in AHEAD:
            assert value <= NOW - 15, name
        if name == "created_at":
            assert value <= changed


@pytest.mark.parametrize("type_", [t for t in catalog.TYPES if t.endswith(".created")])
def test_what_is_created_is_new(type_: str) -> None:
    data = data_of(type_)
    if "updated_at" in data:
        assert data["updated_at"] == NOW - 15
        assert NOW - 50 <= data["created_at"] <= data["updated_at"]


@pytest.mark.parametrize("type_", [t for t in catalog.TYPES if t.endswith(".updated")])
def test_what_is_updated_shows_it_and_is_older(type_: str) -> None:
    kind = type_.partition(".")[0]
    created = data_of(f"{kind}.created", clerk_id="x")
    updated = data_of(type_, clerk_id="x")
    assert updated["updated_at"] == NOW - 15
    assert updated["created_at"] < updated["updated_at"] - 60_000
    shown = {name for name in created.keys() & updated.keys() if not name.endswith("_at")}
    assert any(created[name] != updated[name] for name in shown)


@pytest.mark.parametrize("type_", SMALL_DELETES)
def test_a_delete_is_small(type_: str) -> None:
    data = data_of(type_, clerk_id="x_1")
    assert data.keys() == SMALL_DELETES[type_]
    assert data["id"] == "x_1"
    assert data["deleted"] is True
    assert None not in data.values()


def test_a_deleted_membership_is_whole_and_looks_old() -> None:
    data = data_of("organizationMembership.deleted")
    assert data.keys() == samples.fields_of("organizationMembership")
    assert data["updated_at"] < NOW - DAY
    assert data["created_at"] < data["updated_at"]


def test_a_user_has_every_list_filled_and_its_primary_is_not_the_first() -> None:
    user = data_of("user.updated")
    assert not [name for name, value in user.items() if value == []]
    primary = [e["id"] for e in user["email_addresses"]].index(user["primary_email_address_id"])
    assert primary > 0
    assert user["primary_phone_number_id"] in [phone["id"] for phone in user["phone_numbers"]]
    assert user["primary_web3_wallet_id"] in [wallet["id"] for wallet in user["web3_wallets"]]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("user_2xAbcDefGhiJklMnoPqrStuVwxy", "user_2xabcdefghijklmnopqrstuvwxy"),  # only case
        ("user_2xA" + "0" * 24, "user_2xB" + "0" * 24),  # only in front
        ("user_" + "0" * 26 + "1", "user_" + "0" * 26 + "2"),
        ("user_1", "user_2"),
    ],
)
def test_users_of_different_ids_share_no_name(one: str, other: str) -> None:
    def names(clerk_id: str) -> set[str]:
        user = data_of("user.created", clerk_id=clerk_id)
        emails = {e[part] for e in user["email_addresses"] for part in ("id", "email_address")}
        return emails | {user["id"], user["username"], user["external_id"]}

    assert len(names(one)) == 7
    assert not names(one) & names(other)


def test_names_show_whose_they_are() -> None:
    user = data_of("user.created", clerk_id="user_2xAbcDefGhiJklMnoPqrStuVwxy")
    assert re.fullmatch("ada_tuvwxy[0-9a-f]{4}", user["username"])
    assert re.fullmatch("idn_[0-9A-Za-z]{27}", user["primary_email_address_id"])
    organization = data_of("organization.created", clerk_id="org_2xAbcDefGhiJklMnoPqrStuVwxy")
    assert re.fullmatch("analytical-engine-tuvwxy[0-9a-f]{4}", organization["slug"])


def test_one_id_is_one_user_in_every_event() -> None:
    created, updated = (
        data_of(type_, clerk_id="user_7") for type_ in ("user.created", "user.updated")
    )
    for name in ("username", "external_id", "primary_email_address_id", "image_url"):
        assert created[name] == updated[name]
    assert data_of("user.deleted", clerk_id="user_7")["external_id"] == created["external_id"]
    (membership,) = updated["organization_memberships"]
    assert membership["public_user_data"]["user_id"] == "user_7"
    assert membership["public_user_data"]["username"] == created["username"]


def test_what_an_object_holds_of_others_agrees_with_itself() -> None:
    session = data_of("session.created")
    assert session["user"]["id"] == session["user_id"]
    assert session["user"]["created_at"] < session["created_at"] - DAY
    membership = data_of("organizationMembership.created")
    assert membership["organization"].keys() == samples.fields_of("organization")
    assert membership["organization"]["created_at"] < membership["created_at"] - DAY
    (permission,) = data_of("role.created")["permissions"]
    assert permission.keys() == samples.fields_of("permission")


def test_ids_and_the_instance_are_as_asked() -> None:
    envelope = samples.event(
        "paymentAttempt.created", clerk_id='pa_"{user}"', now_ms=NOW, instance_id="ins_mine"
    )
    assert envelope["data"]["id"] == 'pa_"{user}"'
    assert envelope["instance_id"] == envelope["data"]["instance_id"] == "ins_mine"
    assert len({data_of("user.created")["id"] for _ in range(100)}) == 100


# Where an object names a user whose it is not: who made it, or whose part it holds a copy of.
MENTIONS = {
    "organization": {"created_by"},
    "organizationMembership": {"organization.created_by"},
    "organizationInvitation": {"inviter_id", "public_inviter_data.user_id"},
    "session": {"user.organization_memberships.public_user_data.user_id"}
    | {"user.organization_memberships.organization.created_by"},
    "paymentAttempt": {"subscription_items.payer.user_id"},
}


def paths_to(value: Any, wanted: str, path: str = "") -> Iterator[str]:
    match value:
        case dict():
            for key, part in value.items():
                yield from paths_to(part, wanted, f"{path}.{key}" if path else key)
        case list():
            for part in value:
                yield from paths_to(part, wanted, path)
        case str() if value == wanted:
            yield path


@pytest.mark.parametrize("kind", [kind for kind in catalog.KINDS if kind != "user"])
def test_it_is_known_where_an_object_says_whose_it_is(kind: str) -> None:
    user_id = data_of("session.created")["user_id"]
    types = [type_ for type_, (of, _) in catalog.ACTIONS.items() if of == kind]
    found = {path for type_ in types for path in paths_to(data_of(type_), user_id)}
    assert found == {*catalog.USER_PATHS.get(kind, ()), *MENTIONS.get(kind, ())}


def test_an_event_is_the_callers_to_change() -> None:
    first = data_of("user.updated", clerk_id="user_7")
    first["public_metadata"]["roles"].append("mine")
    first["email_addresses"].clear()
    second = data_of("user.updated", clerk_id="user_7")
    assert second["email_addresses"]
    assert "mine" not in second["public_metadata"]["roles"]


def test_what_a_type_says_of_its_object() -> None:
    assert data_of("session.revoked")["status"] == "revoked"
    assert data_of("organizationInvitation.accepted")["user_id"].startswith("user_")
    assert "user_id" not in data_of("organizationInvitation.created")
    assert data_of("waitlistEntry.created")["invitation"] is None
    assert data_of("subscriptionItem.freeTrialEnding")["is_free_trial"] is True
    overdue = data_of("subscription.pastDue")
    assert [overdue["status"], overdue["items"][0]["status"]] == ["past_due", "past_due"]
    assert overdue["items"][0]["plan"]["currency"] == "USD"


def test_fields_are_those_of_clerks_objects() -> None:
    assert samples.IDS.keys() == PREFIXES.keys()
    assert {kind: len(samples.fields_of(kind)) for kind in samples.IDS} == {
        "user": 46,
        "organization": 18,
        "organizationMembership": 11,
        "organizationInvitation": 17,
        "organizationDomain": 14,
        "role": 9,
        "permission": 8,
        "session": 14,
        "waitlistEntry": 8,
        "email": 14,
        "sms": 12,
        "subscription": 14,
        "subscriptionItem": 14,
        "paymentAttempt": 19,
    }
    assert {"id", "username", "email_addresses", "scim"} <= samples.fields_of("user")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("user.create", "user.created"),
        ("User.Created", "user.created"),
        ("organization_membership.deleted", "organizationMembership.deleted"),
        ("subscriptionItem.past_due", "subscriptionItem.pastDue"),
    ],
)
def test_an_unknown_type_is_told_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(samples.UnknownEventType, match=rf"`{wrong}`; did you mean `{right}`\?"):
        samples.event(wrong, now_ms=NOW)


def test_a_type_like_no_other_is_told_them_all() -> None:
    with pytest.raises(ValueError, match=r"there is: user\.created, .*paymentAttempt\.updated"):
        samples.event("", now_ms=NOW)


def test_serving_parses_no_sample_until_a_mapping_asks_for_fields() -> None:
    script = (
        "import sys\n"
        "import clerk_sync.app, clerk_sync.cli.serve\n"
        "from clerk_sync.clerk import samples\n"
        "print(samples._object.cache_info().currsize, 'svix' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("0 False\n", "")
