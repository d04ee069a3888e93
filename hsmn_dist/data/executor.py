"""Where preparation's tasks run: here, in processes of this machine, or wherever a given `Executor` takes them.

A task is a function of the module scope and one picklable item; it reads and writes a folder that every worker sees. Results
may come in any order. Orchestration brings an executor of its own that spreads tasks over a cluster.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Executor(Protocol):
    """Runs one function over many items."""

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Results in the order in which they are done. An error of a task is raised here, and ends the others."""
        ...


class InlineExecutor:
    """One item after the other, in this process."""

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Results in the order of the items."""
        return map(function, items)


class ProcessExecutor:
    """Processes of this machine. They are started anew (spawn): a forked copy of a threaded parent can hang."""

    def __init__(self, num_processes: int) -> None:
        self._num_processes = num_processes

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Results as they are done."""
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self._num_processes, mp_context=context) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                for future in futures:
                    future.cancel()


def build_executor(num_processes: int, num_items: int) -> Executor:
    """The cheapest executor that uses up to `num_processes`."""
    useful = min(num_processes, num_items)
    return ProcessExecutor(useful) if useful > 1 else InlineExecutor()
