"""The chart and the service agree: what pods are given is what the service takes."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import click
import pytest
import yaml
from annotated_types import Ge, Gt, Le

from clerk_sync import settings
from clerk_sync.clerk.catalog import ACTIONS
from clerk_sync.cli import cli
from clerk_sync.http import access
from clerk_sync.http.access import InvalidToken
from clerk_sync.mapping import loader
from clerk_sync.settings import Secret, Settings
from tests.chart import rules, values
from tests.chart.helm import (
    CHART,
    HELMS,
    LEAST,
    ROOT,
    VERSIONS,
    HelmError,
    Scenario,
    merged,
    nested,
    render,
    render_scenario,
    scenarios,
)
from tests.deliveries import SECRET, served
from tools.servers import write_certificates

if TYPE_CHECKING:
    from pathlib import Path

FIELDS: Final = {str(field.validation_alias): field for field in Settings.model_fields.values()}

# What is in the files and Secrets, by variable.
HIDDEN: Final = {
    "DATABASE_URL": "mysql://user:password@mysql.example.com/app",
    "DATABASE_HOST": "mysql.example.com",
    "DATABASE_PORT": "3306",
    "DATABASE_NAME": "app",
    "DATABASE_USERNAME": "user",
    "DATABASE_PASSWORD": "password",
    "CLERK_WEBHOOK_SIGNING_SECRET": SECRET,
    "CLERK_SECRET_KEY": "sk_test_secret",
    "CLERK_SYNC_APP_TOKEN": "6a09e667f3bcc908b2fb1366ea957d3e",
}

# Which value of the chart stands for which setting of the service.
STANDS_FOR: Final = {
    "limits.writers": "CLERK_SYNC_WRITERS",
    "limits.poolSize": "CLERK_SYNC_POOL_SIZE",
    "limits.batch": "CLERK_SYNC_BATCH_LIMIT",
    "limits.queue": "CLERK_SYNC_QUEUE_LIMIT",
    "limits.deadlineSeconds": "CLERK_SYNC_DEADLINE_SECONDS",
    "limits.ledgerDays": "CLERK_SYNC_LEDGER_DAYS",
    "limits.quarantineDays": "CLERK_SYNC_QUARANTINE_DAYS",
    "listen.host": "CLERK_SYNC_HOST",
    "listen.path": "CLERK_SYNC_WEBHOOK_PATH",
    "listen.webhookPort": "CLERK_SYNC_PORT",
    "listen.internalPort": "CLERK_SYNC_INTERNAL_PORT",
    "reconcile.clerkShare": "CLERK_SYNC_CLERK_SHARE",
    "reconcile.breakerPercent": "CLERK_SYNC_BREAKER_PERCENT",
    "config.preset": "CLERK_SYNC_CONFIG",
    "clerk.apiUrl": "CLERK_API_URL",
    "log.level": "LOG_LEVEL",
}


@dataclass(frozen=True)
class Container:
    """One of clerk-sync's containers in a scenario."""

    scenario: Scenario
    pod: rules.Pod
    spec: dict[str, Any]

    def environment(self, folder: Path) -> dict[str, str]:
        """Return its variables, with files and Secrets as they might be."""
        found = {}
        for one in self.spec["env"]:
            name = one["name"]
            hidden = HIDDEN.get(name.removesuffix("_FILE"))
            if name.endswith("_FILE") and hidden:
                (folder / name).write_text(hidden, "utf-8")
                found[name] = str(folder / name)
            elif "secretKeyRef" in one.get("valueFrom", {}) and hidden:
                found[name] = hidden
            elif "value" in one:
                found[name] = one["value"]
        if "DATABASE_TLS_CA" in found:
            write_certificates(folder)
            found["DATABASE_TLS_CA"] = str(folder / "ca.pem")
        return found


def containers(scenario: Scenario) -> list[Container]:
    found = [
        Container(scenario, pod, one)
        for pod in rules.pods(render_scenario(scenario, VERSIONS[-1]))
        for one in pod.containers
        if one.get("command", [""])[0] == "clerk-sync"
    ]
    assert found
    return found


