"""Does a generated token cost the same at position 10,000 as at 100? And what does one more chunk of context cost?

    python benchmarks/hsmn_generation.py --json

Generation with `attention_span_tokens` (bounded cache) beside full attention over the target; then one chunk appended to a
long context by `StreamingMemory` beside reading the whole context anew. CPU seconds, medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measuring

from hsmn_dist.config.models import HsmnConfig
from hsmn_dist.models.build import build_model
from hsmn_dist.models.hsmn.model import HsmnModel
from hsmn_dist.models.hsmn.streaming_memory import StreamingMemory

WINDOW = 50
"""Tokens around a position whose median is taken."""


def model_of(span: int, max_target_tokens: int, width: int) -> HsmnModel:
    """A model of the original's depth with the given width and vocabulary 4,096."""
    torch.manual_seed(0)
    config = HsmnConfig(
        vocab_size=4096,
        d_model=width,
        d_feed_forward=4 * width,
        attention_span_tokens=span,
        max_target_tokens=max_target_tokens,
    )
    model = build_model(config).eval()
    assert isinstance(model, HsmnModel)
    return model


def seconds_per_token(span: int, positions: list[int], width: int) -> dict[int, float]:
    """Median CPU seconds of a token around each position."""
    model = model_of(span, max(positions) + WINDOW + 1, width)
    context = torch.randint(4, 4096, (1, 1024))
    found: dict[int, list[float]] = {position: [] for position in positions}
    with torch.inference_mode():
        logits, state = model.start(context, torch.ones_like(context, dtype=torch.bool))
        for index in range(max(positions) + WINDOW):
            start = time.process_time()
            logits, state = model.advance(logits.argmax(dim=-1), state)
            for position in positions:
                if position <= index < position + WINDOW:
                    found[position].append(time.process_time() - start)
    return {position: statistics.median(times) for position, times in found.items()}


def append_cost(num_tokens: int, width: int) -> dict[str, Any]:
    """CPU seconds of one more chunk, nodes and first logits included, beside reading everything anew."""
    model = model_of(0, 64, width)
    context = torch.randint(4, 4096, (1, num_tokens))
    memory = StreamingMemory(model)
    start = time.process_time()
    for piece in context.split(8192, dim=1):
        memory.append(piece)
    memory.nodes()
    anew = time.process_time() - start
    appended, with_nodes = [], []
    for _ in range(7):
        piece = torch.randint(4, 4096, (1, model.config.chunk_stride))
        start = time.process_time()
        memory.append(piece)
        appended.append(time.process_time() - start)
        memory.nodes()
        with_nodes.append(time.process_time() - start)
    return {
        "what": f"one chunk behind {num_tokens} tokens",
        "cpu_seconds": statistics.median(appended),
        "cpu_seconds_with_nodes": statistics.median(with_nodes),
        "anew_cpu_seconds": anew,
        "times_cheaper": anew / statistics.median(appended),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--span", type=int, default=128)
    parser.add_argument("--context", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    for span in (arguments.span, 0):
        times = seconds_per_token(span, arguments.positions, arguments.width)
        first = times[min(times)]
        for position, seconds in times.items():
            what = f"token {position}, span {span or 'all'}"
            rows.append({"what": what, "cpu_seconds": seconds, "over_first": seconds / first})
    rows.append(append_cost(arguments.context, arguments.width))
    measuring.report(rows, measuring.conditions(arguments.threads), arguments.json)


if __name__ == "__main__":
    main()
