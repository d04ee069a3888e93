"""ChunkEncoder: one embedding for each chunk, read at a CLS position in front of it.

Unusual: row 0 of the position table is the CLS token, and the last layer computes the CLS row alone, which is exact and
saves nearly half of the work; it needs no keys and values of the chunk for that (`Attention.read_once`). In groups, overlapping chunks read their
tokens from one list of embedded rows, so nothing of the size of all chunks is ever formed, forwards or backwards.
Source: HSMN paper, ChunkEncoder; recomputing: Chen et al. 2016, arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hsmn_dist.models.example_rows import current_rows, example_rows
from hsmn_dist.models.layers.attention import Attention
from hsmn_dist.models.layers.dropout import Dropout
from hsmn_dist.models.layers.feed_forward import Activation, FeedForward
from hsmn_dist.models.layers.norms import build_norm

Recompute = Literal["none", "attention", "sublayers", "all"]


def announced_rows(owners: Tensor | None) -> AbstractContextManager[None]:
    """`example_rows`, except inside torch.compile, which cannot trace it (and where nobody listens)."""
    return nullcontext() if torch.compiler.is_compiling() else example_rows(owners)


@dataclass(frozen=True)
class EncoderGroups:
    """How many chunks are encoded at a time (0: all of them), and what a group computes again in the backward pass."""

    num_chunks: int = 0
    recompute: Recompute = "all"


class _GatheredRows(torch.autograd.Function):
    """rows[index], and the rows again for the next group, so that the gradients of all groups add up in one buffer.

    Autograd alone would fill and add one tensor of all rows for every group.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(index)
        ctx.shape = rows.shape
        ctx.set_materialize_grads(False)
        return rows[index], rows.view_as(rows)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, gradient: Tensor | None, passed_on: Tensor | None) -> tuple[Tensor | None, None]:
        (index,) = ctx.saved_tensors
        if gradient is None:
            return passed_on, None
        # Only the next group's node hands this tensor on, so it is ours to write to.
        total = gradient.new_zeros(ctx.shape) if passed_on is None else passed_on
        return total.index_put_((index,), gradient, accumulate=True), None


class EncoderLayer(nn.Module):
    """Full attention inside a chunk, then a feed-forward; norms in front ("pre") or behind ("post", the original)."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_feed_forward: int,
        dropout: float,
        activation: Activation = "relu",
        is_pre_norm: bool = True,
    ) -> None:
        super().__init__()
        self.attention_norm = build_norm(d_model)
        self.attention = Attention(d_model, num_heads)
        self.feed_forward_norm = build_norm(d_model)
        self.feed_forward = FeedForward(d_model, d_feed_forward, activation)
        self.dropout = Dropout(dropout)
        self.is_pre_norm = is_pre_norm

    def forward(self, x: Tensor, key_mask: Tensor, num_rows: int, recompute: Recompute = "none") -> Tensor:
        """From x [R, S + 1, D] and key_mask [R, 1, 1, S + 1] -> the first `num_rows` positions, [R, num_rows, D].

        `recompute`: what is not kept for the backward pass; "attention" or (both) "sublayers", else nothing.
        """
        again = recompute if torch.is_grad_enabled() else "none"
        attended = partial(_recomputed, self._attended) if again in ("attention", "sublayers") else self._attended
        fed_forward = partial(_recomputed, self._fed_forward) if again == "sublayers" else self._fed_forward
        read = attended(x, key_mask, num_rows)
        x = self.dropout(read, x[:, :num_rows])
        x = x if self.is_pre_norm else self.attention_norm(x)
        fed = fed_forward(x)
        x = self.dropout(fed, x)
        return x if self.is_pre_norm else self.feed_forward_norm(x)

    def _attended(self, x: Tensor, key_mask: Tensor, num_rows: int) -> Tensor:
        x = self.attention_norm(x) if self.is_pre_norm else x
        if num_rows == 1:
            return self.attention.read_once(x[:, :1], x, key_mask)
        return self.attention(x[:, :num_rows], x, mask=key_mask, always_sees=True)  # the CLS token at least

    def _fed_forward(self, x: Tensor) -> Tensor:
        return self.feed_forward(self.feed_forward_norm(x) if self.is_pre_norm else x)


def _recomputed(sublayer: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """A sublayer without randomness; its recomputation stops before the last map, whose result nobody needs again."""
    return checkpoint(sublayer, *arguments, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


class ChunkEncoder(nn.Module):
    """Embedded chunk tokens -> one vector for each chunk.

    In groups, memory is that of one group instead of the whole context. The number of groups differs between ranks, so
    ZeRO-3 must then gather this module as a whole (`LanguageModel.gathered_whole`).
    """

    def __init__(
        self,
        layers: list[EncoderLayer],
        d_model: int,
        chunk_size: int,
        dropout: float,
        groups: EncoderGroups | None = None,
    ) -> None:
        super().__init__()
        self.position_embedding = nn.Embedding(chunk_size + 1, d_model)
        self.layers = nn.ModuleList(layers)
        self.final_norm = build_norm(d_model) if layers[0].is_pre_norm else nn.Identity()
        self.dropout = Dropout(dropout)
        self.groups = EncoderGroups() if groups is None else groups

    def forward(self, embedded: Tensor, mask: Tensor, index: Tensor | None = None) -> Tensor:
        """Vectors [R, D] of R chunks.

        Args:
            embedded: tokens of the chunks [R, S, D]; or, with `index`, the rows [U, D] that it points to.
            mask: [R, S] bool, True on real tokens.
            index: [R, S], where each token of each chunk stands in `embedded`.
        """
        owners = None if torch.compiler.is_compiling() else current_rows()
        size = self.groups.num_chunks
        if not 0 < size < mask.shape[0]:
            return self._encode(embedded if index is None else F.embedding(index, embedded), mask, owners)
        recomputes = self.groups.recompute == "all" and torch.is_grad_enabled()
        encoded = []
        for start in range(0, mask.shape[0], size):
            part = slice(start, start + size)
            given = embedded[part] if index is None else embedded
            arguments = (
                given,
                mask[part],
                None if owners is None else owners[part],
                None if index is None else index[part],
            )
            if recomputes:
                vectors, embedded_on = checkpoint(self._encode_group, *arguments, use_reentrant=False)
            else:
                vectors, embedded_on = self._encode_group(*arguments)
            if index is not None:
                embedded = embedded_on
            encoded.append(vectors)
        return torch.cat(encoded)

    def _encode_group(
        self, embedded: Tensor, mask: Tensor, owners: Tensor | None, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Vectors of one group, and what the next group reads its rows from."""
        tokens = embedded
        if index is not None:
            tokens, embedded = _GatheredRows.apply(embedded, index)  # type: ignore[no-untyped-call]
        return self._encode(tokens, mask, owners), embedded

    def _encode(self, embedded: Tensor, mask: Tensor, owners: Tensor | None) -> Tensor:
        num_chunks, chunk_size, _ = embedded.shape
        recompute = self.groups.recompute if self.groups.num_chunks > 0 else "none"
        with announced_rows(owners):
            positions = torch.arange(chunk_size + 1, device=mask.device).expand(num_chunks, -1)
            x = self.dropout(F.pad(embedded, (0, 0, 1, 0)) + self.position_embedding(positions))  # [R, S + 1, D]
            key_mask = F.pad(mask, (1, 0), value=True)[:, None, None, :]
            last = len(self.layers) - 1
            for number, layer in enumerate(self.layers):
                x = layer(x, key_mask, 1 if number == last else chunk_size + 1, recompute)
            return self.final_norm(x[:, 0])  # [R, D]
