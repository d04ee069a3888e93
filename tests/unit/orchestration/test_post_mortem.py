"""`runs show` of a run that stopped: every row of the table of failures becomes sentences that an operator can act on."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hsmn_dist.config.load import load_run_config
from hsmn_dist.foundation.files import write_manifest
from hsmn_dist.orchestration.curriculum import Run, create_run, reopen_run
from hsmn_dist.orchestration.failures import POLICIES, FailureKind, FailureRecord, write_failure
from hsmn_dist.orchestration.heartbeat import Heart
from hsmn_dist.orchestration.journal import append_event
from hsmn_dist.orchestration.post_mortem import explain
from hsmn_dist.orchestration.run_folder import resume_command

DEMO = Path(__file__).resolve().parents[3] / "configs" / "runs" / "hsmn_debug_demo_cpu.yaml"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = create_run(load_run_config(DEMO, [f"run_root={tmp_path}"]))
    for rank in (0, 1):
        Heart(made.folder.path / "heartbeats", rank).beat(
            stage="stdlib_code", stage_index=1, phase="train", step=30 + rank, num_steps=150
        )
    (made.folder.stage(0, "word_problems").path).mkdir(parents=True)
    made.folder.stage(0, "word_problems").complete.touch()
    kept = made.folder.stage(1, "stdlib_code").checkpoints / "step_00000025"
    kept.mkdir(parents=True)
    (kept / "state.json").write_text("{}")
    write_manifest(kept, "manifest.json", ["state.json"], {})
    (made.folder.stage(1, "stdlib_code").checkpoints / "step_00000030").mkdir()
    return made


def fail(run: Run, kind: FailureKind) -> None:
    record = FailureRecord(kind, 1, "node-b", "the message", "the traceback", run.attempt)
    write_failure(run.folder.failure(1), record)
    found, action = f"rank 1 on node-b: {kind.value} in person", f"{POLICIES[kind].advice}; look at the record"
    append_event(
        run.folder.journal, "run_failed", attempt=run.attempt, kind=kind.value, rank=1, found=found, action=action
    )


@pytest.mark.parametrize("kind", list(FailureKind))
def test_every_kind_of_failure_is_explained(kind: FailureKind, run: Run) -> None:
    fail(run, kind)
    lines = explain(run.folder)
    text = "\n".join(lines)
    assert f"what failed: {POLICIES[kind].what} ({kind.value}): rank 1 on node-b: {kind.value} in person" in text
    assert "where: rank 1 on node-b, stage stdlib_code, train, step 31 of 150" in text
    assert "rank 0 on" in text and "step 30 of 150" in text
    assert "tried: nothing was started again" in text
    assert "safe: the checkpoint of step 25 of stage 01_stdlib_code" in text, "a folder without a manifest is none"
    assert f"what to do: {POLICIES[kind].advice}" in text
    assert text.count(POLICIES[kind].advice) == 1
    assert str(run.folder.failure(1)) in text
    assert lines[-1] == f"resume: hsmn-dist run --resume {run.folder.run_id} --run-root {run.folder.root}"


def test_what_was_tried_is_told(run: Run) -> None:
    journal = run.folder.journal
    for group in (1, 2, 3):
        append_event(journal, "stage_started", attempt=run.attempt, group=group, stage=1, name="stdlib_code")
    append_event(
        journal,
        "retried",
        attempt=run.attempt,
        kind="out_of_memory",
        rank=0,
        found="x",
        number=1,
        allowed=8,
        change="started again with training.micro_batch_examples 2, the global batch as it was",
    )
    append_event(journal, "run_resumed", attempt="b")
    fail(run, FailureKind.OUT_OF_MEMORY)
    text = "\n".join(explain(run.folder))
    assert "tried: after the memory was used up, started again with training.micro_batch_examples 2" in text
    assert "tried: the ranks were started 3 times" in text
    assert "tried: it was resumed 1 times" in text


def test_a_failure_without_any_record_or_heartbeat_is_told_too(tmp_path: Path) -> None:
    made = create_run(load_run_config(DEMO, [f"run_root={tmp_path}"]))
    append_event(made.folder.journal, "run_failed", attempt=made.attempt, found="no Ray", action="start Ray")
    lines = explain(made.folder)
    assert "where: before any rank was started" in lines
    assert any(line.startswith("what to do: ") and "start Ray" in line for line in lines)


def test_a_preempted_a_silent_and_a_running_run_differ(run: Run) -> None:
    assert explain(run.folder)[0] == "it is running"
    assert "no rank gave a sign of life for" in explain(run.folder, now=time.time() + 300)[0]
    append_event(run.folder.journal, "run_preempted", attempt=run.attempt)
    lines = explain(run.folder)
    assert "exit code 75" in lines[0] and "what to do: start the same command again; it resumes" in lines
    append_event(run.folder.journal, "run_completed", attempt=run.attempt)
    assert explain(run.folder) == [f"scorecard: {run.folder.scorecard}"]


def test_the_resume_command_names_the_root_only_where_it_must(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resume_command(run.folder).endswith(f"--run-root {tmp_path}")
    monkeypatch.setattr("hsmn_dist.orchestration.run_folder.DEFAULT_ROOT", str(tmp_path))
    assert resume_command(run.folder) == f"hsmn-dist run --resume {run.folder.run_id}"


def test_a_driver_that_is_gone_is_known_at_once_on_its_own_host(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    made = create_run(load_run_config(DEMO, [f"run_root={tmp_path}"]))
    append_event(made.folder.journal, "run_resumed", attempt=made.attempt, host=platform.node(), pid=child.pid)
    lines = explain(made.folder)
    assert f"its driver, process {child.pid} on {platform.node()}, is gone" in lines[0]
    assert "what to do: start the same command again; it resumes" in lines
    Heart(made.folder.path / "heartbeats", 0).beat(phase="train")
    assert explain(made.folder)[0] == "it is running", "a rank breathes: the number is of another container"


def test_a_run_that_has_just_begun_is_running(tmp_path: Path) -> None:
    made = create_run(load_run_config(DEMO, [f"run_root={tmp_path}"]))
    assert explain(made.folder)[0] == "it is running"


def test_a_damaged_checkpoint_is_not_called_safe(run: Run) -> None:
    newer = run.folder.stage(1, "stdlib_code").checkpoints / "step_00000030"
    (newer / "state.json").write_text("{}")
    write_manifest(newer, "manifest.json", ["state.json"], {})
    assert any("safe: the checkpoint of step 30" in line for line in explain(run.folder))
    (newer / "state.json").write_text("[]")
    (safe,) = [line for line in explain(run.folder) if line.startswith("safe:")]
    assert "the checkpoint of step 25" in safe and "damaged and passed over: step_00000030" in safe


def test_a_replaced_driver_s_end_is_not_the_runs(run: Run) -> None:
    newer = reopen_run(run.folder)
    fail(run, FailureKind.UNKNOWN)  # the old attempt's last line
    assert explain(run.folder)[0] == "it is running"
    append_event(run.folder.journal, "run_failed", attempt=newer.attempt, kind="hung", found="the new one", action="x")
    fail(run, FailureKind.UNKNOWN)
    assert "the new one" in explain(run.folder)[0]
