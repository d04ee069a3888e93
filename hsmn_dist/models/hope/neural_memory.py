"""Neural memories that learn by gradient descent on the stream: a whole chunk of updates in closed form.

A memory is M(z) = z + W1 gelu(W2 z) (vector memories), w z + w1 gelu(W2 z) (scalar memories: rate and retention), or one
matrix. For every token t of a chunk, with the gradient taken at the chunk's starting weights,

    M_t = M_(t-1) (alpha_t I - eta_t k_t k_t^T) - eta_t S_t,    S_t = beta S_(t-1) + dL/dM(M_start; k_t, vhat_t)

where the bracket multiplies W2 (and projected skips) from the right and W1 is scaled by alpha_t alone. No per-token
gradient is formed: everything is matrix products and one unit lower triangular C x C solve (hope.md section 3.1), shared
by all memories of a head. Unusual: all rows that meet a key (the hidden maps of all memories and the projected skips) lie
in one tensor `inner`; weights at the chunk's start and weights now are separate, so a chunk may be cut anywhere, and reads
see the weights of the token before (read precedes write), not of the chunk before. All decay factors are ratios <= 1.
Matrix memories take the gradient at the current token instead: the gated delta rule (arXiv 2412.06464) with
c = 1, 2 or 3 times eta in front of k k^T.
Sources: arXiv 2512.24695 equations 83 to 97 (signs and chunk index corrected: decision 0021); arXiv 2501.00663.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hsmn_dist.models.hope.fast_state import FastState
from hsmn_dist.models.tracing import may_look

Objective = Literal["dot", "half_l2", "l2"]
BELL_HEIGHT = 1.0 / math.sqrt(2.0 * math.pi)  # phi(0) of the normal distribution


@dataclass(frozen=True)
class MemoryShape:
    """Which memories a head has.

    Attributes:
        num_vectors: memories K -> K; the first one is read by queries.
        num_scalars: memories K -> 1.
        width: K.
        hidden: hidden units of each memory; 0 makes them matrices.
    """

    num_vectors: int
    num_scalars: int
    width: int
    hidden: int

    @property
    def num_hidden_rows(self) -> int:
        """Rows of `inner` behind the nonlinearity."""
        return (self.num_vectors + self.num_scalars) * self.hidden

    @property
    def num_rows(self) -> int:
        """Rows of `inner`: hidden maps, then the maps straight to the output."""
        direct = self.num_scalars + (0 if self.hidden else self.num_vectors * self.width)
        return self.num_hidden_rows + direct


@dataclass(frozen=True)
class UpdateRule:
    """How memories are written.

    Attributes:
        objective: dot (-<M(k), vhat>), half_l2 (|M(k) - vhat|^2 / 2) or l2 (|M(k) - vhat|^2). With the delta term and
            matrix memories these are the forms c = 1, 2 and 3 of decision 0021.
        uses_delta: the factor alpha I - eta k k^T; without it alpha alone.
        momentum: beta; 0 is plain gradient descent.
        reads_token_state: reads see every write before them; False reads the chunk's starting weights.
    """

    objective: Objective = "l2"
    uses_delta: bool = True
    momentum: float = 0.0
    reads_token_state: bool = True


@dataclass
class MemoryWeights(FastState):
    """Weights of all memories: inner [B, H, R, K], vectors [B, H, X, K, h], scalars [B, H, Y, h].

    The last two are None for matrix memories. A momentum buffer has the same layout.
    """

    inner: Tensor
    vectors: Tensor | None
    scalars: Tensor | None


@dataclass
class ChunkInputs:
    """One chunk of writes: key and value [B, H, C, K], rate (eta) and retention (alpha) [B, H, C], query for reads.

    `valid` [B, C] (or None) is False on slots that hold no token; they change nothing.
    """

    key: Tensor
    value: Tensor
    rate: Tensor
    retention: Tensor
    query: Tensor
    valid: Tensor | None = None


class _GeluPair(torch.autograd.Function):
    """gelu(z) = z Phi(z) and its slope Phi(z) + z phi(z) as one node; the slope's own derivative is phi(z) (2 - z^2)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> tuple[Tensor, Tensor]:
        scaled = z * math.sqrt(0.5)
        bell = (scaled * scaled).neg_().exp_()
        share = torch.erf(scaled).add_(1.0).mul_(0.5)
        # In half precision PyTorch's rounds once where the product rounds twice.
        is_wide = z.dtype in (torch.float32, torch.float64)
        gelu = z * share if is_wide else torch.nn.functional.gelu(z)
        return gelu, torch.addcmul(share, z, bell, value=BELL_HEIGHT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], output[1])

    @staticmethod
    def backward(ctx: Any, for_gelu: Tensor, for_slope: Tensor) -> Tensor:
        z, slope = ctx.saved_tensors
        square = z * z
        bend = (2.0 - square).mul_(torch.exp(-0.5 * square))
        return torch.addcmul(for_gelu * slope, for_slope, bend, value=BELL_HEIGHT)


