from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass, replace
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
    STEP_GATHERS,
    Traffic,
    all_reduce_latency,
    bus_bytes_per_second,
    communication_seconds,
    reduction_buckets,
    ring_latency,
    step_traffic,
    traffic,
)
from hsmn_dist.planner.hardware import DEVICES, NETWORKS
from hsmn_dist.planner.memory import Layout
from hsmn_dist.planner.optimizer_states import optimizer_load
from hsmn_dist.planner.parameters import count_parameters
from tests.support.distributed import run_distributed
from tests.support.planner import full_batch

MODEL = HopeConfig(vocab_size=701, d_model=36, num_layers=2, num_heads=2, d_feed_forward=51, num_memory_modules=2)
SCALAR_BYTES = 64
MICRO_BATCHES = 2
KINDS = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
}


@dataclass(frozen=True)
class Case:
    """One engine; `bucket_elements` and `live_elements` are DeepSpeed's own where they are 0."""

    zero_stage: int
    precision: str = "fp32"
    persistent_elements: int = 0
    bucket_elements: int = 0
    live_elements: int = 0
    rule: str = "adam"

    def layout(self, world_size: int) -> Layout:
        plain = Layout(
            world_size,
            self.zero_stage,
            2 if self.precision == "bf16" else 4,
            2,
            "none",
            False,
            self.persistent_elements,
        )
        return replace(
            plain,
            bucket_elements=self.bucket_elements or plain.bucket_elements,
            live_elements=self.live_elements or plain.live_elements,
        )

    def deepspeed(self) -> dict[str, int]:
        """What is changed in DeepSpeed's own configuration; no setting of ours names it."""
        changed = {}
        if self.bucket_elements:
            changed = {"reduce_bucket_size": self.bucket_elements, "allgather_bucket_size": self.bucket_elements}
        if self.live_elements:
            changed["stage3_max_live_parameters"] = self.live_elements
            changed["stage3_max_reuse_distance"] = self.live_elements
        return changed


CASES = [
    Case(0),
    Case(1),
    Case(2),
    Case(3),
    Case(3, persistent_elements=2000),
    Case(2, "bf16"),
    Case(3, "bf16", 10**6),
]
MANY_BUCKETS = [
    Case(1, bucket_elements=8000),
    Case(2, bucket_elements=8000),
    Case(2, "bf16", bucket_elements=8000),
    Case(3, bucket_elements=8000),
]
REDUCTIONS = ("all_reduce", "reduce_scatter_tensor")
OWNED = [Case(1, rule="muon"), Case(2, rule="m3"), Case(3, rule="muon")]


def _wrap(
    name: str, sent: collections.Counter[str], calls: list[tuple[str, int]], buffer: Callable[..., torch.Tensor]
) -> None:
    plain = getattr(dist, name)

    def counting(*arguments: Any, **named: Any) -> Any:
        tensor = buffer(*arguments, **named)
        sent[name] += tensor.numel() * tensor.element_size()
        calls.append((name, tensor.numel()))
        return plain(*arguments, **named)

    setattr(dist, name, counting)


def _counted(world: World, cases: list[Case]) -> list[tuple[dict[str, int], list[tuple[str, int]]]]:
    """Bytes handed to collectives in one step, the second one, of every case, and the calls."""
    from hsmn_dist.models.build import build_model
    from hsmn_dist.training import deepspeed_engine
    from hsmn_dist.training.build import build_engine

    sent: collections.Counter[str] = collections.Counter()
    calls: list[tuple[str, int]] = []
    _wrap("all_reduce", sent, calls, lambda tensor, *_, **__: tensor)
    _wrap("all_gather_into_tensor", sent, calls, lambda output_tensor, *_, **__: output_tensor)
    _wrap("reduce_scatter_tensor", sent, calls, lambda output, input, *_, **__: input)
    _wrap("all_to_all_single", sent, calls, lambda output, input, *_, **__: input)
    plain, counts = deepspeed_engine.deepspeed_config, []
    for case in cases:

        def changed(*arguments: Any, case: Case = case) -> dict[str, Any]:
            settings = plain(*arguments)
            settings["zero_optimization"].update(case.deepspeed())
            return settings

        deepspeed_engine.deepspeed_config = changed  # type: ignore[assignment]
        training = TrainingConfig.model_validate(
            {
                "zero_stage": case.zero_stage,
                "precision": case.precision,
                "global_batch_examples": 2 * MICRO_BATCHES * world.world_size,
                "micro_batch_examples": 2,
                "persistent_parameter_elements": case.persistent_elements,
            }
        )
        torch.manual_seed(0)
        optim = OptimConfig.model_validate({"optimizer": {"kind": case.rule}})
        engine = build_engine(training, optim, lambda: build_model(MODEL), world)
        for _ in range(2):
            sent.clear()
            calls.clear()
            for _ in range(MICRO_BATCHES):
                engine.forward_backward(full_batch(9, 5), 20.0)
            engine.step(1e-3)
        counts.append((dict(sent), list(calls)))
        engine.close()
    return counts


