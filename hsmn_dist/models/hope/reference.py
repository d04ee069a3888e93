"""HOPE's memories one token at a time: slow, obvious, for parity tests and for readers.

Every function works on one sequence and one head (no batch axis), in the order of the equations, with Python loops.
Equation numbers are those of models.md section 2 and of arXiv 2512.24695 as read through secondary copies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


def decayed_read_steps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gains: Tensor,
    taus: Tensor,
    memory: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    reads_after_write: bool = True,
) -> tuple[Tensor, Tensor]:
    """Decay-form CMS (models.md 2.2).

    Args:
        query: [T, K].
        key: [T, K].
        value: [T, J].
        gains: [T, M].
        taus: [M].
        memory: [M, K, J] or None for zeros.
        scales: [M] write weights; 1 - tau unless given.
        reads_after_write: token t sees its own write.

    Returns:
        Reads [T, J] and the memory after the last token.
    """
    scales = 1.0 - taus if scales is None else scales
    if memory is None:
        memory = query.new_zeros(len(taus), key.shape[1], value.shape[1])
    reads = []
    for t in range(len(query)):
        before = memory
        written = torch.outer(key[t], value[t])
        memory = torch.stack([taus[m] * memory[m] + scales[m] * written for m in range(len(taus))])
        seen = memory if reads_after_write else before
        # o_t = sum_m g_m(x_t) S_m[t]^T q_t
        reads.append(torch.stack([gains[t, m] * (seen[m].mT @ query[t]) for m in range(len(taus))]).sum(0))
    return torch.stack(reads), memory


def linear_attention_steps(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernelised attention as a recurrence (arXiv 2006.16236, equations 16 to 20), the numerator rotated (2104.09864, 19).

    Args:
        query: [T, K], before the feature map.
        key: [T, K], before the feature map.
        value: [T, K].
        cos: [T, K/2] of the positions' angles.
        sin: [T, K/2].

    Returns:
        Reads [T, K], the memory [K, K] of rotated phi(k) v^T and the normaliser [K] after the last token.
    """

    def feature(x: Tensor) -> Tensor:
        return torch.where(x > 0, x + 1.0, x.clamp(max=0.0).exp())

    def turned(x: Tensor, t: int) -> Tensor:
        half = len(x) // 2
        pairs = [(x[i], x[half + i], cos[t, i], sin[t, i]) for i in range(half)]
        return torch.stack([a * c - b * s for a, b, c, s in pairs] + [b * c + a * s for a, b, c, s in pairs])

    memory, normaliser = query.new_zeros(key.shape[1], value.shape[1]), query.new_zeros(key.shape[1])
    reads = []
    for t in range(len(query)):
        q, k = feature(query[t]), feature(key[t])
        memory = memory + torch.outer(turned(k, t), value[t])  # S_t = S_(t-1) + R_t phi(k_t) v_t^T
        normaliser = normaliser + k  # z_t = z_(t-1) + phi(k_t)
        reads.append(memory.mT @ turned(q, t) / (q @ normaliser))
    return torch.stack(reads), memory, normaliser


@dataclass(frozen=True)
class Memory:
    """One neural memory of one head: M(z) = skip(z) + W1 gelu(W2 z), or skip alone.

    w1 [o, h] and w2 [h, K] are None for a matrix memory; skip [o, K] is None for the identity.
    """

    w1: Tensor | None
    w2: Tensor | None
    skip: Tensor | None

    def tensors(self) -> list[Tensor]:
        """The weights that are there."""
        return [w for w in (self.w1, self.w2, self.skip) if w is not None]

    def with_tensors(self, tensors: list[Tensor]) -> Memory:
        """The same kind of memory with other weights."""
        rest = iter(tensors)
        return replace(self, **{n: next(rest) for n in ("w1", "w2", "skip") if getattr(self, n) is not None})


def recall(memory: Memory, z: Tensor) -> Tensor:
    """M(z): [K] -> [o]."""
    through = z if memory.skip is None else memory.skip @ z
    if memory.w1 is None or memory.w2 is None:
        return through
    return through + memory.w1 @ torch.nn.functional.gelu(memory.w2 @ z)


def inner_loss(memory: Memory, key: Tensor, target: Tensor, objective: str) -> Tensor:
    """L of models.md 2.4: dot, half_l2 or l2."""
    found = recall(memory, key)
    if objective == "dot":
        return -(found * target).sum()
    return ((found - target) ** 2).sum() * (1.0 if objective == "l2" else 0.5)


def inner_gradient(memory: Memory, key: Tensor, target: Tensor, objective: str) -> list[Tensor]:
    """dL/dM with the target held fixed; differentiable in everything (the target too)."""

    def loss(tensors: list[Tensor]) -> Tensor:
        return inner_loss(memory.with_tensors(tensors), key, target, objective)

    return torch.func.grad(loss)(memory.tensors())


