"""The starting weights of HSMN: unit signals through every map, small sublayers, and logits near zero.

Loss at step 0 is ln V plus about 0.02 nats (logits of standard deviation 0.2), at any width, tied or not.
"""

from __future__ import annotations

from torch import nn

from hsmn_dist.models.hsmn.chunk_encoder import EncoderLayer
from hsmn_dist.models.hsmn.memory_tree import Aggregator
from hsmn_dist.models.hsmn.reasoning_decoder import ReasoningBlock

LOGIT_STD = 0.2
TABLE_STD = 0.4
POSITION_STD = 0.1


def draw_weights(
    model: nn.Module, context_table: nn.Embedding, target_table: nn.Embedding, head: nn.Linear | None
) -> None:
    """Draw every parameter of `model` anew from the global generator; `head` is None when tied to `target_table`."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            _draw_linear(module)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=POSITION_STD)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.reset_parameters()
    for module in model.modules():
        if isinstance(module, Aggregator):
            # ReLU halves the power; without this factor the top of a tall tree would fade away.
            _draw_linear(module.outer.first, gain=2.0**0.5)
    nn.init.normal_(context_table.weight, std=TABLE_STD)
    nn.init.normal_(target_table.weight, std=TABLE_STD if head else LOGIT_STD * target_table.embedding_dim**-0.5)
    if head is not None:
        _draw_linear(head, gain=LOGIT_STD)
    for kind in (EncoderLayer, ReasoningBlock):
        stack = [module for module in model.modules() if isinstance(module, kind)]
        for layer in stack:
            num_sublayers = sum(name.endswith("_norm") for name, _ in layer.named_children())
            _shrink_residuals(layer, (num_sublayers * len(stack)) ** -0.5)
    for module in model.modules():
        draw = getattr(module, "init_weights", None)
        if module is not model and callable(draw):  # memories that know their own start
            draw()


def _draw_linear(linear: nn.Linear, gain: float = 1.0) -> None:
    nn.init.normal_(linear.weight, std=gain * linear.in_features**-0.5)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def _shrink_residuals(layer: nn.Module, factor: float) -> None:
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in ("output", "outer"):
            _draw_linear(module, factor)
