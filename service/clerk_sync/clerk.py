"""Clerk's Backend API, read only: https://clerk.com/docs/reference/backend-api.

One client stays below its share of Clerk's rate limit, which the customer's own app needs, too;
obeys 429; and asks again where a server or a connection failed.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlencode

import aiohttp
import stamina
import structlog
import yarl
from pydantic_core import from_json

from clerk_sync.decoding import decoded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from clerk_sync.metrics import Metrics

log = structlog.get_logger()

# More is answered as if nothing had been asked for: with 10
# (https://github.com/clerk/clerk-sdk-python/issues/166).
PAGE_LIMIT: Final = 500
API_VERSION: Final = "2026-05-12"
# https://clerk.com/docs/guides/how-clerk-works/system-limits
RATE_SECONDS: Final = 10.0
PRODUCTION_RATE: Final = 1000
DEVELOPMENT_RATE: Final = 100
# What the way to Clerk may push together of requests that left further apart.
_RATE_MARGIN: Final = 0.25
_ATTEMPTS: Final = 8
_PATIENCE_429: Final = 30
_LONGEST_PAUSE: Final = 3600.0
_TIMEOUT: Final = aiohttp.ClientTimeout(total=60, sock_connect=10)
# Organizations are a feature that an instance may not have switched on.
_SWITCHED_OFF: Final = "organization_not_enabled_in_instance"
_NO_ADDRESS: Final = "CLERK_API_URL: is no address such as https://api.clerk.com/v1"
_PATHS: Final = {
    "user": "users",
    "organization": "organizations",
    "organizationMembership": "organization_memberships",
}


class ClerkUnavailable(Exception):  # noqa: N818
    """Clerk did not answer, or not usefully, however often it was asked."""


class ClerkRefused(Exception):  # noqa: N818
    """Clerk will not answer this: a wrong key, a feature that is off; `status` is HTTP's."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code

    @property
    def switched_off(self) -> bool:
        """The instance has no organizations."""
        return self.code == _SWITCHED_OFF


class _Again(Exception):  # noqa: N818
    """Worth another attempt."""


@dataclass(frozen=True, slots=True)
class Read:
    """One answer: its JSON, and the unix milliseconds at which its request began."""

    json: Any
    began_ms: int


class Rate:
    """At most `limit` requests begin within any ten seconds, and none while Clerk says to wait."""

    def __init__(self, limit: int, waited: Callable[[float], None]) -> None:
        self._begun: deque[float] = deque(maxlen=max(1, limit))
        self._turn = asyncio.Lock()
        self._paused_until = 0.0
        self._waited = waited

    def pause(self, seconds: float) -> None:
        """Begin nothing for so long."""
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    async def turn(self) -> None:
        """Wait until one more may begin."""
        async with self._turn:
            while (wait := self._wait()) > 0:
                self._waited(wait)
                await asyncio.sleep(wait)
            self._begun.append(time.monotonic())

    def _wait(self) -> float:
        now = time.monotonic()
        wait = self._paused_until - now
        if len(self._begun) == self._begun.maxlen:
            wait = max(wait, self._begun[0] + RATE_SECONDS + _RATE_MARGIN - now)
        return wait


def rate_limit(key: str) -> int:
    """Requests that Clerk takes in ten seconds from an instance with this secret key."""
    return DEVELOPMENT_RATE if key.startswith("sk_test_") else PRODUCTION_RATE


