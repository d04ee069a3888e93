"""A block compiles as one graph, without breaks, for fixed shapes, and computes the same."""

import pytest
import torch

from hsmn_dist.models.hope.mixers import SequenceInfo
from hsmn_dist.models.layers.rotary import rotary_table
from tests.support.hope_models import chain, small_memories, tiny_model

VARIANTS = {
    "attention": {},
    "linear": {"mixer": "linear"},
    "self_modifying": {"mixer": "self_modifying", "self_modifying": small_memories()},
    "chain": {"cms": chain((4,))},
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_block_is_one_graph_and_computes_the_same(changes):
    block = tiny_model(**changes, num_layers=1).layers[0]
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    info = SequenceInfo(rotary=rotary_table(torch.arange(8), 8))
    torch._dynamo.reset()
    found = torch.compile(block, backend="aot_eager", fullgraph=True)(x, None, info)[0]
    torch.testing.assert_close(found, block(x, None, info)[0], rtol=1e-10, atol=1e-12)
    found.sum().backward()
    assert all(p.grad is not None for p in block.parameters())
