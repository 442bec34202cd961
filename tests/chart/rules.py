"""Rules that no schema knows: each says what is wrong with rendered objects."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tests.chart.helm import Object

# https://kubernetes.io/docs/concepts/security/pod-security-standards/
_HOST_NAMESPACES: Final = ("hostNetwork", "hostPID", "hostIPC")
_VOLUMES: Final = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
_SAFE_SYSCTLS: Final = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
}
_SELINUX_TYPES: Final = {None, "", "container_t", "container_init_t", "container_kvm_t"}
_SECCOMP_TYPES: Final = {"RuntimeDefault", "Localhost"}


@dataclass(frozen=True)
class Pod:
    """A pod, or the template of one, with the object that holds it."""

    owner: Object
    metadata: dict[str, Any]
    spec: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.owner['kind']} {self.owner['metadata']['name']}"

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.metadata.get("labels") or {})

    @property
    def containers(self) -> list[dict[str, Any]]:
        """All of them, in the order in which they start."""
        return [*(self.spec.get("initContainers") or []), *self.spec["containers"]]


def pods(objects: Iterable[Object]) -> Iterator[Pod]:
    for one in objects:
        spec = one.get("spec") or {}
        if one["kind"] == "CronJob":
            spec = spec["jobTemplate"]["spec"]
        if one["kind"] == "Pod":
            yield Pod(one, one["metadata"], spec)
        elif "containers" in (spec.get("template") or {}).get("spec", {}):
            yield Pod(one, spec["template"].get("metadata") or {}, spec["template"]["spec"])


def restricted_faults(spec: dict[str, Any]) -> Iterator[str]:
    """Say what the Pod Security Standard *restricted* forbids in a pod's spec."""
    pod = spec.get("securityContext") or {}
    for field in _HOST_NAMESPACES:
        if spec.get(field):
            yield field
    for volume in spec.get("volumes") or []:
        if others := set(volume) - {"name"} - _VOLUMES:
            yield f"volume {volume['name']} of type {', '.join(others)}"
    for sysctl in pod.get("sysctls") or []:
        if sysctl["name"] not in _SAFE_SYSCTLS:
            yield f"sysctl {sysctl['name']}"
    yield from _shared_faults("pod", pod)
    kinds = ("initContainers", "containers", "ephemeralContainers")
    for container in (one for kind in kinds for one in spec.get(kind) or []):
        for fault in _container_faults(pod, container):
            yield f"container {container['name']}: {fault}"


def _container_faults(pod: dict[str, Any], container: dict[str, Any]) -> Iterator[str]:
    own = container.get("securityContext") or {}
    capabilities = own.get("capabilities") or {}
    yield from _shared_faults("container", own)
    if own.get("privileged"):
        yield "privileged"
    if own.get("procMount", "Default") != "Default":
        yield "procMount"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    if "ALL" not in (capabilities.get("drop") or []):
        yield "does not drop ALL capabilities"
    if set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}:
        yield "adds capabilities"
    if own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield "runAsNonRoot is not true"
    seccomp = own.get("seccompProfile", pod.get("seccompProfile")) or {}
    if seccomp.get("type") not in _SECCOMP_TYPES:
        yield "no seccomp profile"
    if any(port.get("hostPort") for port in container.get("ports") or []):
        yield "hostPort"
    handlers = [
        container.get(f"{kind}Probe") or {} for kind in ("liveness", "readiness", "startup")
    ]
    handlers += (container.get("lifecycle") or {}).values()
    for handler in handlers:
        if any((handler.get(kind) or {}).get("host") for kind in ("httpGet", "tcpSocket")):
            yield "a probe or a lifecycle hook that names a host"


def _shared_faults(place: str, context: dict[str, Any]) -> Iterator[str]:
    """Fields that a pod and a container both have."""
    selinux = context.get("seLinuxOptions") or {}
    if selinux.get("type") not in _SELINUX_TYPES or selinux.get("user") or selinux.get("role"):
        yield f"{place}: seLinuxOptions"
    if (context.get("windowsOptions") or {}).get("hostProcess"):
        yield f"{place}: hostProcess"
    if context.get("runAsUser") == 0:
        yield f"{place}: runAsUser is root"
    if context.get("runAsNonRoot") is False:
        yield f"{place}: runAsNonRoot is false"
    if (context.get("seccompProfile") or {}).get("type", "RuntimeDefault") not in _SECCOMP_TYPES:
        yield f"{place}: seccompProfile"
    if (context.get("appArmorProfile") or {}).get("type") == "Unconfined":
        yield f"{place}: appArmorProfile"


def duplicates(pod: Pod) -> Iterator[str]:
    """Say what is in a pod twice: servers with server-side apply refuse it, Helm 3 let it pass."""
    spec = pod.spec
    yield from _twice("container", [one["name"] for one in pod.containers])
    yield from _twice("volume", [one["name"] for one in spec.get("volumes") or []])
    lasting = [
        one
        for one in pod.containers
        if one in spec["containers"] or one.get("restartPolicy") == "Always"
    ]
    ports = [port for one in lasting for port in one.get("ports") or []]
    yield from _twice("port", [port["containerPort"] for port in ports])
    yield from _twice("port name", [port["name"] for port in ports if "name" in port])
    for container in pod.containers:
        name = container["name"]
        yield from _twice(f"{name}: variable", [one["name"] for one in container.get("env") or []])
        mounts = container.get("volumeMounts") or []
        yield from _twice(f"{name}: mount", [one["mountPath"].rstrip("/") for one in mounts])


def dangling_mounts(pod: Pod) -> Iterator[str]:
    """Say which volumes are mounted and not there, or there and not mounted."""
    volumes = {one["name"] for one in pod.spec.get("volumes") or []}
    mounted = {m["name"] for one in pod.containers for m in one.get("volumeMounts") or []}
    for name in sorted(mounted ^ volumes):
        yield f"volume {name} is {'not mounted' if name in volumes else 'mounted, but not there'}"


def objects_twice(objects: Iterable[Object]) -> Iterator[str]:
    yield from _twice(
        "object",
        [
            (one["apiVersion"], one["kind"], one["metadata"].get("namespace"), name_of(one))
            for one in objects
        ],
    )


def name_of(one: Object) -> str:
    return str(one["metadata"]["name"])


def matches(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


def of_kind(objects: Iterable[Object], *kinds: str) -> list[Object]:
    return [one for one in objects if one["kind"] in kinds]


def the(objects: Iterable[Object], kind: str, ending: str = "") -> Object:
    """Return the one object of a kind whose name ends so."""
    found = [one for one in of_kind(objects, kind) if name_of(one).endswith(ending)]
    assert len(found) == 1, f"{len(found)} {kind} {ending}"
    return found[0]


def strings(tree: object) -> Iterator[str]:
    """Yield every string in a tree of YAML, keys included."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield str(key)
            yield from strings(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from strings(value)
    elif isinstance(tree, str):
        yield tree


def _twice(what: str, names: Sequence[object]) -> Iterator[str]:
    for name, count in Counter(names).items():
        if count > 1:
            yield f"{what} {name} {count} times"
