"""How far preparation is: nothing, or bars with rate and time left on a terminal."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol


class Progress(Protocol):
    """Is told of steps done; `total` is 0 while it is not known."""

    def update(self, phase: str, done: int, total: int = 0) -> None:
        """`done` units of `phase` ("word_problems: rows") are done in all."""
        ...


class QuietProgress:
    """Says nothing."""

    def update(self, phase: str, done: int, total: int = 0) -> None:
        """Nothing."""


class TerminalProgress(AbstractContextManager["TerminalProgress"]):
    """One bar a phase: count, rate, time left. Plain when the output is not a terminal."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> TerminalProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def update(self, phase: str, done: int, total: int = 0) -> None:
        """Move the phase's bar, and make it first if there is none."""
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase, total=total or None, rate="")
        task = self._tasks[phase]
        self._bars.update(task, completed=done, total=total or None)
        speed = next((t.finished_speed or t.speed for t in self._bars.tasks if t.id == task), None)
        self._bars.update(task, rate=f"{speed:,.0f}/s" if speed else "")
