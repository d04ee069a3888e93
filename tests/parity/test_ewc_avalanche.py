"""Avalanche's EWC (avalanche-lib 0.6, `EWCPlugin`, mode "separate" and "online") on the same model, data and batches.

Its importance is the squared gradient of a mini-batch's mean loss, averaged over mini-batches (our `microbatch`); its penalty is
lambda * sum F (theta - theta*)^2 without the factor 1/2, so our strength is twice its lambda. Each case runs twice: against the package
itself (extra `peers`; skipped with the reason where it is not installed) and against its published formula, which is always run.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hsmn_dist.continual.library import ModuleEwc
from tests.support.param_shards import module_shards

BATCH, LAMBDA = 4, 0.7


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


def data(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(10, 5, generator=generator), torch.randint(0, 3, (10,), generator=generator)


class Formula:
    """What `EWCPlugin` computes, written from its documentation and source."""

    def __init__(self, mode: str, decay: float | None) -> None:
        self.mode, self.decay = mode, decay
        self.kept: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def learn(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        parts = range(0, len(x), BATCH)
        importance = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for start in parts:
            loss = functional.cross_entropy(model(x[start : start + BATCH]), y[start : start + BATCH])
            for total, g in zip(importance.values(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
                total += g.square() / len(parts)
        measured = {name: value.clone() for name, value in importance.items()}
        if self.mode == "online" and self.kept:
            importance = {name: self.decay * self.kept[-1][0][name] + value for name, value in importance.items()}
        self.kept.append((importance, {name: p.detach().clone() for name, p in model.named_parameters()}))
        return measured

    def penalty(self, model: nn.Module) -> Tensor:
        kept = self.kept if self.mode == "separate" else self.kept[-1:]
        weights = dict(model.named_parameters())
        return LAMBDA * sum((f[n] * (weights[n] - a[n]).square()).sum() for f, a in kept for n in weights)


_KEPT: list[torch.library.Library] = []


def let_torchvision_import() -> None:
    """Declare the operators that torchvision's Python part wants, where its compiled part was built for another torch.

    Avalanche imports torchvision for its data sets; EWC uses none of it, but a torchvision for CUDA beside a torch for CPUs
    cannot even be imported without them.
    """
    if _KEPT:
        return
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except (ImportError, RuntimeError):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)


class Package:
    """The same through avalanche-lib itself."""

    def __init__(self, mode: str, decay: float | None) -> None:
        let_torchvision_import()
        try:
            from avalanche.training.plugins.ewc import EWCPlugin
        except (ImportError, RuntimeError) as error:
            pytest.skip(f"avalanche-lib cannot be imported here: {error}")
        self.plugin = EWCPlugin(LAMBDA, mode, decay)
        self.count = 0

    def learn(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        rows = [(x[i], y[i], 0) for i in range(len(x))]
        strategy = SimpleNamespace(
            model=model,
            _criterion=functional.cross_entropy,
            optimizer=torch.optim.SGD(model.parameters(), 0.1),
            experience=SimpleNamespace(dataset=rows),
            device="cpu",
            train_mb_size=BATCH,
            clock=SimpleNamespace(train_exp_counter=self.count),
        )
        found = self.plugin.compute_importances(
            model, strategy._criterion, strategy.optimizer, rows, strategy.device, BATCH
        )
        self.plugin.after_training_exp(strategy)
        self.count += 1
        return {name: value.data for name, value in found.items()}

    def penalty(self, model: nn.Module) -> Tensor:
        clock = SimpleNamespace(train_exp_counter=self.count)
        strategy = SimpleNamespace(model=model, clock=clock, device="cpu", loss=torch.zeros(()))
        self.plugin.before_backward(strategy)
        return strategy.loss


@pytest.mark.parametrize("peer_kind", [Formula, Package])
@pytest.mark.parametrize(("mode", "decay"), [("separate", None), ("online", 0.6)])
def test_importance_penalty_and_gradient_equal_those_of_the_peer(peer_kind, mode: str, decay: float | None) -> None:
    peer = peer_kind(mode, decay)
    model = network()
    ewc = ModuleEwc(model, 2 * LAMBDA, online_decay=decay or 1.0)
    for task in range(3):
        x, y = data(task)
        batches = [{"x": x[i : i + BATCH], "y": y[i : i + BATCH]} for i in range(0, 10, BATCH)]
        ours = ewc.learn_task(
            batches,
            lambda m, b: functional.cross_entropy(m(b["x"]), b["y"], reduction="none"),
            estimator="microbatch",
        )
        theirs = peer.learn(model, x, y)
        for found, wanted in zip(ours, theirs.values(), strict=True):
            torch.testing.assert_close(found, wanted.reshape(-1), rtol=1e-4, atol=1e-9)
        model.zero_grad()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        penalty = peer.penalty(model)
        assert float(ewc.value()) == pytest.approx(penalty.item(), rel=1e-5)
        expected = torch.autograd.grad(penalty, list(model.parameters()))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        ewc.add_gradients()
        for shard, wanted in zip(module_shards(model), expected, strict=True):
            torch.testing.assert_close(shard.gradient, wanted.reshape(-1), rtol=1e-4, atol=1e-6)
