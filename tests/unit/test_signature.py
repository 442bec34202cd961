"""Only Clerk gets in: what is signed with our secret, whole and fresh, and nothing else."""

from __future__ import annotations

import base64
import hashlib
import hmac
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from svix.webhooks import Webhook

from clerk_sync.clerk.signature import (
    TOLERANCE_SECONDS,
    Delivery,
    InvalidSecret,
    InvalidSignature,
    recorded,
    signers,
    verify,
)
from clerk_sync.outcomes import Reason

# In a fresh clone, the first text waits until hypothesis has made its tables of characters.
patient = hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

OLD = "whsec_" + base64.b64encode(b"the old secret, 24 bytes").decode()
NEW = "whsec_" + base64.b64encode(b"the new secret is 32 bytes long!").decode()
STRANGERS = "whsec_" + base64.b64encode(b"somebody else's own secret").decode()
NOW = 1_767_612_345
BODY = '{"type":"user.created","data":{"id":"user_1","first_name":"Zoë"}}'.encode()


def signature_of(
    body: bytes = BODY, *, secret: str = NEW, svix_id: str = "msg_1", at: int = NOW
) -> str:
    return Webhook(secret).sign(svix_id, datetime.fromtimestamp(at, tz=UTC), body.decode())


def headers_of(
    signature: str | None = None, *, svix_id: str = "msg_1", at: int | str = NOW, name: str = "svix"
) -> dict[str, str]:
    return {
        f"{name}-id": svix_id,
        f"{name}-timestamp": str(at),
        f"{name}-signature": signature_of() if signature is None else signature,
    }


def reason_for(
    headers: dict[str, str], body: bytes = BODY, *, secrets: str = NEW, now: float = NOW
) -> Reason | None:
    """Why the POST is rejected; None when it is not."""
    try:
        verify(headers, body, signers=signers(secrets), now=now)
    except InvalidSignature as error:
        return error.reason
    return None


def test_a_signed_post_becomes_a_delivery() -> None:
    delivery = verify(headers_of(), BODY, signers=signers(NEW), now=NOW)
    assert delivery == Delivery("msg_1", NOW, BODY.decode())


def test_the_published_vector_of_svix_verifies() -> None:
    # https://docs.svix.com/receiving/verifying-payloads/how-manual
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    headers = headers_of(
        "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
        svix_id="msg_p5jXN8AQM9LWM0D4loKWxJek",
        at=1614265330,
    )
    body = b'{"test": 2432232314}'
    assert reason_for(headers, body, secrets=secret, now=1614265330) is None


def test_the_signature_is_the_hmac_that_the_standard_describes() -> None:
    key = base64.b64decode(NEW.removeprefix("whsec_"))
    digest = hmac.digest(key, b"msg_1." + str(NOW).encode() + b"." + BODY, hashlib.sha256)
    assert reason_for(headers_of("v1," + base64.b64encode(digest).decode())) is None


@pytest.mark.parametrize("secret", [OLD, NEW])
@pytest.mark.parametrize("separator", [" ", ",", ", ", "\n", "  \n"])
def test_each_of_several_secrets_is_good(secret: str, separator: str) -> None:
    headers = headers_of(signature_of(secret=secret))
    assert reason_for(headers, secrets=f"{OLD}{separator}{NEW}") is None
    assert reason_for(headers, secrets=f"{NEW}{separator}{OLD}\n") is None


def test_a_secret_is_as_good_without_its_prefix() -> None:
    assert reason_for(headers_of(), secrets=NEW.removeprefix("whsec_")) is None


def test_a_secret_that_is_no_longer_configured_is_wrong() -> None:
    assert reason_for(headers_of(signature_of(secret=OLD)), secrets=NEW) is Reason.WRONG
    assert reason_for(headers_of(signature_of(secret=STRANGERS)), secrets=f"{OLD} {NEW}") is (
        Reason.WRONG
    )


def test_the_standards_header_names_are_as_good() -> None:
    assert reason_for(headers_of(name="webhook")) is None


def test_svix_headers_go_before_the_standards() -> None:
    theirs = headers_of("v1,AAAA", svix_id="msg_2", name="webhook")
    assert reason_for(theirs | headers_of()) is None
    assert reason_for(headers_of("v1,AAAA") | headers_of(name="webhook")) is Reason.WRONG


@pytest.mark.parametrize(
    "others",
    [
        signature_of(secret=STRANGERS),
        "v1",
        "v1,",
        ",",
        "",
        "v1,not base64!",
        "v1,====",
        "v1,\udc80",
        "v1,ключ",
        "v1a," + "A" * 88,
        "v2,abc",
        "v1,AAAA v1,BBBB v1a,CCCC",
    ],
)
def test_one_good_signature_is_enough(others: str) -> None:
    assert reason_for(headers_of(f"{others} {signature_of()}")) is None
    assert reason_for(headers_of(f"{signature_of()} {others}")) is None


