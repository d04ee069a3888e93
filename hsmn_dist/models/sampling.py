"""Choosing the next token: greedy, temperature, top-k, top-p; pure functions of logits and of one uniform number a row.

Unusual: a token is drawn by inverting the cumulative distribution in float64, with a number from the row's own generator, so
that what a row says does not depend on the rows beside it. Source of top-p: Holtzman et al. 2020, arXiv 1904.09751.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hsmn_dist.foundation.errors import ModelError


def kept_probabilities(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Probabilities [B, V] in float64 after temperature (> 0), top-k (0: all) and top-p (1: all), summing to 1.

    Top-p keeps the smallest set of most probable tokens whose mass reaches `top_p`; at least one token always stays.
    """
    scaled = logits.double() / temperature
    if 0 < top_k < logits.shape[-1]:
        threshold = scaled.topk(top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < threshold, float("-inf"))
    probabilities = scaled.softmax(dim=-1)
    if top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        mass_before = ordered.cumsum(dim=-1) - ordered
        dropped = torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, order, mass_before >= top_p)
        dropped = dropped.scatter(-1, order[..., :1], torch.zeros_like(order[..., :1], dtype=torch.bool))
        probabilities = probabilities.masked_fill(dropped, 0.0)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return probabilities


def next_tokens(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generators: Sequence[torch.Generator] = (),
) -> Tensor:
    """Next token of each row.

    Args:
        logits: [B, V].
        temperature: 0 takes the most probable token (the lowest id among equals).
        top_k: as in `kept_probabilities`.
        top_p: as in `kept_probabilities`.
        generators: one CPU generator for each row; needed when temperature > 0.

    Returns:
        [B] int64 on the device of `logits`.

    Raises:
        ModelError: logits that are not finite, or generators missing.
    """
    if not torch.isfinite(logits).all():
        raise ModelError(
            "logits that are NaN or infinite",
            allowed="finite logits",
            action="check the weights with `hsmn-dist verify`; they may come from a run that diverged",
        )
    if temperature <= 0:
        return logits.argmax(dim=-1)
    if len(generators) != logits.shape[0]:
        raise ModelError(
            f"{len(generators)} generators for {logits.shape[0]} rows",
            allowed="one generator for each row",
            action="make them with torch.Generator().manual_seed(...)",
        )
    cumulative = kept_probabilities(logits, temperature, top_k, top_p).cumsum(dim=-1).cpu()
    draws = torch.stack([torch.rand((), generator=one, dtype=torch.float64) for one in generators])
    # Scaling by the last sum keeps rounding from pointing behind the last token.
    tokens = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    return tokens.clamp(max=logits.shape[-1] - 1).to(logits.device)
