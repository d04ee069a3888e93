"""A run under a seeded schedule of faults ends with the bits of an undisturbed one; `make chaos` prints and keeps the table."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from tests.support import chaos
from tests.support.chaos_plan import changing_schedule, full_schedule, short_schedule

KINDS = {
    "worker killed",
    "node lost",
    "driver killed",
    "raylet killed",
    "Ray head lost",
    "tracker down",
    "disk full",
    "object store slow",
    "object store failing",
    "object store gone",
    "corrupt shard",
    "truncated checkpoint",
    "death before a save (folder_made)",
    "death during a save (shards_written)",
    "death during a save (hashes_exchanged)",
    "death during a save (state_written)",
    "death during a save (manifest_written)",
    "death after a save (renamed)",
    "death after a save (pruned)",
    "out of memory",
    "non-finite gradient",
    "loss spike",
    "hung rank",
    "straggler",
    "SIGTERM, twice",
    "SIGUSR1",
}


@pytest.mark.parametrize("seed", range(20))
def test_every_schedule_has_every_kind_in_an_order_that_can_happen(seed: int) -> None:
    faults = full_schedule(seed)
    assert len(faults) >= 30
    kinds = Counter(fault.kind for fault in [*faults, *changing_schedule()])
    assert set(kinds) >= KINDS
    places = [(fault.stage, fault.step) for fault in faults if fault.point != "start"]
    assert places == sorted(places) and len({fault.id for fault in faults}) == len(faults)
    ray = [fault for fault in faults if fault.launcher == "ray"]
    first = faults.index(ray[0])
    assert faults[first : first + len(ray)] == ray, "the cluster is started once"
    assert faults[first - 1].exit_code is not None and ray[-1].exit_code is not None, (
        "a launcher changes between attempts"
    )
    for before, after in itertools.pairwise(faults):
        assert after.point != "start" or before.restarts, "a stage must start anew"


def test_a_short_chaos_ends_with_the_bits_of_the_undisturbed_run(tmp_path: Path) -> None:
    chaos.main(["--short", "--folder", str(tmp_path / "chaos"), "--seed", "3"])
    report = json.loads((tmp_path / "chaos" / "report.json").read_text())
    rows = report["bits"]["faults"]
    assert [row["kind"] for row in rows] == [fault.kind for fault in short_schedule(3)]
    assert all(row["seconds"] is not None for row in rows)
    assert report["bits"]["epochs"] == [2, 2, 2]


@pytest.mark.slow
@pytest.mark.ray
def test_a_full_chaos_ends_with_the_bits_of_the_undisturbed_run(tmp_path: Path) -> None:
    chaos.main(["--folder", str(tmp_path / "chaos")])
    report = json.loads((tmp_path / "chaos" / "report.json").read_text())
    assert len(report["bits"]["faults"]) >= 30 and len(report["numbers"]["faults"]) == 4
