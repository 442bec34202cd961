"""What `helm install` prints in the end: the URL, the events, and what to look out for."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from clerk_sync.clerk.catalog import ACTIONS
from clerk_sync.cli import cli
from tests.chart import rules
from tests.chart.helm import (
    CHART,
    FULLNAME,
    HELMS,
    LEAST,
    NAMESPACE,
    RELEASE,
    ROOT,
    VERSIONS,
    Scenario,
    helm,
    merged,
    render_scenario,
    scenarios,
    template,
)

INGRESS = {"ingress": {"enabled": True, "hosts": ["hooks.example.com"]}}
ROUTE = {
    "httpRoute": {
        "enabled": True,
        "hostnames": ["hooks.example.com"],
        "parentRefs": [{"name": "gateway"}],
    }
}
KEY = {"clerk": {"secretKey": {"existingSecret": "clerk"}}}


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the chart with its notes as an object.

    `helm template` prints no notes, and nothing else accepts a cluster's version.
    """
    chart = tmp_path_factory.mktemp("notes") / "clerk-sync"
    shutil.copytree(CHART, chart)
    (chart / "templates" / "NOTES.txt").rename(chart / "notes")
    (chart / "templates" / "notes.yaml").write_text(
        '{kind: Notes, text: {{ tpl (.Files.Get "notes") . | toJson }}}'
    )
    return chart


def notes(chart: Path, values: dict[str, Any], *options: str, by: str = "helm4") -> str:
    manifest = yaml.safe_load_all(template(values, *options, by=by, chart=chart))
    (text,) = [one["text"] for one in manifest if one and one["kind"] == "Notes"]
    return str(text)


def wanted_events() -> set[str]:
    """The types that the tables of `mirror` follow."""
    preset = ROOT / "service" / "clerk_sync" / "mapping" / "presets" / "mirror.yaml"
    kinds = yaml.safe_load(preset.read_text("utf-8"))["tables"].keys()
    return {type_ for type_, (kind, _) in ACTIONS.items() if kind in kinds}


@pytest.mark.parametrize("scenario", scenarios(), ids=str)
def test_they_read_well(scenario: Scenario, wrapped: Path) -> None:
    text = notes(wrapped, scenario.values, *scenario.options(VERSIONS[-1]))
    assert "<no value>" not in text
    assert "\n\n\n" not in text
    assert [line for line in text.splitlines() if len(line) > 110 or line != line.rstrip()] == []
    assert re.search(r"paste this URL:\n\n {5}https://\S+/\S+\n", text)
    for path in (
        ("database", "password"),
        ("database", "url"),
        ("clerk", "signingSecret", "value"),
    ):
        given: Any = scenario.values
        for key in path:
            given = (given or {}).get(key)
        assert not given or given not in text


@pytest.mark.parametrize("by", HELMS)
@pytest.mark.parametrize(
    ("given", "url"),
    [
        (INGRESS, "https://hooks.example.com/webhooks/clerk"),
        (ROUTE, "https://hooks.example.com/webhooks/clerk"),
        (merged(INGRESS, {"listen": {"path": "/in"}}), "https://hooks.example.com/in"),
        ({"service": {"type": "LoadBalancer"}}, "https://HOST/webhooks/clerk"),
        ({}, "https://HOST/webhooks/clerk"),
    ],
    ids=str,
)
def test_they_give_the_url_and_the_events(
    given: dict[str, Any], url: str, by: str, wrapped: Path
) -> None:
    text = notes(wrapped, merged(LEAST, given), by=by)
    shown = re.findall(r"^ {5}(https://\S+)$", text, re.MULTILINE)
    assert shown == [url]
    events = set(re.findall(r"\b[a-z]\w+\.(?:created|updated|deleted)\b", text, re.IGNORECASE))
    assert events == wanted_events()


