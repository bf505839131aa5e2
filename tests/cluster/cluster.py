"""A real Kubernetes of its own: etcd, the control plane, one real node (kubelet and containerd) and played nodes (kwok).

Everything lives in new network, mount and PID namespaces behind one first process: whatever it is named or binds is of no
concern to the machine, and when that process is ended nothing is left but files in the cluster's directory. The machine
reaches it over a pair of interfaces of its own, named after the cluster's number.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.binaries import Missing

HERE = Path(__file__).parent
PATIENCE = 120.0  # seconds for a part to come up; only a broken one takes as long
SERVICES = "10.96.0.0/16"
PODS = "10.244.0.0/16"
API_PORT = 6443
NODE = "real-1"
# Where the programs write by default: inside, each is a directory of the cluster's own.
PRIVATE = ("/run", "/var/log", "/var/lib")


@dataclass(frozen=True)
class Cluster:
    """A running cluster. `address` is where its API server and node ports are reached from this machine."""

    directory: Path
    number: int
    first: int  # the process that all others end with
    born: str  # when that process started: another one may have its number later
    ready: bool = False
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)  # by this process, to be waited for

    @property
    def address(self) -> str:
        return _addresses(self.number)[1]

    @property
    def kubeconfig(self) -> Path:
        return self.directory / "kubeconfig"

    @property
    def audit(self) -> Path:
        """What the API server was asked, a line each: every write, and all that service accounts of others asked for."""
        return self.directory / "audit.log"

    @property
    def server(self) -> str:
        return f"https://{self.address}:{API_PORT}"

    def save(self) -> None:
        state = {"number": self.number, "first": self.first, "born": self.born, "ready": self.ready}
        (self.directory / "cluster.json").write_text(json.dumps(state))

    def alive(self) -> bool:
        with contextlib.suppress(OSError):
            return _born(self.first) == self.born
        return False

    def inside(self, *command: str) -> list[str]:
        """`command`, as a process of the cluster's namespaces."""
        return ["nsenter", "-t", str(self.first), "--net", "--mount", "--pid", "--", *command]

    def stop(self) -> None:
        """End every process of the cluster and take down what it left in the machine."""
        if self.alive():
            os.kill(self.first, signal.SIGKILL)
            self._go_on()
        for process in self.started:
            process.wait()
        _until("the cluster is gone", lambda: not self.alive())
        _remove_cgroups(f"cloudai-{self.number}")
        (self.directory / "cluster.json").unlink(missing_ok=True)

    def _go_on(self) -> None:
        """Continue who waits outside for a part that somebody stopped: stopped together with it, it lets nothing end."""
        for process in psutil.process_iter(["cmdline"]):
            if (process.info["cmdline"] or [])[:3] == self.inside()[:3]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()


