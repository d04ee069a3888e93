"""The token mixers that are not self-modifying: causal softmax attention, and kernelised linear attention.

Unusual: rows of a batch may have prefixes of different lengths in the cache, so a cached key carries a validity bit
instead of a position (rotary angles are already in it). The linear mixer rotates the numerator only (Su et al. 2021,
arXiv 2104.09864, equation 19), so its denominator stays positive. Sources: Vaswani et al. 2017; Katharopoulos et al. 2020
(arXiv 2006.16236, equations 8 to 20).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hsmn_dist.models.hope.decayed_reads import ReadInputs, decayed_reads
from hsmn_dist.models.hope.fast_state import FastState
from hsmn_dist.models.layers.rotary import RotaryTable, rotate
from hsmn_dist.models.precision import wide_type
from hsmn_dist.models.tracing import is_traced


@dataclass
class SequenceInfo:
    """What every block of one forward pass needs to know about its rows.

    Attributes:
        rotary: table of the tokens' positions, or None without rotary positions.
        segments: [B, T] integers that never fall; 0 continues what came before. None: one segment.
        reset: [B, T] bool, True at the first token of every later segment; None without segments.
        valid: [B, T] bool, False on padding (right end only); None when all tokens count.
        mask: [B, 1, T, T] bool for attention inside these tokens; None means plainly causal.
        returns_state: states after the last token are wanted.
        is_real: [B, T] bool, False on padding, for health scalars alone: without a state padding is computed like tokens.
    """

    rotary: RotaryTable | None = None
    segments: Tensor | None = None
    reset: Tensor | None = None
    valid: Tensor | None = None
    mask: Tensor | None = None
    returns_state: bool = False
    is_real: Tensor | None = None


@dataclass
class AttentionState(FastState):
    """Keys and values [B, H, S, K] of the tokens so far; is_valid [B, S] is False on padding."""

    keys: Tensor
    values: Tensor
    is_valid: Tensor


@dataclass
class LinearState(FastState):
    """memory [B, H, 1, K, K] of phi(k) v^T, normaliser [B, H, 1, K, 1] of phi(k)."""

    memory: Tensor
    normaliser: Tensor


def rotated(x: Tensor, info: SequenceInfo) -> Tensor:
    """Rotary positions on [B, H, T, K]; unchanged without tables."""
    return x if info.rotary is None else rotate(x, info.rotary)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, T, D] -> [B, H, T, K]."""
    batch, tokens, width = x.shape
    return x.reshape(batch, tokens, num_heads, width // num_heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, T, K] -> [B, T, D]."""
    return x.transpose(1, 2).flatten(2)


class AttentionMixer(nn.Module):
    """Causal softmax attention over SDPA. Parameters: 4 D^2."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.project = nn.Linear(d_model, 3 * d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self, x: Tensor, state: AttentionState | None, info: SequenceInfo
    ) -> tuple[Tensor, AttentionState | None, dict[str, Tensor]]:
        """[B, T, D] -> [B, T, D], the grown cache when it is wanted, and no health scalars."""
        query, key, value = (split_heads(t, self.num_heads) for t in self.project(x).chunk(3, -1))
        query, key = rotated(query, info), rotated(key, info)
        after = None
        mask = info.mask
        if info.returns_state or state is not None:
            after, mask = self._extended(key, value, state, info)
        keys, values = (key, value) if after is None else (after.keys.to(key.dtype), after.values.to(value.dtype))
        is_causal = mask is None and keys.shape[2] == query.shape[2]
        read = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=is_causal)
        return self.output(merge_heads(read)), after if info.returns_state else None, {}

    def _extended(
        self, key: Tensor, value: Tensor, state: AttentionState | None, info: SequenceInfo
    ) -> tuple[AttentionState, Tensor | None]:
        """The cache with these tokens behind it, and the mask over it (None: plainly causal)."""
        batch, _, tokens, _ = key.shape
        device = key.device
        valid = torch.ones(batch, tokens, dtype=torch.bool, device=device) if info.valid is None else info.valid
        left = valid
        if info.segments is not None:
            # What is left behind is the last segment alone: later tokens may not see the others.
            left = valid & (info.segments == _last_valid(info.segments, valid)[:, None])
        if state is None:
            return AttentionState(key, value, left), info.mask
        old = state.is_valid
        if info.segments is not None:
            old = old & (_last_valid(info.segments, valid) == 0)[:, None]
        after = AttentionState(
            torch.cat([state.keys.to(key.dtype), key], 2),
            torch.cat([state.values.to(value.dtype), value], 2),
            torch.cat([old, left], 1),
        )
        inside = info.mask
        if inside is None:
            inside = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()[None, None]
        cached = state.is_valid[:, None, None, :].expand(-1, 1, tokens, -1)
        if info.segments is not None:
            cached = cached & (info.segments == 0)[:, None, :, None]
        return after, torch.cat([cached, inside.expand(batch, -1, -1, -1)], -1)


def positive_features(x: Tensor) -> Tensor:
    """phi(x) = elu(x) + 1, which rounds to 0 far below 0: held at the smallest value that it can have beside 0.

    Sums of products then never vanish, so that a token whose features all rounded to 0 does not divide 0 by 0.
    """
    if is_traced():
        return _features(x)
    return _PositiveFeatures.apply(x)  # type: ignore[no-any-return,no-untyped-call]


def _features(x: Tensor) -> Tensor:
    return F.elu(x).add_(1.0).clamp_min_(_least(x))


def _least(x: Tensor) -> float:
    return torch.finfo(x.dtype).eps / 2


class _PositiveFeatures(torch.autograd.Function):
    """phi' = min(phi, 1), and 0 where phi is held: below 0 phi is its own derivative, so nothing else is kept or computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        features = _features(x)
        ctx.save_for_backward(features)
        return features

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (features,) = ctx.saved_tensors
        slope = F.threshold(features, _least(features), 0.0)
        return slope.clamp_max_(1.0).mul_(gradient)  # type: ignore[no-any-return]


def running_sum(x: Tensor, size: int) -> Tensor:
    """Sums [B, T, D] of all tokens up to each one, by products inside blocks of `size` tokens.

    A plain `cumsum` over tokens runs on one core, forwards and backwards.
    """
    tokens = x.shape[1]
    size = min(size, tokens)
    num_blocks = -(-tokens // size)
    missing = num_blocks * size - tokens
    blocks = (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(1, (num_blocks, size))
    with torch.autocast(x.device.type, enabled=False):
        inside = torch.ones(size, size, dtype=x.dtype, device=x.device).tril() @ blocks
    # Blocks before, and them alone: their sum less a block's own would round by tokens to come.
    before = F.pad(inside[:, :-1, -1:].cumsum(1), (0, 0, 0, 0, 1, 0))
    return (inside + before).flatten(1, 2)[:, :tokens]


class LinearMixer(nn.Module):
    """Linear attention with phi(x) = elu(x) + 1, chunk-parallel, O(T). Parameters: 4 D^2."""

    def __init__(self, d_model: int, num_heads: int, chunk_size: int) -> None:
        super().__init__()
        self.num_heads, self.chunk_size = num_heads, chunk_size
        self.project = nn.Linear(d_model, 3 * d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self, x: Tensor, state: LinearState | None, info: SequenceInfo
    ) -> tuple[Tensor, LinearState | None, dict[str, Tensor]]:
        """[B, T, D] -> [B, T, D], the memory after the last token when it is wanted, and no health scalars."""
        query, key, value = self.project(x).chunk(3, -1)
        query, key = positive_features(query), positive_features(key)
        total, normaliser = self._normalised(query, key, state, info)
        query, key, value = (split_heads(t, self.num_heads) for t in (query, key, value))
        # Each query by its total, which is as much as dividing what it reads, and needs no weights among tokens.
        gains = 1.0 / total.to(wide_type(total))
        query = (query * gains).to(query.dtype)
        inputs = ReadInputs(query, key, value, segments=info.segments, valid=info.valid, rotary=info.rotary)
        read, memory = decayed_reads(
            inputs, None if state is None else state.memory, self.chunk_size, info.returns_state
        )
        after = None if memory is None or normaliser is None else LinearState(memory, normaliser)
        return self.output(merge_heads(read)), after, {}

    def _normalised(
        self, query: Tensor, key: Tensor, state: LinearState | None, info: SequenceInfo
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, D] twice to phi(q_t) . sum of phi(k_s), s <= t [B, H, T, 1]; and the last sum when it is wanted."""
        if state is None and info.segments is None and not info.returns_state:
            product = query.to(wide_type(query)) * running_sum(key.to(wide_type(key)), self.chunk_size)
            return product.unflatten(-1, (self.num_heads, -1)).sum(-1).transpose(1, 2)[..., None], None
        query, key = split_heads(query, self.num_heads), split_heads(key, self.num_heads)
        ones = torch.ones_like(key[..., :1])
        inputs = ReadInputs(query, key, ones, segments=info.segments, valid=info.valid)
        return decayed_reads(inputs, None if state is None else state.normaliser, self.chunk_size, info.returns_state)


def _last_valid(segments: Tensor, valid: Tensor) -> Tensor:
    """Segment of each row's last valid token (0 for rows without one): [B]."""
    return torch.where(valid, segments, torch.zeros_like(segments)).amax(1)
