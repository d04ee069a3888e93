from __future__ import annotations

import pytest
import torch

from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.models.hsmn.streaming_memory import StreamingMemory
from tests.support.hsmn_models import tiny_model


def at_once(model, ids):
    with torch.no_grad():
        return model.read_context(ids, torch.ones_like(ids, dtype=torch.bool))


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 8, 64])
def test_append_by_append_equals_the_context_at_once(piece):
    model = tiny_model()
    ids = torch.randint(4, 31, (2, 61))
    memory = StreamingMemory(model, batch_size=2)
    for start in range(0, 61, piece):
        memory.append(ids[:, start : start + piece])
        if piece > 1 or start % 7 == 0:
            expected, expected_valid = at_once(model, ids[:, : start + piece])
            nodes, is_valid = memory.nodes()
            assert torch.equal(is_valid, expected_valid)
            torch.testing.assert_close(nodes, expected, rtol=1e-12, atol=1e-12)


def test_an_empty_memory_equals_an_empty_context():
    model = tiny_model()
    memory = StreamingMemory(model)
    logits, _ = memory.start()
    empty = torch.zeros((1, 0), dtype=torch.int64)
    expected, _ = model.start(empty, empty.bool())
    assert not memory.nodes()[1].any()
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("length", [1, 5, 6, 8, 9, 12, 15, 21])
def test_appending_nothing_changes_nothing_also_where_every_chunk_is_full(length):
    model = tiny_model()
    memory = StreamingMemory(model)
    memory.append(torch.randint(4, 31, (1, length)))
    before, computed = memory.nodes(), memory.num_nodes_computed
    memory.append(torch.zeros((1, 0), dtype=torch.int64))
    assert all(torch.equal(a, b) for a, b in zip(before, memory.nodes(), strict=True))
    assert memory.num_tokens == length and memory.num_nodes_computed == computed


def test_an_appended_chunk_touches_a_logarithmic_number_of_nodes():
    model = tiny_model()
    memory = StreamingMemory(model)
    memory.append(torch.randint(4, 31, (1, 3 * 1000)))
    worst = 0
    for _ in range(64):
        before = memory.num_nodes_computed
        memory.append(torch.randint(4, 31, (1, 3)))
        worst = max(worst, memory.num_nodes_computed - before)
    # Two open chunks (chunk 6, stride 3) and at most two nodes on each of the ten levels above.
    assert worst <= 3 + 2 * 11


def test_finished_chunks_are_never_encoded_again(monkeypatch):
    model = tiny_model()
    encoded = []
    forward = model.encoder.forward
    monkeypatch.setattr(model.encoder, "forward", lambda x, mask: encoded.append(x.shape[0]) or forward(x, mask))
    memory = StreamingMemory(model)
    memory.append(torch.randint(4, 31, (1, 300)))
    encoded.clear()
    for _ in range(30):
        memory.append(torch.randint(4, 31, (1, 3)))
    assert max(encoded) <= 3


@pytest.mark.parametrize("budget", [24, 40])
def test_a_node_budget_bounds_an_endless_stream_and_every_chunk_stays_covered(budget):
    model = tiny_model()
    whole, bounded = StreamingMemory(model), StreamingMemory(model, node_budget=budget)
    for step in range(120):
        piece = torch.randint(4, 31, (1, 5))
        whole.append(piece)
        bounded.append(piece)
        assert bounded.num_nodes <= budget + 2 * len(bounded.levels)
        covered = set()
        for height, level in enumerate(bounded.levels):
            for index in range(level.offset, bounded._num_merged(height)):
                covered.update(range(*bounded._span(height, index)))
        assert covered == set(range(bounded.num_chunks)), step
    assert bounded.num_nodes <= budget < whole.num_nodes
    # What stays equals the same node of the whole tree.
    for height, level in enumerate(bounded.levels):
        for index in range(level.offset, bounded._num_merged(height)):
            torch.testing.assert_close(level.node(index).value, whole.levels[height].node(index).value)
    logits, _ = bounded.start()
    assert torch.isfinite(logits).all()


def test_old_text_is_left_to_coarse_nodes_and_recent_text_keeps_fine_ones():
    model = tiny_model()
    memory = StreamingMemory(model, node_budget=24)
    memory.append(torch.randint(4, 31, (1, 600)))
    assert memory.levels[0].offset > memory.num_chunks - 12
    assert memory.levels[-1].offset == 0


def test_generation_goes_on_from_a_growing_context():
    model = tiny_model()
    ids = torch.randint(4, 31, (1, 40))
    memory = StreamingMemory(model)
    for end in (10, 25, 40):
        memory.append(ids[:, memory.num_tokens : end])
        logits, state = memory.start()
        expected, other = model.start(ids[:, :end], torch.ones(1, end, dtype=torch.bool))
        torch.testing.assert_close(logits, expected)
        token = torch.tensor([5])
        torch.testing.assert_close(model.advance(token, state)[0], model.advance(token, other)[0])


def test_bad_input_is_refused():
    model = tiny_model()
    with pytest.raises(ModelError, match="training mode"):
        StreamingMemory(tiny_model().train())
    with pytest.raises(ModelError, match="2 sequences for a memory of 1"):
        StreamingMemory(model).append(torch.zeros((2, 3), dtype=torch.int64))
    with pytest.raises(ModelError, match="token id 31"):
        StreamingMemory(model).append(torch.full((1, 3), 31))
