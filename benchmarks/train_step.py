"""Seconds and memory of a training step (forward and backward, fp32): both families beside plain models of the same size.

    python benchmarks/train_step.py --json                        # everything: half an hour on 2 cores
    python benchmarks/train_step.py --json --quick                # the sizes that the goals speak of, without the longest
    python benchmarks/train_step.py --json --family hope --sequences 1024 2048
    python benchmarks/train_step.py --json --family hsmn --contexts 32768 65536 --memory

Contenders take turns in one process and medians are given, with the CPU time as a share of the dense model's in the same round.
Peak memory comes from a child process for each contender. `goals` in the output sets the figures beside what was asked for.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hope_contenders
import hsmn_contenders
import measuring

QUOTED = {
    "source": "quoted from the issue, not measured here; CPU seconds of a step",
    "hsmn at context 8,192: the TensorFlow original": 22.9,
    "hsmn at context 8,192: dense encoder-decoder": 28.9,
    "hope, step of 512 tokens: nested_learning": [20, 43],
    "hope, step of 512 tokens: titans-pytorch MAC": 7.6,
    "hope, step of 512 tokens: dense decoder": 0.95,
}


def parsed() -> argparse.Namespace:
    """Command line; `--quick` and `--tiny` only change defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=["all", "hsmn", "hope"], default="all")
    parser.add_argument("--contexts", type=int, nargs="+", help="HSMN: context tokens")
    parser.add_argument("--sequences", type=int, nargs="+", help="HOPE: tokens of a row")
    parser.add_argument("--only", default="", help="HOPE: contenders whose name contains this")
    parser.add_argument("--dense-limit", type=int, default=8192, help="longest context of the dense encoder-decoder")
    parser.add_argument("--whole-limit", type=int, default=16384, help="longest context of HSMN without groups")
    parser.add_argument("--titans-limit", type=int, default=1024, help="longest row of titans-pytorch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmups", type=int, help="rounds until the heap they share has found its size (6, quick 3)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=None, help="HSMN: peak memory too")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, two rounds, no memory: under nine minutes")
    parser.add_argument("--tiny", action="store_true", help="toy models and sizes, to see that the script works")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warmups = 6
    contexts, sequences = [1024, 4096, 8192, 16384, 32768, 65536], [256, 512, 1024, 2048, 4096, 8192]
    if arguments.quick:
        contexts, sequences, arguments.repeats, warmups = [1024, 8192], [1024, 2048], 2, 3
    if arguments.tiny:
        contexts, sequences, arguments.repeats, warmups = [300], [70], 1, 1
    arguments.warmups = warmups if arguments.warmups is None else arguments.warmups
    arguments.contexts = arguments.contexts or contexts
    arguments.sequences = arguments.sequences or sequences
    if arguments.memory is None:
        arguments.memory = not arguments.quick
    return arguments


def main() -> None:
    arguments = parsed()
    measuring.prepare_process(arguments.threads)
    if arguments.peak_of:
        hsmn_contenders.print_peak(arguments)
        return
    facts = measuring.conditions(arguments.threads)
    rows: list[dict[str, Any]] = []
    if arguments.family in ("all", "hope"):
        rows += hope_contenders.rows(arguments)
    if arguments.family in ("all", "hsmn"):
        rows += hsmn_contenders.rows(arguments, __file__)
    goals = [] if arguments.tiny else [*hsmn_contenders.goals(rows), *hope_contenders.goals(rows)]
    measuring.report(rows, facts, arguments.json, goals=goals, quoted=QUOTED)


if __name__ == "__main__":
    main()
