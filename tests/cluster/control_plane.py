"""A Kubernetes API server for the chart's tests: `make cluster`.

etcd, kube-apiserver and kube-controller-manager, built once from their Go modules in the versions
of `kubernetes/go.mod`, on free ports of the loopback. There are no nodes: every object is admitted,
defaulted, validated and reconciled for real, and no container runs. All files are in one folder
that only its owner can read, and everything is gone when this ends, however that was.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, Self
from urllib.request import Request, urlopen

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tools.servers import CACHE, LOOPBACK, free_port, write_certificates

MODULE: Final = Path(__file__).parent / "kubernetes"
START_SECONDS: Final = 120
STOP_SECONDS: Final = 20


class ClusterError(Exception):
    """There is no control plane. Says why, and what to do."""


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.umask(0o077)
    try:
        programs = provide()
        with ControlPlane(programs) as cluster:
            print(_instructions(cluster.kubeconfig), flush=True)
            while True:
                cluster.check()
                time.sleep(1)
    except ClusterError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


def version() -> str:
    """Return the version of Kubernetes that `kubernetes/go.mod` requires, as `v1.37.2`."""
    text = MODULE.joinpath("go.mod").read_text()
    return str(re.findall(r"^\s*k8s\.io/kubernetes (v[\d.]+)", text, re.MULTILINE)[0])


def provide() -> Path:
    """Return the folder with the three programs; build them where they are missing."""
    folder = CACHE / f"kubernetes-{version()}"
    if folder.exists():
        return folder
    if not shutil.which("go"):
        raise ClusterError(
            "Kubernetes is built with Go, and there is none on the PATH. Install Go, or use any "
            "other cluster: `kind create cluster`."
        )
    print(f"Building Kubernetes {version()} into {folder}, once: 10 to 20 minutes.", flush=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=CACHE))
    command = ["go", "build", "-trimpath", f"-ldflags={_ldflags()}", f"-o={partial}/", "tool"]
    pinned = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly", "GOWORK": "off"}
    try:
        if subprocess.run(command, cwd=MODULE, env=pinned, check=False).returncode:
            raise ClusterError("Kubernetes could not be built: see what Go says above.")
        partial.joinpath("server").rename(partial / "etcd")  # Go names it by the end of its path
        partial.rename(folder)  # under its final name only when complete
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _ldflags() -> str:
    """Tell the programs their version, as Kubernetes' own build does: charts ask for it."""
    major, minor, _ = version()[1:].split(".")
    facts = {
        "gitVersion": version(),
        "gitMajor": major,
        "gitMinor": minor,
        "gitTreeState": "clean",
    }
    package = "k8s.io/component-base/version"
    return " ".join(["-s -w", *(f"-X {package}.{name}={fact}" for name, fact in facts.items())])


