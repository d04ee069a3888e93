"""Elastic weight consolidation on parameter shards: all tasks in two buffers, value, gradient and proximal step.

A sum of quadratics is a quadratic, so the penalties of any number of tasks are kept exactly in a precision A, a centre mu and
a scalar R per parameter. Nothing here communicates: each rank works on the flat ranges that it owns, wherever they live.
The residual R is kept per parameter (not for the whole model) so that each component may have its own strength.

Sources: Kirkpatrick et al. 2017, arXiv 1612.00796, eq. 3 (one penalty a task, summed); Schwarz et al. 2018,
arXiv 1805.06370, section 3.2 (online EWC); the proximal step is the closed minimiser of
lambda/2 * A * (theta - mu)^2 + (theta - theta')^2 / (2 * rate).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from hsmn_dist.distributed.shards import ParamShard
from hsmn_dist.foundation.errors import CheckpointError, ConfigError
from hsmn_dist.foundation.files import sha256_of_json

Application = Literal["coupled", "proximal"]


def merge_task(
    precision: Tensor, centre: Tensor, fisher: Tensor, anchor: Tensor, decay: float = 1.0
) -> tuple[Tensor, Tensor, float]:
    """Add one task's quadratic F * (theta - anchor)^2 to the quadratic that `precision` and `centre` hold.

    The arithmetic is done in float64 and rounded once to the type of `precision`.

    Args:
        precision: A, the sum of the Fishers so far, [n].
        centre: mu, [n].
        fisher: F of the new task, [n], at least 0.
        anchor: theta* of the new task, [n].
        decay: 1 keeps every task exactly; below 1 it is online EWC: A <- decay * A + F and mu <- anchor.

    Returns:
        New A, new mu, and what R grows by: sum of A * F / (A + F) * (mu - anchor)^2 (0 under online EWC).
    """
    if decay < 1.0:
        return (precision.double() * decay + fisher.double()).to(precision.dtype), anchor.to(centre.dtype).clone(), 0.0
    old, new = precision.double(), fisher.double()
    total = old + new
    share = torch.where(
        total > 0, new / total, torch.ones_like(total)
    )  # where nothing matters the centre is the anchor
    gap = anchor.double() - centre.double()
    residual = float((old * share * gap * gap).sum())
    merged = torch.lerp(centre.double(), anchor.double(), share)
    return total.to(precision.dtype), merged.to(centre.dtype), residual


def proximal_step(value: Tensor, precision: Tensor, centre: Tensor, rate_times_strength: float) -> None:
    """Edit `value` in place: (theta + c * mu) / (1 + c) with c = rate * lambda * A; finite for every c in [0, inf]."""
    # 1 / (1 + 1/c) instead of c / (1 + c): the latter is inf/inf where lambda * A overflows.
    share = precision.mul(rate_times_strength).reciprocal_().add_(1.0).reciprocal_()
    value.lerp_(centre.to(value.dtype), share.to(value.dtype))


@dataclass(frozen=True)
class TaskRecord:
    """How one task's importance was measured; stored beside the numbers.

    Attributes:
        stage: name of the curriculum stage.
        method: "ewc" or "l2".
        estimator: the Fisher estimator's name; "ones" for l2.
        num_examples: examples behind the Fisher.
        seed: seed of sampled labels, signs and the choice of examples.
        example_reduction: "mean" or "sum" over an example's target tokens.
        num_groups: groups of the `_sum` estimators and of `microbatch`; 0 for the per-example ones.
        relative_error: expected entrywise relative error of the estimate.
    """

    stage: str
    method: str = "ewc"
    estimator: str = "empirical"
    num_examples: int = 0
    seed: int = 0
    example_reduction: str = "mean"
    num_groups: int = 0
    relative_error: float = 0.0


@dataclass
class ShardMemory:
    """What earlier tasks ask of one flat range [start, stop) of one parameter.

    Attributes:
        name, shape, start, stop: as in `ParamShard`.
        precision: A, [stop - start].
        centre: mu, [stop - start].
        residual: this range's part of R.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    precision: Tensor
    centre: Tensor
    residual: float = 0.0


def model_digest(shapes: Mapping[str, Sequence[int]]) -> str:
    """Hash of parameter names and shapes: equal for two models that can share a Fisher."""
    return sha256_of_json({name: list(shape) for name, shape in shapes.items()})


