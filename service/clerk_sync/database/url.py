"""Where the database is: its URL or its pieces, and how far TLS has to verify the server.

URLs come as providers and other programs write them. An option that has no meaning here is
accepted; one that says how safe the connection has to be is obeyed, or refused with a sentence.
"""

from __future__ import annotations

import ipaddress
import json
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote

import sqlalchemy as sa


class InvalidDatabaseUrl(ValueError):
    """A database address that cannot be used. The message never repeats a password."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where the database is. `path` is SQLite's file, the rest MySQL's.

    With `socket`, a path on this machine, host and port say nothing. `tls` None is plain.
    """

    path: str | None = None
    host: str = ""
    port: int = 3306
    name: str = ""
    username: str = ""
    password: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = field(default=None, compare=False)
    socket: str | None = None

    @property
    def where(self) -> str:
        """Return the address without its secrets, for people."""
        if self.path is not None:
            return f"sqlite {self.path}"
        return f"mysql {self.server}/{self.name}"

    @property
    def secrecy(self) -> str:
        """Return how a connection over a network is encrypted, for people."""
        if self.path is not None or self.socket is not None:
            return ""
        if self.tls is None:
            return "no TLS"
        return "TLS verified" if self.tls.check_hostname else "TLS, its CA verified"

    @property
    def server(self) -> str:
        """Return the server's address, for people."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.socket or f"{host}:{self.port}"


Locate = Callable[[], Target]
"""Returns the target for a new connection: its password may come from a rotated file."""

VERIFY: Final = "verify"
VERIFY_CA: Final = "verify-ca"
DISABLE: Final = "disable"
_SHAPE: Final = "write mysql://USER:PASSWORD@HOST:3306/DATABASE"

# What URLs have behind them, by its name in small letters without - and _.
_SCHEMES: Final = frozenset({"mysql", "mysql2", "mysqls", "mariadb", "trilogy"})
_CA_FILES: Final = frozenset({"tlsca", "sslca", "sslrootcert", "sslcafile"})
_SOCKETS: Final = frozenset({"socket", "unixsocket"})
_MODES: Final = frozenset({"tls", "ssl", "sslmode", "usessl", "usetls", "requiressl"})
# Whether the certificate is verified at all, and whether its name is.
_CHECKS: Final = frozenset(
    {
        "sslaccept",
        "rejectunauthorized",
        "verifyservercertificate",
        "sslverifycert",
        "sslverifyservercert",
        "sslverify",
    }
)
_NAME_CHECKS: Final = frozenset({"sslverifyidentity", "sslcheckhostname", "tlscheckhostname"})
_CLIENT_CERTIFICATES: Final = frozenset(
    {"sslcert", "sslkey", "sslidentity", "sslpassword", "tlscert", "tlskey"}
)
_HARMLESS: Final = frozenset(
    # Text is always utf8mb4, and times are always UTC.
    {"charset", "characterencoding", "encoding", "useunicode", "collation"}
    | {"connectioncollation", "loc", "timezone", "servertimezone", "connectiontimezone"}
    | {"parsetime", "zerodatetimebehavior", "tinyint1isbit"}
    # Time limits and pools are settings of clerk-sync.
    | {"connecttimeout", "connectiontimeout", "sockettimeout", "readtimeout", "writetimeout"}
    | {"timeout", "pooltimeout", "maxidletime", "idletimeout", "acquiretimeout", "pool"}
    | {"poolsize", "maxpoolsize", "minpoolsize", "maxoverflow", "poolrecycle", "poolpreping"}
    | {"connectionlimit", "maxconnections", "minconnections", "connmaxage"}
    # Connections are always made again, and kept alive.
    | {"reconnect", "autoreconnect", "retries", "keepalive", "tcpkeepalive", "pingtimeout"}
    | {"checkoutretry"}
    # How a driver talks.
    | {"preparedstatements", "cacheprepstmts", "useserverprepstmts", "prepstmtcachesize"}
    | {"prepstmtcachesqllimit", "statementcachesize", "statementcachecapacity"}
    | {"rewritebatchedstatements", "allowmultiqueries", "multistatements", "interpolateparams"}
    | {"clientfoundrows", "useaffectedrows", "compress", "usecompression", "allownativepasswords"}
    | {"adapter", "driver", "serverversion", "applicationname", "appname", "schema"}
    | {"localinfile", "allowloadlocalinfile"}
)
_YES: Final = frozenset({"true", "1", "yes", "on", "strict"})
_NO: Final = frozenset({"false", "0", "no", "off", "acceptinvalidcerts"})
# `sslmode` of MySQL's, MariaDB's and other clients, and Go's `tls`. REQUIRED is encryption whose
# other end nobody has verified: more than that is kept, and never less. PREFERRED leaves it to us.
_MEANT: Final[dict[str, str | None]] = {
    **dict.fromkeys(("verify", "verifyidentity", "verifyfull", "required", "require"), VERIFY),
    **dict.fromkeys(_YES, VERIFY),
    "verifyca": VERIFY_CA,
    **dict.fromkeys(("disable", "disabled", "none", *_NO), DISABLE),
    **dict.fromkeys(("prefer", "preferred", "allow")),
}
_UNVERIFIED: Final = frozenset({"skipverify", "trust", "insecure", "noverify"})


def target_of(url: str) -> Target:
    """Read `DATABASE_URL`. Raises InvalidDatabaseUrl."""
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        raise InvalidDatabaseUrl(_misread(url)) from None
    scheme = parsed.drivername.partition("+")[0].lower()
    if scheme == "sqlite":
        if not parsed.database or parsed.database == ":memory:":
            raise InvalidDatabaseUrl("names no file: write sqlite:///clerk-sync.db")
        return Target(path=parsed.database)
    if scheme not in _SCHEMES:
        raise InvalidDatabaseUrl(
            f"has the scheme `{scheme}`: use mysql:// (MariaDB too) or sqlite://"
        )
    if url.count("@") > 1:
        # What follows the first would be taken for an address, and shown to people.
        raise InvalidDatabaseUrl("has more than one @: write the one in the password as %40")
    options = _Options(parsed.query)
    if scheme == "mysqls":
        options.modes["mysqls://"] = VERIFY
    return mysql_target(
        host=options.socket or unquote(parsed.host or ""),
        port=3306 if parsed.port is None else parsed.port,
        name=parsed.database or "",
        username=parsed.username or "",
        password=parsed.password or "",
        tls=options.tls(),
        tls_ca=options.tls_ca,
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
    """Return a MySQL target from its pieces. A host that begins with / is a socket's path.

    Raises InvalidDatabaseUrl.
    """
    pieces = {"host": host, "database name": name, "username": username}
    missing = [what for what, value in pieces.items() if not value]
    if missing:
        raise InvalidDatabaseUrl(f"names no {' and no '.join(missing)}")
    if not 1 <= port <= 65535:  # noqa: PLR2004 -- there are no others
        raise InvalidDatabaseUrl(f"has the port {port}: MySQL's is 3306")
    if tls_ca and tls == DISABLE:
        raise InvalidDatabaseUrl("says `tls` disable and names a `tls_ca`: keep one of them")
    if host.startswith("/"):
        if tls_ca or tls in (VERIFY, VERIFY_CA):
            raise InvalidDatabaseUrl("asks for TLS over a socket of this machine: leave `tls` out")
        return Target(None, "localhost", port, name, username, password, None, host)
    host = host.removeprefix("[").removesuffix("]")
    if "," in host:
        raise InvalidDatabaseUrl("names several hosts: name the one that takes writes")
    if ":" in host and not _is_address(host.partition("%")[0]):
        raise InvalidDatabaseUrl("has a port in its host, or an address that is none")
    if tls is None:
        tls = VERIFY if tls_ca or not _is_loopback(host) else DISABLE
    context = None if tls == DISABLE else _context(tls, tls_ca)
    return Target(None, host, port, name, username, password, context)


def _context(tls: str, tls_ca: str | None) -> ssl.SSLContext:
    if tls == VERIFY_CA and not tls_ca:
        # Whoever has a certificate of any public CA, for any name, would do.
        raise InvalidDatabaseUrl("says `verify-ca`, and names no CA: name its file in `tls_ca`")
    try:
        context = ssl.create_default_context(cafile=tls_ca)
    except (OSError, ssl.SSLError, ValueError):
        raise InvalidDatabaseUrl(f"names a `tls_ca` that is no PEM file: {tls_ca}") from None
    context.check_hostname = tls != VERIFY_CA
    if tls_ca:
        # From Python 3.13 on by default, and more than any client of MySQL asks of a CA that
        # somebody made by hand: MySQL's own has no key identifiers.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


class _Options:
    """The options behind a URL's `?`. Raises InvalidDatabaseUrl.

    `modes` is how far TLS has to verify, by the option that says so.
    """

    def __init__(self, query: Mapping[str, Sequence[str] | str]) -> None:
        self.modes: dict[str, str] = {}
        self.tls_ca: str | None = None
        self.socket: str | None = None
        seen: dict[str, str] = {}
        for name, values in query.items():
            meant = _small(name)
            group = "tlsca" if meant in _CA_FILES else "socket" if meant in _SOCKETS else meant
            for value in [values] if isinstance(values, str) else values:
                if seen.setdefault(group, value) != value:
                    raise InvalidDatabaseUrl(f"has `{name}` twice: keep one of them")
                self._take(name, meant, value)

    def _take(self, name: str, meant: str, value: str) -> None:
        if meant in _CA_FILES:
            self.tls_ca = value
        elif meant in _SOCKETS:
            if not value.startswith("/"):
                raise InvalidDatabaseUrl(f"has a `{name}` that is no path: write it from the / on")
            self.socket = value
        elif meant in _CLIENT_CERTIFICATES:
            raise InvalidDatabaseUrl(
                f"has `{name}`: a CA's file is named by `tls_ca`; a client's certificate cannot "
                "be shown, so let the account have a password"
            )
        elif meant in _MODES | _CHECKS | _NAME_CHECKS:
            mode = _mode(name, meant, value)
            if mode is not None:
                self.modes[name] = mode
        elif meant not in _HARMLESS and (meant, _small(value)) != (
            "allowpublickeyretrieval",
            "true",
        ):
            raise InvalidDatabaseUrl(
                f"has an unknown option `{name}`: leave it out. "
                "Of TLS, there are tls and tls_ca, and what other clients call them"
            )

    def tls(self) -> str | None:
        """Return how far TLS has to verify: the strictest asked for. None is the default."""
        asked = set(self.modes.values())
        if DISABLE in asked and len(asked) > 1:
            names = " and ".join(f"`{name}`" for name in sorted(self.modes))
            raise InvalidDatabaseUrl(f"asks for TLS and for none by {names}: keep one of them")
        return next((mode for mode in (VERIFY, VERIFY_CA, DISABLE) if mode in asked), None)


def _mode(name: str, meant: str, value: str) -> str | None:
    """Return how far one option lets TLS verify, None if it leaves that open.

    Raises InvalidDatabaseUrl.
    """
    small = _small(value)
    if meant == "ssl" and value.lstrip().startswith("{"):
        # Drivers of Node take an object, which PlanetScale's dashboard writes into URLs.
        given = _json(value)
        if given is None or not {*map(_small, given)} <= {"rejectunauthorized"}:
            raise InvalidDatabaseUrl(
                "has an `ssl` object that says more than rejectUnauthorized: use ?tls=verify, with "
                "the CA's file in tls_ca, or ?tls=disable"
            )
        meant, small = "rejectunauthorized", str(all(given.values())).lower()
    mode: str | None
    if small in _UNVERIFIED or (meant in _CHECKS and small in _NO):
        raise InvalidDatabaseUrl(
            f"asks for unverified TLS by `{name}`, which whoever is in between can read: use "
            "?tls=verify-ca with the CA's file in tls_ca, which does without the host's name, or "
            "?tls=disable"
        )
    if meant in _CHECKS | _NAME_CHECKS:
        mode = {True: VERIFY, False: VERIFY_CA}.get(small in _YES) if small in _YES | _NO else ""
    else:
        mode = _MEANT.get(small, "")
        if meant == "requiressl" and mode == DISABLE:
            mode = None
    if mode == "":
        known = "`verify` (default), `verify-ca` or `disable`"
        raise InvalidDatabaseUrl(f"has an unknown `{name}`: use ?tls=, which is {known}")
    return mode


def _json(text: str) -> dict[str, object] | None:
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return given if isinstance(given, dict) else None


def _small(word: str) -> str:
    return re.sub(r"[-_\s]", "", word).lower()


def _misread(url: str) -> str:
    """Return why a text is no URL, and how to write it instead, without quoting it."""
    if url[:1] in ("'", '"'):
        return "is in quotes: leave them out"
    where = url.rpartition("@")[2].partition("/")[0]
    if url.lower().startswith("jdbc:"):
        return f"is for JDBC: {_SHAPE}"
    if re.search(r"(@|^)(tcp|tcp6|unix)?\([^()]*\)/", url):
        return f"is for Go's driver: {_SHAPE}; a socket is ?socket=/path behind it"
    if re.search(r"(^|[;:])\s*(host|server|data source|unix_socket)\s*=", url, re.IGNORECASE):
        return f"is a list of words, as for PDO or .NET: {_SHAPE}"
    if "," in where:
        return "names several hosts: name the one that takes writes"
    if "@" in url and where.count(":") > 1:
        return (
            "has an IPv6 address without brackets: write mysql://USER:PASSWORD@[::1]:3306/DATABASE"
        )
    return f"is not a URL: {_SHAPE}, with @ : / ? # % in the password percent-encoded"


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
