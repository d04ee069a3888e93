"""Every metric name of the house: `room/quantity_unit`, no spaces.

Readers (the scorecard, the figures, dashboards) and writers (the loop, the meters, the curriculum) share these
constants, so that a misspelt name is an import error and not an empty chart. A name that ends in a slash is a prefix:
use the function beside it.
"""

from __future__ import annotations

# Training, one point per logged optimizer step.
TRAIN_LOSS = "train/loss_nats"
"""Mean token cross-entropy of the global batch, without the penalty."""
TRAIN_PENALTY = "train/penalty_nats"
"""The continual-learning penalty that was added to the loss (0 where there is none)."""
TRAIN_AUXILIARY = "train/auxiliary_loss_nats"
"""Auxiliary losses of the model, weighted as they were added."""
TRAIN_REPLAY_LOSS = "train/replay_loss_nats"
"""Mean token cross-entropy of the replayed examples alone."""
TRAIN_GRADIENT_NORM = "train/gradient_norm"
"""Global L2 norm before clipping."""
TRAIN_CLIP_FACTOR = "train/clip_factor_ratio"
"""What the gradient was multiplied by; 1 means not clipped."""
TRAIN_PARAMETER_NORM = "train/parameter_norm"
"""Global L2 norm of the weights."""
TRAIN_LEARNING_RATE = "train/learning_rate"
TRAIN_TOKENS = "train/tokens_count"
"""Target tokens trained on since the stage began."""
TRAIN_EXAMPLES = "train/examples_count"
"""Examples trained on since the stage began."""
TRAIN_EPOCH = "train/epoch_count"
"""Passes over the stage's own training split, as a fraction."""
TRAIN_SKIPPED_STEPS = "train/skipped_steps_count"
"""Optimizer steps skipped since the stage began (non-finite gradients)."""
TRAIN_SPARSITY = "train/sparsity_ratio"
"""Share of prunable weights that are masked."""

# Validation, one point per evaluation of the validation split.
VALIDATION_LOSS = "validation/loss_nats"
VALIDATION_BEST_LOSS = "validation/best_loss_nats"
VALIDATION_PERPLEXITY = "validation/perplexity"
VALIDATION_TOKENS = "validation/tokens_count"
VALIDATION_SECONDS = "validation/duration_seconds"

# Speed and memory of this rank (rank 0 writes; `_max` is the maximum over ranks).
PERF_TOKENS_PER_SECOND = "perf/tokens_per_second"
"""Non-padding context and target tokens of the global batch per second of wall time."""
PERF_STEP_SECONDS = "perf/step_seconds"
PERF_DATA_WAIT_SECONDS = "perf/data_wait_seconds"
"""Time the step waited for its batch."""
PERF_FORWARD_BACKWARD_SECONDS = "perf/forward_backward_seconds"
PERF_PENALTY_SECONDS = "perf/penalty_seconds"
PERF_OPTIMIZER_SECONDS = "perf/optimizer_seconds"
PERF_CHECKPOINT_SECONDS = "perf/checkpoint_seconds"
"""Time the step waited for a checkpoint."""
PERF_FISHER_SECONDS = "perf/fisher_seconds"
PERF_EVALUATION_SECONDS = "perf/evaluation_seconds"
PERF_STAGE_SECONDS = "perf/stage_seconds"
PERF_MEMORY_BYTES = "perf/memory_bytes"
"""Resident memory of the process, or allocated device memory where there is a device."""
PERF_PEAK_MEMORY_BYTES = "perf/peak_memory_bytes"
PERF_FLOPS_PER_SECOND = "perf/flops_per_second"
PERF_FLOPS_UTILISATION = "perf/flops_utilisation_ratio"
PERF_SLOWEST_RANK = "perf/slowest_rank_index"
PERF_STRAGGLER_RATIO = "perf/straggler_ratio"
"""Slowest rank's step time divided by the median rank's."""

# Data.
DATA_SKIPPED_ROWS = "data/skipped_rows_count"
DATA_TRUNCATED_EXAMPLES = "data/truncated_examples_count"
DATA_PADDING = "data/padding_ratio"
"""Share of the positions of a batch that hold padding."""
DATA_REPLAY = "data/replay_ratio"
"""Share of the batch's examples that were replayed from earlier stages."""

# Continual learning, one point per stage.
FISHER_MEAN = "fisher/mean"
FISHER_MAX = "fisher/max"
FISHER_NORM = "fisher/norm"
FISHER_EXAMPLES = "fisher/examples_count"
EWC_STRENGTH = "ewc/strength"
EWC_DISTANCE = "ewc/anchor_distance_norm"
"""L2 distance of the weights from the anchor."""

# Transfer, one point per stage; the step is the stage's index.
TRANSFER_AVERAGE_ACCURACY = "transfer/average_accuracy"
TRANSFER_BACKWARD = "transfer/backward"
TRANSFER_FORWARD = "transfer/forward"
TRANSFER_FORGETTING = "transfer/forgetting"
TRANSFER_AVERAGE_LOSS = "transfer/average_loss_nats"
TRANSFER_BACKWARD_LOSS = "transfer/backward_loss_nats"
TRANSFER_FORWARD_LOSS = "transfer/forward_loss_nats"
TRANSFER_FORGETTING_LOSS = "transfer/forgetting_loss_nats"

# The journal of the run.
RUN_RESTARTS = "run/restarts_count"
RUN_TOKENS = "run/tokens_count"
"""Target tokens trained on in the whole curriculum so far."""
RUN_SECONDS = "run/duration_seconds"

TRACKING_DROPPED_POINTS = "tracking/dropped_points_count"
"""Points that a remote tracker could not take; `metrics.jsonl` has them and `track sync` uploads them."""

GRADIENT_NORM_PREFIX = "train/gradient_norm/"
TASK_PREFIX = "task/"


def gradient_norm_of(component: str) -> str:
    """Norm of one component's gradient, such as `train/gradient_norm/memory_tree`."""
    return f"{GRADIENT_NORM_PREFIX}{component}"


def task_score(task: str, metric: str) -> str:
    """Score of a task after a stage, such as `task/gsm8k/exact_match`; the step is the stage's index."""
    return f"{TASK_PREFIX}{task}/{metric}"


def task_loss(task: str) -> str:
    """Loss of a task after a stage, such as `task/gsm8k/loss_nats`; the step is the stage's index."""
    return f"{TASK_PREFIX}{task}/loss_nats"


def all_names() -> dict[str, str]:
    """Constant name -> metric name, prefixes left out."""
    return {
        key: value
        for key, value in globals().items()
        if key.isupper() and isinstance(value, str) and not key.endswith("_PREFIX")
    }
