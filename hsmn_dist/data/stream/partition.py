"""Which rows of a global batch a rank takes: contiguous blocks, by integer arithmetic alone.

The global batch is fixed before any rank is looked at. Rank r of w takes rows r * G // w up to (r + 1) * G // w, so every row
goes to exactly one rank for every w, and in rank order the blocks are the batch again.
"""

from __future__ import annotations


def rank_rows(num_rows: int, rank: int, world_size: int) -> range:
    """Rows of the global batch that belong to `rank`."""
    return range(rank * num_rows // world_size, (rank + 1) * num_rows // world_size)


def num_micro_batches(num_rows: int, micro_batch_rows: int, world_size: int) -> int:
    """Micro-batches in an optimizer step: the same number on every rank, enough for the rank with most rows."""
    most = -(-num_rows // world_size)
    return max(1, -(-most // micro_batch_rows))


def micro_batch_rows(rows: range, micro_batch_size: int, count: int) -> list[range]:
    """A rank's rows cut into `count` micro-batches in order; the last ones may be short or empty."""
    return [rows[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(count)]
