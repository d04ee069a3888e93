"""ContinuumMemory: the decay form of the CMS; M associative memories per head on log-spaced time scales.

    write  S_m[t] = tau_m S_m[t-1] + (1 - tau_m) k_t v_t^T        read  o_t = sum_m g_m(x_t) S_m[t]^T q_t

Decided where the sources are silent (hope.md section 1): tau is retention (0.01 forgets at once, 0.99 keeps for about 69
tokens); time scales are log-spaced in half-life; memories work side by side, not chained; reads come after the write
(`reads_after_write=False` for the other order); keys and queries are not normalised; state is per sequence. With
`corrects_bias` every read is divided by 1 - tau^t, so that tau -> 1 reads the mean of all writes.
Cost: O(T C K + T M K^2) a head; state O(1) in T. Parameters: 4 D^2 + D H M (+ H M with a gate bias).
Usable alone: `y, state = ContinuumMemory(d_model=64, num_heads=4)(x)`. Source: models.md 2.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.models.hope.decayed_reads import ReadInputs, decayed_reads, reaches
from hsmn_dist.models.hope.fast_state import FastState
from hsmn_dist.models.precision import wide_type

DEFAULT_CHUNK = 64


@dataclass
class ContinuumState(FastState):
    """memory [B, H, M, K, K], fp32 or wider; num_tokens [B]: tokens written since the last reset."""

    memory: Tensor
    num_tokens: Tensor


def retentions(num_modules: int, fastest: float = 0.01, slowest: float = 0.99) -> list[float]:
    """Tau of each module, fast to slow, log-spaced in half-life ln(1/2) / ln(tau) tokens."""
    if not (0.0 < fastest <= slowest < 1.0):
        raise ModelError(
            f"retentions from {fastest} to {slowest}",
            allowed="0 < fastest <= slowest < 1",
            action="correct `model.cms.fastest_retention` and `model.cms.slowest_retention`",
        )
    if num_modules == 1:
        return [slowest]
    first, last = (math.log(math.log(0.5) / math.log(tau)) for tau in (fastest, slowest))
    steps = [first + (last - first) * m / (num_modules - 1) for m in range(num_modules)]
    return [0.5 ** (1.0 / math.exp(step)) for step in steps]


class ContinuumMemory(nn.Module):
    """Decay-form CMS as one layer [B, T, D] -> [B, T, D].

    Args:
        d_model: D.
        num_heads: H; must divide D.
        num_modules: M time scales.
        taus: retentions to use instead of the log-spaced ones, each in [0, 1].
        reads_after_write: token t reads its own write.
        corrects_bias: divide reads by 1 - tau^t.
        chunk_size: tokens computed in parallel; changes speed, never the result.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_modules: int = 5,
        *,
        taus: list[float] | None = None,
        reads_after_write: bool = True,
        corrects_bias: bool = False,
        chunk_size: int = DEFAULT_CHUNK,
    ) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ModelError(
                f"num_heads {num_heads} with d_model {d_model}",
                allowed="a number of heads that divides the width",
                action="change `model.num_heads` or `model.d_model`",
            )
        self.d_model, self.num_heads, self.head_dim = d_model, num_heads, d_model // num_heads
        self.taus = tuple(retentions(num_modules) if taus is None else taus)
        if not self.taus or any(not 0.0 <= tau <= 1.0 for tau in self.taus):
            raise ModelError(
                f"retentions {self.taus}", allowed="one or more values in [0, 1]", action="correct the CMS's taus"
            )
        self.reads_after_write, self.corrects_bias, self.chunk_size = reads_after_write, corrects_bias, chunk_size
        self.project = nn.Linear(d_model, 3 * d_model, bias=False)
        self.gate = nn.Linear(d_model, num_heads * len(self.taus))
        self.output = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        state: ContinuumState | None = None,
        reset: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        returns_state: bool = True,
    ) -> tuple[Tensor, ContinuumState | None]:
        """Reads for every token, and the state after the last one.

        Args:
            x: [B, T, D].
            state: memory that the tokens before left; None starts empty.
            reset: [B, T] bool, True where the memory is cleared before the token (a new segment of a packed row).
            valid: [B, T] bool; False (right end only) for padding, which leaves no trace in the state.
            returns_state: False saves the last write and returns None as state.
        """
        if state is not None:
            state.check_batch(x.shape[0])
        if x.shape[1] == 0:
            return x, state
        batch, tokens, _ = x.shape
        query, key, value = (
            t.reshape(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2)
            for t in self.project(x).chunk(3, -1)
        )
        # Tokens last while the softmax runs: M numbers are too few for the inner loop. [B, H, M, T]
        gates = self.gate(x).reshape(batch, tokens, self.num_heads, len(self.taus)).permute(0, 2, 3, 1)
        # The scale of the scores goes into the gates, which hold M numbers a head where a query holds K.
        gates = torch.softmax(gates, 2, dtype=wide_type(gates)) * self.head_dim**-0.5
        gates = gates.mT
        decays = torch.tensor(self.taus, device=x.device, dtype=gates.dtype)
        num_tokens = None
        if self.corrects_bias or returns_state:
            num_tokens = _num_tokens(batch, tokens, state, reset, valid, x.device)
        if self.corrects_bias and num_tokens is not None:
            gates = gates * self._bias_correction(num_tokens)[:, None].to(gates.dtype)
        segments = None if reset is None else reset.long().cumsum(1)
        inputs = ReadInputs(
            query,
            key,
            value,
            gates,
            decays,
            1.0 - decays,
            segments,
            valid,
            self.reads_after_write,
            reaches(self.taus, decays.dtype),
        )
        reads, memory = decayed_reads(inputs, None if state is None else state.memory, self.chunk_size, returns_state)
        y = self.output(reads.transpose(1, 2).reshape(batch, tokens, self.d_model))
        after = None if memory is None or num_tokens is None else ContinuumState(memory, num_tokens[:, -1])
        return y, after

    def _bias_correction(self, num_tokens: Tensor) -> Tensor:
        """1 / (1 - tau^n) for n writes seen by each read; tau = 1 is refused by its zero write weight: [B, T, M]."""
        seen = num_tokens if self.reads_after_write else num_tokens - 1
        decays = torch.tensor(self.taus, device=num_tokens.device, dtype=torch.float64)
        weight = -torch.expm1(seen[..., None].double() * decays.clamp(min=1e-300).log())
        return torch.where(weight > 0, 1.0 / weight.clamp(min=1e-300), torch.zeros_like(weight))


def _num_tokens(
    batch: int,
    tokens: int,
    state: ContinuumState | None,
    reset: Tensor | None,
    valid: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Tokens written since the last reset, this one included: [B, T]."""
    ones = torch.ones(batch, tokens, dtype=torch.long, device=device) if valid is None else valid.long()
    seen = ones.cumsum(1)
    carried = torch.zeros(batch, dtype=torch.long, device=device) if state is None else state.num_tokens
    if reset is None:
        return seen + carried[:, None]
    base = torch.where(reset, seen - ones, torch.full_like(seen, -1)).cummax(1).values
    return torch.where(base >= 0, seen - base, seen + carried[:, None])
