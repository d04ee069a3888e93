"""A live view of a run: stage, phase, step, loss, rate, time left. Rich on a terminal, plain lines elsewhere.

It only reads the heartbeats in the run folder, so it works for every launcher, and for a run that another process drives.
"""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from hsmn_dist.orchestration.heartbeat import Beat, read_beats
from hsmn_dist.orchestration.run_folder import RunFolder

POLL_SECONDS = 0.5


class LiveView:
    """Context manager that follows a run in a background thread until it is closed."""

    def __init__(self, folder: RunFolder, stage_names: list[str], console: Console | None = None) -> None:
        self._folder = folder.path / "heartbeats"
        self._stages = stage_names
        self._console = console or Console(stderr=True)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True, name="live-view")
        self._said: set[tuple[int, str]] = set()
        self._bars: dict[int, TaskID] = {}
        self._progress: Progress | None = None

    def __enter__(self) -> LiveView:
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description:<28}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._progress.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        self._show()
        if self._progress is not None:
            self._progress.stop()

    def say(self, text: str) -> None:
        """One line above the bars."""
        self._console.print(text, highlight=False)
        sys.stderr.flush()

    def _follow(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self._show()

    def _show(self) -> None:
        beats = read_beats(self._folder)
        if beats:
            beat = beats[0]
            if self._progress is not None:
                self._update_bar(beat)
            else:
                self._print_line(beat)

    def _label(self, beat: Beat) -> str:
        return f"stage {beat.stage_index + 1}/{len(self._stages)} {beat.stage}"

    def _update_bar(self, beat: Beat) -> None:
        assert self._progress is not None
        if beat.stage_index not in self._bars:
            for task in self._bars.values():
                self._progress.update(task, completed=self._progress.tasks[task].total, detail="done")
            self._bars[beat.stage_index] = self._progress.add_task(self._label(beat), total=None, detail="")
        self._progress.update(
            self._bars[beat.stage_index],
            total=beat.num_steps or None,
            completed=beat.step,
            detail=_detail(beat),
        )

    def _print_line(self, beat: Beat) -> None:
        tenth = int(10 * beat.step / beat.num_steps) if beat.num_steps else 0
        mark = (beat.stage_index, f"{beat.phase} {tenth if beat.phase == 'train' else ''}")
        if mark in self._said:
            return
        self._said.add(mark)
        steps = f" step {beat.step}/{beat.num_steps}" if beat.phase == "train" else ""
        self._console.print(f"{time.strftime('%H:%M:%S')} {self._label(beat)}:{steps} {_detail(beat)}", highlight=False)


def _detail(beat: Beat) -> str:
    words = [beat.phase]
    if beat.phase == "train":
        if beat.loss is not None:
            words.append(f"loss {beat.loss:.3f}")
        if beat.tokens_per_second:
            words.append(f"{beat.tokens_per_second:,.0f} tok/s")
    return " ".join(words)
