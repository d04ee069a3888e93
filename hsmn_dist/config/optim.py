"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from hsmn_dist.config.section import Section


class ScheduleConfig(Section):
    """Learning rate as a function of the optimizer step inside a stage."""

    kind: Literal["constant", "linear", "cosine"] = Field("cosine", description="Shape after warm-up.")
    warmup_steps: int = Field(10, ge=0, description="Steps of linear warm-up from 0.")
    final_fraction: float = Field(
        0.1, ge=0.0, le=1.0, description="Rate at the stage's last step as a share of the peak rate."
    )


class AdamConfig(Section):
    """Adam, or AdamW when weight_decay is above 0 (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

    kind: Literal["adam"] = "adam"
    learning_rate: float = Field(5e-5, gt=0, description="Peak rate; 5e-5 is the original's.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the second moment.")
    eps: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")


class _MatrixRuleConfig(Section):
    """What the matrix rules share: parameters that are not hidden matrices fall to AdamW with these moments."""

    learning_rate: float = Field(1e-3, gt=0, description="Peak rate, for matrices and for the AdamW part alike.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW part: decay of the first moment.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW part: decay of the second moment.")
    eps: float = Field(1e-8, gt=0, description="AdamW part: added to the root of the second moment.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay.")


class MuonConfig(_MatrixRuleConfig):
    """torch.optim.Muon with steps as large as AdamW's (arXiv 2502.16982). On ZeRO stages 1 to 3 each matrix has an owner rank."""

    kind: Literal["muon"] = "muon"
    momentum: float = Field(0.95, ge=0, lt=1, description="Decay of the momentum.")
    uses_nesterov: bool = Field(True, description="Nesterov form of the momentum.")
    num_newton_schulz_steps: int = Field(5, ge=1, description="Iterations of the orthogonalisation.")


class M3Config(_MatrixRuleConfig):
    """Multi-scale momentum Muon (arXiv 2512.24695, Algorithm 1). On ZeRO stages 1 to 3 each matrix has an owner rank."""

    kind: Literal["m3"] = "m3"
    mode: Literal["normalised", "paper"] = Field(
        "normalised", description="paper is the letter of Algorithm 1, whose step depends on 1 / |gradient|."
    )
    fast_momentum: float = Field(0.95, ge=0, lt=1, description="Decay of the momentum of every step.")
    slow_momentum: float = Field(0.9, ge=0, lt=1, description="Decay of the momentum of every window.")
    second_moment: float = Field(0.05, gt=0, description="paper: weight of a squared gradient in V.")
    slow_every_steps: int = Field(10, ge=1, description="Optimizer steps in a window.")
    slow_weight: float = Field(0.5, ge=0, description="Weight of the slow direction.")
    num_newton_schulz_steps: int = Field(5, ge=1, description="Iterations of the orthogonalisation.")


class DeepMomentumConfig(_MatrixRuleConfig):
    """Momenta as memories (arXiv 2512.24695, equations 47 to 50). On ZeRO stages 1 to 3 each matrix has an owner rank."""

    kind: Literal["deep_momentum"] = "deep_momentum"
    variant: Literal["preconditioned", "delta", "dmgd"] = Field("delta", description="Which memory the momentum is.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Retention of the memory.")
    preconditioner: Literal["adam", "identity"] = Field("adam", description="preconditioned, delta: P.")
    memory_rate: float = Field(0.1, gt=0, description="dmgd: rate at which the memory learns.")


def _kind(value: Any) -> str:
    # `kind` may be left out: adam.
    return str(value.get("kind", "adam") if isinstance(value, dict) else getattr(value, "kind", "adam"))


OptimizerConfig = Annotated[
    Annotated[AdamConfig, Tag("adam")]
    | Annotated[MuonConfig, Tag("muon")]
    | Annotated[M3Config, Tag("m3")]
    | Annotated[DeepMomentumConfig, Tag("deep_momentum")],
    Discriminator(_kind),
]


class OptimConfig(Section):
    """The optimizer of every stage."""

    optimizer: OptimizerConfig = Field(AdamConfig(), description="Update rule.")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="Learning-rate schedule.")
