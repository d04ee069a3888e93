"""The Fisher of a stage: drives `continual.fisher.FisherPass` over an engine and a split's micro-batches, resumably.

Unusual: weights of examples, signs and the mean over an example's tokens are folded into the loss of each scored position, so
that the engine's ordinary summed loss is all that is differentiated, on every ZeRO stage. Nothing that the engine accumulates
is touched. An unfinished pass is saved in files whose manifest comes last and names everything that the sums depend on.

Source: continual.md section 3.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hsmn_dist.config.continual import FisherConfig
from hsmn_dist.continual.ewc import model_digest
from hsmn_dist.continual.fisher import FisherPass
from hsmn_dist.continual.labels import SAMPLED, ExampleNumbers, signs, target_loss
from hsmn_dist.distributed.collectives import all_gather_objects, any_rank, barrier
from hsmn_dist.distributed.shards import ParamShard
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import CheckpointError, DataError
from hsmn_dist.foundation.files import (
    atomic_path,
    is_inside,
    read_json,
    remove_leftovers,
    sha256_of_file,
    sha256_of_json,
    write_json,
)
from hsmn_dist.foundation.log import logger
from hsmn_dist.models.contract import ModelInput, TargetLoss
from hsmn_dist.training.engine import Engine

Progress = Callable[[int, int], None]
_MANIFEST = "progress.json"
_SETTINGS = ("estimator", "seed", "example_reduction", "micro_batch_examples", "num_groups")
_LOG = logger(__name__)


def run_fisher(
    engine: Engine,
    batches: Iterable[Mapping[str, Tensor]],
    config: FisherConfig,
    world: World,
    total_examples: int,
    progress: Progress | None = None,
    resume_folder: Path | None = None,
    data_facts: Mapping[str, Any] | None = None,
) -> list[Tensor]:
    """The Fisher of the engine's weights, one fp32 [stop - start] for each of `engine.param_shards(False)`. Collective.

    Args:
        engine: between steps, with no gradients accumulated.
        batches: this rank's micro-batches as `iter_split` deals them: the same number of the same size on every rank,
            with `example_index` [B], padded rows with an all-False loss mask.
        config: estimator and its settings.
        world: this rank.
        total_examples: over all ranks, padding not counted.
        progress: called as progress(examples done, total).
        resume_folder: where an unfinished pass is kept, by `config.save_every_*`; emptied when done. A damaged one, or
            one of other weights, data or ranks, begins anew.
        data_facts: JSON values that tell this data from other data, beside its first rows.

    Raises:
        CheckpointError: the unfinished pass was begun with another estimator, seed, reduction, micro-batch or groups.
        DataError: a micro-batch without `example_index`, or packed rows.
    """
    shards = engine.param_shards(with_gradients=False)
    rows = _numbered(batches, config, world)
    first_rows = next(rows, None)
    keeper = None
    if resume_folder is not None and (config.save_every_batches or config.save_every_seconds):
        given = {"number of examples": total_examples, **(data_facts or {})}
        keeper = _Keeper(resume_folder, world, config, lambda: _facts(engine, shards, first_rows, given))
    loss, is_whole = functools.partial(_weighted_nll, engine, config), not is_partitioned(engine.module)
    fisher = FisherPass(engine.module, shards, loss, config, total_examples, is_whole, world.device)
    try:
        if keeper is not None:
            keeper.restore(fisher)
        every_batch = itertools.chain([] if first_rows is None else [first_rows], rows)
        for batch in itertools.islice(every_batch, fisher.num_batches, None):
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


def _weighted_nll(engine: Engine, config: FisherConfig, batch: Mapping[str, Any], weights: Tensor) -> Tensor:
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


def _numbered(batches: Iterable[Mapping[str, Any]], config: FisherConfig, world: World) -> Iterator[Mapping[str, Any]]:
    """The micro-batches, with numbers of the examples that hold over all datasets and ranks where something is drawn."""
    numbers = ExampleNumbers()
    for batch in batches:
        if "example_index" not in batch or batch.get("segment_ids") is not None:
            raise DataError(
                "a Fisher micro-batch " + ("of packed rows" if "example_index" in batch else "without example_index"),
                allowed="one example a row, numbered by example_index [rows]",
                action="read the split with data.stream.loader.iter_split",
            )
        if config.estimator in (*SAMPLED, "signed_sum"):
            own = batch["example_index"].tolist()
            found = numbers.of_step([index for rank in all_gather_objects(own) for index in rank])
            first = world.rank * len(own)
            batch = {**batch, "example_index": torch.tensor(found[first : first + len(own)], dtype=torch.int64)}
        yield batch


class _Keeper:
    """An unfinished pass on disk: one file per rank and position, then the manifest that makes it count."""

    def __init__(self, folder: Path, world: World, config: FisherConfig, facts: Callable[[], dict[str, Any]]) -> None:
        self._folder = folder
        self._world = world
        self._config = config
        self._saved_at = time.monotonic()
        self._settings = {name: getattr(config, name) for name in _SETTINGS}
        # Hashing the weights takes a while, and most passes neither save nor find anything.
        self._facts = functools.cache(facts)

    def restore(self, fisher: FisherPass) -> None:
        """Continue from the folder, where it holds a whole pass of this very kind; all ranks do, or none."""
        path = self._folder / _MANIFEST
        if not any_rank(path.is_file()):
            return
        manifest, problem = self._read_manifest(path)
        self._refuse_other_settings(path, manifest)
        if not any_rank(bool(problem)):
            kept, facts = manifest["facts"], self._facts()
            problem = ", ".join(key for key in {**facts, **kept} if kept.get(key) != facts.get(key))
            problem = f"it was taken of other {problem}" if problem else ""
        state: dict[str, list[Tensor]] = {}
        if not any_rank(bool(problem)):
            state, problem = self._read_state(manifest["files"][self._world.rank])
        if any_rank(bool(problem)):
            _LOG.warning(
                "%s: the unfinished Fisher cannot go on, it begins anew: %s", path, problem or "see another rank's line"
            )
            return
        fisher.restore(state, manifest["num_batches"])

    def _read_manifest(self, path: Path) -> tuple[dict[str, Any], str]:
        """(manifest, ""), or ({}, what is wrong with it)."""
        try:
            manifest = read_json(path)
            files, num_batches = manifest["files"], manifest["num_batches"]
            is_whole = isinstance(manifest["facts"], dict) and isinstance(manifest["settings"], dict)
            is_whole = is_whole and type(num_batches) is int and all(is_inside(file["name"]) for file in files)
        except (OSError, CheckpointError, KeyError, TypeError) as error:
            return {}, f"its manifest cannot be read ({type(error).__name__})"
        if not is_whole or len(files) != self._world.world_size:
            return {}, f"its manifest is damaged, or of {len(files)} ranks and not {self._world.world_size}"
        return manifest, ""

    def _refuse_other_settings(self, path: Path, manifest: Mapping[str, Any]) -> None:
        """Somebody changed the configuration between a kill and the resume: they are asked, because work is lost."""
        kept = manifest.get("settings", self._settings)
        wrong = [name for name, value in self._settings.items() if kept.get(name) != value]
        if any_rank(bool(wrong)):
            raise CheckpointError(
                f"{path}: an unfinished Fisher with "
                + ", ".join(f"{name} {kept.get(name)!r} (now {self._settings[name]!r})" for name in wrong),
                allowed=f"the {', '.join(_SETTINGS)} that it was begun with",
                action=f"set them back, or remove {self._folder} to begin anew",
            )

    def _read_state(self, entry: Mapping[str, str]) -> tuple[dict[str, list[Tensor]], str]:
        """(what `FisherPass.state` gave, ""), or ({}, what is wrong with this rank's file)."""
        file = self._folder / entry["name"]
        if not file.is_file() or sha256_of_file(file) != entry.get("sha256"):
            return {}, f"{file.name} is missing or damaged"
        tensors = load_file(file)
        state: dict[str, list[Tensor]] = {}
        for key in sorted(tensors, key=lambda key: int(key.split(".")[1])):
            state.setdefault(key.split(".")[0], []).append(tensors[key])
        return state, ""

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
        facts = self._facts()
        name = f"after_{fisher.num_batches:08d}_rank_{self._world.rank:05d}.safetensors"
        tensors = {
            f"{what}.{place}": tensor.detach().cpu().clone()
            for what, part in fisher.state().items()
            for place, tensor in enumerate(part)
        }
        # Flushed before the manifest names it: after a power cut there is the position before, or this one whole.
        with atomic_path(self._folder / name) as aside:
            save_file(tensors, aside)
        files = all_gather_objects({"name": name, "sha256": sha256_of_file(self._folder / name)})
        if self._world.is_first:
            manifest = {
                "settings": self._settings,
                "facts": facts,
                "num_batches": fisher.num_batches,
                "files": files,
            }
            write_json(self._folder / _MANIFEST, manifest)
            names = {file["name"] for file in files}
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
            remove_leftovers(self._folder)


def _facts(
    engine: Engine, shards: Sequence[ParamShard], rows: Mapping[str, Any] | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    """What the sums depend on beside the settings: weights, how they lie on the ranks, rows. Collective."""
    own = [_digest_of_weights(engine, shards), _digest_of_rows(rows)]
    ranks = all_gather_objects(own)
    return {
        **given,
        "model": model_digest({shard.name: shard.shape for shard in shards}),
        "weights": sha256_of_json([weights for weights, _ in ranks]),
        "first rows": sha256_of_json([first for _, first in ranks]),
        "sharding": [is_partitioned(engine.module), engine.num_shard_copies],
    }


def is_partitioned(module: nn.Module) -> bool:
    """Whether ZeRO-3 holds the weights in pieces."""
    return any(hasattr(parameter, "ds_tensor") for parameter in module.parameters())


def _digest_of_weights(engine: Engine, shards: Sequence[ParamShard]) -> str:
    """Of this rank's shards, their ranges, and of what is not trained (which gradients depend on as well)."""
    digest = hashlib.sha256()
    parts: list[tuple[Any, Tensor]] = [((s.name, s.shape, s.start, s.stop), s.value) for s in shards]
    frozen = [(name, p) for name, p in engine.module.named_parameters() if not p.requires_grad]
    for name, tensor in [*frozen, *engine.module.named_buffers()]:
        parts.append(((name,), getattr(tensor, "ds_tensor", tensor)))
    for label, tensor in parts:
        digest.update(repr((label, tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _digest_of_rows(rows: Mapping[str, Any] | None) -> str:
    digest = hashlib.sha256()
    for name in sorted(rows or {}):
        value = (rows or {})[name]
        if isinstance(value, Tensor):
            digest.update(repr((name, tuple(value.shape), value.dtype)).encode())
            digest.update(_bytes_of(value))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
