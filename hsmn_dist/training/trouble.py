"""What to do about a step whose loss or gradient cannot be trusted: pure decisions, and the budget that bounds them.

Source of the spike rule: OLMo-core's skip-step optimizer (a loss more than 6 standard deviations above the mean of the last 128).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

from hsmn_dist.config.training import TrainingConfig
from hsmn_dist.foundation.errors import StageFailed

Verdict = Literal["go_on", "skip", "rollback"]


def is_spike(loss: float, recent: Sequence[float], sigma: float, window: int) -> bool:
    """True when `loss` lies more than `sigma` standard deviations above the mean of the last `window` losses.

    Nothing is a spike before half a window has been seen.
    """
    losses = list(recent)[-window:]
    if len(losses) < max(2, window // 2) or not math.isfinite(loss):
        return False
    return loss > statistics.fmean(losses) + sigma * max(statistics.pstdev(losses), 1e-12)


def judge(training: TrainingConfig, step: int, loss: float, gradient_norm: float, recent: Sequence[float]) -> Verdict:
    """What to do with a step, from its global loss and gradient norm.

    Raises:
        StageFailed: kind "non_finite" or "loss_spike", where the configuration says to stop.
    """
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        if training.on_non_finite == "stop":
            raise StageFailed(
                f"step {step}: loss {loss} and gradient norm {gradient_norm}",
                allowed="finite numbers",
                action="lower the learning rate, set training.max_gradient_norm, or set training.on_non_finite to skip or "
                "rollback; the last checkpoint is whole",
                kind="non_finite",
            )
        return training.on_non_finite
    if training.on_loss_spike == "ignore" or not is_spike(
        loss, recent, training.spike_sigma, training.spike_window_steps
    ):
        return "go_on"
    if training.on_loss_spike == "stop":
        raise StageFailed(
            f"step {step}: loss {loss:g} after a mean of {statistics.fmean(recent[-training.spike_window_steps :]):g}",
            allowed=f"at most {training.spike_sigma:g} standard deviations above the mean (training.spike_sigma)",
            action="resume, or look at the data of that step; or set training.on_loss_spike to skip or rollback; the last "
            "checkpoint is whole",
            kind="loss_spike",
        )
    return training.on_loss_spike


def check_budget(training: TrainingConfig, step: int, num_spent: int, is_finite: bool) -> None:
    """Refuse to skip or go back once more than the stage allows; `is_finite` says what the last such step was like.

    Raises:
        StageFailed: kind "loss_spike" where its numbers were finite, else "non_finite".
    """
    if num_spent > training.max_skipped_steps:
        raise StageFailed(
            f"step {step}: {num_spent} steps were skipped or rolled back",
            allowed=f"{training.max_skipped_steps} (training.max_skipped_steps)",
            action="lower the learning rate or look at the data of these steps; the last checkpoint is whole",
            kind="loss_spike" if is_finite else "non_finite",
        )
