"""A secret in the environment, in an error or in a setting reaches no file, log or tracker of a run."""

from __future__ import annotations

import logging
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import yaml

from hsmn_dist.cli.main import run_command
from hsmn_dist.config.load import load_run_config, write_resolved
from hsmn_dist.config.tracking import TrackingConfig
from hsmn_dist.foundation.errors import ConfigError, StageFailed
from hsmn_dist.foundation.log import configure_logging, logger
from hsmn_dist.foundation.redact import HIDDEN
from hsmn_dist.orchestration.failures import FailureKind, FailureRecord, write_failure
from hsmn_dist.orchestration.journal import append_event
from hsmn_dist.tracking.build import TrackedRun, build_tracker

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs" / "runs" / "hsmn_debug_demo_cpu.yaml"
PASSWORD = "tr0ub4dor-and-3"
URI = f"postgresql://hsmn:{PASSWORD}@db.example/mlflow"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)


def trouble() -> None:
    """An error whose text has the password in two forms."""
    raise OSError(f"login with {PASSWORD} at {URI} failed")


@pytest.mark.parametrize(
    "change",
    [f"tracking.uri={URI}", "tracking.tags={api_key: abc}", "tracking.tags={note: 'DB_PASSWORD=abcdef'}"],
)
def test_a_configuration_that_holds_a_secret_is_refused_without_showing_it(change: str) -> None:
    with pytest.raises(ConfigError, match="holds a secret") as caught:
        load_run_config(DEMO, [change])
    assert "MLFLOW_TRACKING_PASSWORD" in caught.value.action
    assert PASSWORD not in str(caught.value) and "abc" not in caught.value.found


def test_every_shipped_configuration_is_free_of_secrets() -> None:
    for path in sorted((ROOT / "configs" / "runs").glob("*.yaml")):
        if not path.stem.startswith("study_"):  # a study names a run's file
            load_run_config(path)


def test_the_resolved_copy_of_a_configuration_made_in_python_has_no_secret(tmp_path: Path) -> None:
    config = load_run_config(DEMO)
    unsafe = config.model_copy(update={"tracking": TrackingConfig(uri=URI, tags={"hub_token": PASSWORD})})
    write_resolved(unsafe, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    assert PASSWORD not in text and text.count(HIDDEN) == 2
    assert yaml.safe_load(text)["training"] == config.model_dump(mode="json")["training"]


def test_parameters_tags_and_artifact_records_of_trackers_have_no_secret(tmp_path: Path) -> None:
    tracker = build_tracker(
        TrackingConfig(backend="none"), TrackedRun(tmp_path, tmp_path / "r", "r", tags={"k": f"was {PASSWORD}"})
    )
    tracker.log_params({"tracking": {"uri": URI}, "seed": 7, "aws_secret_access_key": "AKIA123456", "note": PASSWORD})
    tracker.set_tags({"cause": f"login with {PASSWORD}"})
    tracker.log_dataset("d", "e" * 64, f"https://u:{PASSWORD}@host/rows")
    tracker.finish()
    text = (tmp_path / "r" / "events.jsonl").read_text(encoding="utf-8")
    assert PASSWORD not in text and "AKIA" not in text
    assert text.count(HIDDEN) == 5 and '"seed":7' in text


def test_the_journal_and_the_crash_report_have_no_secret(tmp_path: Path) -> None:
    try:
        trouble()
    except OSError as error:
        record = FailureRecord(
            FailureKind.UNKNOWN, 0, "host", str(error), "".join(traceback.format_exception(error)), "attempt"
        )
        append_event(tmp_path / "journal.jsonl", "run_failed", found=str(error), rank=0)
    write_failure(tmp_path / "rank_00000.json", record)
    for name in ("journal.jsonl", "rank_00000.json"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert PASSWORD not in text and HIDDEN in text
    assert "trouble" in (tmp_path / "rank_00000.json").read_text(encoding="utf-8"), "the traceback itself is kept"


def test_log_lines_and_their_tracebacks_have_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    log = logger("hsmn_dist.test")
    log.warning("going to %s", URI)
    try:
        trouble()
    except OSError:
        log.exception("no %s", PASSWORD)
    said = capsys.readouterr().err
    assert PASSWORD not in said and "OSError: login with" in said
    assert logging.getLogger("hsmn_dist").handlers


def test_errors_hide_what_they_were_given() -> None:
    error = StageFailed(f"{URI} refused", action=f"look at {PASSWORD}")
    assert PASSWORD not in str(error) + error.found + error.action
    assert PASSWORD not in str(StageFailed.__reduce__(error))


def test_the_command_line_shows_a_defect_without_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str) -> None:
        trouble()

    monkeypatch.setattr("hsmn_dist.cli.main.build_application", broken)
    assert run_command(["run"]) == 1
    said = capsys.readouterr().err
    assert "OSError" in said and "defect" in said and PASSWORD not in said


def test_a_wrong_value_is_named_without_the_secret_beside_it() -> None:
    command = [sys.executable, "-m", "hsmn_dist", "run", str(DEMO), "--set", f"tracking.api_key={PASSWORD}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2 and "api_key" in done.stderr
    assert PASSWORD not in done.stdout + done.stderr
