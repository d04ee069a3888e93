"""Decoding with memories instead of a cache: the state does not grow, token after token."""

import pytest
import torch

from tests.support.hope_models import chain, small_memories, tiny_model

CONSTANT = {
    "linear": {"mixer": "linear"},
    "self_modifying": {"mixer": "self_modifying", "self_modifying": small_memories()},
    "linear_chain": {"mixer": "linear", "cms": chain()},
}


@pytest.mark.parametrize("changes", CONSTANT.values(), ids=CONSTANT.keys())
def test_the_state_holds_as_many_numbers_after_many_tokens_as_after_a_few(changes):
    model = tiny_model(**changes, num_layers=1)
    with torch.no_grad():
        logits, state = model.start(torch.randint(4, 29, (2, 5)), torch.ones(2, 5, dtype=torch.bool))
        sizes = []
        for _ in range(60):
            logits, state = model.advance(logits.argmax(-1), state)
            sizes.append(sum(t.numel() for t in state.tensors()))
    assert torch.isfinite(logits).all()
    assert len(set(sizes)) == 1


def test_rows_of_a_state_can_be_reordered_and_repeated():
    model = tiny_model(mixer="linear")
    with torch.no_grad():
        logits, state = model.start(torch.randint(4, 29, (3, 5)), torch.ones(3, 5, dtype=torch.bool))
        order = torch.tensor([2, 0, 0, 1])
        token = logits.argmax(-1)
        wanted, _ = model.advance(token, state)
        found, _ = model.advance(token[order], state.rows(order))
    torch.testing.assert_close(found, wanted[order], rtol=1e-10, atol=1e-12)
