"""What the process does with freed memory, seen from the operating system."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hsmn_dist.foundation.process_memory import return_freed_blocks

# Blocks of 16 MiB, then every second one freed: a heap keeps the holes, single mappings give them back.
PROGRAM = """
import sys, torch
from pathlib import Path
from hsmn_dist.foundation.process_memory import return_freed_blocks
if sys.argv[1] == "yes":
    return_freed_blocks()
warm = [torch.ones(4 * 2**20 * k // 4) for k in range(1, 32)]
del warm
blocks = [torch.ones(4 * 2**20) for _ in range(40)]
blocks = blocks[1::2]
status = Path("/proc/self/status").read_text()
print(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")))
"""


@pytest.mark.skipif(not return_freed_blocks(), reason="the C library is not glibc")
def test_freed_tensors_go_back_to_the_operating_system():
    held = {
        answer: int(subprocess.run([sys.executable, "-c", PROGRAM, answer], capture_output=True, text=True).stdout)
        for answer in ("no", "yes")
    }
    assert held["no"] - held["yes"] > 200_000  # KiB of the 320 MiB that were freed


HUGE = """
import sys, torch
from hsmn_dist.foundation.process_memory import ask_for_huge_pages
if sys.argv[1] == "yes":
    ask_for_huge_pages()
block = torch.ones(16 * 2**20)
lines = open("/proc/self/smaps_rollup").read().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:")))
"""
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not SWITCH.is_file() or "[madvise]" not in SWITCH.read_text(),
    reason="the kernel does not give huge pages on request",
)
def test_large_tensors_lie_in_huge_pages_when_asked_for():
    held = {
        answer: int(subprocess.run([sys.executable, "-c", HUGE, answer], capture_output=True, text=True).stdout)
        for answer in ("no", "yes")
    }
    assert held["no"] < 30_000 < held["yes"], held  # KiB of 64 MiB; under memory pressure the kernel may give fewer


REUSED = """
import ctypes, sys
from hsmn_dist.foundation.process_memory import LARGE_BLOCK_BYTES, M_MMAP_THRESHOLD, return_freed_blocks
library = ctypes.CDLL(None)
library.malloc.restype = library.sbrk.restype = ctypes.c_void_p
library.malloc.argtypes, library.free.argtypes, library.sbrk.argtypes = [ctypes.c_size_t], [ctypes.c_void_p], [ctypes.c_ssize_t]
if sys.argv[1] == "yes":
    return_freed_blocks()
else:
    library.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
num_cuts = 0
for _ in range(50):
    block = library.malloc(2 * 2**20)
    end = library.sbrk(0)
    library.free(block)
    num_cuts += library.sbrk(0) < end
print(num_cuts)
"""


@pytest.mark.skipif(not return_freed_blocks(), reason="the C library is not glibc")
def test_a_freed_block_below_the_limit_stays_with_the_process_for_the_next_one():
    cuts = {
        answer: int(subprocess.run([sys.executable, "-c", REUSED, answer], capture_output=True, text=True).stdout)
        for answer in ("no", "yes")
    }
    assert cuts["yes"] == 0 < cuts["no"], (
        cuts
    )  # how often the heap's end came back to the system and was asked for again
