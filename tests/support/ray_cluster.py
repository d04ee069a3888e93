"""A Ray cluster of one node with token authentication, on ports of its own; ended by its own process id, never by `ray stop`."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TokenCluster:
    """Address of the job server, of the cluster, and the file with its token."""

    address: str
    gcs: str
    token_file: Path


def free_ports(count: int) -> list[int]:
    """Ports that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]


@contextlib.contextmanager
def token_cluster(num_cpus: int = 2, timeout: float = 240.0) -> Iterator[TokenCluster]:
    """Start the cluster, wait until its job server answers, and end it."""
    folder = Path(tempfile.mkdtemp(prefix="hr", dir="/tmp"))  # a socket path has 107 bytes at most
    token_file = folder / "token"
    token_file.write_text(secrets.token_hex(16))
    token_file.chmod(0o600)
    gcs, dashboard, agent, client = free_ports(4)
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_DISABLE_IMPORT_WARNING": "1",
        # As on a node whose environment is activated: a job's `python` is the one that has Ray.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--port", str(gcs), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
    command += ["--dashboard-agent-listen-port", str(agent), "--ray-client-server-port", str(client)]
    command += ["--node-ip-address", "127.0.0.1", "--temp-dir", str(folder / "t"), "--num-cpus", str(num_cpus)]
    address = f"http://127.0.0.1:{dashboard}"
    process: subprocess.Popen[bytes] | None = None
    try:
        for _ in range(4):  # Ray gives its start 30 s; on a busy machine the next one succeeds
            with (folder / "log").open("wb") as log:
                process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            if _has_started(address, process, time.monotonic() + timeout, folder / "log"):
                break
            _end(process)
        else:
            raise AssertionError(f"Ray did not start: {(folder / 'log').read_text()[-2000:]}")
        yield TokenCluster(address, f"127.0.0.1:{gcs}", token_file)
    finally:
        if process is not None:
            _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _has_started(address: str, process: subprocess.Popen[bytes], deadline: float, log: Path) -> bool:
    """Wait until the node has joined and the job server answers; False when it gave up."""
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            try:
                urllib.request.urlopen(f"{address}/api/version", timeout=5)
                answers = True
            except urllib.error.HTTPError as error:
                answers = error.code in (401, 403)  # it answers, and asks for a token
            if answers and "Ray runtime started" in log.read_text(errors="replace"):
                return True
        time.sleep(0.5)
    return False