@pytest.mark.parametrize("scenario", scenarios(), ids=str)
def test_the_service_takes_its_settings(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = set(scenario.values.get("extraEnv") or {})
    for container in containers(scenario):
        environment = container.environment(tmp_path)
        with monkeypatch.context() as patched:
            for name in set(os.environ) & (FIELDS.keys() | {f"{one}_FILE" for one in FIELDS}):
                patched.delenv(name)
            for name, value in environment.items():
                patched.setenv(name, value)
            loaded, faults = settings.load()
            assert faults == []
            needs = container.spec["command"][1]
            doubts = loaded.warnings(
                {key: value for key, value in environment.items() if key not in extra}
            )
            if needs in {"trigger", "probe"}:
                assert loaded.signing_secret
                continue
            assert doubts == []
            assert loaded.locate()
            assert bool(loaded.signing_secret) == (needs == "serve")
            if needs == "reconcile":
                assert loaded.clerk_key


@pytest.mark.parametrize("scenario", scenarios(), ids=str)
def test_the_service_has_the_commands(scenario: Scenario) -> None:
    for container in containers(scenario):
        _, name, *arguments = container.spec["command"]
        command = cli.commands[name]
        with click.Context(command) as context:
            command.parse_args(context, list(arguments))


def test_each_container_gets_what_it_needs_and_no_more() -> None:
    given = LEAST | {
        "clerk": LEAST["clerk"] | {"secretKey": {"existingSecret": "clerk"}},
        "appToken": {"existingSecret": "app"},
    }
    objects = render(given | {"reconcile": {"mode": "cronJob"}})
    secrets = {
        one["command"][1] if one["command"][0] == "clerk-sync" else one["name"]: {
            variable["name"].removesuffix("_FILE")
            for variable in one["env"]
            if variable["name"].removesuffix("_FILE") in HIDDEN
        }
        for pod in rules.pods(objects)
        for one in pod.containers
    }
    assert secrets == {
        "serve": {
            *("DATABASE_URL", "CLERK_WEBHOOK_SIGNING_SECRET", "CLERK_SECRET_KEY"),
            "CLERK_SYNC_APP_TOKEN",
        },
        "migrate": {"DATABASE_URL"},
        "reconcile": {"DATABASE_URL", "CLERK_SECRET_KEY"},
        "test": {"CLERK_WEBHOOK_SIGNING_SECRET"},
    }


@pytest.mark.parametrize("mode", ["standalone", "sidecar"])
@pytest.mark.parametrize("given", ["value", "externalSecret"])
def test_the_app_s_token_is_in_a_secret_of_its_own(mode: str, given: str) -> None:
    """The app reads it, and shall not be able to read the signing secret with it."""
    token = {"value": HIDDEN["CLERK_SYNC_APP_TOKEN"], "externalSecret": {"key": "shop"}}[given]
    values = {
        "mode": mode,
        **({"sidecar": {"injection": {"enabled": True}}} if mode == "sidecar" else {}),
        "clerk": {"signingSecret": {"value": SECRET}},
        "database": {"url": HIDDEN["DATABASE_URL"]},
        "appToken": {given: token},
        "externalSecrets": {"store": {"name": "vault"}},
    }
    objects = render(values, "--kube-version=1.37")
    kind = "Secret" if given == "value" else "ExternalSecret"
    own = rules.the(objects, kind, "-app-token")
    if given == "value":
        assert own["data"].keys() == {"app-token"}
    else:
        assert [one["secretKey"] for one in own["spec"]["data"]] == ["app-token"]
        assert own["spec"]["target"]["name"] == rules.name_of(own)
    for other in rules.of_kind(objects, "Secret", "ExternalSecret"):
        if other is not own:
            assert "app-token" not in str(other)
    # And the container has it.
    assert rules.name_of(own) in str([one for one in objects if one is not own])


@pytest.mark.parametrize(
    "text", ["a" * 15, "6a09e667f3bcc908 short", " ", "\u00e9" * 32, "x" * 513]
)
def test_a_token_that_the_service_refuses_is_refused_by_the_chart(text: str) -> None:
    with pytest.raises(InvalidToken):
        access.tokens(text)
    with pytest.raises(HelmError, match=r"`appToken\.value` must be a token"):
        render(LEAST | {"appToken": {"value": text}})


@pytest.mark.parametrize("text", ["a" * 16, "~" * 512, "6a09e667f3bcc908, 6a09e667f3bcc909\n"])
def test_a_token_that_the_service_takes_is_taken_by_the_chart(text: str) -> None:
    assert access.tokens(text)
    assert render(LEAST | {"appToken": {"value": text}})


def test_mappings_of_scenarios_are_mappings() -> None:
    found = 0
    for scenario in scenarios():
        for one in rules.of_kind(render_scenario(scenario, VERSIONS[-1]), "ConfigMap"):
            if "mapping.yaml" in one["data"]:
                assert loader.read(one["data"]["mapping.yaml"], source=str(scenario))
                found += 1
    assert found >= 2


@pytest.mark.parametrize(
    "text",
    [
        "  # indented by whoever wrote it\ntables:\n  user: {}\n",
        "\n\n   \ntables: {user: {}}\n\n",
        "tables: {user: {}}\r\n# of Windows\r\n",
        "tables: {user: {}}\r---\rapiVersion: v1\rkind: Secret\rmetadata: {name: theirs}\r",
        "tables: {user: {}} #\x85kind: Secret\n",
        "tables: {user: {}} #\u2028---\u2028kind: Secret\n",
    ],
    ids=["indented", "blank", "windows", "document", "next-line", "separator"],
)
@pytest.mark.parametrize("by", HELMS)
def test_a_mapping_s_text_stays_in_its_config_map(text: str, by: str) -> None:
    """Whoever writes the mapping may be somebody else than who installs."""
    plain = render(LEAST | {"config": {"mapping": "tables: {user: {}}"}}, by=by)
    objects = render(LEAST | {"config": {"mapping": text}}, by=by)
    assert [one["kind"] for one in objects] == [one["kind"] for one in plain]
    held = [one["data"] for one in rules.of_kind(objects, "ConfigMap")]
    assert held == [{"mapping.yaml": text}] * 2


@pytest.mark.parametrize("name", STANDS_FOR)
def test_bounds_and_defaults_are_those_of_the_service(name: str) -> None:
    read = values.read((CHART / "values.yaml").read_text("utf-8"))
    value = next(one for one in values.everything(read) if one.name == name)
    field = FIELDS[STANDS_FOR[name]]
    wanted = {
        keyword: getattr(one, attribute)
        for one in field.metadata
        for kind, attribute, keyword in (
            (Ge, "ge", "minimum"),
            (Gt, "gt", "exclusiveMinimum"),
            (Le, "le", "maximum"),
        )
        if isinstance(one, kind)
    }
    if name.startswith("listen."):
        wanted = {"minimum": 1, "maximum": 65535} if wanted else {}  # 0 is for tests: any port
    keywords = {"minimum", "maximum", "exclusiveMinimum"}
    assert {key: value.schema[key] for key in keywords & value.schema.keys()} == wanted
    if field.default is not None:
        shown = (value.shown or str(value.default)).strip("`")
        default = re.escape(str(field.default))
        assert re.match(rf"`?{default}\b|{default}$", shown)


@pytest.mark.parametrize("name", STANDS_FOR)
def test_a_value_gets_to_the_setting(name: str) -> None:
    read = values.read((CHART / "values.yaml").read_text("utf-8"))
    value = next(one for one in values.everything(read) if one.name == name)
    given: Any = next(
        (one for one in value.schema.get("enum", ()) if one and one != value.default),
        {
            "listen.host": "::",
            "listen.path": "/in",
            "clerk.apiUrl": "https://clerk.example.com",
        }.get(name, value.schema.get("maximum", 7)),
    )
    key = {"clerk": {"secretKey": {"existingSecret": "clerk"}}}
    objects = render(merged(merged(LEAST, key), nested(value.path, given)))
    deployment = rules.the(objects, "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    env = {one["name"]: one.get("value") for one in container["env"]}
    assert env[STANDS_FOR[name]] == str(given)


def test_no_variable_can_be_set_behind_the_charts_back() -> None:
    """The guard of `extraEnv` knows every setting."""
    source = (CHART / "templates" / "guards.yaml").read_text("utf-8")
    (known,) = re.findall(r"\$settings := list ([^}]*?) -?}}", source)
    assert set(re.findall(r'"(\w+)"', known)) == FIELDS.keys()


def test_secrets_of_the_service_can_come_by_file() -> None:
    """Every variable for which the chart writes `_FILE` has one."""
    for scenario in scenarios():
        for container in containers(scenario):
            for one in container.spec["env"]:
                name = one["name"].removesuffix("_FILE")
                if name != one["name"] and name in FIELDS:
                    assert FIELDS[name].annotation == Secret | None


def test_events_to_tick_are_those_that_have_an_effect() -> None:
    wanted: dict[str, set[str]] = {}
    for type_, (kind, _) in ACTIONS.items():
        wanted.setdefault(kind, set()).add(type_.removeprefix(f"{kind}."))
    said = yaml.safe_load((CHART / "files" / "events.yaml").read_text("utf-8"))
    assert {kind: set(actions) for kind, actions in said.items()} == wanted


def test_paths_of_probes_and_monitors_are_there() -> None:
    source = (ROOT / "service" / "clerk_sync" / "http" / "internal.py").read_text("utf-8")
    routes = set(re.findall(r'web\.get\("(/[^"]+)"', source))
    objects = render(LEAST | {"monitor": {"enabled": True}})
    (container,) = rules.the(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    probes = {
        container[f"{kind}Probe"]["httpGet"]["path"]
        for kind in ("startup", "liveness", "readiness")
    }
    monitored = {one["path"] for one in rules.the(objects, "ServiceMonitor")["spec"]["endpoints"]}
    assert probes == {"/livez", "/readyz"}
    assert probes | monitored <= routes


async def test_helm_test_tells_a_service_that_works(tmp_path: Path) -> None:
    async with served(f"sqlite:///{tmp_path}/clerk-sync.db") as at:
        code, printed = await helm_test(tmp_path, f"{at.url}/webhooks/clerk", SECRET)
    assert code == 0, printed
    assert re.fullmatch(r"unsigned event: 401\nemail\.created .*: 200 .*\n", printed)


async def test_helm_test_tells_one_with_another_secret(tmp_path: Path) -> None:
    async with served(f"sqlite:///{tmp_path}/clerk-sync.db") as at:
        wrong = "whsec_" + "d3Jvbmcgd3Jvbmcgd3Jvbmcgd3Jvbmc="
        code, printed = await helm_test(tmp_path, f"{at.url}/webhooks/clerk", wrong)
    assert code == 1
    assert re.match(r"unsigned event: 401\n.*401.*wrong", printed)


async def test_helm_test_tells_one_that_is_not_there(tmp_path: Path) -> None:
    code, printed = await helm_test(tmp_path, "http://127.0.0.1:9/webhooks/clerk", SECRET)
    assert (code, "are there pods behind the Service" in printed) == (1, True)


async def helm_test(folder: Path, url: str, secret: str) -> tuple[int, str]:
    """Run the container of the test pod, here; its exit code, and what Helm would show."""
    spec = rules.the(render(LEAST), "Pod", "-test")["spec"]
    (folder / "secret").write_text(secret, "utf-8")
    # Helm names no container when it asks for the log, which only a pod of one answers.
    assert "initContainers" not in spec
    (container,) = spec["containers"]
    program, *arguments = container["command"]
    assert program == "python"
    arguments = [url if one.startswith("http://events-") else one for one in arguments]
    assert url in arguments
    environment = {
        one["name"]: str(folder / "secret") if one["name"].endswith("_FILE") else one["value"]
        for one in container["env"]
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *arguments),
        env=environment,
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    printed, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, printed.decode()
