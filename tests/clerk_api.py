"""Clerk's Backend API as its OpenAPI description has it, over real HTTP, for tests and the bench.

The description: https://github.com/clerk/openapi-specs, `bapi/2026-05-12.yml`. Where it leaves
something open, there is a switch, or the comment says what was taken.

`python -m tests.clerk_api --users 1000000` serves a crowd as a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import inspect
import json
import math
import re
import secrets
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Final, Literal, Protocol

import uvloop
from aiohttp import web
from multidict import MultiDict, MultiMapping

from clerk_sync.clerk import samples

KEY: Final = "sk_test_c3RhbmQtaW4gb2YgdGhlIHRlc3Rz"
VERSIONS: Final = (
    "2021-02-05",
    "2024-10-01",
    "2025-03-12",
    "2025-04-10",
    "2025-11-10",
    "2026-05-12",
)
LIMIT: Final = 10
MOST: Final = 500
_IDS_MOST: Final = 100
_DAY: Final = 86_400_000
# Live deliveries leave about so many milliseconds after the change.
_LAG: Final = 15

Object = dict[str, Any]
Event = dict[str, Any]
Query = MultiMapping[str]
# What becomes of a cursor whose user is not there. The description does not say. The answers of
# its route are 200, 400, 401 and 422, so 422 is the default; `kept` goes on from where a deleted
# user was.
LostCursor = Literal["refused", "empty", "first", "kept"]

_IDENTIFIERS: Final = {
    "email_address": "email_addresses",
    "phone_number": "phone_numbers",
    "web3wallet": "web3_wallets",
}
_NAMES: Final = frozenset({"first_name", "last_name", "username"})
_USER_ORDERS: Final = frozenset(
    {"created_at", "updated_at", "last_active_at", "last_sign_in_at", *_NAMES, *_IDENTIFIERS}
)
_ORGANIZATION_ORDERS: Final = frozenset({"name", "created_at", "members_count"})
_MEMBERSHIP_ORDERS: Final = frozenset({"created_at", "phone_number", "email_address", *_NAMES})
_TIMES: Final = frozenset({"created_at_before", "created_at_after"})
# Clerk's own, and not here: an answer that ignored them would be a wrong one.
_UNBUILT: Final = frozenset(
    {
        *("banned", "email_address", "external_id", "organization_id", "phone_number", "role"),
        *("provider", "provider_user_id", "user_id", "username", "web3_wallet", "query"),
        *("email_address_query", "name_query", "phone_number_query", "username_query"),
        *("last_active_at_after", "last_active_at_before", "last_active_at_since"),
        *("last_sign_in_at_after", "last_sign_in_at_before"),
    }
)


def bytes_of(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="backslashreplace")  # half of a surrogate pair, as JSON escapes it


def _errors(code: str, message: str, long_message: str, meta: Mapping[str, Any]) -> bytes:
    error = {"message": message, "long_message": long_message, "code": code, "meta": meta}
    return bytes_of({"errors": [error], "clerk_trace_id": secrets.token_hex(16)})


class _Refused(Exception):
    """An answer that is an error, in Clerk's form."""

    def __init__(
        self, status: int, code: str, message: str, long_message: str = "", **meta: Any
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = _errors(code, message, long_message or message, meta)
        self.headers: Mapping[str, str] = {}


def _invalid(name: str, why: str) -> _Refused:
    code = "form_param_value_invalid"
    return _Refused(422, code, "is invalid", f"{name} {why}", param_name=name)


def _no_user(clerk_id: str) -> _Refused:
    long_message = f"No user was found with id {clerk_id}"
    return _Refused(404, "resource_not_found", "not found", long_message)


def _no_organization() -> _Refused:
    return _Refused(404, "resource_not_found", "not found", "Given organization not found.")


def _unbuilt(what: str) -> _Refused:
    return _Refused(501, "not_in_stand_in", f"this stand-in does not know {what}")


class _LostCursor(Exception):
    """Nobody has the id in `starting_after`."""


@dataclass(frozen=True, slots=True)
class Lies:
    """How answers about one kind differ from what is so: each way by itself, or several at once.

    Only for what a test put there, not for a crowd.
    """

    # Of a number of objects: what is told instead.
    count: Callable[[int], Any] = lambda number: number
    # Parameters that are not looked at.
    ignores: frozenset[str] = frozenset()
    # Those of one moment come in another order each time.
    shuffles: Random | None = None
    # On no list, though each is there when asked for.
    hides: frozenset[str] = frozenset()
    # Pages, counted from 1, that come empty, or as the one before them.
    empties: frozenset[int] = frozenset()
    repeats: frozenset[int] = frozenset()
    # Behind the end the list begins again.
    circles: bool = False
    # So many more are on a page than were asked for.
    longer: int = 0
    # Whose time of creation is null.
    undated: frozenset[str] = frozenset()
    # The answer to a question for this object: status and body.
    instead: Mapping[str, tuple[int, bytes]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a list request asks for."""

    limit: int
    offset: int
    order: str
    descending: bool
    after: str | None = None
    keeps_gone: bool = False
    created_before: float = math.inf
    created_after: float = -math.inf
    included: frozenset[str] | None = None
    excluded: frozenset[str] = frozenset()
    # The user or organization whose memberships they are.
    of: str | None = None
    lies: Lies | None = None


def _integer(query: Query, name: str) -> int | None:
    text = query.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise _invalid(name, "must be an integer")
    return int(text)


def _ids(query: Query, name: str, *, signed: bool) -> tuple[frozenset[str] | None, frozenset[str]]:
    """Return the ids to include, if any are named, and those to exclude."""
    texts = query.getall(name, [])
    if len(texts) > _IDS_MOST:
        raise _invalid(name, f"accepts up to {_IDS_MOST} values")
    excluded = frozenset(text[1:] for text in texts if signed and text.startswith("-"))
    included = frozenset(
        text.removeprefix("+") if signed else text
        for text in texts
        if not (signed and text.startswith("-"))
    )
    return included or None, excluded


def _wanted(
    query: Query,
    orders: frozenset[str],
    *,
    filters: frozenset[str] = frozenset(),
    cursor: bool = False,
    signed: bool = True,
) -> _Wanted:
    if unbuilt := _UNBUILT.intersection(query) - filters:
        raise _unbuilt(", ".join(sorted(unbuilt)))
    limit = _integer(query, "limit")
    # Out of range is no error but the default:
    # https://github.com/clerk/clerk-sdk-python/issues/166
    limit = limit if limit is not None and 1 <= limit <= MOST else LIMIT
    offset = _integer(query, "offset") or 0
    if offset < 0:
        raise _invalid("offset", "must be greater than or equal to 0")
    # Of several the first counts. A bare + arrives as a space, which is in no order's name.
    text = query.get("order_by", "-created_at")
    order = text[1:] if text[:1] in ("+", "-") else text
    if order not in orders:
        raise _invalid("order_by", f"must be one of {', '.join(sorted(orders))}")
    after = query.get("starting_after") if cursor else None
    if after is not None and order != "created_at":
        raise _invalid("starting_after", "requires ordering by created_at")
    if after is not None and offset:
        raise _invalid("starting_after", "cannot be combined with offset")
    before = _integer(query, "created_at_before") if "created_at_before" in filters else None
    since = _integer(query, "created_at_after") if "created_at_after" in filters else None
    none: tuple[None, frozenset[str]] = (None, frozenset())
    included, excluded = _ids(query, "user_id", signed=signed) if "user_id" in filters else none
    return _Wanted(
        limit=limit,
        offset=offset,
        order=order,
        descending=text.startswith("-"),
        after=after,
        created_before=math.inf if before is None else before,
        created_after=-math.inf if since is None else since,
        included=included,
        excluded=excluded,
    )


class _Table(Protocol):
    """Objects of one kind, as JSON."""

    def page(self, wanted: _Wanted) -> Iterable[bytes]:
        """Return what is wanted. Raises _LostCursor."""

    def count(self, wanted: _Wanted) -> Any:
        """Count what is wanted, on whatever page."""

    def one(self, clerk_id: str) -> bytes | None: ...


@dataclass(frozen=True)
class _Held:
    """Objects that the test put there; `view` makes of one what Clerk shows."""

    objects: Mapping[str, Object]
    gone: Mapping[str, Object]
    view: Callable[[Object], Object]
    # The user's own id, or those of a membership's user and organization.
    ids: Callable[[Object], tuple[str, ...]]
    rank: Callable[[Object, str], Any]

    def page(self, wanted: _Wanted) -> Iterable[bytes]:
        def place(one: Object) -> tuple[bool, Any, str]:
            # Ties go by id: the description calls this order unique, and does not say how.
            value = self.rank(one, wanted.order)
            return value is not None, value, one["id"]

        found = sorted(self._matching(wanted), key=place, reverse=wanted.descending)
        if wanted.lies is not None:
            return self._lied(wanted, wanted.lies, found)
        if wanted.after is not None:
            known = {**self.gone, **self.objects} if wanted.keeps_gone else self.objects
            if wanted.after not in known:
                raise _LostCursor
            here = place(known[wanted.after])
            found = [
                one
                for one in found
                if (place(one) < here if wanted.descending else place(one) > here)
            ]
        page = found[wanted.offset : wanted.offset + wanted.limit]
        return [bytes_of(self.view(one)) for one in page]

    def _lied(self, wanted: _Wanted, lies: Lies, found: list[Object]) -> Iterable[bytes]:
        if lies.shuffles is not None:
            lies.shuffles.shuffle(found)
            found.sort(key=lambda one: self.rank(one, wanted.order), reverse=wanted.descending)
        found = [one for one in found if one["id"] not in lies.hides]
        offset = wanted.offset
        if wanted.after is not None:
            places = [place for place, one in enumerate(found) if one["id"] == wanted.after]
            if not places:
                raise _LostCursor
            offset = places[0] + 1
        if lies.circles and found:
            offset %= len(found)
        page = found[offset : offset + wanted.limit + lies.longer]
        return [
            bytes_of(self.view(one | {"created_at": None} if one["id"] in lies.undated else one))
            for one in page
        ]

    def count(self, wanted: _Wanted) -> Any:
        number = len(self._matching(wanted))
        return number if wanted.lies is None else wanted.lies.count(number)

    def one(self, clerk_id: str) -> bytes | None:
        found = self.objects.get(clerk_id)
        return bytes_of(self.view(found)) if found is not None else None

    def _matching(self, wanted: _Wanted) -> list[Object]:
        return [
            one
            for one in self.objects.values()
            # "Before" and "after" are taken by the letter: neither has the moment itself.
            if wanted.created_after < one["created_at"] < wanted.created_before
            and (wanted.included is None or not wanted.included.isdisjoint(self.ids(one)))
            and wanted.excluded.isdisjoint(self.ids(one))
            and (wanted.of is None or wanted.of in self.ids(one))
        ]


@dataclass
class Asked:
    """One request; `status` is None until it is answered, and for good where it never was."""

    path: str
    query: Query
    target: str
    headers: MultiMapping[str]
    at: float
    status: int | None = None


@dataclass(frozen=True, slots=True)
class Rate:
    """At most so many requests within any so many seconds."""

    limit: int
    seconds: float = 10


@dataclass(frozen=True, slots=True)
class Fault:
    """What befalls the next `times` requests of this path after the first `skip` of them."""

    path: str = "/v1/"
    query: str = ""
    skip: int = 0
    times: int = 1
    seconds: float = 0
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: Literal["reset", "truncated"] | None = None


def failing(status: int, *, body: bytes | None = None, **where: Any) -> Fault:
    """Answer with this status, and Clerk's errors unless there is another body."""
    body = _errors("internal_clerk_error", "Oops", "Oops", {}) if body is None else body
    return Fault(status=status, body=body, **where)


def too_many(retry_after: str = "1", **where: Any) -> Fault:
    return failing(429, headers={"Retry-After": retry_after}, **where)


def not_json(**where: Any) -> Fault:
    """Answer 200 with a page for people, as a proxy in between may."""
    return failing(200, body=b"<html>Please wait\xff</html>", **where)


def reset(**where: Any) -> Fault:
    return Fault(cut="reset", **where)


def truncated(**where: Any) -> Fault:
    """End the connection within the body."""
    return Fault(cut="truncated", **where)


def slow(seconds: float, **where: Any) -> Fault:
    """Answer as always, but late."""
    return Fault(seconds=seconds, **where)


def hanging(**where: Any) -> Fault:
    return slow(math.inf, **where)


_Hooks = dict[tuple[str, int], list[Callable[[], object]]]


class ClerkApi:
    """The state of one Clerk instance, its answers, and what it was asked.

    Every change moves the clock, `now_ms`, on by `tick_ms`, and returns its webhook event; all
    events are also in `events`.
    """

    def __init__(
        self,
        *,
        key: str = KEY,
        now_ms: int | None = None,
        tick_ms: int = 1000,
        rate: Rate | None = None,
        lost_cursor: LostCursor = "refused",
        organizations_enabled: bool = True,
        tells_of_cascades: bool = False,
        most: int = MOST,
        instance_id: str = "ins_2xStandIn",
    ) -> None:
        self.url = ""
        self.key = key
        self.now_ms = time.time_ns() // 1_000_000 - _DAY if now_ms is None else now_ms
        self.tick_ms = tick_ms
        self.rate = rate
        self.lost_cursor: LostCursor = lost_cursor
        self.organizations_enabled = organizations_enabled
        # Whether Clerk sends events for the memberships of what is deleted is not documented.
        self.tells_of_cascades = tells_of_cascades
        # A page holds no more, whatever was asked for.
        self.most = most
        self.instance_id = instance_id

        self.users: dict[str, Object] = {}
        self.organizations: dict[str, Object] = {}
        self.memberships: dict[str, Object] = {}
        self.events: list[Event] = []

        # By kind.
        self.lies: dict[str, Lies] = {}
        self._lied_pages: Counter[str] = Counter()
        self._last_page: dict[str, list[bytes]] = {}
        self.faults: list[Fault] = []
        self.asked: list[Asked] = []
        self.most_at_once = 0
        self._in_flight = 0
        self._admitted: deque[float] = deque()
        self._pages: Counter[str] = Counter()
        self._before_read: _Hooks = {}
        self._before_send: _Hooks = {}
        self._closing = asyncio.Event()

        self._gone: dict[str, Object] = {}
        self._users: _Table = _Held(
            self.users, self._gone, lambda user: user, lambda user: (user["id"],), _rank_user
        )
        self._organizations: _Table = _Held(
            self.organizations, {}, self._organization, lambda _: (), self._rank_organization
        )
        self._memberships: _Table = _Held(
            self.memberships, {}, self._membership, _ends, self._rank_membership
        )
        self._drawn = False

    # What is there

    def put_user(self, clerk_id: str, **fields: Any) -> Event:
        """Create a user; `created_at` makes it older, or as old as another."""
        self._put("user", self.users, clerk_id, fields)
        return self._tell("user.created", self.users[clerk_id])

    def put_organization(self, clerk_id: str, **fields: Any) -> Event:
        self._put("organization", self.organizations, clerk_id, fields)
        return self._tell("organization.created", self.organizations[clerk_id])

    def put_membership(self, clerk_id: str, user: str, organization: str, **fields: Any) -> Event:
        """Let a user into an organization. Both have to be there."""
        ends = {
            "organization": {"id": self.organizations[organization]["id"]},
            "public_user_data": {"user_id": self.users[user]["id"]},
        }
        self._put("organizationMembership", self.memberships, clerk_id, {**fields, **ends})
        return self._tell("organizationMembership.created", self.memberships[clerk_id])

    def update(self, clerk_id: str, **fields: Any) -> Event:
        """Change an object, which advances its `updated_at` unless that is among the fields."""
        kind, objects = self._place(clerk_id)
        now = self._tick()
        one = objects[clerk_id]
        objects[clerk_id] = one | {"updated_at": max(now, one["updated_at"] + 1)} | fields
        return self._tell(f"{kind}.updated", objects[clerk_id])

    def delete(self, clerk_id: str) -> Event:
        """Delete an object, and the memberships of a user or an organization."""
        kind, objects = self._place(clerk_id)
        self._tick()
        for membership in [m for m in self.memberships.values() if clerk_id in _ends(m)]:
            if self.tells_of_cascades:
                self._tell("organizationMembership.deleted", membership)
            del self.memberships[membership["id"]]
        event = self._tell(f"{kind}.deleted", objects[clerk_id])
        self._gone[clerk_id] = objects.pop(clerk_id)
        return event

    def _put(
        self, kind: str, objects: dict[str, Object], clerk_id: str, fields: Mapping[str, Any]
    ) -> None:
        if self._drawn or clerk_id in objects or clerk_id in self._gone:
            raise ValueError(f"{clerk_id} cannot be new here")
        born = fields.get("created_at", self._tick())
        made = samples.event(f"{kind}.created", clerk_id=clerk_id, now_ms=born + _LAG)["data"]
        objects[clerk_id] = {**made, "created_at": born, "updated_at": born, **fields}

    def _place(self, clerk_id: str) -> tuple[str, dict[str, Object]]:
        for kind, objects in (
            ("user", self.users),
            ("organization", self.organizations),
            ("organizationMembership", self.memberships),
        ):
            if clerk_id in objects:
                return kind, objects
        raise KeyError(clerk_id)

    def _tick(self) -> int:
        self.now_ms += self.tick_ms
        return self.now_ms

    def _tell(self, type_: str, one: Object) -> Event:
        """Make the event of what just happened to this object."""
        kind, _, what = type_.partition(".")
        at = self.now_ms if what == "deleted" else one["updated_at"]
        event = samples.event(type_, clerk_id=one["id"], now_ms=at + _LAG)
        match kind:
            case "organizationMembership":
                event["data"] = self._membership(one)
            case "organization":
                event["data"] = {**one, "members_count": self._members(one["id"])}
            case _:
                event["data"] = one
        if what == "deleted" and kind != "organizationMembership":
            extra = {"user": "external_id", "organization": "slug"}[kind]
            kept = {name: one[name] for name in ("id", "object", extra) if one.get(name)}
            event["data"] = {**kept, "deleted": True}
        event["data"] = copy.deepcopy(event["data"])
        self.events.append(event)
        return event

    # What Clerk shows of it

    def _organization(self, one: Object, *, counted: bool = False) -> Object:
        shown = _uncounted(one)
        return {**shown, "members_count": self._members(one["id"])} if counted else shown

    def _membership(self, one: Object) -> Object:
        user_id, organization_id = _ends(one)
        user = self.users[user_id]
        addresses = [a["email_address"] for a in user["email_addresses"]]
        names = (*("first_name", "last_name", "username", "image_url", "profile_image_url"),)
        flags = ("has_image", "banned", "deprovisioned")
        return {
            **one,
            "organization": self._organization(self.organizations[organization_id]),
            "public_user_data": {
                **{name: user.get(name) for name in (*names, *flags)},
                "identifier": addresses[0] if addresses else user.get("username"),
                "user_id": user_id,
            },
        }

    def _members(self, organization: str) -> int:
        return sum(_ends(m)[1] == organization for m in self.memberships.values())

    def _rank_organization(self, one: Object, order: str) -> Any:
        return self._members(one["id"]) if order == "members_count" else one[order]

    def _rank_membership(self, one: Object, order: str) -> Any:
        if order == "created_at":
            return one[order]
        return _rank_user(self.users[_ends(one)[0]], order)

    def draw(self, users: _Table, organizations: _Table, memberships: _Table) -> None:
        """Show these instead, for good."""
        self._users, self._organizations, self._memberships = users, organizations, memberships
        self._drawn = True

    # What it was asked

    def most_in(self, seconds: float) -> int:
        """Return how many requests at most came within any so many seconds."""
        times = sorted(asked.at for asked in self.asked)
        most = first = 0
        for last, at in enumerate(times):
            while times[first] <= at - seconds:
                first += 1
            most = max(most, last - first + 1)
        return most

    def asked_for(self, path: str) -> list[Asked]:
        """Return the requests of exactly this path."""
        return [asked for asked in self.asked if asked.path == path]

    @property
    def repeated(self) -> dict[str, int]:
        """The targets that were answered with 200 more than once, and how often."""
        counts = Counter(asked.target for asked in self.asked if asked.status == 200)
        return {target: count for target, count in counts.items() if count > 1}

    # What happens meanwhile

    def before_read(self, page: int, do: Callable[[], object], *, path: str = "/v1/users") -> None:
        """Do this, awaited, before the nth page of this path is looked up; pages count from 1."""
        self._before_read.setdefault((path, page), []).append(do)

    def before_send(self, page: int, do: Callable[[], object], *, path: str = "/v1/users") -> None:
        """Do this, awaited, after the page is looked up: what is sent is then old."""
        self._before_send.setdefault((path, page), []).append(do)

    # Over HTTP

    @contextlib.asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator[None]:
        app = web.Application()
        for path, read in (
            ("/v1/instance", self._read_instance),
            ("/v1/users", self._read_users),
            ("/v1/users/count", self._read_users_count),
            ("/v1/users/{id}", self._read_user),
            ("/v1/users/{id}/organization_memberships", self._read_user_memberships),
            ("/v1/organizations", self._read_organizations),
            ("/v1/organizations/{id}", self._read_organization),
            ("/v1/organizations/{id}/memberships", self._read_organization_memberships),
            ("/v1/organization_memberships", self._read_memberships),
            ("/{path:.*}", _read_nothing),
        ):
            app.router.add_route("*", path, self._handler(read))
        runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", port).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            yield
        finally:
            self._closing.set()
            await runner.cleanup()

    def _handler(self, read: Callable[[web.Request], bytes]) -> Callable[[web.Request], Any]:
        async def handle(request: web.Request) -> web.StreamResponse:
            asked = Asked(
                request.path, request.query, request.raw_path, request.headers, time.monotonic()
            )
            self.asked.append(asked)
            self._in_flight += 1
            self.most_at_once = max(self.most_at_once, self._in_flight)
            try:
                return await self._answer(request, read, asked)
            except _Refused as refused:
                asked.status = refused.status
                return _json(refused.body, refused.status, refused.headers)
            finally:
                self._in_flight -= 1

        return handle

    async def _answer(
        self, request: web.Request, read: Callable[[web.Request], bytes], asked: Asked
    ) -> web.StreamResponse:
        self._admit(request, asked.at)
        fault = self._next_fault(asked) or Fault()
        if fault.seconds:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(
                    self._closing.wait(), None if fault.seconds == math.inf else fault.seconds
                )
        if fault.cut == "reset":
            return _cut(request, web.Response())
        if fault.status is not None:
            asked.status = fault.status
            return _json(fault.body, fault.status, fault.headers)
        self._pages[request.path] += 1
        now = request.path, self._pages[request.path]
        await _do(self._before_read.pop(now, ()))
        body = read(request)
        await _do(self._before_send.pop(now, ()))
        if fault.cut == "truncated":
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            response.content_length = len(body)
            await response.prepare(request)
            await response.write(body[: len(body) // 2])
            return _cut(request, response, whole=True)
        asked.status = 200
        return _json(body)

    def _admit(self, request: web.Request, now: float) -> None:
        """Check the key, the version and the rate, in this order."""
        kind, _, key = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer" or not key:
            message = "Invalid Authorization header format"
            raise _Refused(401, "authorization_header_format_invalid", message)
        if key != self.key:
            message = "The provided Clerk Secret Key is invalid."
            raise _Refused(401, "clerk_key_invalid", message)
        versions = [
            *request.headers.getall("Clerk-API-Version", []),
            *request.query.getall("__clerk_api_version", []),
        ]
        if len(versions) > 1 or not set(versions) <= set(VERSIONS):
            long_message = f"Invalid Clerk API version: {', '.join(versions)}"
            raise _Refused(400, "api_version_invalid", "invalid API version", long_message)
        if request.method != "GET":
            raise _unbuilt(request.method)
        if self.rate is not None:
            while self._admitted and self._admitted[0] <= now - self.rate.seconds:
                self._admitted.popleft()
            if len(self._admitted) >= self.rate.limit:
                refused = _Refused(429, "too_many_requests", "Too many requests")
                wait = self._admitted[0] + self.rate.seconds - now
                refused.headers = {"Retry-After": str(math.ceil(wait))}
                raise refused
            self._admitted.append(now)

    def _next_fault(self, asked: Asked) -> Fault | None:
        """Return the first fault that this request is for, and count it off."""
        for index, fault in enumerate(self.faults):
            if not asked.path.startswith(fault.path) or fault.query not in asked.target:
                continue
            if fault.skip:
                self.faults[index] = replace(fault, skip=fault.skip - 1)
                continue
            self.faults[index : index + 1] = (
                [replace(fault, times=fault.times - 1)] if fault.times > 1 else []
            )
            return fault
        return None

    def _read_instance(self, _: web.Request) -> bytes:
        found = {"object": "instance", "id": self.instance_id, "environment_type": "development"}
        return bytes_of({**found, "allowed_origins": None})

    def _read_users(self, request: web.Request) -> bytes:
        filters = _TIMES | {"user_id"}
        wanted = self._asked("user", request, _USER_ORDERS, filters=filters, cursor=True)
        wanted = replace(wanted, keeps_gone=self.lost_cursor == "kept")
        try:
            page = self._shown("user", self._users.page(wanted))
        except _LostCursor:
            if self.lost_cursor in ("refused", "kept"):
                raise _invalid("starting_after", "is no user's id") from None
            page = []
            if self.lost_cursor == "first":
                page = [*self._users.page(replace(wanted, after=None))]
        return b"[%b]" % b",".join(page)

    def _read_users_count(self, request: web.Request) -> bytes:
        # Of user_id's + and - only the list's description speaks, not the count's.
        filters = _TIMES | {"user_id"}
        wanted = self._asked("user", request, _USER_ORDERS, filters=filters, signed=False)
        return bytes_of({"object": "total_count", "total_count": self._users.count(wanted)})

    def _read_user(self, request: web.Request) -> bytes:
        self._lie_about("user", request)
        found = self._users.one(request.match_info["id"])
        if found is None:
            raise _no_user(request.match_info["id"])
        return found

    def _read_organizations(self, request: web.Request) -> bytes:
        self._need_organizations()
        wanted = self._asked("organization", request, _ORGANIZATION_ORDERS)
        return self._list("organization", self._counting(request), wanted)

    def _read_organization(self, request: web.Request) -> bytes:
        self._need_organizations()
        self._lie_about("organization", request)
        asked = request.match_info["id"]
        slugs = {one["slug"]: one["id"] for one in self.organizations.values() if one["slug"]}
        found = self._counting(request).one(slugs.get(asked, asked))
        if found is None:
            raise _no_organization()
        return found

    def _read_memberships(self, request: web.Request) -> bytes:
        self._need_organizations()
        wanted = self._asked("organizationMembership", request, _MEMBERSHIP_ORDERS)
        return self._list("organizationMembership", self._memberships, wanted)

    def _read_organization_memberships(self, request: web.Request) -> bytes:
        self._need_organizations()
        self._lie_about("organizationMembership", request)
        owner = request.match_info["id"]
        if self._organizations.one(owner) is None:
            raise _no_organization()
        wanted = self._asked(
            "organizationMembership", request, _MEMBERSHIP_ORDERS, filters=_TIMES | {"user_id"}
        )
        page, number = _listing(self._memberships, replace(wanted, of=owner))
        return _list_of(page, number)

    def _read_user_memberships(self, request: web.Request) -> bytes:
        self._need_organizations()
        owner = request.match_info["id"]
        if self._users.one(owner) is None:
            raise _no_user(owner)
        wanted = self._asked("organizationMembership", request, _MEMBERSHIP_ORDERS)
        page, number = _listing(self._memberships, replace(wanted, of=owner))
        return _list_of(page, number)

    def _asked(
        self, kind: str, request: web.Request, orders: frozenset[str], **options: Any
    ) -> _Wanted:
        lies = self.lies.get(kind)
        query: Query = request.query
        if lies is not None:
            query = MultiDict((k, v) for k, v in query.items() if k not in lies.ignores)
        wanted = _wanted(query, orders, **options)
        return replace(wanted, limit=min(wanted.limit, self.most), lies=lies)

    def _list(self, kind: str, table: _Table, wanted: _Wanted) -> bytes:
        page, number = _listing(table, wanted)
        return _list_of(self._shown(kind, page), number)

    def _shown(self, kind: str, found: Iterable[bytes]) -> list[bytes]:
        """Return this page of a kind's list, or what is shown in its place."""
        page, lies = [*found], self.lies.get(kind)
        if lies is None:
            return page
        self._lied_pages[kind] += 1
        if self._lied_pages[kind] in lies.empties:
            page = []
        elif self._lied_pages[kind] in lies.repeats:
            page = self._last_page.get(kind, page)
        self._last_page[kind] = page
        return page

    def _lie_about(self, kind: str, request: web.Request) -> None:
        lies = self.lies.get(kind)
        asked = request.query.get("user_id", request.match_info["id"])
        if lies is not None and asked in lies.instead:
            refused = _Refused(*lies.instead[asked][:1], "", "")
            refused.body = lies.instead[asked][1]
            raise refused

    def _counting(self, request: web.Request) -> _Table:
        asked = request.query.get("include_members_count") == "true"
        # A crowd's organizations are made without looking at who is in them.
        if not asked or not isinstance(self._organizations, _Held):
            return self._organizations
        view: Callable[[Object], Object] = lambda one: self._organization(one, counted=True)  # noqa: E731
        return replace(self._organizations, view=view)

    def _need_organizations(self) -> None:
        if not self.organizations_enabled:
            raise _Refused(
                403,
                "organization_not_enabled_in_instance",
                "access denied",
                "The organizations feature is not enabled for this instance.",
            )


def _list_of(page: list[bytes], number: Any) -> bytes:
    return b'{"data":[%b],"total_count":%b}' % (b",".join(page), bytes_of(number))


def _read_nothing(request: web.Request) -> bytes:
    raise _Refused(404, "resource_not_found", "not found", f"no {request.path}")


def _uncounted(organization: Object) -> Object:
    """Leave out what is not required, and has a parameter that asks for it."""
    asked_for = ("members_count", "missing_member_with_elevated_permissions")
    return {name: value for name, value in organization.items() if name not in asked_for}


def _ends(membership: Object) -> tuple[str, str]:
    """Return the ids of its user and its organization."""
    return membership["public_user_data"]["user_id"], membership["organization"]["id"]


def _rank_user(user: Object, order: str) -> Any:
    if order not in _IDENTIFIERS:
        return user.get(order)
    name = "web3_wallet" if order == "web3wallet" else order
    return next((one[name] for one in user[_IDENTIFIERS[order]]), None)


def _listing(table: _Table, wanted: _Wanted) -> tuple[list[bytes], Any]:
    """Return a page, and how many there are."""
    return [*table.page(wanted)], table.count(wanted)


def _json(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


def _cut(
    request: web.Request, response: web.StreamResponse, *, whole: bool = False
) -> web.StreamResponse:
    """End the connection: after what was written if `whole`, else with a reset."""
    transport = request.transport
    if transport is None:
        return response
    if whole:
        transport.close()
    else:
        linger = struct.pack("ii", 1, 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        transport.abort()
    return response


async def _do(what: Iterable[Callable[[], object]]) -> None:
    for do in what:
        done = do()
        if inspect.isawaitable(done):
            await done


@contextlib.asynccontextmanager
async def running(**options: Any) -> AsyncIterator[ClerkApi]:
    """Serve a new, empty instance on a free port; `options` are for ClerkApi."""
    api = ClerkApi(**options)
    async with api.serving():
        yield api


# A crowd: as many as are asked for, each drawn when it is read.

_BORN: Final = 1_600_000_000_000
_STEP: Final = 30_000
_RARE: Final = (
    *("enterprise_accounts", "external_accounts", "passkeys", "phone_numbers"),
    *("saml_accounts", "web3_wallets"),
)


def user_id(index: int) -> str:
    """Return the id of a crowd's user; 0 is the oldest."""
    return f"user_{index:027d}"


def created_at(index: int, *, ties: int = 1) -> int:
    """Return when an object of a crowd was made: `ties` of them at a time."""
    return _BORN + index // ties * _STEP


@dataclass(frozen=True)
class _Drawn:
    """Objects of one shape. They are numbered by age, and every order is that one."""

    prefix: str
    size: int
    ties: int
    template: bytes
    # A membership's user and organization, and the memberships of either.
    ends: Callable[[int], tuple[int, int]] = lambda _: (0, 0)
    owned: Callable[[str], Sequence[int]] = lambda _: ()

    def page(self, wanted: _Wanted) -> Iterable[bytes]:
        found = self._matching(wanted)
        if wanted.after is not None:
            here = self._index(wanted.after)
            if here is None:
                raise _LostCursor
            if not isinstance(found, range):
                raise _unbuilt("a cursor over named users of a crowd")
            found = (
                found[: max(0, here - found.start)]
                if wanted.descending
                else (found[max(0, here + 1 - found.start) :])
            )
        if wanted.descending:
            found = found[::-1]
        return map(self._draw, found[wanted.offset : wanted.offset + wanted.limit])

    def count(self, wanted: _Wanted) -> int:
        return len(self._matching(wanted))

    def one(self, clerk_id: str) -> bytes | None:
        index = self._index(clerk_id)
        return None if index is None else self._draw(index)

    def _matching(self, wanted: _Wanted) -> Sequence[int]:
        if wanted.order not in ("created_at", "updated_at", "name"):
            raise _unbuilt(f"a crowd by {wanted.order}")
        if wanted.of is not None:
            return self.owned(wanted.of)
        first, last = self._since(wanted.created_after + 1), self._since(wanted.created_before)
        if wanted.excluded:
            raise _unbuilt("a crowd without some users")
        if wanted.included is None:
            return range(first, max(first, last))
        named = sorted(i for i in map(self._index, wanted.included) if i is not None)
        return [i for i in named if first <= i < last]

    def _since(self, time_ms: float) -> int:
        """Return the first that was made then or later."""
        if not math.isfinite(time_ms):
            return self.size if time_ms > 0 else 0
        index = math.ceil((time_ms - _BORN) / _STEP) * self.ties
        return min(max(index, 0), self.size)

    def _index(self, clerk_id: str) -> int | None:
        found = re.fullmatch(f"{self.prefix}([0-9]{{27}})", clerk_id)
        return int(found[1]) if found and int(found[1]) < self.size else None

    def _draw(self, index: int) -> bytes:
        user, organization = self.ends(index)
        born = created_at(index, ties=self.ties)
        return self.template % {b"i": index, b"u": user, b"o": organization, b"t": born}


def _template(one: Object, *numbered: tuple[str, bytes, str | None]) -> bytes:
    """Make of an object what `%` fills: one time, and numbers for ids.

    With an id comes what e-mail addresses, usernames or slugs took from it to be as distinct.
    """
    text = bytes_of(one).replace(b"%", b"%%")
    for clerk_id, number, tail in numbered:
        prefix, _, _ = clerk_id.partition("_")
        text = text.replace(clerk_id.encode(), b"%b_%%(%b)027d" % (prefix.encode(), number))
        if tail is not None:
            distinct = re.split("[_-]", tail)[-1]
            text = text.replace(distinct.encode(), b"%%(%b)010d" % number)
    return re.sub(rb"(?<=:)\d{13}(?=[,}])", b"%(t)d", text)


def _user_template(*, small: bool) -> bytes:
    one = samples.event("user.created", now_ms=_BORN)["data"] | {name: [] for name in _RARE}
    if small:
        one |= {"email_addresses": one["email_addresses"][1:], "image_url": ""}
    return _template(one, (one["id"], b"i", one["username"]))


def _organization_template() -> bytes:
    one = _uncounted(samples.event("organization.created", now_ms=_BORN)["data"])
    return _template(one, (one["id"], b"i", one["slug"]), (one["created_by"], b"u", None))


def _membership_template() -> bytes:
    one = samples.event("organizationMembership.created", now_ms=_BORN)["data"]
    user, organization = one["public_user_data"], _uncounted(one["organization"])
    return _template(
        one | {"organization": organization},
        (one["id"], b"i", None),
        (user["user_id"], b"u", user["username"]),
        (organization["id"], b"o", organization["slug"]),
    )


def crowd(
    users: int,
    *,
    organizations: int = 0,
    memberships: int = 0,
    ties: int = 1,
    small: bool = False,
    **options: Any,
) -> ClerkApi:
    """Make an instance of so many users that none is kept; it cannot be changed.

    A user is some 2.7 kB of JSON, as most of Clerk's are, or 2 kB if `small`.
    """
    if memberships > users * organizations:
        raise ValueError("more memberships than pairs of a user and an organization")
    rounds = math.ceil(memberships / users) if users else 0

    def ends(index: int) -> tuple[int, int]:
        return index % users, (index % users + index // users) % organizations

    def owned(clerk_id: str) -> Sequence[int]:
        prefix, _, digits = clerk_id.rpartition("_")
        owner = int(digits)
        if prefix == "user":
            return range(owner, memberships, users)
        return [
            index
            for turn in range(rounds)
            for index in range(
                turn * users + (owner - turn) % organizations,
                min((turn + 1) * users, memberships),
                organizations,
            )
        ]

    api = ClerkApi(**options)
    api.draw(
        _Drawn("user_", users, ties, _user_template(small=small)),
        _Drawn("org_", organizations, ties, _organization_template()),
        _Drawn("orgmem_", memberships, ties, _membership_template(), ends, owned),
    )
    return api


async def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.clerk_api", description=__doc__)
    for name in ("users", "organizations", "memberships", "port"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--ties", type=int, default=1, help="so many are created at a time")
    parser.add_argument("--small", action="store_true", help="users of 2 kB")
    parser.add_argument("--rate", type=int, help="requests within 10 seconds; without, any number")
    parser.add_argument("--key", default=KEY)
    options = vars(parser.parse_args())
    port, rate = options.pop("port"), options.pop("rate")
    api = crowd(**options, rate=Rate(rate) if rate else None)
    async with api.serving(port):
        print(json.dumps({"url": api.url, "key": api.key}), flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(_main())
