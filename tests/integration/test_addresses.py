"""Database URLs as providers and other programs write them, and servers that want TLS."""

from __future__ import annotations

import shutil
import ssl
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from clerk_sync.database.connection import connect, engine_of
from clerk_sync.database.errors import DatabaseUnavailable, translate_engine_errors
from clerk_sync.database.url import InvalidDatabaseUrl, Target, mysql_target, target_of
from clerk_sync.settings import load
from tools.servers import query, url_of, write_certificates

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Servers
    from tools.servers import Managed

HUNTER = "hunter2"
OWN_CA = "OWN-CA"
"""Stands in a URL for the path of a CA's file."""


@pytest.fixture(scope="module")
def ca_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("certificates")
    write_certificates(folder)
    return str(folder / "ca.pem")


def mode_of(target: Target) -> str:
    if target.tls is None:
        return "plain"
    assert target.tls.verify_mode is ssl.CERT_REQUIRED
    return "verify" if target.tls.check_hostname else "verify-ca"


# Each as a provider shows it, or as a program takes it.
@pytest.mark.parametrize(
    ("url", "mode"),
    [
        # DigitalOcean, Aiven, PlanetScale, Heroku's ClearDB and JawsDB, Railway, Scalingo, TiDB.
        ("mysql://doadmin:p@db-1.b.db.ondigitalocean.com:25060/app?ssl-mode=REQUIRED", "verify"),
        ("mysql://avnadmin:p@m-1.aivencloud.com:12691/app?ssl-mode=REQUIRED", "verify"),
        ("mysql://u:pscale_pw_x@aws.connect.psdb.cloud/app?sslaccept=strict", "verify"),
        ('mysql://u:p@aws.connect.psdb.cloud/app?ssl={"rejectUnauthorized":true}', "verify"),
        ("mysql2://u:p@aws.connect.psdb.cloud/app?ssl_mode=verify_identity", "verify"),
        ("mysql2://b1:p@us-cdbr-east-02.cleardb.com/heroku_1?reconnect=true", "verify"),
        ("mysql://u:p@x.us-east-1.rds.amazonaws.com:3306/app", "verify"),
        ("mysql://root:p@mysql.railway.internal:3306/railway", "verify"),
        ("mysql://u:p@h:3306/app?useSSL=true&requireSSL=true&serverTimezone=UTC", "verify"),
        (
            "mysql://1a.root:p@g.tidbcloud.com:4000/t?ssl_verify_cert=true&ssl_verify_identity=true",
            "verify",
        ),
        (
            "mysql+pymysql://root:p@g.tidbcloud.com:4000/t?ssl_ca=OWN-CA&ssl_verify_cert=true",
            "verify",
        ),
        # Symfony, Rails, Prisma, Laravel, SQLAlchemy, Go, Node, sqlx.
        ("mysql://u:p@h:3306/app?serverVersion=8.0.32&charset=utf8mb4", "verify"),
        ("trilogy://u:p@h/app?encoding=utf8mb4&pool=5&ssl_mode=required", "verify"),
        ("mysql://u:p@h/app?connection_limit=5&pool_timeout=20&connect_timeout=300", "verify"),
        ("mysql+mysqldb://u:p@h/app?charset=utf8mb4&read_timeout=5", "verify"),
        ("mysql://u:p@h/app?parseTime=true&loc=UTC&tls=true", "verify"),
        ("mysql://u:p@h/app?ssl=true&allowPublicKeyRetrieval=true", "verify"),
        ("mysqls://u:p@h/app", "verify"),
        ("mysqls://u:p@127.0.0.1/app", "verify"),
        # MySQL's own modes, in the spellings that there are.
        ("mysql://u:p@127.0.0.1/app?sslmode=REQUIRED", "verify"),
        ("mysql://u:p@127.0.0.1/app?sslMode=VERIFY_IDENTITY", "verify"),
        ("mysql://u:p@h/app?ssl-mode=VERIFY_CA&ssl-ca=OWN-CA", "verify-ca"),
        ("mysql://u:p@h/app?sslmode=verify-ca&sslrootcert=OWN-CA", "verify-ca"),
        ("mysql://u:p@h/app?tls=verify-ca&tls_ca=OWN-CA", "verify-ca"),
        ("mysql://u:p@h/app?tls=verify&ssl_check_hostname=false&ssl_ca=OWN-CA", "verify"),
        ("mysql://u:p@h/app?ssl_verify_identity=false&ssl_ca=OWN-CA", "verify-ca"),
        ("mysql://u:p@h/app?ssl-mode=DISABLED", "plain"),
        ("mysql://u:p@h/app?useSSL=false", "plain"),
        ("mysql://u:p@h/app?ssl=0", "plain"),
        # What leaves it open is no less than the default.
        ("mysql://u:p@h/app?ssl-mode=PREFERRED", "verify"),
        ("mysql://u:p@127.0.0.1/app?ssl-mode=PREFERRED", "plain"),
        ("mysql://u:p@h/app?requireSSL=false", "verify"),
    ],
)
def test_urls_of_providers_are_understood(url: str, mode: str, ca_file: str) -> None:
    assert mode_of(target_of(url.replace(OWN_CA, ca_file))) == mode


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("tls=verify-ca", "says `verify-ca`, and names no CA"),
        ("ssl-mode=VERIFY_CA", "says `verify-ca`, and names no CA"),
        ("tls=skip-verify", "asks for unverified TLS by `tls`"),
        ("sslmode=trust", "asks for unverified TLS by `sslmode`"),
        ("useSSL=true&verifyServerCertificate=false", "asks for unverified TLS by `verifyServer"),
        ("sslaccept=accept_invalid_certs", "asks for unverified TLS by `sslaccept`"),
        ('ssl={"rejectUnauthorized":false}', "asks for unverified TLS by `ssl`"),
        ('ssl={"rejectUnauthorized":true,"ca":"x"}', "has an `ssl` object that says more"),
        ("ssl={nonsense}", "has an `ssl` object that says more"),
        ("ssl=Amazon RDS", "has an unknown `ssl`: use ?tls="),
        ("sslaccept=perhaps", "has an unknown `sslaccept`: use ?tls="),
        ("ssl-mode=DISABLED&tls=verify", "asks for TLS and for none by `ssl-mode` and `tls`"),
        ("tls=disable&tls_ca=OWN-CA", "says `tls` disable and names a `tls_ca`"),
        ("ssl_ca=OWN-CA&sslrootcert=/other.pem", "has `sslrootcert` twice"),
        ("sslcert=/client.pem", "has `sslcert`: a CA's file is named by `tls_ca`"),
        ("ssl-key=/client.key", "has `ssl-key`: a CA's file is named by `tls_ca`"),
        ("sslidentity=/client.p12&sslpassword=hunter2", "has `sslidentity`: a CA's file"),
        ("allowCleartextPasswords=true", "has an unknown option `allowCleartextPasswords`"),
        ("socket=run/mysqld.sock", "has a `socket` that is no path"),
        ("socket=/run/mysqld.sock&tls=verify", "asks for TLS over a socket of this machine"),
    ],
)
def test_what_says_how_safe_it_has_to_be_is_never_ignored(
    options: str, told: str, ca_file: str
) -> None:
    with pytest.raises(InvalidDatabaseUrl) as refused:
        target_of(f"mysql://u:{HUNTER}@h/app?{options.replace(OWN_CA, ca_file)}")
    assert str(refused.value).startswith(told)
    assert HUNTER not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (f"u:{HUNTER}@tcp(h:3306)/app?parseTime=true", "is for Go's driver: write mysql://"),
        (f"u:{HUNTER}@/app", "is not a URL: write mysql://"),
        (f"mysql://u:{HUNTER}@tcp(h:3306)/app", "is for Go's driver: write mysql://"),
        (f"u:{HUNTER}@unix(/run/mysqld.sock)/app", "is for Go's driver: write mysql://"),
        (f"jdbc:mysql://h:3306/app?user=u&password={HUNTER}", "is for JDBC: write mysql://"),
        (f"jdbc:mariadb://u:{HUNTER}@h:3306/app", "is for JDBC: write mysql://"),
        (f"mysql:host=h;dbname=app;password={HUNTER}", "is a list of words, as for PDO or .NET"),
        (f"Server=h;Database=app;Uid=u;Pwd={HUNTER}", "is a list of words, as for PDO or .NET"),
        (f'"mysql://u:{HUNTER}@h/app"', "is in quotes: leave them out"),
        (f"mysql://u:{HUNTER}@::1/app", "has an IPv6 address without brackets"),
        (f"mysql://u:{HUNTER}@fd00::1:3306/app", "has an IPv6 address without brackets"),
        (f"mysql://u:{HUNTER}@h1:3306,h2:3306/app", "names several hosts"),
        (f"mysql://u:{HUNTER}@h1,h2/app", "names several hosts"),
        (f"mysqlx://u:{HUNTER}@h:33060/app", "has the scheme `mysqlx`: use mysql://"),
    ],
)
def test_what_is_no_url_is_told_how_to_be_one(url: str, told: str) -> None:
    with pytest.raises(InvalidDatabaseUrl) as refused:
        target_of(url)
    assert str(refused.value).startswith(told)
    assert HUNTER not in str(refused.value)


