"""Whether the service is ready: the database accepts writes, and the schema is right.

The committer commits, or refuses, by what is found here.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from clerk_sync.database.connection import close_idle
from clerk_sync.database.errors import DatabaseUnavailable
from clerk_sync.outcomes import Reason
from clerk_sync.schema.binding import bind
from clerk_sync.schema.checks import SchemaMismatch
from clerk_sync.settings import InvalidSettings
from clerk_sync.store import write_check
from clerk_sync.store.writer import Trouble

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from clerk_sync.mapping.model import Mapping
    from clerk_sync.store.committer import Committer
    from clerk_sync.store.store import Store
    from clerk_sync.store.target import Target

log = structlog.get_logger()

READY_SECONDS: Final = 3.0
"""Between two checks while the service is ready."""
UNREADY_SECONDS: Final = 0.25
"""Between two checks while it is not."""
WRITE_CHECK_SECONDS: Final = 3.0
BIND_SECONDS: Final = 60.0
"""Between two schema checks while the service is ready."""
# Reading a schema takes dozens of queries, and a database may be a continent away.
SCHEMA_CHECK_SECONDS: Final = 20.0


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether deliveries are accepted, and if not, why and what to do about it."""

    ready: bool
    reason: Reason | None = None
    detail: str = ""


STARTING: Final = Readiness(ready=False, reason=Reason.DATABASE, detail="starting")


class Health:
    """Checks the schema and the database, and tells the committer what it found.

    `readiness` is the result of the last check, `checked` is set after the first.
    """

    def __init__(
        self, engine: AsyncEngine, mapping: Mapping, committer: Committer, *, reads: AsyncEngine
    ) -> None:
        """`engine` is for these checks alone, so that they never wait for a connection.

        `reads` is the engine of everybody else: after trouble its idle connections are closed.
        """
        self.readiness = STARTING
        self.checked = asyncio.Event()
        self._engine = engine
        self._reads = reads
        self._mapping = mapping
        self._committer = committer
        # As the schema was when it was last found right.
        self._store: Store | None = None
        self._bound = 0.0
        # A defect is logged when it first shows, not with every check.
        self._defect: type[Exception] | None = None

    @property
    def users(self) -> Target | None:
        """The table of users; None while the schema is unknown, or maps none."""
        return self._store.targets.get("user") if self._store else None

    async def watch(self) -> None:
        """Check again and again, at once after trouble, until cancelled."""
        trouble: Trouble | None = None
        while True:
            self._publish(await self._check(trouble))
            self.checked.set()
            trouble = await self._next_trouble(
                READY_SECONDS if self.readiness.ready else UNREADY_SECONDS
            )

    async def _next_trouble(self, seconds: float) -> Trouble | None:
        """The trouble that makes the next check due, None where that is due by time."""
        await asyncio.sleep(UNREADY_SECONDS)  # trouble may come many times a second
        try:
            async with asyncio.timeout(seconds - UNREADY_SECONDS):
                return await self._committer.trouble()
        except TimeoutError:
            return None

    async def _check(self, trouble: Trouble | None) -> Readiness:
        if trouble is not None:
            # A connection from before may still be good where a new one, with the credentials of
            # now, is not let in.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WRITE_CHECK_SECONDS):
                    await self._engine.dispose()
            await close_idle(self._reads)
        if self._store is None or trouble is Trouble.SCHEMA:
            return await self._check_schema()
        commits = self._committer.commits
        try:
            async with asyncio.timeout(WRITE_CHECK_SECONDS):
                await write_check.check_writes(self._engine)
        except (DatabaseUnavailable, InvalidSettings, TimeoutError) as error:
            if self._committer.commits > commits:
                return self.readiness  # a commit proves more than a check that failed
            # So every caller is answered at once, not at its deadline.
            self._committer.suspend(Reason.DATABASE)
            return _unready(error, WRITE_CHECK_SECONDS)
        except Exception as error:
            if self._is_new(error):
                log.exception("schema_check_failed")
            return self.readiness
        # Bound again every minute: a column that was widened accepts longer values.
        if asyncio.get_running_loop().time() - self._bound > BIND_SECONDS:
            return await self._check_schema()
        if not self.readiness.ready:
            self._committer.resume(self._store)
        return Readiness(ready=True)

    async def _check_schema(self) -> Readiness:
        """Bind the store to the schema as it is. Where that fails, the last one serves on."""
        self._bound = asyncio.get_running_loop().time()
        unready = Readiness(ready=False, reason=Reason.DATABASE, detail="the schema check failed")
        try:
            async with asyncio.timeout(SCHEMA_CHECK_SECONDS):
                self._store = await bind(self._engine, self._mapping)
            self._committer.resume(self._store)
            return Readiness(ready=True)
        except SchemaMismatch as error:
            self._store = None
            self._committer.suspend(Reason.SCHEMA)
            return Readiness(ready=False, reason=Reason.SCHEMA, detail=str(error))
        except (DatabaseUnavailable, InvalidSettings, TimeoutError) as error:
            unready = _unready(error, SCHEMA_CHECK_SECONDS)
        except Exception as error:
            if self._is_new(error):
                log.exception("schema_check_failed")
        return self.readiness if self._store is not None else unready

    def _publish(self, readiness: Readiness) -> None:
        if readiness != self.readiness:
            if readiness.ready:
                log.info("ready")
            else:
                for line in readiness.detail.splitlines():
                    log.error("not_ready", reason=readiness.reason, detail=line)
        self.readiness = readiness

    def _is_new(self, defect: Exception) -> bool:
        """Whether the last defect was another one."""
        known, self._defect = self._defect, type(defect)
        return known is not self._defect


def _unready(error: Exception, seconds: float) -> Readiness:
    """What a failed check says about the database."""
    detail = str(error)
    if isinstance(error, TimeoutError):
        detail = f"the database did not answer within {seconds:.0f} s"
    return Readiness(ready=False, reason=Reason.DATABASE, detail=detail)