def gelu_pair(z: Tensor) -> tuple[Tensor, Tensor]:
    """Exact gelu(z) and its derivative."""
    return _GeluPair.apply(z)  # type: ignore[no-any-return,no-untyped-call]


def recalled(
    weights: MemoryWeights, shape: MemoryShape, z: Tensor, first_vector: int = 0, with_scalars: bool = True
) -> tuple[Tensor, Tensor | None]:
    """M(z) of the vector memories from `first_vector` on [B, H, X', C, K], and of the scalar ones [B, H, C, Y]."""
    if not shape.hidden:
        stop = shape.num_rows if with_scalars else shape.num_vectors * shape.width
        rows = z @ weights.inner[:, :, first_vector * shape.width : stop].mT
        width = (shape.num_vectors - first_vector) * shape.width
        return _per_memory(rows[..., :width], shape.width), rows[..., width:] if with_scalars else None
    stop = shape.num_rows if with_scalars else shape.num_vectors * shape.hidden
    lifted = z @ weights.inner[:, :, first_vector * shape.hidden : stop].mT
    num = shape.num_vectors - first_vector + (shape.num_scalars if with_scalars else 0)
    hidden = torch.nn.functional.gelu(lifted[..., : num * shape.hidden])
    return _from_hidden(weights, shape, z, hidden, lifted[..., num * shape.hidden :], first_vector, with_scalars)


def _from_hidden(
    weights: MemoryWeights,
    shape: MemoryShape,
    z: Tensor,
    hidden: Tensor,
    direct: Tensor,
    first_vector: int,
    with_scalars: bool,
) -> tuple[Tensor, Tensor | None]:
    """Outputs from hidden units [B, H, C, X' * h] and the projected skips [B, H, C, Y]."""
    assert weights.vectors is not None
    units = _per_memory(hidden, shape.hidden)  # [B, H, X', C, h]
    num = shape.num_vectors - first_vector
    vectors = z[:, :, None] + units[:, :, :num] @ weights.vectors[:, :, first_vector:].mT
    if not with_scalars or weights.scalars is None:
        return vectors, None
    scalars = torch.einsum("bnych,bnyh->bncy", units[:, :, num:], weights.scalars) + direct
    return vectors, scalars


def _per_memory(rows: Tensor, size: int) -> Tensor:
    """[B, H, C, X * size] -> [B, H, X, C, size]."""
    return rows.unflatten(-1, (-1, size)).transpose(2, 3)


def _together(per_memory: Tensor) -> Tensor:
    """[B, H, X, C, size] -> [B, H, C, X * size]."""
    return per_memory.transpose(2, 3).flatten(-2)


@dataclass
class _Errors:
    """Inner gradients of a chunk: rows [B, H, C, R] meet keys, outer ones meet hidden units."""

    rows: Tensor
    vectors: Tensor | None  # [B, H, X, C, K]
    scalars: Tensor | None  # [B, H, C, Y]
    units: Tensor | None  # [B, H, X + Y, C, h]