def test_addresses_of_ip_6_have_brackets_in_a_url_and_for_people() -> None:
    target = target_of("mysql://u:p@[fd00::1]/app")
    assert (target.host, target.port) == ("fd00::1", 3306)
    assert target.where == "mysql [fd00::1]:3306/app"
    assert target_of("mysql://u:p@[fe80::1%25eth0]:3307/app").host == "fe80::1%eth0"
    pieces: dict[str, Any] = {"port": 3306, "name": "app", "username": "u", "password": ""}
    assert mysql_target(host="[fd00::1]", **pieces).host == "fd00::1"
    with pytest.raises(InvalidDatabaseUrl, match="has a port in its host"):
        mysql_target(host="db.example.com:3306", **pieces)


@pytest.mark.parametrize(
    "url",
    [
        "mysql+pymysql://u:p@/app?unix_socket=/cloudsql/a:b:c",
        "mysql://u:p@localhost/app?socket=/cloudsql/a:b:c",
        "mysql://u:p@%2Fcloudsql%2Fa%3Ab%3Ac/app",
    ],
)
def test_a_socket_is_named_by_its_path(url: str) -> None:
    target = target_of(url)
    assert target.socket == "/cloudsql/a:b:c"
    assert target.where == "mysql /cloudsql/a:b:c/app"
    assert target.tls is None


