"""A user's row at once, for the moment when the user is in the app before the webhook is here."""

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
    """More users are asked for than Clerk's rate limit lets through in time."""


class NotMapped(LookupError):
    """The mapping has no table for users, or the schema is not known yet."""


@dataclass(frozen=True, slots=True)
class Ensured:
    """What became of one request: the user's row, None where there is none; and why not.

    `reason` is None where Clerk has no such user, or it was deleted here.
    """

    row: dict[str, Any] | None
    outcome: Outcome | None = None
    reason: Reason | None = None


@dataclass(slots=True)
class _Asked:
    """One request to Clerk, and how many wait for its answer."""

    task: asyncio.Task[Ensured]
    callers: int = 0


class Ensure:
    """Asks Clerk for one user and writes it; calls for the same user share one request."""

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
        self._asked: dict[str, _Asked] = {}

    async def __call__(self, user_id: str) -> Ensured:
        """The user's row, once it is what Clerk says.

        Raises NotMapped, TooManyWaiting, ClerkUnavailable, ClerkRefused, DatabaseUnavailable.
        """
        asked = self._asked.get(user_id)
        if asked is None:
            # Of more, the last would wait for longer than anybody does.
            if len(self._asked) >= self._clerk.per_window:
                raise TooManyWaiting
            asked = _Asked(asyncio.create_task(self._ensured(user_id)))
            self._asked[user_id] = asked
        asked.callers += 1
        try:
            # One caller that goes away must not take the others' answer along.
            return await asyncio.shield(asked.task)
        finally:
            asked.callers -= 1
            if not asked.callers:
                # Nobody waits for it any more: it makes room, and does not ask Clerk.
                asked.task.cancel()
                self._asked.pop(user_id, None)

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
