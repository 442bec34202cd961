"""The README of `k8s/`: its commands are run, its examples built, its names checked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import yaml

from clerk_sync.http import access
from tests.chart import rules
from tests.chart.helm import Object
from tests.k8s.examples import MARK, app
from tests.k8s.generate import K8S, sidecar, standalone
from tests.k8s.kustomize import README, VERSION, build, commands, example, write
from tools import programs

if TYPE_CHECKING:
    from pathlib import Path

# Each command is run here; or on a cluster, by `make test-cluster`; or has to have containers.
HERE = ("cp ", "grep ", "rm ", "openssl ", "kubectl kustomize ")
ON_A_CLUSTER = (
    "kubectl apply ",
    "kubectl create ",
    "kubectl delete ",
    "kubectl describe ",
    "kubectl diff ",
    "kubectl label ",
    "kubectl rollout ",
    "kubectl wait ",
)
IN_CONTAINERS = (
    "curl ",
    "kubectl exec ",
    "kubectl get --raw ",
    "kubectl logs ",
    "kubectl port-forward ",
)


def text() -> str:
    return README.read_text("utf-8")


def run(command: str, folder: Path, *, code: int = 0) -> str:
    """Run one of the README's commands, with the tests' kubectl, and return what it printed."""
    assert command in commands(), f"the README has no `{command}`"
    (folder / "bin").mkdir(exist_ok=True)
    kubectl = folder / "bin" / "kubectl"
    if not kubectl.exists():
        kubectl.symlink_to(programs.need("kubectl"))
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=folder,
        env={"PATH": f"{kubectl.parent}:{os.environ.get('PATH', os.defpath)}", "HOME": os.devnull},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    return done.stdout


def test_every_command_is_known() -> None:
    for command in commands():
        plain = re.sub(r"^kubectl -n [a-z-]+ ", "kubectl ", command)
        kinds = [plain.startswith(kind) for kind in (HERE, ON_A_CLUSTER, IN_CONTAINERS)]
        assert kinds.count(True) == 1, command


def test_folders_that_are_applied_can_be_built() -> None:
    applied = {found[1] for one in commands() if (found := re.search(r"-k (\S+)", one))}
    assert applied == {"k8s/overlays/development", ".", "my-clerk-sync"}  # the latter two: below
    assert build(K8S.parent / "k8s/overlays/development")


def test_the_app_gets_the_sidecar_by_what_the_readme_says(tmp_path: Path) -> None:
    look = "kubectl kustomize . | grep -A 3 initContainers"
    plain = app()
    del plain["spec"]["template"]["spec"]["initContainers"]
    kustomization = example("kustomization.yaml")
    for label, found in (MARK, True), ({}, False):
        plain["metadata"]["labels"] = label
        (tmp_path / "deployment.yaml").write_text(yaml.safe_dump(plain), "utf-8")
        write(tmp_path, kustomization)
        shown = run(look, tmp_path, code=0 if found else 1)
        assert ("- clerk-sync\n" in shown) == ("- serve\n" in shown) == found
    assert yaml.safe_load(_block_after("Give your Deployment")) == {"metadata": {"labels": MARK}}
    webhook, internal = _ports(rules.the(sidecar(), "Deployment"))
    assert f"http://localhost:{internal}/profiles" in text()
    assert webhook not in map(int, re.findall(r"localhost:(\d+)", text()))


def test_production_is_copied_and_changed_where_the_readme_says(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    run("cp -r k8s/overlays/production my-clerk-sync", tmp_path)
    shown = run("grep -rn CHANGE my-clerk-sync", tmp_path)
    copied = tmp_path / "my-clerk-sync"
    changed = {line.split(":")[0].rpartition("/")[2] for line in shown.splitlines()}
    assert changed == {file.name for file in copied.iterdir()}
    kustomization = yaml.safe_load((copied / "kustomization.yaml").read_text("utf-8"))
    for kind in ("resources", "components"):
        kustomization[kind] = [one.replace("../..", "../k8s") for one in kustomization[kind]]
    (copied / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), "utf-8")
    assert build(copied) == build(K8S / "overlays" / "production")
    named = {
        name
        for pod in rules.pods(build(copied))
        for one in _of_secrets(pod.spec["volumes"])
        for name in one
    }
    made = set(re.findall(r"create secret generic (\S+)", _section("Production")))
    assert made == named
    for name in ("database.env", "clerk.env"):
        (tmp_path / name).touch()
    run("rm database.env clerk.env", tmp_path)


def _of_secrets(volumes: list[Object]) -> list[list[str]]:
    return [
        [source["secret"]["name"] for source in volume["projected"]["sources"]]
        if "projected" in volume
        else [volume["secret"]["secretName"]]
        for volume in volumes
    ]


def test_a_mapping_is_added_as_the_readme_says(tmp_path: Path) -> None:
    (tmp_path / "deployment.yaml").write_text(yaml.safe_dump(app(**MARK)), "utf-8")
    shutil.copy(
        K8S.parent / "service/clerk_sync/mapping/presets/mirror.yaml", tmp_path / "mapping.yaml"
    )
    own, more = example("kustomization.yaml"), example("mapping")
    own["components"] += more.pop("components")
    built = build(write(tmp_path, own | more))
    (mapping,) = rules.of_kind(built, "ConfigMap")
    for pod in rules.pods(built):
        assert rules.name_of(mapping) in set(rules.strings(pod.spec)), pod.name


def test_parts_can_be_taken_from_a_repository(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(K8S, repository / "k8s")
    who = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.com")
    for command in (["init"], ["add", "."], [*who, "commit", "-m", "all"], ["tag", f"v{VERSION}"]):
        subprocess.run(["git", "-C", repository, *command], check=True, capture_output=True)
    (tmp_path / "deployment.yaml").write_text(yaml.safe_dump(app(**MARK)), "utf-8")
    published = yaml.safe_dump(example("kustomization.yaml"))
    fetched = published.replace("https://github.com/clerk-sync/clerk-sync", f"file://{repository}")
    (tmp_path / "kustomization.yaml").write_text(fetched, "utf-8")
    objects = build(tmp_path)
    assert len(objects) == 4
    (tmp_path / "here").mkdir()
    shutil.copy(tmp_path / "deployment.yaml", tmp_path / "here")
    assert objects == build(write(tmp_path / "here", example("kustomization.yaml")))


def test_the_secrets_keys_are_those_that_pods_mount() -> None:
    told = re.findall(r"^ *([a-z-]+)=", _section("Beside your app"), re.MULTILINE)
    mounted = [
        item["key"]
        for volume in rules.the(sidecar("reconcile"), "Deployment")["spec"]["template"]["spec"][
            "volumes"
        ]
        for source in (volume.get("projected") or {"sources": [volume]})["sources"]
        for item in source.get("secret", {"items": []})["items"]
    ]
    assert sorted(told) == sorted(mounted)


def test_the_app_s_token_is_one_and_in_the_secret_that_the_component_mounts(
    tmp_path: Path,
) -> None:
    section = _section("An app in other pods")
    make = next(command for command in commands() if command.startswith("openssl "))
    assert make in section
    run(make, tmp_path)
    assert len(access.tokens((tmp_path / "app-token").read_text("utf-8"))) == 1
    (volume,) = (
        one
        for one in rules.the(standalone("app-token"), "Deployment")["spec"]["template"]["spec"][
            "volumes"
        ]
        if one["name"] == "clerk-sync-app-token"
    )
    (item,) = volume["secret"]["items"]
    name = volume["secret"]["secretName"]
    assert f"create secret generic {name} --from-file={item['key']}" in section
    service = rules.the(standalone(), "Service", "-internal")
    (port,) = service["spec"]["ports"]
    assert f"http://{rules.name_of(service)}.clerk-sync:{port['port']}/profiles" in section


def test_every_component_is_in_the_table() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \|", text(), re.MULTILINE)
    assert sorted(rows) == sorted(one.name for one in (K8S / "components").iterdir())


def test_links_lead_somewhere_and_versions_are_this_one() -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text()):
        assert link.startswith("https://") or (K8S / link).exists(), link
    anchors = {re.sub(r"[^a-z -]", "", one.lower()).replace(" ", "-") for one in _headings()}
    assert set(re.findall(r"\]\(#([^)]*)\)", text())) <= anchors
    files = [README, *K8S.rglob("*.yaml")]
    versions = {
        one for file in files for one in re.findall(r"\?ref=v(\S+?)[`\s]", file.read_text())
    }
    assert versions == {VERSION}


def _headings() -> list[str]:
    return re.findall(r"^## (.*)$", text(), re.MULTILINE)


def _section(heading: str) -> str:
    return text().split(f"\n## {heading}\n")[1].split("\n## ")[0]


def _block_after(words: str) -> str:
    return text().split(words)[1].split("```yaml\n")[1].split("```")[0]


def _ports(pods: Object) -> list[int]:
    (container,) = pods["spec"]["template"]["spec"]["initContainers"]
    return [port["containerPort"] for port in container["ports"]]
