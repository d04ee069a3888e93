"""How this process's malloc treats large blocks: freed tensors go back to the operating system, new ones come in large pages.

Unusual: glibc raises its own limit for blocks that it maps one by one, up to 32 MiB, as soon as one of them is freed; below that
limit freed tensors stay in a heap that only shrinks from its end, and a training step with tensors of many sizes may come to
hold twice what it uses. A fixed limit stops that; the price is fresh pages for large tensors, 2.0 of 13 CPU
seconds of a step in pages of 4 KiB and 1.2 in pages of 2 MiB (docs/performance.md). Sources: mallopt(3), madvise(2).
"""

from __future__ import annotations

import ctypes
import os

M_MMAP_THRESHOLD = -3
"""mallopt's number of the limit (malloc.h)."""
LARGE_BLOCK_BYTES = 4 * 2**20
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""torch's switch: ask the kernel (madvise) for huge pages behind tensors of 2 MiB and more; read at the first such tensor."""


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


def ask_for_huge_pages() -> None:
    """Back large CPU tensors by huge pages where the kernel gives them; a user's own HUGE_PAGES stays. Before the first tensor."""
    os.environ.setdefault(HUGE_PAGES, "1")
