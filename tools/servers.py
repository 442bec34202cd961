"""Real database servers for the test-suite and the bench, started here and thrown away after.

A server comes, in this order, from `TEST_DATABASE_URL`, the PATH, the folder that
`python -m tools.provision` made, or Docker. It keeps its data in a folder of its own, on a
loopback port, as durable as in production: what the tests say about crashes has to be true.
"""

from __future__ import annotations

import asyncio
import atexit
import ipaddress
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import quote, unquote, urlsplit

import asyncmy
from asyncmy.errors import MySQLError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator, Sequence

NAMES: Final = {"mysql": "MySQL", "mariadb": "MariaDB"}
IMAGES: Final = {"mysql": "mysql:9", "mariadb": "mariadb:10.11"}
CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "clerk-sync-tests").expanduser()
LOOPBACK: Final = "127.0.0.1"
START_SECONDS: Final = 90
SEARCH_PATH: Final = (
    f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # `su` leaves these out
)
_CHROOT: Final = shutil.which("chroot", path=SEARCH_PATH) or "chroot"

ADMIN: Final = ("admin", "admin")
USER: Final = ("clerk", "p@ss:w/rd")  # a URL has to quote every part of it

# Run at every start. One statement a line is what --init-file wants.
_INIT_SQL: Final = "".join(
    f"CREATE USER IF NOT EXISTS '{user}'@'%' IDENTIFIED BY '{password}';\n"
    f"GRANT ALL PRIVILEGES ON *.* TO '{user}'@'%' WITH GRANT OPTION;\n"
    for user, password in (ADMIN, USER)
)
_OPTIONS: Final = (
    "--innodb-flush-log-at-trx-commit=1",
    "--sync-binlog=1",
    "--innodb-buffer-pool-size=128M",
    "--performance-schema=OFF",  # half of an idle server's memory
    "--max-connections=500",
    "--max-connect-errors=1000000",  # the TLS tests fail handshakes on purpose
    "--skip-name-resolve",
)


class UnavailableError(Exception):
    """No database to test on. Says what to do."""


async def query(
    url: str, sql: str, *, tls: ssl.SSLContext | None = None
) -> Sequence[tuple[Any, ...]]:
    """Run one statement on a connection of its own, and return its rows."""
    parts = urlsplit(url)
    async with (
        asyncmy.connect(
            host=parts.hostname or LOOPBACK,
            port=parts.port or 3306,
            user=unquote(parts.username or ""),
            password=unquote(parts.password or ""),
            database=parts.path.strip("/") or None,
            autocommit=True,
            connect_timeout=5,
            init_command="SET sql_notes = 0",  # DROP … IF EXISTS would warn, and warnings fail
            ssl=tls,
        ) as connection,
        connection.cursor() as cursor,
    ):
        await cursor.execute(sql)
        rows: Sequence[tuple[Any, ...]] = await cursor.fetchall() if cursor.description else ()
        return rows


def url_of(login: tuple[str, str], host: str, port: int, database: str = "") -> str:
    user, password = (quote(part, safe="") for part in login)
    return f"mysql://{user}:{password}@{host}:{port}/{database}"


@dataclass(frozen=True)
class Source:
    """Where a server of one flavour comes from. `launch` starts a new one, with these options."""

    flavour: str
    version: str
    origin: str
    launch: Callable[..., Server]
    managed: bool = True

    @property
    def is_vitess(self) -> bool:
        return self.version.endswith("-Vitess")

    def __str__(self) -> str:
        return f"{NAMES[self.flavour]} {self.version} ({self.origin})"


class Server:
    """A running server that tests create databases on. Only a `managed` one can be killed."""

    managed = False

    def __init__(self, flavour: str, version: str, host: str, port: int) -> None:
        self.flavour = flavour
        self.version = version
        self.host = host
        self.port = port
        self.admin = ADMIN
        self.user = USER

    def create_database(self, name: str) -> str:
        """Return the URL of a new, empty database; an older one of that name is dropped."""
        self.drop_database(name)
        self.execute(f"CREATE DATABASE `{name}` CHARACTER SET utf8mb4")
        return url_of(self.user, self.host, self.port, name)

    def drop_database(self, name: str) -> None:
        self.execute(f"DROP DATABASE IF EXISTS `{name}`")

    def execute(self, sql: str, database: str = "") -> Sequence[tuple[Any, ...]]:
        """Run one statement as the administrator, also from where an event loop already runs."""
        with ThreadPoolExecutor(1) as thread:
            statement = query(url_of(self.admin, self.host, self.port, database), sql)
            return thread.submit(asyncio.run, statement).result()

    def close(self) -> None:
        """Stop the server for good and remove its data."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def running(self) -> bool:
        return True

    def start(self) -> None:
        """Start again, with the same data and port; return once a login works."""
        raise self._not_ours()

    def stop(self) -> None:
        """SIGTERM, and wait for the end."""
        raise self._not_ours()

    def kill(self) -> None:
        """SIGKILL: a crash."""
        raise self._not_ours()

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, nobody answers."""
        raise self._not_ours()

    def thaw(self) -> None:
        raise self._not_ours()

    def _not_ours(self) -> Exception:
        return RuntimeError("the server of TEST_DATABASE_URL is not ours to stop")


