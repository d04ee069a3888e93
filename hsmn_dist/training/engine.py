"""Engine: what the training loop needs from DeepSpeed, and from its one-process twin.

Order inside a step: `begin_step`, `forward_backward` for each micro-batch, then penalties may edit `param_shards()[i].gradient`, then
`step`, then anything that edits `param_shards()[i].value` followed by `refresh`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from hsmn_dist.distributed.shards import ParamShard
from hsmn_dist.models.contract import LanguageModel, ModelInput, TargetLoss, cross_entropy
from hsmn_dist.training.stragglers import ForwardTimer


@dataclass
class StepStats:
    """What a step reports.

    `gradient_norm` is the global norm before clipping, penalty gradients included. When it is not finite, or the step was
    not accepted, nothing was updated and `was_skipped` is True. `nll` is the sum over ranks of what `step` was given.
    """

    gradient_norm: float
    learning_rate: float
    was_clipped: bool
    clip_factor: float = 1.0
    was_skipped: bool = False
    component_norms: dict[str, float] = field(default_factory=dict)
    nll: float = 0.0


Accepts = Callable[[float, float], bool]
"""(nll summed over ranks, global gradient norm) -> whether the update is made. Called on every rank with the same numbers."""


def always(nll: float, gradient_norm: float) -> bool:
    """Accept every step."""
    return True


class Engine(Protocol):
    """One rank's view of a model in training. Every method is collective: all ranks call it in the same order."""

    module: LanguageModel
    forward_timer: ForwardTimer
    num_shard_copies: int
    """How many ranks hold each shard: 1, or the number of ranks where nothing is sharded (ZeRO stage 0)."""

    def begin_step(self, num_micro_batches: int) -> None:
        """How many calls of `forward_backward` come before the next `step`, the same on every rank. Where it is not called: as
        many as the unpacked global batch has.
        """
        ...

    def forward_backward(
        self, batch: ModelInput, global_target_tokens: float, target_loss: TargetLoss = cross_entropy
    ) -> Tensor:
        """Backward of sum(nll) / global_target_tokens (over all ranks and micro-batches); returns this rank's sum(nll)."""
        ...

    def discard_gradients(self) -> None:
        """Forget the gradients of this accumulation window, in place of `step`."""
        ...

    def param_shards(self, with_gradients: bool = True) -> list[ParamShard]:
        """This rank's shards, in the model's parameter order; gradients only between the last backward and the step."""
        ...

    def step(self, learning_rate: float, nll: Tensor | None = None, accepts: Accepts = always) -> StepStats:
        """Clip, update, clear gradients. The host waits for the device once, for the norm and `nll` together.

        Args:
            learning_rate: of this step.
            nll: this rank's sum of losses, to be summed over ranks.
            accepts: asked before the update; where it says no or raises, weights and moments stay as they are.
        """
        ...

    def refresh(self) -> None:
        """Push edited shard values into the weights that forward reads."""
        ...

    def evaluate(self, batch: ModelInput) -> tuple[Tensor, Tensor]:
        """Without gradients, dropout off: (sum of nll, number of scored tokens) of this rank's batch."""
        ...

    def model_health(self) -> dict[str, float]:
        """Named scalars that the model gave with this rank's last micro-batch; not collective."""
        ...

    def nll(self, batch: ModelInput, target_loss: TargetLoss = cross_entropy) -> Tensor:
        """Sum of this rank's losses with its graph, dropout off. For `torch.autograd.grad` alone, which leaves what the
        engine accumulates untouched.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write this engine's state into `folder` (weights, optimizer); the caller writes the manifest."""
        ...

    def snapshot(self) -> tuple[dict[str, Tensor], str]:
        """What `save` would write, copied to the CPU, for `shard_files.write_snapshot` to write later."""
        ...

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, at any world size and ZeRO stage; bit for bit at the same ones."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Whole fp32 weights on every rank (gathered), by parameter name, on the CPU."""
        ...

    def load_weights(self, weights: Mapping[str, Any]) -> None:
        """Set the whole weights (fp32, by name) on every rank, master copies included."""
        ...

    def close(self) -> None:
        """Free what the engine holds; the process group stays."""
        ...
