"""The training loss as a module of tensors: summed token cross-entropy of one micro-batch.

Unusual: engines call the model through `NllModule`, whose inputs and output are plain tensors. ZeRO-3 fetches and releases
weights by hooks that see tensors only, not dataclasses; the wrapper calls `model.forward` itself, so that the parameters that
the model owns directly, and those that it borrows from its children (a tied head), count as the wrapper's.
"""

from __future__ import annotations

from torch import Tensor, nn

from hsmn_dist.models.contract import LanguageModel, ModelInput, TargetLoss, cross_entropy


class NllModule(nn.Module):
    """A language model that returns the sum of its losses over the scored target tokens of a micro-batch.

    `health` holds the named scalars that the last forward pass gave beside it.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model
        self.target_loss: TargetLoss = cross_entropy
        self.health: dict[str, Tensor] = {}

    def forward(
        self,
        context_ids: Tensor,
        context_mask: Tensor,
        target_ids: Tensor,
        loss_mask: Tensor,
        segment_ids: Tensor | None,
    ) -> Tensor:
        """Shapes as in `ModelInput`; returns a scalar, in nats."""
        inputs = ModelInput(context_ids, context_mask, target_ids, loss_mask, segment_ids)
        output = self.model.forward(inputs, target_loss=self.target_loss)
        assert output.nll is not None, "a model that is given a target_loss returns losses"
        self.health = output.aux
        return output.nll.sum()


def tensors_of(batch: ModelInput) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """A micro-batch in the order that `NllModule.forward` takes."""
    return batch.context_ids, batch.context_mask, batch.target_ids, batch.loss_mask, batch.segment_ids
