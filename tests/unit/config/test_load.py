"""Configuration files: includes, overrides, and errors that name file, line, key path and the nearest name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hsmn_dist.config.load import config_digest, load_run_config, run_config_from_mapping, write_resolved
from hsmn_dist.config.run import RunConfig
from hsmn_dist.foundation.errors import ConfigError

RUNS = sorted((Path(__file__).resolve().parents[3] / "configs" / "runs").glob("*.yaml"))
MINIMAL = """name: tiny
model:
  family: hsmn
  vocab_size: 300
tokenizer: {kind: bytes}
curriculum:
  stages:
    - name: one
      datasets:
        - name: word_problems
"""


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_run_config(path, overrides)
    return caught.value


@pytest.mark.parametrize(
    "path", [path for path in RUNS if not path.stem.startswith("study_")], ids=lambda path: path.stem
)
def test_every_shipped_run_passes_validation(path: Path) -> None:
    assert load_run_config(path).name == path.stem


def test_resolved_copy_loads_to_the_same_run(tmp_path: Path) -> None:
    config = load_run_config(write(tmp_path, MINIMAL))
    write_resolved(config, tmp_path / "resolved.yaml")
    again = load_run_config(tmp_path / "resolved.yaml")
    assert again == config
    assert config_digest(again) == config_digest(config)
    assert run_config_from_mapping(yaml.safe_load((tmp_path / "resolved.yaml").read_text())) == config


def test_unknown_key_names_line_path_and_nearest_name(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, MINIMAL.replace("vocab_size", "vocab_sise")))
    assert "run.yaml:4: unknown key 'model.vocab_sise'" in error.found
    assert "did you mean 'vocab_size'?" in error.action
    assert "num_heads" in error.allowed


def test_unknown_key_inside_a_list_names_its_line(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, MINIMAL + "          wieght: 2\n"))
    assert "run.yaml:11: unknown key 'curriculum.stages.0.datasets.0.wieght'" in error.found
    assert "'weight'" in error.action


def test_wrong_value_names_line_and_description(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, MINIMAL + "training:\n  zero_stage: 5\n"))
    assert "run.yaml:12: training.zero_stage = 5" in error.found
    assert "ZeRO" in error.allowed


def test_unknown_family_lists_the_families(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, MINIMAL.replace("family: hsmn", "family: transformer")))
    assert "model" in error.found
    assert "'hope'" in error.found


def test_key_written_twice_is_refused(tmp_path: Path) -> None:
    assert "run.yaml:11: key 'name' stands twice" in refusal(write(tmp_path, MINIMAL + "name: again\n")).found


def test_missing_file_says_where_it_was_included(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, MINIMAL + "include: absent.yaml\n"))
    assert "absent.yaml: cannot be read" in error.found
    assert "run.yaml" in error.found


def test_yaml_tags_do_not_run_code(tmp_path: Path) -> None:
    marker = tmp_path / "made"
    refusal(write(tmp_path, MINIMAL + f"seed: !!python/object/apply:os.mkdir ['{marker}']\n"))
    assert not marker.exists()


def test_includes_merge_and_the_file_wins(tmp_path: Path) -> None:
    write(tmp_path, "zero_stage: 3\nmax_steps: 7\n", "base.yaml")
    config = load_run_config(write(tmp_path, MINIMAL + "training:\n  include: base.yaml\n  max_steps: 9\n"))
    assert (config.training.zero_stage, config.training.max_steps) == (3, 9)


def test_include_cycle_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "include: two.yaml\n", "one.yaml")
    write(tmp_path, "include: one.yaml\n", "two.yaml")
    assert "includes itself" in refusal(write(tmp_path, MINIMAL + "include: one.yaml\n")).found


def test_error_in_an_included_file_names_that_file(tmp_path: Path) -> None:
    write(tmp_path, "\nmax_stepz: 7\n", "base.yaml")
    error = refusal(write(tmp_path, MINIMAL + "training: {include: base.yaml}\n"))
    assert "base.yaml:2: unknown key 'training.max_stepz'" in error.found


def test_overrides_reach_nested_keys_and_lists(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    config = load_run_config(path, ["training.max_steps=3", "curriculum.stages.0.strength=2.5"])
    assert config.training.max_steps == 3
    assert config.curriculum.stages[0].strength == 2.5


@pytest.mark.parametrize("assignment", ["training.max_steps", "=3", "curriculum.stages.7.name=x", "name.a=1"])
def test_malformed_overrides_are_refused(tmp_path: Path, assignment: str) -> None:
    assert "--set" in refusal(write(tmp_path, MINIMAL), assignment).found


@pytest.mark.parametrize(
    ("overrides", "problem", "advice"),
    [
        (["training.precision=bf16", "training.zero_stage=0"], "bf16 with zero_stage 0", "zero_stage to 1"),
        (["training.global_batch_examples=10"], "not a multiple", "for example 8"),
        (["model.num_heads=7"], "do not divide", "change one"),
        (["model.chunk_stride=200"], "stride 200 is larger", "smaller"),
        (["model.vocab_size=100"], "smaller than the tokenizer's 260", "model.vocab_size to 260"),
        (["data.split=[0.5, 0.5, 0.5]"], "sums to 1.5", "0.6"),
        (["data.packs_examples=true"], "packing with family 'hsmn'", "false"),
        (["training.offload.parameters=cpu"], "zero_stage 2", "zero_stage to 3"),
        (["training.engine=local"], "one rank", "ranks_per_node"),
        (["tokenizer.kind=file"], "empty for kind 'file'", "name one"),
    ],
)
def test_contradictions_are_refused_with_advice(
    tmp_path: Path, overrides: list[str], problem: str, advice: str
) -> None:
    error = refusal(write(tmp_path, MINIMAL), *overrides)
    assert problem in f"{error.found} {error.allowed}"
    assert advice in error.action


CHAIN = ["model.cms.form=chain", "model.cms.cadence=optimizer"]


def test_a_rate_that_the_cadence_has_no_use_for_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL.replace("family: hsmn", "family: hope"))
    for cadence, used, unused in (
        ("optimizer", "rate_scale", "learning_rate"),
        ("tokens", "learning_rate", "rate_scale"),
    ):
        base = ["model.cms.form=chain", f"model.cms.cadence={cadence}"]
        config = load_run_config(path, [*base, f"model.cms.levels=[{{period: 2, {used}: 0.125}}]"])
        assert run_config_from_mapping(yaml.safe_load(write_resolved_text(config, tmp_path))) == config
        error = refusal(path, *base, f"model.cms.levels=[{{period: 2, {unused}: 0.125}}]")
        assert unused in error.found and used in f"{error.found} {error.allowed}"


@pytest.mark.parametrize("family", ["hope", "hsmn_hope"])
@pytest.mark.parametrize("kind", ["muon", "m3", "deep_momentum"])
def test_pairs_of_optimizer_and_memory_that_no_engine_has_are_refused(tmp_path: Path, family: str, kind: str) -> None:
    path = write(tmp_path, MINIMAL.replace("family: hsmn", f"family: {family}"))
    rule = f"optim.optimizer.kind={kind}"
    error = refusal(path, rule, *CHAIN)
    assert "optim.optimizer.kind" in error.found and "cadence to tokens" in error.action
    error = refusal(path, rule, "training.offload.optimizer=cpu")
    assert "training.offload.optimizer" in error.found and "none" in error.action
    for fine in ([rule, CHAIN[0]], [*CHAIN], ["training.offload.optimizer=cpu"], [rule]):
        load_run_config(path, fine)


def test_two_stages_of_one_name_are_refused(tmp_path: Path) -> None:
    text = MINIMAL + "    - name: one\n      datasets: [{name: passkey}]\n"
    error = refusal(write(tmp_path, text))
    assert "two stages are called 'one'" in error.found
    assert "run.yaml:11" in error.found


def test_configuration_is_frozen(tmp_path: Path) -> None:
    config = load_run_config(write(tmp_path, MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1  # type: ignore[misc]


def test_an_elastic_range_is_checked_for_every_number_of_ranks(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    batch = ["training.global_batch_examples=16", "training.micro_batch_examples=4"]
    config = load_run_config(path, [*batch, "cluster.num_workers=[1, 2]"])
    assert list(config.cluster.world_sizes) == [1, 2]
    assert list(load_run_config(path, batch).cluster.world_sizes) == [2]
    uneven = load_run_config(path, [*batch, "cluster.num_workers=[3, 5]"])
    assert list(uneven.cluster.world_sizes) == [3, 4, 5]
    assert run_config_from_mapping(yaml.safe_load(write_resolved_text(config, tmp_path))) == config
    for value, found in (
        ("[2, 1]", "is no range"),
        ("[1]", "is no range"),
        ("[0, 2]", "is no range"),
        ("[1, 17]", "some of 17 ranks without one"),
    ):
        assert found in refusal(path, *batch, f"cluster.num_workers={value}").found
    assert "launcher local" in refusal(path, *batch, "cluster.num_workers=[1, 2]", "cluster.launcher=local").found


def write_resolved_text(config: RunConfig, folder: Path) -> str:
    write_resolved(config, folder / "resolved.yaml")
    return (folder / "resolved.yaml").read_text()


def test_a_misspelled_component_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, MINIMAL), "continual.component_strength.encodr=2.0")
    assert "continual.component_strength.encodr" in error.found
    assert "did you mean 'encoder'?" in error.action and "decompressor" in error.allowed
    error = refusal(write(tmp_path, MINIMAL), "continual.component_strength.encoder=-1.0")
    assert "continual.component_strength.encoder: -1.0" in error.found
    error = refusal(write(tmp_path, MINIMAL), "continual.strength=-1")
    assert "continual.strength" in error.found


def test_a_store_to_start_from_needs_its_weights_and_a_method_that_keeps_it(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    assert "without the weights" in refusal(path, "continual.start.fisher=store").found
    both = ("continual.start.fisher=store", "continual.start.weights=weights")
    assert "continual.start.fisher" in refusal(path, *both, "continual.method=replay").found
    start = load_run_config(path, both).continual.start
    assert Path(start.weights).is_absolute() and Path(start.fisher).name == "store"
