"""The library face: the documented example, and that it does what the trainer's path does."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

from hsmn_dist.continual import fisher as fisher_module
from hsmn_dist.continual import gradient_rules
from hsmn_dist.continual.library import ModuleEwc, module_shards
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import CheckpointError, ConfigError, DataError, ModelError
from tests.support.distributed import run_distributed

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


class LowRank(nn.Module):
    """An adapter as peft wraps one: the frozen layer inside, two small matrices beside it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + 2.0 * self.lora_B["default"](self.lora_A["default"](x))


def test_wrapped_and_pruned_parameters_are_told_apart_by_name(tmp_path: Path, caplog) -> None:
    model = network()
    model[0] = LowRank(model[0], 2)
    prune.random_unstructured(model[2], "weight", 0.5)  # weight becomes weight_orig times a mask, in a hook
    batches = two_tasks()[0]
    ewc = ModuleEwc(model, 1.0)
    with caplog.at_level("WARNING"):
        ewc.learn_task(batches, loss_of)
    assert "2.weight_orig" in caplog.text, "a weight that is made anew in each forward pass has no rule"
    fisher = {shard.name: shard.precision for shard in ewc.memory.shards}
    assert list(fisher) == ["0.lora_A.default.weight", "0.lora_B.default.weight", "2.bias", "2.weight_orig"]
    assert not fisher["2.weight_orig"][model[2].weight_mask.view(-1) == 0].any() and fisher["2.weight_orig"].any()
    ewc.save(tmp_path)
    other = ModuleEwc(model, 1.0)
    other.load(tmp_path)
    assert all(torch.equal(fisher[shard.name], shard.precision) for shard in other.memory.shards)
    with pytest.raises(CheckpointError, match="differ"):
        ModuleEwc(network(), 1.0).load(tmp_path)


class LlamaLikeNorm(nn.Module):
    """As Llama's, T5's and Gemma's are written; `kind` says which, or that it is none of them."""

    def __init__(self, size: int, kind: str) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.kind = nn.Parameter(torch.rand(size)), 1e-6, kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        if self.kind == "another":
            normal = torch.tanh(normal)
        return normal * (1 + self.weight if self.kind == "offset" else self.weight)


class WithPositions(nn.Module):
    """Position embeddings looked up once for all examples, as in Hugging Face's GPT-2; `reads` says what is done with them."""

    def __init__(self, kind: str = "plain", reads: str = "broadcast") -> None:
        super().__init__()
        self.positions, self.first = nn.Embedding(8, 6), nn.Linear(1, 6)
        self.norm, self.out, self.reads = LlamaLikeNorm(6, kind), nn.Linear(6, 2), reads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = self.positions(torch.arange(x.shape[1])[None])
        if self.reads == "first row":
            places = places[0]
        elif self.reads == "one row alone":
            places = places.view(x.shape[1], -1)
        return self.out(self.norm(torch.tanh(self.first(x[..., None]) + places)).mean(1))


def squares_one_by_one(model: nn.Module, batches) -> list[torch.Tensor]:
    totals = [torch.zeros_like(p) for p in model.parameters()]
    rows = [{key: value[row : row + 1] for key, value in b.items()} for b in batches for row in range(len(b["x"]))]
    for row in rows:
        found = torch.autograd.grad(loss_of(model, row).sum(), list(model.parameters()))
        for total, gradient in zip(totals, found, strict=True):
            total += gradient.square() / len(rows)
    return totals