def mismatch_error(
    where: str, stored: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]
) -> CheckpointError:
    """The error that lists how two sets of names and shapes differ."""
    lines = [
        f"{name} {list(stored[name])} is stored, and the model has no such parameter"
        for name in stored
        if name not in wanted
    ]
    lines += [f"{name} {list(wanted[name])} has no stored Fisher and anchor" for name in wanted if name not in stored]
    lines += [
        f"{name} is {list(wanted[name])} in the model and {list(stored[name])} in the store"
        for name in wanted
        if name in stored and tuple(stored[name]) != tuple(wanted[name])
    ]
    shown = "; ".join(lines[:12]) + (f"; and {len(lines) - 12} more" if len(lines) > 12 else "")
    return CheckpointError(
        f"{where}: the parameters differ: {shown}",
        allowed="the same parameter names and shapes as the model in training",
        action="use the store of this model, or train without it (continual.method: none)",
    )


@dataclass
class EwcMemory:
    """All earlier tasks, for the ranges that this rank owns.

    Attributes:
        shards: one entry for each `ParamShard` of this rank, same order and ranges.
        tasks: how each merged task was measured, in order.
    """

    shards: list[ShardMemory]
    tasks: list[TaskRecord] = field(default_factory=list)

    @classmethod
    def empty(cls, shards: Sequence[ParamShard]) -> EwcMemory:
        """A = 0, mu = 0, R = 0 beside each shard, on its device."""
        return cls(
            [
                ShardMemory(s.name, s.shape, s.start, s.stop, torch.zeros_like(s.value), torch.zeros_like(s.value))
                for s in shards
            ]
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of both buffers on this rank; does not depend on the number of tasks."""
        return sum(2 * s.precision.numel() * s.precision.element_size() for s in self.shards)

    def add_task(
        self, shards: Sequence[ParamShard], fisher: Sequence[Tensor], record: TaskRecord, online_decay: float = 1.0
    ) -> None:
        """Merge a task whose weights are the present `shards` and whose Fisher is `fisher` (one [n] per shard).

        Raises:
            CheckpointError: NaN, infinite or negative Fisher entries, non-finite weights, other shapes, or an estimator
                other than the one that the stored tasks were measured with.
        """
        self.check_record(record)
        check_matches(self, shards)
        check_fisher(shards, fisher)
        for memory, shard, importance in zip(self.shards, shards, fisher, strict=True):
            memory.precision, memory.centre, grown = merge_task(
                memory.precision, memory.centre, importance.to(shard.value.device), shard.value, online_decay
            )
            memory.residual = memory.residual + grown if online_decay == 1.0 else 0.0
        self.tasks.append(record)

    def replace_by_l2(self, shards: Sequence[ParamShard], stage: str) -> None:
        """The `l2` method: A = 1 and mu = the present weights, whatever came before."""
        record = TaskRecord(stage, method="l2", estimator="ones")
        self.check_record(record)
        check_matches(self, shards)
        for memory, shard in zip(self.shards, shards, strict=True):
            memory.precision, memory.centre = torch.ones_like(shard.value), shard.value.detach().clone()
            memory.residual = 0.0
        self.tasks.append(record)

    def check_record(self, record: TaskRecord) -> None:
        """Refuse to mix estimators: their scales differ, so one lambda would mean two things."""
        for earlier in self.tasks:
            for what in ("method", "estimator", "example_reduction"):
                if getattr(earlier, what) != getattr(record, what):
                    raise CheckpointError(
                        f"stage {record.stage!r}: {what} {getattr(record, what)!r}, "
                        f"but stage {earlier.stage!r} in the store used {getattr(earlier, what)!r}",
                        allowed=f"the same {what} for every stage of a run",
                        action=f"set continual back to {what} {getattr(earlier, what)!r}, or start a new run",
                    )

    def records(self) -> list[dict[str, Any]]:
        """The task records as JSON values."""
        return [asdict(task) for task in self.tasks]


def check_matches(memory: EwcMemory, shards: Sequence[ParamShard]) -> None:
    """Refuse shards that are not those the memory was made for."""
    stored = {m.name: m.shape for m in memory.shards}
    wanted = {s.name: s.shape for s in shards}
    if stored != wanted:
        raise mismatch_error("EWC memory", stored, wanted)
    for kept, shard in zip(memory.shards, shards, strict=True):
        if (kept.name, kept.start, kept.stop) != (shard.name, shard.start, shard.stop):
            raise CheckpointError(
                f"EWC memory: {kept.name} [{kept.start}, {kept.stop}) beside {shard.name} [{shard.start}, {shard.stop})",
                allowed="the flat ranges that this rank owns, in the model's parameter order",
                action="load the store again for this world size and ZeRO stage",
            )


def check_fisher(shards: Sequence[ParamShard], fisher: Sequence[Tensor]) -> None:
    """Refuse a Fisher or weights that would poison every later step."""
    if len(fisher) != len(shards):
        raise CheckpointError(
            f"a Fisher of {len(fisher)} shards for a model of {len(shards)}",
            allowed="one Fisher tensor for each shard",
            action="take the Fisher of this model",
        )
    for shard, importance in zip(shards, fisher, strict=True):
        if importance.shape != shard.value.shape:
            raise mismatch_error("Fisher", {shard.name: importance.shape}, {shard.name: shard.value.shape})
        if importance.numel() == 0:
            continue
        for what, tensor, allowed in (
            ("Fisher", importance, "finite values of 0 and above"),
            ("anchor", shard.value, "finite weights"),
        ):
            low, high = (float(x) for x in torch.aminmax(tensor))
            if not (math.isfinite(low) and math.isfinite(high)) or (what == "Fisher" and low < 0):
                raise CheckpointError(
                    f"{what} of {shard.name} [{shard.start}, {shard.stop}): values from {low} to {high}",
                    allowed=allowed,
                    action="look at the stage's losses: a stage that diverged has no usable Fisher; lower its learning rate",
                )


class EwcPenalty:
    """P(theta) = sum over components c of lambda_c / 2 * (sum A * (theta - mu)^2 + R), applied to shards.

    `coupled` adds the gradient lambda * A * (theta - mu) before clipping; `proximal` pulls the weights after the optimizer
    step. A strength of 0 leaves every bit as it was.
    """

    def __init__(
        self,
        memory: EwcMemory,
        strength: float,
        application: Application = "coupled",
        component_strength: Mapping[str, float] | None = None,
        num_copies: int = 1,
    ) -> None:
        """`num_copies` is how many ranks hold each element (world size under ZeRO stage 0, else 1); values are divided by it.

        Raises:
            ConfigError: a strength or factor below 0, or not finite.
        """
        factors = dict(component_strength or {})
        for name, value in {"strength": strength, **{f"component_strength.{k}": v for k, v in factors.items()}}.items():
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(
                    f"continual.{name}: {value}",
                    allowed="a finite number of 0 and above",
                    action="change it in the run's YAML",
                )
        self.memory = memory
        self.strength = strength
        self.application = application
        self.component_strength = factors
        self.num_copies = num_copies

    def strength_of(self, shard: ParamShard) -> float:
        """Lambda of the component that a shard belongs to."""
        return self.strength * self.component_strength.get(shard.component, 1.0)

    def _active(self, shards: Sequence[ParamShard]) -> list[tuple[ParamShard, ShardMemory, float]]:
        if self.strength == 0 or not self.memory.tasks:
            return []
        if len(shards) != len(self.memory.shards):
            check_matches(self.memory, shards)
        active = []
        for shard, memory in zip(shards, self.memory.shards, strict=True):
            if (shard.name, shard.start, shard.stop) != (memory.name, memory.start, memory.stop):
                check_matches(self.memory, shards)
            factor = self.strength_of(shard)
            if factor > 0 and shard.stop > shard.start:
                active.append((shard, memory, factor))
        return active

    @torch.no_grad()
    def add_gradients(self, shards: Sequence[ParamShard]) -> None:
        """Coupled: add lambda * A * (theta - mu) to each shard's accumulated gradient. Proximal: nothing."""
        if self.application != "coupled":
            return
        for shard, memory, factor in self._active(shards):
            if shard.gradient is not None:
                pull = (shard.value - memory.centre).mul_(memory.precision)
                shard.gradient.add_(pull.to(shard.gradient.dtype), alpha=factor)

    @torch.no_grad()
    def after_step(self, shards: Sequence[ParamShard], learning_rate: float) -> bool:
        """Proximal: pull the weights towards mu; True when values were edited, so that the engine must refresh."""
        if self.application != "proximal" or learning_rate == 0:
            return False
        active = self._active(shards)
        for shard, memory, factor in active:
            proximal_step(shard.value, memory.precision, memory.centre, learning_rate * factor)
        return bool(active)

    @torch.no_grad()
    def local_value(self, shards: Sequence[ParamShard]) -> Tensor:
        """This rank's part of P, a float64 scalar; the sum over all ranks is P. No communication."""
        device = shards[0].value.device if shards else torch.device("cpu")
        total = torch.zeros((), dtype=torch.float64, device=device)
        for shard, memory, factor in self._active(shards):
            gap = shard.value - memory.centre
            quadratic = (gap * gap * memory.precision).sum(dtype=torch.float64)
            total += 0.5 * factor * (quadratic + memory.residual)
        return total / self.num_copies