def titans_steps(
    start: Memory,
    now: Memory,
    momentum: list[Tensor] | None,
    tokens: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]],
    *,
    objective: str,
    uses_delta: bool,
    beta: float,
    gradient_at_start: bool,
) -> tuple[Tensor, Memory, list[Tensor]]:
    """Token loop of one memory over one chunk (arXiv 2512.24695, equations 88 to 93, with decision 0021's corrections).

    Args:
        start: weights at the chunk's start.
        now: weights at the first token.
        momentum: S before the first token, one tensor per weight; None for zeros.
        tokens: (key [K], value [K], rate, retention, query [K]) per token.
        objective: see `inner_loss`.
        uses_delta: the factor alpha I - eta k k^T (else alpha alone).
        beta: momentum.
        gradient_at_start: gradients and targets at `start` (chunk form) or gradients at the current weights.

    Returns:
        Reads M_(t-1)(q_t) [C, o], the last weights, and the last momentum.
    """
    buffer = [torch.zeros_like(w) for w in now.tensors()] if momentum is None else momentum
    reads = []
    for key, value, rate, retention, query in tokens:
        reads.append(recall(now, query))  # o_t = M_(t-1)(q_t)
        target = recall(start, value)  # vhat_t = M(v_t), the memory's own answer
        gradient = inner_gradient(start if gradient_at_start else now, key, target, objective)
        buffer = [beta * s + g for s, g in zip(buffer, gradient, strict=True)]  # S_t = beta S_(t-1) + grad
        right = retention * torch.eye(len(key), dtype=key.dtype)
        if uses_delta:
            right = right - rate * torch.outer(key, key)  # alpha_t I - eta_t k_t k_t^T
        decayed = Memory(
            None if now.w1 is None else retention * now.w1,
            None if now.w2 is None else now.w2 @ right,
            None if now.skip is None else now.skip @ right,
        )
        now = now.with_tensors([w - rate * s for w, s in zip(decayed.tensors(), buffer, strict=True)])
    return torch.stack(reads), now, buffer


def gated_delta_steps(
    key: Tensor, value: Tensor, query: Tensor, rate: Tensor, retention: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """Gated delta rule (arXiv 2412.06464, equation 10): M <- M alpha (I - beta k k^T) + beta v k^T with beta = eta / alpha.

    Written with the house's signs M (alpha I - eta k k^T) + eta v k^T; reads [T, J] come before the write. Shapes:
    key, query [T, K], value [T, J], rate, retention [T], memory [J, K].
    """
    reads = []
    for t in range(len(key)):
        reads.append(memory @ query[t])
        erased = retention[t] * memory - rate[t] * torch.outer(memory @ key[t], key[t])
        memory = erased + rate[t] * torch.outer(value[t], key[t])
    return torch.stack(reads), memory


def chain_outputs(levels: list[list[Tensor]], x: Tensor, variant: str, mix: Tensor | None) -> Tensor:
    """One token through the levels' MLPs (equations 70, 73, 74): [D] -> [D]. A level is [inner, bias, outer, bias]."""
    y = x
    for index, (inner, inner_bias, outer, outer_bias) in enumerate(levels):
        source = x if variant == "independent" else y
        out = outer @ torch.nn.functional.gelu(inner @ source + inner_bias) + outer_bias
        if mix is not None:
            out = mix[index] * out
        y = out if index == 0 else y + out
    return y


def chain_steps(
    levels: list[list[Tensor]],
    x: Tensor,
    values: Tensor,
    periods: list[int],
    rates: list[Tensor],
    *,
    variant: str,
    objective: str,
    mix: Tensor | None = None,
    nested_rate: float = 0.0,
) -> tuple[Tensor, list[list[Tensor]], list[list[int]]]:
    """CMS with token cadence, one token at a time (equations 71 to 74).

    Args:
        levels: learned start of each level.
        x: [T, D] inputs.
        values: [T, D] W_v x_t.
        periods: tokens between updates, 0 for never.
        rates: eta_l / D of each level.
        variant: sequential, nested or independent.
        objective: l2 (half of the square) or dot.
        mix: weights of independent levels.
        nested_rate: share of the way a nested level's beginning moves.

    Returns:
        Outputs [T, D], the levels after the last token, and for each level the tokens behind which it ticked.
    """
    now = [list(level) for level in levels]
    begin = [list(level) for level in levels]
    pending = [[torch.zeros_like(w) for w in level] for level in levels]
    ticks: list[list[int]] = [[] for _ in levels]
    outputs = []
    for t in range(len(x)):
        outputs.append(chain_outputs(now, x[t], variant, mix))
        if t > 0:

            def loss(weights: list[list[Tensor]], t: int = t) -> Tensor:
                y = chain_outputs(weights, x[t - 1], variant, mix)
                if objective == "dot":
                    return -(y * values[t]).sum()
                return 0.5 * ((y - values[t]) ** 2).sum()

            gradients = torch.func.grad(loss)(now)
            pending = [
                [p + g for p, g in zip(old, new, strict=True)] for old, new in zip(pending, gradients, strict=True)
            ]
        for index, period in enumerate(periods):
            if period and (t + 1) % period == 0:
                ticks[index].append(t)
                now[index] = [w - rates[index] * p for w, p in zip(now[index], pending[index], strict=True)]
                pending[index] = [torch.zeros_like(p) for p in pending[index]]
                if variant == "nested" and index > 0:
                    fast = index - 1
                    begin[fast] = [b + nested_rate * (w - b) for b, w in zip(begin[fast], now[fast], strict=True)]
                    now[fast] = list(begin[fast])
                    pending[fast] = [torch.zeros_like(p) for p in pending[fast]]
    return torch.stack(outputs), now, ticks
