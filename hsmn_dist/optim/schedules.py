"""Learning rate as a pure function of the step; no scheduler object, so nothing to save or restore.

Unusual: steps count from 0 and the first step already has a rate above 0 (a step at rate 0 would be wasted); the last
step of the stage has exactly `final_fraction` of the peak. Source: linear warm-up (Goyal et al. 2017, section 2.2) and
cosine decay (Loshchilov and Hutter 2017, SGDR, equation 5, one period).
"""

from __future__ import annotations

import math

from hsmn_dist.config.optim import ScheduleConfig
from hsmn_dist.foundation.errors import ModelError


def learning_rate(config: ScheduleConfig, peak: float, step: int, num_steps: int) -> float:
    """Rate of optimizer step `step` (0-based) of a stage of `num_steps` steps.

    Warm-up step s has (s + 1) / warmup_steps of `peak`; a stage shorter than its warm-up never reaches the peak. A step
    past the end keeps the rate of the last one.

    Raises:
        ModelError: `step` is negative or `num_steps` is below 1.
    """
    if step < 0 or num_steps < 1:
        raise ModelError(
            f"step {step} of a stage of {num_steps} steps",
            allowed="step >= 0 and num_steps >= 1",
            action="count steps from 0 and set `training.max_steps` to 1 or more",
        )
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    span = num_steps - 1 - config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / span) if span > 0 else 1.0
    if config.kind == "constant":
        return peak
    if config.kind == "linear":
        share = 1.0 - progress
    else:
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (config.final_fraction + (1.0 - config.final_fraction) * share)
