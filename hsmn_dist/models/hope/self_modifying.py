"""SelfModifyingTitans: a token mixer whose keys, values, rates and retentions come from memories that it rewrites itself.

Per head, memories M_memory, M_k, M_v (and M_q when queries adapt too) map K -> K, M_eta and M_alpha map K -> 1; all start
from weights learned by backpropagation and change inside the forward pass, for each sequence on its own:

    u, q = W x' (x' = x after a causal depthwise convolution of width 4);   q, k l2-normalised
    k = M_k(u), v = M_v(u), eta = min(softplus(M_eta(u) + b) scale, eta_max), alpha = sigmoid(M_alpha(u) + b)
    o_t = M_memory(q_t), then every memory M is written with (k_t, M(v_t)) (`neural_memory.py`)

Inside a chunk, k, v, eta, alpha and all gradients are those of the chunk's starting weights; chunk size 1 is the recurrence.
The memory that is read may have another chunk size than the others. Unusual: alpha starts at 1 - 1 / 4096 (0.5 erases a
memory within 8 tokens) and is kept above 1e-4; eta_max keeps |alpha - c eta| <= 1; values are l2-normalised too, because
a memory that learns M(k) -> M(v) with |v| > |k| raises its own gain until it overflows (measured; switch in the options).
Parameters: 4 D^2 (projections, output) + D (4 + 1 / H) + H R K + ... (`MemoryShape`).
Source: arXiv 2512.24695 equations 83 to 97; models.md 2.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hsmn_dist.config.models import SelfModifyingConfig
from hsmn_dist.models.example_rows import per_example
from hsmn_dist.models.hope.chunk_layout import ChunkLayout, chunk_layout
from hsmn_dist.models.hope.fast_state import FastState
from hsmn_dist.models.hope.mixers import SequenceInfo, merge_heads, split_heads
from hsmn_dist.models.hope.neural_memory import (
    ChunkInputs,
    MemoryShape,
    MemoryWeights,
    UpdateRule,
    capped,
    recalled,
    write_chunk,
)
from hsmn_dist.models.layers.norms import RMSNorm
from hsmn_dist.models.precision import wide_type

CONVOLUTION_WIDTH = 4
SMALLEST_RETENTION = 1e-4
INITIAL_RETENTION = 1.0 - 1.0 / 4096.0


@dataclass
class SelfModifyingState(FastState):
    """What a stream carries.

    Attributes:
        start: weights at the start of the running chunk (each memory's own chunk).
        now: weights after the last token.
        momentum: buffer of the rule's momentum, or None.
        num_tokens: [B] tokens of the running chunk, of the larger of the two chunk sizes.
        tail: [B, 3, D] the last inputs of the convolution.
    """

    start: MemoryWeights
    now: MemoryWeights
    momentum: MemoryWeights | None
    num_tokens: Tensor
    tail: Tensor


class SelfModifyingTitans(nn.Module):
    """Mixer [B, T, D] -> [B, T, D]; see the module's docstring."""

    def __init__(self, d_model: int, num_heads: int, settings: SelfModifyingConfig) -> None:
        super().__init__()
        self.num_heads, self.settings = num_heads, settings
        width = d_model // num_heads
        hidden = settings.hidden_units if settings.memory == "mlp" else 0
        self.shape = MemoryShape(4 if settings.adapts_query else 3, 2, width, hidden)
        self.rule = UpdateRule(settings.objective, settings.uses_delta, settings.momentum, settings.reads_at == "token")
        self.project = nn.Linear(d_model, 2 * d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)
        self.read_norm = RMSNorm(width)
        self.convolution = nn.Parameter(torch.empty(CONVOLUTION_WIDTH, d_model))
        self.rate_bias = nn.Parameter(torch.empty(num_heads))
        self.retention_bias = nn.Parameter(torch.empty(num_heads))
        self.initial_inner = nn.Parameter(torch.empty(num_heads, self.shape.num_rows, width))
        if hidden:
            self.initial_vectors = nn.Parameter(torch.empty(num_heads, self.shape.num_vectors, width, hidden))
            self.initial_scalars = nn.Parameter(torch.empty(num_heads, self.shape.num_scalars, hidden))
        self.init_weights()

    def init_weights(self) -> None:
        """Identity convolution, near-identity memories, rate `initial_rate`, retention 1 - 1 / 4096."""
        width, hidden = self.shape.width, self.shape.hidden
        with torch.no_grad():
            self.convolution.normal_(std=0.02)
            self.convolution[0] += 1.0
            rate = self.settings.initial_rate / self.settings.rate_scale
            self.rate_bias.fill_(math.log(math.expm1(rate)))
            self.retention_bias.fill_(math.log(INITIAL_RETENTION / (1.0 - INITIAL_RETENTION)))
            self.initial_inner.normal_(std=width**-0.5)
            self.initial_inner[:, -self.shape.num_scalars :].normal_(std=0.02)
            if hidden:
                self.initial_vectors.normal_(std=0.5 * hidden**-0.5)
                self.initial_scalars.normal_(std=0.02)

    def initial_weights(self, batch: int) -> MemoryWeights:
        """The learned start of each sequence, fp32 or wider."""

        def copies(parameter: Tensor) -> Tensor:
            return per_example(parameter, batch).to(wide_type(parameter))

        if not self.shape.hidden:
            return MemoryWeights(copies(self.initial_inner), None, None)
        return MemoryWeights(copies(self.initial_inner), copies(self.initial_vectors), copies(self.initial_scalars))

    def forward(
        self, x: Tensor, state: SelfModifyingState | None, info: SequenceInfo
    ) -> tuple[Tensor, SelfModifyingState | None, dict[str, Tensor]]:
        """[B, T, D] -> [B, T, D], the state after the last token when wanted, and health scalars."""
        mixed, tail = self._convolved(x, None if state is None else state.tail, info)
        lifted, query = (split_heads(t, self.num_heads) for t in self.project(mixed).chunk(2, -1))
        # Rates, decays and triangular solves need fp32 even where the rest runs in half precision.
        with torch.autocast(x.device.type, enabled=False):
            wide = wide_type(lifted)
            reads, after, health = self._stream(lifted.to(wide), query.to(wide), state, info, tail)
        y = self.output(merge_heads(self.read_norm(reads.to(x.dtype))))
        return y, after if info.returns_state else None, health

    def _convolved(self, x: Tensor, tail: Tensor | None, info: SequenceInfo) -> tuple[Tensor, Tensor]:
        """Causal depthwise convolution inside each segment [B, T, D], and the inputs [B, 3, D] it needs next."""
        batch, tokens, width = x.shape
        reach = CONVOLUTION_WIDTH - 1
        if tail is None:
            tail = x.new_zeros(batch, reach, width)
        padded = torch.cat([tail.to(x.dtype), x], 1)
        segments = None if info.segments is None else F.pad(info.segments, (reach, 0))
        taps = per_example(self.convolution, batch)[:, :, None].unbind(1)  # each [B, 1, D]
        mixed = x * taps[0]
        for back in range(1, CONVOLUTION_WIDTH):
            earlier = padded[:, reach - back : reach - back + tokens]
            if segments is not None:
                is_same = segments[:, reach - back : reach - back + tokens] == segments[:, reach:]
                earlier = earlier * is_same[..., None]
            mixed = mixed + earlier * taps[back]
        if not info.returns_state:
            return mixed, tail
        if info.valid is None and segments is None:
            return mixed, padded[:, tokens:]
        lengths = torch.full((batch,), tokens, device=x.device) if info.valid is None else info.valid.sum(1)
        index = lengths[:, None] + torch.arange(reach, device=x.device)
        last = padded.gather(1, index[..., None].expand(-1, -1, width))
        if segments is not None:
            numbers = segments.gather(1, index)
            last = last * (numbers == numbers[:, -1:])[..., None]
        return mixed, last

    def _stream(
        self, lifted: Tensor, query: Tensor, state: SelfModifyingState | None, info: SequenceInfo, tail: Tensor
    ) -> tuple[Tensor, SelfModifyingState, dict[str, Tensor]]:
        """All chunks in order: reads [B, H, T, K] and what comes after."""
        batch, _, tokens, _ = lifted.shape
        initial = self.initial_weights(batch)
        sizes = self.settings.memory_chunk_tokens, self.settings.chunk_tokens
        step = min(sizes)
        if state is None:
            phase = torch.zeros(batch, dtype=torch.long, device=lifted.device)
            walk = _Walk(initial, initial, None, phase, is_new=True)
        else:
            walk = _Walk(state.start, state.now, state.momentum, state.num_tokens)
        is_single = tokens == 1 and info.segments is None
        offset = None if state is None else state.num_tokens % step
        layout = chunk_layout(
            batch,
            tokens,
            1 if is_single else step,
            info.segments,
            info.valid,
            None if is_single else offset,
            lifted.device,
        )
        # Split, not sliced: the backward pass of a slice fills the whole row with zeros, once a chunk.
        pieces = zip(
            layout.placed(lifted).split(layout.chunk_size, 2),
            layout.placed(query).split(layout.chunk_size, 2),
            strict=True,
        )
        reads = []
        for index, (u, q) in enumerate(pieces):
            walk.restart(layout, index, initial)
            reads.append(self._chunk(walk, layout, index, u, q))
            walk.commit(layout, index, sizes, initial, self)
        health = {"rate": walk.rate.detach(), "retention": walk.retention.detach()}
        health["delta_norm"] = (walk.now.inner - initial.inner).detach().norm(dim=(-1, -2)).mean()
        after = SelfModifyingState(walk.start, walk.now, walk.momentum, walk.num_tokens, tail)
        named = {f"memory/self_modifying_{name}": value for name, value in health.items()}
        return layout.returned(torch.cat(reads, 2), tokens), after, named

    def _chunk(self, walk: _Walk, layout: ChunkLayout, index: int, u: Tensor, q: Tensor) -> Tensor:
        """Reads of one chunk; the walk's weights move on."""
        place = slice(index * layout.chunk_size, (index + 1) * layout.chunk_size)
        vectors, scalars = recalled(walk.start, self.shape, u, first_vector=1)
        assert scalars is not None
        batch = scalars.shape[0]
        rate_bias, retention_bias = (per_example(b, batch)[..., None] for b in (self.rate_bias, self.retention_bias))
        rate = F.softplus(scalars[..., 0] + rate_bias) * self.settings.rate_scale
        rate = rate.clamp(max=self.settings.largest_rate)
        retention = torch.sigmoid(scalars[..., 1] + retention_bias).clamp(min=SMALLEST_RETENTION)
        walk.rate, walk.retention = rate.mean(), retention.mean()
        valid = None if layout.valid is None else layout.valid[:, place]
        if valid is not None:
            rate = torch.where(valid[:, None], rate, torch.zeros_like(rate))
            retention = torch.where(valid[:, None], retention, torch.ones_like(retention))
        if self.settings.adapts_query:
            q = recalled(walk.start, self.shape, q, first_vector=3, with_scalars=False)[0][:, :, 0]
        value = F.normalize(vectors[:, :, 1], dim=-1) if self.settings.normalises_value else vectors[:, :, 1]
        chunk = ChunkInputs(
            F.normalize(vectors[:, :, 0], dim=-1), value, rate, retention, F.normalize(q, dim=-1), valid
        )
        read, walk.now, walk.momentum = write_chunk(walk.start, walk.now, walk.momentum, self.shape, self.rule, chunk)
        return read


class _Walk:
    """The weights while the chunks of a call go by."""

    def __init__(
        self,
        start: MemoryWeights,
        now: MemoryWeights,
        momentum: MemoryWeights | None,
        num_tokens: Tensor,
        is_new: bool = False,
    ) -> None:
        self.start, self.now, self.momentum, self.num_tokens = start, now, momentum, num_tokens
        self.is_new = is_new
        self.rate = self.retention = torch.zeros(())
        self.num_chunks = 0

    def restart(self, layout: ChunkLayout, index: int, initial: MemoryWeights) -> None:
        """Rows whose chunk `index` begins a new segment go back to the learned start."""
        if layout.restarts is None:
            return
        begins = layout.restarts[:, index]
        self.start = _chosen(begins, initial, self.start)
        self.now = _chosen(begins, initial, self.now)
        if self.momentum is not None:
            self.momentum = _chosen(begins, self.momentum.mapped(torch.zeros_like), self.momentum)
        self.num_tokens = torch.where(begins, torch.zeros_like(self.num_tokens), self.num_tokens)

    def commit(
        self,
        layout: ChunkLayout,
        index: int,
        sizes: tuple[int, int],
        initial: MemoryWeights,
        mixer: SelfModifyingTitans,
    ) -> None:
        """Count the chunk's tokens; memories whose own chunk is full now start from their present weights."""
        size, longest, step = layout.chunk_size, max(sizes), min(sizes)
        held = self.now
        if mixer.settings.largest_growth > 0:
            held = capped(self.now, initial, mixer.shape, mixer.settings.largest_growth)
        if self.is_new and layout.valid is None and layout.slot is None and size == step:
            # Every row is at the same place, known without looking at tensors; a carried state may stand anywhere.
            self.num_chunks += 1
            position = self.num_chunks * size
            self.num_tokens = torch.full_like(self.num_tokens, position % longest)
            self.now = held
            is_full = (position % sizes[0] == 0, position % sizes[1] == 0)
            self.start = held if all(is_full) else _parts(held, self.start, mixer.shape, is_full)
            return
        counted = torch.full_like(self.num_tokens, size)
        if layout.valid is not None:
            counted = layout.valid[:, index * size : (index + 1) * size].sum(1)
        seen = self.num_tokens + counted
        self.num_tokens = seen % longest
        full, memory, others = ((seen % s == 0) & (counted > 0) for s in (step, *sizes))
        self.now = _chosen(full, held, self.now)
        if sizes[0] == sizes[1]:
            self.start = _chosen(full, held, self.start)
            return
        self.start = _parts(
            _chosen(memory, held, self.start), _chosen(others, held, self.start), mixer.shape, (True, False)
        )


def _chosen(rows: Tensor, left: MemoryWeights, right: MemoryWeights) -> MemoryWeights:
    """Rows [B] of `left` where True, of `right` elsewhere."""

    def pick(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None or b is None:
            return None
        return torch.where(rows.reshape(-1, *[1] * (a.dim() - 1)), a, b)

    inner = pick(left.inner, right.inner)
    assert inner is not None
    return MemoryWeights(inner, pick(left.vectors, right.vectors), pick(left.scalars, right.scalars))


def _parts(
    left: MemoryWeights, right: MemoryWeights, shape: MemoryShape, takes_left: tuple[bool, bool]
) -> MemoryWeights:
    """The read memory from `left` if takes_left[0], the others from `left` if takes_left[1]; else from `right`."""
    first, rest = (left if takes else right for takes in takes_left)
    rows = shape.hidden or shape.width
    inner = torch.cat([first.inner[:, :, :rows], rest.inner[:, :, rows:]], 2)
    if first.vectors is None or rest.vectors is None:
        return MemoryWeights(inner, None, None)
    return MemoryWeights(inner, torch.cat([first.vectors[:, :, :1], rest.vectors[:, :, 1:]], 2), rest.scalars)
