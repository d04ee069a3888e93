"""Decaying memories chunk by chunk: one forward pass, and its gradients written out.

    reads = (Q K^T * mix) V + Q' starts        mix = sum_m gain_m table_m,  Q' = gain_m read_m Q for each far module m

Unusual: autograd would keep and fill dozens of temporaries for these few products; here the gradients add up in one buffer for
each input. Chunks are the outermost dimension, so that "all but the first" is a block and no product copies its operands.
Compiled, under torch.func, and for gradients of the decays autograd differentiates the same forward pass. Source: `decayed_reads.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hsmn_dist.models.tracing import is_traced


class ReadPlan(NamedTuple):
    """What does not depend on the tokens' content; b = B, or 1 when all rows agree. F near modules come before S far ones.

    Attributes:
        table: [M, C, C] weight of token j's write in the reads of token i of the same chunk.
        is_same: [n, b, 1, C, C] 1 where both are of one segment, else 0; None without segments.
        near_table: [F, w, w] weight of the last w tokens' writes of the chunk before; None where every module is far.
        near_is_same: [n - 1, b, 1, w, w]; None without segments.
        write: [n', b, 1, S, C] weight of a write in the state behind its chunk; None for one module that writes everything.
        fading: [n', b, 1, S * K, 1] what a chunk leaves of the state in front of it.
        read: [n, b, 1, S, C] what a token still reads of the state in front of its chunk; None for all of one module.
        returns_memory: the state behind the last chunk is wanted; n' is then n, else n - 1.
    """

    table: Tensor
    is_same: Tensor | None
    near_table: Tensor | None
    near_is_same: Tensor | None
    write: Tensor | None
    fading: Tensor
    read: Tensor | None
    returns_memory: bool

    @property
    def num_near(self) -> int:
        """F."""
        return 0 if self.near_table is None else self.near_table.shape[0]

    @property
    def window(self) -> int:
        """w; 0 where every module is far."""
        return 0 if self.near_table is None else self.near_table.shape[-1]


def chunked_reads(
    query: Tensor, key: Tensor, value: Tensor, gains: Tensor | None, memory: Tensor | None, plan: ReadPlan
) -> tuple[Tensor, Tensor | None]:
    """Reads [n, B, H, C, J], and the state [B, H, S * K, J] behind the last chunk when the plan returns it.

    Args:
        query: [n, B, H, C, K], contiguous.
        key: as `query`.
        value: [n, B, H, C, J], contiguous.
        gains: [n, B, H, M, C], fp32 or wider; None: all are 1.
        memory: [B, H, S * K, J] in front of the first chunk, fp32 or wider; None for zeros.
        plan: the constants.
    """
    if is_traced() or plan.table.requires_grad or not torch.is_grad_enabled():
        reads, after, _ = _forward(query, key, value, gains, memory, plan)
        return reads, after
    return _ChunkedReads.apply(query, key, value, gains, memory, plan)  # type: ignore[no-any-return,no-untyped-call]


class _Kept(NamedTuple):
    """Intermediate results that the backward pass needs; the last three are None where no state is read or written."""

    scores: Tensor | None  # [n, B, H, C, C]; None without gains
    mix: Tensor  # [n, B, H, C, C], of any strides; [C, C] where all chunks share it
    weighted: Tensor  # [n, B, H, C, C]
    scaled_query: Tensor | None  # [n or n - 1, B, H, C, S * K]
    scaled_key: Tensor | None  # [n', B, H, C, S * K]
    starts: Tensor | None  # [n or n - 1, B, H, S * K, J], states that are read


def _forward(
    query: Tensor, key: Tensor, value: Tensor, gains: Tensor | None, memory: Tensor | None, plan: ReadPlan
) -> tuple[Tensor, Tensor | None, _Kept]:
    scores = query @ key.mT
    mix = _mixed(gains, plan.table, plan.is_same).to(scores.dtype)
    weighted = scores * mix
    reads = weighted @ value
    scaled_query = scaled_key = starts = None
    if plan.near_table is not None:
        near_scores, near_mix, near_value = _near_parts(query, key, value, gains, plan)
        reads[1:, :, :, : plan.window].add_((near_scores * near_mix) @ near_value)
    states = None if memory is None else memory[None]
    if num_writes := len(plan.fading):
        scaled_key = _scaled(key[:num_writes], plan.write)
        writes = (scaled_key.mT @ value[:num_writes]).to(plan.table.dtype)
        states = _accumulated(writes if states is None else torch.cat([states, writes]), plan)
    first = 1 if memory is None else 0
    if states is not None and len(query) > first:
        starts = states[: len(query) - first]
        scaled_query = _scaled(query[first:], _read_weights(gains, plan, first))
        reads[first:].add_(scaled_query @ starts.to(query.dtype))
    after = states[-1] if states is not None and plan.returns_memory else None
    return reads, after, _Kept(None if gains is None else scores, mix, weighted, scaled_query, scaled_key, starts)


def _read_weights(gains: Tensor | None, plan: ReadPlan, first: int) -> Tensor | None:
    """Weights [.., S, C] of the states in the reads of chunks `first` and later; None: 1."""
    read = None if plan.read is None else plan.read[first:]
    if gains is None:
        return read
    far = gains[first:, :, :, plan.num_near :]
    return far if read is None else far * read


def _near_parts(
    query: Tensor, key: Tensor, value: Tensor, gains: Tensor | None, plan: ReadPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of each chunk's first w tokens with the last w before it, their weights, and the values read."""
    assert plan.near_table is not None
    window = plan.window
    scores = query[1:, :, :, :window] @ key[:-1, :, :, -window:].mT
    gains = None if gains is None else gains[1:, :, :, : plan.num_near, :window]
    mix = _mixed(gains, plan.near_table, plan.near_is_same)
    return scores, mix.to(scores.dtype), value[:-1, :, :, -window:]


def _mixed(gains: Tensor | None, table: Tensor, is_same: Tensor | None) -> Tensor:
    """sum_m gains[.., m, i] table[m, i, j]: [n, B, H, i, j], of any strides; what all chunks share without gains."""
    if gains is None:
        mix = table.sum(0)
    elif len(table) == 1:
        mix = gains[:, :, :, 0, :, None] * table[0]
    else:
        # A table of its own for each token i: one product for each of them, which all chunks share.
        by_token = gains.flatten(0, 2).permute(2, 0, 1).contiguous() @ table.transpose(0, 1)  # [i, n * B * H, j]
        mix = by_token.transpose(0, 1).unflatten(0, gains.shape[:3])
    return mix if is_same is None else mix * is_same


def _mixed_backward(gradient: Tensor, table: Tensor, is_same: Tensor | None) -> Tensor:
    """[n, B, H, i, j] of the mix to [n, B, H, m, i] of the gains."""
    gradient = (gradient if is_same is None else gradient * is_same).to(table.dtype)
    by_token = gradient.flatten(0, 2).transpose(0, 1) @ table.permute(1, 2, 0)  # [i, n * B * H, m]
    return by_token.permute(1, 2, 0).unflatten(0, gradient.shape[:3])


def _scaled(x: Tensor, weights: Tensor | None) -> Tensor:
    """[n, B, H, C, K] by weights [n, b, h, S, C] -> [n, B, H, C, S * K]."""
    if weights is None:
        return x
    # Weights of a token lie together, so that the product is laid out as it is read.
    return (x[..., None, :] * weights.mT.to(x.dtype).contiguous()[..., None]).flatten(-2)


def _accumulated(states: Tensor, plan: ReadPlan) -> Tensor:
    """Writes of each chunk (and the memory in front, if any) [.., B, H, S * K, J] to the states behind them."""
    fading = plan.fading[len(plan.fading) - len(states) + 1 :]
    if torch.is_grad_enabled():  # autograd would copy the whole tensor at every step in place
        found = [states[0]]
        for written, faded in zip(states[1:].unbind(), fading.unbind(), strict=True):
            found.append(torch.addcmul(written, found[-1], faded))
        return torch.stack(found)
    for before, now, faded in zip(states[:-1], states[1:], fading, strict=True):
        now.addcmul_(before, faded)
    return states


class _ChunkedReads(torch.autograd.Function):
    """`_forward` with its gradients for query, key, value, gains and memory."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gains: Tensor | None,
        memory: Tensor | None,
        plan: ReadPlan,
    ) -> tuple[Tensor, Tensor | None]:
        reads, after, kept = _forward(query, key, value, gains, memory, plan)
        # Constants too: what is saved so is seen by hooks that move or count it.
        ctx.save_for_backward(query, key, value, gains, *kept, *plan[:-1])
        ctx.returns_memory, ctx.has_memory = plan.returns_memory, memory is not None
        ctx.set_materialize_grads(False)
        return reads, after

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, gradient: Tensor | None, after_gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, gains, *saved = ctx.saved_tensors
        given, kept = _Gradients(query, key, value, gains), _Kept._make(saved[: len(_Kept._fields)])
        plan = ReadPlan._make([*saved[len(_Kept._fields) :], ctx.returns_memory])
        gradient = torch.zeros_like(value) if gradient is None else gradient.contiguous()
        with torch.autocast(value.device.type, enabled=False):
            found, memory = _backward(given, kept, plan, gradient, after_gradient, ctx.has_memory)
        return found.query, found.key, found.value, found.gains, memory, None


@dataclass
class _Gradients:
    """What belongs to query, key, value and gains: themselves, or their gradients as far as they are added up."""

    query: Tensor
    key: Tensor
    value: Tensor
    gains: Tensor | None


def _backward(
    given: _Gradients,
    kept: _Kept,
    plan: ReadPlan,
    gradient: Tensor,
    after_gradient: Tensor | None,
    has_memory: bool,
) -> tuple[_Gradients, Tensor | None]:
    """All gradients; the memory's stands beside the others, None without a memory."""
    found = _inner_backward(given, kept, plan, gradient)
    if plan.near_table is not None:
        _near_backward(given, plan, gradient, found)
    starts = _starts_backward(kept, plan, gradient, after_gradient, has_memory)
    if kept.scaled_query is not None:
        _outer_backward(given, kept, plan, gradient, found)
    writes = starts[1:] if has_memory else starts
    if kept.scaled_key is not None and len(writes):
        _writes_backward(given, kept, plan, writes, found)
    return found, starts[0] if has_memory else None


def _inner_backward(given: _Gradients, kept: _Kept, plan: ReadPlan, gradient: Tensor) -> _Gradients:
    """Gradients of the reads inside a chunk, in fresh tensors."""
    weighted = gradient @ given.value.mT
    scores = weighted * kept.mix
    gains = None
    if kept.scores is not None:
        gains = _mixed_backward(weighted.mul_(kept.scores), plan.table, plan.is_same).contiguous()
    return _Gradients(scores @ given.key, scores.mT @ given.query, kept.weighted.mT @ gradient, gains)


def _near_backward(given: _Gradients, plan: ReadPlan, gradient: Tensor, found: _Gradients) -> None:
    """Adds the gradients of the reads of the chunk before."""
    assert plan.near_table is not None
    window = plan.window
    scores, mix, near_value = _near_parts(given.query, given.key, given.value, given.gains, plan)
    gradient = gradient[1:, :, :, :window]
    weighted = gradient @ near_value.mT
    found.value[:-1, :, :, -window:].add_((scores * mix).mT @ gradient)
    scores_gradient = weighted * mix
    if found.gains is not None:
        gains = _mixed_backward(weighted * scores, plan.near_table, plan.near_is_same)
        found.gains[1:, :, :, : plan.num_near, :window].add_(gains)
    found.query[1:, :, :, :window].add_(scores_gradient @ given.key[:-1, :, :, -window:])
    found.key[:-1, :, :, -window:].add_(scores_gradient.mT @ given.query[1:, :, :, :window])


def _starts_backward(
    kept: _Kept, plan: ReadPlan, gradient: Tensor, after_gradient: Tensor | None, has_memory: bool
) -> Tensor:
    """Gradients of all states [.., B, H, S * K, J], the memory's in front if there is one; none without states."""
    if kept.scaled_query is None:
        return gradient.new_zeros(0) if after_gradient is None else after_gradient[None]
    assert kept.starts is not None
    states = (kept.scaled_query.mT @ gradient[-len(kept.scaled_query) :]).to(kept.starts.dtype)
    if plan.returns_memory:
        last = torch.zeros_like(states[:1]) if after_gradient is None else after_gradient[None]
        states = torch.cat([states, last])
    fading = plan.fading if has_memory else plan.fading[1:]
    found, fadings = states.unbind(), fading.unbind()
    for number in range(len(found) - 2, -1, -1):
        found[number].addcmul_(found[number + 1], fadings[number])
    return states


def _outer_backward(given: _Gradients, kept: _Kept, plan: ReadPlan, gradient: Tensor, found: _Gradients) -> None:
    """Adds the gradients of the reads of states, for queries and gains."""
    assert kept.starts is not None
    first = len(given.query) - len(kept.starts)
    query, starts = given.query[first:], kept.starts.to(gradient.dtype)
    scaled = _add_scaled(found.query[first:], gradient[first:], starts, _read_weights(given.gains, plan, first))
    if found.gains is not None and scaled is not None:
        weights = scaled.mul_(query[..., None, :]).sum(-1).mT  # [.., S, C]
        weights = weights if plan.read is None else weights * plan.read[first:]
        found.gains[first:, :, :, plan.num_near :].add_(weights)


def _writes_backward(given: _Gradients, kept: _Kept, plan: ReadPlan, writes: Tensor, found: _Gradients) -> None:
    """Adds the gradients of the writes [n', B, H, S * K, J] for keys and values."""
    assert kept.scaled_key is not None
    num_writes = len(writes)
    writes = writes.to(given.value.dtype)
    _add_scaled(found.key[:num_writes], given.value[:num_writes], writes, plan.write)
    found.value[:num_writes].flatten(0, 2).baddbmm_(kept.scaled_key.flatten(0, 2), writes.flatten(0, 2))


def _add_scaled(total: Tensor, x: Tensor, states: Tensor, weights: Tensor | None) -> Tensor | None:
    """Total [n, B, H, C, K] += sum_s weights [n, b, h, s, C] y_s with y = x [.., C, J] states^T: [.., C, S, K].

    Returns y; None without weights, which add it without making it.
    """
    if weights is None:
        total.flatten(0, 2).baddbmm_(x.flatten(0, 2), states.flatten(0, 2).mT)
        return None
    weights = weights.to(total.dtype)
    y = (x @ states.mT).unflatten(-1, (weights.shape[-2], -1))
    for number in range(weights.shape[-2]):
        total.addcmul_(y[..., number, :], weights[..., number, :, None])
    return y