class Clerk:
    """Clerk's API for one instance."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        key: Callable[[], str],
        *,
        share: float,
        metrics: Metrics,
    ) -> None:
        """`key` gives the secret key as it is now, `share` the part of its rate limit to use."""
        self._session = session
        self._url = url.rstrip("/")
        self._key = key
        self._metrics = metrics
        self._share = share
        self._rate: Rate | None = None

    async def count(self, kind: str) -> int:
        """How many objects of a listed kind there are."""
        if kind == "user":
            counted = (await self._get("users/count")).json
        else:
            counted = (await self._get(_PATHS[kind], limit=1)).json
        return _whole(counted, "total_count")

    async def users(
        self, *, after: str | None, from_ms: int | None, to_ms: int | None, limit: int = PAGE_LIMIT
    ) -> Read:
        """Users in the order of creation; those created in [from_ms, to_ms), after this id."""
        read = await self._get(
            "users",
            limit=limit,
            order_by="+created_at",
            starting_after=after,
            **_window(from_ms, to_ms),
        )
        return Read(_objects(read.json), read.began_ms)

    async def known_users(self, ids: Sequence[str]) -> int:
        """How many of these users there are; at most 100 may be asked for."""
        return _whole((await self._get("users/count", user_id=[*ids])).json, "total_count")

    async def count_users(self, from_ms: int, to_ms: int) -> int:
        """How many users were created in [from_ms, to_ms)."""
        counted = await self._get("users/count", **_window(from_ms, to_ms))
        return _whole(counted.json, "total_count")

    async def listed(self, kind: str, offset: int) -> tuple[Read, int]:
        """A page of organizations or memberships in the order of creation, and their number."""
        extra = {"include_members_count": "true"} if kind == "organization" else {}
        read = await self._get(
            _PATHS[kind], limit=PAGE_LIMIT, offset=offset, order_by="+created_at", **extra
        )
        objects = _objects(read.json.get("data") if isinstance(read.json, dict) else None)
        return Read(objects, read.began_ms), _whole(read.json, "total_count")

    async def one(self, kind: str, clerk_id: str) -> Read | None:
        """A user or an organization as it is now; None when Clerk answers that there is none."""
        if clerk_id == "count":  # GET /users/count is another question
            return None
        extra = {"include_members_count": "true"} if kind == "organization" else {}
        read = await self._found(f"{_PATHS[kind]}/{_segment(clerk_id)}", **extra)
        if read is None or (isinstance(read.json, dict) and read.json.get("id") == clerk_id):
            return read
        if kind == "organization" and isinstance(read.json, dict):
            return None  # found by its slug, which an id may look like
        raise ClerkUnavailable(f"CLERK_API_URL: what answers there is not Clerk: no {kind}")

    async def membership(self, clerk_id: str, *, organization: str, user: str) -> Read | None:
        """A membership as it is now; None when its organization or its user has it no more."""
        path = f"organizations/{_segment(organization)}/memberships"
        read = await self._found(path, user_id=user, limit=PAGE_LIMIT)
        if read is None:
            return None
        objects = _objects(read.json.get("data") if isinstance(read.json, dict) else None)
        there = next((one for one in objects if one.get("id") == clerk_id), None)
        return None if there is None else Read(there, read.began_ms)

    async def _found(self, path: str, **query: object) -> Read | None:
        try:
            return await self._get(path, **query)
        except ClerkRefused as error:
            # Without a code it is not Clerk's: a proxy's, or that of a wrong address.
            if error.status == 404 and error.code:  # noqa: PLR2004
                return None
            raise

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
                    for _ in range(_PATIENCE_429):
                        read = await self._attempt(url)
                        if read is not None:
                            return read
                    raise ClerkUnavailable("Clerk answers 429, whatever the wait")
        except _Again as error:
            raise ClerkUnavailable(f"Clerk, {url.path}: {error}") from error
        raise AssertionError  # the loop returns or raises

    async def _attempt(self, url: yarl.URL) -> Read | None:
        """One request; None when Clerk says to wait, which the next one will do."""
        if self._rate is None:
            limit = int(rate_limit(self._key()) * self._share)
            self._rate = Rate(limit, self._metrics.clerk_waited)
        await self._rate.turn()
        key = self._key()
        headers = {
            "Authorization": f"Bearer {key}",
            "Clerk-API-Version": API_VERSION,
            "Accept": "application/json",
        }
        began_ms = time.time_ns() // 1_000_000
        try:
            async with self._session.get(
                url, headers=headers, timeout=_TIMEOUT, allow_redirects=False
            ) as response:
                body = await response.read()
        except ValueError:  # aiohttp.InvalidURL is one, too
            raise ClerkUnavailable(_NO_ADDRESS) from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._metrics.clerk_asked(None)
            raise _Again(f"no answer: {type(error).__name__}") from None
        self._metrics.clerk_asked(response.status)
        if response.status == 429:  # noqa: PLR2004
            self._rate.pause(_seconds(response.headers.get("Retry-After")))
            return None
        if response.status >= 500:  # noqa: PLR2004
            raise _Again(f"answers {response.status}")
        if response.status != 200:  # noqa: PLR2004
            raise _refused(response.status, url.path, body.replace(key.encode(), b"[key]"))
        try:
            return Read(decoded(body), began_ms)
        except ValueError:
            raise _Again("the answer is no JSON") from None


def _window(from_ms: int | None, to_ms: int | None) -> dict[str, int | None]:
    # Clerk's two filters leave out the moment that they name.
    return {
        "created_at_after": None if from_ms is None else from_ms - 1,
        "created_at_before": to_ms,
    }


def _segment(clerk_id: str) -> str:
    """An id as one segment of a path: one made of dots would be a way up."""
    return quote(clerk_id, safe="").replace(".", "%2E")


def _objects(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ClerkUnavailable(
            "CLERK_API_URL: what answers there is not Clerk: a list was expected"
        )
    return value


def _whole(value: object, name: str) -> int:
    number = value.get(name) if isinstance(value, dict) else None
    if not isinstance(number, int):
        raise ClerkUnavailable(f"CLERK_API_URL: what answers there is not Clerk: no {name}")
    return number


def _seconds(retry_after: str | None) -> float:
    """Clerk's Retry-After is in seconds."""
    if retry_after is None or not re.fullmatch(r"\d{1,6}", retry_after):
        return 1.0
    return min(float(retry_after), _LONGEST_PAUSE)


def _refused(status: int, path: str, body: bytes) -> ClerkRefused:
    """Clerk's own words, from {errors: [{code, message}]}; and what to do, where that is known."""
    code = message = ""
    try:
        errors: Mapping[str, Any] = from_json(body)["errors"][0]
        code, message = str(errors.get("code", "")), str(errors.get("message", ""))
    except (ValueError, TypeError, LookupError, AttributeError):
        pass
    told = f": {message[:200]}" if message else ""
    hint = ""
    if status in (401, 403) and code != _SWITCHED_OFF:
        hint = "; copy the secret key (sk_…) of this instance into CLERK_SECRET_KEY again"
    elif status in range(300, 400):
        hint = "; CLERK_API_URL is not where Clerk's API is"
    return ClerkRefused(status, code, f"Clerk answers {status} to {path}{told}{hint}")
