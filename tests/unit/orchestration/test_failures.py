"""Failures are classified by one table, and the launcher's error names the culprit and not its neighbours."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest

from hsmn_dist.config.load import load_run_config
from hsmn_dist.foundation.errors import ConfigError, DataError, Preempted, StageFailed
from hsmn_dist.orchestration.attempt import claim
from hsmn_dist.orchestration.curriculum import create_run, reopen_run
from hsmn_dist.orchestration.failures import (
    POLICIES,
    FailureKind,
    FailureRecord,
    classify,
    must_stop,
    read_failures,
    write_failure,
)
from hsmn_dist.orchestration.heartbeat import Beat, Heart, read_beats, silent_rank
from hsmn_dist.orchestration.journal import append_event, read_events
from hsmn_dist.orchestration.launcher import clear_failures, raise_for_records
from hsmn_dist.orchestration.run_folder import RunFolder
from hsmn_dist.orchestration.stage import stage_specs

DEMO = Path(__file__).resolve().parents[3] / "configs" / "runs" / "hsmn_debug_demo_cpu.yaml"


def record(kind: FailureKind, rank: int, attempt: str = "a") -> FailureRecord:
    return FailureRecord(kind, rank, "host", f"message of rank {rank}", "trace", attempt, "found", "allowed", "action")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DataError("a", allowed="b", action="c"), FailureKind.BAD_INPUT),
        (Preempted("a", allowed="b", action="c"), FailureKind.PREEMPTED),
        (StageFailed("a", kind="non_finite"), FailureKind.NON_FINITE),
        (StageFailed("a", kind="something new"), FailureKind.UNKNOWN),
        (OSError(errno.ENOSPC, "no space"), FailureKind.DISK_FULL),
        (MemoryError(), FailureKind.OUT_OF_MEMORY),
        (RuntimeError("CUDA out of memory"), FailureKind.OUT_OF_MEMORY),
        (RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"), FailureKind.WORKER_LOST),
        (KeyError("a defect"), FailureKind.UNKNOWN),
    ],
)
def test_errors_are_classified(error: BaseException, kind: FailureKind) -> None:
    assert classify(error) is kind


def test_every_kind_has_a_policy() -> None:
    assert set(POLICIES) == set(FailureKind)


def test_the_culprit_comes_before_ranks_that_died_of_it(tmp_path: Path) -> None:
    write_failure(tmp_path / "rank_00000.json", record(FailureKind.WORKER_LOST, 0))
    assert not must_stop(read_failures(tmp_path, "a"))
    write_failure(tmp_path / "rank_00001.json", record(FailureKind.UNKNOWN, 1))
    write_failure(tmp_path / "rank_00002.json", record(FailureKind.NON_FINITE, 2))
    write_failure(tmp_path / "rank_00003.json", record(FailureKind.BAD_INPUT, 3, attempt="older"))
    assert [item.rank for item in read_failures(tmp_path, "a")] == [2, 1, 0]
    assert must_stop(read_failures(tmp_path, "a"))


def test_records_become_the_error_that_explains_the_end(tmp_path: Path) -> None:
    run = create_run(load_run_config(DEMO, [f"run_root={tmp_path}"]))
    specs = stage_specs(run.config, run.folder, run.attempt)
    with pytest.raises(StageFailed, match="without a word") as lost:
        raise_for_records(specs, "status 137")
    assert lost.value.kind == "worker_lost"
    run.folder.stop_request.touch()
    with pytest.raises(Preempted):
        raise_for_records(specs, "status 0")
    clear_failures(run.folder)
    write_failure(run.folder.failure(0), record(FailureKind.BAD_INPUT, 0, run.attempt))
    with pytest.raises(ConfigError) as bad:
        raise_for_records(specs, "status 1")
    assert (bad.value.found, bad.value.allowed, bad.value.action) == ("found", "allowed", "action")
    clear_failures(run.folder)
    write_failure(run.folder.failure(1), record(FailureKind.OUT_OF_MEMORY, 1, run.attempt))
    with pytest.raises(StageFailed, match="rank 1 on host") as failed:
        raise_for_records(specs, "status 1")
    assert "micro_batch_examples" in failed.value.action


def test_a_resumed_run_fences_the_attempt_before_it(tmp_path: Path) -> None:
    run = create_run(load_run_config(DEMO, [f"run_root={tmp_path}"]))
    old = claim(run.folder, run.attempt)
    old.check()
    again = reopen_run(RunFolder(run.folder.path))
    with pytest.raises(StageFailed, match="may not commit"):
        old.check()
    with pytest.raises(StageFailed, match="may not commit"):
        claim(run.folder, run.attempt)
    claim(again.folder, again.attempt).check()
    assert [event["event"] for event in read_events(run.folder.journal)] == ["run_started", "run_resumed"]


def test_a_restarted_group_fences_the_group_before_it(tmp_path: Path) -> None:
    run = create_run(load_run_config(DEMO, [f"run_root={tmp_path}"]))
    first = claim(run.folder, run.attempt)
    second = claim(run.folder, run.attempt)
    second.check()
    with pytest.raises(StageFailed, match="group 1 was replaced"):
        first.check()


def test_a_complete_or_changed_run_is_not_resumed(tmp_path: Path) -> None:
    run = create_run(load_run_config(DEMO, [f"run_root={tmp_path}"]))
    text = run.folder.config.read_text()
    run.folder.config.write_text(text.replace("max_steps: 150", "max_steps: 151"))
    with pytest.raises(Exception, match="SHA-256 is not the one"):
        reopen_run(run.folder)
    run.folder.config.write_text(text)
    append_event(run.folder.journal, "run_completed")
    with pytest.raises(ConfigError, match="is complete"):
        reopen_run(run.folder)


def test_a_silent_rank_is_found_and_named(tmp_path: Path) -> None:
    for rank in (0, 1):
        Heart(tmp_path, rank).beat(stage="math", phase="train", step=7, num_steps=9)
    beats = read_beats(tmp_path)
    now = time.time()
    assert [beat.rank for beat in beats] == [0, 1]
    assert silent_rank(beats, 60, now) is None
    late = [beats[0], Beat(**{**beats[1].__dict__, "time": now - 100})]
    silent = silent_rank(late, 60, now)
    assert silent is not None
    assert (silent.rank, silent.step, silent.phase) == (1, 7, "train")
