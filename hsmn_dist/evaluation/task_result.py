"""TaskResult: a score that cannot be written without its conditions. "Not measured" is a status, never 0.0."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

Status = Literal["measured", "not measured"]
PER_EXAMPLE = ("example_ids", "example_scores", "loss_ids", "loss_values", "loss_tokens")


@dataclass(frozen=True)
class TaskResult:
    """One task's score and loss.

    Attributes:
        task: name of the task.
        kind: the examples' kind, or "mixed".
        metric: name of the main score.
        status: "measured", or "not measured" with the reason in `reason` and `score` None.
        score: main score in [0, 1], higher is better.
        interval: 95 percent interval of `score`, or None.
        interval_method: "wilson", "bootstrap", or "" for none.
        extra: further scores by name; one that was not measured is absent.
        nll_per_token: mean loss of the targets in nats per token, over `num_loss_examples`.
        bits_per_byte: the same loss in bits per UTF-8 byte.
        num_examples: examples behind `score`.
        num_loss_examples: examples behind the loss.
        example_ids: ids of the scored examples, in order.
        example_scores: their scores, for intervals that belong together over stages.
        loss_ids: ids of the examples behind the loss that have a target token, in order.
        loss_values: their losses in nats per target token.
        loss_tokens: their target tokens.
        conditions: split, shots, decoding, seed, prompt version, extraction: whatever moves the score.
    """

    task: str
    kind: str
    metric: str
    status: Status
    score: float | None
    nll_per_token: float | None
    bits_per_byte: float | None
    num_examples: int
    num_loss_examples: int
    conditions: dict[str, Any]
    reason: str = ""
    interval: tuple[float, float] | None = None
    interval_method: str = ""
    extra: dict[str, float] = field(default_factory=dict)
    example_ids: list[str] = field(default_factory=list)
    example_scores: list[float] = field(default_factory=list)
    loss_ids: list[str] = field(default_factory=list)
    loss_values: list[float] = field(default_factory=list)
    loss_tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if (self.score is None) != (self.status == "not measured"):
            raise ValueError(f"task {self.task}: status {self.status!r} with score {self.score}")
        if self.score is not None and not 0.0 <= self.score <= 1.0:
            raise ValueError(f"task {self.task}: score {self.score} is not in [0, 1]")

    def to_json(self, with_examples: bool = True) -> dict[str, Any]:
        """Plain JSON values; numbers that JSON cannot hold become null. Without examples, without the lists of them."""
        left_out = () if with_examples else PER_EXAMPLE
        return {key: _plain(value) for key, value in asdict(self).items() if key not in left_out}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TaskResult:
        """Inverse of `to_json`; unknown keys of a later version are left out."""
        known = {key.name: value[key.name] for key in fields(cls) if key.name in value}
        if known.get("interval") is not None:
            known["interval"] = tuple(known["interval"])
        return cls(**known)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
