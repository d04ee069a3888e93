"""Tiny models, examples dealt to ranks as `iter_split` deals them, and the dense definition of every Fisher estimator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hsmn_dist.config.continual import FisherConfig
from hsmn_dist.config.models import HopeConfig, HsmnConfig, HsmnHopeConfig
from hsmn_dist.config.optim import OptimConfig
from hsmn_dist.config.training import TrainingConfig
from hsmn_dist.continual.labels import signs, target_loss
from hsmn_dist.distributed.world import World
from hsmn_dist.models.build import build_model
from hsmn_dist.models.contract import LanguageModel, ModelInput
from hsmn_dist.training.build import build_engine
from hsmn_dist.training.engine import Engine
from tests.support.hope_models import chain, small_memories
from tests.support.models import TinyModel

VOCAB_SIZE = 29
NUM_CONTEXT, NUM_TARGET = 20, 5
_HSMN = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 12,
    "num_heads": 2,
    "d_feed_forward": 18,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "chunk_size": 8,
    "chunk_stride": 4,
    "d_compressed": 6,
    "d_aggregator": 10,
    "aggregator_rank": 4,
    "max_target_tokens": 16,
}
_HOPE = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 12,
    "num_layers": 2,
    "num_heads": 2,
    "d_feed_forward": 18,
    "num_memory_modules": 3,
    "max_tokens": 64,
}


_OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "tied": {"ties_embeddings": True},
    "self_modifying": {"mixer": "self_modifying", "self_modifying": small_memories()},
    "self_modifying_matrix": {"mixer": "self_modifying", "self_modifying": small_memories(memory="matrix")},
    "optimizer_chain": {"cms": chain(cadence="optimizer", variant="independent")},
    "token_chain": {"cms": chain()},
}


def tiny(name: str) -> LanguageModel:
    """A seeded tiny model: "hsmn", "hope", "hybrid", with an option behind; or "plain" (it has a parameter without a rule)."""
    family, _, option = name.partition(" ")
    torch.manual_seed(11)
    if family == "plain":
        return TinyModel(tied=option == "tied")
    config, settings = {"hsmn": (HsmnConfig, _HSMN), "hope": (HopeConfig, _HOPE), "hybrid": (HsmnHopeConfig, _HSMN)}[
        family
    ]
    model = build_model(config(**settings, **_OPTIONS[option]))
    with torch.no_grad():
        for parameter in model.parameters():  # away from the start, where many gradients vanish
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def engine_of(
    name: str, world: World, engine: str = "local", zero_stage: int = 0, checkpointing: str = "none"
) -> Engine:
    training = TrainingConfig.model_validate(
        {
            "engine": engine,
            "zero_stage": zero_stage,
            "global_batch_examples": 4,
            "micro_batch_examples": 1,
            "activation_checkpointing": checkpointing,
            "persistent_parameter_elements": 20,
        }
    )
    return build_engine(training, OptimConfig(), lambda: tiny(name), world)


def examples(num_examples: int, seed: int = 0) -> dict[str, Tensor]:
    """A batch of examples of different lengths; contexts may be empty."""
    generator = torch.Generator().manual_seed(seed)

    def draw(num_tokens: int, shortest: int) -> tuple[Tensor, Tensor]:
        lengths = torch.randint(shortest, num_tokens + 1, (num_examples, 1), generator=generator)
        mask = torch.arange(num_tokens)[None] < lengths
        return torch.randint(4, VOCAB_SIZE, mask.shape, generator=generator) * mask, mask

    context, context_mask = draw(NUM_CONTEXT, 0)
    target, loss_mask = draw(NUM_TARGET, 1)
    return {
        "context_ids": context,
        "context_mask": context_mask,
        "target_ids": target,
        "loss_mask": loss_mask,
        "example_index": torch.arange(num_examples) * 7 + 3,
    }


def dealt(batch: dict[str, Tensor], micro: int, rank: int = 0, world_size: int = 1) -> Iterator[dict[str, Tensor]]:
    """Micro-batches of one rank: blocks of `micro` examples, rank after rank; rows beyond the end are padding."""
    total = batch["target_ids"].shape[0]
    for start in range(0, total, micro * world_size):
        rows = torch.arange(micro) + start + rank * micro
        part = {key: value[rows.clamp(max=total - 1)].clone() for key, value in batch.items()}
        part["loss_mask"][rows >= total] = False
        part["example_index"][rows >= total] = -1
        yield part


def example_loss(model: LanguageModel, batch: dict[str, Tensor], row: int, config: FisherConfig) -> Tensor:
    """The loss of one example alone, by the definition."""
    one = {key: value[row : row + 1] for key, value in batch.items()}
    inputs = ModelInput(one["context_ids"], one["context_mask"], one["target_ids"], one["loss_mask"])
    nll = model(inputs, target_loss=target_loss(config.estimator, config.seed, one["example_index"])).nll
    total = nll.sum()
    return total / one["loss_mask"].sum() if config.example_reduction == "mean" else total


def dense_fisher(model: LanguageModel, batch: dict[str, Tensor], config: FisherConfig) -> dict[str, Tensor]:
    """Every estimator as continual.md defines it: one example's gradient after the other, in order, on one process."""
    model.eval()
    names, parameters = zip(*model.named_parameters(), strict=True)
    total = batch["target_ids"].shape[0]

    def gradient(row: int) -> list[Tensor]:
        found = torch.autograd.grad(example_loss(model, batch, row, config), parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]

    def summed_over(rows: range, weight: Callable[[int], float]) -> list[Tensor]:
        parts = [[weight(row) * g for g in gradient(row)] for row in rows]
        return [sum(column) for column in zip(*parts, strict=True)]

    size, weight, divisor = 1, lambda row: 1.0, total
    if config.estimator in ("sampled_sum", "signed_sum"):
        size = -(-total // min(config.num_groups, total))
        if config.estimator == "signed_sum":
            sign = signs(config.seed, batch["example_index"]).tolist()
            weight = lambda row: sign[row]  # noqa: E731
    elif config.estimator == "microbatch":
        size = config.micro_batch_examples
        divisor = -(-total // size)
    result = [torch.zeros_like(p) for p in parameters]
    for start in range(0, total, size):
        group = range(start, min(start + size, total))
        for squares, part in zip(result, summed_over(group, weight), strict=True):
            scale = len(group) if config.estimator == "microbatch" else 1
            squares += (part / scale).square()
    return {name: squares / divisor for name, squares in zip(names, result, strict=True)}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in the Euclidean norm; 0 where both are zero."""
    scale = float(expected.norm())
    error = float((found.reshape(-1) - expected.reshape(-1)).norm())
    return error / scale if scale else error
