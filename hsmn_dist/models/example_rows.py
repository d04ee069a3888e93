"""Which example each row of a flattened batch belongs to, announced by models and read by the per-example Fisher.

A module normally sees [B, ...] and row b belongs to example b. Where a model flattens (valid chunks of all examples, scored
positions of all examples), it says whose rows these are:

    with example_rows(chunk_example):      # [num_chunks] int64
        encoded = self.encoder(chunks)     # [num_chunks, S, D]

A Parameter that is used outside a Linear, Embedding or norm goes through `per_example(parameter, B)`, which is a plain
`expand` unless somebody listens. Both cost nothing in training and change no number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from torch import Tensor

Expander = Callable[[Tensor, int], Tensor]

_ROWS: ContextVar[Tensor | None] = ContextVar("example_rows", default=None)
_EXPANDER: ContextVar[Expander | None] = ContextVar("per_example_expander", default=None)


@contextlib.contextmanager
def example_rows(owners: Tensor | None) -> Iterator[None]:
    """Inside, row i of every module's input belongs to example `owners[i]` ([rows] int64); None: row b is example b."""
    token = _ROWS.set(owners)
    try:
        yield
    finally:
        _ROWS.reset(token)


def current_rows() -> Tensor | None:
    """Owners announced by the innermost `example_rows`, or None."""
    return _ROWS.get()


def per_example(parameter: Tensor, num_examples: int) -> Tensor:
    """A parameter [*shape] as one copy per example, [num_examples, *shape] (a view, no memory)."""
    expander = _EXPANDER.get()
    if expander is not None:
        return expander(parameter, num_examples)
    return parameter.expand(num_examples, *parameter.shape)


@contextlib.contextmanager
def listening(expander: Expander) -> Iterator[None]:
    """Inside, `per_example` calls `expander(parameter, num_examples)` instead of `expand`."""
    token = _EXPANDER.set(expander)
    try:
        yield
    finally:
        _EXPANDER.reset(token)