def saved(directory: Path) -> Cluster | None:
    """The cluster that was started in `directory`, if only half, and not ended by `stop`; it need not be alive."""
    try:
        return Cluster(directory, **json.loads((directory / "cluster.json").read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def start(directory: Path, programs: Mapping[str, Path], played: int = 3, *, dies_with_us: bool = True) -> Cluster:
    """Start a cluster that keeps its files in `directory`; returns when all its nodes are ready.

    Raises Missing where this machine lacks something.
    """
    _look_for_tools()
    before = saved(directory)
    if before is not None:
        before.stop()
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    cluster = _namespaces(directory, dies_with_us)
    cluster.save()
    try:
        _prepare(cluster)
        _control_plane(cluster, programs)
        _real_node(cluster, programs)
        _played_nodes(cluster, programs, played)
        patience = f"--timeout={PATIENCE:.0f}s"
        kubectl(cluster, programs, "wait", "--for=create", f"node/{NODE}", patience)
        kubectl(cluster, programs, "wait", "--for=condition=Ready", "nodes", "--all", patience)
    except BaseException:
        cluster.stop()
        raise
    cluster = replace(cluster, ready=True)
    cluster.save()
    return cluster


def kubectl(cluster: Cluster, programs: Mapping[str, Path], *arguments: str, given: str | None = None) -> str:
    command = [str(programs["kubectl"]), f"--kubeconfig={cluster.kubeconfig}", *arguments]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}\n{_last_words(cluster)}")
    return done.stdout


# -- the place


def _look_for_tools() -> None:
    if os.geteuid() != 0:
        raise Missing("a Kubernetes node needs root: run as root, or name a cluster with CLOUDAI_TEST_KUBECONFIG")
    needed = {
        "containerd": "containerd",
        "runc": "runc",
        "ctr": "containerd",
        "nft": "nftables",
        "iptables": "iptables",
        "tini": "tini",
        "nsenter": "util-linux",
    }
    lacking = {package for tool, package in needed.items() if not shutil.which(tool)}
    if not Path("/usr/lib/cni/bridge").exists():
        lacking.add("containernetworking-plugins")
    if lacking:
        raise Missing(f"a Kubernetes node needs: apt-get install {' '.join(sorted(lacking))}")


def _addresses(number: int) -> tuple[str, str]:
    """This machine's and the cluster's address on the pair of interfaces between them."""
    return f"10.213.{number}.1", f"10.213.{number}.2"


def _namespaces(directory: Path, dies_with_us: bool) -> Cluster:
    command = [
        "unshare",
        "--net",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "--propagation",
        "slave",
    ]
    command += ["tini", "-s", "--", "sleep", "infinity"]
    if dies_with_us:
        command = ["setpriv", "--pdeathsig", "KILL", *command]
    with (directory / "first.log").open("wb") as out:
        outer = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    _until("the namespaces are made", lambda: bool(children.read_text().split()))
    first = int(children.read_text().split()[0])
    _until("the first process runs", lambda: b"tini" in Path(f"/proc/{first}/cmdline").read_bytes())
    return Cluster(directory, _free_number(), first, _born(first), started=[outer])


def _born(process: int) -> str:
    """In clock ticks since the machine's start: https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html"""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]


def _free_number() -> int:
    for number in range(1, 255):
        if not Path(f"/sys/class/net/cloudai{number}").exists():
            return number
    raise Missing("all numbers of clusters are taken: see `ip link`")


