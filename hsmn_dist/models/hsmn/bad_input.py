"""Inputs that HSMN cannot take, refused with a message that says what to do.

Token ids are checked on the CPU only: on a GPU the check would stall every step (the loader checks them there).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hsmn_dist.config.models import HsmnConfig
from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.models import input_checks
from hsmn_dist.models.contract import ModelInput


def check_inputs(inputs: ModelInput, config: HsmnConfig, state: Any) -> None:
    """Raises ModelError unless `HsmnModel.forward` can take these inputs."""
    if inputs.segment_ids is not None:
        raise ModelError(
            "packed rows (segment_ids) given to HSMN, whose memory belongs to a whole row",
            allowed="one example a row, segment_ids None",
            action="set data.packs_examples to false, or use family hope",
        )
    check_ids(inputs.target_ids, inputs.loss_mask, "target", config)
    num_tokens = inputs.target_ids.shape[1]
    if num_tokens == 0:
        raise ModelError(
            "an empty target (0 tokens)",
            allowed=f"1 to {config.max_target_tokens} target tokens",
            action="drop examples without a target; use start() to generate",
        )
    begun = 0
    if state is not None:
        begun = _check_state(state, inputs.target_ids.shape[0])
        if state.pending is None:
            raise ModelError(
                "a state of start() or advance() given to forward()",
                allowed="a state of open_target(), or of an earlier forward() with a state",
                action="use advance() to go on, or open_target() to read windows",
            )
    else:
        check_context(inputs.context_ids, inputs.context_mask, config)
        if inputs.context_ids.shape[0] != inputs.target_ids.shape[0]:
            raise ModelError(
                f"{inputs.context_ids.shape[0]} contexts for {inputs.target_ids.shape[0]} targets",
                allowed="one context for each target",
                action="give both the same batch axis",
            )
    _check_length(begun + num_tokens, config)


def check_context(ids: Tensor, mask: Tensor, config: HsmnConfig) -> None:
    """Raises ModelError unless the context can be read."""
    check_ids(ids, mask, "context", config)
    input_checks.check_left_aligned(mask, "context")


def check_token(token_ids: Tensor, state: Any, config: HsmnConfig) -> None:
    """Raises ModelError unless `token_ids` [B] can be appended to `state`."""
    input_checks.check_one_each(token_ids)
    begun = _check_state(state, token_ids.shape[0])
    _check_length(begun + 1, config)
    check_ids(token_ids[:, None], None, "new target", config)


def check_ids(ids: Tensor, mask: Tensor | None, name: str, config: HsmnConfig) -> None:
    """Raises ModelError on ids of a wrong shape or type, or without a row in the token table."""
    input_checks.check_ids(ids, mask, name)
    if not input_checks.may_look_at(ids):
        return
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= config.vocab_size:
        raise ModelError(
            f"{name} token id {highest if highest >= config.vocab_size else lowest} with a vocabulary of {config.vocab_size}",
            allowed=f"0 to {config.vocab_size - 1}",
            action="use the tokenizer that the model was trained with, or raise model.vocab_size",
        )


def _check_state(state: Any, batch_size: int) -> int:
    decoder = getattr(state, "decoder", None)
    if decoder is None:
        raise ModelError(
            f"a state of type {type(state).__name__} given to HSMN",
            allowed="an HsmnState of start(), open_target(), advance() or forward()",
            action="begin with start() or open_target(), and pass on the state that came back",
        )
    if decoder.batch_size != batch_size:
        raise ModelError(
            f"a state of batch size {decoder.batch_size} for {batch_size} tokens",
            allowed="the state that the same batch was started with",
            action="start the new batch with its own contexts",
        )
    return int(decoder.num_tokens)


def _check_length(num_tokens: int, config: HsmnConfig) -> None:
    if num_tokens > config.max_target_tokens:
        raise ModelError(
            f"a target of {num_tokens} tokens",
            allowed=f"at most model.max_target_tokens = {config.max_target_tokens}",
            action="shorten the target or train with a larger max_target_tokens",
        )