WARNINGS: list[tuple[str, dict[str, Any]]] = [
    ("WARNING: missed webhooks are never found. Set Clerk's secret key", {}),
    (
        "WARNING: missed webhooks are never found. `reconcile.mode` is off",
        merged(KEY, {"reconcile": {"mode": "off"}}),
    ),
    (
        "WARNING: the values contain secrets",
        {"clerk": {"signingSecret": {"existingSecret": "", "value": "whsec_c2VjcmV0"}}},
    ),
    (
        "WARNING: the values contain secrets",
        {"database": {"existingSecret": "", "url": "mysql://u:p@db/app"}},
    ),
    ("WARNING: there is only one pod", {"replicas": 1}),
    (
        "WARNING: the Ingress does not serve HTTPS",
        merged(INGRESS, {"ingress": {"tls": {"enabled": False}}}),
    ),
    (
        "WARNING: `allowList` has no effect on the HTTPRoute",
        INGRESS | ROUTE | {"allowList": {"enabled": True, "ingressAnnotation": "a.example.com/b"}},
    ),
    (
        "WARNING: `monitor` was omitted",
        {"monitor": {"enabled": True, "renderMode": "skipIfMissing"}},
    ),
    ("WARNING: the alerts select series with job=", {"alerts": {"enabled": True}}),
    (
        "WARNING: `alerts` were omitted",
        {"alerts": {"enabled": True, "renderMode": "skipIfMissing"}},
    ),
    (
        "The network policies allow port 3306 of the database",
        {"networkPolicy": {"enabled": True}},
    ),
    ("A Job creates the tables", {"hooks": {"enabled": False}}),
    ("Secrets are environment variables", {"secretsAs": "env"}),
    (
        "Secrets are environment variables",
        {
            "mode": "sidecar",
            "sidecar": {"injection": {"enabled": True}},
            "secretsAs": "env",
            "database": {"existingSecret": "", "url": "mysql://u:p@db/app"},
            "clerk": {"signingSecret": {"existingSecret": "", "value": "whsec_c2VjcmV0"}},
        },
    ),
    ("MIGRATIONS ARE OFF", {"migrations": {"enabled": False}}),
    (
        "The network policies cover only the Jobs",
        {"mode": "sidecar", "networkPolicy": {"enabled": True}},
    ),
]


@pytest.mark.parametrize(("warning", "given"), WARNINGS, ids=[one for one, _ in WARNINGS])
def test_a_warning_is_printed_only_where_it_applies(
    warning: str, given: dict[str, Any], wrapped: Path
) -> None:
    quiet = notes(wrapped, merged(LEAST, KEY))
    assert "WARNING" not in quiet
    assert warning not in quiet
    assert warning in notes(wrapped, merged(LEAST, given), f"--kube-version={VERSIONS[-1]}")


def test_the_notes_mention_no_hooks(wrapped: Path) -> None:
    """The chart cannot see `--no-hooks`, which silently omits the migration."""
    assert "--no-hooks" in notes(wrapped, merged(LEAST, {}))
    assert "--no-hooks" not in notes(wrapped, merged(LEAST, {"hooks": {"enabled": False}}))
    assert "--no-hooks" not in notes(wrapped, merged(LEAST, {"migrations": {"enabled": False}}))
    assert "helm -n" not in notes(wrapped, merged(LEAST, {"hooks": {"enabled": False}})), (
        "there is no test pod"
    )


def test_every_warning_has_a_case() -> None:
    source = (CHART / "templates" / "NOTES.txt").read_text("utf-8")
    for line in re.findall(r"^(?:WARNING: |[A-Z]{3,} [A-Z]{3,}).*", source, re.MULTILINE):
        assert any(line.startswith(warning[:24]) for warning, _ in WARNINGS), line


@pytest.mark.parametrize("scenario", scenarios(), ids=str)
def test_their_commands_name_what_is_there(scenario: Scenario, wrapped: Path) -> None:
    text = notes(wrapped, scenario.values, *scenario.options(VERSIONS[-1]))
    objects = render_scenario(scenario, VERSIONS[-1])
    for what, name in re.findall(r"(deployment|service|secret)[/ ]([\w-]+)", text):
        if name != "YOUR-APP" and what != "secret":
            rules.the([one for one in objects if rules.name_of(one) == name], what.capitalize())
    for namespace in re.findall(r"kubectl -n (\S+)", text):
        assert namespace == scenario.values.get("namespaceOverride", NAMESPACE)
    assert set(re.findall(r"helm -n (\S+) test (\S+)", text)) <= {(NAMESPACE, RELEASE)}
    known = set(cli.commands)
    for command in re.findall(r"clerk-sync ([a-z]{4,})(?: |$|`)", text, re.MULTILINE):
        assert command in known, command


def test_helm_prints_them(wrapped: Path) -> None:
    path = CHART / "ci" / "default-values.yaml"
    arguments = f"--namespace={NAMESPACE}", "--dry-run=client", f"--values={path}"
    _, _, printed = helm("helm4", "install", RELEASE, CHART, *arguments).partition("NOTES:\n")
    assert printed.strip() == notes(wrapped, Scenario.read(path).values).strip()
    assert FULLNAME in printed
