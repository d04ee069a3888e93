"""Out of memory is known for what it is, whoever kills the process, and every micro-batch of the run shrinks."""

from __future__ import annotations

from pathlib import Path

import pytest

from hsmn_dist.config.load import load_run_config
from hsmn_dist.foundation.errors import StageFailed
from hsmn_dist.orchestration import oom_kills
from hsmn_dist.orchestration.adjustments import adjusted, shrink_micro_batch
from hsmn_dist.orchestration.curriculum import Run, create_run, run_curriculum
from hsmn_dist.orchestration.failures import FailureKind, FailureRecord, classify, write_failure
from hsmn_dist.orchestration.heartbeat import Heart
from hsmn_dist.orchestration.journal import read_events
from hsmn_dist.orchestration.launcher import raise_for_records
from hsmn_dist.orchestration.oom_kills import OomKills, count_oom_kills
from hsmn_dist.orchestration.stage import stage_specs

DEMO = Path(__file__).resolve().parents[3] / "configs" / "runs" / "hsmn_debug_demo_cpu.yaml"


def write_count(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.events").write_text(f"low 0\nhigh 0\nmax 4\noom 1\noom_kill {count}\noom_group_kill 0\n")


def test_the_count_of_kills_is_that_of_the_own_group_or_of_the_root_that_a_container_sees(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/job/step\n")
    assert count_oom_kills(membership, tmp_path) is None
    write_count(tmp_path, 2)
    assert count_oom_kills(membership, tmp_path) == 2
    write_count(tmp_path / "job" / "step", 7)
    assert count_oom_kills(membership, tmp_path) == 7
    membership.write_text("4:memory:/job\n")
    assert count_oom_kills(membership, tmp_path) is None, "version 1 counts elsewhere"
    assert count_oom_kills(tmp_path / "absent", tmp_path) is None


def make_run(root: Path, *changes: str) -> Run:
    return create_run(load_run_config(DEMO, [f"run_root={root}", "training.micro_batch_examples=4", *changes]))


@pytest.mark.parametrize("leaves_record", [False, True])
def test_ranks_that_the_kernel_killed_for_memory_are_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaves_record: bool
) -> None:
    counts = iter([3, 4])
    monkeypatch.setattr(oom_kills, "count_oom_kills", lambda: next(counts))
    run, kills = make_run(tmp_path), OomKills()
    if leaves_record:  # the neighbour's, whose collective failed
        write_failure(
            run.folder.failure(1), FailureRecord(FailureKind.WORKER_LOST, 1, "h", "closed by peer", "", run.attempt)
        )
    with pytest.raises(StageFailed, match="the kernel killed 1") as failed:
        raise_for_records(stage_specs(run.config, run.folder, run.attempt), "status 137", kills.error_since_start())
    assert failed.value.kind == "out_of_memory"


def test_no_new_kill_and_no_count_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for before, after in [(3, 3), (None, 4), (3, None)]:
        counts = iter([before, after])
        monkeypatch.setattr(oom_kills, "count_oom_kills", lambda counts=counts: next(counts))
        assert OomKills().error_since_start() is None


def test_a_worker_that_rays_memory_monitor_killed_is_out_of_memory() -> None:
    text = "Task was killed due to the node running low on memory. Memory on the node was 30.1GB / 31.0GB (0.97)"
    assert classify(RuntimeError(text)) is FailureKind.OUT_OF_MEMORY


def sizes(run: Run) -> tuple[int, int]:
    now = adjusted(run.config, run.folder)
    return now.training.micro_batch_examples, now.continual.fisher.micro_batch_examples


def test_the_micro_batch_of_the_fisher_shrinks_too(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert sizes(run) == (4, 8)
    assert "training.micro_batch_examples 2" in (shrink_micro_batch(run.config, run.folder) or "")
    assert sizes(run) == (2, 4)


def test_memory_that_ran_out_in_the_fisher_shrinks_it_alone_down_to_one_example_and_begins_it_anew(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path, "training.micro_batch_examples=1")
    unfinished = run.folder.stage(0, "word_problems").fisher_unfinished
    unfinished.mkdir(parents=True)
    (unfinished / "progress.json").write_text("{}")
    seen: list[tuple[int, int]] = []

    class RunsOutInTheFisher:
        def launch(self, specs: object) -> None:
            seen.append(sizes(run))
            assert unfinished.exists() == (len(seen) == 1), "sums of another micro-batch would be refused"
            Heart(run.folder.path / "heartbeats", 0).beat(phase="fisher")
            raise StageFailed("no memory", kind="out_of_memory")

        def stop(self) -> None:
            return

    with pytest.raises(StageFailed, match="no memory"):
        run_curriculum(run, RunsOutInTheFisher(), lambda _: None, lambda _: None)
    assert seen == [(1, 8), (1, 4), (1, 2), (1, 1)]
    changes = [event["change"] for event in read_events(run.folder.journal) if event["event"] == "retried"]
    assert changes[-1].endswith("continual.fisher.micro_batch_examples 1")
