"""What a driver does when it is told to go: TERM, USR1 and Ctrl-C, from the first line of the preparation to the last of the report.

While ranks are alive a signal only asks them to write a checkpoint and leave; nothing of the driver is interrupted. Without ranks there
is nothing to wait for, and `StopAsked` is raised where the driver stands. It derives from BaseException: code that goes on after any
Exception (a tracker whose server is away) must not swallow it. What does not end within the grace time is ended here.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from hsmn_dist.foundation.errors import HsmnError, Preempted
from hsmn_dist.foundation.files import write_text
from hsmn_dist.foundation.log import logger
from hsmn_dist.orchestration.attempt import check_attempt
from hsmn_dist.orchestration.journal import append_event
from hsmn_dist.orchestration.run_folder import RunFolder

log = logger(__name__)

NAMES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LEAVE_SECONDS = 15.0
"""After the grace time: for the launcher to end the ranks and for the driver to notice; then the process ends itself."""


class StopAsked(BaseException):
    """The driver was told to go while no rank was alive."""


class StopSignals:
    """The handlers of a driver, while this is entered. In a thread that is not the main one nothing is handled.

    Args:
        folder: of the run.
        attempt: the driver's token; a driver that was replaced may not stop the ranks of its successor.
        end_ranks: ends the ranks when the grace time is over.
        grace_seconds: time to write a checkpoint.
    """

    def __init__(self, folder: RunFolder, attempt: str, end_ranks: Callable[[], None], grace_seconds: float) -> None:
        self._folder = folder
        self._attempt = attempt
        self._end_ranks = end_ranks
        self._grace_seconds = grace_seconds
        self._is_asked = False
        self._is_held = False
        self._is_ending = False
        self._has_raised = False
        self._over = threading.Event()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {name: signal.signal(name, self._ask) for name in NAMES}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for name, handler in self._before.items():
            signal.signal(name, handler)
        if self._is_asked and self._is_owner():  # answered; left behind, it would end the next ranks at once
            self._folder.stop_request.unlink(missing_ok=True)

    def hold(self) -> None:
        """From now on a signal interrupts nothing: the end is being written down."""
        self._is_held = self._is_ending = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """While ranks are alive: a signal asks them, and interrupts nothing here."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._is_asked and number == signal.SIGINT and not self._is_ending:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for a checkpoint
        if not self._is_asked:
            self._is_asked = True
            self._request(number)
        if not self._is_held and not self._has_raised:
            self._has_raised = True
            raise StopAsked(f"signal {number}")

    def _request(self, number: int) -> None:
        is_owner = self._is_owner()
        try:
            if is_owner:
                write_text(self._folder.stop_request, f"signal {number}\n")
        except OSError as error:
            log.warning("%s could not be written (%s): the ranks are ended", self._folder.stop_request, error)
            is_owner = False
        seconds = self._grace_seconds if is_owner else 0.0
        threading.Thread(target=self._enforce, args=(seconds,), daemon=True, name="grace").start()

    def _is_owner(self) -> bool:
        try:
            check_attempt(self._folder, self._attempt)
        except (HsmnError, OSError):
            return False
        return True

    def _enforce(self, seconds: float) -> None:
        """After the grace time end the ranks, and what still stands then (ranks inside this process, a stuck library)."""
        if self._over.wait(seconds):
            return
        try:
            self._end_ranks()
        except Exception as error:  # the last line of defence must be reached
            log.warning("the ranks could not be ended: %r", error)
        if self._over.wait(LEAVE_SECONDS):
            return
        log.error("still here %g s after the grace time: this process ends itself", LEAVE_SECONDS)
        if self._is_owner():
            try:
                append_event(self._folder.journal, "run_preempted", attempt=self._attempt)
            except OSError as error:
                log.warning("%s: the journal could not be written: %s", self._folder.journal, error)
        os._exit(Preempted.exit_code)
