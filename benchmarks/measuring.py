"""Side-by-side timing of several contenders in one process, and peak memory in child processes."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hsmn_dist.foundation.process_memory import ask_for_huge_pages, keep_freed_blocks

Step = Callable[[], None]


def interleaved(
    contenders: Mapping[str, Step],
    num_repeats: int,
    num_warmups: int = 1,
    bases: Mapping[str, str] | None = None,
) -> dict[str, dict[str, float]]:
    """Medians of wall and CPU seconds; the contenders take turns, so a busy machine slows all of them alike.

    `bases` names the contender that another one is compared with: `cpu_share` is the median over the rounds of the quotient
    of their CPU seconds in the same round.
    """
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(num_warmups + num_repeats):
        for name, step in contenders.items():
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            step()
            if repeat >= num_warmups:
                wall[name].append(time.perf_counter() - wall_start)
                cpu[name].append(time.process_time() - cpu_start)
    found = {
        name: {
            "wall_seconds": statistics.median(wall[name]),
            "cpu_seconds": statistics.median(cpu[name]),
            "fastest_cpu_seconds": min(cpu[name]),
        }
        for name in contenders
    }
    for name, base in (bases or {}).items():
        rounds = zip(cpu[name], cpu[base], strict=True)
        found[name]["cpu_share"] = statistics.median(ours / theirs for ours, theirs in rounds)
    return found


def result_of_child(script: str, arguments: Sequence[str]) -> Any:
    """What `python script arguments...` printed as its last line, a JSON value.

    Raises:
        RuntimeError: the child failed; with the end of what it said.
    """
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak_bytes() -> int:
    """This process's largest resident memory so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: a started program inherits that from the program that started it.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def prepare_process(num_threads: int) -> None:
    """Threads, and malloc as training processes set it."""
    torch.set_num_threads(num_threads)
    keep_freed_blocks()
    ask_for_huge_pages()


def conditions(num_threads: int) -> dict[str, Any]:
    """What a reader needs to know to compare the numbers."""
    return {
        "torch": torch.__version__,
        "processor": _processor(),
        "num_cores": len(os.sched_getaffinity(0)),
        "num_threads": num_threads,
        "load_average": os.getloadavg()[0],
        "precision": "fp32",
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def goal(what: str, limit: float, found: float | None) -> dict[str, Any]:
    """A goal (at most `limit`) beside what was found; None is "not measured" and reaches nothing."""
    return {"what": what, "at_most": limit, "found": found, "is_reached": None if found is None else found <= limit}


def report(rows: list[dict[str, Any]], facts: Mapping[str, Any], as_json: bool, **more: Any) -> None:
    """One line of JSON, or a table of the rows (missing numbers as "not measured"); `more` are further parts."""
    if as_json:
        print(json.dumps({"conditions": dict(facts), "rows": rows, **more}))
        return
    _print_table(rows)
    for name, part in more.items():
        print(f"\n{name}")
        _print_table(part if isinstance(part, list) else [part])
    print("\n" + ", ".join(f"{key} {value}" for key, value in facts.items()))


def _print_table(rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    for line in [columns, *cells]:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def _cell(value: Any) -> str:
    if value is None:
        return "not measured"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
