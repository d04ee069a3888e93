from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from hsmn_dist.cli import plan as plan_command
from hsmn_dist.config.load import load_run_config
from hsmn_dist.config.optim import OptimConfig
from hsmn_dist.config.run import RunConfig
from hsmn_dist.config.training import OffloadConfig
from hsmn_dist.foundation.errors import PlanError
from hsmn_dist.models.build import build_model
from hsmn_dist.models.contract import cross_entropy
from hsmn_dist.planner.chart import write_chart
from hsmn_dist.planner.hardware import DEVICES, NETWORKS, find_device, find_network, measure_cpu
from hsmn_dist.planner.memory import FISHER_PASS
from hsmn_dist.planner.plan import on_nodes, plan, with_layout
from hsmn_dist.planner.sweep import TIE_SHARE, Question, scaling, scaling_efficiency, sweep
from hsmn_dist.planner.throughput import Machines, kernels_per_micro_batch
from tests.support.planner import MODELS, full_batch

RUNS = Path(__file__).resolve().parents[3] / "configs" / "runs"


def large(family: str = "hope") -> RunConfig:
    return load_run_config(RUNS / f"{family}_large_builtin_multi_node.yaml")


def without_fisher(config: RunConfig) -> RunConfig:
    """The same run with a method that has EWC's buffers and no Fisher pass, so that the fullest moment is one of a step."""
    return config.model_copy(update={"continual": config.continual.model_copy(update={"method": "l2"})})


def with_rule(config: RunConfig, **optimizer: object) -> RunConfig:
    return config.model_copy(update={"optim": OptimConfig.model_validate({"optimizer": optimizer})})


def machines(num_nodes: int = 8, device: str = "h100", network: str = "infiniband_400") -> Machines:
    return Machines(DEVICES[device], NETWORKS[network], num_nodes, 8)


@pytest.mark.parametrize("family", ["hsmn", "hope"])
@pytest.mark.parametrize("num_nodes", [1, 8, 128])
def test_the_large_runs_fit_8_64_and_1024_h100(family: str, num_nodes: int) -> None:
    answer = plan(large(family), machines(num_nodes), price_per_gpu_hour=2.0)
    assert answer.fits
    assert sum(answer.memory.kinds.values()) == answer.memory.total
    assert 0 < answer.mfu <= 0.45
    assert answer.cost == pytest.approx(2.0 * answer.hours * num_nodes * 8)
    assert answer.micro_batches * answer.layout.micro_batch_examples * num_nodes * 8 == answer.global_batch_examples


def test_sharded_state_of_a_rank_is_the_state_divided_by_the_ranks() -> None:
    one, many = (plan(without_fisher(large()), machines(count)).memory for count in (1, 8))
    for kind in ("gradients", "optimizer", "ewc"):
        assert one.kinds[kind] == pytest.approx(8 * many.kinds[kind], rel=1e-4)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bytes_of_weights_gradients_and_optimizer_follow_the_zero_paper(zero_stage: int) -> None:
    config = with_layout(without_fisher(large("hsmn")), zero_stage=zero_stage)
    answer = plan(config, machines(8))
    count, share = answer.parameters, answer.parameters / 64
    kinds = answer.memory.kinds
    assert kinds["optimizer"] == pytest.approx(12 * share, rel=1e-6)
    assert kinds["gradients"] == pytest.approx({1: 2 * count, 2: 4 * share, 3: 4 * share}[zero_stage], rel=1e-4)
    # Stage 3 keeps up to 1e9 gathered elements alive, DeepSpeed's default: that is all of this model.
    assert kinds["weights"] <= 2 * count * (1 if zero_stage < 3 else 1 + 2 / 64)


def test_each_zero_stage_needs_less_persistent_memory_than_the_one_before() -> None:
    totals = []
    for zero_stage in (0, 1, 2):
        config = with_layout(without_fisher(large("hsmn")), zero_stage=zero_stage, precision="fp32")
        kinds = plan(config, machines(8)).memory.kinds
        totals.append(kinds["weights"] + kinds["gradients"] + kinds["optimizer"] + kinds["ewc"])
    assert totals == sorted(totals, reverse=True)


