"""Failures are classified by one table, and the launcher's error names the culprit and not its neighbours."""

from __future__ import annotations

import errno
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from hsmn_dist.config.load import load_run_config
from hsmn_dist.data.shards.remote import StoreAway
from hsmn_dist.foundation.errors import ConfigError, DataError, Preempted, StageFailed
from hsmn_dist.orchestration.adjustments import adjusted, shrink_micro_batch
from hsmn_dist.orchestration.attempt import claim
from hsmn_dist.orchestration.curriculum import Run, create_run, reopen_run, run_curriculum
from hsmn_dist.orchestration.failures import (
    POLICIES,
    FailureKind,
    FailureRecord,
    classify,
    must_stop,
    read_failures,
    reserve_failure,
    write_failure,
)
from hsmn_dist.orchestration.heartbeat import Beat, Heart, has_ended, read_beats, silent_rank
from hsmn_dist.orchestration.journal import append_event, read_events, run_status
from hsmn_dist.orchestration.launcher import clear_failures, raise_for_records
from hsmn_dist.orchestration.run_folder import RunFolder
from hsmn_dist.orchestration.stage import StageSpec, stage_specs

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
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
            FailureKind.OUT_OF_MEMORY,
        ),
        (OSError(errno.EDQUOT, "quota"), FailureKind.DISK_FULL),
        (StageFailed("a", kind="loss_spike"), FailureKind.LOSS_SPIKE),
        (StageFailed("a", kind="fenced"), FailureKind.FENCED),
        (RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"), FailureKind.WORKER_LOST),
        (StoreAway("s3://b/x: TimeoutError"), FailureKind.STORE_AWAY),
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
    run.folder.stop_request.unlink()
    write_failure(run.folder.failure(0), record(FailureKind.BAD_INPUT, 0, run.attempt))
    with pytest.raises(ConfigError) as bad:
        raise_for_records(specs, "status 1")
    assert (bad.value.found, bad.value.allowed, bad.value.action) == ("found", "allowed", "action")
    clear_failures(run.folder, run.attempt)
    write_failure(run.folder.failure(1), record(FailureKind.OUT_OF_MEMORY, 1, run.attempt))
    with pytest.raises(StageFailed, match="rank 1 on host") as failed:
        raise_for_records(specs, "status 1")
    assert "zero_stage" in failed.value.action


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


def stand_still(rank: int, step: int, since: float, breathes: bool, now: float) -> Beat:
    return Beat(rank, "host", "math", 0, "train", step, 9, None, None, now - since, now if breathes else now - since, 1)


def test_the_rank_that_does_not_breathe_is_blamed_and_not_those_that_wait_for_it() -> None:
    now = time.time()
    waiting, stopped = stand_still(0, 7, 101, True, now), stand_still(1, 7, 100, False, now)
    assert silent_rank([waiting, stopped], 60, now) is stopped
    behind = stand_still(1, 6, 100, True, now)
    assert silent_rank([waiting, behind], 60, now) is behind, "all breathe: the one furthest behind holds the others up"


def test_a_rank_that_died_is_not_taken_for_a_silent_one(tmp_path: Path) -> None:
    Heart(tmp_path, 0).beat(phase="train", step=3)
    (beat,) = read_beats(tmp_path)
    assert not has_ended(beat), "this very process"
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert has_ended(replace(beat, pid=child.pid))
    assert not has_ended(replace(beat, pid=child.pid, host="elsewhere")), (
        "nothing is known of another machine's processes"
    )


def test_a_heart_breathes_while_its_rank_waits(tmp_path: Path) -> None:
    heart = Heart(tmp_path, 0).start()
    heart.beat(phase="train", step=3)
    before = read_beats(tmp_path)[0]
    deadline = time.monotonic() + 20
    while read_beats(tmp_path)[0].alive <= before.alive:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    heart.stop()
    assert read_beats(tmp_path)[0].time == before.time


class FailingLauncher:
    """Fails with the given errors, one a launch, then ends every stage."""

    def __init__(self, run: Run, errors: list[StageFailed]) -> None:
        self.run, self.errors = run, errors
        self.micro_batches: list[int] = []

    def launch(self, specs: Sequence[StageSpec]) -> None:
        self.micro_batches.append(adjusted(self.run.config, self.run.folder).training.micro_batch_examples)
        if self.errors:
            raise self.errors.pop(0)
        for spec in specs:
            place = self.run.folder.stage(spec.index, spec.name).complete
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()

    def stop(self) -> None:
        return


def curriculum_of(tmp_path: Path, kinds: list[str]) -> tuple[Run, FailingLauncher]:
    run = create_run(load_run_config(DEMO, [f"run_root={tmp_path}", "training.micro_batch_examples=4"]))
    return run, FailingLauncher(run, [StageFailed(f"a {kind}", kind=kind, rank=1) for kind in kinds])


def nothing(_: Run) -> None:
    return


def test_an_allocator_that_gave_up_gets_smaller_micro_batches_and_the_same_global_batch(tmp_path: Path) -> None:
    run, launcher = curriculum_of(tmp_path, ["out_of_memory", "out_of_memory"])
    run_curriculum(run, launcher, nothing, nothing)
    assert launcher.micro_batches == [4, 2, 1]
    again = adjusted(run.config, run.folder)
    assert again.training.global_batch_examples == run.config.training.global_batch_examples
    retried = [event for event in read_events(run.folder.journal) if event["event"] == "retried"]
    assert [event["kind"] for event in retried] == ["out_of_memory"] * 2
    assert "micro_batch_examples 1" in retried[-1]["change"]


def test_memory_that_does_not_suffice_for_one_example_ends_the_run(tmp_path: Path) -> None:
    run, launcher = curriculum_of(tmp_path, ["out_of_memory"] * 3)
    with pytest.raises(StageFailed, match="out_of_memory"):
        run_curriculum(run, launcher, nothing, nothing)
    assert launcher.micro_batches == [4, 2, 1]


@pytest.mark.parametrize("kind", list(FailureKind))
def test_each_kind_is_retried_exactly_as_often_as_its_row_says(kind: FailureKind, tmp_path: Path) -> None:
    budget = POLICIES[kind].retries
    if POLICIES[kind].halves_micro_batch:
        budget = min(budget, 2)  # 4, 2, 1
    run, launcher = curriculum_of(tmp_path / "enough", [kind.value] * budget)
    run_curriculum(run, launcher, nothing, nothing)
    run, launcher = curriculum_of(tmp_path / "too_many", [kind.value] * (budget + 1))
    with pytest.raises(StageFailed, match=kind.value):
        run_curriculum(run, launcher, nothing, nothing)
    assert run_status(read_events(run.folder.journal)) == "failed"


def test_a_micro_batch_shrinks_to_its_divisors(tmp_path: Path) -> None:
    config = load_run_config(
        DEMO, [f"run_root={tmp_path}", "training.micro_batch_examples=6", "training.global_batch_examples=12"]
    )
    run = create_run(config)
    sizes = []
    while shrink_micro_batch(config, run.folder):
        sizes.append(adjusted(config, run.folder).training.micro_batch_examples)
    assert sizes == [3, 1]


def test_a_full_disk_can_still_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "rank_00000.json"
    reserve_failure(place)
    assert read_failures(tmp_path, "a") == []

    def no_space(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hsmn_dist.orchestration.failures.write_json", no_space)
    write_failure(place, record(FailureKind.DISK_FULL, 0))
    assert [item.kind for item in read_failures(tmp_path, "a")] == [FailureKind.DISK_FULL]


def test_a_journal_that_takes_no_line_does_not_hide_the_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, launcher = curriculum_of(tmp_path, ["disk_full"])

    def lose_the_journal(_: Run) -> None:
        run.folder.journal.unlink()
        run.folder.journal.mkdir()  # what is written to it fails, as on a full disk

    with pytest.raises(StageFailed, match="disk_full"):
        run_curriculum(run, launcher, lose_the_journal, nothing)
    assert "the journal could not be written" in caplog.text
