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
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hsmn_dist.config.models import CmsConfig
from hsmn_dist.models.hope.chunk_layout import ChunkLayout, chunk_layout
from hsmn_dist.models.hope.fast_state import FastState
from hsmn_dist.models.hope.level_clock import NEVER, base_period, check_periods, does_tick
from hsmn_dist.models.hope.mixers import SequenceInfo
from hsmn_dist.models.hope.neural_memory import gelu_pair
from hsmn_dist.models.tracing import may_look

Weights = tuple[Tensor, Tensor, Tensor, Tensor]  # inner [F, D], its bias [F], outer [D, F], its bias [D]


@dataclass
class LevelState(FastState):
    """One level of each sequence: every entry is four tensors [B, ...] in the order of `Weights`.

    Attributes:
        change: fast weights minus the learned start.
        pending: gradients since the last tick.
        base: where a nested level begins anew, minus the learned start; None for other variants.
    """

    change: tuple[Tensor, ...]
    pending: tuple[Tensor, ...]
    base: tuple[Tensor, ...] | None


@dataclass
class ChainState(FastState):
    """What a stream carries.

    Attributes:
        levels: one state per level with a period; None for levels that never tick.
        num_tokens: [B] tokens since the slowest level's last tick.
        last: [B, D] the input before, whose output is not scored yet.
        has_last: [B] bool.
    """

    levels: list[LevelState | None]
    num_tokens: Tensor
    last: Tensor
    has_last: Tensor


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
                    # softplus never gives 0: a rate of 0 stays outside of it (see `_Walk._tick`).
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
        walk = _Walk(self, batch, x.device, state)
        is_single = tokens == 1 and info.segments is None
        offset = None if state is None or is_single else state.num_tokens % size
        layout = chunk_layout(batch, tokens, 1 if is_single else size, info.segments, info.valid, offset, x.device)
        if info.is_real is not None:
            walk.is_padding = layout.placed((~info.is_real)[:, None, :, None])[:, 0, :, 0]  # [B, S]
        placed = layout.placed(x[:, None])[:, 0]  # [B, S, D]
        values = self.value(placed) if self.learns_writes else placed.detach()
        before = x.new_zeros(batch, 1, x.shape[2]) if state is None else state.last[:, None].to(x.dtype)
        is_pair = self._pairs(layout, batch, state, offset, x.device)
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
            outputs.append(self._chunk(walk, torch.cat([before, piece], 1), value, pair, is_read_later))
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
            hidden, slope = gelu_pair(source @ inner.mT + inner_bias)
            out = hidden @ outer.mT + outer_bias
            if is_independent:
                out = self.mix[index] * out
            y = out if index == 0 else y + out
            trace.append((y, source, hidden, slope))
        return trace

    def _chunk(self, walk: _Walk, steps: Tensor, values: Tensor, is_pair: Tensor, is_read_later: bool) -> Tensor:
        """Outputs [B, c, D] of one chunk; `steps` [B, c + 1, D] has the token before in front. Errors become pending."""
        weights = [walk.weights(index, steps.dtype) for index in range(len(self.periods))]
        if not is_read_later:
            return self._chain(steps[:, 1:], weights)[-1]
        trace = self._traced(steps, weights)
        y = trace[-1][0]
        error = -values if self.settings.objective == "dot" else y[:, :-1] - values
        error = error * is_pair[..., None]
        if not self.learns_writes:
            error = error.detach()
        is_independent = self.settings.variant == "independent"
        for index in range(len(self.periods) - 1, -1, -1):
            _, source, hidden, slope = trace[index]
            inner, _, outer, _ = self.start(index) if weights[index] is None else weights[index]  # type: ignore[misc]
            out_error = self.mix[index] * error if is_independent else error
            lift_error = slope[:, :-1] * (out_error @ outer)
            if self.periods[index] != NEVER:
                step = walk.step_at_once(index, steps.dtype)
                lifted, out = (e if step is None else e * step for e in (lift_error, out_error))
                gradients = (
                    lifted.mT @ source[:, :-1],
                    lifted.sum(1, keepdim=True),
                    out.mT @ hidden[:, :-1],
                    out.sum(1, keepdim=True),
                )
                written = gradients if self.learns_writes else tuple(g.detach() for g in gradients)
                walk.collect(index, written, is_scaled=step is not None)
            if not is_independent and index > 0:
                error = error + lift_error @ inner
        return y[:, 1:]

    def _after(self, walk: _Walk, x: Tensor, state: ChainState | None, info: SequenceInfo) -> ChainState:
        """The state after each row's last token."""
        last, has_last = x[:, -1], torch.ones_like(walk.num_tokens, dtype=torch.bool)
        if info.valid is not None:
            lengths = info.valid.sum(1)
            index = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, x.shape[2])
            last, has_last = x.gather(1, index)[:, 0], lengths > 0
            if state is not None:
                last = torch.where(has_last[:, None], last, state.last.to(last.dtype))
                has_last = has_last | state.has_last
        return ChainState(walk.levels, walk.num_tokens, last, has_last)