@pytest.mark.parametrize(
    ("kind", "reads", "is_batched"),
    [
        ("plain", "broadcast", True),
        ("offset", "broadcast", True),
        ("another", "broadcast", False),
        ("plain", "first row", False),
        ("plain", "one row alone", False),
    ],
)
def test_broadcast_positions_and_foreign_norms_are_batched_where_that_is_right(kind, reads, is_batched, caplog) -> None:
    torch.manual_seed(0)
    model, batches = WithPositions(kind, reads), two_tasks()[0][:2]
    with caplog.at_level("WARNING"):
        found = ModuleEwc(model, 1.0).learn_task(batches, loss_of)
    assert bool(caplog.records) is not is_batched, caplog.text
    for part, expected in zip(found, squares_one_by_one(model, batches), strict=True):
        torch.testing.assert_close(part, expected.view(-1), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_hugging_face_models_take_the_batched_path(family: str, caplog) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=31, n_positions=16, n_embd=12, n_layer=2, n_head=2)
    else:
        config = transformers.LlamaConfig(
            vocab_size=31, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2
        )
    model = transformers.AutoModelForCausalLM.from_config(config)

    def loss(model, batch):
        logits = model(input_ids=batch["ids"][:, :-1]).logits
        return functional.cross_entropy(logits.mT, batch["ids"][:, 1:], reduction="none").mean(1)

    batch = {"ids": torch.randint(0, 31, (4, 9))}
    with caplog.at_level("WARNING", logger="hsmn_dist"):
        found = ModuleEwc(model, 1.0).learn_task([batch], loss)
    assert not [record for record in caplog.records if record.name.startswith("hsmn_dist")]
    model.eval()
    wanted = [torch.zeros_like(p) for p in model.parameters()]
    for row in range(4):
        value = loss(model, {"ids": batch["ids"][row : row + 1]}).sum()
        for total, gradient in zip(wanted, torch.autograd.grad(value, list(model.parameters())), strict=True):
            total += gradient.square() / 4
    largest = max(float(total.norm()) for total in wanted)
    for part, expected in zip(found, wanted, strict=True):
        assert float((part - expected.view(-1)).norm()) < 1e-4 * float(expected.norm()) + 1e-9 * largest


def test_rounding_does_not_cost_the_batched_path_and_an_error_does(monkeypatch, caplog) -> None:
    plain = fisher_module.add_squares
    for factor, num_wrong, num_warned in ((1.003, 1, 1), (1.003, 9, 3), (1.5, 1, 1)):
        calls = itertools.count()

        def noisy(uses, slots, total, factor=factor, num_wrong=num_wrong, calls=calls) -> None:
            plain(uses, slots, total)
            if next(calls) < num_wrong:
                total.mul_(factor)

        monkeypatch.setattr(fisher_module, "add_squares", noisy)
        torch.manual_seed(0)
        model, batches = nn.Linear(8, 2, bias=False), two_tasks()[0]
        ways = []
        closed = fisher_module.FisherPass.close
        monkeypatch.setattr(fisher_module.FisherPass, "close", lambda self, w=ways: w.append(self.is_batched))
        caplog.clear()
        with caplog.at_level("WARNING"):
            found = ModuleEwc(model, 1.0).learn_task(batches, loss_of)
        monkeypatch.setattr(fisher_module.FisherPass, "close", closed)
        assert ways == [(factor, num_wrong) == (1.003, 1)] and len(caplog.records) == num_warned
        torch.testing.assert_close(found[0], squares_one_by_one(model, batches)[0].view(-1), rtol=1e-4, atol=1e-9)


def test_a_first_micro_batch_of_one_row_does_not_vouch_for_larger_ones() -> None:
    """Rows that are mixed up between examples cannot be seen in a micro-batch of one."""

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
    model[1].register_forward_hook(lambda module, args, output: output.flip(0))

    def mixed_loss(model, batch):
        return functional.cross_entropy(model(batch["x"]).flip(0), batch["y"], reduction="none")

    whole = two_tasks()[0][0]
    batches = [{key: value[:1] for key, value in whole.items()}, {key: value[1:] for key, value in whole.items()}]
    found = ModuleEwc(model, 1.0).learn_task(batches, mixed_loss)
    for part, expected in zip(found, squares_one_by_one(model, batches), strict=True):
        torch.testing.assert_close(part, expected.view(-1), rtol=1e-3, atol=1e-9)


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


