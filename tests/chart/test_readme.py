"""The chart's README and the guides that it leads to, tried as their reader would.

Every command, every values file, every name, every link.
"""

from __future__ import annotations

import base64
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import click
import pytest
import yaml

from clerk_sync.cli import cli
from clerk_sync.database.url import target_of
from tests.chart import rules, values
from tests.chart.helm import (
    CHART,
    EXAMPLE,
    HELMS,
    LEAST,
    ROOT,
    Object,
    helm,
    merged,
)
from tools import programs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

README: Final = (CHART / "README.md").read_text("utf-8")
GUIDES: Final = {
    path: path.read_text("utf-8")
    for path in sorted((ROOT / "docs" / "how-to").glob("*.md"))
    if f"docs/how-to/{path.name})" in README
}
WRITTEN: Final = "\n".join(
    [re.sub(r"<!-- values -->.*<!-- /values -->", "", README, flags=re.DOTALL), *GUIDES.values()]
)
ABOUT: Final = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))
REGISTRY: Final = "oci://ghcr.io/clerk-sync/charts"


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, unindented."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", WRITTEN, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def files() -> list[str]:
    """The blocks that are values files of this chart."""
    return [
        text
        for text in blocks("yaml")
        if not text.startswith(("dependencies:", "clerk-sync:", "auth-eu:", "{{", "apiVersion:"))
    ]


def commands() -> list[list[str]]:
    """Every command of the blocks and of the texts, in words."""
    lines = re.split(r"\n| \| ", "\n".join(blocks("sh")).replace("\\\n", " "))
    flowing = re.sub(r"^ *```.*?^ *```$", "", WRITTEN, flags=re.DOTALL | re.MULTILINE)
    lines += [
        " ".join(text.split())
        for text in re.findall(r"`((?:kubectl|helm) [^`]+)`", flowing)
        if not text.startswith("helm-")
    ]
    return [shlex.split(line) for line in lines if line]


def of(program: str, *verbs: str) -> list[list[str]]:
    found = [words for words in commands() if words[0] == program and verb_of(words) in verbs]
    assert found, f"README has no `{program} {verbs[0]}`"
    return found


def verb_of(words: list[str]) -> str:
    """The first word that is neither the program nor an option with its value."""
    rest = iter(words[1:])
    options = {"-n"} if words[0] == "python3" else {"-n", "-c"}
    return next(word for word in rest if word not in options or not next(rest))


@cache
def all_kinds() -> dict[str, set[str]]:
    """Names of what there is after an install by the README, by kind."""
    found: dict[str, set[str]] = {"deployment": {"YOUR-APP", "shop"}, "secret": {"clerk-sync"}}
    for text in files():
        for one in installed(text):
            found.setdefault(one["kind"].lower(), set()).add(rules.name_of(one))
    return found


def installed(text: str) -> tuple[Object, ...]:
    """What the README's release makes of a values file, or of a part of one."""
    given = yaml.safe_load(text)
    options = ("--kube-version=1.37", "--name-template=clerk-sync")
    return _render(merged(LEAST, given), options)


def _render(given: dict[str, Any], options: tuple[str, ...]) -> tuple[Object, ...]:
    printed = helm("helm4", "template", CHART, "--values=-", *options, text=yaml.safe_dump(given))
    return tuple(one for one in yaml.safe_load_all(printed) if one)


def test_every_command_is_of_a_kind_that_is_tried_here() -> None:
    tried = {
        "helm": {
            *("install", "upgrade", "rollback", "history", "uninstall", "test"),
            *("dependency", "list", "template"),
        },
        "kubectl": {
            *("create", "patch", "exec", "logs", "get", "describe"),
            *("rollout", "scale", "delete", "apply"),
        },
        "rm": {"clerk-sync.env"},
        "curl": {"-H"},  # these three: below
        "python3": {"-c"},
        "cosign": {"verify"},
    }
    strange = [words for words in commands() if verb_of(words) not in tried.get(words[0], ())]
    assert strange == []


@pytest.mark.parametrize("text", files(), ids=lambda text: text.split("\n")[0])
def test_values_files_work(text: str) -> None:
    assert installed(text)


