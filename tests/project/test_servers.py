"""The servers under the other tests do what those rely on: keep data, crash, speak TLS."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Any

import pytest
from asyncmy.errors import MySQLError

from tools import servers
from tools.servers import query

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tools.servers import Managed


def test_is_the_flavour_it_says(mysql_server: Managed) -> None:
    said = mysql_server.execute("SELECT VERSION()")[0][0]
    assert said.startswith(mysql_server.version)
    assert ("MariaDB" in said) == (mysql_server.flavour == "mariadb")


def test_is_as_durable_as_in_production(mysql_server: Managed) -> None:
    rows = mysql_server.execute("SELECT @@innodb_flush_log_at_trx_commit, @@sync_binlog")
    assert tuple(rows[0]) == (1, 1)


async def test_database_is_new_and_open_to_the_user(mysql_server: Managed) -> None:
    url = mysql_server.create_database("once")
    await query(url, "CREATE TABLE kept (id INT PRIMARY KEY)")
    assert mysql_server.create_database("once") == url
    assert not await query(url, "SHOW TABLES")


async def test_kill_and_start_keep_what_was_committed(mysql_server: Managed) -> None:
    url = mysql_server.create_database("crash")
    await query(url, "CREATE TABLE kept (id INT PRIMARY KEY)")
    await query(url, "INSERT INTO kept VALUES (7)")
    mysql_server.kill()
    with pytest.raises((OSError, MySQLError)):
        await query(url, "SELECT id FROM kept")
    mysql_server.start()
    assert [tuple(row) for row in await query(url, "SELECT id FROM kept")] == [(7,)]


async def test_stop_and_start(mysql_server: Managed) -> None:
    url = mysql_server.create_database("stopped")
    mysql_server.stop()
    assert not mysql_server.running
    mysql_server.start()
    assert await query(url, "SELECT 1")


async def test_frozen_server_answers_once_thawed(mysql_server: Managed) -> None:
    url = mysql_server.create_database("frozen")
    mysql_server.freeze()
    answer = asyncio.ensure_future(query(url, "SELECT 1"))
    done, _ = await asyncio.wait([answer], timeout=0.3)
    assert not done
    mysql_server.thaw()
    assert await answer


async def tls_cipher(server: Managed, ca_file: object) -> Sequence[tuple[Any, ...]]:
    context = ssl.create_default_context(cafile=str(ca_file))
    url = server.create_database("tls")
    return await query(url, "SHOW STATUS LIKE 'Ssl_cipher'", tls=context)


async def test_tls_is_verified_by_its_ca(mysql_server: Managed) -> None:
    rows = await tls_cipher(mysql_server, mysql_server.ca_file)
    assert rows[0][1]


async def test_tls_of_another_ca_is_refused(mysql_server: Managed) -> None:
    with pytest.raises((OSError, MySQLError), match="CERTIFICATE_VERIFY_FAILED"):
        await tls_cipher(mysql_server, mysql_server.wrong_ca_file)


async def test_database_url_works(database_url: str) -> None:
    if database_url.startswith("mysql:"):
        assert not await query(database_url, "SHOW TABLES")
    else:
        assert database_url.startswith("sqlite:///")


async def test_given_databases_are_emptied_and_taken_in_turn(
    mysql_server: Managed, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["given_a", "given_b"]
    for name in names:
        await query(mysql_server.create_database(name), "CREATE TABLE old (id INT)")
    url = servers.url_of(mysql_server.user, mysql_server.host, mysql_server.port, ",".join(names))
    monkeypatch.setenv("TEST_DATABASE_URL", url)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER_COUNT", raising=False)
    (source,) = servers.available.__wrapped__()
    given = source.launch()
    assert (source.flavour, given.managed) == (mysql_server.flavour, False)
    first, second = given.create_database("x"), given.create_database("y")
    assert [first, second] == [url.replace(",given_b", ""), url.replace("given_a,", "")]
    assert not await query(first, "SHOW TABLES")
    assert not await query(second, "SHOW TABLES")
    with pytest.raises(servers.UnavailableError, match="2 databases"):
        given.create_database("z")
    given.drop_database("y")
    assert given.create_database("z") == second
    assert given.create_database("x") == first


def test_a_version_that_is_asked_for_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_DATABASES", "mysql:8.4,mariadb")
    assert servers.wanted() == ("mysql", "mariadb")
    assert servers.image_of("mysql") == "mysql:8.4"
    assert servers.image_of("mariadb") == servers.IMAGES["mariadb"]
    found = servers.find("mysql")
    assert found is None or found.origin == "Docker mysql:8.4"
    monkeypatch.setenv("TEST_DATABASES", "postgres:17")
    with pytest.raises(servers.UnavailableError, match="'postgres' is none of mysql, mariadb"):
        servers.wanted()
