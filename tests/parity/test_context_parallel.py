"""Contexts divided over ranks against one rank: logits, losses, gradients, bytes, every ZeRO stage, and a whole run."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hsmn_dist.config.models import HopeConfig
from hsmn_dist.config.optim import OptimConfig
from hsmn_dist.config.training import TrainingConfig
from hsmn_dist.distributed.collectives import all_reduce_sum
from hsmn_dist.distributed.determinism import seed_everything
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import ConfigError
from hsmn_dist.models.build import build_model
from hsmn_dist.models.contract import cross_entropy
from hsmn_dist.models.hsmn.model import HsmnModel
from hsmn_dist.planner.communication import context_traffic
from hsmn_dist.planner.memory import Layout
from hsmn_dist.training.build import build_engine
from hsmn_dist.training.context_parallel import ChunkExchange, divide_context, undivided
from hsmn_dist.training.whole_weights import gather_weights
from tests.support.distributed import run_distributed
from tests.support.hsmn_models import batch, gradients, tiny_config, tiny_model
from tests.support.whole_job import DEMO, losses, only_run, run_command, settings

# Context lengths of a batch, in chunks of 6 that start every 3: an even and an odd number of chunks in all, fewer chunks than
# ranks, padding beside a long row, and a row (or a batch) with nothing to read.
BATCHES = [(24, 24), (50, 3, 17), (5,), (0, 41), (0,), (100,)]
WIDTH = 128


def training(**changes: Any) -> TrainingConfig:
    return TrainingConfig.model_validate({"global_batch_examples": 4, "micro_batch_examples": 1, **changes})


def model_of_rank(world: World, size: int, **changes: Any) -> HsmnModel:
    model = tiny_model(**changes).float()
    divide_context(model, training(context_parallel=size, global_batch_examples=64), world)
    return model


def one_pass(model: HsmnModel, lengths: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    inputs = batch(lengths, [7] * len(lengths))
    found = gradients(model, model(inputs, target_loss=cross_entropy).nll.sum() / inputs.loss_mask.sum())
    with torch.no_grad():
        return model(inputs).logits, found


CHANGES: list[dict[str, Any]] = [
    {"d_compressed": WIDTH},
    {"d_compressed": WIDTH, "encoder_group_chunks": 3, "norm_placement": "post"},
]


def _divided_passes(world: World) -> list[list[tuple[Tensor, dict[str, Tensor], Any]]]:
    return [_passes(world, changes) for changes in CHANGES]


def _passes(world: World, changes: dict[str, Any]) -> list[tuple[Tensor, dict[str, Tensor], Any]]:
    """Logits, gradients averaged over ranks as data parallelism does, and bytes of forward and backward of each batch."""
    model, results = model_of_rank(world, world.world_size, **changes), []
    for lengths in BATCHES:
        exchange = model.leaf_exchange
        if exchange is not None:
            exchange.bytes = type(exchange.bytes)()
        logits, found = one_pass(model, lengths)
        mean = {name: all_reduce_sum(gradient) / world.world_size for name, gradient in found.items()}
        results.append((logits, mean, None if exchange is None else exchange.bytes))
    return results


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_divided_contexts_give_the_forward_and_gradients_of_one_rank(world_size: int) -> None:
    plain = [tiny_model(**changes).float() for changes in CHANGES]
    for rank, by_model in enumerate(run_distributed(_divided_passes, world_size)):
        for model, results in zip(plain, by_model, strict=True):
            for lengths, (logits, found, sent) in zip(BATCHES, results, strict=True):
                wanted_logits, wanted = one_pass(model, lengths)
                assert (logits - wanted_logits).abs().max() < 1e-5, (rank, lengths)
                for name, gradient in wanted.items():
                    error = float((found[name] - gradient).abs().max())
                    assert error <= 1e-5 * max(1.0, float(gradient.abs().max())), (rank, lengths, name, error)
                chunks = count_rows(model, lengths)
                # One forward with gradients, its backward, and one forward without.
                assert sent.forward == 2 * chunks * WIDTH * 4, (lengths, sent)
                assert sent.backward == chunks * WIDTH * 4
                assert sent.num_calls == 3
                assert sent.padding == 3 * (-chunks % world_size) * WIDTH * 4


def count_rows(model: HsmnModel, lengths: tuple[int, ...]) -> int:
    """Chunks with a real token, counted where the encoder sees them."""
    seen: list[int] = []
    handle = model.compressor.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[0]))
    model(batch(lengths, [1] * len(lengths)))
    handle.remove()
    return seen[0]


def _bytes_on_the_wire(world: World) -> tuple[dict[str, int], int]:
    """Bytes in the buffers of every collective of one forward and backward pass, and of the gather's alone."""
    model = model_of_rank(world, world.world_size, d_compressed=WIDTH)
    counted: dict[str, int] = {}

    def counting(name: str, position: int) -> Any:
        plain = getattr(dist, name)

        def call(*arguments: Any, **named: Any) -> Any:
            tensor = arguments[position]
            counted[name] = counted.get(name, 0) + tensor.numel() * tensor.element_size()
            return plain(*arguments, **named)

        return call

    for name, position in (("all_gather_into_tensor", 0), ("reduce_scatter_tensor", 1), ("all_reduce", 0)):
        setattr(dist, name, counting(name, position))
    model(batch((24, 24), (5, 5)), target_loss=cross_entropy).nll.sum().backward()
    return counted, count_rows(tiny_model(), (24, 24))


