"""Seeded mutation of bytes and JSON values, and a guard around what reads them: three-part errors, no hang, no code run."""

from __future__ import annotations

import collections
import copy
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hsmn_dist.foundation.errors import HsmnError

HANG_SECONDS = 10.0
CODE_EVENTS = {
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.mkdir",
    "os.remove",
    "os.symlink",
    "subprocess.Popen",
    "pickle.find_class",
    "socket.connect",
    "socket.bind",
    "ctypes.dlopen",
    "pty.spawn",
    "webbrowser.open",
}
"""Audit events of the interpreter that no reader of data has any business to cause."""

_armed: list[str] = []
_is_armed = False
_is_hooked = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _is_armed:
        return
    if event in CODE_EVENTS or (event == "open" and _opens_for_writing(arguments)):
        _armed.append(f"{event}{arguments!r}"[:200])


def _opens_for_writing(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if isinstance(flags, int) else False


class Hang(BaseException):
    """Out of the reach of `except Exception`."""


def _alarm(*_: object) -> None:
    raise Hang


@contextmanager
def watched(may_write: bool = False) -> Iterator[None]:
    """Fail when the block takes `HANG_SECONDS`, starts a process, loads a pickle's class, or (else) writes a file."""
    global _is_armed, _is_hooked
    if not _is_hooked:
        sys.addaudithook(_hook)
        _is_hooked = True
    _armed.clear()
    before = signal.signal(signal.SIGALRM, _alarm)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    _is_armed = True
    try:
        yield
    except Hang:
        raise AssertionError(f"it took more than {HANG_SECONDS:g} s") from None
    finally:
        _is_armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    bad = [event for event in _armed if not (may_write and event.startswith("open"))]
    assert not bad, f"reading caused {bad}"


def outcome(read: Callable[[], object]) -> str:
    """ "read", or the name of the typed error; every error has its three parts, and nothing else comes out."""
    with watched():
        try:
            read()
        except HsmnError as error:
            assert error.found and error.allowed and error.action, f"an error without its three parts: {error!r}"
            return type(error).__name__
    return "read"


_INTERESTING = [
    b"\0",
    b"\xff",
    b"\x7f",
    b"-",
    b"9" * 5,
    b"\0" * 8,
    b"../../",
    b"/",
    b"\n",
    b'"',
    b"}",
    b"[",
    b"2",
    b"\x80\4.",
]


def mutate(rng: random.Random, data: bytes, most: int = 4) -> bytes:
    """One to `most` random edits: bits, bytes, cuts, repeats, swaps, and strings that parsers stumble over."""
    found = bytearray(data)
    for _ in range(rng.randint(1, most)):
        if not found:
            return bytes(found)
        place, kind = rng.randrange(len(found)), rng.randrange(8)
        if kind == 0:
            found[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[place] = rng.randrange(256)
        elif kind == 2:
            del found[place : place + rng.choice([1, 2, 7, 100, 512, len(found)])]
        elif kind == 3:
            found[place:place] = found[place : place + rng.choice([1, 8, 512])]
        elif kind == 4:
            found[place:place] = rng.choice(_INTERESTING)
        elif kind == 5:
            piece = rng.choice(_INTERESTING)
            found[place : place + len(piece)] = piece
        elif kind == 6:
            other = rng.randrange(len(found))
            found[place], found[other] = found[other], found[place]
        else:
            del found[place:]
    return bytes(found)


_VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    -(2**63) - 1,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../etc/passwd",
    "/etc/passwd",
    "pipe:touch owned",
    "a\0b",
    "<O",
    "|O",
    "<u4",
    "<f8",
    "V100000000",
    [],
    [[]],
    {},
    {"name": 1},
    [1, "x", None],
    "\ud800",
]


def mutate_json(rng: random.Random, value: Any, most: int = 3) -> Any:
    """A copy with some values replaced, keys dropped, renamed or doubled, at random depths."""
    found = copy.deepcopy(value)
    for _ in range(rng.randint(1, most)):
        node: Any = found
        for _ in range(rng.randint(0, 6)):
            inner = list(node.values()) if isinstance(node, dict) else list(node) if isinstance(node, list) else []
            inner = [item for item in inner if isinstance(item, dict | list) and item]
            if not inner or rng.random() < 0.25:
                break
            node = rng.choice(inner)
        if isinstance(node, dict) and node:
            key, kind = rng.choice(list(node)), rng.randrange(6)
            if kind == 0:
                del node[key]
            elif kind == 1:
                node[rng.choice(["x", "", "format", "__class__", "name"])] = node.pop(key)
            elif kind == 2 and isinstance(node[key], int):
                node[key] += rng.choice([-1, 1, 512, 2**32])
            else:
                node[key] = copy.deepcopy(rng.choice(_VALUES))
        elif isinstance(node, list) and node:
            place = rng.randrange(len(node))
            if rng.random() < 0.3:
                node.append(copy.deepcopy(node[place]))
            elif rng.random() < 0.3:
                del node[place]
            else:
                node[place] = copy.deepcopy(rng.choice(_VALUES))
    return rng.choice(_VALUES) if rng.random() < 0.01 else found


def dump_json(value: Any) -> bytes:
    """JSON as a hostile writer would have it (NaN, lone surrogates escaped)."""
    return json.dumps(value).encode()


class Tally:
    """Counts outcomes; a failure names the case's seed, so that it can be run again alone."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.counts: collections.Counter[str] = collections.Counter()

    def case(self, seed: int, read: Callable[[], object]) -> None:
        """Run one case."""
        try:
            self.counts[outcome(read)] += 1
        except BaseException as error:
            raise AssertionError(f"{self.name}, case {seed}: {type(error).__name__}: {error}") from error

    @property
    def total(self) -> int:
        """Cases so far."""
        return sum(self.counts.values())

    def report(self) -> str:
        """One line."""
        parts = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))
        return f"{self.name}: {self.total} cases ({parts})"
