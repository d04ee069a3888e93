"""The Fisher by every estimator: batched against one example at a time, and any ranks and ZeRO stage against one process."""

from __future__ import annotations

import pytest
import torch

from hsmn_dist.config.continual import FisherConfig
from hsmn_dist.continual import fisher as fisher_module
from hsmn_dist.distributed.shards import ParamShard
from hsmn_dist.distributed.world import World
from hsmn_dist.training.fisher_pass import run_fisher
from tests.support.distributed import run_distributed
from tests.support.fisher import dealt, dense_fisher, engine_of, examples, relative_error, tiny

ESTIMATORS = ["sampled", "empirical", "logit_reversal", "sampled_sum", "signed_sum", "microbatch"]
NUM_EXAMPLES = 10
SETTINGS = {"micro_batch_examples": 2, "num_groups": 3, "seed": 5}
TOLERANCE = 1e-5


def errors_of(found: list[torch.Tensor], shards: list[ParamShard], dense: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative error of each shard against its part of the dense Fisher; parameters of no importance are left out."""
    largest = max(float(value.max()) for value in dense.values())
    errors = {}
    for part, shard in zip(found, shards, strict=True):
        wanted = dense[shard.name].reshape(-1)
        if float(wanted.max()) < 1e-12 * largest:  # a key's bias: zero in exact arithmetic
            assert float(part.max() if part.numel() else 0) < 1e-10 * largest
            continue
        scale = float(wanted.norm())
        errors[shard.name] = float((part - wanted[shard.start : shard.stop]).norm()) / scale
    return errors


def assert_close(
    found: list[torch.Tensor], shards: list[ParamShard], dense: dict[str, torch.Tensor], label: str
) -> None:
    errors = errors_of(found, shards, dense)
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < TOLERANCE, f"{label}: {worst} is off by {errors[worst]:.2e}"


def one_process(name: str, config: FisherConfig, checkpointing: str = "none"):
    engine = engine_of(name, World(), checkpointing=checkpointing)
    batches = dealt(examples(NUM_EXAMPLES), config.micro_batch_examples)
    return run_fisher(engine, batches, config, World(), NUM_EXAMPLES), engine.param_shards(False)


@pytest.fixture
def ways(monkeypatch) -> list[bool]:
    """Whether each pass that was made in the test ended on the batched path."""
    taken: list[bool] = []
    close = fisher_module.FisherPass.close

    def watched(self: fisher_module.FisherPass) -> None:
        taken.append(self.is_batched)
        close(self)

    monkeypatch.setattr(fisher_module.FisherPass, "close", watched)
    return taken


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", ["hsmn", "hope", "hsmn tied", "hope tied"])
def test_batched_fisher_equals_the_definition(name: str, estimator: str, ways: list[bool]) -> None:
    config = FisherConfig(estimator=estimator, **SETTINGS)
    found, shards = one_process(name, config)
    assert ways == [True]
    assert_close(found, shards, dense_fisher(tiny(name), examples(NUM_EXAMPLES), config), f"{name} {estimator}")
    assert all(torch.isfinite(part).all() and (part >= 0).all() for part in found)


@pytest.mark.parametrize(
    "name", ["hope self_modifying", "hope self_modifying_matrix", "hope optimizer_chain", "hybrid"]
)
def test_memories_that_learn_take_the_batched_path(name: str, ways: list[bool]) -> None:
    for estimator in ("sampled", "microbatch"):
        config = FisherConfig(estimator=estimator, **SETTINGS)
        found, shards = one_process(name, config)
        assert_close(found, shards, dense_fisher(tiny(name), examples(NUM_EXAMPLES), config), f"{name} {estimator}")
    assert ways == [True, True]


def test_memories_without_a_rule_take_one_backward_pass_per_example_and_say_so(ways: list[bool], caplog) -> None:
    config = FisherConfig(estimator="sampled", **SETTINGS)
    with caplog.at_level("WARNING"):
        found, shards = one_process("hope token_chain", config)
    assert ways == [False]
    assert "one backward pass per example" in caplog.text and "inner_0" in caplog.text
    assert_close(found, shards, dense_fisher(tiny("hope token_chain"), examples(NUM_EXAMPLES), config), "token_chain")


@pytest.mark.parametrize("name", ["hsmn", "hope"])
def test_activation_checkpointing_changes_nothing(name: str, ways: list[bool]) -> None:
    config = FisherConfig(estimator="sampled", **SETTINGS)
    found, shards = one_process(name, config, "every_block")
    assert ways == [True]
    assert_close(found, shards, dense_fisher(tiny(name), examples(NUM_EXAMPLES), config), name)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_examples_loss_is_the_mean_or_the_sum_over_its_tokens(reduction: str) -> None:
    config = FisherConfig(estimator="empirical", example_reduction=reduction, **SETTINGS)
    found, shards = one_process("hsmn", config)
    assert_close(found, shards, dense_fisher(tiny("hsmn"), examples(NUM_EXAMPLES), config), reduction)


@pytest.mark.parametrize("name", ["plain", "plain tied"])
def test_a_model_without_rules_takes_one_backward_pass_per_example(name: str, ways: list[bool]) -> None:
    for estimator in ESTIMATORS:
        config = FisherConfig(estimator=estimator, **SETTINGS)
        found, shards = one_process(name, config)
        assert_close(found, shards, dense_fisher(tiny(name), examples(NUM_EXAMPLES), config), f"{name} {estimator}")
    assert ways == [False] * len(ESTIMATORS)


def test_micro_batch_size_changes_nothing() -> None:
    for estimator in ("sampled", "sampled_sum", "signed_sum"):
        results = [
            one_process("hsmn", FisherConfig(estimator=estimator, micro_batch_examples=micro, num_groups=3, seed=5))[0]
            for micro in (1, 3, 10)
        ]
        largest = max(float(part.max()) for part in results[0])
        for other in results[1:]:
            for found, wanted in zip(other, results[0], strict=True):
                assert float(wanted.max()) < 1e-12 * largest or relative_error(found, wanted) < TOLERANCE


def on_ranks(world: World, cases: list[tuple[str, int, str]]) -> list[tuple[str, float]]:
    """The worst relative error of this rank's shards for each (model, ZeRO stage, estimator)."""
    torch.set_num_threads(1)
    worst = []
    batch = examples(NUM_EXAMPLES)
    engines = {}
    for name, stage, estimator in cases:
        if (name, stage) not in engines:
            engines[name, stage] = engine_of(name, world, "deepspeed", stage)
        engine = engines[name, stage]
        config = FisherConfig(estimator=estimator, **SETTINGS)
        batches = dealt(batch, config.micro_batch_examples, world.rank, world.world_size)
        found = run_fisher(engine, batches, config, world, NUM_EXAMPLES)
        errors = errors_of(found, engine.param_shards(False), dense_fisher(tiny(name), batch, config))
        worst.append((f"{name} stage {stage} {estimator}", max(errors.values())))
    return worst


def check_on_ranks(world_size: int, cases: list[tuple[str, int, str]], timeout: float) -> None:
    for results in run_distributed(on_ranks, world_size, cases, timeout=timeout):
        assert len(results) == len(cases)
        for label, error in results:
            assert error < TOLERANCE, f"{label} on {world_size} ranks: {error:.2e}"


def test_two_ranks_give_the_dense_fisher_on_every_zero_stage() -> None:
    cases = [("hsmn", stage, e) for stage in (0, 1, 2) for e in ("sampled", "signed_sum")]
    cases += [("hsmn", 3, e) for e in ESTIMATORS]
    cases += [("hope tied", 3, "sampled"), ("hsmn tied", 2, "microbatch"), ("plain tied", 3, "empirical")]
    check_on_ranks(2, cases, 400)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_family_estimator_rank_count_and_zero_stage_gives_the_dense_fisher(world_size: int) -> None:
    cases = [(name, stage, e) for name in ("hsmn", "hope") for stage in (0, 1, 2, 3) for e in ESTIMATORS]
    check_on_ranks(world_size, cases, 580)
