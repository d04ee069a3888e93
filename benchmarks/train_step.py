"""Seconds and memory of a training step (forward and backward, fp32): ours beside a plain dense model of the same size.

    python benchmarks/train_step.py --json --contexts 1024 8192

HSMN at the original's sizes (dim 512, 2 encoder and 7 decoder layers, vocabulary 50,265, target 128). Contenders take turns
in one process and medians are given; peak memory comes from a child process each (`--memory`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measuring
from dense_encoder_decoder import DenseEncoderDecoder

from hsmn_dist.config.models import HsmnConfig
from hsmn_dist.models.build import build_model
from hsmn_dist.models.contract import ModelInput, cross_entropy

NUM_TARGETS = 128
CHECKPOINTED_GROUP = 64
"""Chunks that the checkpointed contender encodes at a time."""


def hsmn_config(group_chunks: int = 0) -> HsmnConfig:
    """The original's sizes, which are the defaults."""
    return HsmnConfig(encoder_group_chunks=group_chunks)


def random_inputs(config: HsmnConfig, num_context: int) -> ModelInput:
    """One example of `num_context` context tokens, every target scored."""
    context = torch.randint(4, config.vocab_size, (1, num_context))
    target = torch.randint(4, config.vocab_size, (1, NUM_TARGETS))
    return ModelInput(
        context, torch.ones_like(context, dtype=torch.bool), target, torch.ones_like(target, dtype=torch.bool)
    )


def hsmn_step(num_context: int, group_chunks: int = 0) -> tuple[Callable[[], None], int]:
    """A step of ours, and its number of parameters; with `group_chunks` also the decoder blocks are recomputed."""
    config = hsmn_config(group_chunks)
    torch.manual_seed(0)
    model = build_model(config).train()
    if group_chunks:
        for block in model.decoder.blocks:  # type: ignore[union-attr]
            forward = block.forward
            block.forward = lambda *args, inner=forward: checkpoint(inner, *args, use_reentrant=False)

    def loss(inputs: ModelInput) -> Tensor:
        nll = model(inputs, target_loss=cross_entropy).nll
        assert nll is not None
        return nll.mean()

    return _step(loss, model, config, num_context)


def dense_step(num_context: int) -> tuple[Callable[[], None], int]:
    """A step of the plain encoder-decoder, and its number of parameters."""
    config = hsmn_config()
    torch.manual_seed(0)
    model = DenseEncoderDecoder(config).train()
    return _step(model, model, config, num_context)


def _step(
    loss: Callable[[ModelInput], Tensor], model: torch.nn.Module, config: HsmnConfig, num_context: int
) -> tuple[Callable[[], None], int]:
    inputs = random_inputs(config, num_context)

    def step() -> None:
        model.zero_grad()
        loss(inputs).backward()

    return step, sum(parameter.numel() for parameter in model.parameters())


HSMN_CONTENDERS: dict[str, Callable[[int], tuple[Callable[[], None], int]]] = {
    "hsmn": hsmn_step,
    "hsmn_checkpointed": lambda num_context: hsmn_step(num_context, CHECKPOINTED_GROUP),
    "dense_encoder_decoder": dense_step,
}


def hsmn_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each context length and contender."""
    rows = []
    for num_context in arguments.contexts:
        names = [
            n for n in arguments.contenders if n != "dense_encoder_decoder" or num_context <= arguments.dense_limit
        ]
        built = {name: HSMN_CONTENDERS[name](num_context) for name in names}
        times = measuring.interleaved(
            {name: step for name, (step, _) in built.items()}, arguments.repeats, arguments.warmups
        )
        dense = times.get("dense_encoder_decoder", {}).get("cpu_seconds")
        for name in names:
            row: dict[str, Any] = {"model": name, "context": num_context, "parameters": built[name][1], **times[name]}
            row["cpu_share_of_dense"] = None if dense is None else times[name]["cpu_seconds"] / dense
            if arguments.memory:
                child = ["--only", name, "--contexts", str(num_context), "--threads", str(arguments.threads)]
                row["peak_bytes"] = measuring.peak_bytes_of_child(__file__, child)
            rows.append(row)
        del built
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--contenders", nargs="+", choices=list(HSMN_CONTENDERS), default=list(HSMN_CONTENDERS))
    parser.add_argument("--dense-limit", type=int, default=8192, help="longest context of the dense model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmups", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="also measure peak memory, each in a child process")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.only:
        HSMN_CONTENDERS[arguments.only](arguments.contexts[0])[0]()
        measuring.print_peak()
        return
    measuring.report(hsmn_rows(arguments), measuring.conditions(arguments.threads), arguments.json)


if __name__ == "__main__":
    main()