@pytest.mark.parametrize("text", files(), ids=lambda text: text.split("\n")[0])
def test_values_files_work_beside_those_of_the_install(text: str) -> None:
    """A reader adds a guide's values to a release that exists."""
    beside = merged(yaml.safe_load(files()[0]), yaml.safe_load(text))
    assert _render(beside, ("--kube-version=1.37", "--name-template=clerk-sync"))


def test_each_alias_has_values_that_work() -> None:
    (text,) = [text for text in blocks("yaml") if text.startswith("auth-eu:")]
    (parent,) = [text for text in blocks("yaml") if "alias: auth-eu" in text]
    given = yaml.safe_load(text)
    assert [*given] == [one["alias"] for one in yaml.safe_load(parent)["dependencies"]]
    for one in given.values():
        assert _render(one, ("--kube-version=1.37", "--name-template=clerk-sync"))


@pytest.mark.parametrize("by", HELMS)
def test_the_install_commands_work(by: str, tmp_path: Path) -> None:
    whole = [text for text in files() if "signingSecret" in text and "database:" in text]
    (tmp_path / "clerk-sync.yaml").write_text("tables: {user: {table: users, key: clerk_id}}\n")
    tried = 0
    for words in of("helm", "install", "upgrade", "template"):
        if f"{REGISTRY}/clerk-sync" not in words:
            continue
        assert words[words.index("--version") + 1] == ABOUT["version"]
        for text in whole:
            given = merged({}, yaml.safe_load(text))
            (tmp_path / "values.yaml").write_text(yaml.safe_dump(given))
            rest = [
                str(tmp_path / word) if word == "values.yaml" else word
                for word in words[2:]
                if word not in {"--version", ABOUT["version"], "--wait", "--install"}
                and not word.startswith(("--kube-version", "1.37"))
            ]
            rest = [
                word.replace("=clerk-sync.yaml", f"={tmp_path}/clerk-sync.yaml") for word in rest
            ]
            rest[rest.index(f"{REGISTRY}/clerk-sync")] = str(CHART)
            assert "kind: Service" in helm(by, "template", *rest, "--kube-version=1.37")
            tried += 1
    assert tried > 4


def kubectl(*words: str, folder: Path) -> Object:
    """What kubectl would send to a cluster, of which it has none."""
    done = subprocess.run(
        [programs.need("kubectl"), *words, "--dry-run=client", "--output=yaml"],
        cwd=folder,
        env={"KUBECONFIG": "/dev/null", "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    made: Object = yaml.safe_load(done.stdout)
    return made


def test_the_secret_has_the_keys_that_are_asked_for(tmp_path: Path) -> None:
    (env,) = {text for text in blocks("") if text.startswith("url=")}
    (tmp_path / "clerk-sync.env").write_text(env)
    created = {" ".join(words): words for words in of("kubectl", "create")}.values()
    made = [kubectl(*words[1:], folder=tmp_path) for words in created]
    namespace, secret, token = (one for one in made if one["kind"] in {"Namespace", "Secret"})
    assert rules.name_of(namespace) == secret["metadata"]["namespace"]
    first = files()[0]
    asked = [
        (source["secret"]["name"], item["key"])
        for pod in rules.pods(installed(first))
        for volume in pod.spec["volumes"]
        for source in volume["projected"]["sources"]
        for item in source["secret"]["items"]
    ]
    assert {name for name, _ in asked} == {rules.name_of(secret)}
    assert {key for _, key in asked} == secret["data"].keys()
    # The app's token has one of its own, and the app's request leads to the Service.
    (given,) = [yaml.safe_load(text)["appToken"] for text in files() if "appToken" in text]
    key = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))["appToken"]["key"]
    assert (rules.name_of(token), [*token["data"]]) == (given["existingSecret"], [key])
    assert token["metadata"]["namespace"] == rules.name_of(namespace)
    (curl,) = of("curl", "-H")
    service = rules.the(installed(first), "Service", "-internal")
    (port,) = service["spec"]["ports"]
    where = f"{rules.name_of(service)}.{rules.name_of(namespace)}:{port['port']}"
    assert curl[1:] == ["-H", "Authorization: Bearer $TOKEN", f"http://{where}/profiles"]


