"""EWC for any `torch.nn.Module` in a plain training loop, sharded or not: the library face of this room.

    ewc = ModuleEwc(model, strength=100.0)
    for task in tasks:
        for batch in task:
            loss_of(model, batch).mean().backward()
            ewc.add_gradients()                # between backward and step; nothing before the first task is learned
            optimizer.step(); optimizer.zero_grad()
        ewc.learn_task(task_batches, loss_of)  # Fisher of the weights as they are now, merged into two buffers

`loss_of(model, batch)` gives the negative log-likelihood of each example, [rows]; a batch is a dict of tensors whose first
dimension is the example. While the Fisher is taken it runs with torch's generators seeded, so labels that it draws are those
of `seed`. `DTensor`s cut along dimension 0 (FSDP2) have their local pieces penalised; their Fisher comes from the batched path
alone, which there is nothing to compare with, and what it does not cover is refused.

Source: continual.md sections 1 to 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hsmn_dist.config.continual import FisherConfig
from hsmn_dist.continual.ewc import Application, EwcMemory, EwcPenalty, model_digest
from hsmn_dist.continual.fisher import FisherPass, fisher_record, num_rows, one_row
from hsmn_dist.continual.store import load_store, save_store
from hsmn_dist.distributed.collectives import all_reduce_sum, rank_and_world_size
from hsmn_dist.distributed.determinism import derived_seed
from hsmn_dist.distributed.shards import ParamShard
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import CheckpointError, ConfigError, DataError
from hsmn_dist.foundation.param_role import ParamRole

LossOf = Callable[[nn.Module, Any], Tensor]


def module_shards(module: nn.Module) -> list[ParamShard]:
    """Shards of every trained parameter as this process holds it; component = the first part of its name."""
    return [_shard(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


class ModuleEwc:
    """Remembers what a module learned and holds it there.

    Attributes:
        memory: the two buffers of every parameter, and how each task was measured.
        strength: lambda.
    """

    def __init__(
        self,
        module: nn.Module,
        strength: float,
        application: Application = "coupled",
        online_decay: float = 1.0,
        component_strength: Mapping[str, float] | None = None,
    ) -> None:
        """`component_strength` has a factor for the first part of a parameter's name; 1 where absent.

        Raises:
            ConfigError: a negative strength or factor.
        """
        self.module = module
        self.memory = EwcMemory.empty(module_shards(module))
        self.online_decay = online_decay
        self._penalty = EwcPenalty(self.memory, strength, application, component_strength)

    @property
    def strength(self) -> float:
        """Lambda."""
        return self._penalty.strength

    def add_gradients(self) -> None:
        """Coupled: add the penalty's gradient to `.grad`; call between the last backward and clipping or the step."""
        self._penalty.add_gradients(module_shards(self.module))

    def after_step(self, learning_rate: float) -> None:
        """Proximal: pull the weights towards what was learned; call after the optimizer's step."""
        self._penalty.after_step(module_shards(self.module), learning_rate)

    def value(self) -> Tensor:
        """The penalty, to be logged (not to be differentiated); this process's part where parameters are sharded."""
        return self._penalty.local_value(module_shards(self.module))

    def learn_task(
        self, batches: Iterable[Any], loss_of: LossOf, name: str = "", estimator: str = "empirical", seed: int = 0
    ) -> list[Tensor]:
        """Measure the Fisher on `batches` and merge it with the present weights as anchor; returns the Fisher.

        Estimators: "empirical", "sampled", "microbatch". Drawing labels is up to `loss_of`,
        because only it knows where the logits are; it draws them with torch's generators, seeded here.

        Raises:
            DataError: no batches, or batches that are not dicts of tensors.
            CheckpointError: a Fisher that is not finite or all zero, or another estimator than for earlier tasks.
            ModelError: sharded parameters (DTensor) without a rule.
        """
        rows = list(batches)
        total = sum(num_rows(_checked(batch)) for batch in rows)
        if not total:
            raise DataError(
                "no examples to learn a task from", allowed="at least one batch", action="pass the task's data"
            )
        if estimator not in ("empirical", "sampled", "microbatch"):
            raise ConfigError(
                f"estimator {estimator!r} on a plain module",
                allowed="empirical, sampled (loss_of draws the labels), microbatch",
                action="use one of these, or training.fisher_pass.run_fisher with a LanguageModel",
            )
        micro = num_rows(rows[0])
        config = FisherConfig.model_validate({"estimator": estimator, "seed": seed, "micro_batch_examples": micro})
        shards = module_shards(self.module)
        world_size = rank_and_world_size()[1]
        total = int(all_reduce_sum(torch.tensor(total))) if world_size > 1 else total
        whole_shards = [_whole(shard) for shard in shards]
        loss = _SeededLoss(self.module, loss_of, seed)
        row_loss = loss.of_row if estimator == "sampled" else None
        fisher = FisherPass(self.module, whole_shards, loss, config, total, row_loss=row_loss)
        for loss.number, batch in enumerate(rows):
            fisher.add(batch)
        measured = fisher.result()
        fisher.close()
        _refuse_zeros(measured)
        mine = [part[shard.start : shard.stop] for part, shard in zip(measured, shards, strict=True)]
        record = fisher_record(name or f"task {len(self.memory.tasks)}", config, total)
        self.memory.add_task(shards, mine, record, self.online_decay)
        return mine

    def save(self, folder: Path | str) -> None:
        """Write the memory; collective where there are several ranks."""
        rank, world_size = rank_and_world_size()
        shards = module_shards(self.module)
        is_sharded = any(shard.num_elements < torch.Size(shard.shape).numel() for shard in shards)
        save_store(Path(folder), self.memory, World(rank, 0, world_size), 1 if is_sharded else world_size)

    def load(self, folder: Path | str) -> None:
        """Read a memory of the same model, whatever number of ranks wrote it."""
        self.memory = load_store(Path(folder), module_shards(self.module))
        self._penalty.memory = self.memory

    @property
    def digest(self) -> str:
        """Hash of the parameters' names and shapes, as stores have it."""
        return model_digest({shard.name: shard.shape for shard in self.memory.shards})


