"""How this process's malloc treats large blocks: freed tensors go back to the operating system.

Unusual: glibc raises its own limit for blocks that it maps one by one, up to 32 MiB, as soon as one of them is freed; below that
limit freed tensors stay in a heap that only shrinks from its end, and a training step with tensors of many sizes may come to
hold twice what it uses. A fixed limit stops that; the price is fresh pages for large tensors. Source: mallopt(3).
"""

from __future__ import annotations

import ctypes

M_MMAP_THRESHOLD = -3
"""mallopt's number of the limit (malloc.h)."""
LARGE_BLOCK_BYTES = 4 * 2**20


def return_freed_blocks(large_block_bytes: int = LARGE_BLOCK_BYTES) -> bool:
    """Map blocks of this size or more one by one, so that freeing them frees memory.

    Returns:
        Whether the C library could be told; False where it is not glibc, and nothing is changed then.
    """
    try:
        library = ctypes.CDLL(None)
        return bool(library.gnu_get_libc_version) and bool(library.mallopt(M_MMAP_THRESHOLD, large_block_bytes))
    except (OSError, AttributeError, TypeError):
        return False
