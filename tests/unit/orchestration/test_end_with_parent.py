"""A process ends with the one that started it, also where that one is the first process of a container."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells of a parent's death")

WORDS = [sys.executable, "-m", "hsmn_dist.orchestration.end_with_parent"]


def test_the_module_runs_under_the_parent_that_is_named_and_ends_under_any_other() -> None:
    ran = subprocess.run([*WORDS, str(os.getpid()), "platform"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and ran.stdout.strip(), ran.stderr
    orphan = subprocess.run([*WORDS, "1", "platform"], capture_output=True, text=True, check=False)
    assert orphan.returncode == -signal.SIGTERM and not orphan.stdout


PARENT = f"""
import os, subprocess, sys, time
child = subprocess.Popen({WORDS!r} + [str(os.getpid()), "http.server", "0", "--bind", "127.0.0.1"])
print(child.pid, flush=True)
time.sleep(60)
"""


def test_the_module_ends_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(1.0)
    os.kill(child, 0)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while is_alive(child):
        assert time.monotonic() < deadline, "it outlived its parent"
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stream:
            return stream.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
