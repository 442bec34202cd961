"""The Dockerfile keeps to what can be told without building it; `make test-image` does the rest."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions, their words in one line, without comments."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line.strip()]
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n", " ", text).splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined)]


def said(name: str) -> list[str]:
    return [rest for one, rest in instructions() if one == name]


def test_base_is_one_patch_release_by_its_digest() -> None:
    base = said("ARG")[0]
    found = re.fullmatch(
        r"BASE=docker\.io/library/python:(3\.\d+)\.\d+-slim-[a-z]+@sha256:[0-9a-f]{64}", base
    )
    assert found, base
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=")
    assert [*map(int, found[1].split("."))] >= [*map(int, oldest.split("."))]


def test_every_stage_stands_on_it() -> None:
    froms = [one.split() for one in said("FROM")]
    stages = {words[2] for words in froms if len(words) == 3}
    assert {words[0] for words in froms} - stages == {"${BASE}"}
    assert froms[-1] == ["${BASE}"]


def test_it_is_run_by_nobody_and_straight() -> None:
    (user,) = said("USER")
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", user)
    assert json.loads(said("ENTRYPOINT")[0]) == ["clerk-sync"]
    assert json.loads(said("CMD")[0]) == ["serve"]
    names = [name for name, _ in instructions()]
    assert "COPY" not in names[names.index("USER") :]
    assert "RUN" not in names[names.index("USER") :]


def test_what_is_installed_is_in_the_lock_files() -> None:
    runs = " ".join(said("RUN"))
    installs = re.findall(r"(?:uv pip|-m pip) install [^;]*", runs)
    assert len(installs) == 3
    for install in installs:
        assert "--require-hashes" in install or "--no-index" in install
    assert "--require-build-hashes" in runs
    locked = (ROOT / "requirements-dev.lock").read_text()
    assert {"uv", "hatchling"} <= set(re.findall(r"^([a-z-]+)==", locked, re.MULTILINE))


def test_nothing_secret_is_asked_for() -> None:
    asked = [one for name in ("ARG", "ENV") for one in said(name)]
    assert not re.search(r"SECRET|TOKEN|PASSWORD|_KEY\b", " ".join(asked))
    assert not [one for one in said("RUN") if "--mount=type=secret" in one]


def test_the_context_is_a_list_of_what_may_be_in_it() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = [rule[1:] for rule in rules if rule.startswith("!")]
    copied = {
        source.rstrip("/")
        for one in said("COPY")
        if not one.startswith("--from")
        for source in one.split()[:-1]
    }
    assert {path.partition("/")[0] for path in let_in} == copied
    assert all((ROOT / path).exists() for path in let_in)
