"""The image under test: the one that `TEST_IMAGE` names, or one that is built here."""

from __future__ import annotations

import os
import shlex
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.image.engine import ROOT, Engine, FailedError
from tests.image.engine import engine as found_engine
from tests.image.stand_in import base, usable_base
from tools.servers import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

BUILT = "clerk-sync:test"
_TOLD = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def engine() -> Engine:
    try:
        return found_engine()
    except UnavailableError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None


@pytest.fixture(scope="session")
def built(engine: Engine, told: list[str]) -> Callable[..., str]:
    """Build by `make image`, as a user does; the name of what was built."""
    try:
        on = usable_base(engine)
        told.append(f"built on {on}")
    except UnavailableError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None

    def build(name: str, *options: str) -> str:
        options = (f"--build-arg=BASE={on}", *engine.build_options, *options)
        done = subprocess.run(
            [
                "make",
                "image",
                f"ENGINE={engine.name}",
                f"IMAGE={name}",
                f"ARGS={shlex.join(options)}",
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=1200,
        )
        if done.returncode:
            raise FailedError(done.stdout + done.stderr)
        return name

    return build


@pytest.fixture(scope="session")
def image(request: pytest.FixtureRequest, engine: Engine) -> str:
    if named := os.environ.get("TEST_IMAGE"):
        assert engine.has(named), f"TEST_IMAGE: {engine.name} has no {named}"
        return named
    name: str = request.getfixturevalue("built")(BUILT)
    return name


@pytest.fixture(scope="session")
def told(request: pytest.FixtureRequest) -> list[str]:
    """Return the lines that the run ends with: figures, for whoever wants to know."""
    return request.config.stash[_TOLD]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TOLD] = []


def pytest_report_header() -> str:
    return f"image: {os.environ.get('TEST_IMAGE') or f'built here, on {base()} or a stand-in'}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if told := terminalreporter.config.stash[_TOLD]:
        terminalreporter.section("image")
        for line in told:
            terminalreporter.line(line)
