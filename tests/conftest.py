"""What every test may ask for: servers that start when first used, and fresh databases."""

from __future__ import annotations

import os
from itertools import count
from typing import TYPE_CHECKING, Final

import pytest

from tools import servers as database_servers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tools.servers import Managed, Server

_databases = count(1)
_DATABASES: Final = ("database_url", "shared_url", "mysql_server")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test once for each database that is there; with none, say how to get one."""
    asked = set(_DATABASES) & set(metafunc.fixturenames)
    try:
        sources = database_servers.available() if asked else ()
    except database_servers.UnavailableError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None
    for name in asked & {"database_url", "shared_url"}:
        flavours = ["sqlite", *(source.flavour for source in sources)]
        metafunc.parametrize(
            name,
            flavours,
            indirect=True,
            scope="module" if name == "shared_url" else "function",
        )
    if "mysql_server" in asked:
        # An unmanaged server is somebody's: such tests are deselected below, and counted so.
        flavours = [source.flavour if source.managed else "unmanaged" for source in sources]
        metafunc.parametrize("mysql_server", flavours, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the server of TEST_DATABASE_URL does not let us do; pytest counts it."""

    def can_be_run(item: pytest.Item) -> bool:
        if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
            return True
        flavours = [item.callspec.params.get(name) for name in _DATABASES]
        if item.get_closest_marker("past_vitess") and flavours != [None, None, None]:
            gates = [one.flavour for one in database_servers.available() if one.is_vitess]
            return not set(gates) & set(flavours)
        return "unmanaged" not in flavours

    config.hook.pytest_deselected(items=[item for item in items if not can_be_run(item)])
    items[:] = filter(can_be_run, items)


class Servers:
    """The servers of this run by flavour, each started when it is first asked for."""

    def __init__(self) -> None:
        self._sources = {source.flavour: source for source in database_servers.available()}
        self._running: dict[tuple[str, ...], Server] = {}

    def __getitem__(self, flavour: str) -> Server:
        return self.having(flavour)

    def having(self, flavour: str, *options: str) -> Server:
        """Return the server of this flavour that was started with these options."""
        asked = (flavour, *options)
        if asked not in self._running:
            self._running[asked] = self._sources[flavour].launch(*options)
        return self._running[asked]

    def close(self) -> None:
        for server in self._running.values():
            server.close()


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    started = Servers()
    yield started
    started.close()


@pytest.fixture
def database_url(request: pytest.FixtureRequest, servers: Servers, tmp_path: Path) -> Iterator[str]:
    """Return the URL of a new, empty database: once on SQLite, once on each server."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/clerk-sync.db"
        return
    server = servers[request.param]
    name = f"clerk_sync_test_{os.getpid()}_{next(_databases)}"
    yield server.create_database(name)
    server.drop_database(name)


@pytest.fixture(scope="module")
def shared_url(
    request: pytest.FixtureRequest, servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Return the URL of a database that the tests of one module share, once on each flavour."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path_factory.mktemp('shared')}/clerk-sync.db"
        return
    server = servers[request.param]
    name = f"clerk_sync_shared_{os.getpid()}_{next(_databases)}"
    yield server.create_database(name)
    server.drop_database(name)


@pytest.fixture
def mysql_server(request: pytest.FixtureRequest, servers: Servers) -> Iterator[Managed]:
    """Return a server that the test may kill, stop or freeze: the next test finds it up again."""
    server = servers[request.param]
    assert isinstance(server, database_servers.Managed)
    yield server
    if server.running:
        server.thaw()
    else:
        server.start()