def check_bytes(case: Case, count: dict[str, int], predicted: Traffic) -> None:
    for name, kind in KINDS.items():
        assert abs(count.get(name, 0) - getattr(predicted, kind)) <= SCALAR_BYTES, (case, name)


def test_predicted_bytes_equal_the_counted_ones_on_every_zero_stage() -> None:
    parameters = count_parameters(MODEL)
    for counts in run_distributed(_counted, 2, CASES, timeout=600):
        for case, (count, _) in zip(CASES, counts, strict=True):
            check_bytes(case, count, traffic(parameters, case.layout(2), MICRO_BATCHES))


def test_many_small_buckets_carry_the_same_bytes_in_more_calls() -> None:
    parameters = count_parameters(MODEL)
    for counts in run_distributed(_counted, 2, MANY_BUCKETS, timeout=600):
        for case, (count, calls) in zip(MANY_BUCKETS, counts, strict=True):
            layout = case.layout(2)
            predicted = step_traffic(parameters, layout, MICRO_BATCHES)
            check_bytes(case, count, predicted.all)
            large = [elements for name, elements in calls if name in REDUCTIONS and elements > SCALAR_BYTES // 4]
            num_buckets = len(reduction_buckets(parameters, layout))
            assert num_buckets > 4
            # All-reduces of a bucket that lies across two ranks' partitions may go in two.
            micro_batches = 1 if case.zero_stage == 1 else MICRO_BATCHES
            assert micro_batches * num_buckets <= len(large) <= micro_batches * (num_buckets + 1), case
            assert sum(1 for name, _ in calls if name == "all_gather_into_tensor") == (
                STEP_GATHERS if case.zero_stage < 3 else MICRO_BATCHES
            )
            # Stage 1 reduces when the backward pass is over; the others keep the last bucket alone for then.
            last = reduction_buckets(parameters, layout)[-1] * layout.element * MICRO_BATCHES
            if case.zero_stage == 1:
                assert predicted.beside.total == 0
            else:
                waiting = predicted.waiting.all_reduce + predicted.waiting.reduce_scatter
                assert waiting == pytest.approx(last, rel=1e-3)


def test_owners_of_matrices_exchange_what_is_predicted() -> None:
    parameters = count_parameters(MODEL)
    by_rank = run_distributed(_counted, 2, OWNED, timeout=600)
    for index, case in enumerate(OWNED):
        optim = OptimConfig.model_validate({"optimizer": {"kind": case.rule}})
        load = optimizer_load(optim.optimizer, parameters, 2, is_sharded=True)
        counts = [counts[index][0]["all_to_all_single"] for counts in by_rank]
        matrices = sum(rows * columns for rows, columns in parameters.matrices)
        assert sum(counts) == 3 * 4 * matrices  # gradients, values, and values back, in fp32
        assert max(counts) == pytest.approx(load.exchanged_bytes(2), rel=0.05)
        sent = step_traffic(parameters, case.layout(2), MICRO_BATCHES, load.exchanged_bytes(2))
        assert sent.waiting.all_to_all == load.exchanged_bytes(2)


def test_latency_grows_with_the_ranks_and_a_tree_keeps_it_small() -> None:
    assert ring_latency(8, 1) == pytest.approx(7 * 3.4e-6)
    assert ring_latency(4096, 512) == pytest.approx(3584 * 3.4e-6 + 511 * 9.6e-6)
    assert all_reduce_latency(8, 1) == pytest.approx(2 * ring_latency(8, 1))
    assert all_reduce_latency(4096, 512) == pytest.approx(2 * (7 * 28e-6 + 9 * 50e-6))
    one_gather = Traffic(num_rings=1)
    assert communication_seconds(one_gather, 4096, 1e9, 512) > 100 * communication_seconds(one_gather, 8, 1e9)


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
    sent = Traffic(all_reduce=8e9)
    assert sent.wire_bytes(4) == pytest.approx(2 * 8e9 * 3 / 4)
    assert communication_seconds(sent, 4, 1e9) == pytest.approx(12.0)
