"""A MySQL session: opened in time, set as rows need it, and read back.

A server can impose other settings on every client, by its configuration, by SET GLOBAL or by
init_connect.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any, Final

import asyncmy
from asyncmy.converters import escape_string
from asyncmy.errors import MySQLError

from clerk_sync.database.errors import DatabaseUnavailable
from clerk_sync.database.url import Target

CONNECT_SECONDS: Final = 4

# The session variables that the driver and the statements rely on, with the values that a server
# reports when they are right. Those that end in an error are left out, as the operator may limit
# them: max_execution_time, wait_timeout.
_CHARSETS: Final[dict[str, Any]] = dict.fromkeys(
    ("character_set_client", "character_set_connection", "character_set_results"), "utf8mb4"
)
_SESSION: Final[dict[str, Any]] = {
    # A value that does not fit is refused, never truncated, and a 0 in an AUTO_INCREMENT column
    # stays 0. No mode changes the meaning of a backslash, a quote or an operator. Zero and invalid
    # dates are allowed: the app may have them as defaults, and ours are always real dates.
    "sql_mode": "NO_AUTO_VALUE_ON_ZERO,STRICT_TRANS_TABLES,STRICT_ALL_TABLES,ALLOW_INVALID_DATES,"
    "NO_ENGINE_SUBSTITUTION",
    "time_zone": "+00:00",
    "autocommit": 0,
    "completion_type": "NO_CHAIN",  # else COMMIT begins the next transaction, or hangs up
    "innodb_lock_wait_timeout": 1,  # it must end before the sender's patience does
    "foreign_key_checks": 1,
    "unique_checks": 1,
    "sql_auto_is_null": 0,  # else IS NULL finds the row that was inserted last
    "sql_safe_updates": 0,  # else a DELETE of owned rows without an index fails
    "sql_big_selects": 1,  # else a long SELECT fails
    "sql_select_limit": 2**64 - 1,  # else a SELECT leaves out rows
    "sql_quote_show_create": 1,  # SQLAlchemy reads SHOW CREATE TABLE
}
# Everything that is escaped, and characters that contain a backslash byte, or swallow one, where
# the server reads gbk, big5 or sjis.
_CANARY: Final = "\\'\"%;\0\n\r\x1a中'表ソ功é\xa5😀\\"
# Modes that change the meaning of statements, refused where none can be set.
_ALIEN_MODES: Final = frozenset(
    {"NO_BACKSLASH_ESCAPES", "ANSI_QUOTES", "PIPES_AS_CONCAT", "HIGH_NOT_PRECEDENCE"}
    | {"PAD_CHAR_TO_FULL_LENGTH", "NO_UNSIGNED_SUBTRACTION"}
)


async def open_mysql(target: Target) -> Any:
    """Open an asyncmy connection whose session is as `_SESSION` says.

    Raises TimeoutError after CONNECT_SECONDS, and DatabaseUnavailable where the session check
    fails. Cancelled, it ends at once.
    """
    opening = asyncio.create_task(_opened_in_time(target))
    done: set[asyncio.Task[Any]] = set()
    try:
        # Awaited directly it would not end with its caller: asyncmy connects under
        # asyncio.wait_for, which loses a cancellation that comes just as the socket connects, and
        # then waits for a server that may be frozen
        # (https://github.com/python/cpython/issues/86296, until Python 3.12).
        done, _ = await asyncio.wait({opening})
    finally:
        if not done:
            opening.add_done_callback(_dropped)
            opening.cancel()
    return opening.result()


async def _opened_in_time(target: Target) -> Any:
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            return await _opened(target)
    except TimeoutError:
        raise TimeoutError(
            f"{target.server} did not let us in within {CONNECT_SECONDS} s"
        ) from None


async def _opened(target: Target) -> Any:
    connection = await asyncmy.connect(
        host=target.host,
        port=target.port,
        unix_socket=target.socket,
        user=target.username,
        password=target.password,
        database=target.name,
        ssl=target.tls,
        charset="utf8mb4",
        autocommit=None,  # `_prepare` sets it, with the rest
    )
    try:
        await _prepare(connection, target)
    except BaseException:
        connection.close()
        raise
    return connection


async def _prepare(connection: Any, target: Target) -> None:
    """Set the session, and check it. Raises DatabaseUnavailable."""
    where = target.server
    version = connection.get_server_info().lower()
    # The driver's own goes by a status flag of the server: whether a backslash escapes. A trigger
    # that sets sql_mode leaves the flag set although the mode is restored.
    connection.escape_string = escape_string
    try:
        if "vitess" in version:
            # It bounds a transaction by itself, and would pin a server connection for every
            # other setting made here.
            await _execute(connection, "SET autocommit=0")
            faults = await _vitess_faults(connection)
        else:
            session = _session_of(version)
            values = ",".join(f"{name}={value!r}" for name, value in session.items())
            name = target.name.replace("`", "``")
            # The charset first, as the rest is read by it. An init_connect may have begun a
            # transaction, or gone to another database.
            settings = f"SET NAMES utf8mb4;SET SESSION {values};ROLLBACK;USE `{name}`"
            await _execute(connection, settings)
            faults = await _faults(connection, _CHARSETS | session)
    except MySQLError as error:
        raise DatabaseUnavailable(f"{where}: the session cannot be prepared: {error}") from error
    if faults:
        raise DatabaseUnavailable(f"{where}: unsafe session: {faults}")


def _session_of(version: str) -> dict[str, Any]:
    mariadb = re.search(r"(\d+)\.(\d+)\.\d+-mariadb", version)
    # MariaDB has MySQL's names since 11.1, where its own are deprecated.
    prefix = "tx" if mariadb and (int(mariadb[1]), int(mariadb[2])) < (11, 1) else "transaction"
    return {
        **_SESSION,
        # READ COMMITTED takes no gap locks, the usual deadlock of concurrent upserts.
        f"{prefix}_isolation": "READ-COMMITTED",
        f"{prefix}_read_only": 0,
        **({"check_constraint_checks": 1} if mariadb else {}),
    }


async def _execute(connection: Any, statements: str) -> None:
    async with connection.cursor() as cursor:
        await cursor.execute(statements)
        while await cursor.nextset():
            pass


async def _faults(connection: Any, session: dict[str, Any]) -> str:
    """Return how the session differs from what was set, or reads what the driver escapes."""
    canary = connection.literal(_CANARY)
    found = await _read(connection, f"HEX({canary})", *(f"@@{name}" for name in session))
    wanted = (_CANARY.encode().hex().upper(), *session.values())
    names = ("a text with quotes and backslashes", *session)
    faults = [
        f"{name} is {is_!r}, not {should!r}"
        for name, is_, should in zip(names, found, wanted, strict=True)
        if is_ != should
    ]
    if not faults:
        return ""
    return (
        f"{'; '.join(faults)}, although it was set. A proxy in between may change or drop SET "
        "statements: let it pass them on for this user"
    )


async def _vitess_faults(connection: Any) -> str:
    """Return what is wrong with the connections that Vitess keeps to its MySQL servers."""
    variables = (*_CHARSETS, "time_zone", "system_time_zone", "sql_mode")
    *charsets, zone, system_zone, modes = await _read(connection, *(f"@@{v}" for v in variables))
    faults = [
        f"{name} is {is_!r}, not {should!r}: start each vttablet with --db_charset={should}"
        for (name, should), is_ in zip(_CHARSETS.items(), charsets, strict=True)
        if is_ != should
    ]
    zone = system_zone if zone == "SYSTEM" else zone
    if zone not in ("+00:00", "UTC", "Etc/UTC", "GMT"):
        faults.append(f"time_zone is {zone!r}: default_time_zone has to be +00:00")
    mode = set(modes.split(","))
    if not mode & {"STRICT_TRANS_TABLES", "STRICT_ALL_TABLES"}:
        faults.append(f"sql_mode {modes!r} cuts values off: it has to have STRICT_TRANS_TABLES")
    if alien := sorted(mode & _ALIEN_MODES):
        faults.append(f"sql_mode has {', '.join(alien)}, which change the meaning of statements")
    if not faults:
        return ""
    return f"{'; '.join(faults)}. Vitess takes this from its own and its MySQL's configuration only"


async def _read(connection: Any, *expressions: str) -> tuple[Any, ...]:
    async with connection.cursor() as cursor:
        await cursor.execute(f"SELECT {','.join(expressions)}")
        (row,) = await cursor.fetchall()
        return tuple(row)


def _dropped(opening: asyncio.Task[Any]) -> None:
    """Close a connection that opened after its caller was cancelled."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
