"""A lease on a name: one process at a time drives the run of that name, on any machine that sees the folder.

Unusual: no two clocks are compared. The owner touches the lease every few seconds; who wants it watches the file, on its own clock,
and takes it over only after it has stood still for `stale_seconds`. Of several takers one wins, because a rename of the old lease
succeeds once. A process that lost its lease while it was cut off is fenced by the run's attempt token as well (attempt.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hsmn_dist.foundation.log import logger

log = logger(__name__)

RENEW_SECONDS = 5.0
STALE_SECONDS = 30.0


@dataclass(frozen=True)
class Holder:
    """Who has a lease."""

    token: str
    host: str
    pid: int


def read_holder(path: Path) -> Holder | None:
    """The present holder; None when there is none, or while the file is being written."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def try_acquire(path: Path) -> Holder | None:
    """Take a free lease; None when somebody has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = Holder(secrets.token_hex(8), platform.node(), os.getpid())
    aside = path.parent / f".{path.name}.{holder.token}"
    aside.write_text(json.dumps(holder.__dict__), encoding="utf-8")
    try:
        os.link(aside, path)  # fails when the name exists, also over NFS
    except FileExistsError:
        return None
    finally:
        aside.unlink()
    return holder


def renew(path: Path, holder: Holder) -> bool:
    """Show that the holder lives; False when the lease is no longer its own."""
    if read_holder(path) != holder:
        return False
    with contextlib.suppress(FileNotFoundError):
        os.utime(path)
        return True
    return False


def release(path: Path, holder: Holder) -> None:
    """Give the lease back, if it is still the holder's."""
    if read_holder(path) == holder:
        path.unlink(missing_ok=True)


class Watcher:
    """Watches somebody else's lease and says when it has stood still for too long."""

    def __init__(self, path: Path, stale_seconds: float = STALE_SECONDS) -> None:
        self._path = path
        self._stale_seconds = stale_seconds
        self._seen: tuple[str, int] | None = None
        self._since = time.monotonic()

    def is_stale(self) -> bool:
        """True when the lease is there and was not renewed for `stale_seconds` of this process's own time."""
        try:
            holder, stamp = read_holder(self._path), self._path.stat().st_mtime_ns
        except FileNotFoundError:
            self._seen = None
            return False
        seen = (holder.token if holder else "", stamp)
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        return time.monotonic() - self._since > self._stale_seconds

    def clear(self) -> bool:
        """Remove the stale lease; True for the one watcher that did it."""
        tomb = self._path.parent / f".{self._path.name}.stale-{secrets.token_hex(4)}"
        try:
            if (self._seen or ("", 0))[1] != self._path.stat().st_mtime_ns:
                return False
            self._path.rename(tomb)
        except FileNotFoundError:
            return False
        taken = read_holder(tomb)
        if taken is not None and self._seen is not None and taken.token != self._seen[0]:
            with contextlib.suppress(FileExistsError):
                os.link(tomb, self._path)  # somebody was faster and owns a new lease: put it back
            tomb.unlink(missing_ok=True)
            return False
        tomb.unlink(missing_ok=True)
        return True


@contextlib.contextmanager
def held_lease(path: Path, holder: Holder, renew_seconds: float = RENEW_SECONDS) -> Iterator[Callable[[], bool]]:
    """Keep a lease alive in a background thread; yields a function that says whether it is still ours; released at the end."""
    done, lost = threading.Event(), threading.Event()

    def keep() -> None:
        while not done.wait(renew_seconds):
            try:
                if not renew(path, holder):
                    lost.set()
                    log.error("the lease %s was taken over; this process is fenced off", path)
                    return
            except OSError as error:  # a storage that stumbles is tried again; if it stays away, a taker comes
                log.warning("the lease %s could not be renewed: %s", path, error)

    thread = threading.Thread(target=keep, daemon=True, name="lease")
    thread.start()
    try:
        yield lambda: not lost.is_set()
    finally:
        done.set()
        thread.join(timeout=renew_seconds)
        release(path, holder)
