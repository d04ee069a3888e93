"""DeepSpeedEngine: DeepSpeed's ZeRO behind the `Engine` protocol, with what it does silently made explicit.

Unusual: the loss is scaled so that DeepSpeed's mean over ranks gives the gradient of sum(nll) / global_target_tokens, and its
division by the accumulation count is switched off. The norm that it clips by is ours. State is saved by shards, in our own
format; DeepSpeed's pickles are never written or read. The model is built whole on every rank's CPU and cut by DeepSpeed one
parameter at a time (docs/decisions/0050). While an engine under ZeRO-3 is open, `torch.nn.functional.linear` is DeepSpeed's.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakSet

import deepspeed
import deepspeed.ops
import torch
from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses
from torch import Tensor

from hsmn_dist.config.optim import OptimConfig
from hsmn_dist.config.training import TrainingConfig
from hsmn_dist.distributed.shards import ParamShard
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import ConfigError
from hsmn_dist.foundation.param_role import ParamUpdate
from hsmn_dist.models.contract import LanguageModel, ModelInput, TargetLoss, cross_entropy
from hsmn_dist.optim.build import build_optimizer
from hsmn_dist.optim.param_groups import MATRIX_RULE
from hsmn_dist.training.deepspeed_config import deepspeed_config
from hsmn_dist.training.engine import Accepts, StepStats, always
from hsmn_dist.training.gradient_norms import gradient_norms
from hsmn_dist.training.losses import NllModule, tensors_of
from hsmn_dist.training.owned_matrices import OwnedMatrixOptimizer
from hsmn_dist.training.shard_files import ShardSlot, read_into, snapshot, write_snapshot
from hsmn_dist.training.stragglers import ForwardTimer
from hsmn_dist.training.whole_weights import gather_weights, scatter_weights
from hsmn_dist.training.zero_shards import ModelFacts, ZeroShards


class DeepSpeedEngine:
    """See `Engine`. A step takes exactly the micro-batches that `begin_step` named, or `accumulation_steps(training, world_size)`."""

    def __init__(
        self,
        training: TrainingConfig,
        optim: OptimConfig,
        model: LanguageModel,
        world: World,
        updates: Mapping[str, ParamUpdate],
    ) -> None:
        settings = deepspeed_config(training, world.world_size, "cuda" if world.device.type == "cuda" else "cpu")
        _start_deepspeed(world)
        self.module = model
        self._device = world.device
        self.forward_timer = ForwardTimer(world.device)
        self._world_size, self._rank = world.world_size, world.rank
        self._stage = training.zero_stage
        self._max_norm = training.max_gradient_norm
        self._num_micro_batches = settings["gradient_accumulation_steps"]
        self._index = 0
        self.num_shard_copies = world.world_size if self._stage == 0 else 1
        roles, components = model.parameter_roles(), model.parameter_components()
        self._component_names = sorted(set(components.values()))
        parameters = dict(model.named_parameters())
        facts = ModelFacts(parameters, {name: tuple(p.shape) for name, p in parameters.items()}, roles, components)
        self._names = list(parameters)
        optimizer = self._build_optimizer(training, optim, facts, updates)
        self._nll = NllModule(model)
        if training.compiles_model:
            self._nll.compile(dynamic=True)
        if self._stage == 3 and model.gathered_whole:
            deepspeed.utils.set_z3_leaf_modules(model, list(model.gathered_whole))
        self._engine, _, _, _ = deepspeed.initialize(
            model=self._nll, optimizer=optimizer, config=settings, dist_init_required=False
        )
        _open_engines.add(self)
        self._shards = ZeroShards(self._engine, facts, self._stage)
        if self._owned is not None:
            self._owned.attach(self._shards.slots(False))

    def _build_optimizer(
        self, training: TrainingConfig, optim: OptimConfig, facts: ModelFacts, updates: Mapping[str, ParamUpdate]
    ) -> torch.optim.Optimizer:
        """The optimizer section's; under ZeRO 1 to 3 a matrix rule gets its whole matrices from `OwnedMatrixOptimizer`."""
        plain = build_optimizer(optim, facts.parameters.items(), facts.roles, updates)
        whole = {id(p) for group in plain.param_groups if group.get("rule") == MATRIX_RULE for p in group["params"]}
        self._owned: OwnedMatrixOptimizer | None = None
        if self._stage == 0 or not whole:
            return plain
        if training.offload.optimizer != "none":
            raise ConfigError(
                f"optim.optimizer.kind {optim.optimizer.kind} with training.offload.optimizer {training.offload.optimizer}",
                allowed="matrix rules without optimizer offload, or kind adam",
                action="set training.offload.optimizer to none",
            )
        names = frozenset(name for name, parameter in facts.parameters.items() if id(parameter) in whole)
        self._owned = OwnedMatrixOptimizer(
            plain.param_groups, lambda named, roles: build_optimizer(optim, named, roles), names
        )
        return self._owned

    def begin_step(self, num_micro_batches: int) -> None:
        """See Engine."""
        assert self._index == 0, f"begin_step after {self._index} micro-batches of a step"
        self._num_micro_batches = num_micro_batches

    def forward_backward(
        self, batch: ModelInput, global_target_tokens: float, target_loss: TargetLoss = cross_entropy
    ) -> Tensor:
        """See Engine."""
        self._engine.train()
        self._nll.target_loss = target_loss
        self._engine.set_gradient_accumulation_boundary(self._index == self._num_micro_batches - 1)
        with self.forward_timer:
            nll = self._engine(*tensors_of(batch.to(self._device)))
        self._engine.backward(nll * (self._world_size / global_target_tokens), scale_wrt_gas=False)
        self._index += 1
        return nll.detach()  # type: ignore[no-any-return]

    def param_shards(self, with_gradients: bool = True) -> list[ParamShard]:
        """See Engine."""
        is_boundary = self._index == self._num_micro_batches
        return [slot.shard for slot in self._shards.slots(with_gradients and is_boundary)]

    def step(self, learning_rate: float, nll: Tensor | None = None, accepts: Accepts = always) -> StepStats:
        """See Engine."""
        assert self._index == self._num_micro_batches, f"{self._index} of {self._num_micro_batches} micro-batches done"
        shards = self.param_shards()
        norms = gradient_norms(shards, self._component_names, self.num_shard_copies, nll)
        factor = norms.clip_factor(self._max_norm)
        is_accepted = accepts(norms.nll, norms.total) and norms.is_finite
        if is_accepted:
            self._update(shards, norms.total, factor, learning_rate)
        self.discard_gradients()
        return StepStats(
            norms.total, learning_rate, factor < 1.0, factor, not is_accepted, norms.by_component, norms.nll
        )

    def _update(self, shards: list[ParamShard], norm: float, factor: float, learning_rate: float) -> None:
        if self._stage > 0:
            self._shards.set_norm(norm)
        elif factor < 1.0:
            for shard in shards:
                assert shard.gradient is not None
                shard.gradient.mul_(factor)
        for group in self._shards.optimizer.param_groups:
            group["lr"] = learning_rate * group["rate_scale"]
        self._engine.step()

    def discard_gradients(self) -> None:
        """See Engine."""
        self._shards.clear_gradients()
        self._index = 0

    def refresh(self) -> None:
        """See Engine."""
        self._shards.refresh()

    @torch.no_grad()
    def evaluate(self, batch: ModelInput) -> tuple[Tensor, Tensor]:
        """See Engine."""
        self._engine.eval()
        self._nll.target_loss = cross_entropy
        return self._nll(*tensors_of(batch.to(self._device))), batch.loss_mask.sum().to(self._device)

    def model_health(self) -> dict[str, float]:
        """See Engine."""
        return {name: float(value) for name, value in self._nll.health.items()}

    def nll(self, batch: ModelInput, target_loss: TargetLoss = cross_entropy) -> Tensor:
        """See Engine."""
        self._engine.eval()
        self._nll.target_loss = target_loss
        return self._nll(*tensors_of(batch.to(self._device)))  # type: ignore[no-any-return]

    def save(self, folder: Path) -> None:
        """See Engine."""
        write_snapshot(folder, self._rank, *self.snapshot())

    def snapshot(self) -> tuple[dict[str, Tensor], str]:
        """See Engine. Where every rank holds everything, rank 0 alone gives something."""
        frozen = self._shards.frozen()
        is_writer = self._rank == 0 or self.num_shard_copies == 1
        return snapshot(self._state_slots() if is_writer else [], frozen if self._rank == 0 else {})

    def _state_slots(self) -> list[ShardSlot]:
        slots = self._shards.slots(False)
        return slots if self._owned is None else self._owned.state_slots(slots)

    def load(self, folder: Path) -> None:
        """See Engine."""
        frozen = self._shards.frozen()
        read_into(folder, self._state_slots(), frozen)
        self._shards.set_frozen(frozen)
        self.refresh()

    def state_dict(self) -> dict[str, Tensor]:
        """See Engine."""
        weights = gather_weights(self.param_shards(False), self.num_shard_copies)
        weights |= {name: value.cpu() for name, value in self._shards.frozen().items()}
        return {name: weights[name] for name in self._names}

    def load_weights(self, weights: Mapping[str, Any]) -> None:
        """See Engine."""
        frozen = self._shards.frozen()
        scatter_weights(self.param_shards(False), weights, frozen)
        self._shards.set_frozen(frozen)
        self.refresh()

    def close(self) -> None:
        """See Engine."""
        self._engine.destroy()
        _open_engines.discard(self)
        if not _open_engines:
            _restore_linear()


_open_engines: WeakSet[DeepSpeedEngine] = WeakSet()


def _restore_linear() -> None:
    """ZeRO-3 replaces torch's function for the rest of the process; its own is slower and keeps other tensors for the backward pass."""
    plain = getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", None)
    if plain is not None:
        torch.nn.functional.linear = plain


def _start_deepspeed(world: World) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 calls deprecated, once a bucket.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    world.join()
    # Otherwise the first start compiles a shared-memory all-reduce for minutes; gloo does without it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
