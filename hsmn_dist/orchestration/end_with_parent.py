"""Processes that do not outlive the one that started them.

    python -m hsmn_dist.orchestration.end_with_parent MODULE [WORDS]   runs MODULE as __main__, told to end with its parent

A driver that is killed cannot end its ranks: torchrun and the ranks would train on, fenced off but busy. Linux sends a process the
signal it asked for when its parent dies (prctl(2), PR_SET_PDEATHSIG); on other systems nothing is asked for and the fence alone holds.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals) -> None:
    """Ask for `number` when the parent of this process dies; at once when it is dead already."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() == 1:
        os.kill(os.getpid(), number)


def main() -> None:
    """Run the module named by the first word."""
    end_with_parent(signal.SIGTERM)
    module = sys.argv[1]
    sys.argv = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
