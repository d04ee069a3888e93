from __future__ import annotations

import os
import subprocess
import sys

import pytest

ray = pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")

from hsmn_dist.orchestration.private_ray import PrivateRay  # noqa: E402

pytestmark = pytest.mark.ray

STRANGER = """
import sys
from ray._raylet import GcsClient
try:
    print("joined", GcsClient(address=sys.argv[1]).cluster_id)
except Exception as error:
    print(type(error).__name__)
"""


def listening() -> set[str]:
    """Addresses on which this process and its children listen."""
    me = psutil.Process()
    found = set()
    for process in [me, *me.children(recursive=True)]:
        for connection in process.net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN:
                found.add(connection.laddr.ip.removeprefix("::ffff:"))
    return found


def test_a_cluster_of_our_own_listens_on_loopback_alone_and_refuses_who_has_no_token() -> None:
    before = dict(os.environ)
    heard = listening()
    private = PrivateRay()
    private.start(num_cpus=1)
    try:
        assert ray.get(ray.remote(lambda: 3).remote()) == 3
        assert "127.0.0.1" in listening()
        assert listening() - heard <= {"127.0.0.1", "::1"}
        token = os.environ["RAY_AUTH_TOKEN"]
        assert len(token) == 64 and os.environ["RAY_AUTH_MODE"] == "token"
        address = ray.get_runtime_context().gcs_address
        assert address.startswith("127.0.0.1:")
        said = {}
        for name, changes in (
            ("owner", {}),
            ("stranger", {"RAY_AUTH_MODE": ""}),
            ("guess", {"RAY_AUTH_TOKEN": "0" * 64}),
        ):
            environment = {key: value for key, value in {**os.environ, **changes}.items() if value}
            command = [sys.executable, "-c", STRANGER, address]
            said[name] = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=60
            ).stdout.split()
    finally:
        private.stop()
    assert said == {
        "owner": ["joined", said["owner"][1]],
        "stranger": ["AuthenticationError"],
        "guess": ["AuthenticationError"],
    }
    after = {name: value for name, value in os.environ.items() if name in before or name.startswith("RAY_AUTH")}
    assert after == before, "the next cluster is not asked for this one's token"
