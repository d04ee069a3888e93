"""KindScores: what a scorer hands to the runner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class KindScores:
    """Scores of the examples of one kind, in their order.

    Attributes:
        metric: name of the main score.
        values: one main score per example; empty when not measured.
        extra: further scores per example, by name (a score may cover fewer examples).
        conditions: what this scorer adds to the conditions.
        reason: why the score was not measured, "" when it was.
    """

    metric: str
    values: list[float]
    extra: dict[str, list[float]] = field(default_factory=dict)
    conditions: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
