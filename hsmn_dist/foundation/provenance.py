"""What an artefact was made with: git commit, package versions, host, configuration digest."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import hsmn_dist

PACKAGES = ("torch", "deepspeed", "ray", "datasets", "webdataset", "mlflow", "pydantic", "tokenizers", "safetensors")


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result; "absent" where one is not installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def git_commit() -> str:
    """The source tree's commit, with "+changes" where it was edited, or "unknown" outside a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def provenance(config_digest: str) -> dict[str, Any]:
    """One JSON-able record for `provenance.json` and for every scorecard."""
    return {
        "config_digest": config_digest,
        "git_commit": git_commit(),
        "hsmn_dist": hsmn_dist.__version__,
        "packages": package_versions(),
        "python": platform.python_version(),
        "host": platform.node(),
        "machine": platform.machine(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