def drawn_loss(model, batch):
    """Labels drawn from the model with torch's own generator, as van de Ven's `sampled` wants them."""
    logits = model(batch["x"])
    labels = torch.multinomial(torch.softmax(logits.detach(), 1), 1)[:, 0]
    return functional.cross_entropy(logits, labels, reduction="none")


def test_drawn_labels_take_the_batched_path_and_depend_on_the_seed_alone(caplog) -> None:
    model, batches = network(), two_tasks()[0]
    found = []
    torch.manual_seed(7)
    expected = torch.rand(1)
    for seed, state in ((0, 7), (0, 8), (1, 7)):
        torch.manual_seed(state)
        with caplog.at_level("WARNING"):
            found.append(ModuleEwc(model, 1.0).learn_task(batches, drawn_loss, estimator="sampled", seed=seed))
        assert state != 7 or torch.equal(torch.rand(1), expected), "the caller's generator stands where it stood"
    assert not caplog.records
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))


def test_drawn_labels_one_by_one_are_drawn_for_each_row(monkeypatch) -> None:
    """The way that modules without a rule take: the mean over seeds is that of the batched path."""
    model, batches = nn.Linear(8, 3), [{"x": torch.randn(16, 8)}]
    means = []
    for is_batched in (True, False):
        if not is_batched:
            monkeypatch.setattr(gradient_rules, "_RULES", {})
        draws = [
            ModuleEwc(model, 1.0).learn_task(batches, drawn_loss, estimator="sampled", seed=seed)[0]
            for seed in range(60)
        ]
        assert float(torch.stack(draws).std(0).mean()) > 0
        means.append(torch.stack(draws).mean(0))
    assert float((means[0] - means[1]).norm() / means[0].norm()) < 0.15


def test_a_fisher_of_zeros_is_refused() -> None:
    model = network()
    with pytest.raises(CheckpointError, match="zero in all") as caught:
        ModuleEwc(model, 1.0).learn_task(two_tasks()[0], lambda m, b: torch.zeros(len(b["x"])))
    assert caught.value.action


def sharded_networks(world: World) -> list[float]:
    """On two ranks under FSDP2, against the same network whole: how far Fisher and penalty gradient are."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world.world_size,))
    model, whole = network(), network()
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    batches = two_tasks()[0]
    ewc = ModuleEwc(model, 3.0)
    found = ewc.learn_task(batches[world.rank :: world.world_size], loss_of)
    errors = []
    every_row = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    for part, shard, parameter in zip(found, ewc.memory.shards, whole.parameters(), strict=True):
        wanted = torch.zeros_like(parameter)
        for row in range(len(every_row["x"])):
            loss = loss_of(whole, {key: value[row : row + 1] for key, value in every_row.items()}).sum()
            wanted += torch.autograd.grad(loss, parameter)[0].square() / len(every_row["x"])
        own = wanted.view(-1)[shard.start : shard.stop]
        errors.append(float((part - own).norm()) / float(wanted.norm()))
    loss_of(model, batches[0]).mean().backward()
    before = [p.grad.to_local().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().add_(0.5)
    ewc.add_gradients()
    for old, parameter, part in zip(before, model.parameters(), found, strict=True):
        errors.append(float(((parameter.grad.to_local() - old).view(-1) - 3.0 * 0.5 * part).abs().max()))
    return errors


def refused_sharded_network(world: World) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(8, 8), nn.PReLU(8), nn.Linear(8, 2))
    fully_shard(model, mesh=init_device_mesh("cpu", (world.world_size,)))
    with pytest.raises(ModelError, match="DTensor") as caught:
        ModuleEwc(model, 1.0).learn_task(two_tasks()[0][:2], loss_of)
    return caught.value.found


def test_fsdp_shards_have_the_fisher_of_the_whole_network() -> None:
    for errors in run_distributed(sharded_networks, 2):
        assert len(errors) == 8 and max(errors) < 1e-5, errors


def test_fsdp_shards_that_no_rule_covers_are_refused() -> None:
    assert all("1.weight" in found for found in run_distributed(refused_sharded_network, 2))
