"""ReasoningDecoder: causal self-attention over the target, cross-attention to the memory nodes, feed-forward.

Unusual: a long target may be read in windows with cached keys and values; positions run on through all windows (the
original restarted them), and the result equals the single pass. Source: HSMN paper, ReasoningModule; models.md 1.6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.models.layers.attention import Attention
from hsmn_dist.models.layers.dropout import Dropout
from hsmn_dist.models.layers.feed_forward import Activation, FeedForward
from hsmn_dist.models.layers.kv_cache import LayerCache
from hsmn_dist.models.layers.norms import build_norm

KeysValues = tuple[Tensor, Tensor]
Health = dict[str, Tensor]


@dataclass
class DecoderState:
    """What the decoder remembers between windows or tokens.

    Attributes:
        caches: self-attention keys and values, one for each layer.
        memory: cross-attention keys and values of the memory nodes, one pair for each layer.
        memory_mask: [B, 1, 1, N] bool.
        num_tokens: target positions read so far.
        fast: states of the blocks' continuum memories, one for each layer (None without, and at the start).
    """

    caches: list[LayerCache]
    memory: list[KeysValues]
    memory_mask: Tensor
    num_tokens: int = 0
    fast: list[Any] = field(default_factory=list)

    @property
    def batch_size(self) -> int:
        """Rows of the batch that this state belongs to."""
        return self.memory_mask.shape[0]

    def fork(self) -> DecoderState:
        """An independent copy, to go on in two ways."""
        caches = [cache.fork() for cache in self.caches]
        return DecoderState(caches, self.memory, self.memory_mask, self.num_tokens, list(self.fast))


class ReasoningBlock(nn.Module):
    """Three sublayers, each with a residual; norms in front ("pre") or behind ("post", the original).

    The hybrid passes in a fourth one, `cms`, which maps (x, state, whether a state is wanted) to (y, state, health).
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_feed_forward: int,
        dropout: float,
        activation: Activation = "relu",
        is_pre_norm: bool = True,
        span: int = 0,
        cms: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.self_norm = build_norm(d_model)
        self.self_attention = Attention(d_model, num_heads)
        self.cross_norm = build_norm(d_model)
        self.cross_attention = Attention(d_model, num_heads)
        self.cms_norm = None if cms is None else build_norm(d_model)
        self.cms = cms
        self.feed_forward_norm = build_norm(d_model)
        self.feed_forward = FeedForward(d_model, d_feed_forward, activation)
        self.dropout = Dropout(dropout)
        self.is_pre_norm = is_pre_norm
        self.span = span

    def forward(self, x: Tensor, memory: Tensor, memory_mask: Tensor) -> tuple[Tensor, Health]:
        """From x [B, T, D], memory [B, N, D] and memory_mask [B, 1, 1, N] to [B, T, D] and the CMS's health scalars."""
        x, _, health = self._run(x, self.cross_attention.keys_values(memory), memory_mask, None, None)
        return x, health

    def extend(
        self, x: Tensor, memory: KeysValues, memory_mask: Tensor, cache: LayerCache, fast: Any
    ) -> tuple[Tensor, Any]:
        """New target positions x [B, T, D] behind those in `cache` and in the CMS state `fast` (None at the start)."""
        x, fast, _ = self._run(x, memory, memory_mask, cache, fast)
        return x, fast

    def _run(
        self, x: Tensor, memory: KeysValues, memory_mask: Tensor, cache: LayerCache | None, fast: Any
    ) -> tuple[Tensor, Any, Health]:
        x = self._residual(x, self.self_norm, lambda y: self._attend(y, cache))
        x = self._residual(x, self.cross_norm, lambda y: self.cross_attention.read(y, memory, memory_mask))
        health: Health = {}
        if self.cms is not None and self.cms_norm is not None:
            y, fast, health = self.cms(self.cms_norm(x) if self.is_pre_norm else x, fast, cache is not None)
            x = self.dropout(y, x) if self.is_pre_norm else self.cms_norm(self.dropout(y, x))
        return self._residual(x, self.feed_forward_norm, self.feed_forward), fast, health

    def _residual(self, x: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        if self.is_pre_norm:
            return self.dropout(sublayer(norm(x)), x)
        return norm(self.dropout(sublayer(x), x))

    def _attend(self, x: Tensor, cache: LayerCache | None) -> Tensor:
        return self.self_attention(x, is_causal=True, cache=cache, span=self.span)


class ReasoningDecoder(nn.Module):
    """A stack of reasoning blocks over embedded target tokens."""

    def __init__(self, blocks: list[ReasoningBlock], d_model: int, max_target_tokens: int, dropout: float) -> None:
        super().__init__()
        self.position_embedding = nn.Embedding(max_target_tokens, d_model)
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = build_norm(d_model) if blocks[0].is_pre_norm else nn.Identity()
        self.dropout = Dropout(dropout)
        self.max_target_tokens = max_target_tokens

    @property
    def stack(self) -> list[ReasoningBlock]:
        """The blocks in order, as what they are."""
        return cast(list[ReasoningBlock], list(self.blocks))

    def _embed(self, embedded: Tensor, first_position: int) -> Tensor:
        positions = torch.arange(first_position, first_position + embedded.shape[1], device=embedded.device)
        return self.dropout(embedded + self.position_embedding(positions.expand(embedded.shape[0], -1)))

    def forward(self, embedded: Tensor, memory: Tensor, memory_mask: Tensor) -> tuple[Tensor, Health]:
        """Embedded shifted targets [B, T, D], memory [B, N, D], its mask [B, 1, 1, N] -> hidden [B, T, D], health."""
        x = self._embed(embedded, 0)
        health: Health = {}
        for index, block in enumerate(self.blocks):
            x, scalars = block(x, memory, memory_mask)
            health.update({f"{name}/block_{index}": value for name, value in scalars.items()})
        return self.final_norm(x), health

    def start(self, memory: Tensor, memory_mask: Tensor) -> DecoderState:
        """A state before the first target token, with each layer's keys and values of the memory prepared once."""
        caches = [LayerCache(block.span) for block in self.stack]
        prepared = [block.cross_attention.keys_values(memory) for block in self.stack]
        return DecoderState(caches, prepared, memory_mask, 0, [None] * len(caches))

    def extend(self, embedded: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Read a further window [B, T, D]; hidden [B, T, D] and the new state.

        Raises:
            ModelError: the old state was used before (its caches hold another future by now).
        """
        if any(cache.num_appended != state.num_tokens for cache in state.caches):
            raise ModelError(
                f"a state of {state.num_tokens} target tokens whose cache has gone on to {state.caches[0].num_appended}",
                allowed="each state is advanced once",
                action="take state.fork() before going on in two ways",
            )
        x = self._embed(embedded, state.num_tokens)
        fast = []
        for index, block in enumerate(self.stack):
            x, after = block.extend(x, state.memory[index], state.memory_mask, state.caches[index], state.fast[index])
            fast.append(after)
        num_tokens = state.num_tokens + embedded.shape[1]
        return self.final_norm(x), DecoderState(state.caches, state.memory, state.memory_mask, num_tokens, fast)
