"""The image of cluster/Dockerfile, really built, without a daemon, on a base made from Debian's packages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

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

    def in_image(self, image: str, *words: str) -> str:
        """Output of a command in a container of an image, as the image's own user."""
        container = self.run("from", "--pull-never", image)
        try:
            return self.run("run", container, "--", *words)
        finally:
            self.run("rm", container)


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


def pip_mounts() -> list[str]:
    """This machine's own pip settings, inside the build as well: its files, and the folders that they name."""
    pip = [sys.executable, "-m", "pip", "config"]
    text = "".join(subprocess.run([*pip, word], capture_output=True, text=True).stdout for word in ("list", "debug"))
    files = {Path(line.split(",")[0].strip()) for line in text.splitlines() if "exists: True" in line}
    named = {Path(path) for path in re.findall(r"(?:file://|['\s])(/[\w./-]+)", text)}
    paths = sorted({path for path in files | named if path.exists() and path.parts[1] in ("etc", "opt", "srv", "usr")})
    return [word for path in paths for word in ("--volume", f"{path}:{path}:ro")]


def torch_arguments() -> list[str]:
    """Where this machine keeps a CPU build of torch, if it does; the package index has the CUDA build, which is several GB."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    links = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ["--build-arg", f"TORCH_PIP_ARGS=--find-links {links}"] if links else []


def test_the_image_is_built_and_runs_as_a_user_without_secrets(builder: Builder) -> None:
    image = "localhost/hsmn-dist:test"
    builder.run(
        "build",
        "--pull-never",
        *pip_mounts(),
        *torch_arguments(),
        "--build-arg",
        f"BASE={BASE}",
        "--file",
        "cluster/Dockerfile",
        "--tag",
        image,
        ".",
    )
    assert "Commands:" in builder.in_image(image, "hsmn-dist", "--help")
    assert builder.in_image(image, "id", "-u") == "1000"
    names = builder.in_image(
        image, "python", "-c", "import torch, deepspeed, ray, mlflow, hsmn_dist; print('all there')"
    )
    assert "all there" in names
    plan = builder.in_image(image, "hsmn-dist", "plan", "configs/runs/hsmn_debug_demo_cpu.yaml")
    assert "weights" in plan
    environment = builder.in_image(image, "env")
    assert "RAY_AUTH_MODE=token" in environment
    assert not re.search(r"(PASSWORD|SECRET|RAY_AUTH_TOKEN)=", environment)