def _errors(start: MemoryWeights, shape: MemoryShape, rule: UpdateRule, chunk: ChunkInputs, lifted: Tensor) -> _Errors:
    """dL/dM at the chunk's starting weights, without the factor eta. `lifted` [B, H, C, R] is K inner^T at the start."""
    target_vectors, target_scalars = recalled(start, shape, chunk.value)
    if not shape.hidden:
        # The gradient at the current token is the delta factor's business; what remains is linear in the target.
        scale = -2.0 if rule.objective == "l2" else -1.0
        assert target_scalars is not None
        rows = scale * torch.cat([_together(target_vectors), target_scalars], -1)
        return _Errors(rows if chunk.valid is None else rows * chunk.valid[:, None, :, None], None, None, None)
    assert start.vectors is not None and start.scalars is not None and target_scalars is not None
    hidden, slope = gelu_pair(lifted[..., : shape.num_hidden_rows])
    if rule.objective == "dot":
        vectors, scalars = -target_vectors, -target_scalars
    else:
        direct = lifted[..., shape.num_hidden_rows :]
        found_vectors, found = _from_hidden(start, shape, chunk.key, hidden, direct, 0, True)
        assert found is not None
        scale = 2.0 if rule.objective == "l2" else 1.0
        vectors, scalars = scale * (found_vectors - target_vectors), scale * (found - target_scalars)
    if chunk.valid is not None:
        vectors = vectors * chunk.valid[:, None, None, :, None]
        scalars = scalars * chunk.valid[:, None, :, None]
    back = torch.cat(
        [vectors @ start.vectors, scalars.transpose(2, 3)[..., None] * start.scalars[:, :, :, None]], 2
    )  # [B, H, X + Y, C, h]
    rows = torch.cat([slope * _together(back), scalars], -1)
    return _Errors(rows, vectors, scalars, _per_memory(hidden, shape.hidden))


@dataclass
class _Weights:
    """Scalar factors of a chunk (all [B, H, ...]); t counts tokens, s <= t."""

    kept: Tensor  # [.., C] gamma_t
    kept_from: Tensor  # [.., C, C] gamma_t / gamma_s
    share: Tensor  # [.., C, C] weight of gradient s in the weights after t
    carried: Tensor | None  # [.., C] weight of the old momentum in the weights after t
    fading: Tensor | None  # [.., C] beta^(tokens after s)
    fading_all: Tensor | None  # [.., 1] beta^(tokens of the chunk)


def _factors(chunk: ChunkInputs, beta: float) -> _Weights:
    size = chunk.rate.shape[-1]
    log_kept = chunk.retention.log().cumsum(-1)
    steps = torch.arange(size, device=log_kept.device)
    is_lower = steps[:, None] >= steps[None, :]
    difference = (log_kept[..., :, None] - log_kept[..., None, :]).masked_fill(~is_lower, -math.inf)
    kept_from = difference.exp()
    share = kept_from * chunk.rate[..., None, :]
    if beta == 0.0:
        return _Weights(log_kept.exp(), kept_from, share, None, None, None)
    if chunk.valid is None:
        seen = (steps + 1)[None, None].expand(*chunk.rate.shape[:2], -1)
    else:
        seen = chunk.valid.long().cumsum(-1)[:, None].expand(*chunk.rate.shape[:2], -1)
    base = torch.tensor(beta, dtype=share.dtype, device=share.device)
    fades = base ** (seen[..., :, None] - seen[..., None, :]).clamp(min=0) * is_lower
    carried = (share @ (base**seen)[..., None])[..., 0]
    return _Weights(
        log_kept.exp(), kept_from, share @ fades, carried, base ** (seen[..., -1:] - seen), base ** seen[..., -1:]
    )


def _before(per_token: Tensor, first: float) -> Tensor:
    """Values after token t - 1 along dim 2; `first` at t = 0."""
    head = torch.full_like(per_token[:, :, :1], first)
    return torch.cat([head, per_token[:, :, :-1]], 2)


