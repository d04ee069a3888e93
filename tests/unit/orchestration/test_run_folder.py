"""Runs are found by path, id, beginning, end or `latest`; pending stages follow the COMPLETE manifests."""

from __future__ import annotations

from pathlib import Path

import pytest

from hsmn_dist.config.load import load_run_config, write_resolved
from hsmn_dist.config.run import RunConfig
from hsmn_dist.foundation.errors import ConfigError
from hsmn_dist.foundation.files import write_json
from hsmn_dist.orchestration.run_folder import RunFolder, find_run, list_runs, new_run_folder
from hsmn_dist.orchestration.stage import StageSpec, pending_specs, training_stages

DEMO = Path(__file__).resolve().parents[3] / "configs" / "runs" / "hsmn_debug_demo_cpu.yaml"


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_run_config(DEMO, [f"run_root={tmp_path}"])


def make_run(config: RunConfig) -> RunFolder:
    folder = new_run_folder(Path(config.run_root), config.name)
    folder.path.mkdir(parents=True)
    write_resolved(config, folder.config)
    return folder


def test_runs_are_found_by_every_kind_of_name(config: RunConfig) -> None:
    first, second = make_run(config), make_run(config)
    root = first.root
    assert {run.run_id for run in list_runs(root)} == {first.run_id, second.run_id}
    assert find_run(first.run_id, root) == first
    assert find_run(second.run_id[-6:], root) == second
    assert find_run(str(first.path), Path("elsewhere")) == first
    assert find_run("latest", root) == list_runs(root)[-1]


def test_an_unknown_or_ambiguous_run_is_refused_with_the_known_ones(config: RunConfig) -> None:
    first, second = make_run(config), make_run(config)
    with pytest.raises(ConfigError) as caught:
        find_run("20", first.root)
    assert "names 2 runs" in caught.value.found
    with pytest.raises(ConfigError) as caught:
        find_run("absent", first.root)
    assert second.run_id in caught.value.allowed


def test_a_folder_without_its_configuration_is_not_a_run(config: RunConfig) -> None:
    new_run_folder(Path(config.run_root), "half").path.mkdir(parents=True)
    assert list_runs(Path(config.run_root)) == []


def test_pending_stages_start_at_the_first_incomplete_one(config: RunConfig) -> None:
    folder = make_run(config)
    names = [stage.name for stage in config.curriculum.stages]
    assert [spec.name for spec in pending_specs(config, folder, "a")] == names
    for index in (0, 2):  # a later stage that is complete without its predecessor is run again
        stage = folder.stage(index, names[index])
        stage.path.mkdir(parents=True)
        write_json(stage.complete, {"files": {}})
    assert [spec.index for spec in pending_specs(config, folder, "a")] == [1, 2]


def test_specs_survive_the_process_line(config: RunConfig) -> None:
    spec = pending_specs(config, make_run(config), "token")[1]
    assert StageSpec.from_json(spec.to_json()) == spec


def test_joint_training_is_one_stage_over_all_datasets(tmp_path: Path) -> None:
    config = load_run_config(DEMO, ["continual.method=joint", "curriculum.stages.0.max_steps=7"])
    (stage,) = training_stages(config)
    assert [dataset.name for dataset in stage.datasets] == ["word_problems", "stdlib_code", "passkey"]
    assert stage.max_steps == 7 + 2 * config.training.max_steps