def test_a_run_that_does_not_fit_is_refused_with_its_largest_term() -> None:
    config = with_layout(without_fisher(large("hsmn")), micro_batch_examples=16, activation_checkpointing="none")
    answer = plan(config, machines(8, "l4"))
    assert not answer.fits
    error = answer.refusal()
    assert isinstance(error, PlanError)
    assert "the largest term is activations" in error.found
    assert "training.micro_batch_examples" in error.action


def test_a_batch_that_cannot_be_dealt_to_the_ranks_is_refused() -> None:
    with pytest.raises(PlanError, match="1024 on 24 ranks"):
        plan(large(), machines(3))


def test_a_micro_batch_that_is_too_large_for_the_ranks_is_lowered_and_said() -> None:
    answer = plan(large(), machines(128))
    assert answer.layout.micro_batch_examples == 1
    assert any("micro_batch_examples 4" in note for note in answer.notes)


def test_ranks_that_share_contexts_divide_the_encoder_and_nothing_else() -> None:
    config = with_layout(without_fisher(large("hsmn")), global_batch_examples=64, micro_batch_examples=1)
    alone, shared = (plan(with_layout(config, context_parallel=size), machines(1)) for size in (1, 8))
    assert shared.micro_batches == 8 * alone.micro_batches
    assert shared.memory.kinds["activations"] < alone.memory.kinds["activations"]
    assert shared.flops_per_token == alone.flops_per_token
    # The decoder's work is done by every rank of a group: more seconds for the same examples.
    assert alone.step.compute < shared.step.compute < 8 * alone.step.compute
    assert shared.communication_bytes > alone.communication_bytes
    with pytest.raises(PlanError, match="context_parallel 3 on 8 ranks"):
        plan(with_layout(config, context_parallel=3), machines(1))


def test_recomputing_costs_time_and_saves_memory() -> None:
    plans = [plan(with_layout(large(), activation_checkpointing=p), machines()) for p in ("none", "every_block")]
    assert plans[0].memory.total > plans[1].memory.total
    assert plans[0].step.compute < plans[1].step.compute


def test_the_fisher_pass_counts_with_its_own_micro_batch_and_whole_contexts() -> None:
    config = with_layout(large("hsmn"), global_batch_examples=64, micro_batch_examples=1)
    passes = [plan(with_layout(config, context_parallel=size), machines(1)).memory.moments[3] for size in (1, 8)]
    assert passes[0].name == FISHER_PASS
    assert passes[0] == passes[1]
    small = config.continual.fisher.model_copy(update={"micro_batch_examples": 1})
    smaller = config.model_copy(update={"continual": config.continual.model_copy(update={"fisher": small})})
    assert plan(smaller, machines(1)).memory.total < plan(config, machines(1)).memory.total
    assert all(moment.name != FISHER_PASS for moment in plan(without_fisher(config), machines(1)).memory.moments)


def test_a_fisher_pass_that_does_not_fit_names_its_own_setting() -> None:
    answer = plan(with_layout(large("hsmn"), micro_batch_examples=1), machines(8, "l40s"))
    assert not answer.fits
    assert "in the Fisher pass" in answer.refusal().found
    assert "continual.fisher.micro_batch_examples" in answer.refusal().action


def test_sums_of_the_fisher_are_whole_where_weights_are() -> None:
    config = with_layout(large(), zero_stage=2)
    whole, pieces = (plan(with_layout(config, zero_stage=stage), machines(8)) for stage in (2, 3))
    sums = [answer.memory.moments[3].fisher for answer in (whole, pieces)]
    assert sums[0] == pytest.approx(4 * whole.parameters * (1 + 1 / 64), rel=1e-6)
    assert sums[1] < sums[0] / 4


def test_a_matrix_rule_is_planned_with_its_own_states_and_what_its_owners_send() -> None:
    config = with_layout(without_fisher(large()), zero_stage=2)
    adam, muon = (plan(c, machines(1)) for c in (config, with_rule(config, kind="muon")))
    m3 = plan(with_rule(config, kind="m3"), machines(1))
    assert m3.checkpoint_bytes > adam.checkpoint_bytes > muon.checkpoint_bytes
    # Three times the matrices in fp32, an eighth of them from each rank; then a matrix is the least that a rank can own.
    assert 3.3e9 / 8 * 3 < muon.communication_bytes - adam.communication_bytes < 4.4e9 / 8 * 3
    assert muon.step.optimizer > adam.step.optimizer
    many = plan(with_rule(config, kind="muon"), machines(128)).memory.kinds["optimizer"]
    assert many > plan(config, machines(128)).memory.kinds["optimizer"]


