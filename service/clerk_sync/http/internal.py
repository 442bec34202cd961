"""The internal listener: health probes, metrics, and the app's reads. Never publish it.

People's data is for the app alone: see `access`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import TYPE_CHECKING, Any, Final

import structlog
from aiohttp import web

from clerk_sync.clerk.api import ClerkRateLimited, ClerkRefused, ClerkUnavailable
from clerk_sync.database.errors import DatabaseUnavailable
from clerk_sync.http import access
from clerk_sync.http.connections import Rank
from clerk_sync.http.responses import RETRY_AFTER_SECONDS
from clerk_sync.outcomes import Outcome
from clerk_sync.store import profiles
from clerk_sync.sync.ensure import NotMapped, TooManyWaiting
from clerk_sync.telemetry.logs import LogRateLimiter

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.health import Readiness
    from clerk_sync.http.connections import Connections
    from clerk_sync.store.target import Target
    from clerk_sync.sync.ensure import Ensure
    from clerk_sync.telemetry.metrics import Metrics

log = structlog.get_logger()

READ_SECONDS: Final = 3.0
# A database answers so many within READ_SECONDS, even one that is slow and far away.
READ_LIMIT: Final = 64
# The app waits with a person in front of it.
ENSURE_SECONDS: Final = 10.0
# Of callers. How many users they may ask for together follows from Clerk's rate limit.
ENSURE_LIMIT: Final = 256


class TooManyReaders(Exception):
    """As many callers as allowed are being answered, or wait."""


class _Places:
    """A limit on the callers that are answered or wait at the same time."""

    def __init__(self, limit: int) -> None:
        self._free = limit

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Occupy a place within. Raises TooManyReaders."""
        if not self._free:
            raise TooManyReaders
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1


class InternalListener:
    """Answers from memory; only /profiles asks the database, and /ensure Clerk."""

    def __init__(
        self,
        *,
        engine: AsyncEngine,
        metrics: Metrics,
        readiness: Callable[[], Readiness],
        users: Callable[[], Target | None],
        ensure: Ensure | None,
        tokens: Callable[[], Sequence[bytes]],
        connections: Connections,
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._readiness = readiness
        self._users = users
        self._ensure = ensure
        self._tokens = tokens
        self._connections = connections
        self._reads = _Places(READ_LIMIT)
        self._ensures = _Places(ENSURE_LIMIT)
        self._log_limiter = LogRateLimiter()

    def app(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(middlewares=[self._connections.answering])
        routes = [
            web.get("/livez", self.livez),
            web.get("/readyz", self.readyz),
            web.get("/metrics", self.metrics),
            web.get("/profiles", self._for_the_app(self.profiles)),
            web.post("/ensure/{user_id}", self._for_the_app(self.ensure)),
        ]
        for route in routes:
            route.kwargs["expect_handler"] = _expected
        app.add_routes(routes)
        return app

    def close(self) -> None:
        """Log how many lines were dropped."""
        self._log_limiter.end()

    def _for_the_app(
        self, answer: Callable[[web.Request], Awaitable[web.Response]]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        """Answer only the app; other callers get 403, with the setting that lets them in."""

        async def answered(request: web.Request) -> web.Response:
            transport = request.transport
            refusal = access.refusal(
                request.headers,
                peer=transport and transport.get_extra_info("peername"),
                own=transport and transport.get_extra_info("sockname"),
                known=self._tokens(),
            )
            if refusal is None:
                self._connections.ranked(self._connections.peer(request.protocol), Rank.KNOWN)
                return await answer(request)
            if self._log_limiter.allows(reason="forbidden"):
                log.warning("forbidden", peer=request.remote, error=refusal)
            return _json({"error": refusal}, status=403)

        return answered

    async def livez(self, request: web.Request) -> web.Response:
        """200 while the event loop runs. Nothing else is checked: a restart repairs no database."""
        del request
        return web.json_response({"live": True})

    async def readyz(self, request: web.Request) -> web.Response:
        """Whether deliveries are accepted, as found a few seconds ago at most."""
        del request
        readiness = self._readiness()
        if readiness.ready:
            return web.json_response({"ready": True})
        return web.json_response(
            {
                "ready": False,
                "reason": readiness.reason.value if readiness.reason else None,
                "detail": readiness.detail,
            },
            status=503,
        )

    async def metrics(self, request: web.Request) -> web.Response:
        """The metrics, in the format that Prometheus asks for."""
        pool: Any = self._engine.pool
        if hasattr(pool, "checkedout"):
            self._metrics.pool_in_use.set(pool.checkedout())
            self._metrics.pool_size.set(pool.size())
        accept = ",".join(request.headers.getall("Accept", ()))
        body, content_type = self._metrics.exposed(accept)
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def profiles(self, request: web.Request) -> web.Response:
        """`?username=U`: that user with what it owns, or null. Else at most 30 users."""
        users = self._users()
        if users is None:
            readiness = self._readiness()
            if not readiness.ready:
                return _sorry(readiness.detail or "not ready")
            return _json({"error": "the mapping names no table for `user`"}, status=404)
        username = request.query.get("username")
        try:
            with self._reads.taken():
                async with asyncio.timeout(READ_SECONDS):
                    if username is None:
                        return _json(await profiles.some(self._engine, users))
                    return _json(await profiles.named(self._engine, users, username))
        except TooManyReaders:
            return _sorry(f"{READ_LIMIT} others are read already")
        except LookupError as error:
            return _json({"error": str(error)}, status=400)
        except (DatabaseUnavailable, TimeoutError):
            return _sorry("the database is not reachable")

    async def ensure(self, request: web.Request) -> web.Response:
        """The row of a user in Clerk, written first if necessary; 404 if there is none."""
        if self._ensure is None:
            return _json({"error": "CLERK_SECRET_KEY is not set"}, status=501)
        readiness = self._readiness()
        if not readiness.ready:
            return _sorry(readiness.detail or "not ready")
        try:
            with self._ensures.taken():
                async with asyncio.timeout(ENSURE_SECONDS):
                    ensured = await self._ensure(request.match_info["user_id"])
        except (TooManyReaders, TooManyWaiting):
            return _sorry("too many users are asked for at once")
        except NotMapped as error:
            return _json({"error": str(error)}, status=404)
        except ClerkRefused as error:
            return _json({"error": str(error)}, status=502)
        except ClerkRateLimited as error:
            return _sorry(str(error), retry_after=str(math.ceil(error.seconds)))
        except (ClerkUnavailable, DatabaseUnavailable, TimeoutError):
            return _sorry("Clerk or the database is not reachable")
        if ensured.row is not None:
            return _json(ensured.row)
        if ensured.outcome is None:
            return _json({"error": "Clerk has no such user, or it was deleted"}, status=404)
        if ensured.outcome is Outcome.UNAVAILABLE:
            return _sorry(ensured.reason or "unavailable")
        return _json({"error": "the row cannot be written", "reason": ensured.reason}, status=422)


async def _expected(request: web.Request) -> None:
    """Tell a client to go on. aiohttp's own answer quotes the header, and fails on odd bytes."""
    if request.headers.get("Expect", "").lower() != "100-continue":
        raise web.HTTPExpectationFailed
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(
        text=profiles.to_json(value), status=status, content_type="application/json"
    )


def _sorry(detail: str, *, retry_after: str = RETRY_AFTER_SECONDS) -> web.Response:
    response = _json({"error": detail}, status=503)
    response.headers["Retry-After"] = retry_after
    return response
