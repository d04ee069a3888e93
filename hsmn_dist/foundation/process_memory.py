"""How this process's malloc treats large blocks: freed tensors go back to the operating system, new ones come in large pages.

Unusual: glibc raises its own limit for blocks that it maps one by one, up to 32 MiB, as soon as one of them is freed; below that
limit freed tensors stay in a heap that only shrinks from its end, and a training step with tensors of many sizes may come to
hold twice what it uses. A fixed limit stops that; the price is fresh pages for large tensors, 2.0 of 13 CPU
seconds of a step in pages of 4 KiB and 1.2 in pages of 2 MiB (docs/performance.md). With a fixed limit the heap would also be
cut at its end whenever 128 KiB are free there, and grow again at the next tensor, thousands of fresh pages a step: it keeps
HEAP_RESERVE_BYTES instead. Sources: mallopt(3), madvise(2).
"""

from __future__ import annotations

import ctypes
import os

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
"""mallopt's numbers of the limit and of what may stay free at the heap's end (malloc.h)."""
LARGE_BLOCK_BYTES, HEAP_RESERVE_BYTES = 4 * 2**20, 64 * 2**20
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""torch's switch: ask the kernel (madvise) for huge pages behind tensors of 2 MiB and more; read at the first such tensor."""


def return_freed_blocks(
    large_block_bytes: int = LARGE_BLOCK_BYTES, heap_reserve_bytes: int = HEAP_RESERVE_BYTES
) -> bool:
    """Map blocks of the first size or more one by one, so that freeing them frees memory; smaller ones use the heap again.

    Returns:
        Whether the C library could be told; False where it is not glibc, and nothing is changed then.
    """
    try:
        library = ctypes.CDLL(None)
        if not library.gnu_get_libc_version:
            return False
        sizes = {M_MMAP_THRESHOLD: large_block_bytes, M_TRIM_THRESHOLD: heap_reserve_bytes}
        return all([bool(library.mallopt(number, size)) for number, size in sizes.items()])
    except (OSError, AttributeError, TypeError):
        return False


def ask_for_huge_pages() -> None:
    """Back large CPU tensors by huge pages where the kernel gives them; a user's own HUGE_PAGES stays. Before the first tensor."""
    os.environ.setdefault(HUGE_PAGES, "1")
