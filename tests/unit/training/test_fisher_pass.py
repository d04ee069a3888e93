"""The Fisher pass over an engine: invariants of continual.md section 7, resuming, progress, what is refused."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hsmn_dist.config.continual import FisherConfig
from hsmn_dist.continual.ewc import EwcMemory, EwcPenalty
from hsmn_dist.continual.fisher import fisher_record
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import CheckpointError, DataError, ModelError
from hsmn_dist.models.contract import ModelInput
from hsmn_dist.training.fisher_pass import run_fisher
from tests.support.distributed import run_distributed
from tests.support.fisher import dealt, engine_of, examples, relative_error

WORLD = World()
NUM_EXAMPLES = 6


def fisher(engine, config=None, batch=None, micro=2, **settings):
    config = config or FisherConfig(estimator="empirical", micro_batch_examples=micro)
    batch = batch or examples(NUM_EXAMPLES)
    return run_fisher(engine, dealt(batch, micro), config, WORLD, batch["target_ids"].shape[0], **settings)


def step_input(batch) -> ModelInput:
    return ModelInput(batch["context_ids"], batch["context_mask"], batch["target_ids"], batch["loss_mask"])


@pytest.fixture(scope="module")
def engine():
    return engine_of("hsmn", WORLD)


def test_padded_and_masked_tokens_add_nothing(engine) -> None:
    batch = examples(NUM_EXAMPLES)
    wide = {key: value.clone() for key, value in batch.items()}
    for key, filler in (("context_ids", 17), ("context_mask", 0), ("target_ids", 17), ("loss_mask", 0)):
        extra = torch.full_like(wide[key][:, :3], filler)
        wide[key] = torch.cat([wide[key], extra], 1)
    for found, wanted in zip(fisher(engine, batch=wide), fisher(engine, batch=batch), strict=True):
        assert relative_error(found, wanted) < 1e-5


def test_examples_alone_equal_examples_in_a_batch(engine) -> None:
    for found, wanted in zip(fisher(engine, micro=1), fisher(engine, micro=6), strict=True):
        assert float(wanted.max()) < 1e-12 or relative_error(found, wanted) < 1e-5


def test_a_pass_touches_neither_gradients_nor_weights_nor_modes() -> None:
    engine = engine_of("hope", WORLD)
    batch = step_input(examples(4))
    engine.forward_backward(batch, 10)
    gradients = [shard.gradient.clone() for shard in engine.param_shards()]
    weights = [shard.value.clone() for shard in engine.param_shards()]
    engine.module.layers[0].eval()
    fisher(engine)
    assert engine.module.training and not engine.module.layers[0].training
    for shard, gradient, weight in zip(engine.param_shards(), gradients, weights, strict=True):
        assert torch.equal(shard.gradient, gradient) and torch.equal(shard.value, weight)


def test_dropout_is_off(engine) -> None:
    torch.manual_seed(0)
    first = fisher(engine)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(fisher(engine), first, strict=True))


def test_progress_counts_examples_and_ends_at_the_total(engine) -> None:
    seen: list[tuple[int, int]] = []
    fisher(engine, micro=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 6), (6, 6)]


class Interrupted(Exception):
    pass


def stopping(batches, after: int):
    for index, batch in enumerate(batches):
        if index == after:
            raise Interrupted
        yield batch


@pytest.mark.parametrize("estimator", ["sampled", "sampled_sum"])
def test_an_interrupted_pass_resumes_to_the_same_bits(engine, estimator: str, tmp_path: Path) -> None:
    batch = examples(10)
    config = FisherConfig(estimator=estimator, micro_batch_examples=2, num_groups=3, save_every_batches=2)
    whole = run_fisher(engine, dealt(batch, 2), config, WORLD, 10, resume_folder=tmp_path / "undisturbed")
    tmp_path = tmp_path / "disturbed"
    with pytest.raises(Interrupted):
        run_fisher(engine, stopping(dealt(batch, 2), 4), config, WORLD, 10, resume_folder=tmp_path)
    calls: list[int] = []
    resumed = run_fisher(
        engine,
        dealt(batch, 2),
        config,
        WORLD,
        10,
        resume_folder=tmp_path,
        progress=lambda done, _: calls.append(done),
    )
    assert calls == [10], "the first four micro-batches are not computed again"
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole, strict=True))
    assert list(tmp_path.iterdir()) == []


def test_by_default_a_short_pass_saves_nothing_and_a_long_one_resumes(engine, monkeypatch, tmp_path: Path) -> None:
    """Saves are due by the clock: here every micro-batch seems to take two minutes, so every third saves."""
    batch, config = examples(10), FisherConfig(estimator="sampled", micro_batch_examples=2)
    with pytest.raises(Interrupted):
        run_fisher(engine, stopping(dealt(batch, 2), 4), config, WORLD, 10, resume_folder=tmp_path / "short")
    assert not (tmp_path / "short").exists()
    whole = run_fisher(engine, dealt(batch, 2), config, WORLD, 10)
    clock = itertools.count(0.0, 120.0)
    monkeypatch.setattr("hsmn_dist.training.fisher_pass.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with pytest.raises(Interrupted):
        run_fisher(engine, stopping(dealt(batch, 2), 4), config, WORLD, 10, resume_folder=tmp_path / "long")
    assert json.loads((tmp_path / "long" / "progress.json").read_text())["num_batches"] == 3
    calls: list[int] = []
    resumed = run_fisher(
        engine, dealt(batch, 2), config, WORLD, 10, lambda done, _: calls.append(done), tmp_path / "long"
    )
    assert calls == [8, 10]
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(resumed, whole, strict=True))


def save_and_resume(world: World, folder: str) -> None:
    """Rank 1's clock never says that a save is due; it saves with rank 0 all the same."""
    batch, config = examples(10), FisherConfig(estimator="signed_sum", num_groups=3, micro_batch_examples=1)
    config = config.model_copy(update={"save_every_seconds": 1e-9 if world.rank == 0 else 1e9})
    for stage in (2, 3):
        engine, place = engine_of("hsmn", world, "deepspeed", stage), Path(folder) / str(stage)
        whole = run_fisher(engine, dealt(batch, 1, world.rank, 2), config, world, 10)
        with contextlib.suppress(Interrupted):
            batches = stopping(dealt(batch, 1, world.rank, 2), 3)
            run_fisher(engine, batches, config, world, 10, resume_folder=place)
        calls: list[int] = []
        batches = dealt(batch, 1, world.rank, 2)
        resumed = run_fisher(engine, batches, config, world, 10, lambda done, _, calls=calls: calls.append(done), place)
        assert calls == [8, 10]
        assert all(relative_error(a, b) < 1e-6 for a, b in zip(resumed, whole, strict=True))
        engine.close()


