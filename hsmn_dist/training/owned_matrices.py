"""Matrix rules (Muon, M3, deep momentum) under ZeRO 1 to 3, where the optimizer is handed flat pieces.

The optimizer that DeepSpeed holds: for a flat tensor of elementwise parameters it runs their rule on the flat tensor; for one of
matrices it brings gradients and fp32 values to each matrix's owner rank, lets the rule that plain torch would use update the whole
matrix there, and sends the values back. Unusual: the rules' own classes are used unchanged, and a matrix's momentum lives on its
owner alone. Costs three times the matrices' bytes in communication a step. No offload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hsmn_dist.distributed.matrix_owner import MatrixExchange
from hsmn_dist.distributed.shards import ParamShard
from hsmn_dist.foundation.errors import ConfigError
from hsmn_dist.foundation.param_role import ParamRole
from hsmn_dist.training.shard_files import ShardSlot

MakeOptimizer = Callable[[Sequence[tuple[str, nn.Parameter]], Mapping[str, ParamRole]], torch.optim.Optimizer]


class OwnedMatrixOptimizer(torch.optim.Optimizer):
    """Give it to `deepspeed.initialize`, then call `attach` with the shards."""

    def __init__(self, groups: Iterable[dict[str, Any]], make: MakeOptimizer, matrix_names: frozenset[str]) -> None:
        """Prepare.

        Args:
            groups: parameter groups of the plain optimizer; DeepSpeed puts its flat tensors into them.
            make: the plain optimizer over given parameters, as `optim.build.build_optimizer` makes it.
            matrix_names: parameters that the matrix rule updates.
        """
        super().__init__([dict(group) for group in groups], {})
        self._make = make
        self._matrix_names = matrix_names
        self._flat_rule: torch.optim.Optimizer | None = None
        self._matrix_rule: torch.optim.Optimizer | None = None
        self._exchanges: dict[int, MatrixExchange] = {}
        self._slots: dict[int, list[ShardSlot]] = {}
        self._owned: dict[tuple[int, int], nn.Parameter] = {}

    def attach(self, slots: Sequence[ShardSlot]) -> None:
        """Learn where every parameter's piece is. Collective; `slots` name the same parameters on all ranks.

        Raises:
            ConfigError: a flat tensor mixes both kinds of parameters, or a matrix is missing.
        """
        by_flat: dict[int, list[ShardSlot]] = {}
        for slot in slots:
            by_flat.setdefault(id(slot.flat), []).append(slot)
        flats, owned = [], []
        for key, members in by_flat.items():
            kinds = {slot.shard.name in self._matrix_names for slot in members}
            if kinds == {False}:
                flats.append(members[0])
                continue
            if kinds == {True, False}:
                raise self._misplaced([slot.shard.name for slot in members])
            ranges = [(slot.shard.start, slot.shard.stop) for slot in members]
            exchange = MatrixExchange([slot.shard.shape for slot in members], ranges)
            self._exchanges[key], self._slots[key] = exchange, members
            for index in exchange.owned:
                shard = members[index].shard
                self._owned[key, index] = nn.Parameter(shard.value.new_zeros(shard.shape))
                owned.append((shard.name, self._owned[key, index]))
        found = {slot.shard.name for members in self._slots.values() for slot in members}
        if found != self._matrix_names:
            raise self._misplaced(sorted(found ^ self._matrix_names))
        if owned:
            self._matrix_rule = self._make(owned, {name: ParamRole.MATRIX for name, _ in owned})
        if flats:
            named = [(f"flat_{index}", slot.flat) for index, slot in enumerate(flats)]
            # Decay or not is all that the rules of flat tensors differ in.
            roles = {
                f"flat_{index}": ParamRole.VECTOR if slot.shard.role is ParamRole.VECTOR else ParamRole.EMBEDDING
                for index, slot in enumerate(flats)
            }
            self._flat_rule = self._make(named, roles)  # type: ignore[arg-type]

    def state_slots(self, slots: Sequence[ShardSlot]) -> list[ShardSlot]:
        """What to save and load: every value by piece, elementwise state by piece, matrix state whole from its owner."""
        found = []
        for slot in slots:
            is_matrix = slot.shard.name in self._matrix_names
            states = {} if is_matrix or self._flat_rule is None else self._flat_rule.state
            found.append(ShardSlot(slot.shard, slot.flat, slot.offset, states, holds_state=not is_matrix))
        for (key, index), parameter in self._owned.items():
            shard = self._slots[key][index].shard
            whole = ParamShard(
                shard.name, shard.role, shard.component, shard.shape, 0, parameter.numel(), parameter.detach().view(-1)
            )
            assert self._matrix_rule is not None
            found.append(ShardSlot(whole, parameter, 0, self._matrix_rule.state, holds_value=False))
        return found

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of the flat tensors that DeepSpeed has put into the groups. Collective."""
        assert closure is None, "DeepSpeed passes no closure"
        for group in self.param_groups:
            for flat in group["params"]:
                if id(flat) in self._exchanges:
                    self._step_matrices(flat, group["lr"])
                elif self._flat_rule is not None:
                    _step(self._flat_rule, group["lr"])

    def _step_matrices(self, flat: Tensor, rate: float) -> None:
        key = id(flat)
        exchange, slots = self._exchanges[key], self._slots[key]
        assert flat.grad is not None
        gradients = exchange.gather([slot.cut(flat.grad) for slot in slots])
        values = exchange.gather([slot.cut(flat.detach()) for slot in slots])
        for index in exchange.owned:
            parameter = self._owned[key, index]
            parameter.copy_(values[index])
            parameter.grad = gradients[index]
        if self._matrix_rule is not None:
            _step(self._matrix_rule, rate)
        results = {index: self._owned[key, index].detach() for index in exchange.owned}
        for slot, piece in zip(slots, exchange.scatter(results, flat.detach()), strict=True):
            slot.cut(flat.detach()).copy_(piece)
        for index in exchange.owned:
            self._owned[key, index].grad = None

    @staticmethod
    def _misplaced(names: list[str]) -> ConfigError:
        return ConfigError(
            f"matrices and other parameters are not apart in DeepSpeed's groups: {names[:5]}",
            allowed="every hidden matrix in a group of rule 'matrix'",
            action="report this: the optimizer's groups and DeepSpeed's flat tensors disagree",
        )


def _step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
