"""Processes that the kernel killed because memory ran out: they leave no word, but their control group counts them."""

from __future__ import annotations

from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def count_oom_kills(membership: Path = Path("/proc/self/cgroup"), root: Path = CGROUPS) -> int | None:
    """Kills of this process's control group and of those below it; None where the system does not tell (version 1, no Linux)."""
    try:
        line = next(line for line in membership.read_text().splitlines() if line.startswith("0::"))
        own = root / line[3:].strip("/")
        place = (
            own if (own / "memory.events").is_file() else root
        )  # inside a container the own group is the root of what is seen
        rows = dict(row.split() for row in (place / "memory.events").read_text().splitlines())
        return int(rows["oom_kill"])
    except (OSError, StopIteration, KeyError, ValueError):
        return None


class OomKills:
    """Compares the count with that of its making."""

    def __init__(self) -> None:
        self._before = count_oom_kills()

    def error_since_start(self) -> MemoryError | None:
        """What the kernel did in the meantime, as an error."""
        now = count_oom_kills()
        if self._before is None or now is None or now <= self._before:
            return None
        return MemoryError(f"the kernel killed {now - self._before} processes because memory ran out")
