"""What contributors are given beside the code does what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from clerk_sync import __version__
from clerk_sync.clerk.signature import signers
from clerk_sync.settings import Settings

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [one for one in SERVICES.values() if "clerk-sync" in one["image"]]


def test_the_hooks_are_the_tools_of_make_check() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    found = re.search(r"^check:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert found
    lines = [line.strip().replace("$(BIN)", ".venv/bin") for line in found[1].splitlines()]
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in repo["hooks"]] == lines


def test_compose_runs_this_version_by_settings_that_exist() -> None:
    known = {str(field.validation_alias) for field in Settings.model_fields.values()}
    assert len(OURS) == 2
    for service in OURS:
        assert service["image"] == f"ghcr.io/clerk-sync/clerk-sync:{__version__}"
        assert service["environment"].keys() <= known


def test_compose_has_a_secret_for_development() -> None:
    secret = re.search(r":-(whsec_\S+)}", OURS[0]["environment"]["CLERK_WEBHOOK_SIGNING_SECRET"])
    assert secret
    assert len(signers(secret[1])) == 1


def test_compose_publishes_nothing_beyond_this_machine() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_compose_starts_the_service_after_its_tables() -> None:
    assert SERVICES["migrate"]["command"] == ["migrate"]
    waits = {"clerk-sync": "service_completed_successfully", "migrate": "service_healthy"}
    for name, condition in waits.items():
        (waited,) = SERVICES[name]["depends_on"].values()
        assert waited == {"condition": condition}