def _prepare(cluster: Cluster) -> None:
    name = f"cloudai{cluster.number}"
    here, there = _addresses(cluster.number)
    _run(["ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(cluster.first)])
    _run(["ip", "addr", "add", f"{here}/30", "dev", name])
    _run(["ip", "link", "set", name, "up"])
    script = ["set -e", "ip link set lo up", f"ip addr add {there}/30 dev eth0", "ip link set eth0 up"]
    # What leaves the cluster's addresses goes nowhere; kube-proxy needs some route all the same.
    script += [f"ip route add default via {here}", "echo 1 > /proc/sys/net/ipv4/ip_forward", "mount --make-rshared /"]
    for place in PRIVATE:
        own = cluster.directory / "private" / place.strip("/").replace("/", "-")
        own.mkdir(parents=True)
        script.append(f"mount --bind {own} {place} && mount --make-rshared {place}")
    _run(cluster.inside("sh", "-c", "\n".join(script)))


def _control_plane(cluster: Cluster, programs: Mapping[str, Path]) -> None:
    directory, address = cluster.directory, cluster.address
    _start(cluster, "etcd", [programs["etcd"], f"--data-dir={directory}/etcd", "--unsafe-no-fsync"])
    keys = directory / "keys"
    keys.mkdir()
    _run(["openssl", "genrsa", "-out", f"{keys}/accounts.key", "2048"])
    tokens = {
        "admin": ("admin", "system:masters"),
        "node": (f"system:node:{NODE}", "system:nodes"),
        "controllers": ("system:kube-controller-manager", ""),
        "scheduler": ("system:kube-scheduler", ""),
        "proxy": ("system:kube-proxy", ""),
    }
    secret = {name: secrets.token_hex(16) for name in tokens}
    lines = [f'{secret[name]},{user},{user},"{groups}"' for name, (user, groups) in tokens.items()]
    (keys / "tokens.csv").write_text("\n".join(lines) + "\n")
    audit = directory / "audit.yaml"
    audit.write_text(AUDIT)
    apiserver = [
        programs["kube-apiserver"],
        "--etcd-servers=http://127.0.0.1:2379",
        f"--advertise-address={address}",
        f"--secure-port={API_PORT}",
        f"--cert-dir={keys}",
        f"--token-auth-file={keys}/tokens.csv",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={keys}/accounts.key",
        f"--service-account-signing-key-file={keys}/accounts.key",
        f"--service-cluster-ip-range={SERVICES}",
        "--allow-privileged=true",
        "--kubelet-preferred-address-types=InternalIP",
        f"--audit-policy-file={audit}",
        f"--audit-log-path={cluster.audit}",
    ]
    _start(cluster, "kube-apiserver", apiserver)
    _until("the API server made its certificate", (keys / "apiserver.crt").exists)
    for name, token in secret.items():
        path = cluster.kubeconfig if name == "admin" else keys / f"{name}.kubeconfig"
        path.write_text(_kubeconfig(cluster, token))
        path.chmod(0o600)
    _until("the API server is ready", lambda: _ready(cluster, programs))
    managers = [
        programs["kube-controller-manager"],
        f"--kubeconfig={keys}/controllers.kubeconfig",
        "--use-service-account-credentials",
        f"--service-account-private-key-file={keys}/accounts.key",
        f"--root-ca-file={keys}/apiserver.crt",
        f"--cluster-cidr={PODS}",
        "--leader-elect=false",
        "--kube-api-qps=2000",
        "--kube-api-burst=2000",
        "--concurrent-job-syncs=50",
        "--concurrent-gc-syncs=50",
    ]
    _start(cluster, "kube-controller-manager", managers)
    scheduler = [programs["kube-scheduler"], f"--kubeconfig={keys}/scheduler.kubeconfig", "--leader-elect=false"]
    _start(cluster, "kube-scheduler", [*scheduler, "--kube-api-qps=2000", "--kube-api-burst=2000"])


AUDIT = """\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived, ResponseStarted]
rules:
  - level: Metadata
    verbs: [create, update, patch, delete, deletecollection]
  - level: None
    userGroups: ["system:serviceaccounts:kube-system"]
  - level: Metadata
    userGroups: ["system:serviceaccounts"]
  - level: None
"""


def _real_node(cluster: Cluster, programs: Mapping[str, Path]) -> None:
    directory, keys = cluster.directory, cluster.directory / "keys"
    cgroup = f"cloudai-{cluster.number}"
    _make_cgroups(cgroup)
    (directory / "containerd.toml").write_text(CONTAINERD.format(networks=directory / "networks"))
    networks = directory / "networks"
    networks.mkdir()
    (networks / "10-pods.conflist").write_text(CNI)
    names = directory / "Corefile"
    names.write_text(COREFILE.format(address=cluster.address, kubeconfig=cluster.kubeconfig))
    _start(cluster, "coredns", [programs["coredns"], "-conf", names])
    _start(cluster, "containerd", ["containerd", "--config", f"{directory}/containerd.toml"])
    _start(cluster, "kube-proxy", [
        programs["kube-proxy"],
        f"--kubeconfig={keys}/proxy.kubeconfig",
        "--proxy-mode=nftables",
        f"--cluster-cidr={PODS}",
        f"--hostname-override={NODE}",
        "--conntrack-max-per-core=0",
        "--conntrack-tcp-timeout-established=0",
        "--conntrack-tcp-timeout-close-wait=0",
    ])  # fmt: skip
    config = directory / "kubelet.yaml"
    config.write_text(KUBELET.format(cgroup=cgroup, address=cluster.address))
    _start(cluster, "kubelet", [
        programs["kubelet"],
        f"--config={config}",
        f"--kubeconfig={keys}/node.kubeconfig",
        f"--hostname-override={NODE}",
        f"--node-ip={cluster.address}",
    ])  # fmt: skip


CONTAINERD = """\
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "cloudai.test/pause:1"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{networks}"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"""

CNI = json.dumps(
    {
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "pods",
                "isGateway": True,
                "ipMasq": False,
                "hairpinMode": True,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": "10.244.0.0/24"}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }
)

# Names of the cluster only: whatever else is asked for does not exist.
COREFILE = """\
cluster.local:53 {{
    bind {address}
    kubernetes cluster.local {{
        kubeconfig {kubeconfig}
    }}
}}
.:53 {{
    bind {address}
    template ANY ANY {{
        rcode NXDOMAIN
    }}
}}
"""

KUBELET = """\
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {{anonymous: {{enabled: true}}, webhook: {{enabled: false}}}}
authorization: {{mode: AlwaysAllow}}
cgroupDriver: cgroupfs
clusterDNS: ["{address}"]
clusterDomain: cluster.local
cgroupRoot: /{cgroup}
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
evictionHard: {{nodefs.available: 1%, imagefs.available: 1%, nodefs.inodesFree: 1%, memory.available: 100Mi}}
failCgroupV1: false
failSwapOn: false
imageMinimumGCAge: 24h
resolvConf: ""
# Sooner than by default, so that tests of what happens then need not wait.
nodeStatusUpdateFrequency: 2s
syncFrequency: 5s
"""


def _played_nodes(cluster: Cluster, programs: Mapping[str, Path], count: int) -> None:
    _start(cluster, "kwok", [
        programs["kwok"],
        f"--kubeconfig={cluster.kubeconfig}",
        f"--config={HERE / 'stages.yaml'}",
        "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake",
        f"--node-ip={cluster.address}",
        "--node-lease-duration-seconds=40",
        "--cidr=10.245.0.1/16",
    ])  # fmt: skip
    if count:
        nodes = "\n---\n".join(json.dumps(played_node(f"played-{number}")) for number in range(1, count + 1))
        kubectl(cluster, programs, "create", "-f", "-", given=nodes)


def played_node(name: str, cores: int = 32, **labels: str) -> dict[str, Any]:
    """A node that no pod lands on unless it tolerates it."""
    amounts = {"cpu": str(cores), "memory": "256Gi", "ephemeral-storage": "1Ti", "pods": "1000", "nvidia.com/gpu": "8"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "annotations": {"kwok.x-k8s.io/node": "fake"},
            "labels": {"type": "played", "kubernetes.io/hostname": name, **labels},
        },
        "spec": {"taints": [{"key": "played", "value": "true", "effect": "NoSchedule"}]},
        "status": {"allocatable": amounts, "capacity": amounts},
    }


# -- processes


def _start(cluster: Cluster, name: str, command: Sequence[object]) -> None:
    with (cluster.directory / f"{name}.log").open("ab") as out:
        process = subprocess.Popen(
            cluster.inside(*map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            cwd=cluster.directory,
        )
    cluster.started.append(process)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def _until(what: str, true: object, patience: float = PATIENCE) -> None:
    assert callable(true)
    deadline = time.monotonic() + patience
    while True:
        with contextlib.suppress(OSError):
            if true():
                return
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {patience:.0f} s until {what}")
        time.sleep(0.05)


def _ready(cluster: Cluster, programs: Mapping[str, Path]) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((cluster.address, API_PORT), timeout=1):
        pass
    with contextlib.suppress(RuntimeError):
        return kubectl(cluster, programs, "get", "--raw", "/readyz") == "ok"
    return False


def _last_words(cluster: Cluster) -> str:
    """The last lines of every part's log."""
    return "\n".join(
        f"{log.name}: {_tail(log)}" for log in sorted(cluster.directory.glob("*.log")) if log.stem != "audit"
    )


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 600))
        return file.read().decode(errors="replace").strip()


def _kubeconfig(cluster: Cluster, token: str) -> str:
    authority = cluster.directory / "keys" / "apiserver.crt"
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": "test", "cluster": {"server": cluster.server, "certificate-authority": str(authority)}}
            ],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "current-context": "test",
        }
    )


def _cgroups(name: str) -> Iterator[Path]:
    root = Path("/sys/fs/cgroup")
    if (root / "cgroup.controllers").exists():
        yield root / name
        return
    for hierarchy in {path.resolve() for path in root.iterdir() if path.is_dir()}:
        yield hierarchy / name


def _make_cgroups(name: str) -> None:
    for path in _cgroups(name):
        path.mkdir(exist_ok=True)


def _remove_cgroups(name: str) -> None:
    for root in _cgroups(name):
        for path in sorted(root.rglob("*"), reverse=True) if root.is_dir() else []:
            if path.is_dir():
                with contextlib.suppress(OSError):
                    path.rmdir()
        with contextlib.suppress(OSError):
            root.rmdir()