def test_the_wire_carries_the_compressed_chunks_once_in_each_direction_and_nothing_else() -> None:
    for counted, chunks in run_distributed(_bytes_on_the_wire, 2):
        assert chunks == 14  # 7 a sequence, an even number in all: no padding
        assert counted == {"all_gather_into_tensor": chunks * 128 * 4, "reduce_scatter_tensor": chunks * 128 * 4}
        planned = context_traffic(chunks, 128, Layout(2, 2, 4, 2, "none", False, context_parallel=2), 1)
        assert (planned.all_gather, planned.reduce_scatter) == tuple(counted.values())


SMALL = tiny_config(encoder_dropout=0.0, decoder_dropout=0.0)
LENGTHS = [40, 2, 13, 29]
NUM_STEPS = 3


def course(world: World, zero_stage: int, size: int, engine_name: str = "deepspeed") -> list[Any]:
    """Losses and whole gradients of a few steps over the same four examples, dealt to the data ranks."""
    settings = training(
        engine=engine_name, zero_stage=zero_stage, context_parallel=size, persistent_parameter_elements=30
    )
    seed_everything(1)
    engine = build_engine(settings, OptimConfig(), lambda: build_model(SMALL), world)
    num_data = world.world_size // size
    each, first = 4 // num_data, world.rank // size * (4 // num_data)
    results: list[Any] = []
    for step in range(NUM_STEPS):
        rows = [batch((length,), (6,), seed=10 * step + index) for index, length in enumerate(LENGTHS)]
        scored = float(sum(int(row.loss_mask.sum()) for row in rows) * size)
        nll = torch.zeros(())
        for row in rows[first : first + each]:
            nll += engine.forward_backward(row, scored)
        found = gather_weights(
            [dataclasses.replace(shard, value=shard.gradient) for shard in engine.param_shards()],
            engine.num_shard_copies,
        )
        results.append((float(all_reduce_sum(nll)) / scored, found, engine.step(1e-3).gradient_norm))
    results.append(engine.state_dict())
    engine.close()
    return results


def _courses(world: World, cases: list[tuple[int, int]]) -> dict[tuple[int, int], list[Any]]:
    return {(stage, size): course(world, stage, size) for stage, size in cases}


