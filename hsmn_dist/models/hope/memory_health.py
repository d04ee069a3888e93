"""Is every memory level alive? Reads the health scalars of `ModelOutput.aux` and names levels that never learn.

Public code trained for 100,000 steps with three levels that never had a useful update; this is the alarm for that.
Names: memory/level_L_updates, memory/level_L_gradient_norm, memory/level_L_change_norm, each with /block_B behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SMALLEST_LIVING_NORM = 1e-8


def dead_levels(history: Sequence[Mapping[str, float]], smallest_norm: float = SMALLEST_LIVING_NORM) -> list[str]:
    """Levels ("level_2/block_0") of which no entry of `history` shows an update that changed anything.

    Args:
        history: health scalars of several steps or segments (entries without memory names are ignored). Give at least as
            many tokens as the slowest period, or the slowest level is called dead for lack of time.
        smallest_norm: gradients or changes below this count as nothing.

    Returns:
        Names in sorted order; empty when all levels live or none was reported.
    """
    alive: dict[str, bool] = {}
    for entry in history:
        for name, updates in entry.items():
            if not (name.startswith("memory/level_") and "_updates" in name):
                continue
            head, _, tail = name.partition("_updates")
            change = entry.get(f"{head}_change_norm{tail}", 0.0)
            # Levels that the optimizer updates have no gradient norm: their change comes from gradients alone.
            gradient = entry.get(f"{head}_gradient_norm{tail}", change)
            learned = updates > 0 and gradient > smallest_norm and change > smallest_norm
            level = head.removeprefix("memory/") + tail
            alive[level] = alive.get(level, False) or bool(learned)
    return sorted(level for level, lives in alive.items() if not lives)
