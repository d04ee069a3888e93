"""One logger set-up for every process: rank prefix, rank-0 filter, warn once; secrets are hidden in lines and tracebacks."""

from __future__ import annotations

import logging
import sys

from hsmn_dist.foundation.redact import redact

_ROOT = "hsmn_dist"
_warned: set[str] = set()


def logger(name: str) -> logging.Logger:
    """The project's logger for a module; pass `__name__`."""
    return logging.getLogger(name if name.startswith(_ROOT) else f"{_ROOT}.{name}")


class RedactingFormatter(logging.Formatter):
    """Hides secrets in the whole text of a record, its traceback included."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, or lines, of a record."""
        return redact(super().format(record))


def configure_logging(rank: int = 0, *, verbose: bool = False) -> None:
    """Send records to standard error. Ranks above 0 only speak of warnings and errors."""
    root = logging.getLogger(_ROOT)
    root.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    form = f"%(asctime)s rank{rank} %(levelname)s %(name)s: %(message)s"
    handler.setFormatter(RedactingFormatter(form, "%H:%M:%S"))
    root.addHandler(handler)
    root.propagate = False
    quiet = logging.WARNING if rank > 0 else logging.INFO
    root.setLevel(logging.DEBUG if verbose else quiet)


def warn_once(log: logging.Logger, key: str, message: str) -> None:
    """Warn the first time `key` is seen in this process, and never again."""
    if key not in _warned:
        _warned.add(key)
        log.warning(message)
