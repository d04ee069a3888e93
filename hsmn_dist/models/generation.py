"""The decoding loop: read the contexts once, then one cached step for each new token; as a list or as a stream.

Unusual: rows are seeded one by one, so a row's text does not depend on its batch. Works for every `LanguageModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.models.contract import LanguageModel
from hsmn_dist.models.sampling import next_tokens

EOS_ID = 2
StopRule = Callable[[int, list[int]], bool]


@dataclass(frozen=True)
class GenerationSettings:
    """How text is generated.

    Attributes:
        max_new_tokens: upper bound of new tokens a prompt.
        temperature: 0 is greedy.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest most probable set with this mass; 1 keeps all.
        stop: strings that end the text; they are not part of it.
        seed: seed of sampling; row i of a call uses (seed, i).
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        problems = {
            "max_new_tokens": (self.max_new_tokens < 1, "at least 1"),
            "temperature": (not self.temperature >= 0, "0 (greedy) or above"),
            "top_k": (self.top_k < 0, "0 (all) or above"),
            "top_p": (not 0 < self.top_p <= 1, "above 0, up to 1 (all)"),
            "stop": (any(not text for text in self.stop), "strings that are not empty"),
        }
        for name, (is_bad, allowed) in problems.items():
            if is_bad:
                raise ModelError(f"{name} = {getattr(self, name)!r}", allowed=allowed, action=f"change {name}")


def row_generators(seed: int, row_indices: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator for each row, from (seed, row)."""
    return [torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63) for row in row_indices]


def iter_tokens(
    model: LanguageModel,
    context_ids: Tensor,
    context_mask: Tensor,
    settings: GenerationSettings,
    *,
    eos_id: int = EOS_ID,
    row_indices: Sequence[int] | None = None,
    should_stop: StopRule | None = None,
) -> Iterator[list[int | None]]:
    """New tokens step by step.

    Args:
        model: in eval mode (dropout is the caller's affair).
        context_ids: [B, n], left-aligned.
        context_mask: [B, n] bool.
        settings: `stop` is ignored here (it needs text): see `should_stop`.
        eos_id: a row ends with this token, which is not given out.
        row_indices: numbers of the rows for seeding; 0.. when None.
        should_stop: called with (row, its tokens so far) after each token; True ends the row.

    Yields:
        For each step a list of B entries: the row's new token, or None when it has ended.
    """
    num_rows = context_ids.shape[0]
    generators = row_generators(settings.seed, row_indices or range(num_rows))
    tokens: list[list[int]] = [[] for _ in range(num_rows)]
    is_done = [False] * num_rows
    with torch.inference_mode():
        logits, state = model.start(context_ids, context_mask)
    for step in range(settings.max_new_tokens):
        with torch.inference_mode():
            chosen = next_tokens(logits, settings.temperature, settings.top_k, settings.top_p, generators)
        new: list[int | None] = []
        for row, token in enumerate(chosen.tolist()):
            is_done[row] = is_done[row] or token == eos_id
            new.append(None if is_done[row] else token)
            if not is_done[row]:
                tokens[row].append(token)
                is_done[row] = should_stop is not None and should_stop(row, tokens[row])
        yield new
        if all(is_done) or step + 1 == settings.max_new_tokens:
            return
        with torch.inference_mode():
            logits, state = model.advance(chosen, state)


def generate_tokens(
    model: LanguageModel,
    context_ids: Tensor,
    context_mask: Tensor,
    settings: GenerationSettings,
    *,
    eos_id: int = EOS_ID,
    row_indices: Sequence[int] | None = None,
    should_stop: StopRule | None = None,
) -> list[list[int]]:
    """New tokens of each row, without <eos>; arguments as in `iter_tokens`."""
    tokens: list[list[int]] = [[] for _ in range(context_ids.shape[0])]
    steps = iter_tokens(
        model,
        context_ids,
        context_mask,
        settings,
        eos_id=eos_id,
        row_indices=row_indices,
        should_stop=should_stop,
    )
    for new in steps:
        for row, token in enumerate(new):
            if token is not None:
                tokens[row].append(token)
    return tokens
