"""Inputs and states that HOPE cannot take, refused with a message that says what to do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.models.hope.fast_state import FastState
from hsmn_dist.models.input_checks import check_ids, check_left_aligned, check_one_each, may_look_at


def check_state(state: Any, kind: type[FastState], batch_size: int) -> None:
    """Raises ModelError unless `state` is of this kind and belongs to `batch_size` sequences."""
    if not isinstance(state, kind):
        raise ModelError(
            f"a state of type {type(state).__name__} given to HOPE",
            allowed=f"a {kind.__name__} of initial_state(), start(), advance() or forward()",
            action="begin with start() or initial_state(), and pass on the state that came back",
        )
    state.check_batch(batch_size)


def check_stream(pending: Tensor | None) -> None:
    """Raises ModelError for a state behind which no token waits to be read: `forward` would put <bos> there."""
    if pending is None:
        raise ModelError(
            "a state of start() or advance() given to forward()",
            allowed="a state of initial_state(), or of an earlier forward() with a state",
            action="use advance() to go on, or read the stream with forward() from its beginning",
        )


def check_context(ids: Tensor, mask: Tensor) -> None:
    """Raises ModelError unless a context [B, n] can be read."""
    check_ids(ids, mask, "context")
    check_left_aligned(mask, "context")


def check_next(token_ids: Tensor) -> None:
    """Raises ModelError unless `token_ids` are integers [B]."""
    check_one_each(token_ids)
    check_ids(token_ids[:, None], None, "new target")


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Raises ModelError on ids without a row in the token table."""
    if not may_look_at(tokens):
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise ModelError(
            f"token ids from {low} to {high} with a vocabulary of {vocab_size}",
            allowed=f"ids in [0, {vocab_size})",
            action="use the tokenizer that the model was built for, or raise `model.vocab_size`",
        )


def check_positions(positions: Tensor, valid: Tensor, max_tokens: int) -> None:
    """Raises ModelError when a token (not the padding behind it) stands beyond the learned positions."""
    if not may_look_at(positions):
        return
    last = int(positions.masked_fill(~valid, 0).max())
    if last >= max_tokens:
        raise ModelError(
            f"position {last} with learned positions",
            allowed=f"positions below `model.max_tokens` = {max_tokens}",
            action="raise `model.max_tokens`, shorten the rows, or use `model.positions: rotary`",
        )


def check_simple(tokens: Tensor, targets: Tensor | None, targets_are_shifted: bool, vocab_size: int) -> None:
    """Raises ModelError on arguments that `HOPE.forward` cannot take."""
    if tokens.dim() != 2 or 0 in tokens.shape or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ModelError(
            f"tokens of shape {tuple(tokens.shape)} and type {tokens.dtype}",
            allowed="integers [B, T] with B >= 1 and T >= 1",
            action="pass a batch of rows of token ids",
        )
    if targets is None:
        return
    if targets.shape != tokens.shape or targets.is_floating_point() or targets.dtype == torch.bool:
        raise ModelError(
            f"targets of shape {tuple(targets.shape)} and type {targets.dtype} for tokens {tuple(tokens.shape)}",
            allowed="integers of the shape of the tokens; labels below 0 are not scored",
            action="pass the tokens themselves, or labels of each position with targets_are_shifted=True",
        )
    if tokens.shape[1] == 1 and not targets_are_shifted:
        raise ModelError(
            "targets of one token, whose only label would be that of a token before it",
            allowed="T >= 2, or targets_are_shifted=True",
            action="give longer rows, or the label of each position with targets_are_shifted=True",
        )
    if may_look_at(targets) and int(targets.max()) >= vocab_size:
        raise ModelError(
            f"a label {int(targets.max())} with a vocabulary of {vocab_size}",
            allowed=f"labels below {vocab_size}; below 0 they are not scored",
            action="use the tokenizer that the model was built for, or raise `vocab_size`",
        )


def check_generation(max_new_tokens: int, temperature: float) -> None:
    """Raises ModelError on settings that `HOPE.generate` cannot take."""
    if max_new_tokens < 0 or not temperature >= 0:
        raise ModelError(
            f"max_new_tokens {max_new_tokens} and temperature {temperature}",
            allowed="0 or more new tokens; temperature 0 (the likeliest token) or above",
            action="correct the argument",
        )
