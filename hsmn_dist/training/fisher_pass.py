"""The Fisher of a stage: drives `continual.fisher.FisherPass` over an engine and a split's micro-batches, resumably.

Unusual: weights of examples, signs and the mean over an example's tokens are folded into the loss of each scored position, so
that the engine's ordinary summed loss is all that is differentiated, on every ZeRO stage. Nothing that the engine accumulates
is touched. An unfinished pass is saved in files whose manifest comes last and names everything that the sums depend on.

Source: continual.md section 3.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from hsmn_dist.config.continual import FisherConfig
from hsmn_dist.continual.ewc import model_digest
from hsmn_dist.continual.fisher import FisherPass, fisher_record
from hsmn_dist.continual.labels import signs, target_loss
from hsmn_dist.distributed.collectives import any_rank, barrier
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import CheckpointError, DataError
from hsmn_dist.foundation.files import read_json, sha256_of_file, write_json
from hsmn_dist.foundation.log import logger
from hsmn_dist.models.contract import ModelInput, TargetLoss
from hsmn_dist.training.engine import Engine

Progress = Callable[[int, int], None]
_MANIFEST = "progress.json"
_LOG = logger(__name__)


def run_fisher(
    engine: Engine,
    batches: Iterable[Mapping[str, Tensor]],
    config: FisherConfig,
    world: World,
    total_examples: int,
    progress: Progress | None = None,
    resume_folder: Path | None = None,
) -> list[Tensor]:
    """The Fisher of the engine's weights, one fp32 [stop - start] for each of `engine.param_shards(False)`. Collective.

    Args:
        engine: between steps, with no gradients accumulated.
        batches: this rank's micro-batches as `iter_split` deals them: every rank the same number of the same number of
            rows, `example_index` [B] beside the model's inputs, padded rows with an all-False loss mask.
        config: estimator and its settings.
        world: this rank.
        total_examples: examples over all ranks, padding not counted.
        progress: called as progress(examples done, total) after each micro-batch.
        resume_folder: where an unfinished pass is kept every `config.save_every_seconds` (rank 0's clock) or
            `config.save_every_batches`; emptied when done.

    Raises:
        CheckpointError: the unfinished pass was taken with other settings or of another model.
        DataError: a micro-batch without `example_index`, or packed rows.
    """
    shards = engine.param_shards(with_gradients=False)
    is_partitioned = any(hasattr(parameter, "ds_tensor") for parameter in engine.module.parameters())
    fisher = FisherPass(
        engine.module,
        shards,
        lambda batch, weights: _weighted_nll(engine, batch, weights, config),
        config,
        total_examples,
        keeps_whole=not is_partitioned,
        device=world.device,
    )
    keeper = None
    if resume_folder is not None and (config.save_every_batches or config.save_every_seconds):
        digest = model_digest({shard.name: shard.shape for shard in shards})
        keeper = _Keeper(resume_folder, world, config, total_examples, digest)
        keeper.restore(fisher)
    first = fisher.num_batches
    try:
        for index, batch in enumerate(batches):
            if index < first:
                continue
            _check_batch(batch)
            fisher.add(batch)
            if progress is not None:
                seen = fisher.num_batches * world.world_size * batch["target_ids"].shape[0]
                progress(min(seen, total_examples), total_examples)
            if keeper is not None:
                keeper.save_if_due(fisher)
        result = fisher.result()
    finally:
        fisher.close()
    if keeper is not None:
        keeper.clear()
    return result


def _weighted_nll(engine: Engine, batch: Mapping[str, Any], weights: Tensor, config: FisherConfig) -> Tensor:
    """Sum over rows of weight * (mean or summed loss of the row's scored tokens)."""
    factors = weights
    if config.example_reduction == "mean":
        factors = factors / batch["loss_mask"].sum(1).clamp(min=1).to(factors)
    if config.estimator == "signed_sum":
        factors = factors * signs(config.seed, batch["example_index"]).to(factors)
    inputs = ModelInput(batch["context_ids"], batch["context_mask"], batch["target_ids"], batch["loss_mask"])
    loss = target_loss(config.estimator, config.seed, batch["example_index"])
    return engine.nll(inputs, _Weighted(loss, factors))


class _Weighted:
    """A target loss times a factor for each row of the batch."""

    def __init__(self, loss: TargetLoss, factors: Tensor) -> None:
        self.loss = loss
        self.factors = factors

    def __call__(self, logits: Tensor, labels: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        losses = self.loss(logits, labels, rows, positions)
        return losses * self.factors.to(losses)[rows]


def _check_batch(batch: Mapping[str, Any]) -> None:
    if "example_index" not in batch or batch.get("segment_ids") is not None:
        raise DataError(
            "a Fisher micro-batch " + ("of packed rows" if "example_index" in batch else "without example_index"),
            allowed="one example a row, numbered by example_index [rows]",
            action="read the split with data.stream.loader.iter_split",
        )


class _Keeper:
    """An unfinished pass on disk: one file per rank and position, then the manifest that makes it count."""

    def __init__(self, folder: Path, world: World, config: FisherConfig, total_examples: int, digest: str) -> None:
        self._folder = folder
        self._world = world
        self._config = config
        self._saved_at = time.monotonic()
        record = asdict(fisher_record("", config, total_examples))
        self._signature = {**record, "micro_batch_examples": config.micro_batch_examples, "model_digest": digest}

    def restore(self, fisher: FisherPass) -> None:
        """Continue from the folder, where it holds a pass of this very kind on as many ranks."""
        path = self._folder / _MANIFEST
        if not any_rank(path.is_file()):
            return
        manifest = read_json(path)
        kept = manifest["signature"]
        wrong = [key for key, value in self._signature.items() if kept.get(key) != value]
        if wrong:
            raise CheckpointError(
                f"{path}: an unfinished Fisher with "
                + ", ".join(f"{key} {kept.get(key)!r} (now {self._signature[key]!r})" for key in wrong),
                allowed="the estimator, seed, examples and model that it was begun with",
                action=f"set them back, or remove {self._folder} to begin anew",
            )
        if manifest["world_size"] != self._world.world_size:
            _LOG.warning(
                "an unfinished Fisher of %d ranks begins anew on %d", manifest["world_size"], self._world.world_size
            )
            return
        file = self._folder / manifest["files"][self._world.rank]["name"]
        if not file.is_file() or sha256_of_file(file) != manifest["files"][self._world.rank]["sha256"]:
            raise CheckpointError(
                f"{file}: missing or damaged",
                allowed="the bytes that were written",
                action=f"remove {self._folder} to begin the Fisher anew",
            )
        tensors = load_file(file)
        state: dict[str, list[Tensor]] = {}
        for key in sorted(tensors, key=lambda key: int(key.split(".")[1])):
            state.setdefault(key.split(".")[0], []).append(tensors[key])
        fisher.restore(state, manifest["num_batches"])

    def save_if_due(self, fisher: FisherPass) -> None:
        """Save by the count of micro-batches or by rank 0's clock, which all ranks follow."""
        every_batches, every_seconds = self._config.save_every_batches, self._config.save_every_seconds
        is_due = every_batches > 0 and fisher.num_batches % every_batches == 0
        if every_seconds > 0 and not is_due:
            is_late = time.monotonic() - self._saved_at >= every_seconds
            is_due = any_rank(self._world.is_first and is_late)
        if is_due:
            self._save(fisher)
            self._saved_at = time.monotonic()

    def _save(self, fisher: FisherPass) -> None:
        """Write this position; older ones go when it counts."""
        self._folder.mkdir(parents=True, exist_ok=True)
        names = [
            f"after_{fisher.num_batches:08d}_rank_{rank:05d}.safetensors" for rank in range(self._world.world_size)
        ]
        tensors = {
            f"{what}.{place}": tensor.detach().cpu().clone()
            for what, part in fisher.state().items()
            for place, tensor in enumerate(part)
        }
        save_file(tensors, self._folder / names[self._world.rank])
        barrier()
        if self._world.is_first:
            files = [{"name": name, "sha256": sha256_of_file(self._folder / name)} for name in names]
            manifest = {
                "signature": json.loads(json.dumps(self._signature)),
                "world_size": self._world.world_size,
                "num_batches": fisher.num_batches,
                "files": files,
            }
            write_json(self._folder / _MANIFEST, manifest)
            for old in self._folder.glob("after_*.safetensors"):
                if old.name not in names:
                    old.unlink()
        barrier()

    def clear(self) -> None:
        """The pass is finished: nothing is left to resume."""
        barrier()
        if self._world.is_first and self._folder.is_dir():
            (self._folder / _MANIFEST).unlink(missing_ok=True)
            for old in self._folder.glob("after_*.safetensors"):
                old.unlink()