def test_a_matrix_rule_with_offload_is_refused_as_the_engine_refuses_it() -> None:
    offload = OffloadConfig(optimizer="cpu")
    with pytest.raises(PlanError, match="kind muon with training"):
        plan(with_layout(with_rule(large(), kind="muon"), offload=offload), machines(1))


def test_only_what_runs_beside_the_backward_pass_is_hidden() -> None:
    config = with_layout(large(), micro_batch_examples=4)
    for stage in (1, 2):
        answer = plan(with_layout(config, zero_stage=stage), machines(8))
        gather = 2 * answer.parameters * (63 / 64) / (400e9 * 0.8)
        assert answer.step.exposed > gather  # the weights are gathered when the backward pass is over
    exposed = [plan(with_layout(config, zero_stage=s), machines(8)).step.exposed for s in (1, 2, 3)]
    assert exposed == sorted(exposed, reverse=True)


def test_fewer_and_larger_micro_batches_are_faster() -> None:
    steps = [plan(with_layout(large(), micro_batch_examples=size), machines(8)).step for size in (1, 4, 16)]
    assert steps[0].total > steps[1].total > steps[2].total
    assert steps[0].launches == pytest.approx(16 * steps[2].launches)


@pytest.mark.parametrize("name", ["hsmn", "hope_no_cms", "hope", "hybrid"])
def test_kernels_are_within_a_factor_of_two_of_what_torch_is_told_to_do(name: str) -> None:
    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += not func.is_view
            return func(*args, **(kwargs or {}))

    model = build_model(MODELS[name])
    with Counter() as counter:
        output = model(full_batch(61, 23), target_loss=cross_entropy)
        assert output.nll is not None
        output.nll.sum().backward()
    predicted = kernels_per_micro_batch(MODELS[name], len(model.blocks), "none")
    assert predicted / 2 < counter.count < predicted * 2


def test_the_sweep_finds_the_cheapest_layout_of_all_that_fit() -> None:
    question = Question(with_layout(large(), global_batch_examples=64), machines(4), price_per_gpu_hour=3.0)
    plans = sweep(question)
    assert all(answer.fits for answer in plans)
    best = plans[0]
    for num_nodes in (1, 2, 4):
        for stage in (1, 2, 3):
            for micro in (1, 2):
                for policy in ("none", "every_second_block", "every_block"):
                    config = with_layout(
                        question.config,
                        zero_stage=stage,
                        micro_batch_examples=micro,
                        activation_checkpointing=policy,
                    )
                    other = plan(config, on_nodes(question.machines, num_nodes), 3.0)
                    assert not other.fits or best.gpu_hours <= other.gpu_hours * (1 + TIE_SHARE)


def test_of_tied_layouts_the_sweep_prefers_the_lower_stage_and_the_larger_micro_batch() -> None:
    plans = sweep(Question(large(), machines(1)))
    best, limit = plans[0], plans[0].gpu_hours * (1 + TIE_SHARE)
    tied = [p for p in plans if p.gpu_hours <= limit and p.num_nodes == best.num_nodes]
    assert len({p.layout.zero_stage for p in tied}) > 1
    assert best.layout.zero_stage == min(p.layout.zero_stage for p in tied)
    same = [p for p in tied if p.layout.zero_stage == best.layout.zero_stage]
    assert best.layout.micro_batch_examples == max(p.layout.micro_batch_examples for p in same) > 1


def test_a_sweep_without_a_layout_says_which_batch_meets_which_ranks() -> None:
    with pytest.raises(PlanError) as caught:
        sweep(Question(large(), replace(machines(2), gpus_per_node=6)))
    assert "global_batch_examples 1024 on 6 or 12 ranks" in caught.value.found
    assert "training.global_batch_examples=1020" in caught.value.action
    sweep(Question(with_layout(large(), global_batch_examples=12), replace(machines(2), gpus_per_node=6)))
    with pytest.raises(PlanError, match="context_parallel 16 on 8 ranks"):
        sweep(Question(with_layout(large("hsmn"), context_parallel=16), machines(1)))


