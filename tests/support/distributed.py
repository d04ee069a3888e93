"""`run_distributed`: a function on several ranks of this machine (gloo, spawned processes); results or exceptions come back.

The function must live at a module's top level and takes the rank's `World` first. Each spawned process imports torch anew
(seconds on a busy machine), so a test puts many checks into one call.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class RankFailed(AssertionError):
    """A rank raised, died, or did not end in time. The message has the rank's traceback."""


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 180.0) -> list[Any]:
    """Call `fn(world, *args)` on `world_size` ranks; the results in rank order.

    Raises:
        RankFailed: with the traceback of the first rank that raised; the other ranks are ended.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder, port = Path(name), _free_port()
        ranks = [
            context.Process(target=_rank_main, args=(fn, rank, world_size, port, str(folder), args), daemon=False)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, folder, timeout)
            return [pickle.loads((folder / f"result_{rank}").read_bytes()) for rank in range(world_size)]
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()


def _wait(ranks: list[Any], folder: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        errors = sorted(folder.glob("error_*"), key=lambda path: path.stat().st_mtime)
        if errors:
            raise RankFailed(f"{errors[0].name}:\n{errors[0].read_text()}")
        dead = [rank for rank, process in enumerate(ranks) if process.exitcode not in (None, 0)]
        if dead and not list(folder.glob("error_*")):
            raise RankFailed(f"ranks {dead} died with exit codes {[ranks[rank].exitcode for rank in dead]}")
        if all(process.exitcode == 0 for process in ranks):
            return
        if time.monotonic() > deadline:
            alive = [rank for rank, process in enumerate(ranks) if process.is_alive()]
            raise RankFailed(f"ranks {alive} did not end within {timeout:g} s")
        time.sleep(0.05)


def _rank_main(
    fn: Callable[..., Any], rank: int, world_size: int, port: int, folder: str, args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
    )
    import torch

    from hsmn_dist.distributed.world import World

    torch.set_num_threads(1)
    try:
        world = World.from_environment(device="cpu", timeout_seconds=120)
        result = pickle.dumps(fn(world, *args))
    except BaseException:
        aside = Path(folder) / f"aside_{rank}"
        aside.write_text(traceback.format_exc())
        aside.replace(Path(folder) / f"error_{rank}")
        os._exit(1)
    (Path(folder) / f"result_{rank}").write_bytes(result)
    # Destroying the group here would wait for slower ranks; the process ends with its sockets.
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
