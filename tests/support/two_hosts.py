"""A Ray cluster over hosts that are network namespaces: a head without ranks on the machine itself, one core on every host."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.ray_cluster import free_ports

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "support" / "net_hosts.sh"
HEAD = "10.77.0.254"
COUNT_NODES = """
import sys
from ray._raylet import GcsClient
nodes = GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10)
print(sum(node.state == 0 for node in nodes.values()))
"""


def shipped_health_checks() -> dict[str, str]:
    """The variables of cluster/ray.env."""
    lines = (ROOT / "cluster" / "ray.env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=") for line in lines if line and not line.startswith("#"))


@dataclass
class HostCluster:
    """Hosts 1 to `num_hosts`, each a Ray node with one core; `environment` is for who connects to `address`."""

    net: str
    num_hosts: int
    folder: Path
    address: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def name(self, index: int) -> str:
        """Host name of a host."""
        return f"{self.net}-{index}"

    def index(self, host: str) -> int:
        """Number of a host by its name."""
        return int(host.rsplit("-", 1)[1])

    def cut(self, index: int) -> None:
        """Pull a host's cable."""
        subprocess.run(["bash", str(SCRIPT), "cut", self.net, str(index)], check=True, timeout=30)

    def heal(self, index: int) -> None:
        """Put it back."""
        subprocess.run(["bash", str(SCRIPT), "heal", self.net, str(index)], check=True, timeout=30)

    def raylet(self, index: int) -> int:
        """Process id of a host's raylet."""
        command = ["ip", "netns", "pids", self.name(index)]
        for pid in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == "raylet":
                    return int(pid)
        raise AssertionError(f"no raylet on {self.name(index)}")

    def count_nodes(self) -> int:
        """Nodes that the head counts as alive; 0 before it answers."""
        command = [sys.executable, "-c", COUNT_NODES, self.address]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        return int(done.stdout.strip() or 0) if done.returncode == 0 else 0


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def host_cluster(num_hosts: int) -> Iterator[HostCluster]:
    """Make the hosts, start Ray on them with the shipped health checks and a token, end everything."""
    if os.geteuid() != 0 or any(shutil.which(name) is None for name in ("ip", "nsenter", "unshare")):
        pytest.skip("hosts as network namespaces need root, iproute2 and util-linux")
    net = f"h{secrets.token_hex(3)}"
    made = subprocess.run(["bash", str(SCRIPT), "up", net, str(num_hosts)], capture_output=True, text=True, timeout=60)
    folder = Path(tempfile.mkdtemp(prefix="hn", dir="/tmp"))  # a socket path has 107 bytes at most
    cluster: HostCluster | None = None
    try:
        if made.returncode != 0:
            pytest.skip(f"no network namespaces here: {made.stderr.strip()[-200:]}")
        cluster = HostCluster(net, num_hosts, folder)
        _start(cluster)
        yield cluster
    finally:
        for process in cluster.processes if cluster else []:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGCONT)
                os.killpg(process.pid, signal.SIGTERM)
        for process in cluster.processes if cluster else []:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=15)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        subprocess.run(["bash", str(SCRIPT), "down", net, str(num_hosts)], check=False, timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def _start(cluster: HostCluster) -> None:
    folder = cluster.folder
    token = folder / "token"
    token.write_text(secrets.token_hex(16))
    token.chmod(0o600)
    port, agent, client = free_ports(3)
    environment = {
        **os.environ,
        **shipped_health_checks(),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    cluster.address, cluster.environment = f"{HEAD}:{port}", environment
    ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"]
    head = [
        *ray,
        "--head",
        "--node-ip-address",
        HEAD,
        "--port",
        str(port),
        "--num-cpus",
        "0",
        "--include-dashboard=false",
    ]
    head += ["--dashboard-agent-listen-port", str(agent), "--ray-client-server-port", str(client)]
    _join(cluster, [*head, "--temp-dir", str(folder / "t")], {}, "head")
    for index in range(1, cluster.num_hosts + 1):
        node = [*ray, "--address", cluster.address, "--node-ip-address", f"10.77.0.{index}", "--num-cpus", "1"]
        # gloo would look its own host name up, which no name server knows here.
        _join(
            cluster,
            ["bash", str(SCRIPT), "on", cluster.net, str(index), *node],
            {"GLOO_SOCKET_IFNAME": "eth0"},
            f"node{index}",
        )


def _join(cluster: HostCluster, command: list[str], more: dict[str, str], name: str) -> None:
    """Start a node and wait until the head counts it. Ray gives a start 30 s; on a busy machine the next one succeeds."""
    count = len(cluster.processes) + 1
    path = cluster.folder / f"{name}.log"
    for _ in range(5):
        with path.open("wb") as log:
            process = subprocess.Popen(
                command, env={**cluster.environment, **more}, stdout=log, stderr=log, start_new_session=True
            )
        cluster.processes.append(process)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if cluster.count_nodes() >= count:
                return
            time.sleep(1)
        cluster.processes.pop()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError(f"{name} did not join: {path.read_text()[-2000:]}")
