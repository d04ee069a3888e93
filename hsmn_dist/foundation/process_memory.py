"""How this process's malloc treats freed tensors: they stay, for the next step wants the same sizes, until they are given back.

Unusual: as it comes, glibc maps blocks of 32 MiB and more one by one, and cuts its heap wherever the end is free; a training step
then frees and takes the same gigabytes every time, in pages that the kernel must fill with zeros anew (3.0 of 7.6 CPU seconds
of a step of 8,192 tokens; docs/decisions/0086). Whoever prefers less memory to less time uses glibc's own variables, for example
MALLOC_MMAP_THRESHOLD_=4194304; with one of those in the environment nothing is changed here. Sources: mallopt(3), malloc_trim(3),
madvise(2).
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""mallopt's numbers of what may stay free at the heap's end (-1: anything) and of how many blocks may be mapped (malloc.h)."""
USERS_OWN = (
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "GLIBC_TUNABLES",
)
"""Variables by which a user tunes glibc's malloc (mallopt(3))."""
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""torch's switch: ask the kernel (madvise) for huge pages behind tensors of 2 MiB and more; read at the first such tensor."""


def keep_freed_blocks() -> bool:
    """Let freed memory stay with this process for its next tensors.

    Returns:
        Whether the C library could be told; False where it is not glibc, or where the environment tunes it already.
    """
    library = _glibc()
    if library is None or any(name in os.environ for name in USERS_OWN):
        return False
    return all([bool(library.mallopt(number, size)) for number, size in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))])


def give_back_freed_memory() -> bool:
    """Free pages to the operating system, for what comes next needs others; returns whether there were any."""
    library = _glibc()
    return library is not None and bool(library.malloc_trim(0))


def ask_for_huge_pages() -> None:
    """Back large CPU tensors by huge pages where the kernel gives them; a user's own HUGE_PAGES stays. Before the first tensor."""
    os.environ.setdefault(HUGE_PAGES, "1")


def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        return library if library.gnu_get_libc_version else None
    except (OSError, AttributeError, TypeError):
        return None
