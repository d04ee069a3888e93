"""Preparation's tasks as Ray tasks: the same functions and items as on one machine, spread over a cluster.

Every node must see the folder that is written (shared storage); results come back in the order in which they are done.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import ray

from hsmn_dist.foundation.errors import HsmnError
from hsmn_dist.orchestration.private_ray import PrivateRay

T = TypeVar("T")
R = TypeVar("R")


class RayExecutor:
    """An `Executor` (see `data.executor`) over a Ray cluster; a local one is started when no address is given."""

    def __init__(self, address: str = "") -> None:
        if not ray.is_initialized():
            if address:
                ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
            else:
                PrivateRay().start()

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Results as they are done; the first error is raised as itself and cancels the rest."""
        task = ray.remote(function)
        pending = [task.remote(item) for item in items]
        try:
            while pending:
                done, pending = ray.wait(pending, num_returns=1)
                yield ray.get(done[0])
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, HsmnError) else error from None
        finally:
            for reference in pending:
                ray.cancel(reference)
