from __future__ import annotations

import math

import pytest
import torch

from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.models.hsmn import reference
from hsmn_dist.models.hsmn.chunker import StreamingChunker


@pytest.mark.parametrize(("size", "stride", "least"), [(8, 4, 2), (6, 6, 1), (7, 3, 2), (5, 1, 4)])
@pytest.mark.parametrize("num_tokens", [0, 1, 4, 5, 6, 7, 8, 9, 12, 13, 40])
def test_chunks_equal_the_reference(size, stride, least, num_tokens):
    chunker = StreamingChunker(size, stride, least, pad_id=0)
    tokens = list(range(1, num_tokens + 1))
    ids = torch.tensor([tokens], dtype=torch.int64).view(1, num_tokens)
    chunks = chunker(ids, torch.ones_like(ids, dtype=torch.bool))
    expected = reference.chunks_of(tokens, size, stride, least)
    found = [row[mask].tolist() for row, mask in zip(chunks.ids[0], chunks.mask[0], strict=True)]
    assert found == expected
    assert int(chunks.num_chunks[0]) == len(expected) == chunker.num_chunks(num_tokens)
    if num_tokens > size:
        assert len(expected) == max(least, math.ceil((num_tokens - size) / stride) + 1)
    assert {token for chunk in expected for token in chunk} == set(tokens)


def test_the_last_chunk_is_padded_and_chunks_are_a_view():
    chunker = StreamingChunker(4, 2, 2, pad_id=0)
    ids = torch.arange(1, 8)[None]
    chunks = chunker(ids, torch.ones_like(ids, dtype=torch.bool))
    assert chunks.ids[0].tolist() == [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 0]]
    assert chunks.ids.stride() == (8, 2, 1)


def test_the_number_of_chunks_of_a_row_is_its_own():
    chunker = StreamingChunker(4, 2, 2, pad_id=0)
    lengths = torch.tensor([20, 0, 1, 4, 5, 13])
    mask = torch.arange(20) < lengths[:, None]
    chunks = chunker(torch.ones(6, 20, dtype=torch.int64), mask)
    assert chunks.num_chunks.tolist() == [chunker.num_chunks(length) for length in lengths.tolist()]


def test_a_stride_larger_than_the_chunk_is_refused():
    with pytest.raises(ModelError, match="chunk_stride 5 with chunk_size 4") as caught:
        StreamingChunker(4, 5, 2, 0)
    assert "a stride from 1 to 4" in caught.value.allowed
