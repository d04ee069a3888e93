"""ChainMemory: the paper form of the CMS with `cadence: tokens`; a chain of MLP levels that learn inside the sequence.

    sequential, nested:  y_1 = MLP_1(x), y_l = y_(l-1) + MLP_l(y_(l-1)), y = y_k        independent:  y = sum_l w_l MLP_l(x)

Level l holds, for each sequence, its learned start plus a fast change. Behind every C_l tokens the change takes one
gradient step of rate eta_l / D on the level's inner loss, summed over those tokens at fixed weights; later tokens read it.
Inner loss, the local form of the task: token t - 1's output shall be the value of token t,
|y(x_(t-1)) - W_v x_t|^2 / 2 (or minus the dot product), so an update at token t uses tokens up to t only, and the newest
output waits for the next token. The gradient of each level is the true one, through the levels behind it.

Unusual: writes are differentiable (W_v, eta and the starts learn how to be learned from) or stopped; then values are the
inputs themselves and eta is a constant, so that no parameter is left without a gradient. Nested: when level l + 1 ticks,
level l's start moves `nested_rate` of the way to its present weights and level l begins there anew (a first-order
meta-step). The change is held below `largest_growth` times the norm of the start. Level 1 with period 0 (never) is
exactly a Transformer's MLP. Source: arXiv 2512.24695 section 7, equations 70 to 74; models.md 2.3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hsmn_dist.config.models import CmsConfig
from hsmn_dist.models.hope.chain_walk import ChainState, Factors, Walk, Weights
from hsmn_dist.models.hope.chunk_layout import ChunkLayout, chunk_layout
from hsmn_dist.models.hope.level_clock import NEVER, base_period, check_periods
from hsmn_dist.models.hope.mixers import SequenceInfo
from hsmn_dist.models.hope.neural_memory import gelu_pair

_NAMES = ("inner", "inner_bias", "outer", "outer_bias")


class ChainMemory(nn.Module):
    """[B, T, D] -> [B, T, D]; see the module's docstring."""

    def __init__(self, d_model: int, settings: CmsConfig) -> None:
        super().__init__()
        self.d_model, self.settings = d_model, settings
        self.periods = [level.period for level in settings.levels]
        check_periods(self.periods)
        for index, level in enumerate(settings.levels):
            hidden = level.hidden_units
            shapes = ((hidden, d_model), (hidden,), (d_model, hidden), (d_model,))
            for name, shape in zip(_NAMES, shapes, strict=True):
                self.register_parameter(f"{name}_{index}", nn.Parameter(torch.empty(shape)))
        num_fast = sum(period != NEVER for period in self.periods)
        self.learns_writes = settings.writes == "differentiable" and num_fast > 0
        if self.learns_writes:
            self.value = nn.Linear(d_model, d_model, bias=False)
            self.rates = nn.Parameter(torch.empty(num_fast))
        if settings.variant == "independent":
            self.mix = nn.Parameter(torch.empty(len(self.periods)))
        self.init_weights()

    def init_weights(self) -> None:
        """Normal(0, 0.02) maps; levels after the first start as the identity in a sequential chain."""
        with torch.no_grad():
            for index, level in enumerate(self.settings.levels):
                inner, inner_bias, outer, outer_bias = self.start(index)
                inner.normal_(std=0.02)
                outer.normal_(std=0.02 if index == 0 or self.settings.variant == "independent" else 0.002)
                inner_bias.zero_()
                outer_bias.zero_()
                if self.learns_writes and level.period != NEVER:
                    # softplus never gives 0: a rate of 0 stays outside of it (see `Walk._step_back`).
                    rate = level.learning_rate
                    self.rates[index] = math.log(math.expm1(rate)) if rate > 0 else 0.0
            if self.settings.variant == "independent":
                self.mix.fill_(1.0 / len(self.periods))

    def start(self, index: int) -> Weights:
        """Level `index`'s learned start."""
        inner, inner_bias, outer, outer_bias = (getattr(self, f"{name}_{index}") for name in _NAMES)
        return inner, inner_bias, outer, outer_bias

    def forward(
        self, x: Tensor, state: ChainState | None, info: SequenceInfo
    ) -> tuple[Tensor, ChainState | None, dict[str, Tensor]]:
        """[B, T, D] -> [B, T, D], the state after the last token when wanted, and health scalars of every level."""
        size = base_period(self.periods)
        if size == NEVER:
            return self._chain(x, [None] * len(self.periods))[-1], None, {}
        batch, tokens, _ = x.shape
        walk = Walk(self, batch, x.device, state)
        is_single = tokens == 1 and info.segments is None
        offset = None if state is None or is_single else state.num_tokens % size
        layout = chunk_layout(batch, tokens, 1 if is_single else size, info.segments, info.valid, offset, x.device)
        if info.is_real is not None:
            walk.is_padding = layout.placed((~info.is_real)[:, None, :, None])[:, 0, :, 0]  # [B, S]
        placed = layout.placed(x[:, None])[:, 0]  # [B, S, D]
        values = self.value(placed) if self.learns_writes else placed.detach()
        before = x.new_zeros(batch, 1, x.shape[2]) if state is None else state.last[:, None].to(x.dtype)
        is_pair = self._pairs(layout, batch, state, offset, x.device).to(x.dtype)[..., None]
        if state is not None and offset is not None:
            # The token before the first new one stands in the slot in front of it, wherever that is.
            padded = torch.cat([before, placed], 1)
            padded = padded.scatter(1, offset[:, None, None].expand(-1, 1, x.shape[2]), before)
            before, placed = padded[:, :1], padded[:, 1:]
        outputs = []
        # Split, not sliced: the backward pass of a slice fills the whole row with zeros, once a chunk.
        pieces = zip(*(t.split(layout.chunk_size, 1) for t in (placed, values, is_pair)), strict=True)
        for index, (piece, value, pair) in enumerate(pieces):
            walk.restart(layout, index)
            is_read_later = info.returns_state or index + 1 < layout.num_chunks
            in_question = pair if index == 0 or not walk.is_whole else None  # else each token has one before it
            outputs.append(self._chunk(walk, torch.cat([before, piece], 1), value, in_question, is_read_later))
            before = piece[:, -1:]
            if is_read_later:
                walk.advance(layout, index)
        y = layout.returned(torch.cat(outputs, 1)[:, None], tokens)[:, 0]
        if self.learns_writes:
            # Every rank has a gradient for these, even where no tick was due.
            y = y + 0.0 * (self.rates.sum() + values.sum()).to(y.dtype)
        after = self._after(walk, x, state, info) if info.returns_state else None
        return y, after, walk.health()

    def _pairs(
        self, layout: ChunkLayout, batch: int, state: ChainState | None, offset: Tensor | None, device: torch.device
    ) -> Tensor:
        """True at slots whose token has a token before it in its segment: [B, S]."""
        pair = torch.ones(batch, layout.num_slots, dtype=torch.bool, device=device)
        if layout.valid is not None:
            pair = layout.valid.clone()
        first = torch.zeros(batch, 1, dtype=torch.long, device=device) if offset is None else offset[:, None]
        has_last = torch.zeros(batch, 1, dtype=torch.bool, device=device) if state is None else state.has_last[:, None]
        pair.scatter_(1, first, pair.gather(1, first) & has_last)
        if layout.restarts is not None:
            heads = pair[:, :: layout.chunk_size]
            pair[:, :: layout.chunk_size] = heads & ~layout.restarts
        return pair

    def _chain(self, z: Tensor, weights: list[Weights | None]) -> list[Tensor]:
        """Outputs of the chain after each level; None weights mean the learned start."""
        return [y for y, _, _, _ in self._traced(z, weights)]

    def _traced(self, z: Tensor, weights: list[Weights | None]) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """For each level: (chain output so far, its input, hidden units, slopes)."""
        trace: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        is_independent = self.settings.variant == "independent"
        y = z
        for index, given in enumerate(weights):
            inner, inner_bias, outer, outer_bias = self.start(index) if given is None else given
            source = z if is_independent else y
            hidden, slope = gelu_pair(_affine(source, inner, inner_bias))
            out = _affine(hidden, outer, outer_bias)
            if is_independent:
                out = self.mix[index] * out
            y = out if index == 0 else y + out
            trace.append((y, source, hidden, slope))
        return trace

    def _chunk(self, walk: Walk, steps: Tensor, values: Tensor, is_pair: Tensor | None, is_read_later: bool) -> Tensor:
        """Outputs [B, c, D] of one chunk; `steps` [B, c + 1, D] has the token before in front. Errors become pending."""
        weights = [walk.weights(index, steps.dtype) for index in range(len(self.periods))]
        if not is_read_later:
            return self._chain(steps[:, 1:], weights)[-1]
        trace = self._traced(steps, weights)
        y = trace[-1][0]
        error = -values if self.settings.objective == "dot" else y[:, :-1] - values
        if is_pair is not None:
            error = error * is_pair
        if not self.learns_writes:
            error = error.detach()
        is_independent = self.settings.variant == "independent"
        for index in range(len(self.periods) - 1, -1, -1):
            _, source, hidden, slope = trace[index]
            inner, _, outer, _ = self.start(index) if weights[index] is None else weights[index]  # type: ignore[misc]
            out_error = self.mix[index] * error if is_independent else error
            lift_error = slope[:, :-1] * (out_error @ outer)
            if self.periods[index] != NEVER:
                walk.collect(index, Factors(lift_error, source[:, :-1], out_error, hidden[:, :-1]))
            if not is_independent and index > 0:
                error = error + lift_error @ inner
        return y[:, 1:]

    def _after(self, walk: Walk, x: Tensor, state: ChainState | None, info: SequenceInfo) -> ChainState:
        """The state after each row's last token."""
        last, has_last = x[:, -1], torch.ones_like(walk.num_tokens, dtype=torch.bool)
        if info.valid is not None:
            lengths = info.valid.sum(1)
            index = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, x.shape[2])
            last, has_last = x.gather(1, index)[:, 0], lengths > 0
            if state is not None:
                last = torch.where(has_last[:, None], last, state.last.to(last.dtype))
                has_last = has_last | state.has_last
        walk.settle()
        return ChainState(walk.levels, walk.num_tokens, last, has_last)


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Rows x [B, c, K] times `weight` of each row [B, N, K] or of all [N, K], plus the bias."""
    if weight.dim() == 2:
        return x @ weight.mT + bias
    return torch.baddbmm(bias, x, weight.mT)
