"""Fast weights of a ChainMemory's levels on their way through a sequence: what is pending, when they tick, how far they go.

Unusual: a level's gradient over the tokens between two ticks is taken at fixed weights, so it is one product of all their errors
and inputs. Where rows go side by side through whole chunks these wait for the tick: fewer, larger products, none for tokens
that no tick follows, and errors scaled by the rate in place of gradients. Elsewhere each chunk is multiplied out at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from hsmn_dist.models.hope.chunk_layout import ChunkLayout
from hsmn_dist.models.hope.fast_state import FastState
from hsmn_dist.models.hope.level_clock import NEVER, does_tick
from hsmn_dist.models.precision import wide_type
from hsmn_dist.models.tracing import may_look

if TYPE_CHECKING:
    from hsmn_dist.models.hope.chain_memory import ChainMemory

Weights = tuple[Tensor, Tensor, Tensor, Tensor]  # inner [F, D], its bias [F], outer [D, F], its bias [D]
_SURELY = 0.999
"""Share of a bound that rounding errors of a sum of norms do not reach."""
_MOST_WAITING = 16
"""Chunks whose errors and inputs are held for a tick far away: a reader of a long text keeps no more."""


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


class Factors(NamedTuple):
    """What a level's gradient over some tokens is the products of: errors [B, c, ...] before the hidden units and behind, inputs."""

    lift_error: Tensor
    source: Tensor
    out_error: Tensor
    hidden: Tensor

    def gradients(self) -> tuple[Tensor, ...]:
        """In the order of `Weights`, [B, ...] each."""
        return (
            self.lift_error.mT @ self.source,
            self.lift_error.sum(1, keepdim=True),
            self.out_error.mT @ self.hidden,
            self.out_error.sum(1, keepdim=True),
        )