class ControlPlane:
    """The three programs, running, with their files in `folder`."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="clerk-sync-cluster-"))
        self.kubeconfig = self.folder / "kubeconfig"
        self._token = secrets.token_urlsafe(32)
        self._etcd, self._peer, self._api = (f"https://{LOOPBACK}:{free_port()}" for _ in range(3))
        # Its input ends when this process does, however that was: then all the rest goes as well.
        farewell = (
            f"while read -r pid; do all=\"$all $pid\"; done; kill -9 $all; rm -rf '{self.folder}'"
        )
        self._guard = subprocess.Popen(
            ["sh", "-c", farewell],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop in reverse order, so that nobody misses what is already gone."""
        for process in reversed(self._processes.values()):
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        with self._guard:
            self._guard.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def check(self) -> None:
        """Raise with the end of its log when a program has stopped."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise ClusterError(f"{name} has stopped. The end of its log:\n{self._log(name)}")

    def _start(self) -> None:
        write_certificates(self.folder)
        self._write_service_account_key()
        manager = secrets.token_urlsafe(32)
        tokens = (
            f'{self._token},admin,1,"system:masters"\n{manager},system:kube-controller-manager,2\n'
        )
        self.folder.joinpath("tokens").write_text(tokens)
        self._write_kubeconfig("kubeconfig", self._token)
        self._write_kubeconfig("manager", manager)
        self._run(
            "etcd",
            "--data-dir=etcd",
            "--unsafe-no-fsync",  # it lives no longer than this process
            f"--listen-client-urls={self._etcd}",
            f"--advertise-client-urls={self._etcd}",
            f"--listen-peer-urls={self._peer}",
            f"--initial-advertise-peer-urls={self._peer}",
            f"--initial-cluster=default={self._peer}",
            "--client-cert-auth",
            "--trusted-ca-file=ca.pem",
            "--cert-file=server.pem",
            "--key-file=server.key",
            "--peer-client-cert-auth",
            "--peer-trusted-ca-file=ca.pem",
            "--peer-cert-file=server.pem",
            "--peer-key-file=server.key",
        )
        self._run(
            "kube-apiserver",
            f"--bind-address={LOOPBACK}",
            f"--secure-port={self._api.rpartition(':')[2]}",
            "--endpoint-reconciler-type=none",  # a loopback address is no endpoint for pods
            "--tls-cert-file=server.pem",
            "--tls-private-key-file=server.key",
            f"--etcd-servers={self._etcd}",
            "--etcd-cafile=ca.pem",
            "--etcd-certfile=server.pem",
            "--etcd-keyfile=server.key",
            "--anonymous-auth=false",
            "--token-auth-file=tokens",
            "--authorization-mode=RBAC",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-account-signing-key-file=service-account.key",
            "--service-account-key-file=service-account.key",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--profiling=false",
        )
        self._wait_for("/readyz")
        self._run(
            "kube-controller-manager",
            "--kubeconfig=manager",
            "--secure-port=0",
            "--leader-elect=false",
            "--use-service-account-credentials",
            "--service-account-private-key-file=service-account.key",
            "--root-ca-file=ca.pem",
            "--profiling=false",
        )
        # Made by the controllers. Before there is one, no pod is admitted.
        self._wait_for("/api/v1/namespaces/default/serviceaccounts/default")

    def _run(self, name: str, *options: str) -> None:
        with self.folder.joinpath(f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [self._programs / name, *options],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for this process, which stops the others
            )
        self._processes[name] = process
        if self._guard.stdin:
            self._guard.stdin.write(f"{process.pid}\n".encode())
            self._guard.stdin.flush()

    def _wait_for(self, path: str) -> None:
        trust = ssl.create_default_context(cafile=self.folder / "ca.pem")
        request = Request(self._api + path, headers={"Authorization": f"Bearer {self._token}"})
        deadline = time.monotonic() + START_SECONDS
        while True:
            self.check()
            try:
                with urlopen(request, timeout=5, context=trust):
                    return
            except OSError as error:  # an HTTPError and a URLError are such, too
                if time.monotonic() > deadline:
                    name = list(self._processes)[-1]
                    raise ClusterError(f"{path}: {error}\n{self._log(name)}") from None
            time.sleep(0.2)

    def _log(self, name: str) -> str:
        lines = self.folder.joinpath(f"{name}.log").read_text(errors="replace").splitlines()
        return "\n".join(lines[-25:])

    def _write_service_account_key(self) -> None:
        """Write the key that signs service accounts' tokens: no other purpose shares it."""
        pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
        self.folder.joinpath("service-account.key").write_bytes(pem)

    def _write_kubeconfig(self, name: str, token: str) -> None:
        cluster = {"server": self._api, "certificate-authority": str(self.folder / "ca.pem")}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "clerk-sync-tests", "cluster": cluster}],
            "users": [{"name": "user", "user": {"token": token}}],
            "contexts": [
                {"name": "default", "context": {"cluster": "clerk-sync-tests", "user": "user"}}
            ],
            "current-context": "default",
        }
        self.folder.joinpath(name).write_text(json.dumps(config, indent=2))


def _instructions(kubeconfig: Path) -> str:
    return f"""
Kubernetes {version()} is running, without nodes. Ctrl-C stops it. In a second terminal:

  export KUBECONFIG={kubeconfig}
  make test-cluster
"""


if __name__ == "__main__":
    sys.exit(main())
