"""Keys and values of earlier tokens, so that a new token costs one step and not the whole sequence.

Unusual: without gradients the buffers grow by doubling (with a span they never grow) and are written in place, so a state may
be advanced once; take a `fork` before going on in two ways. With gradients the history is concatenated and stays differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_CAPACITY = 64


class LayerCache:
    """Keys and values [B, H, T, K] of one attention layer; with `span` > 0 only the last `span` tokens are kept."""

    def __init__(self, span: int = 0) -> None:
        self.span = span
        self.num_tokens = 0
        self.num_appended = 0  # also what a span has let go
        self._key: Tensor | None = None
        self._value: Tensor | None = None
        self._start = 0

    @property
    def batch_size(self) -> int | None:
        """Rows of the cache, or None while it is empty."""
        return None if self._key is None else self._key.shape[0]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add [B, H, T, K] keys and values; returns all that queries of the new tokens may see (earlier ones first)."""
        self.num_appended += key.shape[-2]
        if torch.is_grad_enabled() and key.requires_grad:
            return self._append_differentiable(key, value)
        added = key.shape[-2]
        self._make_room(key, value, added)
        assert self._key is not None and self._value is not None
        stop = self.num_tokens + added
        self._key[..., self.num_tokens : stop, :] = key
        self._value[..., self.num_tokens : stop, :] = value
        self.num_tokens = stop
        # The first of several new tokens may look span - 1 tokens back.
        self._start = max(0, stop - added - self.span + 1) if self.span else 0
        return self._key[..., self._start : stop, :], self._value[..., self._start : stop, :]

    def _append_differentiable(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self._key is not None and self._value is not None:
            kept = slice(max(0, self.num_tokens - self.span + 1) if self.span else 0, self.num_tokens)
            key = torch.cat([self._key[..., kept, :], key], dim=-2)
            value = torch.cat([self._value[..., kept, :], value], dim=-2)
        self._key, self._value, self.num_tokens = key, value, key.shape[-2]
        return key, value

    def _make_room(self, key: Tensor, value: Tensor, added: int) -> None:
        if self._key is None or self._value is None:
            # With a span the buffer has its final size at once: memory per token is constant from the first one on.
            capacity = max(2 * self.span or FIRST_CAPACITY, added)
            self._key, self._value = _empty(key, capacity), _empty(value, capacity)
        elif self.num_tokens + added > self._key.shape[-2]:
            kept = slice(max(0, self.num_tokens - self.span + 1) if self.span else 0, self.num_tokens)
            num_kept = kept.stop - kept.start
            capacity = max(2 * self.span or max(2 * num_kept, FIRST_CAPACITY), num_kept + added)
            for name, new in (("_key", key), ("_value", value)):
                buffer = _empty(new, capacity)
                buffer[..., :num_kept, :] = getattr(self, name)[..., kept, :]
                setattr(self, name, buffer)
            self.num_tokens = num_kept

    def fork(self) -> LayerCache:
        """An independent copy."""
        copy = LayerCache(self.span)
        copy.num_tokens, copy._start, copy.num_appended = self.num_tokens, self._start, self.num_appended
        copy._key = None if self._key is None else self._key.clone()
        copy._value = None if self._value is None else self._value.clone()
        return copy


def _empty(like: Tensor, capacity: int) -> Tensor:
    return like.new_empty(*like.shape[:-2], capacity, like.shape[-1])
