"""Processes that do not outlive the one that started them.

    python -m hsmn_dist.orchestration.end_with_parent PARENT MODULE [WORDS]   runs MODULE as __main__, told to end with process PARENT

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


def end_with_parent(number: signal.Signals, parent: int | None = None) -> None:
    """Ask for `number` when the parent of this process dies; at once when it is dead already.

    In a container the parent may itself be process 1, which an orphan has too: whoever may be started so names its `parent`.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    is_orphan = os.getppid() == 1 if parent is None else os.getppid() != parent
    if is_orphan:
        os.kill(os.getpid(), number)


def main() -> None:
    """Run the module named by the second word, until the process that the first one names is gone."""
    end_with_parent(signal.SIGTERM, int(sys.argv[1]))
    module = sys.argv[2]
    sys.argv = sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
