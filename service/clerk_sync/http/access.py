"""Who may read people's data: the app on this host, or a caller with the app token.

Only the connection shows that a caller is on this host. Nothing in a request makes it local, but
some headers show that it is not.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from multidict import CIMultiDictProxy

SHORTEST: Final = 16
# What a header can carry without quoting; the comma separates tokens.
_TOKEN: Final = re.compile(rf"[\x21-\x2b\x2d-\x7e]{{{SHORTEST},512}}")
_BEARER: Final = re.compile(rb"bearer +([\x21-\x7e]+) *", re.IGNORECASE)
# A name that no name server is asked for, or an address.
_HOST: Final = re.compile(
    r"(localhost\.?|[0-9]+(\.[0-9]+){3}|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", re.IGNORECASE
)
# A proxy in the same pod is a loopback peer for whoever reaches it, and adds one of these.
_OF_PROXIES: Final = (
    "Forwarded",
    "Via",
    "X-Forwarded-For",
    "X-Forwarded-Host",
    "X-Forwarded-Proto",
    "X-Real-IP",
)


class InvalidToken(ValueError):
    """An app token cannot be used. The message never repeats it."""


def tokens(text: str) -> tuple[bytes, ...]:
    """The tokens of `CLERK_SYNC_APP_TOKEN`, separated by spaces or commas. Raises InvalidToken."""
    found = [word for word in re.split(r"[\s,]+", text) if word]
    if not found:
        raise InvalidToken("is empty: make a token with `openssl rand -hex 32`")
    for place, word in enumerate(found, start=1):
        if not _TOKEN.fullmatch(word):
            raise InvalidToken(
                f"token {place} of {len(found)} is not {SHORTEST} to 512 letters, digits and signs "
                "of ASCII: make one with `openssl rand -hex 32`"
            )
    return tuple(word.encode() for word in found)


def refusal(
    headers: CIMultiDictProxy[str], *, peer: Any, own: Any, known: Sequence[bytes]
) -> str | None:
    """Why this request is forbidden, in words for the caller; None if it is allowed.

    `peer` and `own` are the two addresses of its connection, as sockets have them, `known` are
    the tokens that open.
    """
    if _bears(headers, known):
        return None
    advice = (
        "send one of the tokens in CLERK_SYNC_APP_TOKEN as `Authorization: Bearer TOKEN`"
        if known
        else "set CLERK_SYNC_APP_TOKEN, and send it as `Authorization: Bearer TOKEN`"
    )
    # Both ends: a mesh's proxy may have a loopback address of its own (Istio's is 127.0.0.6) and
    # connects, for others, to the pod's address, as do Linkerd's from 2.11 on
    # (https://istio.io/latest/blog/2021/upcoming-networking-changes/,
    # https://github.com/linkerd/linkerd2/issues/6495).
    if not (_is_loopback(peer) and _is_loopback(own)):
        return (
            f"without a token only the app beside this process is answered, at localhost: {advice}"
        )
    if (sign := _sign_of_others(headers)) is not None:
        return f"{sign}, so it may be made for somebody who is not beside this process: {advice}"
    return None


def _bears(headers: CIMultiDictProxy[str], known: Sequence[bytes]) -> bool:
    given = headers.getall("Authorization", ())
    if len(given) != 1:  # which of several counts is a question that proxies answer differently
        return False
    bearer = _BEARER.fullmatch(given[0].encode(errors="surrogateescape"))
    # Each is compared, in constant time: nothing tells which came close.
    return bearer is not None and bool(sum(hmac.compare_digest(bearer[1], one) for one in known))


def _is_loopback(address: Any) -> bool:
    """Whether this is the address of a socket on the loopback interface."""
    try:
        parsed = ipaddress.ip_address(address[0])
    except (ValueError, LookupError, TypeError):
        return False
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback


def _sign_of_others(headers: CIMultiDictProxy[str]) -> str | None:
    """The sign that a proxy or a browser made this request for another client, if any."""
    for name in _OF_PROXIES:
        if name in headers:
            return f"the request has the header {name}, which proxies add"
    # A page of anybody's, in the browser of somebody who develops here, can send requests to
    # localhost: by its own name that leads here (DNS rebinding), or blindly.
    if "Origin" in headers or headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        return "the request comes from a page in a browser"
    if not all(_HOST.fullmatch(host) for host in headers.getall("Host", ())):
        return "the request's Host is neither localhost nor an IP address"
    return None
