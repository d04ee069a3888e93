"""The model benchmarks run on toy sizes and print what their readers parse. No speed is asserted here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def started(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def printed(script: str, *arguments: str) -> dict[str, Any]:
    done = started(script, *arguments, "--tiny", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["conditions"]["torch"] == torch.__version__
    return result


def test_the_training_step_of_hope_is_compared_with_a_dense_decoder_of_its_size():
    rows = [row for row in printed("train_step.py", "--family", "hope")["rows"] if "status" not in row]
    assert {"attention + decay CMS", "linear + decay CMS", "self-modifying + decay CMS"} <= {r["model"] for r in rows}
    for row in rows:
        assert row["cpu_seconds"] > 0 and row["dense_cpu_seconds"] > 0 and math.isfinite(row["cpu_share"])
        assert abs(row["dense_parameters"] / row["parameters"] - 1) < 0.02


def test_the_training_step_of_hsmn_is_compared_with_a_dense_encoder_decoder():
    rows = printed("train_step.py", "--family", "hsmn", "--no-memory")["rows"]
    assert len({row["parameters"] for row in rows if row["model"].startswith("hsmn")}) == 1
    assert all(row["cpu_share"] > 0 for row in rows if row["model"].startswith("hsmn"))


def test_peak_memory_is_the_childs_own():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import measuring
    finally:
        sys.path.pop(0)
    ballast = torch.ones(200_000_000)  # 800 MB that a child must not inherit
    child = ["--tiny", "--peak-of", "hsmn", "--contexts", "300"]
    assert 10**8 < measuring.result_of_child(str(ROOT / "benchmarks/train_step.py"), child) < 7 * 10**8 < ballast.nbytes


def test_generation_compares_early_and_late_tokens_and_an_appended_chunk():
    result = printed("generation.py")
    for name in ("hsmn, span 8", "hope, linear", "hope, self-modifying"):
        early, late = (row for row in result["rows"] if row["model"] == name)
        assert early["token"] < late["token"] and late["over_first"] > 0
        assert late["bytes_over_first"] == 1.0
    assert result["append"]["times_cheaper"] > 1
    assert {goal["is_reached"] for goal in result["goals"]} <= {True, False}


@pytest.mark.parametrize("size", [[], ["--demo"]])
def test_the_checkpoint_benchmark_gives_the_stall_as_a_share_of_the_steps_between_two_saves(size: list[str]) -> None:
    result = printed("checkpoint.py", *size)
    ways = result["ways"]
    assert ways.keys() == {"none", "torch_save", "synchronous", "background"}
    assert all(ways[way]["stall_seconds"] > 0 for way in ways if way != "none")
    (goal,) = result["goals"]
    seconds_between = ways["none"]["run_seconds"] / 2  # four steps, a save after every second
    assert goal["found"] == pytest.approx(ways["background"]["stall_seconds"] / seconds_between)
    assert goal["at_most"] == 0.05 and goal["is_reached"] == (goal["found"] <= 0.05)


def test_the_gpu_benchmark_runs_on_a_cpu_in_its_tiny_form():
    rows = printed("gpu_step.py", "--device", "cpu")["rows"]
    assert [(row["family"], row["model"]) for row in rows] == [
        (family, model) for family in ("hsmn", "hope") for model in ("ours", "plain")
    ]
    assert all(row["tokens_per_second"] > 0 and 0 < row["mfu"] < 1 and row["peak_bytes"] > 0 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_gpu_benchmark_refuses_a_machine_without_a_gpu():
    done = started("gpu_step.py", "--json")
    assert done.returncode == 3 and not done.stdout
    assert "no CUDA device" in done.stderr and "--device cpu --tiny" in done.stderr and "Traceback" not in done.stderr