def write_chunk(
    start: MemoryWeights,
    now: MemoryWeights,
    momentum: MemoryWeights | None,
    shape: MemoryShape,
    rule: UpdateRule,
    chunk: ChunkInputs,
) -> tuple[Tensor, MemoryWeights, MemoryWeights | None]:
    """Read and write one chunk (or a piece of one).

    Args:
        start: weights at the chunk's first token; gradients and targets are taken here.
        now: weights after the last token written (`start` itself at the chunk's beginning).
        momentum: the buffer, or None for zeros.
        shape: the memories of a head.
        rule: the update rule.
        chunk: keys, values, rates, retentions, queries.

    Returns:
        Reads of the first vector memory [B, H, C, K], the weights after the piece, and the momentum buffer (None when
        the rule has no momentum).
    """
    lifted = chunk.key @ start.inner.mT  # [B, H, C, R]
    lifted_now = lifted if now is start else chunk.key @ now.inner.mT
    errors = _errors(start, shape, rule, chunk, lifted)
    factors = _factors(chunk, rule.momentum)
    gram = chunk.key @ chunk.key.mT
    delta = _delta_strength(shape, rule)
    corrections = None
    if delta:
        corrections = _corrections(chunk, factors, errors.rows, lifted_now, gram, momentum, delta)
    if rule.reads_token_state:
        reads = _token_reads(now, momentum, shape, chunk, factors, errors, corrections)
    else:
        reads = recalled(start, shape, chunk.query, 0, False)[0][:, :, 0]
    after = _written(now, momentum, chunk, factors, errors, corrections)
    buffer = _next_momentum(momentum, chunk, factors, errors) if rule.momentum else None
    return reads, after, buffer


def _delta_strength(shape: MemoryShape, rule: UpdateRule) -> float:
    """Factor of eta k k^T; a matrix's own l2 gradient adds one or two of them."""
    own = 1.0 if rule.uses_delta else 0.0
    if shape.hidden:
        return own
    return own + {"dot": 0.0, "half_l2": 1.0, "l2": 2.0}[rule.objective]


def _corrections(
    chunk: ChunkInputs,
    factors: _Weights,
    rows: Tensor,
    lifted_now: Tensor,
    gram: Tensor,
    momentum: MemoryWeights | None,
    delta: float,
) -> Tensor:
    """S [B, H, C, R]: what the factors k_t k_t^T take away, by one triangular solve for all rows."""
    strength = (delta * chunk.rate / chunk.retention)[..., None]
    earlier = _before(factors.share, 0.0) * chunk.retention[..., None]
    inside = factors.kept[..., None] * lifted_now - (earlier * gram) @ rows
    if momentum is not None and factors.carried is not None:
        old = _before(factors.carried, 0.0) * chunk.retention
        inside = inside - old[..., None] * (chunk.key @ momentum.inner.mT)
    system = (strength * gram * factors.kept_from).tril(-1)
    return torch.linalg.solve_triangular(system, -strength * inside, upper=False, unitriangular=True)


def _token_reads(
    now: MemoryWeights,
    momentum: MemoryWeights | None,
    shape: MemoryShape,
    chunk: ChunkInputs,
    factors: _Weights,
    errors: _Errors,
    corrections: Tensor | None,
) -> Tensor:
    """Reads of the first vector memory by query t with the weights after token t - 1."""
    num_rows = shape.hidden or shape.width
    kept = _before(factors.kept, 1.0)[..., None]
    share = _before(factors.share, 0.0)
    similarity = chunk.query @ chunk.key.mT
    rows = kept * (chunk.query @ now.inner[:, :, :num_rows].mT) - (share * similarity) @ errors.rows[..., :num_rows]
    if corrections is not None:
        rows = rows + (_before(factors.kept_from, 0.0) * similarity) @ corrections[..., :num_rows]
    carried = None
    if momentum is not None and factors.carried is not None:
        carried = _before(factors.carried, 0.0)[..., None]
        rows = rows - carried * (chunk.query @ momentum.inner[:, :, :num_rows].mT)
    if not shape.hidden:
        return rows
    assert now.vectors is not None and errors.vectors is not None and errors.units is not None
    units = torch.nn.functional.gelu(rows)
    reads = chunk.query + kept * (units @ now.vectors[:, :, 0].mT)
    reads = reads - (share * (units @ errors.units[:, :, 0].mT)) @ errors.vectors[:, :, 0]
    if carried is not None and momentum is not None and momentum.vectors is not None:
        reads = reads - carried * (units @ momentum.vectors[:, :, 0].mT)
    return reads


