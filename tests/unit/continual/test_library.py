"""The library face: the documented example, and that it does what the trainer's path does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from hsmn_dist.continual.library import ModuleEwc, module_shards
from hsmn_dist.foundation.errors import CheckpointError, ConfigError, DataError

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "continual.md"


def example() -> str:
    return re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL).group(1)


def two_tasks():
    """Each task has its own two deciding features and a flag; learning the second naively spoils the first."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for task in range(2):
        x = torch.randn(192, 8, generator=generator)
        x[:, 6:] = 0.0
        x[:, 6 + task] = 1.0
        x[:, 2 - 2 * task : 4 - 2 * task] *= 0.5
        y = (x[:, 2 * task] + x[:, 2 * task + 1] > 0).long()
        made.append([{"x": x[i : i + 32], "y": y[i : i + 32]} for i in range(0, 192, 32)])
    return made


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 2))


def accuracy(model: nn.Module, batches) -> float:
    return sum(float((model(b["x"]).argmax(1) == b["y"]).float().mean()) for b in batches) / len(batches)


def loss_of(model, batch):
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def test_the_documented_example_runs_and_forgets_less_than_no_ewc() -> None:
    code = example()
    body = [line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(body) < 15
    kept = {}
    for strength in ("20.0", "0.0"):
        model, tasks = network(), two_tasks()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        exec(
            code.replace("strength=20.0", f"strength={strength}"),
            {"model": model, "optimizer": optimizer, "tasks": tasks},
        )
        kept[strength] = [accuracy(model, batches) for batches in tasks]
    assert kept["0.0"][1] > 0.9, "the second task is learned without EWC"
    assert kept["20.0"][0] > kept["0.0"][0] + 0.1, kept


def test_its_fisher_is_the_mean_of_squared_gradients() -> None:
    model, batches = network(), two_tasks()[0]
    found = ModuleEwc(model, 1.0).learn_task(batches, loss_of)
    x, y = torch.cat([b["x"] for b in batches]), torch.cat([b["y"] for b in batches])
    wanted = [torch.zeros_like(p) for p in model.parameters()]
    for row in range(len(x)):
        loss = functional.cross_entropy(model(x[row : row + 1]), y[row : row + 1])
        for total, gradient in zip(wanted, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            total += gradient.square() / len(x)
    for part, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(part, expected.view(-1), rtol=1e-4, atol=1e-9)


def test_memory_is_saved_and_loaded(tmp_path: Path) -> None:
    model, batches = network(), two_tasks()[0]
    ewc = ModuleEwc(model, 2.0)
    ewc.learn_task(batches, loss_of, name="first")
    ewc.save(tmp_path)
    other = ModuleEwc(model, 2.0)
    other.load(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert other.memory.tasks == ewc.memory.tasks and float(other.value()) == float(ewc.value()) > 0
    with pytest.raises(CheckpointError, match="differ"):
        ModuleEwc(nn.Linear(8, 2), 1.0).load(tmp_path)


def test_proximal_pulls_after_the_step() -> None:
    model, batches = network(), two_tasks()[0]
    ewc = ModuleEwc(model, 1e9, application="proximal")
    ewc.learn_task(batches, loss_of)
    anchor = [p.detach().clone() for p in model.parameters()]
    fisher = [shard.precision.clone() for shard in ewc.memory.shards]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ewc.add_gradients()
    assert all(p.grad is None for p in model.parameters())
    ewc.after_step(0.1)
    for parameter, start, importance in zip(model.parameters(), anchor, fisher, strict=True):
        moved = (parameter.detach() - start).view(-1)
        torch.testing.assert_close(moved, 1 / (1 + 1e8 * importance), rtol=1e-3, atol=1e-6)


class Conv1D(nn.Module):
    """The layout of Hugging Face's GPT-2: weight [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


def test_a_transposed_linear_is_batched_too(caplog) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(5, 8), nn.ReLU(), nn.Linear(5, 2))
    with caplog.at_level("WARNING"):
        ModuleEwc(model, 1.0).learn_task(two_tasks()[0][:1], loss_of)
    assert not caplog.records


def test_a_low_rank_adapter_has_a_memory_of_its_own_and_the_frozen_base_none() -> None:
    model = network()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    model[0].register_module("adapter", nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 24, bias=False)))
    model[0].forward = lambda x, base=model[0]: functional.linear(x, base.weight, base.bias) + base.adapter(x)
    ewc = ModuleEwc(model, 1.0)
    ewc.learn_task(two_tasks()[0], loss_of)
    names = {shard.name for shard in ewc.memory.shards}
    assert names == {"0.adapter.0.weight", "0.adapter.1.weight", "2.weight", "2.bias"}
    assert all(shard.precision.any() for shard in ewc.memory.shards if shard.name != "0.adapter.0.weight")


def test_components_are_the_first_parts_of_names() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    assert {shard.component for shard in module_shards(model)} == {"encoder", "head"}


def test_bad_inputs_are_refused_with_a_way_out() -> None:
    model = network()
    with pytest.raises(ConfigError, match="strength"):
        ModuleEwc(model, -1.0)
    ewc = ModuleEwc(model, 1.0)
    for batches, error in (([], DataError), ([torch.zeros(2, 8)], DataError)):
        with pytest.raises(error) as caught:
            ewc.learn_task(batches, loss_of)
        assert caught.value.action
    with pytest.raises(ConfigError, match="logit_reversal"):
        ewc.learn_task(two_tasks()[0], loss_of, estimator="logit_reversal")
    broken = [{**batch, "x": batch["x"] * float("nan")} for batch in two_tasks()[0]]
    with pytest.raises(CheckpointError, match="Fisher of"):
        ewc.learn_task(broken, loss_of)
