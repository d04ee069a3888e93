"""Multi-head attention over `scaled_dot_product_attention`, for self- and cross-attention, cached or not.

Unusual: a query that may attend to nothing reads exact zeros, with zero gradients, instead of NaN or a mean of padding.
Attention weights themselves are not dropped out (docs/decisions/0010): the fused kernels stay usable everywhere.
Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.models.example_rows import tied_linear
from hsmn_dist.models.layers.kv_cache import LayerCache
from hsmn_dist.models.layers.rotary import RotaryTable, rotate


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    always_sees: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention.

    Args:
        query: [B, H, T, K].
        key: [B, H, N, K].
        value: [B, H, N, K].
        mask: bool, broadcastable to [B, H, T, N], True where attention is allowed; None allows everything.
        is_causal: query t sees keys 0..t (only with equal lengths and without `mask`).
        always_sees: the caller knows that no row of `mask` is False throughout; saves a copy of the result.
        scale: of the scores; None is 1 / sqrt(K).

    Returns:
        [B, H, T, K]; zeros for a query whose mask row is False throughout.
    """
    if mask is None or always_sees:
        is_causal = is_causal and mask is None
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale)
    sees_any = mask.any(dim=-1, keepdim=True)
    # A softmax over nothing is NaN forward or backward on some kernels: let such rows see all, then zero what they read.
    read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask | ~sees_any, scale=scale)
    return torch.where(sees_any, read, torch.zeros((), dtype=read.dtype, device=read.device))


def causal_mask(num_queries: int, num_keys: int, device: torch.device, span: int = 0) -> Tensor:
    """[T, N] bool: query t, the (N - T + t)-th token, sees itself and what came before (at most `span` tokens if span > 0)."""
    query_index = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key_index = torch.arange(num_keys, device=device)[None, :]
    mask = key_index <= query_index
    if span:
        mask = mask & (key_index > query_index - span)
    return mask


class Attention(nn.Module):
    """Queries from one sequence, keys and values from the same or another one."""

    def __init__(self, d_model: int, num_heads: int, *, d_source: int | None = None, has_bias: bool = True) -> None:
        super().__init__()
        if num_heads < 1 or d_model % num_heads:
            raise ModelError(
                f"{num_heads} heads for a width of {d_model}",
                allowed=f"a divisor of {d_model}",
                action="change num_heads or d_model",
            )
        self.num_heads = num_heads
        self.head_dim = d_model // num_heads
        self.query = nn.Linear(d_model, d_model, bias=has_bias)
        # A key bias adds the same to all scores of a query: softmax ignores it and its gradient is exactly zero.
        self.key = nn.Linear(d_source or d_model, d_model, bias=False)
        self.value = nn.Linear(d_source or d_model, d_model, bias=has_bias)
        self.output = nn.Linear(d_model, d_model, bias=has_bias)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-3, -2)  # [B, H, T, K]

    def _merge(self, x: Tensor) -> Tensor:
        return x.transpose(-3, -2).flatten(-2)  # [B, T, D]

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, N, K] of a source [B, N, d_source]; computed once for a memory that stays."""
        return self._split(self.key(source)), self._split(self.value(source))

    def read(self, x: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        """Attention of x [B, T, D] over prepared keys and values; `mask` as in `attend`. Returns [B, T, D]."""
        return self.output(self._merge(attend(self._split(self.query(x)), *keys_values, mask)))

    def read_once(self, x: Tensor, source: Tensor, mask: Tensor) -> Tensor:
        """What `forward` gives for one query a row, without the keys and values of the source.

        With head h's rows W_h of the key map and V_h of the value map, (W_h s) . q_h = s . (W_h^T q_h) and the sum of a_n V_h s_n
        is V_h times the sum of a_n s_n: two maps of H rows instead of N. Source: the absorbed form of DeepSeek-V2, arXiv
        2405.04434, section 2.1.2.

        Args:
            x: [B, 1, D].
            source: [B, N, d_source].
            mask: [B, 1, 1, N], True somewhere in each row.

        Returns:
            [B, 1, D].
        """
        query = self.query(x).unflatten(-1, (self.num_heads, self.head_dim))  # [B, 1, H, K]
        # Head h's query in the h-th place of row h, zeros elsewhere.
        places = torch.eye(self.num_heads, dtype=query.dtype, device=query.device)[:, :, None]
        looked_for = tied_linear((places * query).flatten(-2), self.key.weight, is_transposed=True)  # [B, H, d_source]
        rows = source[:, None]
        scale = self.head_dim**-0.5
        mixed = attend(looked_for[:, None], rows, rows, mask, always_sees=True, scale=scale)[:, 0]  # [B, H, d_source]
        value = self.value(mixed).unflatten(-1, (self.num_heads, self.head_dim))  # [B, H, H, K]
        return self.output(value.diagonal(dim1=1, dim2=2).mT.flatten(-2)[:, None])

    def forward(
        self,
        x: Tensor,
        source: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        is_causal: bool = False,
        rotary: RotaryTable | None = None,
        cache: LayerCache | None = None,
        span: int = 0,
        always_sees: bool = False,
    ) -> Tensor:
        """Attention of x over `source`, or over x itself.

        Args:
            x: [B, T, D].
            source: [B, N, d_source]; None for self-attention.
            mask: bool, broadcastable to [B, H, T, N]; combined with causality when both are given.
            is_causal: for self-attention.
            rotary: tables for the positions of x (self-attention only).
            cache: earlier keys and values of this layer; x's are appended to it (self-attention only).
            span: with `is_causal`, tokens back (itself included) that a token sees; 0 for all.
            always_sees: as in `attend`.

        Returns:
            [B, T, D].
        """
        query = self._split(self.query(x))
        key, value = self.keys_values(x if source is None else source)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        if cache is not None:
            key, value = cache.append(key, value)
        num_queries, num_keys = query.shape[-2], key.shape[-2]
        if is_causal and (mask is not None or num_queries != num_keys or 0 < span < num_keys):
            # One new token sees everything that its cache still holds: no mask needed.
            if num_queries > 1 or 0 < span < num_keys:
                causal = causal_mask(num_queries, num_keys, x.device, span)
                mask = causal if mask is None else mask & causal
            is_causal = False
        return self.output(self._merge(attend(query, key, value, mask, is_causal, always_sees)))