def _written(
    now: MemoryWeights,
    momentum: MemoryWeights | None,
    chunk: ChunkInputs,
    factors: _Weights,
    errors: _Errors,
    corrections: Tensor | None,
) -> MemoryWeights:
    """Weights after the chunk's last token."""
    kept = factors.kept[..., -1, None, None]  # [B, H, 1, 1]
    share = factors.share[..., -1, :, None]  # [B, H, C, 1]
    change = -share * errors.rows
    if corrections is not None:
        change = change + factors.kept_from[..., -1, :, None] * corrections
    inner = kept * now.inner + change.mT @ chunk.key
    carried = None
    if momentum is not None and factors.carried is not None:
        carried = factors.carried[..., -1, None, None]
        inner = inner - carried * momentum.inner
    vectors, scalars = _outer_change(share, errors)
    if vectors is None or scalars is None or now.vectors is None or now.scalars is None:
        return MemoryWeights(inner, None, None)
    vectors = kept[..., None] * now.vectors - vectors
    scalars = kept * now.scalars - scalars
    if carried is not None and momentum is not None and momentum.vectors is not None and momentum.scalars is not None:
        vectors, scalars = vectors - carried[..., None] * momentum.vectors, scalars - carried * momentum.scalars
    return MemoryWeights(inner, vectors, scalars)


def _outer_change(share: Tensor, errors: _Errors) -> tuple[Tensor | None, Tensor | None]:
    """Weighted sums over the chunk of error times hidden unit, for both kinds of output maps."""
    if errors.vectors is None or errors.scalars is None or errors.units is None:
        return None, None
    num = errors.vectors.shape[2]
    vectors = (share[:, :, None] * errors.vectors).mT @ errors.units[:, :, :num]
    scalars = torch.einsum("bncy,bnych->bnyh", share * errors.scalars, errors.units[:, :, num:])
    return vectors, scalars


def _next_momentum(
    momentum: MemoryWeights | None, chunk: ChunkInputs, factors: _Weights, errors: _Errors
) -> MemoryWeights:
    """S after the chunk: beta^C S + sum_s beta^(C - s) gradient_s."""
    assert factors.fading is not None and factors.fading_all is not None
    fading = factors.fading[..., None]
    inner = (fading * errors.rows).mT @ chunk.key
    vectors, scalars = _outer_change(fading, errors)
    if momentum is None:
        return MemoryWeights(inner, vectors, scalars)
    kept = factors.fading_all[..., None]
    inner = inner + kept * momentum.inner
    if vectors is None or scalars is None or momentum.vectors is None or momentum.scalars is None:
        return MemoryWeights(inner, None, None)
    return MemoryWeights(inner, vectors + kept[..., None] * momentum.vectors, scalars + kept * momentum.scalars)


def capped(weights: MemoryWeights, initial: MemoryWeights, shape: MemoryShape, largest_growth: float) -> MemoryWeights:
    """Weights with the norm of each memory's maps held to `largest_growth` times that of its learned start.

    Gradients of a chunk are frozen at its start, so many equal tokens overshoot together; without a bound MLP memories
    overflow on constant input (measured). Matrix memories take the gradient at the current token and need no bound.
    """
    if not shape.hidden or weights.vectors is None or weights.scalars is None:
        return weights
    assert initial.vectors is not None and initial.scalars is not None

    def held(tensor: Tensor, start: Tensor, dims: tuple[int, ...]) -> Tensor:
        if may_look(tensor):
            with torch.no_grad():
                norm, limit = (t.norm(dim=dims, keepdim=True) for t in (tensor, start))
                is_below = bool((norm <= largest_growth * limit).all())
            if is_below:  # as nearly always: nothing to scale, forwards or backwards
                return tensor
        limit = largest_growth * start.norm(dim=dims, keepdim=True)
        # Squares, so that the gradient at norm 0 is finite.
        square = tensor.square().sum(dim=dims, keepdim=True)
        return tensor * (limit * square.clamp(min=1e-30).rsqrt()).clamp(max=1.0)

    rows = shape.num_hidden_rows
    lifts, starts = (w.inner[:, :, :rows].unflatten(2, (-1, shape.hidden)) for w in (weights, initial))
    given = weights.inner[:, :, rows:]
    direct, lifted = held(given, initial.inner[:, :, rows:], (-1,)), held(lifts, starts, (-2, -1))
    inner = weights.inner
    if direct is not given or lifted is not lifts:
        inner = torch.cat([lifted.flatten(2, 3), direct], 2)
    return MemoryWeights(
        inner,
        held(weights.vectors, initial.vectors, (-2, -1)),
        held(weights.scalars, initial.scalars, (-1,)),
    )
