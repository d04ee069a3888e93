"""A study as a Slurm array: the script, and its tasks, each of which brings one run to its end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hsmn_dist.cli.main import run_command as run_here
from hsmn_dist.config.study import load_study
from hsmn_dist.foundation.errors import ConfigError
from hsmn_dist.orchestration.slurm_script import study_slurm_script
from hsmn_dist.orchestration.slurm_settings import SlurmSettings
from hsmn_dist.orchestration.study import study_runs
from tests.support import manifests
from tests.support.tiny_study import write_tiny_study
from tests.support.whole_job import DEMO, ROOT, run_command

SHIPPED = ROOT / "configs" / "runs" / "study_forgetting_cpu.yaml"
ON_RAY = ["cluster.launcher=ray", "cluster.ray_address=auto", "cluster.num_nodes=2"]


def of_demo(folder: Path, overrides: list[str], variants: dict[str, list[str]]) -> Path:
    path = folder / "study.yaml"
    data = {"name": "s", "base": str(DEMO["hsmn"]), "overrides": overrides, "seeds": [0, 1], "variants": variants}
    path.write_text(yaml.safe_dump({**data, "reference": next(iter(variants))}, sort_keys=False))
    return path


def script(path: Path, **settings: object) -> str:
    study = load_study(path)
    configs = [run.config for run in study_runs(path, study, Path("runs"))]
    return study_slurm_script(study, str(path), configs, SlurmSettings(**settings))  # type: ignore[arg-type]


def test_every_run_of_a_study_is_a_task(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_here(["slurm", str(SHIPPED), "--run-root", "/shared/runs", "--time-limit", "60"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --array=0-26\n" in text and "#SBATCH --nodes=1\n" in text and "--exclusive" not in text
    assert f'study {SHIPPED} --run-root /shared/runs --task-index "$SLURM_ARRAY_TASK_ID"' in text
    assert "ray start" not in text, "its runs have one rank, in the driver itself"
    path = tmp_path / "job.sbatch"
    path.write_text(text)
    assert manifests.shell_errors(path) == ""
    assert "#SBATCH --array=0-26%4\n" in script(SHIPPED, kind="one_node", array="0-26%4")


def test_a_study_on_several_nodes_has_a_ray_cluster_for_each_task(tmp_path: Path) -> None:
    path = of_demo(tmp_path, ON_RAY, {"none": ["continual.method=none"], "ewc": []})
    text = script(path)
    assert "#SBATCH --array=0-3\n" in text and "#SBATCH --nodes=2\n" in text and "ray start --block" in text


@pytest.mark.parametrize(
    ("overrides", "variants", "settings", "problem"),
    [
        ([], {"a": []}, {"array": "0-2"}, "has 2 runs"),
        ([], {"a": []}, {"mlflow_uri": "http://t:5000"}, "--mlflow-uri with the study"),
        ([], {"a": []}, {"name": "x"}, "--name with the study"),
        ([], {"a": [], "b": ["cluster.cpus_per_rank=2"]}, {}, "different machines"),
        (["cluster.num_nodes=2"], {"a": []}, {}, "without cluster.launcher=ray"),
        (ON_RAY, {"a": []}, {"kind": "one_node"}, "--kind one_node"),
    ],
)
def test_what_the_tasks_could_not_share_is_refused(
    overrides: list[str], variants: dict[str, list[str]], settings: dict[str, object], problem: str, tmp_path: Path
) -> None:
    path = of_demo(tmp_path, overrides, variants)
    with pytest.raises(ConfigError, match=problem):
        script(path, **settings)


def test_tasks_share_a_study_and_the_last_one_writes_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_study(tmp_path)
    begun = run_command("study", str(path), "--only", "none", folder=tmp_path)  # without a queue
    assert begun.status == 0, begun.errors
    root = tmp_path / "runs" / "tiny"
    report = root / "study.md"
    report.unlink()
    monkeypatch.chdir(tmp_path)  # a run's settings name its root as it was given
    assert run_here(["study", str(path), "--task-index", "0"]) == 0
    assert "1 of 2 are" in capsys.readouterr().err and not report.exists()
    assert len(list(root.glob("*/scorecard.json"))) == 1, "the finished run was run again"
    last = run_command("study", str(path), "--task-index", "1", folder=tmp_path)
    assert last.status == 0, last.errors
    assert report.is_file() and "the reference" in last.output
    assert len(list(root.glob("*/scorecard.json"))) == 2
    assert len(json.loads((root / "study.json").read_text())["variants"]) == 2


@pytest.mark.parametrize("words", [["--task-index", "2"], ["--task-index", "0", "--report-only"]])
def test_a_task_that_the_study_does_not_have_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_tiny_study(tmp_path)
    assert run_here(["study", str(path), "--run-root", str(tmp_path / "runs"), *words]) == 2
    assert "allowed:" in capsys.readouterr().err