class Given(Server):
    """A server that `TEST_DATABASE_URL` names, and perhaps databases on it.

    Where databases cannot be made, as on Vitess, it names some that may be emptied:
    `mysql://…/one,two`. Tests take turns with them.
    """

    def __init__(
        self, flavour: str, version: str, host: str, port: int, names: Sequence[str] = ()
    ) -> None:
        super().__init__(flavour, version, host, port)
        self._all = names
        self._free = list(names)
        self._taken: dict[str, str] = {}

    def create_database(self, name: str) -> str:
        if not self._all:
            return super().create_database(name)
        if name not in self._taken and not self._free:
            raise UnavailableError(
                f"TEST_DATABASE_URL: {len(self._all)} databases for each process are too few"
            )
        actual = self._taken[name] = self._taken.pop(name, "") or self._free.pop(0)
        for (table,) in self.execute("SHOW TABLES", actual):
            self.execute(f"DROP TABLE `{table}`", actual)
        return url_of(self.user, self.host, self.port, actual)

    def drop_database(self, name: str) -> None:
        if not self._all:
            super().drop_database(name)
        elif name in self._taken:
            self._free.append(self._taken.pop(name))


class Managed(Server):
    """A server of our own: its folder has the certificates, the first SQL and the log."""

    managed = True

    def __init__(
        self, flavour: str, version: str, folder: Path, options: tuple[str, ...] = ()
    ) -> None:
        super().__init__(flavour, version, LOOPBACK, free_port())
        self.options = options
        self.folder = folder
        self.log = folder / "server.log"
        self.ca_file = folder / "ca.pem"
        self.wrong_ca_file = folder / "wrong-ca.pem"
        write_certificates(folder)
        folder.joinpath("init.sql").write_text(_INIT_SQL)

    def _options(self, folder: str) -> list[str]:
        return [
            *_OPTIONS,
            *(["--mysqlx=OFF"] if self.flavour == "mysql" else []),  # it has a fixed port
            f"--init-file={folder}/init.sql",
            f"--ssl-ca={folder}/ca.pem",
            f"--ssl-cert={folder}/server.pem",
            f"--ssl-key={folder}/server.key",
            *self.options,
        ]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.execute("SELECT 1")
            except (OSError, EOFError, MySQLError) as error:
                if not self.running or time.monotonic() > deadline:
                    raise RuntimeError(f"{self._failure('did not start')}\n{error}") from None
                time.sleep(0.02)
            else:
                return

    def _failure(self, what: str) -> str:
        log = self.log.read_text(errors="replace") if self.log.exists() else ""
        tail = "\n".join(log.splitlines()[-25:])
        return f"{NAMES[self.flavour]} {self.version} {what}. The end of its log:\n{tail}"


