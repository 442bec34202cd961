"""Programs for the tests: found if they are the right ones, and asked for in a sentence if not."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tools import programs
from tools.servers import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _forgetful() -> Iterator[None]:
    programs.find.cache_clear()
    yield
    programs.find.cache_clear()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "helm"
    path.write_text("#!/bin/sh\necho v4.9.9\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("name", programs.TOOLS)
def test_each_is_here(name: str) -> None:
    assert programs.need(name).is_file()


def test_a_variable_comes_first(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELM4", str(program))
    assert programs.need("helm4") == program


def test_the_path_comes_before_the_cache(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    assert programs.need("helm4") == program
    programs.find.cache_clear()
    assert programs.need("helm3") != program, "it is another version"


def test_a_wrong_one_that_was_named_is_refused(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELM3", str(program))
    with pytest.raises(UnavailableError, match=re.escape(f"{program} is not the helm3")):
        programs.need("helm3")


def test_a_missing_one_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UnavailableError, match=r"(?s)no node to test with.*Node 20.*NODE=/path"):
        programs.need("node")


def test_the_lock_names_no_place() -> None:
    """Packages come from wherever a reader's npm gets its own, and are known by their hashes."""
    lock = (programs.NPM / "package-lock.json").read_text("utf-8")
    assert '"resolved"' not in lock
    assert lock.count('"integrity": "sha512-') == lock.count('"node_modules/')
