"""hsmn-dist doctor: what this machine has, what is missing, and the command that mends it."""

from __future__ import annotations

import json
import platform
import shutil
import socket
import sys
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from hsmn_dist.foundation.provenance import package_versions
from hsmn_dist.foundation.units import format_bytes

EXAMPLE = "Example: hsmn-dist doctor --json"
MIN_MEMORY_BYTES = 4 * 2**30
MIN_DISK_BYTES = 5 * 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report. `status` is ok, warning or missing; `mend` is a command or an instruction, empty when ok."""

    name: str
    status: str
    value: str
    mend: str = ""


def command(
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    run_root: Path = typer.Option(Path("runs"), help="Folder of runs whose disk is checked."),
    ray_address: str = typer.Option("", help="Ray cluster to reach, for example 10.0.0.5:6379."),
    mlflow_uri: str = typer.Option("", help="MLflow server to reach, for example http://tracker:5000."),
) -> None:
    """Report versions, devices, cores, memory, disk, Ray and MLflow, and what is missing."""
    findings = [*_packages(), *_devices(), *_machine(run_root), _ray(ray_address), _mlflow(mlflow_uri), *_tools()]
    if as_json:
        typer.echo(
            json.dumps({"findings": [asdict(finding) for finding in findings], "ok": is_healthy(findings)}, indent=2)
        )
    else:
        _print(findings)
    if not is_healthy(findings):
        raise typer.Exit(1)


def is_healthy(findings: list[Finding]) -> bool:
    """True when nothing needed is missing; warnings are allowed."""
    return all(finding.status != "missing" for finding in findings)


def _packages() -> list[Finding]:
    python = platform.python_version()
    old = sys.version_info < (3, 10)
    findings = [Finding("python", "missing" if old else "ok", python, "install Python 3.10 or newer" if old else "")]
    for name, version in package_versions().items():
        absent = version == "absent"
        mend = f"pip install -c constraints.txt {name}" if absent else ""
        findings.append(Finding(name, "missing" if absent else "ok", version, mend))
    return findings


def _devices() -> list[Finding]:
    try:
        import torch
    except ImportError as error:
        return [Finding("devices", "missing", str(error), "pip install -c constraints.txt torch")]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(count)}))
    findings = [Finding("gpus", "ok", f"{count} ({names})" if count else "0 (CPU runs only)")]
    if not count and torch.version.cuda:
        mend = "make clean && make install (installs the CPU build of constraints.txt)"
        findings.append(Finding("torch build", "warning", f"CUDA {torch.version.cuda} without a GPU", mend))
    if count:
        version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        findings.append(Finding("nccl", "ok", version))
    return findings


def _machine(run_root: Path) -> list[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    folder = run_root.resolve()
    while not folder.exists():
        folder = folder.parent
    disk = shutil.disk_usage(folder)
    low_memory, low_disk = memory.available < MIN_MEMORY_BYTES, disk.free < MIN_DISK_BYTES
    return [
        Finding("cores", "ok", f"{psutil.cpu_count(logical=True)} logical, {psutil.cpu_count(logical=False)} physical"),
        Finding(
            "memory",
            "warning" if low_memory else "ok",
            f"{format_bytes(memory.available)} free of {format_bytes(memory.total)}",
            "close programs, or lower cluster.ranks_per_node" if low_memory else "",
        ),
        Finding(
            "disk",
            "warning" if low_disk else "ok",
            f"{format_bytes(disk.free)} free under {folder}",
            "free space, or choose another run_root" if low_disk else "",
        ),
    ]


def _ray(address: str) -> Finding:
    if not address:
        return Finding("ray cluster", "ok", "none named; a local one is started for each run")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=5):
            return Finding("ray cluster", "ok", f"{address} answers")
    except (OSError, ValueError) as error:
        mend = f"on the head node: ray start --head --port {port or 6379}; then check the firewall"
        return Finding("ray cluster", "missing", f"{address}: {error}", mend)


def _mlflow(uri: str) -> Finding:
    if not uri.startswith("http"):
        return Finding("mlflow", "ok", uri or "none named; a SQLite database in the run root is used")
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5) as answer:
            return Finding("mlflow", "ok", f"{uri} answers {answer.status}")
    except (urllib.error.URLError, OSError, ValueError) as error:
        mend = "mlflow server --host 127.0.0.1 --backend-store-uri sqlite:///runs/mlflow.db"
        return Finding("mlflow", "missing", f"{uri}: {error}", mend)


def _tools() -> list[Finding]:
    bwrap = shutil.which("bwrap")
    sandbox = (
        Finding("bubblewrap", "ok", bwrap)
        if bwrap
        else Finding(
            "bubblewrap",
            "warning",
            "absent: model-written code cannot be scored",
            "apt-get install bubblewrap libseccomp2",
        )
    )
    compiler = shutil.which("gcc") or shutil.which("cc")
    return [
        sandbox,
        Finding("compiler", "ok", compiler)
        if compiler
        else Finding("compiler", "warning", "absent", "apt-get install gcc"),
    ]


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "what", "found", "to mend")
    marks: dict[str, Any] = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "missing": "[red]missing[/]"}
    for finding in findings:
        table.add_row(marks[finding.status], finding.name, finding.value, finding.mend)
    Console().print(table)
