"""The command line: its surface, help with examples, exit codes, and messages without tracebacks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hsmn_dist.cli.main import COMMANDS, run_command
from hsmn_dist.config.load import load_run_config
from hsmn_dist.orchestration.curriculum import create_run
from hsmn_dist.orchestration.journal import append_event

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "configs" / "runs" / "hsmn_debug_demo_cpu.yaml"
GROUPS = {"runs": ["list", "show"], "data": ["list", "show", "check"], "track": ["sync"]}


def test_the_front_page_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([]) == 0
    page = capsys.readouterr().out
    for name, (_, summary) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", page, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_help_page_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in [[name], *[[name, sub] for sub in GROUPS.get(name, [])]]:
        assert run_command([*words, "--help"]) == 0
        page = capsys.readouterr().out
        assert "Example" in page, page
        assert "hsmn-dist" in page


def test_an_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["evalute"]) == 2
    assert "did you mean 'evaluate'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["run"], "neither a configuration nor --resume"),
        (["run", "absent.yaml"], "absent.yaml"),
        (["run", str(DEMO), "--resume", "latest"], "a configuration and --resume"),
        (["run", "--resume", "absent"], "names no runs"),
        (["prepare"], "neither a configuration nor --dataset"),
        (["stage", "--run", "absent"], "no config.yaml"),
        (["generate", "absent", "--prompt", "x"], "names no runs"),
        (["evaluate", "absent"], "names no runs"),
        (["scorecard", "absent"], "names no runs"),
        (["runs", "show", "absent"], "names no runs"),
        (["verify", "absent"], "names no runs"),
        (["data", "show", "gsm8"], "gsm8k"),
    ],
)
def test_a_users_mistake_is_a_message_with_three_parts(
    words: list[str],
    problem: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(words) == 2
    text = capsys.readouterr().err
    assert problem in text
    assert "Traceback" not in text
    assert [line.strip().split(":")[0] for line in text.strip().splitlines()[-3:]] == ["error", "allowed", "do"]


def test_doctor_reports_every_package_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    status = run_command(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    found = {finding["name"]: finding for finding in report["findings"]}
    assert {"python", "torch", "deepspeed", "ray", "mlflow", "gpus", "cores", "memory", "disk"} <= set(found)
    assert status == (0 if report["ok"] else 1)
    for finding in report["findings"]:
        assert finding["status"] == "ok" or finding["mend"], finding


def test_doctor_names_an_unreachable_cluster_and_server(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["doctor", "--json", "--ray-address", "127.0.0.1:9", "--mlflow-uri", "http://127.0.0.1:9"]
    assert run_command(words) == 1
    found = {item["name"]: item for item in json.loads(capsys.readouterr().out)["findings"]}
    assert found["ray cluster"]["status"] == found["mlflow"]["status"] == "missing"
    assert "ray start" in found["ray cluster"]["mend"]
    assert "mlflow server" in found["mlflow"]["mend"]


def test_runs_show_explains_a_failed_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = create_run(load_run_config(DEMO, [f"run_root={tmp_path}"]))
    append_event(
        run.folder.journal, "run_failed", attempt=run.attempt, found="rank 1 on host: no memory", action="buy some"
    )
    assert run_command(["runs", "show", "latest", "--run-root", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for words in (
        "failed, 0 of 3",
        "what failed: an error",
        "rank 1 on host: no memory",
        "what to do: ",
        "buy some",
        f"--resume {run.folder.run_id}",
    ):
        assert words in text
    assert run_command(["runs", "list", "--run-root", str(tmp_path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["status"], row["stages_complete"], row["stages"]) == ("failed", 0, 3)


def test_readme_names_only_commands_and_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"hsmn-dist ([a-z]+)", text))
    assert named == set(COMMANDS)
    for path in re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r"configs/\S+\.yaml", text):
        assert (ROOT / path).exists(), path