def test_a_host_that_is_a_path_is_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HOST": "/run/mysqld.sock", "NAME": "app", "USERNAME": "u"}.items():
        monkeypatch.setenv(f"DATABASE_{name}", value)
    settings, faults = load()
    assert not faults
    assert settings.locate().socket == "/run/mysqld.sock"


async def cipher(url: str) -> str:
    """What encrypts a connection of the engine. Raises DatabaseUnavailable, with advice."""
    engine = engine_of(lambda: target_of(url), size=1)
    try:
        with translate_engine_errors():
            async with engine.connect() as connection:
                found = await connection.execute(sa.text("SHOW STATUS LIKE 'Ssl_cipher'"))
                return str(found.one()[1])
    finally:
        await engine.dispose()


async def test_a_socket_leads_to_the_server(mysql_server: Managed) -> None:
    url = mysql_server.create_database("socket")
    path = mysql_server.folder / "s"
    if not path.exists():
        pytest.skip("the server is in a container")
    nowhere = url.replace(f":{mysql_server.port}/", ":1/")
    assert await cipher(f"{nowhere}?socket={path}") == ""
    (await connect(target_of(f"{nowhere}?socket={path}"), seconds=5)).close()


async def test_a_certificate_without_the_hosts_name_is_verified_by_its_ca_alone(
    mysql_server: Managed,
) -> None:
    url = mysql_server.create_database("tls").replace("127.0.0.1", "127.1")
    assert await cipher(f"{url}?tls=verify-ca&tls_ca={mysql_server.ca_file}")
    with pytest.raises(DatabaseUnavailable, match="certificate verify failed") as failed:
        await cipher(f"{url}?tls=verify-ca&tls_ca={mysql_server.wrong_ca_file}")
    assert "DATABASE_TLS_CA" in str(failed.value)
    with pytest.raises(DatabaseUnavailable, match=r"\?tls=verify-ca or DATABASE_TLS=verify-ca"):
        await cipher(f"{url}?tls=verify&tls_ca={mysql_server.ca_file}")


async def test_a_server_that_demands_tls_is_reached_by_the_setting_that_it_asks_for(
    mysql_server: Managed,
) -> None:
    url = mysql_server.create_database("tls")
    mysql_server.execute("SET GLOBAL require_secure_transport = ON")
    try:
        with pytest.raises(DatabaseUnavailable, match=r"\?tls=verify or DATABASE_TLS=verify"):
            await cipher(f"{url}?tls=disable")
        assert await cipher(f"{url}?tls=verify-ca&tls_ca={mysql_server.ca_file}")
        assert await cipher(f"{url}?tls=verify&tls_ca={mysql_server.ca_file}")
    finally:
        # Nobody but those with TLS gets in any more.
        await _as_admin(mysql_server, "SET GLOBAL require_secure_transport = OFF")


async def _as_admin(server: Managed, sql: str) -> None:
    context = ssl.create_default_context(cafile=server.ca_file)
    await query(url_of(server.admin, server.host, server.port), sql, tls=context)


async def test_the_certificate_that_mysql_makes_for_itself_is_enough(
    mysql_server: Managed, servers: Servers, tmp_path: Path
) -> None:
    if mysql_server.flavour != "mysql":
        return  # MariaDB makes none before 11.4
    server: Any = servers.having("mysql", "--ssl-ca=", "--ssl-cert=", "--ssl-key=")
    made = server.folder / "data" / "ca.pem"
    if not made.exists():
        pytest.skip("the server is in a container")
    shutil.copy(made, tmp_path / "ca.pem")
    url = server.create_database("tls")
    with pytest.raises(DatabaseUnavailable, match="verify-ca verifies the CA alone"):
        await cipher(f"{url}?ssl-mode=REQUIRED&ssl-ca={tmp_path}/ca.pem")
    assert await cipher(f"{url}?ssl-mode=VERIFY_CA&ssl-ca={tmp_path}/ca.pem")


async def test_a_server_without_tls_is_told_apart(mysql_server: Managed, servers: Servers) -> None:
    option = {"mysql": "--tls-version=", "mariadb": "--skip-ssl"}[mysql_server.flavour]
    server = servers.having(mysql_server.flavour, option)
    url = server.create_database("tls")
    assert await cipher(url) == ""
    with pytest.raises(
        DatabaseUnavailable, match=r"the server offers no TLS; .*DATABASE_TLS=disable"
    ):
        await cipher(f"{url}?sslmode=REQUIRED")
