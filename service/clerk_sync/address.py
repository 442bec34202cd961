"""Where the database is: its URL or its pieces, and whether to speak TLS."""

from __future__ import annotations

import ipaddress
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field

import sqlalchemy as sa


class InvalidDatabase(ValueError):  # noqa: N818
    """A database address that cannot be used. The message never repeats a password."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where the database is. `path` is SQLite's file, the rest MySQL's; `tls` None is plain."""

    path: str | None = None
    host: str = ""
    port: int = 3306
    name: str = ""
    username: str = ""
    password: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = field(default=None, compare=False)

    @property
    def where(self) -> str:
        """The address without its secrets, for people."""
        if self.path is not None:
            return f"sqlite {self.path}"
        return f"mysql {self.host}:{self.port}/{self.name}"


Locate = Callable[[], Target]
"""Gives the target anew for every connection: its password may come from a rotated file."""


def target_of(url: str) -> Target:
    """Read `DATABASE_URL`. Raises InvalidDatabase."""
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        raise InvalidDatabase(
            "is not a URL: write mysql://USER:PASSWORD@HOST:3306/DATABASE, "
            "with @ : / ? # % in the password percent-encoded"
        ) from None
    scheme = parsed.drivername.partition("+")[0]
    if scheme == "sqlite":
        if not parsed.database or parsed.database == ":memory:":
            raise InvalidDatabase("names no file: write sqlite:///clerk-sync.db")
        return Target(path=parsed.database)
    if scheme not in ("mysql", "mariadb"):
        raise InvalidDatabase(f"has the scheme `{scheme}`: use mysql:// (MariaDB too) or sqlite://")
    if url.count("@") > 1:
        # What follows the first would be taken for an address, and shown to people.
        raise InvalidDatabase("has an @ too many: write the one in the password as %40")
    options = {name: str(value) for name, value in parsed.query.items()}
    # What PlanetScale's dashboard appends for Prisma and for Node drivers: verified TLS.
    if options.pop("sslaccept", "strict") != "strict":
        raise InvalidDatabase("asks for unverified TLS by `sslaccept`: use ?tls=verify or disable")
    if re.sub(r"\s", "", options.pop("ssl", '{"rejectUnauthorized":true}')) not in (
        '{"rejectUnauthorized":true}',
        "true",
    ):
        raise InvalidDatabase("has an `ssl` option: use ?tls=verify or ?tls=disable instead")
    tls = options.pop("tls", None)
    tls_ca = options.pop("tls_ca", None)
    if options:
        raise InvalidDatabase(f"has an unknown option `{min(options)}`: there is tls and tls_ca")
    return mysql_target(
        host=parsed.host or "",
        port=parsed.port or 3306,
        name=parsed.database or "",
        username=parsed.username or "",
        password=parsed.password or "",
        tls=tls,
        tls_ca=tls_ca,
    )


def mysql_target(
    *,
    host: str,
    port: int,
    name: str,
    username: str,
    password: str,
    tls: str | None = None,
    tls_ca: str | None = None,
) -> Target:
    """A MySQL target from its pieces. Raises InvalidDatabase."""
    pieces = {"host": host, "database name": name, "username": username}
    missing = [what for what, value in pieces.items() if not value]
    if missing:
        raise InvalidDatabase(f"names no {' and no '.join(missing)}")
    if not 1 <= port <= 65535:  # noqa: PLR2004 -- there are no others
        raise InvalidDatabase(f"has the port {port}: MySQL's is 3306")
    if tls not in (None, "verify", "disable"):
        raise InvalidDatabase("has an unknown `tls`: it is `verify` (default) or `disable`")
    context = None
    if tls == "verify" or (tls is None and (tls_ca or not _is_loopback(host))):
        try:
            context = ssl.create_default_context(cafile=tls_ca)
        except (OSError, ssl.SSLError):
            raise InvalidDatabase(f"names a `tls_ca` that is no PEM file: {tls_ca}") from None
    return Target(None, host, port, name, username, password, context)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