class Process(Managed):
    """A server program of this machine, or of a Debian tree (`root`) that it is chrooted into."""

    def __init__(
        self, flavour: str, version: str, binary: Path, root: Path, options: tuple[str, ...] = ()
    ) -> None:
        temp = tempfile.gettempdir() if root == Path("/") else root / "var/tmp"
        folder = Path(tempfile.mkdtemp(prefix="clerk-sync-", dir=temp))
        super().__init__(flavour, version, folder, options)
        self._binary = binary
        self._inside = f"/{folder.relative_to(root)}"
        self._enter = [] if root == Path("/") else [_CHROOT, str(root)]
        self._user = _unprivileged(root) if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._basedir: Path | None = None
        self._escape_apparmor()
        try:
            self._initialise()
            self.start()
        except BaseException:
            self.close()
            raise

    def _command(self, binary: Path | str, *options: str) -> list[str]:
        return [
            *self._enter,
            str(binary),
            "--no-defaults",
            f"--datadir={self._inside}/data",
            *([f"--user={self._user}"] if self._user else []),
            *([f"--basedir={self._basedir}"] if self._basedir else []),
            *options,
        ]

    def _initialise(self) -> None:
        """Make the data folder. Durability is of no use before there is anything to lose."""
        if self._user:
            self._run([*self._enter, "chown", "-R", self._user, self._inside])
        if self.flavour == "mysql":
            self._run(
                self._command(
                    self._binary,
                    "--initialize-insecure",
                    "--innodb-flush-log-at-trx-commit=0",
                    "--innodb-doublewrite=OFF",
                    "--performance-schema=OFF",
                    "--skip-log-bin",
                    "--mysqlx=OFF",
                    # It is kept in the data folder, and cannot be changed later.
                    *(one for one in self.options if one.startswith("--lower-case-table-names")),
                )
            )
        else:
            beside = [self._binary.parent, self._binary.parent.parent / "bin"]
            path = os.pathsep.join([*map(str, beside), os.environ.get("PATH", "")])
            script = shutil.which("mariadb-install-db", path=path) or "mariadb-install-db"
            normal = "--auth-root-authentication-method=normal"
            self._run(self._command(script, "--skip-test-db", "--force", normal))

    def _run(self, command: list[str]) -> None:
        with self.log.open("ab") as log:
            done = subprocess.run(
                command, stdout=log, stderr=log, check=False, env=self._environment
            )
        if done.returncode:
            raise RuntimeError(self._failure(f"failed: {' '.join(command)}"))

    @property
    def _environment(self) -> dict[str, str]:
        """A folder of its own for temporary files: MariaDB clears a shared one when it starts."""
        return {**os.environ, "TMPDIR": self._inside}

    def _escape_apparmor(self) -> None:
        """Ubuntu's MySQL is confined by its path to the system's data folder: run a copy."""
        with suppress(OSError):
            profile = Path("/etc/apparmor.d", str(self._binary)[1:].replace("/", "."))
            enabled = Path("/sys/module/apparmor/parameters/enabled").read_text()
            if not self._enter and profile.exists() and enabled.startswith("Y"):
                self._basedir = self._binary.parent.parent
                self._binary = Path(shutil.copy(self._binary, self.folder))

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        if self.running:
            raise RuntimeError("already running")
        command = self._command(
            self._binary,
            f"--bind-address={LOOPBACK}",
            f"--port={self.port}",
            f"--socket={self._inside}/s",  # a socket's path is at most 104 bytes on macOS
            f"--pid-file={self._inside}/pid",
            *self._options(self._inside),
        )
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C is for pytest, which stops the servers after its tests.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=self._environment,
            )
        # Its input ends when this process does, however that was: then the server goes as well.
        farewell = f"read line; kill -9 {self._process.pid}; rm -rf '{self.folder}'"
        self._guard = subprocess.Popen(
            ["sh", "-c", farewell],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._wait_until_ready()

    def _signal(self, *numbers: signal.Signals) -> None:
        if self._process:
            for number in numbers:
                self._process.send_signal(number)

    def stop(self) -> None:
        self._signal(signal.SIGCONT, signal.SIGTERM)
        self._wait()

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._wait()

    def _wait(self) -> None:
        if self._guard:
            with self._guard:
                self._guard.kill()
            self._guard = None
        if self._process:
            self._process.wait(START_SECONDS)

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class Container(Managed):
    """A server in Docker. Its files are copied in, so a daemon elsewhere works as well."""

    def __init__(self, flavour: str, version: str, options: tuple[str, ...] = ()) -> None:
        super().__init__(flavour, version, Path(tempfile.mkdtemp(prefix="clerk-sync-")), options)
        arguments = self._options("/clerk-sync")
        published = f"--publish={LOOPBACK}:{self.port}:3306"
        empty = ["--env=MYSQL_ALLOW_EMPTY_PASSWORD=1", "--env=MARIADB_ALLOW_EMPTY_ROOT_PASSWORD=1"]
        self._name = self.folder.name
        for path in (self.folder, *self.folder.iterdir()):
            path.chmod(0o755)  # the container's server is another user
        atexit.register(self.close)
        try:
            image = image_of(flavour)
            docker("create", f"--name={self._name}", published, *empty, image, *arguments)
            docker("cp", str(self.folder), f"{self._name}:/clerk-sync")
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def running(self) -> bool:
        return docker("inspect", "--format={{.State.Running}}", self._name) == "true"

    def start(self) -> None:
        docker("start", self._name)
        try:
            self._wait_until_ready()
        except RuntimeError:
            self.log.write_text(docker("logs", self._name))
            raise RuntimeError(self._failure("did not start")) from None

    def stop(self) -> None:
        self.thaw()
        docker("stop", f"--time={START_SECONDS}", self._name)

    def kill(self) -> None:
        self.thaw()
        docker("kill", self._name)

    def freeze(self) -> None:
        docker("pause", self._name)

    def thaw(self) -> None:
        if docker("inspect", "--format={{.State.Paused}}", self._name) == "true":
            docker("unpause", self._name)

    def close(self) -> None:
        with suppress(RuntimeError):
            docker("rm", "--force", "--volumes", self._name)
        shutil.rmtree(self.folder, ignore_errors=True)
        atexit.unregister(self.close)


@cache
def available() -> tuple[Source, ...]:
    """Return the servers that this run tests on, without starting any.

    `TEST_DATABASES=mysql,mariadb` makes each of the named ones mandatory; else one is enough.
    `TEST_DATABASES=mysql:8.4` is that version, as a Docker image.
    """
    if url := os.environ.get("TEST_DATABASE_URL"):
        return (_given(url),)
    found = {flavour: find(flavour) for flavour in wanted()}
    missing = [flavour for flavour, source in found.items() if source is None]
    if missing and (os.environ.get("TEST_DATABASES") or len(missing) == len(found)):
        raise UnavailableError(advice(missing))
    return tuple(source for source in found.values() if source)


def wanted() -> tuple[str, ...]:
    names = tuple(_tags())
    if unknown := [name for name in names if name not in NAMES]:
        raise UnavailableError(f"TEST_DATABASES: {unknown[0]!r} is none of {', '.join(NAMES)}")
    return names


def image_of(flavour: str) -> str:
    """Return the Docker image that a server of this flavour would come from."""
    tag = _tags().get(flavour)
    return f"{flavour}:{tag}" if tag else IMAGES[flavour]


def has_to_be_an_image(flavour: str) -> bool:
    return bool(_tags().get(flavour))


def _tags() -> dict[str, str]:
    """Return flavour → tag of its image, which is empty where any version will do."""
    entries = (os.environ.get("TEST_DATABASES") or ",".join(NAMES)).split(",")
    return {name: tag for name, _, tag in (entry.partition(":") for entry in entries)}


def advice(missing: Sequence[str]) -> str:
    names = " and no ".join(NAMES[flavour] for flavour in missing)
    return (
        f"There is no {names} server to test on. One of these helps:\n"
        f"  - install it, so that its server program is on the PATH\n"
        f"    (macOS: brew install {missing[0]}; Debian, Ubuntu: apt-get install"
        f" {missing[0]}-server)\n"
        f"  - start Docker\n"
        f"  - on Debian or Ubuntu, run `make test` as root: it installs what is missing,\n"
        f"    in {CACHE}\n"
        f"  - TEST_DATABASE_URL=mysql://user:password@host:port/ of a server with the right\n"
        f"    to create databases; or mysql://…/one,two with some that tests may empty\n"
        f"  - TEST_DATABASES=mysql or mariadb, to test on that one only, on purpose"
    )


def find(flavour: str) -> Source | None:
    anywhere = (_installed, _provisioned, _in_docker)
    candidates = (_in_docker,) if has_to_be_an_image(flavour) else anywhere
    return next((source for look in candidates if (source := look(flavour))), None)


def _installed(flavour: str) -> Source | None:
    for binary in _binaries():
        # On Debian `mysqld` may be MariaDB's: only the program itself knows.
        said = _version(str(binary))
        if said and said[0] == flavour:
            return _process(flavour, said[1], binary, Path("/"), str(binary))
    return None


def _provisioned(flavour: str) -> Source | None:
    tree = CACHE / flavour
    if os.geteuid() or not tree.is_dir():
        return None
    binary = {"mysql": "/usr/sbin/mysqld", "mariadb": "/usr/sbin/mariadbd"}[flavour]
    said = _version(_CHROOT, str(tree), binary)
    return said and _process(flavour, said[1], Path(binary), tree, f"chroot {tree}")


def _in_docker(flavour: str) -> Source | None:
    image = image_of(flavour)
    if not docker_runs() or not docker("images", "--quiet", image):
        return None
    version = image.partition(":")[2]
    return Source(
        flavour, version, f"Docker {image}", lambda *options: Container(flavour, version, options)
    )


def _given(url: str) -> Source:
    rows: Sequence[tuple[Any, ...]]
    first = url.partition(",")[0]
    with ThreadPoolExecutor(1) as thread:
        try:
            rows = thread.submit(asyncio.run, query(first, "SELECT VERSION()")).result()
        except (OSError, EOFError, MySQLError) as error:
            raise UnavailableError(f"TEST_DATABASE_URL: cannot log in: {error}") from None
    said = str(rows[0][0])
    parts = urlsplit(url)
    flavour = "mariadb" if "MariaDB" in said else "mysql"
    version = said if "Vitess" in said else said.partition("-")[0]

    names = [name for name in unquote(parts.path).strip("/").split(",") if name]
    # Each process of a parallel run has its own of them.
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    mine = names[worker :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))]
    if names and not mine:
        raise UnavailableError("TEST_DATABASE_URL names fewer databases than there are processes")

    def launch() -> Server:
        server = Given(flavour, version, parts.hostname or LOOPBACK, parts.port or 3306, mine)
        server.user = unquote(parts.username or ""), unquote(parts.password or "")
        server.admin = server.user
        return server

    return Source(flavour, version, "TEST_DATABASE_URL", launch, managed=False)


