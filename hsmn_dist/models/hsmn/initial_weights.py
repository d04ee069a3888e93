"""The starting weights of HSMN: unit signals through every map, small sublayers, and logits near zero.

Loss at step 0 is ln V plus about 0.08 nats (logits of standard deviation 0.4), at any width, tied or not.
"""

from __future__ import annotations

from torch import nn

from hsmn_dist.models.hsmn.chunk_encoder import EncoderLayer
from hsmn_dist.models.hsmn.memory_tree import Aggregator
from hsmn_dist.models.hsmn.reasoning_decoder import ReasoningBlock

LOGIT_STD = 0.4
TABLE_STD = 0.4
POSITION_STD = 0.1


def draw_weights(model: nn.Module) -> None:
    """Draw every parameter of an `HsmnModel` anew from the global generator."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=POSITION_STD)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            nn.init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Aggregator):
            # ReLU halves the power; without this factor the top of a tall tree would fade away.
            nn.init.normal_(module.outer.first.weight, std=(2.0 / module.outer.first.in_features) ** 0.5)
    _draw_tables(model)
    for kind, sublayers in ((EncoderLayer, 2), (ReasoningBlock, 3)):
        stack = [module for module in model.modules() if isinstance(module, kind)]
        for layer in stack:
            _shrink_residuals(layer, (sublayers * len(stack)) ** -0.5)


def _draw_tables(model: nn.Module) -> None:
    width = model.context_embedding.embedding_dim
    nn.init.normal_(model.context_embedding.weight, std=TABLE_STD)
    if model.head is None:
        nn.init.normal_(model.target_embedding.weight, std=LOGIT_STD * width**-0.5)
    else:
        nn.init.normal_(model.target_embedding.weight, std=TABLE_STD)
        nn.init.normal_(model.head.weight, std=LOGIT_STD * width**-0.5)


def _shrink_residuals(layer: nn.Module, factor: float) -> None:
    for name, module in layer.named_modules():
        if name.endswith(("attention.output", "feed_forward.outer")):
            nn.init.normal_(module.weight, std=factor * module.in_features**-0.5)
