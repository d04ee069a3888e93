"""What a retry changed of a run's configuration: smaller micro-batches after an allocator gave up.

The stored configuration is never rewritten (its hash is in the journal); a small file beside it holds the smaller micro-batch, and
every later attempt keeps to it. The global batch stays, so accumulation grows and each step sees the same examples.
"""

from __future__ import annotations

import shutil

from hsmn_dist.config.run import RunConfig
from hsmn_dist.foundation.files import read_json, write_json
from hsmn_dist.orchestration.run_folder import FISHER_UNFINISHED, RunFolder

MICRO_BATCH = "micro_batch_examples"
FISHER_MICRO_BATCH = "fisher_micro_batch_examples"


def adjusted(config: RunConfig, folder: RunFolder) -> RunConfig:
    """The configuration that the ranks train with; prompts generated together shrink with the micro-batch."""
    if not folder.adjustments.is_file():
        return config
    stored = read_json(folder.adjustments)
    before, now = config.training.micro_batch_examples, int(stored[MICRO_BATCH])
    together = max(1, config.evaluation.batch_examples * now // before)
    fisher = config.continual.fisher
    fisher = fisher.model_copy(update={MICRO_BATCH: int(stored.get(FISHER_MICRO_BATCH, fisher.micro_batch_examples))})
    return config.model_copy(
        update={
            "training": config.training.model_copy(update={MICRO_BATCH: now}),
            "evaluation": config.evaluation.model_copy(update={"batch_examples": together}),
            "continual": config.continual.model_copy(update={"fisher": fisher}),
        }
    )


def shrink_micro_batch(config: RunConfig, folder: RunFolder, is_fisher: bool = False) -> str | None:
    """Halve the micro-batches of every later attempt; in words, or None where they are one example already.

    Where the Fisher pass ran out (`is_fisher`) its own micro-batch shrinks alone: the training fitted. Otherwise both do. An odd one of
    the training goes to its largest smaller divisor, so that the global batch still divides.
    """
    now = adjusted(config, folder)
    training, fisher = now.training.micro_batch_examples, now.continual.fisher.micro_batch_examples
    if (fisher if is_fisher else training) == 1:
        return None
    if not is_fisher:
        training = next(size for size in range(training // 2, 0, -1) if training % size == 0)
    fisher = max(1, fisher // 2)
    # A Fisher that was begun with the larger one begins anew.
    for unfinished in (folder.path / "stages").glob(f"*/{FISHER_UNFINISHED}"):
        shutil.rmtree(unfinished, ignore_errors=True)
    write_json(folder.adjustments, {MICRO_BATCH: training, FISHER_MICRO_BATCH: fisher})
    words = f"started again with continual.fisher.micro_batch_examples {fisher}"
    if is_fisher:
        return words
    return f"{words} and training.micro_batch_examples {training}, the global batch as it was"