_NAMES = ("inner", "inner_bias", "outer", "outer_bias")


class _Walk:
    """Fast weights of every level while the chunks of a call go by."""

    def __init__(self, memory: ChainMemory, batch: int, device: torch.device, state: ChainState | None) -> None:
        self.memory, self.batch = memory, batch
        self.longest = max(memory.periods)
        self.num_tokens = torch.zeros(batch, dtype=torch.long, device=device) if state is None else state.num_tokens
        self.host_tokens = 0 if state is None else None  # known without looking at tensors
        self.is_padding: Tensor | None = None
        self.levels: list[LevelState | None] = []
        self.num_updates = [torch.zeros(batch, device=device) for _ in memory.periods]
        self.gradient_norms = [torch.zeros(batch, device=device) for _ in memory.periods]
        # What several chunks share is made once: a level between two ticks, nothing pending, rate, and the bound of a change.
        self._weights: list[Weights | None] = [None] * len(memory.periods)
        self._is_clear = [state is None] * len(memory.periods)
        self._is_scaled = [False] * len(memory.periods)
        # `host_tokens` behind the present chunk, where every row has all of the chunk's tokens.
        self._host_end: int | None = None
        self._nothing: dict[int, tuple[Tensor, ...]] = {}
        self._limits: dict[int, Tensor] = {}
        self._steps_back: dict[int, Tensor] = {}
        for index, period in enumerate(memory.periods):
            if state is not None:
                self.levels.append(state.levels[index])
            else:
                self.levels.append(None if period == NEVER else self._fresh(index))

    def _fresh(self, index: int) -> LevelState:
        def zeros() -> tuple[Tensor, ...]:
            return tuple(
                torch.zeros(self.batch, *(p.shape if p.dim() == 2 else (1, *p.shape)), device=p.device, dtype=_wide(p))
                for p in self.memory.start(index)
            )

        is_nested = self.memory.settings.variant == "nested"
        return LevelState(zeros(), zeros(), zeros() if is_nested else None)

    def weights(self, index: int, dtype: torch.dtype) -> Weights | None:
        """The level's weights now: four tensors [B, ...], or None for the learned start."""
        level = self.levels[index]
        if level is None or (self.host_tokens is not None and self.host_tokens < self.memory.periods[index]):
            return None
        known = self._weights[index]
        if known is None or known[0].dtype != dtype:
            start = self.memory.start(index)
            inner, inner_bias, outer, outer_bias = (
                (p.to(c.dtype) + c).to(dtype) for p, c in zip(start, level.change, strict=True)
            )
            known = self._weights[index] = inner, inner_bias, outer, outer_bias
        return known

    def _set(self, index: int, level: LevelState, is_clear: bool) -> None:
        """Replace a level; `is_clear`: surely nothing is pending in any row."""
        self.levels[index] = level
        self._weights[index] = None
        self._is_clear[index] = is_clear

    def _cleared(self, index: int, pending: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if index not in self._nothing:
            self._nothing[index] = tuple(torch.zeros_like(p) for p in pending)
        return self._nothing[index]

    def step_at_once(self, index: int, dtype: torch.dtype) -> Tensor | None:
        """The factor -eta / D, where level `index` ticks in every row behind this chunk and nothing is pending from before.

        The errors are then scaled instead of the gradients, which have many more numbers; so does the backward pass.
        """
        level, end = self.levels[index], self._host_end
        if level is None or end is None or not self._is_clear[index] or not does_tick(end, self.memory.periods[index]):
            return None
        is_held = self.memory.settings.levels[index].learning_rate <= 0  # no gradient could be told from the product
        return None if is_held or dtype != level.change[0].dtype else self._step_back(index, level)

    def collect(self, index: int, gradients: tuple[Tensor, ...], is_scaled: bool) -> None:
        """Add a chunk's gradients to what is pending; `is_scaled`: they are the step already (see `step_at_once`)."""
        self._is_scaled[index] = is_scaled
        level = self.levels[index]
        assert level is not None
        is_clear = self._is_clear[index]
        pending = tuple(
            g.to(p.dtype) if is_clear else p + g.to(p.dtype) for p, g in zip(level.pending, gradients, strict=True)
        )
        self.levels[index], self._is_clear[index] = LevelState(level.change, pending, level.base), False

    def restart(self, layout: ChunkLayout, index: int) -> None:
        """Rows whose chunk `index` begins a new segment forget everything."""
        is_whole = layout.restarts is None and layout.valid is None and layout.slot is None
        known = self.host_tokens if is_whole else None
        self._host_end = None if known is None else known + layout.chunk_size
        if layout.restarts is None:
            return
        begins = layout.restarts[:, index]
        for number, level in enumerate(self.levels):
            if level is not None:
                fresh = level.mapped(lambda t: _where(begins, torch.zeros_like(t), t))
                self._set(number, fresh, self._is_clear[number])
        self.num_tokens = torch.where(begins, torch.zeros_like(self.num_tokens), self.num_tokens)
        self.host_tokens = None

    def advance(self, layout: ChunkLayout, index: int) -> None:
        """Count the chunk's tokens and let the levels tick whose period ends here."""
        size = layout.chunk_size
        counted = torch.full_like(self.num_tokens, size)
        if layout.valid is not None:
            counted = layout.valid[:, index * size : (index + 1) * size].sum(1)
        if layout.valid is not None or layout.slot is not None:
            self.host_tokens = None
        seen = self.num_tokens + counted
        if self.host_tokens is not None:
            self.host_tokens += size
        for number, period in enumerate(self.memory.periods):
            if period == NEVER:
                continue
            if self.host_tokens is not None:
                if does_tick(self.host_tokens, period):
                    self._tick(number, None, layout, index)
            else:
                self._tick(number, (seen % period == 0) & (counted > 0), layout, index)
        self.num_tokens = seen % self.longest

    def _tick(self, index: int, rows: Tensor | None, layout: ChunkLayout, chunk: int) -> None:
        """Update level `index` in `rows` [B] (None: in all) behind a chunk; nested: the next faster level begins anew."""
        level = self.levels[index]
        assert level is not None
        settings = self.memory.settings
        back = self._step_back(index, level)
        pairs = zip(level.change, level.pending, strict=True)
        changed = tuple(c + p if self._is_scaled[index] else torch.addcmul(c, p, back) for c, p in pairs)
        start = self.memory.start(index)
        if not self.memory.learns_writes:  # the bound is the start's norm: it must not carry a gradient either
            inner, inner_bias, outer, outer_bias = (p.detach() for p in start)
            start = inner, inner_bias, outer, outer_bias
        if settings.largest_growth > 0:
            if index not in self._limits:
                self._limits[index] = settings.largest_growth * _joint_norm(tuple(p.to(_wide(p))[None] for p in start))
            changed = _held(changed, self._limits[index])
        norm = _joint_norm(tuple(p.detach() for p in level.pending))
        if self._is_scaled[index]:
            norm = norm / back.detach().abs().flatten().clamp(min=torch.finfo(norm.dtype).tiny)
        counted = torch.ones_like(norm, dtype=torch.bool) if rows is None else rows
        if self.is_padding is not None:  # what padding wrote is no sign of life
            place = slice(chunk * layout.chunk_size, (chunk + 1) * layout.chunk_size)
            held = self.is_padding[:, place]
            counted = counted & ~(held if layout.valid is None else held & layout.valid[:, place]).any(1)
        self.num_updates[index] = self.num_updates[index] + counted
        self.gradient_norms[index] = torch.where(counted, norm.float(), self.gradient_norms[index])
        ticked = LevelState(changed, self._cleared(index, level.pending), level.base)
        self._set(index, _merged(rows, ticked, level), rows is None)
        if settings.variant == "nested" and index > 0:
            self._begin_anew(index - 1, rows)

    def _step_back(self, index: int, level: LevelState) -> Tensor:
        """-eta / D of a level."""
        if index not in self._steps_back:
            rate = self.memory.settings.levels[index].learning_rate
            if self.memory.learns_writes and rate > 0:
                eta = nn.functional.softplus(self.memory.rates[index]).to(level.change[0].dtype)
            else:
                eta = torch.full_like(level.change[1][:1, :1, :1], rate)
            self._steps_back[index] = -eta / self.memory.d_model
        return self._steps_back[index]

    def _begin_anew(self, index: int, rows: Tensor | None) -> None:
        level = self.levels[index]
        assert level is not None and level.base is not None
        share = self.memory.settings.nested_rate
        base = tuple(b + share * (c - b) for b, c in zip(level.base, level.change, strict=True))
        anew = LevelState(base, self._cleared(index, level.pending), base)
        self._set(index, _merged(rows, anew, level), rows is None)

    def health(self) -> dict[str, Tensor]:
        """Per level: updates in this call (an update that nothing would read is left out), norm of the
        last update's gradient, norm of the change (means over rows).
        """
        found: dict[str, Tensor] = {}
        for index, level in enumerate(self.levels):
            if level is not None:
                found[f"memory/level_{index}_updates"] = self.num_updates[index].mean()
                found[f"memory/level_{index}_gradient_norm"] = self.gradient_norms[index].mean()
                found[f"memory/level_{index}_change_norm"] = _joint_norm(level.change).detach().float().mean()
        return found


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _where(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return torch.where(rows.reshape(-1, *[1] * (left.dim() - 1)), left, right)


def _merged(rows: Tensor | None, left: LevelState, right: LevelState) -> LevelState:
    """Rows [B] of `left` where True, of `right` elsewhere; None takes `left`."""
    if rows is None:
        return left

    def merged(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(_where(rows, x, y) for x, y in zip(a, b, strict=True))

    base = None if left.base is None or right.base is None else merged(left.base, right.base)
    return LevelState(merged(left.change, right.change), merged(left.pending, right.pending), base)


def _joint_norm(tensors: tuple[Tensor, ...]) -> Tensor:
    """Norm of all tensors of each row together: [B]."""
    return torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(t.flatten(1), dim=1) for t in tensors]), dim=0
    )


def _held(change: tuple[Tensor, ...], limit: Tensor) -> tuple[Tensor, ...]:
    """The change, the joint norm of each row held below `limit` [1]."""
    if may_look(limit):
        with torch.no_grad():
            is_below = bool((_joint_norm(change) <= limit).all())
        if is_below:  # as nearly always: nothing to scale, forwards or backwards
            return change
    scale = (limit / _joint_norm(change).clamp(min=1e-15)).clamp(max=1.0)  # [B]
    return tuple(t * scale.reshape(-1, *[1] * (t.dim() - 1)) for t in change)