def test_two_ranks_save_together_and_resume(tmp_path: Path) -> None:
    run_distributed(save_and_resume, 2, str(tmp_path))


@pytest.mark.parametrize(
    "change", [{"estimator": "empirical"}, {"seed": 8}, {"example_reduction": "sum"}, {"micro_batch_examples": 5}]
)
def test_resuming_with_other_settings_is_refused(engine, change, tmp_path: Path) -> None:
    batch = examples(10)
    settings = {"estimator": "sampled", "micro_batch_examples": 2, "save_every_batches": 1}
    config = FisherConfig(**settings)
    with pytest.raises(Interrupted):
        run_fisher(engine, stopping(dealt(batch, 2), 2), config, WORLD, 10, resume_folder=tmp_path)
    with pytest.raises(CheckpointError, match=next(iter(change))) as caught:
        run_fisher(engine, dealt(batch, 2), FisherConfig(**{**settings, **change}), WORLD, 10, resume_folder=tmp_path)
    assert str(tmp_path) in caught.value.action


def test_a_damaged_unfinished_pass_is_refused(engine, tmp_path: Path) -> None:
    config = FisherConfig(estimator="sampled", micro_batch_examples=2, save_every_batches=1)
    with pytest.raises(Interrupted):
        run_fisher(engine, stopping(dealt(examples(6), 2), 2), config, WORLD, 6, resume_folder=tmp_path)
    file = next(tmp_path.glob("after_*"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        run_fisher(engine, dealt(examples(6), 2), config, WORLD, 6, resume_folder=tmp_path)


def test_a_batch_without_numbers_is_refused(engine) -> None:
    batch = examples(4)
    del batch["example_index"]
    with pytest.raises(DataError, match="example_index"):
        run_fisher(engine, [batch], FisherConfig(), WORLD, 4)


def test_no_examples_are_refused(engine) -> None:
    with pytest.raises(ModelError, match="0 examples"):
        run_fisher(engine, [], FisherConfig(), WORLD, 0)


def test_frozen_parameters_have_no_fisher_and_the_rest_keep_theirs() -> None:
    engine, free = engine_of("hope", WORLD), engine_of("hope", WORLD)
    for name, parameter in engine.module.named_parameters():
        parameter.requires_grad_("layers.0" not in name)
    engine._trainable = [name for name, p in engine.module.named_parameters() if p.requires_grad]
    wanted = dict(zip([s.name for s in free.param_shards(False)], fisher(free), strict=True))
    names = [s.name for s in engine.param_shards(False)]
    assert names and not any("layers.0" in name for name in names)
    for name, found in zip(names, fisher(engine), strict=True):
        assert float(wanted[name].max()) < 1e-12 or relative_error(found, wanted[name]) < 1e-6


def test_two_parameters_never_share_a_fisher_and_a_tied_one_has_one() -> None:
    for name in ("hsmn", "hsmn tied"):
        shards = engine_of(name, WORLD).param_shards(False)
        assert len({shard.name for shard in shards}) == len(shards)
        assert len({shard.value.data_ptr() for shard in shards}) == len(shards)
        assert ("head.weight" in {shard.name for shard in shards}) is (name == "hsmn")


def test_a_second_stage_with_ewc_really_changes_weights_and_keeps_them_nearer() -> None:
    """The original's second stage raised in every penalty and moved nothing."""
    moved = {}
    for strength in (0.0, 1e4):
        engine = engine_of("hsmn", WORLD)
        shards = engine.param_shards(False)
        memory = EwcMemory.empty(shards)
        memory.add_task(shards, fisher(engine), fisher_record("first", FisherConfig(), NUM_EXAMPLES))
        penalty = EwcPenalty(memory, strength)
        anchor = [shard.value.clone() for shard in shards]
        batch = step_input(examples(4, seed=9))
        for _ in range(12):
            engine.forward_backward(batch, float(batch.loss_mask.sum()))
            penalty.add_gradients(engine.param_shards())
            engine.step(2e-3)
        value = EwcPenalty(memory, 1.0).local_value(engine.param_shards(False))
        distance = sum(
            float((s.value - a).abs().sum()) for s, a in zip(engine.param_shards(False), anchor, strict=True)
        )
        moved[strength] = (distance, float(value))
    assert moved[1e4][0] > 0.1
    assert moved[1e4][1] < 0.5 * moved[0.0][1]
