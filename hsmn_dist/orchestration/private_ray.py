"""A Ray cluster of this machine for this process alone: it listens on loopback only and wants a token that nobody else has.

Unusual: Ray 2.60 binds its servers to every interface, whatever `_node_ip_address` says, because it resolves loopback to the machine's
reachable address; with RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, meant for desktops, every one of its processes stays on 127.0.0.1. Ray
reads its authentication settings when it is imported, which may have been long ago; so they are read again here, by the two calls
that Ray's own tests use. A user's RAY_AUTH_MODE stays as it is. docs/decisions/0084.
"""

from __future__ import annotations

import logging
import os
import secrets
from typing import Any

import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # compiled

LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


class PrivateRay:
    """Starts the cluster; `stop` ends it and leaves the environment as it was."""

    def __init__(self) -> None:
        self._before: dict[str, str | None] = {}
        self._served_clusters = True

    def start(self, **arguments: Any) -> None:
        """`ray.init` of a local cluster. `arguments` are Ray's own; log lines of workers stay in their files."""
        wanted = {LOOPBACK_ONLY: "0"}
        if "RAY_AUTH_MODE" not in os.environ:
            wanted |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._before = {name: os.environ.get(name) for name in wanted}
        self._served_clusters = ray_constants.ENABLE_RAY_CLUSTER
        os.environ.update(wanted)
        ray_constants.ENABLE_RAY_CLUSTER = False
        _read_authentication_again()
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                _node_ip_address="127.0.0.1",
                **arguments,
            )
        except BaseException:
            self._restore()
            raise

    def stop(self) -> None:
        """End the cluster."""
        ray.shutdown()
        self._restore()

    def _restore(self) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        ray_constants.ENABLE_RAY_CLUSTER = self._served_clusters
        _read_authentication_again()


def _read_authentication_again() -> None:
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
