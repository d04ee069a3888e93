"""ParamShards out of a ZeRO engine, stages 0 to 3; everything that knows where DeepSpeed keeps things is here.

Read in DeepSpeed 0.19.8 and held by tests against plain torch:

stage   fp32 value                                  gradient between last backward and step       weights that forward reads
0       the parameter itself                        the parameter's grad, already averaged        the same
1, 2    `_hp_mapping.hp_fragment` (own copy)        `averaged_gradients[group][index]`            flat buffer, all-gathered
3       part of `fp32_partitioned_groups_flat`      `averaged_gradients[group][index]`            partition, gathered on use

With optimizer offload the gradient is part of the flat fp32 gradient in host memory instead. Unusual: DeepSpeed's norm
functions are replaced by ours on the instance, because with offload they are fed before penalties can be added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from hsmn_dist.distributed.shards import ParamShard
from hsmn_dist.foundation.errors import ConfigError
from hsmn_dist.foundation.param_role import ParamRole
from hsmn_dist.training.shard_files import ShardSlot

KNOWN_VERSION = "0.19"


@dataclass(frozen=True)
class ModelFacts:
    """What the model says about its parameters, taken before DeepSpeed touches them."""

    parameters: Mapping[str, nn.Parameter]
    shapes: Mapping[str, tuple[int, ...]]
    roles: Mapping[str, ParamRole]
    components: Mapping[str, str]

    @property
    def trainable(self) -> list[str]:
        """Names of the parameters that the optimizer holds, in model order."""
        return [name for name, parameter in self.parameters.items() if parameter.requires_grad]


class ZeroShards:
    """This rank's view of a DeepSpeed engine's flat state."""

    def __init__(self, engine: Any, facts: ModelFacts, stage: int) -> None:
        self._engine = engine
        self._facts = facts
        self._stage = stage
        self._zero = engine.optimizer
        self._uses_offload = bool(
            getattr(self._zero, "cpu_offload", False) or getattr(self._zero, "offload_optimizer", False)
        )
        self._check()
        self._places = {name: self._place(name) for name in facts.trainable}

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that was passed in; under ZeRO it holds flat fp32 tensors."""
        return self._engine.optimizer if self._stage == 0 else self._zero.optimizer  # type: ignore[no-any-return]

    def slots(self, with_gradients: bool) -> list[ShardSlot]:
        """Shards in model order; parameters of which this rank owns nothing have an empty one."""
        slots = []
        for name, place in self._places.items():
            shard = ParamShard(
                name=name,
                role=self._facts.roles[name],
                component=self._facts.components[name],
                shape=self._facts.shapes[name],
                start=place.start,
                stop=place.start + place.num_elements,
                value=place.flat.detach().view(-1).narrow(0, place.offset, place.num_elements),
                gradient=self._gradient(name, place) if with_gradients else None,
            )
            slots.append(ShardSlot(shard, place.flat, place.offset, self.optimizer.state))
        return slots

    def set_norm(self, norm: float) -> None:
        """Hand DeepSpeed the norm that it clips by in the coming step; a norm that is not finite makes it skip the step."""
        value = torch.tensor(norm, dtype=torch.float32, device=self._engine.device)
        if self._stage == 3:
            self._zero._get_norm_groups = lambda: [value]
        elif self._stage:
            self._zero.scaled_global_norm = lambda norm_type=2: value.to(self._zero.device)

    def clear_gradients(self) -> None:
        """Forget accumulated gradients, also those that DeepSpeed keeps.

        Stage 3 does not clear its buffers between steps: a parameter that took part in no micro-batch would meet its
        gradient of an earlier step.
        """
        if self._stage == 0:
            self._engine.zero_grad()
            return
        self._zero.zero_grad(set_to_none=True)
        if self._stage == 3:
            self._zero.averaged_gradients = {}
            self._zero.grad_partitions_flat_buffer.zero_()
        else:
            for key in list(self._zero.averaged_gradients):
                self._zero.averaged_gradients[key] = None
                self._zero.all_grad_tensors[key] = None
        if self._uses_offload:
            self._zero.reset_cpu_buffers()
            for place in self._places.values():
                if place.flat.grad is not None:
                    place.flat.grad.zero_()

    @torch.no_grad()
    def refresh(self) -> None:
        """Push fp32 values into the weights that forward reads, as the optimizer step does. Collective for stages 1 to 3."""
        if self._stage in (1, 2):
            self._zero.update_lp_params()
        elif self._stage == 3:
            self._zero._partition_all_parameters()
            for index in range(len(self._zero.fp16_groups)):
                self._zero._reassign_or_swap_out_partitioned_parameters(index)
            if self._zero.persistent_parameters:
                self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def frozen(self) -> dict[str, Tensor]:
        """Copies of the parameters that are not trained, whole. Collective at stage 3."""
        names = [name for name, parameter in self._facts.parameters.items() if not parameter.requires_grad]
        with self._gathered(names, modifier_rank=None):
            return {name: self._facts.parameters[name].detach().float().clone() for name in names}

    @torch.no_grad()
    def set_frozen(self, weights: Mapping[str, Tensor]) -> None:
        """Set parameters that are not trained; every rank passes the same values. Collective at stage 3."""
        with self._gathered(list(weights), modifier_rank=0):
            for name, value in weights.items():
                self._facts.parameters[name].copy_(value)

    def _gathered(self, names: Sequence[str], modifier_rank: int | None) -> Any:
        parameters = [self._facts.parameters[name] for name in names]
        enabled = self._stage == 3 and bool(parameters)
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank, enabled=enabled)

    def _check(self) -> None:
        needed = {
            0: (),
            1: ("update_lp_params", "scaled_global_norm", "averaged_gradients"),
            2: ("update_lp_params", "scaled_global_norm", "averaged_gradients"),
            3: ("_get_norm_groups", "averaged_gradients", "grad_partitions_flat_buffer", "persistent_parameters"),
        }[self._stage]
        missing = [name for name in needed if not hasattr(self._zero, name)]
        if missing:
            raise ConfigError(
                f"deepspeed {deepspeed.__version__} keeps its ZeRO-{self._stage} shards elsewhere (no {missing} in "
                f"{type(self._zero).__name__})",
                allowed=f"deepspeed {KNOWN_VERSION}.x, which the shard code was read from",
                action="pip install -c constraints.txt deepspeed",
            )
        if getattr(self._zero, "swap_optimizer", False) and getattr(self._zero, "optimizer_swapper", None) is not None:
            raise ConfigError(
                "training.offload.optimizer is nvme, where the fp32 shards are on disk between steps",
                allowed="offload of the optimizer to cpu",
                action="set training.offload.optimizer to cpu",
            )

    def _place(self, name: str) -> _Place:
        parameter = self._facts.parameters[name]
        if self._stage == 0:
            return _Place(parameter, 0, 0, parameter.numel(), 0, 0)
        if self._stage == 3:
            return self._place_of_stage_3(name, parameter)
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:  # this rank owns nothing of it
            groups = self._zero.bit16_groups
            group = next(i for i, members in enumerate(groups) if any(p is parameter for p in members))
            return _Place(self._zero.single_partition_of_fp32_groups[group], 0, 0, 0, group, -1)
        where, source = mapping.hp_fragment_address, mapping.lp_fragment_address
        group = mapping.param_group_index
        flat = self._zero.single_partition_of_fp32_groups[group]
        return _Place(flat, where.start, source.start, where.numel, group, parameter._index_in_param_group)  # type: ignore[attr-defined]

    def _place_of_stage_3(self, name: str, parameter: nn.Parameter) -> _Place:
        group, offset, num_padded = self._zero.grad_position[self._zero.get_param_id(parameter)]
        num_elements = torch.Size(self._facts.shapes[name]).numel()
        start = min(num_padded * torch.distributed.get_rank(), num_elements)
        index = [id(p) for p in self._zero.fp16_groups[group]].index(id(parameter))
        flat = self._zero.fp32_partitioned_groups_flat[group]
        return _Place(flat, offset, start, max(0, min(num_padded, num_elements - start)), group, index)

    def _gradient(self, name: str, place: _Place) -> Tensor | None:
        if self._stage == 0:
            gradient = self._facts.parameters[name].grad
            return None if gradient is None else gradient.view(-1)
        if place.num_elements == 0:
            return place.flat.new_zeros(0).detach()
        if self._uses_offload:
            assert place.flat.grad is not None
            return place.flat.grad.view(-1).narrow(0, place.offset, place.num_elements)
        fragment = self._zero.averaged_gradients[place.group][place.index].view(-1)
        return fragment.narrow(0, 0, place.num_elements)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Place:
    """Where a parameter's shard is: `num_elements` from `offset` of `flat`, from element `start` of the parameter."""

    flat: Tensor
    offset: int
    start: int
    num_elements: int
    group: int
    index: int