@pytest.mark.parametrize("version", ["v1a", "v2", "V1", "v01"])
def test_other_versions_of_signatures_are_ignored(version: str) -> None:
    signature = signature_of().replace("v1,", f"{version},")
    assert reason_for(headers_of(signature)) is Reason.WRONG


@pytest.mark.parametrize("off", [-TOLERANCE_SECONDS, -1, 0, 0.999, 1, TOLERANCE_SECONDS])
def test_five_minutes_either_way_are_tolerated(off: float) -> None:
    assert reason_for(headers_of(), now=NOW + off) is None


@pytest.mark.parametrize("off", [-86400, -301, -300.001, 300.001, 301, 3000, 86400])
def test_more_than_five_minutes_are_not(off: float) -> None:
    assert TOLERANCE_SECONDS == 300
    assert reason_for(headers_of(), now=NOW + off) is Reason.EXPIRED


def test_a_stranger_is_not_told_that_his_forgery_is_expired() -> None:
    assert reason_for(headers_of("v1,AAAA"), now=NOW + 9999) is Reason.WRONG


def test_the_age_of_a_recorded_delivery_does_not_matter() -> None:
    headers = headers_of(signature_of(at=1_000_000_000), at=1_000_000_000)
    assert reason_for(headers) is Reason.EXPIRED
    assert recorded(headers, BODY, signers=signers(NEW)).sent_at == 1_000_000_000


def test_the_signature_of_a_recorded_delivery_does() -> None:
    with pytest.raises(InvalidSignature, match="wrong"):
        recorded(headers_of(), BODY + b" ", signers=signers(NEW))


@pytest.mark.parametrize("part", ["id", "timestamp", "signature"])
@pytest.mark.parametrize("name", ["svix", "webhook"])
def test_a_header_that_is_not_there_or_empty_is_missing(name: str, part: str) -> None:
    headers = headers_of(name=name)
    assert reason_for(headers | {f"{name}-{part}": ""}) is Reason.MISSING
    del headers[f"{name}-{part}"]
    assert reason_for(headers) is Reason.MISSING


def test_a_post_without_headers_is_missing_them() -> None:
    assert reason_for({}) is Reason.MISSING


@pytest.mark.parametrize(
    "svix_id",
    ["msg.1", ".", "msg 1", " msg_1", "msg_1\n", "msg\x00", "msg_ä", "msg_\udc80", "m" * 256],
)
def test_an_id_that_cannot_be_one_is_malformed(svix_id: str) -> None:
    signature = "v1," + "A" * 43 + "="
    if svix_id.isprintable():
        signature = signature_of(svix_id=svix_id)
    assert reason_for(headers_of(signature, svix_id=svix_id)) is Reason.MALFORMED


@pytest.mark.parametrize("svix_id", ["m", "msg_" + "x" * 251, "a-b_c~!", "{}"])
def test_any_other_id_is_taken(svix_id: str) -> None:
    assert reason_for(headers_of(signature_of(svix_id=svix_id), svix_id=svix_id)) is None


def test_no_signature_fits_two_deliveries() -> None:
    """With dots in ids, parts of what is signed could wander from one into the next."""
    signature = signature_of(b"1.{}", svix_id="msg")
    assert reason_for(headers_of(signature, svix_id="msg"), b"1.{}") is None
    assert reason_for(headers_of(signature, svix_id=f"msg.{NOW}", at=1), b"{}", now=1) is (
        Reason.MALFORMED
    )


@pytest.mark.parametrize(
    "timestamp",
    [
        "1_0.5",
        "1e9",
        "0",
        "-1",
        "+1",
        "nan",
        "inf",
        "now",
        "0x10",
        f" {NOW}",
        f"{NOW} ",
        f"{NOW}\n",
        f"{NOW}.0",
        f"0{NOW}",
        f"{NOW}"[:5] + "_" + f"{NOW}"[5:],
        str(NOW).translate({ord("1"): "\N{ARABIC-INDIC DIGIT ONE}"}),
        str(NOW).translate({ord("1"): "\N{FULLWIDTH DIGIT ONE}"}),
        "999999999999",
        "9" * 13,
        "9" * 5000,
        "\udc80",
    ],
)
def test_a_timestamp_that_is_not_plain_seconds_is_malformed(timestamp: str) -> None:
    assert reason_for(headers_of(at=timestamp)) is Reason.MALFORMED


@pytest.mark.parametrize("signature", ["v1", "v1,", ",", " ", "v1, AAAA", "AAAA", "v1,A\n", "\0"])
def test_a_signature_that_cannot_be_one_is_malformed(signature: str) -> None:
    assert reason_for(headers_of(signature)) is Reason.MALFORMED