def _shard(name: str, parameter: nn.Parameter) -> ParamShard:
    role = ParamRole.MATRIX if parameter.dim() > 1 else ParamRole.VECTOR
    component = name.split(".", 1)[0]
    shape = tuple(parameter.shape)
    value, gradient = parameter.detach(), parameter.grad
    start = 0
    if hasattr(parameter, "to_local"):
        value, gradient = _local(value), None if gradient is None else _local(gradient)
        start = _first_element(parameter)
    flat = value.view(-1)
    stop = start + flat.numel()
    return ParamShard(name, role, component, shape, start, stop, flat, None if gradient is None else gradient.view(-1))


def _local(tensor: Any) -> Tensor:
    return tensor.to_local()  # type: ignore[no-any-return]


def _first_element(parameter: Any) -> int:
    """Flat index of the first local element of a DTensor cut along dimension 0 (or not at all)."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    cut = [placement for placement in parameter.placements if placement.is_shard()]
    if any(placement.dim != 0 for placement in cut):
        raise ConfigError(
            f"a parameter sharded as {parameter.placements}",
            allowed="DTensors cut along dimension 0, as FSDP2 makes them",
            action="shard along dimension 0, or use EWC on whole parameters",
        )
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    width = torch.Size(parameter.shape[1:]).numel() if parameter.dim() > 1 else 1
    return int(offset[0]) * width if offset else 0


def _whole(shard: ParamShard) -> ParamShard:
    """The same parameter as if this rank owned all of it; the Fisher is summed whole, then cut."""
    size = torch.Size(shard.shape).numel()
    if shard.num_elements == size:
        return shard
    value = shard.value.new_zeros(size)
    return ParamShard(shard.name, shard.role, shard.component, shard.shape, 0, size, value)


class _SeededLoss:
    """Weighted sum of the losses of a micro-batch, with generators that depend on seed, rank and micro-batch alone.

    Attributes:
        number: which micro-batch of this rank it is.
    """

    def __init__(self, module: nn.Module, loss_of: LossOf, seed: int) -> None:
        self._module = module
        self._loss_of = loss_of
        self._seed = seed
        self._rank = rank_and_world_size()[0]
        self._devices = sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
        self.number = 0

    def __call__(self, batch: Any, weights: Tensor) -> Tensor:
        """Whatever draws labels draws the same ones each time that a micro-batch is computed."""
        losses = self._seeded(batch, "rows")
        return (losses * weights.to(losses)).sum()

    def of_row(self, batch: Any, row: int) -> Tensor:
        """The loss of a row alone: labels of its own, which are not those that it has in its micro-batch."""
        return self._seeded(one_row(batch, row), row).sum()

    def _seeded(self, batch: Any, what: int | str) -> Tensor:
        with torch.random.fork_rng(self._devices):
            torch.manual_seed(derived_seed(self._seed, "fisher", self._rank, self.number, what))
            return self._loss_of(self._module, batch)


def _refuse_zeros(measured: Sequence[Tensor]) -> None:
    if not any(bool(part.any()) for part in measured):
        raise CheckpointError(
            f"a Fisher that is zero in all {sum(part.numel() for part in measured)} entries",
            allowed="a loss that depends on the weights to be protected",
            action="let loss_of return each example's loss with its graph, [rows], from the module that it is given",
        )


def _checked(batch: Any) -> Mapping[str, Any]:
    if not isinstance(batch, Mapping) or not any(isinstance(value, Tensor) for value in batch.values()):
        raise DataError(
            f"a batch of type {type(batch).__name__}",
            allowed="a dict of tensors whose first dimension is the example",
            action="wrap the batch, for example {'x': x, 'y': y}",
        )
    return batch
