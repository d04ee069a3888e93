"""Which memory level is updated at which token: integer arithmetic, nothing else.

Level l with period C_l ticks behind its tokens C_l, 2 C_l, ... (counted from 1 in each sequence or segment), so it has
ticked exactly floor(T / C_l) times after T tokens; an unfinished period stays pending. Source: arXiv 2512.24695,
equation 71, with the sum over the period that just ended (the printed bounds are off by one).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hsmn_dist.foundation.errors import ModelError

NEVER = 0


def check_periods(periods: Sequence[int]) -> None:
    """Periods must grow from level to level, each a multiple of the one before; 0 (never) stands last.

    Raises:
        ModelError: they do not.
    """
    finite = [period for period in periods if period != NEVER]
    ordered = list(periods[: len(finite)]) == finite
    nested = all(slow % fast == 0 for fast, slow in pairwise(finite))
    if not periods or not ordered or not nested or any(period < 0 for period in periods):
        raise ModelError(
            f"level periods {list(periods)}",
            allowed="one or more periods, fast to slow, each a multiple of the one before; 0 (never) last",
            action="correct `model.cms.levels`",
        )


def num_ticks(num_tokens: int, period: int) -> int:
    """Updates of a level after `num_tokens` tokens."""
    return 0 if period == NEVER else num_tokens // period


def does_tick(num_tokens: int, period: int) -> bool:
    """True when a level is updated right behind token number `num_tokens` (counted from 1)."""
    return period != NEVER and num_tokens > 0 and num_tokens % period == 0


def tokens_of_tick(tick: int, period: int) -> range:
    """0-based tokens whose errors make up update number `tick` (counted from 0)."""
    return range(tick * period, (tick + 1) * period)


def base_period(periods: Sequence[int]) -> int:
    """Tokens between two moments at which any level may tick; 0 when none ever does."""
    return next((period for period in periods if period != NEVER), NEVER)