def test_sweep_and_scaling_divide_the_batch_by_the_ranks_that_hold_examples() -> None:
    config = with_layout(large("hsmn"), global_batch_examples=4, context_parallel=4)
    assert {p.num_nodes for p in sweep(Question(config, machines(2)))} == {1, 2}
    rows = scaling(Question(with_layout(config, context_parallel=16), machines(1)), max_gpus=64)
    assert [p.num_nodes * p.gpus_per_node for p in rows] == [16, 32, 64]
    assert [p.global_batch_examples for p in rows] == [4, 4, 4]
    with pytest.raises(PlanError, match="context_parallel 16 on 8 ranks"):
        scaling(Question(with_layout(config, context_parallel=16), machines(1)), max_gpus=8)


def test_a_sweep_where_nothing_fits_says_why() -> None:
    tiny = Machines(DEVICES["l4"], NETWORKS["ethernet_10"], 1, 1)
    with pytest.raises(PlanError, match="the largest term"):
        sweep(Question(with_layout(large("hsmn"), global_batch_examples=2), tiny))


def test_scaling_reaches_4096_gpus_and_slow_networks_cost_more(tmp_path: Path) -> None:
    config = with_layout(large("hsmn"), zero_stage=2)
    fast = scaling(Question(config, machines(1)))
    slow = scaling(Question(config, machines(1, network="ethernet_10")))
    assert [p.num_nodes * p.gpus_per_node for p in fast] == [8 * 2**power for power in range(10)]
    assert scaling_efficiency(fast)[0] == 1.0
    assert scaling_efficiency(slow)[-1] < scaling_efficiency(fast)[-1]
    assert fast[-1].global_batch_examples == 4096  # grows only where there are more ranks than examples
    assert fast[0].global_batch_examples == 1024
    path = tmp_path / "figures" / "scaling.png"
    write_chart(fast, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_names_that_are_not_in_the_tables_get_a_near_name() -> None:
    with pytest.raises(PlanError) as caught:
        find_device("h10")
    assert "h100" in caught.value.action
    with pytest.raises(PlanError) as caught:
        find_network("infiniband_40")
    assert "infiniband_400" in caught.value.action


def test_every_device_and_network_has_a_source_and_the_network_exists() -> None:
    for device in DEVICES.values():
        assert device.source
        assert device.network in NETWORKS
        assert device.bf16_flops >= device.fp32_flops > 0
    assert all(network.source for network in NETWORKS.values())


def test_a_cpu_is_measured_not_looked_up() -> None:
    device = measure_cpu(0.02)
    assert device.memory_bytes > 2**28
    assert 1e8 < device.fp32_flops < 1e13
    assert "timed" in device.source


def _application() -> object:
    import typer

    application = typer.Typer()
    application.command("plan")(plan_command.command)
    return application


def test_the_command_prints_json_text_and_a_table(tmp_path: Path) -> None:
    runner = CliRunner()
    path = str(RUNS / "hope_large_builtin_multi_node.yaml")
    result = runner.invoke(_application(), [path, "--nodes", "8", "--json"])  # type: ignore[arg-type]
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["fits"] is True
    assert answer["memory"]["total"] == pytest.approx(sum(answer["memory"]["kinds"].values()), abs=10)
    text = runner.invoke(_application(), [path, "--device", "a100", "--price-per-gpu-hour", "2"]).stdout  # type: ignore[arg-type]
    assert "fits" in text and "cost" in text and "NVIDIA A100 data sheet" in text
    swept = runner.invoke(_application(), [path, "--sweep", "--set", "training.global_batch_examples=512"]).stdout  # type: ignore[arg-type]
    assert "use it: --set training.zero_stage=" in swept
    scaled = runner.invoke(_application(), [path, "--plot", str(tmp_path / "figure.svg")]).stdout  # type: ignore[arg-type]
    assert "4096" in scaled and (tmp_path / "figure.svg").is_file()
