"""What every language model of the house takes and gives.

Shape letters, used in every forward docstring: B batch, n context tokens, T target tokens, C chunks, S tokens in a chunk,
N tree nodes, D model width, H heads, K head width, V vocabulary, L levels, M scored positions of a batch.

A model predicts `target_ids[:, t]` from the whole context and `target_ids[:, :t]`: targets are the labels, and the model
itself shifts them right behind <bos>. Nothing that belongs to one sequence may reach another sequence of the batch.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hsmn_dist.foundation.param_role import EVERY_STEP, ParamRole, ParamUpdate
from hsmn_dist.models.token_loss import token_cross_entropy

BOS_ID = 1


@dataclass
class ModelInput:
    """One micro-batch. Field names equal the keys that the stream's collate function gives.

    Attributes:
        context_ids: [B, n] token ids, left-aligned, padded at the end; n may be 0.
        context_mask: [B, n] bool, True on real tokens.
        target_ids: [B, T] token ids, left-aligned, padded at the end. Labels, not shifted.
        loss_mask: [B, T] bool, True on target tokens that are scored.
        segment_ids: [B, T] integers for packed rows (0 is padding): tokens of different segments neither attend to each
            other nor share state, and positions restart. None when rows hold one example each.
    """

    context_ids: Tensor
    context_mask: Tensor
    target_ids: Tensor
    loss_mask: Tensor
    segment_ids: Tensor | None = None

    def to(self, device: torch.device | str) -> ModelInput:
        """The same batch on another device."""
        segments = None if self.segment_ids is None else self.segment_ids.to(device)
        return ModelInput(
            self.context_ids.to(device),
            self.context_mask.to(device),
            self.target_ids.to(device),
            self.loss_mask.to(device),
            segments,
        )


class TargetLoss(Protocol):
    """Loss of scored positions; the Fisher estimators pass their own."""

    def __call__(self, logits: Tensor, labels: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """Logits [M, V], labels [M], batch row [M] and target position [M] of each -> losses [M] in fp32."""
        ...


def cross_entropy(logits: Tensor, labels: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Negative log-likelihood in nats, computed in fp32. Shapes as in `TargetLoss`."""
    return token_cross_entropy(logits, labels).float()


@dataclass
class ModelOutput:
    """Result of a forward pass.

    Attributes:
        logits: [B, T, V], or None when a `target_loss` was given.
        nll: [B, T] fp32 losses, 0 where `loss_mask` is False; None when no `target_loss` was given. Only scored positions
            ever get logits.
        state: fast memory after the last token; None for models without any.
        aux: named scalars for the tracker (memory health and the like).
    """

    logits: Tensor | None = None
    nll: Tensor | None = None
    state: Any = None
    aux: dict[str, Tensor] = field(default_factory=dict)


class LanguageModel(nn.Module, abc.ABC):
    """A family's model: mathematics on one device. No Parameter is written inside `forward`."""

    vocab_size: int
    max_target_tokens: int | None = None
    """Longest target that the model can take; None for no bound."""

    def forward_windows(self, inputs: ModelInput, target_loss: TargetLoss | None = None) -> ModelOutput:
        """As `forward`, for scoring on one process: a family may read a long target in windows. Equal results."""
        return self.forward(inputs, target_loss=target_loss)

    def score_continuations(self, inputs: ModelInput, owners: Tensor, target_loss: TargetLoss | None) -> ModelOutput:
        """As `forward_windows`, for R targets that share U contexts: several answers to each question.

        A family may read each context once; this one repeats it. Equal results, up to the order of sums.

        Args:
            inputs: contexts [U, n] and targets [R, T].
            owners: [R] row of the context of each target.
            target_loss: as in `forward`.
        """
        contexts = inputs.context_ids.index_select(0, owners), inputs.context_mask.index_select(0, owners)
        return self.forward_windows(ModelInput(*contexts, inputs.target_ids, inputs.loss_mask), target_loss)

    def parameter_updates(self) -> dict[str, ParamUpdate]:
        """Period and rate, for parameters that are not updated at every step with the optimizer's rate."""
        updates: dict[str, ParamUpdate] = {}
        for prefix, module in self.named_modules():
            given = getattr(module, "parameter_updates", None)
            if module is not self and callable(given):
                updates.update({f"{prefix}.{name}": own for name, own in given().items() if own != EVERY_STEP})
        return updates

    def prunable_parameters(self) -> list[str]:
        """Names of the weight matrices that magnitude pruning may thin out."""
        return []

    @property
    def gathered_whole(self) -> tuple[type[nn.Module], ...]:
        """Module classes whose inner modules run a number of times that depends on the batch.

        Ranks would disagree about the order of ZeRO-3's gathers: pass these classes to
        `deepspeed.utils.set_z3_leaf_modules`, so that each is gathered once, as a whole.
        """
        return ()

    @abc.abstractmethod
    def forward(self, inputs: ModelInput, state: Any = None, target_loss: TargetLoss | None = None) -> ModelOutput:
        """Logits of every target position, or the losses of the scored ones when `target_loss` is given."""

    @property
    @abc.abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The modules that activation checkpointing may recompute, in forward order."""

    @abc.abstractmethod
    def parameter_roles(self) -> dict[str, ParamRole]:
        """Role of every parameter, by the name `named_parameters` gives it."""

    @abc.abstractmethod
    def parameter_components(self) -> dict[str, str]:
        """Component of every parameter ("encoder", "aggregator", "decoder", ...), for norms and per-component EWC."""

    @abc.abstractmethod
    def init_weights(self) -> None:
        """Draw every parameter anew from the global torch generator."""

    @abc.abstractmethod
    def start(self, context_ids: Tensor, context_mask: Tensor) -> tuple[Tensor, Any]:
        """Read a context ([B, n], as in `ModelInput`): logits [B, V] of the first target token, and a decoding state."""

    @abc.abstractmethod
    def advance(self, token_ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Append one token [B] to the target: logits [B, V] of the next one, and the new state."""