def test_the_patch_gives_pods_the_label_that_is_asked_for(tmp_path: Path) -> None:
    (injection,) = [text for text in files() if "injection:" in text]
    policy = rules.the(installed(injection), "MutatingAdmissionPolicy")
    wanted = policy["spec"]["matchConstraints"]["objectSelector"]["matchLabels"]
    words, back = of("kubectl", "patch")
    template = {"metadata": {"labels": {"app": "shop"}}, "spec": {"containers": []}}
    app = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "shop", "namespace": "shop"},
        "spec": {"selector": {"matchLabels": {"app": "shop"}}, "template": template},
    }
    (tmp_path / "app.yaml").write_text(yaml.safe_dump(app))
    patch = words[words.index("--patch") + 1]
    given = "--local", "--filename=app.yaml", f"--patch={patch}"
    patched = kubectl("patch", *given, folder=tmp_path)
    assert patched["spec"]["template"]["metadata"]["labels"] == {"app": "shop", **wanted}
    (tmp_path / "app.yaml").write_text(yaml.safe_dump(patched))
    given = "--local", "--filename=app.yaml", f"--patch={back[back.index('--patch') + 1]}"
    assert kubectl("patch", *given, folder=tmp_path)["spec"] == app["spec"]


def test_commands_name_what_is_there() -> None:
    there = all_kinds()
    for words in commands():
        if words[0] != "kubectl" or verb_of(words) == "create":
            continue
        for word in words:
            kind, slash, name = word.partition("/")
            if slash and kind in {"deployment", "job", "service"}:
                assert name in there[kind], words
        if verb_of(words) == "delete":
            named = words[-2:] == ["secret", "clerk-sync"]
            assert named or words[-2] == "-l", words
        if verb_of(words) == "describe":
            kind, *names = words[words.index("describe") + 1 :]
            assert kind in {"job", "job,pod", "pod", "replicaset", "externalsecret"}, words
            assert kind != "job" or names[0] == "-l" or {*names} <= there["job"], words
    for words in of("helm", "test", "uninstall"):
        assert words[-1] == "clerk-sync" or words[-2:] == ["clerk-sync", "--logs"]


