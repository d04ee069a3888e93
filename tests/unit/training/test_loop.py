from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import Preempted, StageFailed
from hsmn_dist.tracking import metric_names as names
from hsmn_dist.training.loop import train
from tests.support.distributed import run_distributed
from tests.support.stages import QuadraticPull, TinyStage, training_config


class Stop(RuntimeError):
    """Stands for a kill: nothing of the program runs after it."""


def stage(folder: Path, world: World | None = None, num_steps: int = 12, **changes: Any) -> TinyStage:
    return TinyStage(folder, world or World(), training_config(**changes), num_steps)


def weights_of(tiny: TinyStage) -> dict[str, torch.Tensor]:
    assert tiny.engine is not None
    return tiny.engine.state_dict()


def assert_bitwise(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


def kill_at(step: int) -> Any:
    def on_step(done: int, loss: float | None, tokens_per_second: float | None) -> None:
        if done == step:
            raise Stop

    return on_step


def test_a_stage_lowers_its_validation_loss_and_ends_with_its_best_weights(tmp_path: Path) -> None:
    tiny = stage(tmp_path, num_steps=40)
    result = train(tiny.parts())
    assert result.num_steps == 40 and not result.stopped_early
    assert result.best_loss < result.first_loss
    assert result.best_loss == min(loss for _, loss in result.validations)
    assert [step for step, _ in result.validations] == list(range(0, 41, 4))
    parts = tiny.parts(on_step=kill_at(1))
    again = parts.checkpointer.restore_best(parts.engine, dataclasses.replace(parts.checkpointer.restore(parts.engine)))
    assert again
    nll, num_tokens = parts.engine.evaluate(next(iter(parts.validation_batches())))
    assert float(nll) / float(num_tokens) == pytest.approx(result.best_loss, abs=1e-6)


def test_an_interrupted_stage_ends_with_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    whole = stage(tmp_path / "whole")
    wanted = train(whole.parts())
    broken = stage(tmp_path / "broken")
    for step in (2, 5, 7, 11):
        with pytest.raises(Stop):
            train(broken.parts(on_step=kill_at(step)))
    found = train(broken.parts())
    assert_bitwise(weights_of(broken), weights_of(whole))
    assert dataclasses.replace(found, seconds=0) == dataclasses.replace(wanted, seconds=0)
    assert sorted(set(broken.seen)) == sorted(set(whole.seen))
    losses = dict(broken.tracker.series(names.TRAIN_LOSS))
    assert losses == dict(whole.tracker.series(names.TRAIN_LOSS)), "the same loss at every logged step"


def test_a_request_to_stop_leaves_a_checkpoint_and_the_stage_goes_on_from_it(tmp_path: Path) -> None:
    whole = stage(tmp_path / "whole")
    train(whole.parts())
    broken = stage(tmp_path / "broken")
    beats: list[int] = []
    with pytest.raises(Preempted):
        train(broken.parts(on_step=lambda done, *_: beats.append(done), should_stop=lambda: len(beats) >= 4))
    assert beats == [1, 2, 3, 4], "it stops at the next step"
    train(broken.parts())
    assert_bitwise(weights_of(broken), weights_of(whole))


def test_patience_ends_a_stage_that_no_longer_improves(tmp_path: Path) -> None:
    tiny = stage(tmp_path, num_steps=50, validate_every_steps=1, patience=3)
    result = train(tiny.parts(learning_rate=lambda step: 0.02 if step < 2 else -0.02))
    assert result.stopped_early and result.num_steps < 50
    assert result.num_steps == result.best_step + 3
    assert result.last_loss > result.best_loss


def test_metrics_name_the_loss_the_penalty_the_norms_and_the_speed(tmp_path: Path) -> None:
    tiny = stage(tmp_path)
    train(tiny.parts())
    assert [step for step, _ in tiny.tracker.series(names.TRAIN_LOSS)] == [1, 3, 5, 7, 9, 11]
    for metric in (
        names.TRAIN_PENALTY,
        names.TRAIN_GRADIENT_NORM,
        names.PERF_TOKENS_PER_SECOND,
        names.PERF_MEMORY_BYTES,
    ):
        assert all(math.isfinite(value) and value > 0 for _, value in tiny.tracker.series(metric)), metric
    total = dict(tiny.tracker.series(names.TRAIN_GRADIENT_NORM))
    parts = [dict(tiny.tracker.series(names.gradient_norm_of(part))) for part in ("encoder", "decoder")]
    for step, norm in total.items():
        assert math.hypot(*(part[step] for part in parts)) == pytest.approx(norm, rel=1e-5)
    assert tiny.tracker.series(names.TRAIN_LEARNING_RATE)[0][1] == pytest.approx(0.02 * (1 - 1 / 24))
    assert tiny.tracker.series(names.VALIDATION_LOSS)[0][0] == 0


class PoisonedPull(QuadraticPull):
    """Gives NaN gradients on the calls that it is told to."""

    def __init__(self, calls: set[int]) -> None:
        super().__init__(0.05)
        self.calls, self.count = calls, 0

    def add_gradients(self, shards: Any) -> None:
        super().add_gradients(shards)
        if self.count in self.calls:
            shards[0].gradient.fill_(math.nan)
        self.count += 1


def test_a_gradient_that_is_not_a_number_stops_the_stage_and_names_the_step(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="step 4") as caught:
        train(stage(tmp_path).parts(penalty=PoisonedPull({4})))
    assert caught.value.kind == "non_finite"


def test_skipping_leaves_the_weights_alone_and_is_counted(tmp_path: Path) -> None:
    tiny = stage(tmp_path, on_non_finite="skip")
    before: dict[int, dict[str, torch.Tensor]] = {}
    result = train(
        tiny.parts(penalty=PoisonedPull({4}), on_step=lambda done, *_: before.update({done: weights_of(tiny)}))
    )
    assert result.num_skipped_steps == 1 and result.num_steps == 12
    assert_bitwise(before[5], before[4])
    assert any(not torch.equal(before[6][name], before[5][name]) for name in before[5])
    assert all(torch.isfinite(weight).all() for weight in weights_of(tiny).values())


def test_going_back_restores_the_checkpoint_and_leaves_out_the_batches_since(tmp_path: Path) -> None:
    tiny = stage(tmp_path, on_non_finite="rollback")
    tiny.num_distinct = 100
    result = train(tiny.parts(penalty=PoisonedPull({4})))
    assert result.num_rollbacks == 1 and result.num_steps == 12
    # Steps 0 to 2 are in the checkpoint of step 3; batches 3 and 4 are lost; 5 onwards make steps 3 to 11.
    assert tiny.seen == list(range(14))
    assert result.num_examples == 12 * 8


def test_the_numbers_of_steps_that_were_discarded_give_way_to_those_taken_again(tmp_path: Path) -> None:
    tiny = stage(tmp_path, on_non_finite="rollback", log_every_steps=1)
    tiny.num_distinct = 100
    heard: list[tuple[int, float | None]] = []
    train(tiny.parts(penalty=PoisonedPull({4}), on_step=lambda done, loss, _: heard.append((done - 1, loss))))
    assert [step for step, _ in heard] == [0, 1, 2, 3, *range(3, 12)], "step 3 was taken twice"
    assert heard[3][1] != heard[4][1]
    assert tiny.tracker.series(names.TRAIN_LOSS) == [heard[i] for i in (0, 1, 2, *range(4, 13))]
    assert [step for step, _ in tiny.tracker.series(names.VALIDATION_LOSS)] == [0, 3, 7, 11]


def test_best_weights_that_are_gone_are_not_reported_as_those_that_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = stage(tmp_path, num_steps=50, validate_every_steps=1, patience=3)

    def lose_the_best(done: int, *_: object) -> None:
        if done == 5:  # by its name: older ones may be going at this moment, in the background
            shutil.rmtree(tmp_path / "best_00000002")

    result = train(tiny.parts(learning_rate=lambda step: 0.02 if step < 2 else -0.02, on_step=lose_the_best))
    assert result.lost_best_step == 2 and result.num_steps == 5
    assert result.best_step == result.num_steps and result.best_loss == result.last_loss
    assert "best step 2" in caplog.text and "those of step 5" in caplog.text
    nll, num_tokens = tiny.engine.evaluate(next(iter(tiny.parts().validation_batches())))  # type: ignore[union-attr]
    assert float(nll) / float(num_tokens) == pytest.approx(result.best_loss, abs=1e-6)


def test_a_budget_bounds_the_skips(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="3 steps were skipped"):
        train(stage(tmp_path, on_non_finite="skip", max_skipped_steps=2).parts(penalty=PoisonedPull(set(range(9)))))


def _on_two_ranks(world: World, folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for zero_stage in (2, 3):
        settings = {"engine": "deepspeed", "zero_stage": zero_stage}
        whole = stage(Path(folder) / f"whole{zero_stage}", world, **settings)
        results[f"whole{zero_stage}"] = dataclasses.replace(train(whole.parts()), seconds=0)
        weights = weights_of(whole)
        broken = stage(Path(folder) / f"broken{zero_stage}", world, **settings)
        for step in (2, 7):
            with pytest.raises(Stop):
                train(broken.parts(on_step=kill_at(step)))
        with pytest.raises(Preempted):
            train(broken.parts(should_stop=lambda: world.rank == 1))
        results[f"broken{zero_stage}"] = dataclasses.replace(train(broken.parts()), seconds=0)
        assert_bitwise(weights_of(broken), weights)
        proximal = stage(Path(folder) / f"proximal{zero_stage}", world, **settings)
        train(proximal.parts(penalty=QuadraticPull(0.5, is_proximal=True)))
        results[f"proximal{zero_stage}"] = weights_of(proximal)
    return results


def test_two_ranks_resume_bit_for_bit_and_a_stop_asked_of_one_rank_stops_both(tmp_path: Path) -> None:
    first, second = run_distributed(_on_two_ranks, 2, str(tmp_path), timeout=300)
    for zero_stage in (2, 3):
        assert first[f"whole{zero_stage}"] == first[f"broken{zero_stage}"] == second[f"whole{zero_stage}"]
        assert_bitwise(first[f"proximal{zero_stage}"], second[f"proximal{zero_stage}"])
    for name, weight in first["proximal2"].items():
        assert (weight - first["proximal3"][name]).abs().max() < 1e-5
