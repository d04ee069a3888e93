"""LocalEngine: plain torch on one rank; the twin that DeepSpeedEngine is compared with.

In bf16 the model runs on bf16 copies and the optimizer on fp32 masters, as ZeRO does; gradients then accumulate in bf16.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hsmn_dist.config.optim import OptimConfig
from hsmn_dist.config.training import TrainingConfig
from hsmn_dist.distributed.shards import ParamShard
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import ConfigError
from hsmn_dist.foundation.param_role import ParamUpdate
from hsmn_dist.models.contract import LanguageModel, ModelInput, TargetLoss, cross_entropy
from hsmn_dist.optim.build import build_optimizer
from hsmn_dist.training.engine import Accepts, StepStats, always
from hsmn_dist.training.gradient_norms import gradient_norms
from hsmn_dist.training.losses import NllModule, tensors_of
from hsmn_dist.training.shard_files import ShardSlot, read_into, snapshot, write_snapshot
from hsmn_dist.training.stragglers import ForwardTimer
from hsmn_dist.training.whole_weights import gather_weights, scatter_weights


class LocalEngine:
    """See `Engine`. One rank; the number of micro-batches in a step is free."""

    num_shard_copies = 1

    def __init__(
        self,
        training: TrainingConfig,
        optim: OptimConfig,
        model: LanguageModel,
        world: World,
        updates: Mapping[str, ParamUpdate],
    ) -> None:
        if world.world_size != 1:
            raise ConfigError(
                f"training.engine 'local' on {world.world_size} ranks",
                allowed="one rank",
                action="set training.engine to deepspeed, or cluster.ranks_per_node to 1",
            )
        roles, self._components = model.parameter_roles(), model.parameter_components()
        self._max_norm = training.max_gradient_norm
        self._device = world.device
        self.forward_timer = ForwardTimer(world.device)
        self.module = model.to(world.device)
        masters = {name: p for name, p in model.named_parameters()}
        self._trainable = [name for name, p in masters.items() if p.requires_grad]
        if training.precision == "bf16":
            fp32 = {name: nn.Parameter(p.detach().float().clone(), p.requires_grad) for name, p in masters.items()}
            model.to(torch.bfloat16)
            self._masters = fp32
        else:
            self._masters = masters
        self._weights = dict(model.named_parameters())
        self._nll = NllModule(model)
        if training.compiles_model:
            self._nll.compile(dynamic=True)
        self._optimizer = build_optimizer(optim, self._masters.items(), roles, updates)
        self._has_gradients = False
        self._roles = roles

    def begin_step(self, num_micro_batches: int) -> None:
        """See Engine. Gradients add up here however many micro-batches come."""

    def forward_backward(
        self, batch: ModelInput, global_target_tokens: float, target_loss: TargetLoss = cross_entropy
    ) -> Tensor:
        """See Engine."""
        self.module.train()
        self._nll.target_loss = target_loss
        with self.forward_timer:
            nll = self._nll(*tensors_of(batch.to(self._device)))
        (nll / global_target_tokens).backward()
        self._has_gradients = True
        return nll.detach()  # type: ignore[no-any-return]

    def param_shards(self, with_gradients: bool = True) -> list[ParamShard]:
        """See Engine. Every parameter whole."""
        return [slot.shard for slot in self._slots(with_gradients)]

    def step(self, learning_rate: float, nll: Tensor | None = None, accepts: Accepts = always) -> StepStats:
        """See Engine."""
        shards = self.param_shards()
        norms = gradient_norms(shards, sorted(set(self._components.values())), self.num_shard_copies, nll)
        factor = norms.clip_factor(self._max_norm)
        is_accepted = accepts(norms.nll, norms.total) and norms.is_finite
        if is_accepted:
            for name in self._trainable:
                master, weight = self._masters[name], self._weights[name]
                assert weight.grad is not None
                if master is not weight:
                    master.grad = weight.grad.float()
                if factor < 1.0:
                    assert master.grad is not None
                    master.grad.mul_(factor)
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate * group["rate_scale"]
            self._optimizer.step()
            self.refresh()
        self.discard_gradients()
        return StepStats(
            norms.total, learning_rate, factor < 1.0, factor, not is_accepted, norms.by_component, norms.nll
        )

    def discard_gradients(self) -> None:
        """See Engine."""
        for name in self._trainable:
            self._masters[name].grad = None
            self._weights[name].grad = None
        self._has_gradients = False

    @torch.no_grad()
    def refresh(self) -> None:
        """See Engine. In fp32 the masters are the weights, so there is nothing to do."""
        for name, weight in self._weights.items():
            if self._masters[name] is not weight:
                weight.copy_(self._masters[name])

    @torch.no_grad()
    def evaluate(self, batch: ModelInput) -> tuple[Tensor, Tensor]:
        """See Engine."""
        self.module.eval()
        self._nll.target_loss = cross_entropy
        return self._nll(*tensors_of(batch.to(self._device))), batch.loss_mask.sum()

    def model_health(self) -> dict[str, float]:
        """See Engine."""
        return {name: float(value) for name, value in self._nll.health.items()}

    def nll(self, batch: ModelInput, target_loss: TargetLoss = cross_entropy) -> Tensor:
        """See Engine."""
        self.module.eval()
        self._nll.target_loss = target_loss
        return self._nll(*tensors_of(batch.to(self._device)))  # type: ignore[no-any-return]

    def save(self, folder: Path) -> None:
        """See Engine."""
        write_snapshot(folder, 0, *self.snapshot())

    def snapshot(self) -> tuple[dict[str, Tensor], str]:
        """See Engine."""
        return snapshot(self._slots(False), self._frozen())

    def load(self, folder: Path) -> None:
        """See Engine."""
        read_into(folder, self._slots(False), self._frozen())
        self.refresh()

    def state_dict(self) -> dict[str, Tensor]:
        """See Engine."""
        weights = gather_weights(self.param_shards(False), self.num_shard_copies)
        weights |= {name: p.float().cpu().clone() for name, p in self._frozen().items()}
        return {name: weights[name] for name in self._masters}

    def load_weights(self, weights: Mapping[str, Any]) -> None:
        """See Engine."""
        scatter_weights(self.param_shards(False), weights, self._frozen())
        self.refresh()

    def close(self) -> None:
        """See Engine."""
        self.discard_gradients()
        self._optimizer.state.clear()

    def _frozen(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._masters.items() if not p.requires_grad}

    def _slots(self, with_gradients: bool) -> list[ShardSlot]:
        slots = []
        for name in self._trainable:
            master, weight = self._masters[name], self._weights[name]
            gradient = None
            if with_gradients and self._has_gradients:
                if weight.grad is None:  # a parameter that no micro-batch used
                    weight.grad = torch.zeros_like(weight)
                gradient = weight.grad.view(-1)
            shard = ParamShard(
                name=name,
                role=self._roles[name],
                component=self._components[name],
                shape=tuple(master.shape),
                start=0,
                stop=master.numel(),
                value=master.detach().view(-1),
                gradient=gradient,
            )
            slots.append(ShardSlot(shard, master, 0, self._optimizer.state))
        return slots