def test_what_hooks_have_left_is_deleted_by_labels_that_nothing_else_has() -> None:
    (words,) = (words for words in of("kubectl", "delete") if "-l" in words)
    kinds = words[words.index("delete") + 1].split(",")
    deleted = re.fullmatch(
        r"clerk-sync\.dev/instance=clerk-sync,app\.kubernetes\.io/component in \((.*)\)",
        words[-1],
    )
    assert deleted
    written_down = {
        "database": {"url": "mysql://u:p@h/d"},
        "clerk": {"signingSecret": {"value": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"}},
        "config": {"mapping": "tables: {user: {table: users, key: clerk_id}}"},
        "networkPolicy": {"enabled": True},
    }
    objects = _render(written_down, ("--kube-version=1.37", "--name-template=clerk-sync"))
    hooks = 0
    for one in objects:
        metadata = one["metadata"]
        hook = "helm.sh/hook" in metadata.get("annotations", {})
        labels = metadata["labels"]
        component = labels.get("app.kubernetes.io/component")
        assert (component in deleted[1].split(",")) == hook, one
        if hook:
            hooks += 1
            assert labels["clerk-sync.dev/instance"] == "clerk-sync"
            plural = {"NetworkPolicy": "networkpolicies"}.get(
                one["kind"], f"{one['kind'].lower()}s"
            )
            assert plural in kinds
    assert hooks >= 5


def test_commands_inside_of_pods_are_those_of_the_service() -> None:
    inside = [words[words.index("--") + 1 :] for words in of("kubectl", "exec") if "--" in words]
    assert len(inside) > 3
    for program, *words in inside:
        assert program == "clerk-sync"
        command: click.Command = cli
        while words and isinstance(command, click.Group) and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        options = {option for one in command.params for option in one.opts} | {"--help"}
        assert set(words) <= options, words


@pytest.mark.parametrize("by", HELMS)
def test_the_example_installs_with_its_dependency(by: str, tmp_path: Path) -> None:
    chart = tmp_path / "clerk-sync"
    shutil.copytree(CHART, chart)
    shop = chart / EXAMPLE.relative_to(CHART)
    shutil.rmtree(shop / "charts", ignore_errors=True)
    (words,) = of("helm", "dependency")
    assert words == ["helm", "dependency", "update", "."]
    helm(by, "dependency", "update", shop)
    printed = helm(by, "template", "shop", shop)
    objects = [one for one in yaml.safe_load_all(printed) if one]
    (app,) = rules.of_kind(objects, "Deployment")
    assert app["spec"]["template"]["spec"]["initContainers"][0]["name"] == "clerk-sync"
    without = helm(by, "template", "shop", shop, "--set=clerk-sync.enabled=false")
    assert [one["kind"] for one in yaml.safe_load_all(without) if one] == ["Deployment"]
    assert "clerk-sync" not in without


def test_the_example_is_the_one_that_is_shown() -> None:
    dependencies = [text for text in blocks("yaml") if text.startswith("dependencies:")]
    every = [one for text in dependencies for one in yaml.safe_load(text)["dependencies"]]
    (shown,) = [one for one in every if "alias" not in one]
    assert all(one | shown == shown | {"alias": one["alias"]} for one in every if one is not shown)
    about = yaml.safe_load((EXAMPLE / "Chart.yaml").read_text("utf-8"))
    (real,) = about["dependencies"]
    assert shown["version"] == real["version"] == ABOUT["version"]
    assert shown == real | {"repository": REGISTRY}
    (given,) = [text for text in blocks("yaml") if text.startswith("clerk-sync:")]
    real_values = yaml.safe_load((EXAMPLE / "values.yaml").read_text("utf-8"))
    assert yaml.safe_load(given)["clerk-sync"] == real_values["clerk-sync"]
    (snippet,) = [text for text in blocks("yaml") if text.startswith("{{")]
    lines = {
        line.strip() for line in snippet.splitlines() if "{{" in line and "$sync :=" not in line
    }
    deployment = next(EXAMPLE.glob("templates/deployment.yaml")).read_text("utf-8")
    assert lines <= {line.strip() for line in deployment.splitlines()}


def test_values_that_are_named_exist() -> None:
    read = values.read((CHART / "values.yaml").read_text("utf-8"))
    known = {value.name: value for value in values.everything(read)}
    roots = {value.name for value in read}
    documents = [WRITTEN, (CHART / "templates" / "NOTES.txt").read_text("utf-8")]
    documents += [value.text for value in values.everything(read)]
    documents += [(CHART / "templates" / "guards.yaml").read_text("utf-8")]
    for name in names_in(documents, roots):
        whole = name.removesuffix(".*")
        above = [whole.rsplit(".", cut)[0] for cut in range(whole.count(".") + 1)]
        found = next((known[one] for one in above if one in known), None)
        assert found, name
        assert found.name == whole or not found.children, name


def names_in(texts: Iterable[str], roots: set[str]) -> Iterator[str]:
    for text in texts:
        for name in re.findall(r"`([a-z]\w+(?:\.[\w*]+)+)(?:: [^`]*)?`", text):
            if name.split(".")[0] in roots and "*" not in name and "%" not in name:
                yield name


def anchors(text: str) -> set[str]:
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_of_the_readme_lead_somewhere() -> None:
    """Charts are shown where there is no repository beside them: these links are whole."""
    home = ABOUT["home"]
    for link in re.findall(r"\]\(([^)\s]+)\)", README):
        target, _, anchor = link.partition("#")
        if target == home:
            text = (ROOT / "README.md").read_text("utf-8")
        elif found := re.fullmatch(rf"{re.escape(home)}/(?:blob|tree)/main/(.+)", target):
            assert (ROOT / found[1]).exists(), link
            text = (ROOT / found[1]).read_text("utf-8") if anchor else ""
        else:
            assert not target or target.startswith("https://"), (
                f"{link} is broken where charts are shown"
            )
            text = README
        assert anchor in anchors(text) | {"", "readme"}, link


def test_pods_that_end_stay_out_of_a_mesh_and_fill_files_once() -> None:
    """And no other pod does: the service's own is in the mesh, and its agent goes on."""
    on: dict[str, Any] = {
        "reconcile": {"mode": "cronJob"},
        "probe": {"enabled": True, "url": "https://hooks.example.com/webhooks/clerk"},
    }
    (mesh,) = [text for text in files() if "sidecar.istio.io/inject" in text]
    (vault,) = [text for text in files() if "vault.hashicorp.com" in text]
    key = {"clerk": {"secretKey": {"existingSecret": "clerk"}}}
    for text, more in ((mesh, key), (vault, {})):
        given = merged(merged(LEAST, yaml.safe_load(text)), merged(on, more))
        pods = list(rules.pods(_render(given, ("--kube-version=1.37",))))
        assert len(pods) == 5
        for pod in pods:
            ends = pod.labels["app.kubernetes.io/component"] != "webhook"
            annotations = pod.metadata.get("annotations", {})
            if text == mesh:
                assert (pod.labels.get("sidecar.istio.io/inject") == "false") == ends
            else:
                once = annotations.get("vault.hashicorp.com/agent-pre-populate-only")
                assert (once == "true") == ends
                assert annotations["vault.hashicorp.com/agent-inject"] == "true"
                assert pod.spec["automountServiceAccountToken"]
                files_of = {
                    f"/vault/secrets/{name.rpartition('inject-secret-')[2]}"
                    for name in annotations
                    if "inject-secret-" in name
                }
                (container,) = pod.containers
                read = {one["value"] for one in container["env"] if one["name"].endswith("_FILE")}
                assert read <= files_of


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_links_of_a_guide_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", GUIDES[page]):
        target, _, anchor = link.partition("#")
        to = (page.parent / target).resolve() if target else page
        assert to.exists(), link
        assert not anchor or anchor in anchors(to.read_text("utf-8")), link


def test_the_readme_is_one_screen_and_leads_to_the_guides() -> None:
    before, _, _ = README.partition("<!-- values -->")
    assert len(before.splitlines()) <= 70
    assert len(GUIDES) >= 9


def test_a_password_is_encoded_as_the_service_decodes_it() -> None:
    (words,) = of("python3", "-c")
    typed = "p@ss/w:o%rd #?&+ \u00e9"
    done = subprocess.run(
        [sys.executable, *words[1:]],
        input=f"{typed}\n",
        capture_output=True,
        text=True,
        check=True,
        start_new_session=True,  # without a terminal it reads what is piped
    )
    encoded = done.stdout.split()[-1]
    found = target_of(f"mysql://user:{encoded}@mysql.example.com:3306/app")
    assert (found.username, found.password, found.host) == ("user", typed, "mysql.example.com")


def test_quotes_in_the_file_would_be_part_of_the_secret(tmp_path: Path) -> None:
    """As kubectl takes each line as it is."""
    (tmp_path / "clerk-sync.env").write_text("url='mysql://u:p@h/d'\n")
    secret = of("kubectl", "create")[1]
    data = kubectl(*secret[1:], folder=tmp_path)["data"]
    assert base64.b64decode(data["url"]) == b"'mysql://u:p@h/d'"


def test_the_chart_is_signed_by_the_workflow_that_is_named() -> None:
    (words,) = of("cosign", "verify")
    assert words[2] == f"{REGISTRY.removeprefix('oci://')}/clerk-sync:{ABOUT['version']}"
    identity = words[words.index("--certificate-identity") + 1]
    workflow, _, ref = identity.removeprefix(f"{ABOUT['home']}/").partition("@")
    assert ref == f"refs/tags/v{ABOUT['version']}"
    text = (ROOT / workflow).read_text("utf-8")
    assert 'cosign sign --yes "$CHARTS/clerk-sync@$DIGEST"' in text
    assert words[words.index("--certificate-oidc-issuer") + 1] in text


def test_the_policy_for_an_apps_pods_lets_through_what_a_sidecar_needs() -> None:
    (policy,) = [yaml.safe_load(text) for text in blocks("yaml") if "kind: NetworkPolicy" in text]
    (injection,) = [text for text in files() if "injection:" in text]
    objects = installed(injection)
    selector = rules.the(objects, "MutatingAdmissionPolicy")["spec"]["matchConstraints"]
    assert policy["spec"]["podSelector"] == selector["objectSelector"]
    services = rules.of_kind(objects, "Service")
    targets = {port["targetPort"] for one in services for port in one["spec"]["ports"]}
    came = {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
    assert came == targets
    (out,) = policy["spec"]["egress"]
    assert {port["port"] for port in out["ports"]} == {53, 3306, 443}
    peers = [one for one in policy["spec"]["ingress"][0]["from"] if "podSelector" in one]
    (test,) = [pod for pod in rules.pods(objects) if pod.owner["kind"] == "Pod"]
    assert [rules.matches(one["podSelector"]["matchLabels"], test.labels) for one in peers] == [
        True
    ]
