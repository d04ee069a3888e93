"""What stands around a run under chaos: an object store that can fail, a tracker, a Ray cluster of several nodes, a small disk."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import shutil
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from hsmn_dist.orchestration.launcher import descendants
from tests.support.ray_cluster import free_ports

ROOT = Path(__file__).resolve().parents[2]
SLOW_ANSWER_SECONDS = 1.5


def environment(site: Path | None = None) -> dict[str, str]:
    """Of every process of the run; with `site`, their sitecustomize makes the faults. The path is also how they are found."""
    words = [str(site)] if site is not None else []
    value = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": os.pathsep.join([*words, str(ROOT)])}
    return (
        value
        | {"RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "500"}
        | {
            "RAY_health_check_timeout_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
            "RAY_DISABLE_IMPORT_WARNING": "1",
            # A token file of the user's (~/.ray/auth_token) would make the head ask for it, and the nodes not send it.
            "RAY_AUTH_MODE": "disabled",
            "PYTHONUNBUFFERED": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
    )


class _StoreHandler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; `/chaos?fail=3` makes the next three answers errors, `slow=3` late ones."""

    orders: dict[str, int]
    served: dict[str, int]

    def log_message(self, *_: Any) -> None:
        return

    def do_GET(self) -> None:
        place = urllib.parse.urlsplit(self.path)
        if place.path == "/chaos":
            self.orders.update({name: int(value) for name, value in urllib.parse.parse_qsl(place.query)})
            self.send_response(204)
            self.end_headers()
            return
        if self.orders["slow"] > 0:
            self.orders["slow"] -= 1
            self.served["slow"] += 1
            time.sleep(SLOW_ANSWER_SECONDS)
        if self.orders["fail"] > 0:
            self.orders["fail"] -= 1
            self.served["fail"] += 1
            self.send_error(503)
            return
        super().do_GET()


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True


class ObjectStore:
    """An HTTP server over a folder of shards. `served` counts the late answers and the errors."""

    def __init__(self, folder: Path, port: int) -> None:
        self.served = {"slow": 0, "fail": 0}
        self.orders = {"slow": 0, "fail": 0}
        handler = type("Handler", (_StoreHandler,), {"orders": self.orders, "served": self.served})
        self._server = _Server(("127.0.0.1", port), functools.partial(handler, directory=str(folder)))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def heal(self) -> None:
        """Answer as a good store does."""
        self.orders.update(slow=0, fail=0)

    def close(self) -> None:
        """End the server."""
        self._server.shutdown()
        self._server.server_close()


class TrackerServer:
    """A real MLflow server on a port of its own, killed and started again."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def uri(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, note: Path) -> None:
        """Start it and write its process id, without waiting for it."""
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        extra = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env=environment() | extra, cwd=self.folder
            )
        note.write_text(json.dumps({"pid": self._process.pid}))

    def wait(self, seconds: float = 240.0) -> None:
        """Return when it answers."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                return
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()[-2000:]
            time.sleep(0.2)

    def is_alive(self) -> bool:
        """Whether the server's process lives."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End it with its workers."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class RayCluster:
    """A head without cores and worker nodes of two cores, each with processes and an address of its own."""

    def __init__(self, site: Path | None, port: int, num_nodes: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hc", dir="/tmp"))  # a socket path has 107 bytes at most
        self.address = f"127.0.0.1:{port}"
        self._environment = environment(site) | {"CHAOS_CLUSTER": str(self.folder)}  # how its processes are found
        self._nodes: list[subprocess.Popen[bytes]] = []
        dashboard, agent, client = free_ports(3)
        head = ["--head", "--port", str(port), "--num-cpus", "0", "--include-dashboard", "false"]
        head += ["--dashboard-port", str(dashboard), "--dashboard-agent-listen-port", str(agent)]
        head += ["--ray-client-server-port", str(client), "--node-ip-address", "127.0.0.1"]
        self._start([*head, "--temp-dir", str(self.folder / "t")])
        for number in range(num_nodes):
            self.add_node(number)

    def add_node(self, number: int, num_cpus: int = 2) -> subprocess.Popen[bytes]:
        """Start one more worker node, at 127.0.0.(number + 2)."""
        (agent,) = free_ports(1)
        words = ["--address", self.address, "--num-cpus", str(num_cpus), "--node-ip-address", f"127.0.0.{number + 2}"]
        return self._start([*words, "--dashboard-agent-listen-port", str(agent)])

    def _start(self, words: list[str]) -> subprocess.Popen[bytes]:
        command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats", *words]
        command += ["--object-store-memory", str(100 * 2**20)]
        log = (self.folder / f"node{len(self._nodes)}.log").open("wb")
        node = subprocess.Popen(
            command, env=self._environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
        log.close()
        self._nodes.append(node)
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in (text := Path(log.name).read_text()):
            assert node.poll() is None and time.monotonic() < deadline, text[-2000:]
            time.sleep(0.2)
        return node

    def head_processes(self) -> list[int]:
        """The head's store and raylet, and what starts them."""
        return [self._nodes[0].pid, *descendants(self._nodes[0].pid)]

    def remove(self, node: subprocess.Popen[bytes]) -> None:
        """Kill a node with everything below it, as a machine that loses its power."""
        for pid in [*descendants(node.pid), node.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.wait()

    def close(self) -> None:
        """End every node by its own processes."""
        for node in reversed(self._nodes):
            if node.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    node.send_signal(signal.SIGTERM)
        for node in self._nodes:
            try:
                node.wait(timeout=15)
            except subprocess.TimeoutExpired:
                self.remove(node)
        deadline = time.monotonic() + 20
        # Orphans of nodes that were killed; again and again, since one that is killed may just have started another.
        while left := marked_processes(str(self.folder)):
            assert time.monotonic() < deadline, f"the cluster's own processes live on: {left}"
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)
        shutil.rmtree(self.folder, ignore_errors=True)


def mount_disk(folder: Path, num_bytes: int) -> bool:
    """Mount a small file system at `folder` (root can, on Linux), unless it is there from before; True when it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.path.ismount(folder) and shutil.which("mount"):
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "chaos", str(folder)], capture_output=True, check=False
        )
    return os.path.ismount(folder)


def unmount_disk(folder: Path) -> None:
    """Give the small file system back, with all that is on it."""
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def marked_processes(mark: str) -> dict[int, str]:
    """Living processes whose environment holds `mark`: pid -> command line."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
    found.pop(os.getpid(), None)
    return found
