"""Read one user from Clerk now: for an app whose user signs in before the webhook arrives."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clerk_sync.clerk import events
from clerk_sync.clerk.events import InvalidEvent
from clerk_sync.mapping.change import ApiRead, Change
from clerk_sync.mapping.ingest import upsert_of
from clerk_sync.outcomes import Outcome, Reason
from clerk_sync.store import profiles

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.clerk.api import Clerk
    from clerk_sync.mapping.model import Mapping
    from clerk_sync.store.committer import Committer
    from clerk_sync.store.target import Target


class TooManyWaiting(Exception):
    """More users are waiting than Clerk's rate limit lets through in time."""


class NotMapped(LookupError):
    """The mapping has no table for users, or the schema is not known yet."""


@dataclass(frozen=True, slots=True)
class Ensured:
    """The result of one request: the user's row, or None and why.

    `outcome` and `reason` are None if Clerk has no such user, or it was deleted here.
    """

    row: dict[str, Any] | None
    outcome: Outcome | None = None
    reason: Reason | None = None


@dataclass(slots=True)
class _Request:
    """One request to Clerk, and the number of callers that wait for it."""

    task: asyncio.Task[Ensured]
    callers: int = 0


class Ensure:
    """Reads one user from Clerk and writes it; calls for the same user share one request."""

    def __init__(
        self,
        clerk: Clerk,
        mapping: Mapping,
        committer: Committer,
        engine: AsyncEngine,
        users: Callable[[], Target | None],
    ) -> None:
        self._clerk = clerk
        self._mapping = mapping
        self._committer = committer
        self._engine = engine
        self._users = users
        self._requests: dict[str, _Request] = {}

    async def __call__(self, user_id: str) -> Ensured:
        """The user's row, once it is in sync with Clerk.

        Raises NotMapped, TooManyWaiting, ClerkUnavailable, ClerkRefused, DatabaseUnavailable.
        """
        request = self._requests.get(user_id)
        if request is None:
            # Of more, the last would wait for longer than anybody does.
            if len(self._requests) >= self._clerk.per_window:
                raise TooManyWaiting
            request = _Request(asyncio.create_task(self._ensured(user_id)))
            self._requests[user_id] = request
        request.callers += 1
        try:
            # A caller that disconnects must not cancel the request of the others.
            return await asyncio.shield(request.task)
        finally:
            request.callers -= 1
            if not request.callers:
                # Nobody waits for it any more: it makes room, and does not ask Clerk.
                request.task.cancel()
                self._requests.pop(user_id, None)

    async def _ensured(self, user_id: str) -> Ensured:
        users = self._users()
        if users is None:
            raise NotMapped("the mapping names no table for `user`")
        read = await self._clerk.one("user", user_id)
        if read is None:
            # No delete: who asked may be ahead of Clerk's API, and a tombstone is for good.
            return Ensured(None)
        try:
            event = events.read("user", read.json, at_ms=read.began_ms)
            upsert = upsert_of(event, self._mapping.tables["user"])
        except InvalidEvent as error:
            return Ensured(None, Outcome.QUARANTINED, error.reason)
        answer = await self._committer.commit(Change(ApiRead(read.began_ms), upsert))
        if answer.outcome in (Outcome.UNAVAILABLE, Outcome.ERROR, Outcome.QUARANTINED):
            return Ensured(None, answer.outcome, answer.reason)
        return Ensured(await profiles.identified(self._engine, users, user_id))
