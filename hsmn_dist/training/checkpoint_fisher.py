"""The Fisher of weights that were trained anywhere: the starting point for continual work on a pretrained model.

What comes out is an ordinary EWC store with one task, which the first stage of a run can be given as what came before it.
One process, on the GPU where there is one; source: continual.md section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hsmn_dist.config.continual import FisherConfig
from hsmn_dist.config.optim import OptimConfig
from hsmn_dist.config.training import TrainingConfig
from hsmn_dist.continual.ewc import EwcMemory, model_digest
from hsmn_dist.continual.fisher import fisher_record
from hsmn_dist.continual.store import MANIFEST, save_store
from hsmn_dist.data.stream.loader import iter_split, open_split
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import CheckpointError, DataError
from hsmn_dist.models.contract import LanguageModel
from hsmn_dist.training.build import build_engine
from hsmn_dist.training.fisher_pass import run_fisher

_CPU = torch.device("cpu")


def save_fisher_of_weights(
    model: LanguageModel,
    data: Path,
    config: FisherConfig,
    folder: Path,
    *,
    name: str = "pretrained",
    split: str = "train",
    progress: Callable[[int, int], None] | None = None,
    tokenizer_digest: str | None = None,
) -> Mapping[str, Any]:
    """Measure the Fisher of a model on a prepared folder and write it, with the weights as anchor, to `folder`.

    Args:
        model: with its weights loaded.
        data: a prepared folder (shards and index), tokenized with the model's tokenizer.
        config: estimator, number of examples, seed.
        folder: the store; must not hold one already.
        name: name of the task in the store.
        split: split of `data`.
        progress: called as progress(examples done, total).
        tokenizer_digest: of the model's tokenizer, to be that of the data; None: not looked at.

    Returns:
        JSON values: the task's record, number of parameters, sum and largest entry of the Fisher, digest, folder.

    Raises:
        CheckpointError: `folder` holds a store already, or the Fisher is not finite.
        DataError: no such data, an empty split, or tokens of another tokenizer.
    """
    if (folder / MANIFEST).exists():
        raise CheckpointError(
            f"{folder}: holds a Fisher already", allowed="a new folder", action="name another --out, or remove this one"
        )
    num_rows, facts = _facts_of_split(data, split, tokenizer_digest)
    total = min(num_rows, config.num_fisher_examples)
    world = World(device=torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU)
    training = TrainingConfig.model_validate({"engine": "local"})
    engine = build_engine(training, OptimConfig(), lambda: model, world)
    batches = iter_split(data, split, config.micro_batch_examples, limit=total, shuffle_seed=config.seed)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    fisher = run_fisher(engine, batches, config, world, total, progress, unfinished, facts)
    shards = engine.param_shards(with_gradients=False)
    memory = EwcMemory.empty(shards)
    record = fisher_record(name, config, total)
    memory.add_task(shards, fisher, record)
    save_store(folder, memory, world)
    return {
        "folder": str(folder),
        "task": asdict(record),
        "num_parameters": sum(shard.num_elements for shard in shards),
        "fisher_sum": sum(float(part.double().sum()) for part in fisher),
        "fisher_largest": max(float(part.max()) for part in fisher if part.numel()),
        "model_digest": model_digest({shard.name: shard.shape for shard in shards}),
    }


def _facts_of_split(data: Path, split: str, tokenizer_digest: str | None) -> tuple[int, dict[str, str]]:
    """(examples, what tells this split from any other); its tokens are those of the model's tokenizer."""
    reader = open_split(data, split)
    index, num_rows = reader.index, len(reader)
    reader.close()
    if tokenizer_digest not in (None, index.tokenizer_digest):
        raise DataError(
            f"{data}: tokens of tokenizer {index.tokenizer_digest[:12]}, the weights have {str(tokenizer_digest)[:12]}",
            allowed="a folder prepared with the tokenizer beside the weights",
            action="prepare the dataset with that tokenizer",
        )
    return num_rows, {"data": index.digest, "split": split}
