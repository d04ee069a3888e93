"""The images of cluster/, really built, without a daemon, on a base made from Debian's packages."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.ray_cluster import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(3600)]
ROOT = Path(__file__).resolve().parents[2]
BASE = "localhost/debian-python:test"


@dataclass(frozen=True)
class Builder:
    """buildah with a store of its own."""

    folder: Path

    def run(self, *words: str) -> str:
        """Output of a command; fails with what it said."""
        command = ["buildah", "--root", str(self.folder / "store"), "--runroot", str(self.folder / "run"), *words]
        environment = {**os.environ, "STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000)
        assert done.returncode == 0, f"{' '.join(words)[:200]}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
        return done.stdout.strip()

    def build(self, dockerfile: str, image: str, *words: str) -> None:
        """Build with this machine's own package sources; the format that has health checks."""
        paths = ["--file", dockerfile, "--tag", image, "."]
        base = ["--build-arg", f"BASE={BASE}"]
        self.run("build", "--pull-never", "--format", "docker", *package_mounts(), *base, *words, *paths)

    @contextlib.contextmanager
    def container(self, image: str) -> Iterator[Callable[..., str]]:
        """Runs commands in one container of an image, as the image's own user, and gives their output."""
        name = self.run("from", "--pull-never", image)
        try:
            yield lambda *words: self.run("run", name, "--", *words)
        finally:
            self.run("rm", name)

    def settings(self, image: str) -> dict[str, Any]:
        """What the image says of itself."""
        found: dict[str, Any] = json.loads(self.run("inspect", "--type", "image", image))["Docker"]["config"]
        return found


@pytest.fixture(scope="module")
def builder() -> Iterator[Builder]:
    if os.geteuid() != 0 or any(shutil.which(name) is None for name in ("buildah", "debootstrap")):
        pytest.skip("an image is built as root with buildah and debootstrap: apt-get install -y buildah debootstrap")
    folder = Path(tempfile.mkdtemp(prefix="im", dir="/tmp"))
    root = folder / "base"
    try:
        command = [
            "debootstrap",
            "--variant=minbase",
            "--include=python3,python3-venv,ca-certificates",
            "bookworm",
            str(root),
        ]
        made = subprocess.run(command, capture_output=True, text=True, timeout=1200)
        if made.returncode != 0:
            pytest.skip(f"no Debian packages can be had here: {made.stdout.strip()[-200:]}")
        built = Builder(folder)
        container = built.run("from", "scratch")
        built.run("add", "--quiet", container, str(root), "/")
        built.run("commit", "--quiet", container, BASE)
        yield built
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def package_mounts() -> list[str]:
    """This machine's own settings of pip and apt, inside the build as well: their files, and the folders that they name."""
    pip = [sys.executable, "-m", "pip", "config"]
    text = "".join(subprocess.run([*pip, word], capture_output=True, text=True).stdout for word in ("list", "debug"))
    files = {Path(line.split(",")[0].strip()) for line in text.splitlines() if "exists: True" in line}
    named = {Path(path) for path in re.findall(r"(?:file://|['\s])(/[\w./-]+)", text)}
    named.add(Path("/etc/apt/apt.conf.d"))
    paths = sorted({path for path in files | named if path.exists() and path.parts[1] in ("etc", "opt", "srv", "usr")})
    return [word for path in paths for word in ("--volume", f"{path}:{path}:ro")]


def torch_arguments() -> list[str]:
    """Where this machine keeps a CPU build of torch, if it does; the package index has the CUDA build, which is several GB."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    links = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ["--build-arg", f"TORCH_PIP_ARGS=--find-links {links}"] if links else []


def test_the_image_is_built_and_runs_as_a_user_without_secrets(builder: Builder) -> None:
    image = "localhost/hsmn-dist:test"
    builder.build("cluster/Dockerfile", image, *torch_arguments())
    assert "Healthcheck" in builder.settings(image)
    with builder.container(image) as run:
        assert "Commands:" in run("hsmn-dist", "--help")
        assert run("id", "-u") == "1000"
        names = run("python", "-c", "import torch, deepspeed, ray, mlflow, boto3, hsmn_dist; print('all there')")
        assert "all there" in names
        assert "weights" in run("hsmn-dist", "plan", "configs/runs/hsmn_debug_demo_cpu.yaml")
        environment = run("env")
        assert "RAY_AUTH_MODE=token" in environment
        assert not re.search(r"(PASSWORD|SECRET|RAY_AUTH_TOKEN)=", environment)
        # What `ray up` does in a container: login shells, rsync, ssh, and the network's variables at their place.
        found = run("bash", "--login", "-c", "-i", "command -v ray rsync ssh; echo $HOME; ls ~/cluster")
        assert {"/opt/hsmn/bin/ray", "/usr/bin/rsync", "/usr/bin/ssh", "/home/hsmn"} <= set(found.split())
        assert {"nccl.env", "nccl_infiniband.env", "nccl_ethernet.env", "nccl_efa.env"} <= set(found.split())


SERVES = """
set -eu
umask 077
printf %s 'a-password%40of-the-test' > /tmp/password
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_WORKERS=1 MLFLOW_ADMIN_PASSWORD_FILE=/tmp/password MLFLOW_PORT=$1
start-mlflow > /tmp/log 2>&1 &
server=$!
trap 'kill $server' EXIT
for _ in $(seq 240); do
  if python3 -c "import urllib.request as u; print(u.urlopen('http://127.0.0.1:$1/health', timeout=4).read())"; then exit; fi
  if ! kill -0 $server; then break; fi
  sleep 1
done 2> /dev/null
cat /tmp/log
exit 1
"""


def test_the_mlflow_image_is_built_pinned_and_serves_as_a_user(builder: Builder) -> None:
    image = "localhost/hsmn-mlflow:test"
    builder.build("cluster/mlflow/Dockerfile", image)
    settings = builder.settings(image)
    assert "Healthcheck" in settings and settings["User"] == "1000"
    pins = [(ROOT / "constraints.txt").read_text(), (ROOT / "cluster" / "mlflow" / "constraints.txt").read_text()]
    with builder.container(image) as run:
        assert run("id", "-u") == "1000"
        frozen = run("/opt/mlflow/bin/pip", "freeze").splitlines()
        unpinned = {line.lower() for line in frozen} - {line.lower() for text in pins for line in text.splitlines()}
        assert len(frozen) > 20 and not unpinned
        assert "OK" in run("bash", "-c", SERVES, "serves", str(free_ports(1)[0]))
