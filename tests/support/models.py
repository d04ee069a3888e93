"""A tiny language model: a few hundred parameters of odd sizes, so that a training step takes a millisecond.

It has what makes sharding hard: a parameter that the model owns directly, a tied head if asked, sizes that no number of ranks
divides, and a part of its own for "encoder" and "decoder".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hsmn_dist.foundation.param_role import ParamRole
from hsmn_dist.models.contract import BOS_ID, LanguageModel, ModelInput, ModelOutput, TargetLoss

VOCAB_SIZE = 29


class TinyBlock(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 2 * width - 1)
        self.narrow = nn.Linear(2 * width - 1, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.narrow(torch.tanh(self.wide(self.norm(x)))))


class TinyModel(LanguageModel):
    def __init__(self, width: int = 7, num_blocks: int = 2, dropout: float = 0.0, tied: bool = False) -> None:
        super().__init__()
        self.vocab_size = VOCAB_SIZE
        self.embedding = nn.Embedding(VOCAB_SIZE, width)
        self.context_gain = nn.Parameter(torch.ones(width))
        self.layers = nn.ModuleList(TinyBlock(width, dropout) for _ in range(num_blocks))
        self.head = None if tied else nn.Linear(width, VOCAB_SIZE)
        self.init_weights()

    def forward(self, inputs: ModelInput, state: Any = None, target_loss: TargetLoss | None = None) -> ModelOutput:
        shifted = torch.cat([torch.full_like(inputs.target_ids[:, :1], BOS_ID), inputs.target_ids[:, :-1]], dim=1)
        x = self.embedding(shifted)
        counts = torch.arange(1, x.shape[1] + 1, device=x.device).view(1, -1, 1).to(x.dtype)
        x = (
            x
            + x.cumsum(1) / counts
            + self._context(inputs.context_ids, inputs.context_mask)[:, None] * self.context_gain
        )
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x) if self.head is not None else nn.functional.linear(x, self.embedding.weight)
        if target_loss is None:
            return ModelOutput(logits=logits)
        rows, positions = inputs.loss_mask.nonzero(as_tuple=True)
        losses = target_loss(logits[rows, positions], inputs.target_ids[rows, positions], rows, positions)
        nll = torch.zeros_like(inputs.loss_mask, dtype=torch.float32).index_put((rows, positions), losses)
        return ModelOutput(nll=nll)

    def _context(self, ids: Tensor, mask: Tensor) -> Tensor:
        weights = mask.to(self.context_gain.dtype)[..., None]
        return (self.embedding(ids) * weights).sum(1) / weights.sum(1).clamp(min=1)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.layers)

    def parameter_roles(self) -> dict[str, ParamRole]:
        roles = {}
        for name, parameter in self.named_parameters():
            num_axes = len(getattr(parameter, "ds_shape", parameter.shape))
            roles[name] = ParamRole.MATRIX if num_axes == 2 else ParamRole.VECTOR
        roles["embedding.weight"] = ParamRole.EMBEDDING
        if self.head is not None:
            roles["head.weight"] = ParamRole.HEAD
        return roles

    def parameter_components(self) -> dict[str, str]:
        names = [name for name, _ in self.named_parameters()]
        return {name: "encoder" if name.startswith(("embedding", "context")) else "decoder" for name in names}

    def init_weights(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def start(self, context_ids: Tensor, context_mask: Tensor) -> tuple[Tensor, Any]:
        empty = context_ids.new_zeros(context_ids.shape[0], 0)
        return self._next(context_ids, context_mask, empty), (context_ids, context_mask, empty)

    def advance(self, token_ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        context_ids, context_mask, target = state
        target = torch.cat([target, token_ids[:, None]], dim=1)
        return self._next(context_ids, context_mask, target), (context_ids, context_mask, target)

    def _next(self, context_ids: Tensor, context_mask: Tensor, target: Tensor) -> Tensor:
        padded = torch.cat([target, target.new_zeros(target.shape[0], 1)], dim=1)
        logits = self(ModelInput(context_ids, context_mask, padded, torch.ones_like(padded, dtype=torch.bool))).logits
        return logits[:, -1]


def tiny_batch(seed: int, num_examples: int = 4, num_context: int = 5, num_target: int = 6) -> ModelInput:
    """A batch that depends on the seed alone; rows have different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(num_tokens: int) -> Tensor:
        return torch.randint(4, VOCAB_SIZE, (num_examples, num_tokens), generator=generator)

    def lengths(num_tokens: int) -> Tensor:
        ends = torch.randint(1, num_tokens + 1, (num_examples, 1), generator=generator)
        return torch.arange(num_tokens)[None] < ends

    return ModelInput(draw(num_context), lengths(num_context), draw(num_target), lengths(num_target))


def rows_of(batch: ModelInput, start: int, stop: int) -> ModelInput:
    """Some rows of a batch."""
    return ModelInput(
        batch.context_ids[start:stop],
        batch.context_mask[start:stop],
        batch.target_ids[start:stop],
        batch.loss_mask[start:stop],
    )
