"""Several short examples in one row: which example goes into which row, decided from the lengths in the index alone.

The examples of a global batch are fixed before packing, so packing changes how they are laid out and never which are learned.
First-fit decreasing: the longest example first, each into the first row that has room (Johnson 1973; at most 11/9 of the
fewest rows possible, plus one).
"""

from __future__ import annotations

import numpy as np


def pack_rows(lengths: np.ndarray, row_tokens: int) -> list[list[int]]:
    """Examples (as numbers into `lengths`) of each row; a row's lengths sum to at most `row_tokens`.

    An example longer than a row gets one of its own. Rows stand in the order of their first example, and so do the
    examples inside a row, so the result depends on nothing but the lengths.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        for number, left in enumerate(room):
            if length <= left:
                rows[number].append(example)
                room[number] -= length
                break
        else:
            rows.append([example])
            room.append(row_tokens - length)
    return sorted(sorted(row) for row in rows)