def check_courses(found: dict[tuple[int, int], list[Any]]) -> None:
    wanted = course(World(), 0, 1, "local")
    for case, results in found.items():
        for (loss, whole, norm), (wanted_loss, wanted_whole, wanted_norm) in zip(
            results[:-1], wanted[:-1], strict=True
        ):
            assert loss == pytest.approx(wanted_loss, abs=1e-5), case
            assert norm == pytest.approx(wanted_norm, rel=1e-4), case
            for name, gradient in wanted_whole.items():
                # Two Adam steps on gradients near zero may differ by the sign: later steps are held less tightly.
                assert (whole[name] - gradient).abs().max() < 1e-4, (case, name)
        first, wanted_first = results[0][1], wanted[0][1]
        assert all((first[name] - wanted_first[name]).abs().max() < 1e-5 for name in wanted_first), case


def test_two_ranks_of_one_group_train_as_one_rank_does_on_every_zero_stage() -> None:
    for found in run_distributed(_courses, 2, [(0, 2), (1, 2), (2, 2), (3, 2)]):
        check_courses(found)


@pytest.mark.slow
def test_two_groups_of_two_ranks_train_as_one_rank_does_on_every_zero_stage() -> None:
    cases = [(0, 2), (1, 2), (2, 2), (3, 2), (2, 4), (3, 4)]
    for found in run_distributed(_courses, 4, cases, timeout=400):
        check_courses(found)


def _refusals(world: World) -> list[str]:
    found = []
    hope = HopeConfig(vocab_size=40, d_model=12, num_layers=1, num_heads=2, d_feed_forward=20)
    for config, size in ((SMALL, 3), (hope, 2)):
        try:
            build_engine(training(context_parallel=size), OptimConfig(), lambda c=config: build_model(c), world)
        except ConfigError as error:
            found.append(str(error))
    model = build_model(SMALL)
    divide_context(model, training(context_parallel=2), world)
    exchange = model.leaf_exchange
    with undivided(model):
        found.append(str(model.leaf_exchange))
    found.append(str(model.leaf_exchange is exchange and isinstance(exchange, ChunkExchange)))
    dist.barrier()  # rank 0 holds the store that the making of a group needs
    return found


def test_groups_that_do_not_fit_and_families_without_chunks_are_refused() -> None:
    for odd, hope, inside, after in run_distributed(_refusals, 2):
        assert "context_parallel 3 on 2 ranks" in odd and "allowed: a divisor" in odd
        assert "HopeModel" in hope and "set training.context_parallel to 1" in hope
        assert (inside, after) == ("None", "True")


def test_one_rank_has_no_exchange() -> None:
    model = tiny_model()
    assert divide_context(model, training(), World()) is None
    assert model.leaf_exchange is None


@pytest.mark.slow
def test_a_whole_run_with_divided_contexts_has_the_losses_of_one_that_divides_examples(tmp_path: Path) -> None:
    found = []
    for size in (1, 2):
        words = settings(
            f"name=divided_{size}",
            f"run_root={tmp_path / str(size)}",
            f"training.context_parallel={size}",
            "model.encoder_dropout=0",
            "model.decoder_dropout=0",
        )
        done = run_command("run", str(DEMO["hsmn"]), "--launcher", "local", *words, folder=tmp_path)
        assert done.status == 0, done.errors
        found.append(losses(only_run(tmp_path / str(size))))
    assert found[0].keys() == found[1].keys()
    for stage, points in found[0].items():
        for (step, loss), (other_step, other) in zip(points, found[1][stage], strict=True):
            assert step == other_step
            assert loss == pytest.approx(other, abs=1e-3), (stage, step)


@pytest.mark.slow
def test_a_million_tokens_run_forward_and_backward_on_two_ranks_within_12_gib() -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "context_parallel.py"
    done = subprocess.run([sys.executable, str(script), "--json"], capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(f"peak {found['peak_gib_of_all_ranks']:.2f} GiB, {found['seconds']:.0f} s, {found['chunks']} chunks")
    assert found["tokens"] == 1_000_000
    assert found["peak_gib_of_all_ranks"] < 12
    assert {row["bytes_forward"] for row in found["rows"]} == {found["chunks"] * 128 * 4}
    assert {row["bytes_backward"] for row in found["rows"]} == {found["chunks"] * 128 * 4}
    assert len({row["loss"] for row in found["rows"]}) == 1
