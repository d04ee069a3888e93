from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hsmn_dist.config.models import HopeConfig
from hsmn_dist.config.optim import OptimConfig
from hsmn_dist.config.training import TrainingConfig
from hsmn_dist.distributed.world import World
from hsmn_dist.planner.communication import (
    LINK_EFFICIENCY,
    Traffic,
    bus_bytes_per_second,
    communication_seconds,
    traffic,
)
from hsmn_dist.planner.hardware import DEVICES, NETWORKS
from hsmn_dist.planner.memory import Layout
from hsmn_dist.planner.parameters import count_parameters
from tests.support.distributed import run_distributed
from tests.support.planner import full_batch

MODEL = HopeConfig(vocab_size=701, d_model=36, num_layers=2, num_heads=2, d_feed_forward=51, num_memory_modules=2)
CASES = [
    (0, "fp32", 0),
    (1, "fp32", 0),
    (2, "fp32", 0),
    (3, "fp32", 0),
    (3, "fp32", 2000),
    (2, "bf16", 0),
    (3, "bf16", 10**6),
]
SCALAR_BYTES = 64
MICRO_BATCHES = 2


def _wrap(name: str, counter: collections.Counter[str], buffer: Callable[..., torch.Tensor]) -> None:
    plain = getattr(dist, name)

    def counting(*arguments: Any, **named: Any) -> Any:
        tensor = buffer(*arguments, **named)
        counter[name] += tensor.numel() * tensor.element_size()
        return plain(*arguments, **named)

    setattr(dist, name, counting)


def _counted_bytes(world: World) -> list[dict[str, int]]:
    """Bytes handed to collectives in one step, the second one, of every case."""
    counter: collections.Counter[str] = collections.Counter()
    _wrap("all_reduce", counter, lambda tensor, *_, **__: tensor)
    _wrap("all_gather_into_tensor", counter, lambda output_tensor, *_, **__: output_tensor)
    _wrap("reduce_scatter_tensor", counter, lambda output, input, *_, **__: input)
    from hsmn_dist.models.build import build_model
    from hsmn_dist.training.build import build_engine

    counts = []
    for stage, precision, persistent in CASES:
        training = TrainingConfig(
            zero_stage=stage,
            precision=precision,
            global_batch_examples=2 * MICRO_BATCHES * world.world_size,
            micro_batch_examples=2,
            persistent_parameter_elements=persistent,
        )
        torch.manual_seed(0)
        engine = build_engine(training, OptimConfig(), lambda: build_model(MODEL), world)
        for _ in range(2):
            counter.clear()
            for _ in range(MICRO_BATCHES):
                engine.forward_backward(full_batch(9, 5), 20.0)
            engine.step(1e-3)
        counts.append(dict(counter))
        engine.close()
    return counts


def test_predicted_bytes_equal_the_counted_ones_on_every_zero_stage() -> None:
    parameters = count_parameters(MODEL)
    for counts in run_distributed(_counted_bytes, 2):
        for case, count in zip(CASES, counts, strict=True):
            stage, precision, persistent = case
            layout = Layout(2, stage, 2 if precision == "bf16" else 4, 2, "none", False, persistent)
            predicted = traffic(parameters, layout, MICRO_BATCHES)
            assert abs(count.get("all_reduce", 0) - predicted.all_reduce) <= SCALAR_BYTES, case
            assert abs(count.get("all_gather_into_tensor", 0) - predicted.all_gather) <= SCALAR_BYTES, case
            assert abs(count.get("reduce_scatter_tensor", 0) - predicted.reduce_scatter) <= SCALAR_BYTES, case


def test_one_rank_sends_nothing() -> None:
    layout = Layout(1, 2, 4, 1, "none", False)
    assert traffic(count_parameters(MODEL), layout, 4).total == 0


def test_the_slower_link_sets_the_rate() -> None:
    device = DEVICES["h100"]
    inside = bus_bytes_per_second(device, NETWORKS["infiniband_400"], 1, 8)
    fast = bus_bytes_per_second(device, NETWORKS["infiniband_400"], 2, 8)
    slow = bus_bytes_per_second(device, NETWORKS["ethernet_100"], 2, 8)
    assert inside == pytest.approx(450e9 * LINK_EFFICIENCY)
    assert fast == pytest.approx(8 * 50e9 * LINK_EFFICIENCY)
    assert slow == pytest.approx(12.5e9 * LINK_EFFICIENCY)


def test_a_ring_all_reduce_moves_a_buffer_almost_twice() -> None:
    sent = Traffic(8e9, 0.0, 0.0, 0)
    assert sent.wire_bytes(4) == pytest.approx(2 * 8e9 * 3 / 4)
    assert communication_seconds(sent, 4, 1e9) == pytest.approx(12.0)
