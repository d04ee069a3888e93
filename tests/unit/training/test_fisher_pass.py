"""The Fisher pass over an engine: invariants of continual.md section 7, resuming, progress, what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hsmn_dist.config.continual import FisherConfig
from hsmn_dist.continual.ewc import EwcMemory, EwcPenalty
from hsmn_dist.continual.fisher import fisher_record
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import CheckpointError, DataError, ModelError
from hsmn_dist.models.contract import ModelInput, cross_entropy
from hsmn_dist.training.fisher_pass import run_fisher
from tests.support.distributed import run_distributed
from tests.support.fisher import dealt, engine_of, examples, relative_error, tiny

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


def test_masked_tokens_in_the_middle_add_nothing(engine) -> None:
    """Their labels may be anything, and the mean is over the tokens that are scored."""
    config = FisherConfig(estimator="empirical", micro_batch_examples=2, example_reduction="mean")
    batch = examples(NUM_EXAMPLES)
    batch["loss_mask"][:] = True
    batch["loss_mask"][:, -2] = False
    found = fisher(engine, config, batch)
    model = tiny("hsmn").eval()
    totals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in range(NUM_EXAMPLES):
        one = step_input({key: value[row : row + 1] for key, value in batch.items()})
        everything = dataclasses.replace(one, loss_mask=torch.ones_like(one.loss_mask))
        losses = model(everything, target_loss=cross_entropy).nll[0]
        kept = losses[batch["loss_mask"][row]].mean()
        gradients = torch.autograd.grad(kept, list(model.parameters()), allow_unused=True)
        for name, gradient in zip(totals, gradients, strict=True):
            if gradient is not None:
                totals[name] += gradient.square() / NUM_EXAMPLES
    largest = max(float(total.norm()) for total in totals.values())
    for shard, part in zip(engine.param_shards(False), found, strict=True):
        expected = totals[shard.name].view(-1)
        assert float((part - expected).norm()) < 1e-4 * float(expected.norm()) + 1e-8 * largest, shard.name


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
    "change",
    [
        {"estimator": "empirical"},
        {"seed": 8},
        {"example_reduction": "sum"},
        {"micro_batch_examples": 5},
        {"num_groups": 7},
    ],
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


def interrupted_pass(engine, folder: Path, batch=None, **facts) -> FisherConfig:
    """Two of the three micro-batches of six examples lie in `folder`; gives the settings."""
    config = FisherConfig(estimator="sampled", micro_batch_examples=2, save_every_batches=1)
    with pytest.raises(Interrupted):
        batches = stopping(dealt(batch or examples(6), 2), 2)
        run_fisher(engine, batches, config, WORLD, 6, resume_folder=folder, **facts)
    return config


def counted(engine, config, folder: Path, batch=None, **facts) -> tuple[list[torch.Tensor], list[int]]:
    """The Fisher of six examples, and after how many of them a micro-batch was really computed."""
    seen: list[int] = []
    batches = dealt(batch or examples(6), 2)
    found = run_fisher(engine, batches, config, WORLD, 6, lambda done, _: seen.append(done), folder, **facts)
    return found, seen


def test_an_unfinished_pass_of_other_weights_is_not_gone_on_with(tmp_path: Path, caplog) -> None:
    engine, other = engine_of("hsmn", WORLD), engine_of("hsmn", WORLD)
    with torch.no_grad():
        next(other.module.parameters()).view(-1)[3] += 1e-3
    config = interrupted_pass(engine, tmp_path)
    with caplog.at_level("WARNING"):
        found, seen = counted(other, config, tmp_path)
    assert seen == [2, 4, 6] and "begins anew: it was taken of other weights" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(found, counted(other, config, tmp_path / "new")[0], strict=True))


def test_an_unfinished_pass_of_a_model_that_is_frozen_otherwise_is_not_gone_on_with(tmp_path: Path) -> None:
    engine = engine_of("hope", WORLD)
    frozen = engine.module.layers[0]
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    engine._trainable = [name for name, p in engine.module.named_parameters() if p.requires_grad]
    config = interrupted_pass(engine, tmp_path)
    with torch.no_grad():
        next(frozen.parameters()).add_(1e-3)
    assert counted(engine, config, tmp_path)[1] == [2, 4, 6]


@pytest.mark.parametrize("change", ["rows", "facts", "number"])
def test_an_unfinished_pass_of_other_data_is_not_gone_on_with(engine, change: str, tmp_path: Path) -> None:
    config = interrupted_pass(engine, tmp_path, data_facts={"split": "train"})
    batch = examples(6, seed=4 if change == "rows" else 0)
    facts = {"split": "test" if change == "facts" else "train"}
    seen: list[int] = []
    total = 5 if change == "number" else 6
    run_fisher(
        engine, dealt(batch, 2), config, WORLD, total, lambda done, _: seen.append(done), tmp_path, data_facts=facts
    )
    assert seen == [2, 4, total]


@pytest.mark.parametrize("damage", ["file", "no file", "manifest", "no JSON", "no names", "other ranks"])
def test_a_damaged_unfinished_pass_begins_anew(engine, damage: str, tmp_path: Path, caplog) -> None:
    config = interrupted_pass(engine, tmp_path)
    file, manifest = next(tmp_path.glob("after_*")), tmp_path / "progress.json"
    kept = json.loads(manifest.read_text())
    if damage == "file":
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    elif damage == "no file":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text("[]")
    elif damage == "no JSON":
        manifest.write_bytes(b"\x00" * 40)
    elif damage == "no names":
        manifest.write_text(json.dumps({**kept, "files": [{"sha256": "0"}]}))
    else:
        manifest.write_text(json.dumps({**kept, "files": kept["files"] * 2}))
    with caplog.at_level("WARNING"):
        found, seen = counted(engine, config, tmp_path)
    assert seen == [2, 4, 6] and "begins anew" in caplog.text
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(a, b) for a, b in zip(found, counted(engine, config, tmp_path)[0], strict=True))


def damage_one_rank(world: World, folder: str) -> list[int]:
    batch, config = examples(8), FisherConfig(estimator="sampled", micro_batch_examples=2, save_every_batches=1)
    engine, place = engine_of("hsmn", world, "deepspeed", 3), Path(folder)
    with contextlib.suppress(Interrupted):
        run_fisher(engine, stopping(dealt(batch, 2, world.rank, 2), 1), config, world, 8, resume_folder=place)
    if world.rank == 1:
        next(place.glob("after_*_rank_00001*")).write_bytes(b"")
    seen: list[int] = []
    run_fisher(engine, dealt(batch, 2, world.rank, 2), config, world, 8, lambda done, _: seen.append(done), place)
    engine.close()
    return seen


def test_when_one_ranks_file_is_damaged_all_ranks_begin_anew(tmp_path: Path) -> None:
    assert run_distributed(damage_one_rank, 2, str(tmp_path)) == [[4, 8], [4, 8]]


def test_files_are_on_the_disk_before_the_manifest_names_them(engine, monkeypatch, tmp_path: Path) -> None:
    flushed: list[str] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    interrupted_pass(engine, tmp_path)
    shard = next(place for place, name in enumerate(flushed) if "after_00000001" in name)
    assert shard < next(place for place, name in enumerate(flushed) if "progress.json" in name)


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