def _process(flavour: str, version: str, binary: Path, root: Path, origin: str) -> Source:
    return Source(
        flavour,
        version,
        origin,
        lambda *options: Process(flavour, version, binary, root, options),
    )


def _binaries() -> Iterator[Path]:
    """Look also where servers are but a user's PATH does not lead: sbin, keg-only Homebrew."""
    folders = [Path(folder) for folder in os.get_exec_path()]
    folders += map(Path, ("/usr/sbin", "/usr/local/sbin", "/usr/libexec", "/usr/local/mysql/bin"))
    for prefix in ("/opt/homebrew", "/usr/local"):
        folders += [Path(prefix, "bin"), *sorted(Path(prefix, "opt").glob("m[ya]*/bin"))]
    binaries = (folder / name for folder in folders for name in ("mariadbd", "mysqld"))
    yield from dict.fromkeys(path.resolve() for path in binaries if os.access(path, os.X_OK))


def _version(*program: str) -> tuple[str, str] | None:
    try:
        said = subprocess.run([*program, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    match = re.search(r"Ver (\d+\.\d+\.\d+)(-MariaDB)?", said.stdout)
    return match and ("mariadb" if match[2] else "mysql", match[1])


@cache
def docker_runs() -> bool:
    try:
        docker("info", timeout=20)
    except (RuntimeError, subprocess.TimeoutExpired):
        return False
    return True


def docker(*arguments: str, timeout: float | None = None) -> str:
    command = ["docker", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=timeout)
    except OSError as error:
        raise RuntimeError(f"docker: {error}") from None
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{' '.join(command[:2])}: {error.stderr.strip()}") from None
    return (done.stdout + done.stderr if arguments[0] == "logs" else done.stdout).strip()


def _unprivileged(root: Path) -> str:
    """Name a user other than root for the server to run as."""
    users = root.joinpath("etc/passwd").read_text()
    return "mysql" if re.search(r"^mysql:", users, re.MULTILINE) else "nobody"


def free_port() -> int:
    """Find a port below the ephemeral ones.

    Among those, a client that keeps calling a server that is down may be given the very port
    that it calls as its own, and be connected to itself.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port


def write_certificates(folder: Path) -> None:
    """Write a CA, a certificate by it for this machine's loopback, and a CA of somebody else."""
    ca_key, ca = _certificate("clerk-sync test CA")
    _, wrong = _certificate("clerk-sync other CA")
    key, leaf = _certificate("localhost", issuer=(ca_key, ca))
    pem = serialization.Encoding.PEM
    for name, certificate in (("ca.pem", ca), ("wrong-ca.pem", wrong), ("server.pem", leaf)):
        folder.joinpath(name).write_bytes(certificate.public_bytes(pem))
    encoding = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    folder.joinpath("server.key").write_bytes(key.private_bytes(pem, *encoding))


def _certificate(
    name: str, issuer: tuple[ec.EllipticCurvePrivateKey, x509.Certificate] | None = None
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """Make a key and its certificate: a CA's when nobody else issues it."""
    key = ec.generate_private_key(ec.SECP256R1())
    signer = issuer[0] if issuer else key
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=not issuer,
        crl_sign=not issuer,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[1].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=not issuer, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    if issuer:
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(LOOPBACK))]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return key, builder.sign(signer, hashes.SHA256())
