"""HSMN's part of `train_step.py`: ours in three settings and a dense encoder-decoder, at the original's sizes.

Widths 512, 2 encoder and 7 decoder layers, vocabulary 50,265, 128 targets, one example a step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import measuring
import torch
from dense_encoder_decoder import DenseEncoderDecoder
from torch import Tensor

from hsmn_dist.config.models import HsmnConfig
from hsmn_dist.models.build import build_model
from hsmn_dist.models.contract import ModelInput, cross_entropy
from hsmn_dist.training.activation_checkpointing import checkpoint_blocks

NUM_TARGETS = 128
TINY = {
    "vocab_size": 64,
    "d_model": 32,
    "num_heads": 2,
    "d_feed_forward": 64,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "d_compressed": 8,
    "d_aggregator": 16,
    "aggregator_rank": 4,
}
LEAN = "hsmn, groups of 32, sublayers recomputed"
CHECKPOINTED = "hsmn, groups of 16, all recomputed"
SETTINGS: dict[str, dict[str, Any]] = {
    "hsmn": {},
    "hsmn, groups of 16, attention recomputed": {"encoder_group_chunks": 16, "encoder_recompute": "attention"},
    LEAN: {"encoder_group_chunks": 32, "encoder_recompute": "sublayers"},
    CHECKPOINTED: {"encoder_group_chunks": 16, "encoder_recompute": "all"},
}
DENSE = "dense encoder-decoder"
CONTENDERS = [*SETTINGS, DENSE]
Step = Callable[[], None]


def build_step(name: str, num_context: int, is_tiny: bool) -> tuple[Step, int]:
    """A forward and backward pass of the contender, and its number of parameters."""
    torch.manual_seed(0)
    config = HsmnConfig(**{**(TINY if is_tiny else {}), **SETTINGS.get(name, {})})
    inputs = _random_inputs(config, num_context)
    if name == DENSE:
        model: torch.nn.Module = DenseEncoderDecoder(config).train()

        def loss() -> Tensor:
            return model(inputs)  # type: ignore[no-any-return]
    else:
        ours = build_model(config).train()
        model = ours
        if name == CHECKPOINTED:
            # The groups recompute the encoder as a whole; its layers need no second wrapping.
            for block in ours.blocks[config.num_encoder_layers :]:
                checkpoint_blocks(_OneBlock(block), "every_block")  # type: ignore[arg-type]

        def loss() -> Tensor:
            nll = ours(inputs, target_loss=cross_entropy).nll
            assert nll is not None
            return nll.mean()

    def step() -> None:
        model.zero_grad()
        loss().backward()

    return step, sum(parameter.numel() for parameter in model.parameters())


class _OneBlock:
    """What `checkpoint_blocks` looks at."""

    def __init__(self, block: torch.nn.Module) -> None:
        self.blocks = [block]


def _random_inputs(config: HsmnConfig, num_context: int) -> ModelInput:
    """One example of `num_context` context tokens, every target scored."""
    context = torch.randint(4, config.vocab_size, (1, num_context))
    target = torch.randint(4, config.vocab_size, (1, NUM_TARGETS))
    return ModelInput(
        context, torch.ones_like(context, dtype=torch.bool), target, torch.ones_like(target, dtype=torch.bool)
    )


def rows(arguments: argparse.Namespace, script: str) -> list[dict[str, Any]]:
    """One row for each context length and contender; the dense model up to `arguments.dense_limit`."""
    found = []
    for num_context in arguments.contexts:
        names = [name for name in CONTENDERS if _is_wanted(name, num_context, arguments)]
        built = {name: build_step(name, num_context, arguments.tiny) for name in names}
        bases = {name: DENSE for name in names if name != DENSE} if DENSE in names else {}
        steps = {name: step for name, (step, _) in built.items()}
        times = measuring.interleaved(steps, arguments.repeats, arguments.warmups, bases)
        sizes = {name: size for name, (_, size) in built.items()}
        del built, steps  # a child process needs the memory
        for name in names:
            row: dict[str, Any] = {"family": "hsmn", "model": name, "tokens": num_context, "parameters": sizes[name]}
            row.update(times[name])
            if arguments.memory:
                row["peak_bytes"] = measuring.result_of_child(script, _child_arguments(name, num_context, arguments))
            found.append(row)
    return found


def _is_wanted(name: str, num_context: int, arguments: argparse.Namespace) -> bool:
    if name == DENSE:
        return num_context <= arguments.dense_limit
    return num_context <= arguments.whole_limit or SETTINGS[name] != {}


def _child_arguments(name: str, num_context: int, arguments: argparse.Namespace) -> list[str]:
    child = ["--peak-of", name, "--contexts", str(num_context), "--threads", str(arguments.threads)]
    return [*child, "--tiny"] if arguments.tiny else child


def print_peak(arguments: argparse.Namespace) -> None:
    """What a child process does: two steps, then its peak memory."""
    step, _ = build_step(arguments.peak_of, arguments.contexts[0], arguments.tiny)
    for _ in range(2 if arguments.contexts[0] <= 8192 else 1):
        step()
    print(measuring.peak_bytes())


def goals(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The issue's goals beside what these rows say."""
    by_place = {(row["model"], row["tokens"]): row for row in found}
    entries = [
        ("share of the dense encoder-decoder's CPU time at 8,192", LEAN, 8192, "cpu_share", 1 / 3, 1),
        ("peak memory at 8,192, GB", LEAN, 8192, "peak_bytes", 1.7, 1e9),
        ("peak memory at 65,536, all recomputed, GB", CHECKPOINTED, 65536, "peak_bytes", 2.0, 1e9),
    ]
    listed = []
    for what, name, tokens, column, limit, unit in entries:
        value = by_place.get((name, tokens), {}).get(column)
        listed.append(measuring.goal(what, limit, None if value is None else value / unit))
    for name in SETTINGS:
        pair = [by_place.get((name, tokens), {}).get("cpu_seconds") for tokens in (32768, 65536)]
        if None not in pair:
            listed.append(measuring.goal(f"65,536 over 32,768 tokens, CPU time, {name}", 2.1, pair[1] / pair[0]))
    return listed
