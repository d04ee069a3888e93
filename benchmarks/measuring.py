"""Side-by-side timing of several contenders in one process, and peak memory in child processes."""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Step = Callable[[], None]


def interleaved(contenders: Mapping[str, Step], num_repeats: int, num_warmups: int = 1) -> dict[str, dict[str, float]]:
    """Medians of wall and CPU seconds; the contenders take turns, so a busy machine slows all of them alike."""
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(num_warmups + num_repeats):
        for name, step in contenders.items():
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            step()
            if repeat >= num_warmups:
                wall[name].append(time.perf_counter() - wall_start)
                cpu[name].append(time.process_time() - cpu_start)
    return {
        name: {
            "wall_seconds": statistics.median(wall[name]),
            "cpu_seconds": statistics.median(cpu[name]),
            "fastest_cpu_seconds": min(cpu[name]),
        }
        for name in contenders
    }


def peak_bytes_of_child(script: str, arguments: Sequence[str]) -> int:
    """Largest resident memory of `python script arguments...`, which must print it as its last line (`print_peak`)."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout.strip().splitlines()[-1])


def print_peak() -> None:
    """Print this process's largest resident memory in bytes."""
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def conditions(num_threads: int) -> dict[str, Any]:
    """What a reader needs to know to compare the numbers."""
    return {
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "num_threads": num_threads,
        "precision": "fp32",
    }


def report(rows: list[dict[str, Any]], facts: Mapping[str, Any], as_json: bool) -> None:
    """One line of JSON, or a table of the rows (missing numbers as "not measured")."""
    if as_json:
        print(json.dumps({"conditions": dict(facts), "rows": rows}))
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    for line in [columns, *cells]:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
    print(", ".join(f"{key} {value}" for key, value in facts.items()))


def _cell(value: Any) -> str:
    if value is None:
        return "not measured"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
