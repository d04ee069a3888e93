"""The watch over a launch: a rank that falls silent ends it and is named."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hsmn_dist.foundation.errors import StageFailed
from hsmn_dist.foundation.log import logger
from hsmn_dist.orchestration.heartbeat import Beat, has_ended, of_newest_group, read_beats, silent_rank
from hsmn_dist.orchestration.run_folder import RunFolder

log = logger(__name__)

WATCH_SECONDS = 1.0


@contextmanager
def hang_watch(
    folder: RunFolder, attempt: str, stall_seconds: float, end_ranks: Callable[[], None]
) -> Iterator[list[StageFailed]]:
    """Look at the heartbeats until the end of the block; the list holds the verdict, if there is one."""
    hung: list[StageFailed] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(WATCH_SECONDS):
            try:
                beat = _silent(folder, attempt, stall_seconds)
            except OSError as error:  # a storage that stumbles is looked at again
                log.warning("the heartbeats could not be read: %s", error)
                continue
            if beat is not None:
                hung.append(_verdict(beat, stall_seconds))
                end_ranks()
                return

    thread = threading.Thread(target=look, daemon=True, name="heartbeat-watch")
    thread.start()
    try:
        yield hung
    finally:
        done.set()
        thread.join(timeout=5)


def _silent(folder: RunFolder, attempt: str, stall_seconds: float) -> Beat | None:
    beats = of_newest_group(read_beats(folder.path / "heartbeats"), attempt)
    return silent_rank([beat for beat in beats if not has_ended(beat)], stall_seconds, time.time())


def _verdict(beat: Beat, stall_seconds: float) -> StageFailed:
    return StageFailed(
        f"rank {beat.rank} on {beat.host} has been silent for {time.time() - beat.time:.0f} s "
        f"(stage {beat.stage}, {beat.phase}, step {beat.step})",
        allowed=f"a sign of life every {stall_seconds:g} s (cluster.stall_seconds)",
        kind="hung",
        rank=beat.rank,
    )
