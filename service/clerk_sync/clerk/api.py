"""Read Clerk's Backend API: https://clerk.com/docs/reference/backend-api.

The client stays below its share of Clerk's rate limit, which the app also uses. It obeys 429, and
retries when a server or a connection fails.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import quote, urlencode

import aiohttp
import stamina
import structlog
import yarl
from pydantic_core import from_json

from clerk_sync.clerk.decoding import decoded
from clerk_sync.clock import now_ms

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

log = structlog.get_logger()

# Clerk ignores larger limits and falls back to 10
# (https://github.com/clerk/clerk-sdk-python/issues/166).
PAGE_LIMIT: Final = 500
API_VERSION: Final = "2026-05-12"
# https://clerk.com/docs/guides/how-clerk-works/system-limits
RATE_SECONDS: Final = 10.0
PRODUCTION_RATE: Final = 1000
DEVELOPMENT_RATE: Final = 100
# Slack for network jitter: requests may arrive closer together than they were sent, in seconds.
_RATE_MARGIN: Final = 0.25
_ATTEMPTS: Final = 8
# A Retry-After of 0 would use up the rest of the limit. One of a day would keep every caller
# waiting although Clerk may recover within a minute.
SHORTEST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 60.0
# How long a run waits for one answer while Clerk answers 429.
PATIENCE_SECONDS: Final = 900.0
# A pause that is worth a line in the log.
_LONG_PAUSE: Final = 5.0
_TIMEOUT: Final = aiohttp.ClientTimeout(total=60, sock_connect=10)
# The code when the organizations feature is switched off in the instance.
_SWITCHED_OFF: Final = "organization_not_enabled_in_instance"
# Of a user and of an organization, `UserNotFound` and `OrganizationNotFound`:
# https://clerk.com/docs/guides/development/errors/backend-api. Another code that comes with 404,
# `organization_not_found_or_unauthorized`, may mean one that is there.
_MISSING: Final = "resource_not_found"
# The key or the address is wrong, so every other request would fail as well.
_OF_EVERYTHING: Final = (401, 402, 403)
_MOST: Final = 10**12
_NO_ADDRESS: Final = "CLERK_API_URL: is no address such as https://api.clerk.com/v1"
_PATHS: Final = {
    "user": "users",
    "organization": "organizations",
    "organizationMembership": "organization_memberships",
}
_OBJECTS: Final = {
    "user": "user",
    "organization": "organization",
    "organizationMembership": "organization_membership",
}


class ClerkUnavailable(Exception):
    """Clerk gave no usable answer, after all retries."""


class ClerkRateLimited(ClerkUnavailable):
    """Clerk answers 429, for `seconds` more, which is longer than the caller may wait."""

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"Clerk answers 429, for {math.ceil(seconds)} s more: its rate limit is used up, by "
            "your app or by another run"
        )
        self.seconds = seconds


class DeletionUnconfirmed(ClerkUnavailable):
    """Clerk neither returned this very object nor confirmed that there is none."""


class ClerkRefused(Exception):
    """Clerk refuses the request: the key is wrong, or a feature is off; `status` is HTTP's.

    `missing` says that Clerk confirmed that the object does not exist.
    """

    def __init__(self, status: int, code: str, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.missing = missing

    @property
    def switched_off(self) -> bool:
        """Whether organizations are switched off in the instance."""
        return self.code == _SWITCHED_OFF


class _Again(Exception):
    """The request failed in a way that a retry may fix."""


@dataclass(frozen=True, slots=True)
class Read:
    """One answer: its JSON, and when its request began, in unix milliseconds."""

    json: Any
    began_ms: int


class Rate:
    """Lets at most `limit` requests begin in any ten seconds, and none while Clerk answers 429."""

    def __init__(self, limit: int, waited: Callable[[float], None]) -> None:
        self._begun: deque[float] = deque(maxlen=max(1, limit))
        self._turn = asyncio.Lock()
        self._paused_until = 0.0
        self._waited = waited

    def pause(self, seconds: float) -> None:
        """Let no request begin for so long."""
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    async def turn(self, patience: float = math.inf) -> None:
        """Wait until one more request may begin.

        Raises ClerkRateLimited when Clerk asks for a pause of more than `patience` seconds.
        """
        self._check(patience)
        async with self._turn:
            while (wait := self._wait()) > 0:
                self._check(patience)
                self._waited(wait)
                await asyncio.sleep(wait)
            self._begun.append(time.monotonic())

    def _check(self, patience: float) -> None:
        paused = self._paused_until - time.monotonic()
        if paused > patience:
            raise ClerkRateLimited(paused)

    def _wait(self) -> float:
        now = time.monotonic()
        wait = self._paused_until - now
        if len(self._begun) == self._begun.maxlen:
            wait = max(wait, self._begun[0] + RATE_SECONDS + _RATE_MARGIN - now)
        return wait


def rate_limit(key: str) -> int:
    """Return Clerk's rate limit for an instance with this secret key: requests in ten seconds."""
    return DEVELOPMENT_RATE if key.startswith("sk_test_") else PRODUCTION_RATE