@pytest.mark.parametrize("body", [b"\xff", b"\xed\xa0\x80", BODY[:-20] + b"\xc3" + BODY[-20:]])
def test_a_body_that_is_not_utf_8_is_malformed(body: bytes) -> None:
    assert reason_for(headers_of(), body) is Reason.MALFORMED


@patient
@given(st.integers(0, len(BODY) - 1), st.integers(1, 127))
def test_no_byte_of_the_body_may_change(place: int, change: int) -> None:
    body = bytearray(BODY)
    body[place] ^= change
    assert reason_for(headers_of(), bytes(body)) in (Reason.WRONG, Reason.MALFORMED)


@pytest.mark.parametrize("body", [b"", BODY + b"\n", BODY[:-1], b"\xef\xbb\xbf" + BODY])
def test_a_body_is_not_longer_or_shorter_than_signed(body: bytes) -> None:
    assert reason_for(headers_of(), body) is Reason.WRONG


@pytest.mark.parametrize(
    "headers", [headers_of(svix_id="msg_2"), headers_of(at=NOW + 1), headers_of(at=NOW - 1)]
)
def test_id_and_time_are_signed_too(headers: dict[str, str]) -> None:
    assert reason_for(headers) is Reason.WRONG


_names = st.sampled_from(
    [f"{name}-{part}" for name in ("svix", "webhook") for part in ("id", "timestamp", "signature")]
)
_texts = st.one_of(
    st.text(max_size=60),
    st.text(st.characters(codec=None, categories=["Cs", "Nd", "Po"]), max_size=20),
    st.binary(max_size=40).map(lambda octets: octets.decode("utf-8", "surrogateescape")),
    st.sampled_from(["msg_1", str(NOW), signature_of(), "v1,AAAA", f"v1,= {signature_of()}"]),
    st.integers().map(str),
    st.floats().map(str),
    st.lists(st.sampled_from(["v1", "v1a", ",", " ", "=", "A", "\x00", "é", "/"])).map("".join),
)


@patient
@given(st.dictionaries(_names, _texts), st.one_of(st.binary(max_size=60), st.just(BODY)))
def test_whatever_is_posted_is_signed_or_rejected(headers: dict[str, str], body: bytes) -> None:
    reason_for(headers, body, secrets=f"{OLD} {NEW}")


@patient
@given(st.fixed_dictionaries({f"svix-{part}": _texts for part in ("id", "timestamp", "signature")}))
def test_nobody_guesses_a_signature(headers: dict[str, str]) -> None:
    assume(signature_of() not in headers["svix-signature"])
    assert reason_for(headers) is not None


@patient
@given(st.text(max_size=400), st.integers(NOW - 300, NOW + 300))
def test_whatever_clerk_signs_comes_in_unchanged(text: str, at: int) -> None:
    body = text.encode()
    headers = headers_of(signature_of(body, at=at), at=at)
    delivery = verify(headers, body, signers=signers(NEW), now=NOW)
    assert (delivery.body, delivery.sent_at) == (text, at)


@pytest.mark.parametrize(
    "secret",
    [
        "hunter2",
        "whsec_",
        "whsec_hunter2-hunter2-hunter2-hunter2",
        "whsec_" + "A" * 500,
        "whsec_hunter2hunter2hunter2A===",
        "whsec_hunter2hunter2hunter2hunt",  # base64 in form, but no base64 is 25 long
        "sk_test_hunter2hunter2hunter2hunter2",
        "whsec_hunter2ключhunter2hunter2",
        "whsec_hunter2\x00hunter2hunter2",
    ],
)
def test_a_secret_that_cannot_be_one_is_told_apart_but_not_repeated(secret: str) -> None:
    with pytest.raises(InvalidSecret, match="secret 2 of 3 is not `whsec_` and base64") as caught:
        signers(f"{NEW} {secret},{OLD}")
    assert "hunter2" not in str(caught.value)
    assert NEW[6:] not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@patient
@given(st.text())
def test_whatever_a_secret_is_it_works_or_is_invalid(secret: str) -> None:
    try:
        found = signers(secret)
    except InvalidSecret:
        return
    assert found


@pytest.mark.parametrize("secrets", ["", " ", ",", " ,\n"])
def test_no_secret_is_no_signer(secrets: str) -> None:
    with pytest.raises(InvalidSecret, match="is empty: paste the endpoint's Signing Secret"):
        signers(secrets)


def test_a_rejection_says_its_reason_and_nothing_of_what_was_sent() -> None:
    with pytest.raises(InvalidSignature) as caught:
        verify(headers_of("v1,AAAA"), BODY, signers=signers(NEW), now=NOW)
    assert str(caught.value) == "wrong"
