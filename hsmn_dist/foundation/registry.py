"""A name -> object table that refuses duplicates, suggests near names, and can be frozen."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from hsmn_dist.foundation.errors import ConfigError

T = TypeVar("T")


def near_name(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to `name`, or None when nothing is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


class Registry(Generic[T]):
    """Objects by name. `what` is the noun used in messages ("dataset", "metric")."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._entries: dict[str, T] = {}
        self._frozen = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files its argument under `name`."""

        def add(value: T) -> T:
            if self._frozen:
                raise RuntimeError(f"the {self.what} registry is frozen; {name!r} came too late")
            if name in self._entries:
                raise RuntimeError(f"{self.what} {name!r} is registered twice")
            self._entries[name] = value
            return value

        return add

    def freeze(self) -> None:
        """Refuse further registrations."""
        self._frozen = True

    def get(self, name: str) -> T:
        """The entry, or a `ConfigError` with the nearest name."""
        if name not in self._entries:
            near = near_name(name, self._entries)
            raise ConfigError(
                f"unknown {self.what} {name!r}",
                allowed=", ".join(sorted(self._entries)),
                action=f"did you mean {near!r}?" if near else f"choose one of the {self.what} names above",
            )
        return self._entries[name]

    def names(self) -> list[str]:
        """Every registered name, sorted."""
        return sorted(self._entries)