class Requests(Protocol):
    """Counts the requests to Clerk."""

    def clerk_asked(self, status: int | None) -> None: ...

    def clerk_waited(self, seconds: float) -> None: ...


class Clerk:
    """A client of Clerk's API for one instance."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        key: Callable[[], str],
        *,
        share: float,
        metrics: Requests,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        """Use this `share` of the rate limit. `key` returns the current secret key.

        `patience` is how many seconds one answer may take while Clerk answers 429.
        """
        self._session = session
        self._url = url.rstrip("/")
        self._key = key
        self._metrics = metrics
        self._share = share
        self._patience = patience
        self._rate: Rate | None = None
        # Whether the current pause has been logged.
        self._logged = False

    async def instance(self) -> str | None:
        """Return the id of the key's instance; None when it cannot be read."""
        try:
            found = (await self._get("instance")).json
        except (ClerkRefused, ClerkUnavailable):
            return None
        name = found.get("id") if isinstance(found, dict) else None
        return name if isinstance(name, str) and name.startswith("ins_") else None

    @property
    def per_window(self) -> int:
        """The most requests within RATE_SECONDS. Raises ClerkUnavailable without a key."""
        return max(1, int(rate_limit(self._key()) * self._share))

    async def count(self, kind: str) -> int:
        """Return how many objects of a listed kind Clerk counts."""
        if kind == "user":
            counted = (await self._get("users/count")).json
        else:
            counted = (await self._get(_PATHS[kind], limit=1)).json
        return _whole(counted, "total_count")

    async def users(
        self,
        *,
        from_ms: int | None,
        to_ms: int | None,
        after: str | None = None,
        offset: int | None = None,
        limit: int = PAGE_LIMIT,
    ) -> Read:
        """Return users created in [from_ms, to_ms), in unix milliseconds, in order of creation.

        They come after the id `after`, or after `offset` users; Clerk does not accept both.
        """
        read = await self._get(
            "users",
            limit=limit,
            order_by="+created_at",
            starting_after=after,
            offset=offset,
            **_window(from_ms, to_ms),
        )
        return Read(_objects(read.json), read.began_ms)

    async def known_users(self, ids: Sequence[str]) -> int:
        """Return how many of these users, at most 100, exist."""
        return _whole((await self._get("users/count", user_id=[*ids])).json, "total_count")

    async def count_users(self, from_ms: int | None, to_ms: int | None) -> int:
        """Return how many users were created in [from_ms, to_ms), in unix milliseconds."""
        counted = await self._get("users/count", **_window(from_ms, to_ms))
        return _whole(counted.json, "total_count")

    async def listed(self, kind: str, offset: int) -> tuple[Read, int]:
        """Return a page of organizations or memberships in order of creation, and their total."""
        extra = {"include_members_count": "true"} if kind == "organization" else {}
        read = await self._get(
            _PATHS[kind], limit=PAGE_LIMIT, offset=offset, order_by="+created_at", **extra
        )
        objects = _objects(read.json.get("data") if isinstance(read.json, dict) else None)
        return Read(objects, read.began_ms), _whole(read.json, "total_count")

    async def one(self, kind: str, clerk_id: str) -> Read | None:
        """Return a user or an organization; None when Clerk confirms that there is none.

        Raises DeletionUnconfirmed for every answer that is neither.
        """
        if clerk_id == "count":  # GET /users/count is another endpoint
            raise DeletionUnconfirmed(f"Clerk cannot be asked for a {kind} of this id")
        extra = {"include_members_count": "true"} if kind == "organization" else {}
        read = await self._found(f"{_PATHS[kind]}/{_segment(clerk_id)}", **extra)
        if read is None or _is(read.json, kind, clerk_id):
            return read
        # An organization is found by its slug as well, which an id may look like.
        raise DeletionUnconfirmed(
            f"CLERK_API_URL: what answers there is not Clerk: not this {kind}"
        )

    async def membership(self, clerk_id: str, *, organization: str, user: str) -> Read | None:
        """Return a membership; None when its organization or its user no longer has it.

        It is None only when Clerk confirms that there is no such organization, or returns a
        complete list of this user's memberships. Raises DeletionUnconfirmed for every other answer.
        """
        path = f"organizations/{_segment(organization)}/memberships"
        read = await self._found(path, user_id=user, limit=PAGE_LIMIT)
        if read is None:
            return None
        try:
            objects = _objects(read.json.get("data") if isinstance(read.json, dict) else None)
            total = _whole(read.json, "total_count")
        except ClerkUnavailable as error:
            raise DeletionUnconfirmed(str(error)) from None
        for one in objects:
            if _is(one, "organizationMembership", clerk_id):
                return Read(one, read.began_ms)
        if total == len(objects) and all(_ends(one) == (organization, user) for one in objects):
            return None
        raise DeletionUnconfirmed(
            "Clerk's list of one user's memberships is not whole, or not this user's"
        )

    async def _found(self, path: str, **query: object) -> Read | None:
        try:
            return await self._get(path, **query)
        except ClerkRefused as error:
            if error.missing:
                return None
            if error.status in _OF_EVERYTHING or error.status < 400:  # noqa: PLR2004
                raise
            # A proxy's, or that of a wrong address, or of a question that Clerk does not take.
            raise DeletionUnconfirmed(str(error)) from None

    async def _get(self, path: str, **query: object) -> Read:
        # yarl would leave a `+` as it is, which a server reads as a space.
        given = {name: value for name, value in query.items() if value is not None}
        text = urlencode(given, doseq=True)
        try:
            url = yarl.URL(f"{self._url}/{path}?{text}", encoded=True)
        except ValueError:
            raise ClerkUnavailable(_NO_ADDRESS) from None
        try:
            async for attempt in stamina.retry_context(
                on=_Again, attempts=_ATTEMPTS, timeout=None, wait_initial=0.25, wait_max=10
            ):
                with attempt:
                    return await self._answered(url)
        except _Again as error:
            raise ClerkUnavailable(f"Clerk, {url.path}: {error}") from error
        raise AssertionError  # the loop returns or raises

    async def _answered(self, url: yarl.URL) -> Read:
        """Repeat the request until Clerk does not answer 429.

        Raises ClerkRateLimited when that takes too long.
        """
        deadline = time.monotonic() + self._patience
        least = SHORTEST_PAUSE
        while True:
            left = max(0.0, deadline - time.monotonic())
            read = await self._attempt(url, patience=left, least=least)
            if read is not None:
                return read
            least = min(2 * least, LONGEST_PAUSE)

    async def _attempt(self, url: yarl.URL, *, patience: float, least: float) -> Read | None:
        """Make one request; return None when Clerk answers 429, so that the next one waits.

        `patience` limits the wait before it, `least` is the shortest pause after a 429: in seconds.
        """
        if self._rate is None:
            self._rate = Rate(self.per_window, self._metrics.clerk_waited)
        await self._rate.turn(patience)
        key = self._key()
        headers = {
            "Authorization": f"Bearer {key}",
            "Clerk-API-Version": API_VERSION,
            "Accept": "application/json",
        }
        began_ms = now_ms()
        try:
            async with self._session.get(
                url, headers=headers, timeout=_TIMEOUT, allow_redirects=False
            ) as response:
                body = await response.read()
        except ValueError:  # aiohttp.InvalidURL is a ValueError
            raise ClerkUnavailable(_NO_ADDRESS) from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._metrics.clerk_asked(None)
            raise _Again(f"no answer: {type(error).__name__}") from None
        self._metrics.clerk_asked(response.status)
        if response.status == 429:  # noqa: PLR2004
            said = _seconds(response.headers.get("Retry-After"))
            pause = min(max(said, least), LONGEST_PAUSE)
            self._rate.pause(pause)
            if pause >= _LONG_PAUSE and not self._logged:
                self._logged = True
                log.warning("clerk_rate_limited", seconds=math.ceil(said), pause=math.ceil(pause))
            return None
        self._logged = False
        if response.status >= 500:  # noqa: PLR2004
            raise _Again(f"answers {response.status}")
        if response.status != 200:  # noqa: PLR2004
            raise _refused(response.status, url.path, body.replace(key.encode(), b"[key]"))
        try:
            return Read(decoded(body), began_ms)
        except ValueError:
            raise _Again("the answer is no JSON") from None


