"""Length bucketing: batches of like lengths, so that less of a batch is padding.

A window of `num_buckets` global batches is sorted by length, cut into that many batches, and the batches are shuffled inside
the window. Which samples a window holds does not change, the rule needs only the lengths in the index, and it is the same on
every number of ranks. With one bucket nothing moves.
"""

from __future__ import annotations

import numpy as np

from hsmn_dist.data.stream.order import permutation


def bucketed_rows(lengths: np.ndarray, num_buckets: int, seed: int, window: int) -> np.ndarray:
    """New order of a window's samples: [num_buckets, batch] numbers into `lengths`; row b is the window's batch b.

    Args:
        lengths: [num_buckets * batch] tokens of each sample, context and target together.
        num_buckets: batches of the window.
        seed: of the stream.
        window: number of the window in the stream.
    """
    by_length = np.argsort(lengths, kind="stable").reshape(num_buckets, -1)
    return by_length[permutation(num_buckets, seed, window, 2)]