class Walk:
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
        # While rows go side by side through whole chunks, a level's products wait for its tick and are then made at once.
        self.is_whole = False
        self._factors: list[list[Factors]] = [[] for _ in memory.periods]
        self._is_in_numbers = [state is not None] * len(memory.periods)  # `pending` holds something
        # What several chunks share is made once: a level between two ticks, nothing pending, rate, and the bound of a change.
        self._weights: list[Weights | None] = [None] * len(memory.periods)
        self._nothing: dict[int, tuple[Tensor, ...]] = {}
        self._limits: dict[int, Tensor] = {}
        self._reaches: dict[int, Tensor] = {}  # [B], never below the norm of a level's change; absent where unknown
        self._steps_back: dict[int, Tensor] = {}
        # Filled behind the first chunk, never here: all ranks must end a start's gradient at the same point of the backward pass, the
        # first chunk's use of it, for ZeRO reduces gradients in the order in which they end. A rank without a tick has no other use.
        self._starts: dict[int, Weights] = {}
        for index, period in enumerate(memory.periods):
            if state is not None:
                self.levels.append(state.levels[index])
            else:
                self.levels.append(None if period == NEVER else self._fresh(index))
                self._reaches[index] = torch.zeros(batch, device=device)

    def _fresh(self, index: int) -> LevelState:
        def zeros() -> tuple[Tensor, ...]:
            return tuple(
                torch.zeros(
                    self.batch, *(p.shape if p.dim() == 2 else (1, *p.shape)), device=p.device, dtype=wide_type(p)
                )
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
            if index not in self._starts:
                # With a dimension for the rows: the backward pass of a sum with one row has then nothing to sum.
                inner, inner_bias, outer, outer_bias = (p.reshape(1, -1, p.shape[-1]) for p in self.memory.start(index))
                self._starts[index] = inner, inner_bias, outer, outer_bias
            inner, inner_bias, outer, outer_bias = (
                (p.to(c.dtype) + c).to(dtype) for p, c in zip(self._starts[index], level.change, strict=True)
            )
            known = self._weights[index] = inner, inner_bias, outer, outer_bias
        return known

    def _set(self, index: int, level: LevelState) -> None:
        self.levels[index] = level
        self._weights[index] = None

    def _cleared(self, index: int, pending: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not self._is_in_numbers[index]:
            return pending  # zeros already
        if index not in self._nothing:
            self._nothing[index] = tuple(torch.zeros_like(p) for p in pending)
        return self._nothing[index]

    def collect(self, index: int, factors: Factors) -> None:
        """Add a chunk's gradient to what is pending."""
        self._factors[index].append(factors)
        if not self.is_whole or len(self._factors[index]) >= _MOST_WAITING:
            self._multiply_out(index)

    def settle(self) -> None:
        """Put into numbers what waits: the levels then have all of it in `pending`."""
        for index in range(len(self.levels)):
            self._multiply_out(index)

    def _waiting(self, index: int) -> Factors:
        """Of all chunks whose products wait; they wait no longer."""
        waiting, self._factors[index] = self._factors[index], []
        if len(waiting) == 1:
            return waiting[0]
        return Factors(*(torch.cat(parts, 1) for parts in zip(*waiting, strict=True)))

    def _multiply_out(self, index: int) -> None:
        level = self.levels[index]
        if level is None or not self._factors[index]:
            return
        gradients = self._written(self._waiting(index).gradients())
        pending = tuple(p + g.to(p.dtype) for p, g in zip(level.pending, gradients, strict=True))
        self.levels[index] = LevelState(level.change, pending, level.base)
        self._is_in_numbers[index] = True

    def _written(self, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return gradients if self.memory.learns_writes else tuple(g.detach() for g in gradients)

    def restart(self, layout: ChunkLayout, index: int) -> None:
        """Before chunk `index`: rows in which it begins a new segment forget everything."""
        self.is_whole = self.host_tokens is not None and index < layout.num_whole
        if not self.is_whole:
            self.settle()
        if layout.restarts is None:
            return
        begins = layout.restarts[:, index]
        for number, level in enumerate(self.levels):
            if level is not None:
                self._set(number, level.mapped(lambda t: _where(begins, torch.zeros_like(t), t)))
        self.num_tokens = torch.where(begins, torch.zeros_like(self.num_tokens), self.num_tokens)
        self.host_tokens = None

    def advance(self, layout: ChunkLayout, index: int) -> None:
        """Count the chunk's tokens and let the levels tick whose period ends here."""
        size = layout.chunk_size
        counted = torch.full_like(self.num_tokens, size)
        if layout.valid is not None:
            counted = layout.valid[:, index * size : (index + 1) * size].sum(1)
        if not self.is_whole:
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
        moved, is_scaled = self._moved(index, back)
        pairs = zip(level.change, moved, strict=True)
        changed = tuple(c + m if is_scaled else torch.addcmul(c, m, back) for c, m in pairs)
        size = back.detach().abs().flatten()
        norm = _joint_norm(tuple(m.detach() for m in moved))
        step = norm if is_scaled else norm * size
        if is_scaled:
            norm = norm / size.clamp(min=torch.finfo(norm.dtype).tiny)
        if settings.largest_growth > 0:
            changed = self._held(index, changed, step)
        counted = torch.ones_like(norm, dtype=torch.bool) if rows is None else rows
        if self.is_padding is not None:  # what padding wrote is no sign of life
            place = slice(chunk * layout.chunk_size, (chunk + 1) * layout.chunk_size)
            held = self.is_padding[:, place]
            counted = counted & ~(held if layout.valid is None else held & layout.valid[:, place]).any(1)
        self.num_updates[index] = self.num_updates[index] + counted
        self.gradient_norms[index] = torch.where(counted, norm.float(), self.gradient_norms[index])
        ticked = LevelState(changed, self._cleared(index, level.pending), level.base)
        self._set(index, _merged(rows, ticked, level))
        self._is_in_numbers[index] = rows is not None
        if settings.variant == "nested" and index > 0:
            self._begin_anew(index - 1, rows)

    def _moved(self, index: int, back: Tensor) -> tuple[tuple[Tensor, ...], bool]:
        """The gradient since the last tick, and whether it is multiplied by `back` already.

        The errors are then scaled in place of the products, which have many more numbers; so does the backward pass.
        """
        if self._is_in_numbers[index] or not self._factors[index]:
            self._multiply_out(index)
        level = self.levels[index]
        assert level is not None
        if not self._factors[index]:
            return level.pending, False
        factors = self._waiting(index)
        is_held = self.memory.settings.levels[index].learning_rate <= 0  # no gradient could be told from the product
        is_scaled = not is_held and factors.source.dtype == level.change[0].dtype
        if is_scaled:
            factors = factors._replace(lift_error=factors.lift_error * back, out_error=factors.out_error * back)
        moved = (g.to(c.dtype) for g, c in zip(self._written(factors.gradients()), level.change, strict=True))
        return tuple(moved), is_scaled

    def _held(self, index: int, changed: tuple[Tensor, ...], step: Tensor) -> tuple[Tensor, ...]:
        """What a level's change becomes, its joint norm in each row held to `largest_growth` of the start's.

        No norm is longer than the steps that led to it [B]: while these are short, nothing is measured.
        """
        if index not in self._limits:
            norm = _joint_norm(tuple(p.to(wide_type(p))[None] for p in self.memory.start(index)))
            # Writes that carry no gradient carry none by their bound either.
            norm = norm if self.memory.learns_writes else norm.detach()
            self._limits[index] = self.memory.settings.largest_growth * norm
        limit = self._limits[index]  # [1]
        if may_look(limit):  # as nearly always there is nothing to scale, forwards or backwards
            with torch.no_grad():
                known = self._reaches.get(index)
                if known is not None and bool((known + step <= _SURELY * limit).all()):
                    self._reaches[index] = known + step
                    return changed
                self._reaches[index] = _joint_norm(changed)
                if bool((self._reaches[index] <= limit).all()):
                    return changed
        self._reaches.pop(index, None)
        scale = (limit / _joint_norm(changed).clamp(min=1e-15)).clamp(max=1.0)  # [B]
        return tuple(t * scale.reshape(-1, *[1] * (t.dim() - 1)) for t in changed)

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
        self._reaches.pop(index, None)
        self._set(index, _merged(rows, anew, level))

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
