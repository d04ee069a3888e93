"""Does a generated token cost the same at position 10,000 as at 100? And what does one more chunk of context cost?

    python benchmarks/generation.py --json

Two copies of each model's state, one near each position, are advanced in turns, and medians of CPU seconds are compared, so a
busy machine slows both alike; the bytes of the states are counted. Then one chunk is appended to a long context by
`StreamingMemory`, beside reading the whole context anew. HSMN is measured with a bounded attention span and, for contrast,
without; HOPE with its linear and self-modifying mixers and, for contrast, with softmax attention.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measuring

from hsmn_dist.config.models import HopeConfig, HsmnConfig
from hsmn_dist.models.build import build_model
from hsmn_dist.models.contract import LanguageModel
from hsmn_dist.models.hsmn.model import HsmnModel
from hsmn_dist.models.hsmn.streaming_memory import StreamingMemory

CONTEXT_TOKENS = 256
GOAL_OVER_FIRST = 1.2
GOAL_TIMES_CHEAPER = 100


def hsmn(arguments: argparse.Namespace, span: int = 0, max_target_tokens: int = 64) -> HsmnModel:
    """The original's depth; width and vocabulary as asked for."""
    torch.manual_seed(0)
    config = HsmnConfig(
        vocab_size=arguments.vocab,
        d_model=arguments.width,
        d_feed_forward=4 * arguments.width,
        attention_span_tokens=span,
        max_target_tokens=max_target_tokens,
    )
    model = build_model(config).eval()
    assert isinstance(model, HsmnModel)
    return model


def hope(arguments: argparse.Namespace, mixer: str) -> LanguageModel:
    """Four layers of half HSMN's width, as in `train_step.py`."""
    torch.manual_seed(0)
    width = arguments.width // 2
    config = HopeConfig(
        vocab_size=arguments.vocab,
        d_model=width,
        num_layers=4,
        num_heads=4,
        d_feed_forward=4 * width,
        mixer=mixer,
    )
    return build_model(config).eval()


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor of a decoding state, however it is nested."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    if dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
        return tensors_in(vars(value))
    return []


def state_bytes(state: Any) -> int:
    """Bytes that a state keeps alive; a storage that several tensors share counts once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors_in(state)}
    return sum(storage.nbytes() for storage in storages.values())


def advanced(model: LanguageModel, num_tokens: int) -> tuple[Tensor, Any]:
    """Logits and state after `num_tokens` generated tokens."""
    context = torch.randint(4, model.vocab_size, (1, CONTEXT_TOKENS))
    logits, state = model.start(context, torch.ones_like(context, dtype=torch.bool))
    for _ in range(num_tokens):
        logits, state = model.advance(logits.argmax(dim=-1), state)
    return logits, state


def token_rows(name: str, model: LanguageModel, arguments: argparse.Namespace, has_goal: bool) -> list[dict[str, Any]]:
    """CPU seconds and state bytes of a token around each position."""
    with torch.inference_mode():
        runs = {position: advanced(model, position) for position in arguments.positions}
        seconds: dict[int, list[float]] = {position: [] for position in runs}
        for _ in range(arguments.window):
            for position, (logits, state) in list(runs.items()):
                start = time.process_time()
                runs[position] = model.advance(logits.argmax(dim=-1), state)
                seconds[position].append(time.process_time() - start)
    medians = {position: statistics.median(times) for position, times in seconds.items()}
    held = {position: state_bytes(state) for position, (_, state) in runs.items()}
    first = min(medians)
    return [
        {
            "model": name,
            "token": position,
            "cpu_seconds": medians[position],
            "over_first": medians[position] / medians[first],
            "state_bytes": held[position],
            "bytes_over_first": held[position] / held[first],
            "has_goal": has_goal,
        }
        for position in sorted(medians)
    ]


def append_row(arguments: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of one more chunk, alone and with the nodes the decoder reads, beside reading everything anew."""
    model = hsmn(arguments)
    context = torch.randint(4, arguments.vocab, (1, arguments.context))
    memory = StreamingMemory(model)
    start = time.process_time()
    for piece in context.split(8192, dim=1):
        memory.append(piece)
    memory.nodes()
    anew = time.process_time() - start
    appended, with_nodes = [], []
    for _ in range(9):
        piece = torch.randint(4, arguments.vocab, (1, model.config.chunk_stride))
        start = time.process_time()
        memory.append(piece)
        appended.append(time.process_time() - start)
        memory.nodes()
        with_nodes.append(time.process_time() - start)
    return {
        "model": "hsmn",
        "context": arguments.context,
        "anew_cpu_seconds": anew,
        "append_cpu_seconds": statistics.median(appended),
        "times_cheaper": anew / statistics.median(appended),
        "append_and_nodes_cpu_seconds": statistics.median(with_nodes),
        "times_cheaper_with_nodes": anew / statistics.median(with_nodes),
    }


def goals(rows: list[dict[str, Any]], append: dict[str, Any]) -> list[dict[str, Any]]:
    """The issue's goals beside what these rows say."""
    listed = []
    for row in rows:
        if row["has_goal"] and row["over_first"] != 1.0:
            for column in ("over_first", "bytes_over_first"):
                what = f"{row['model']}, token {row['token']}, {column}"
                listed.append(measuring.goal(what, GOAL_OVER_FIRST, row[column]))
    share = 1.0 / append["times_cheaper_with_nodes"]
    listed.append(measuring.goal("cost of one more chunk over reading anew", 1 / GOAL_TIMES_CHEAPER, share))
    return listed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, nargs="+", default=[100, 10000])
    parser.add_argument("--window", type=int, default=60, help="tokens around a position whose median is taken")
    parser.add_argument("--span", type=int, default=128, help="target tokens back that HSMN's bounded form sees")
    parser.add_argument("--context", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1, help="one: a token's products are too small for two")
    parser.add_argument("--contrasts", action="store_true", help="also the two forms whose cost may grow (minutes)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that the script works")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.positions, arguments.window, arguments.span = [10, 40], 4, 8
        arguments.context, arguments.width, arguments.vocab, arguments.contrasts = 2000, 64, 64, True
    measuring.prepare_process(arguments.threads)
    facts = measuring.conditions(arguments.threads)
    longest = max(arguments.positions) + arguments.window + 1
    contenders = [
        (f"hsmn, span {arguments.span}", lambda: hsmn(arguments, arguments.span, longest), True),
        ("hope, linear", lambda: hope(arguments, "linear"), True),
        ("hope, self-modifying", lambda: hope(arguments, "self_modifying"), True),
        ("hsmn, all earlier tokens", lambda: hsmn(arguments, 0, longest), False),
        ("hope, attention", lambda: hope(arguments, "attention"), False),
    ]
    rows = [
        row
        for name, build, has_goal in contenders
        if has_goal or arguments.contrasts
        for row in token_rows(name, build(), arguments, has_goal)
    ]
    append = append_row(arguments)
    measuring.report(rows, facts, arguments.json, append=append, goals=goals(rows, append))


if __name__ == "__main__":
    main()