def _window(from_ms: int | None, to_ms: int | None) -> dict[str, int | None]:
    # Both of Clerk's filters exclude the moment that they name.
    return {
        "created_at_after": None if from_ms is None else from_ms - 1,
        "created_at_before": to_ms,
    }


def _segment(clerk_id: str) -> str:
    """Quote an id as one segment of a path, its dots included: `..` would lead up."""
    return quote(clerk_id, safe="").replace(".", "%2E")


def _objects(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ClerkUnavailable(
            "CLERK_API_URL: what answers there is not Clerk: a list was expected"
        )
    return value


def _is(value: object, kind: str, clerk_id: str) -> bool:
    """Return whether the value is that very object."""
    return (
        isinstance(value, dict)
        and value.get("object") == _OBJECTS[kind]
        and value.get("id") == clerk_id
    )


def _ends(membership: dict[str, Any]) -> tuple[object, object]:
    """Return the ids of its organization and its user, None for one that is missing."""
    organization, user = membership.get("organization"), membership.get("public_user_data")
    return (
        organization.get("id") if isinstance(organization, dict) else None,
        user.get("user_id") if isinstance(user, dict) else None,
    )


def _whole(value: object, name: str) -> int:
    number = value.get(name) if isinstance(value, dict) else None
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= _MOST:
        raise ClerkUnavailable(f"CLERK_API_URL: what answers there is not Clerk: no {name}")
    return number


def _seconds(retry_after: str | None) -> float:
    """Return the seconds of a Retry-After: Clerk's is a number, a proxy's may be a date."""
    text = (retry_after or "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        until = parsedate_to_datetime(text)
    except ValueError:
        return SHORTEST_PAUSE
    until = until if until.tzinfo is not None else until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())


def _refused(status: int, path: str, body: bytes) -> ClerkRefused:
    """Return Clerk's message from {errors: [{code, message}]}, with what to do, where known."""
    errors = _errors(body)
    first = errors[0] if errors else {}
    code, message = (
        value if isinstance(value := first.get(name), str) else "" for name in ("code", "message")
    )
    said = f": {message[:200]}" if message else ""
    hint = ""
    if status in (401, 403) and code != _SWITCHED_OFF:
        hint = "; copy the secret key (sk_…) of this instance into CLERK_SECRET_KEY again"
    elif status in range(300, 400):
        hint = "; CLERK_API_URL is not where Clerk's API is"
    # Gateways write other codes, or none.
    missing = bool(errors) and all(
        one.get("code") == _MISSING
        and isinstance(one.get("message"), str)
        and isinstance(one.get("long_message", ""), str)
        for one in errors
    )
    text = f"Clerk answers {status} to {path}{said}{hint}"
    return ClerkRefused(status, code, text, missing=missing and status == 404)  # noqa: PLR2004


def _errors(body: bytes) -> list[dict[str, Any]]:
    """Return the errors of an answer in Clerk's form; none where it has another form."""
    try:
        answer = from_json(body)
    except ValueError:
        return []
    errors = answer.get("errors") if isinstance(answer, dict) else None
    if not isinstance(errors, list) or not all(isinstance(one, dict) for one in errors):
        return []
    return errors
