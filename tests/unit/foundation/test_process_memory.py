"""What the process does with freed memory, seen from the operating system."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from hsmn_dist.foundation.process_memory import USERS_OWN

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


def printed(program: str, *arguments: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in USERS_OWN} | variables
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout


# Steps that take and free blocks from 1 to 40 MiB; the pages that the kernel filled anew in the last of them.
STEPS = """
import json, resource, sys, torch
from hsmn_dist.foundation.process_memory import keep_freed_blocks
told = keep_freed_blocks() if sys.argv[1] == "yes" else None
keep = torch.ones(1)
for step in range(30):  # the heap finds its size in a few of them
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**18 * size) for size in (1, 7, 19, 40)]
    del blocks
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps({"told": told, "pages": pages}))
"""


@needs_glibc
def test_a_step_that_repeats_needs_no_fresh_pages() -> None:
    plain, kept = (json.loads(printed(STEPS, answer)) for answer in ("no", "yes"))
    assert kept["told"] is True
    assert kept["pages"] < 500 < 5000 < plain["pages"]  # 67 MiB are 17,152 pages


@needs_glibc
@pytest.mark.parametrize("name", USERS_OWN)
def test_what_a_user_told_malloc_stays(name: str) -> None:
    value = "glibc.malloc.mmap_threshold=4194304" if name == "GLIBC_TUNABLES" else "4194304"
    assert json.loads(printed(STEPS, "yes", **{name: value}))["told"] is False


# 20 blocks of 16 MiB freed between 20 that stay.
HOLES = """
import json, torch
from pathlib import Path
from hsmn_dist.foundation.process_memory import give_back_freed_memory, keep_freed_blocks
keep_freed_blocks()
def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
blocks = [torch.ones(4 * 2**20) for _ in range(40)]
blocks = blocks[1::2]
before = resident()
given = give_back_freed_memory()
print(json.dumps({"given": given, "before": before, "after": resident()}))
"""


@needs_glibc
def test_freed_memory_goes_back_to_the_operating_system_when_it_is_told_to() -> None:
    found = json.loads(printed(HOLES))
    assert found["given"] is True
    assert found["before"] - found["after"] > 200_000  # KiB of the 320 MiB that were freed


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
def test_large_tensors_lie_in_huge_pages_when_asked_for() -> None:
    held = {answer: int(printed(HUGE, answer)) for answer in ("no", "yes")}
    assert held["no"] < 30_000 < held["yes"], held  # KiB of 64 MiB; under memory pressure the kernel may give fewer
