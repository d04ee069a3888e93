"""Which example each row of a flattened batch belongs to, announced by models and read by the per-example Fisher.

A module normally sees [B, ...] and row b belongs to example b. Where a model flattens (valid chunks of all examples, scored
positions of all examples), it says whose rows these are:

    with example_rows(chunk_example):      # [num_chunks] int64
        encoded = self.encoder(chunks)     # [num_chunks, S, D]

A Parameter that is used outside a Linear, Embedding or norm goes through `per_example(parameter, B)`, a table that also
serves as the head through `tied_linear`. Both are the plain operation unless somebody listens: they cost nothing in training
and change no number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class Listener(Protocol):
    """Whoever wants to know how parameters are used outside their own modules."""

    def expand(self, parameter: Tensor, num_examples: int) -> Tensor:
        """`per_example`, watched."""
        ...

    def linear(self, x: Tensor, weight: Tensor, is_transposed: bool, output: Tensor) -> Tensor:
        """The `output` of `tied_linear`, watched."""
        ...


_ROWS: ContextVar[Tensor | None] = ContextVar("example_rows", default=None)
# Not a context variable: on a GPU autograd recomputes checkpointed blocks in a thread of its own, where context variables of
# the thread that ran the forward pass are unset, and a recomputation must save exactly the tensors that the first one saved.
_listener: Listener | None = None


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
    # Nobody listens inside a compiled graph.
    listener = None if torch.compiler.is_compiling() else _listener
    if listener is not None:
        return listener.expand(parameter, num_examples)
    return parameter.expand(num_examples, *parameter.shape)


def tied_linear(x: Tensor, weight: Tensor, is_transposed: bool = False) -> Tensor:
    """X W^T for a weight [out, in] that belongs to another module (a token table used as the head); `is_transposed`: X W."""
    output = x @ weight if is_transposed else functional.linear(x, weight)
    listener = None if torch.compiler.is_compiling() else _listener
    return output if listener is None else listener.linear(x, weight, is_transposed, output)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, `per_example` and `tied_linear` go through `listener`, in whatever thread they are called."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before
