"""What a retry changed of a run's configuration: smaller micro-batches after an allocator gave up.

The stored configuration is never rewritten (its hash is in the journal); a small file beside it holds the smaller micro-batch, and
every later attempt keeps to it. The global batch stays, so accumulation grows and each step sees the same examples.
"""

from __future__ import annotations

from hsmn_dist.config.run import RunConfig
from hsmn_dist.foundation.files import read_json, write_json
from hsmn_dist.orchestration.run_folder import RunFolder

MICRO_BATCH = "micro_batch_examples"


def adjusted(config: RunConfig, folder: RunFolder) -> RunConfig:
    """The configuration that the ranks train with; prompts generated together shrink with the micro-batch."""
    if not folder.adjustments.is_file():
        return config
    before, now = config.training.micro_batch_examples, int(read_json(folder.adjustments)[MICRO_BATCH])
    together = max(1, config.evaluation.batch_examples * now // before)
    return config.model_copy(
        update={
            "training": config.training.model_copy(update={MICRO_BATCH: now}),
            "evaluation": config.evaluation.model_copy(update={"batch_examples": together}),
        }
    )


def shrink_micro_batch(config: RunConfig, folder: RunFolder) -> int | None:
    """Halve the micro-batch of every later attempt (an odd one goes to its largest smaller divisor, so that the global batch
    still divides); the new one, or None where it is one example already.
    """
    now = adjusted(config, folder).training.micro_batch_examples
    if now == 1:
        return None
    smaller = next(size for size in range(now // 2, 0, -1) if now % size == 0)
    write_json(folder.adjustments, {MICRO_BATCH: smaller})
    return smaller
