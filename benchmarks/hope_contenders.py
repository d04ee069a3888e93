"""HOPE's part of `train_step.py`: its forms beside a dense decoder of the same parameters, and titans-pytorch where installed.

Width 256, 4 layers, 4 heads, vocabulary 4,096, one row a step. Each contender has a dense decoder of its own size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import measuring
import torch
from dense_decoder import dense_decoder_of, num_parameters
from torch import Tensor, nn

from hsmn_dist.config.models import HopeConfig
from hsmn_dist.models.contract import ModelInput, cross_entropy
from hsmn_dist.models.hope.model import HopeModel

TITANS = "titans-pytorch, memory as context"
CHAIN = {
    "form": "chain",
    "levels": [{"period": 64, "hidden_units": 512}, {"period": 256, "hidden_units": 512}],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "attention + decay CMS": {},
    "linear + decay CMS": {"mixer": "linear"},
    "self-modifying + decay CMS": {"mixer": "self_modifying"},
    "attention + token-cadence CMS": {"cms": CHAIN},
}
Step = Callable[[], None]


def _sizes(arguments: argparse.Namespace) -> dict[str, int]:
    if arguments.tiny:
        return {"vocab_size": 64, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_feed_forward": 32}
    return {"vocab_size": 4096, "d_model": 256, "num_layers": 4, "num_heads": 4, "d_feed_forward": 1024}


def _hope_step(model: HopeModel, tokens: Tensor) -> Step:
    empty, target = tokens[:, :0], tokens[:, 1:]
    inputs = ModelInput(empty, empty.bool(), target, torch.ones_like(target, dtype=torch.bool))

    def step() -> None:
        nll = model(inputs, target_loss=cross_entropy).nll
        assert nll is not None
        model.zero_grad()
        nll.mean().backward()

    return step


def _loss_step(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    def step() -> None:
        model.zero_grad()
        loss().backward()

    return step


def _titans(arguments: argparse.Namespace) -> nn.Module | None:
    try:
        from titans_pytorch import MemoryAsContextTransformer  # type: ignore[import-untyped]
    except ImportError:
        return None
    sizes = _sizes(arguments)
    return MemoryAsContextTransformer(  # type: ignore[no-any-return]
        num_tokens=sizes["vocab_size"],
        dim=sizes["d_model"],
        depth=sizes["num_layers"],
        heads=sizes["num_heads"],
        dim_head=sizes["d_model"] // sizes["num_heads"],
        segment_len=64,
    )


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each sequence length and contender; the dense decoder's seconds stand in the row of its rival."""
    sizes = _sizes(arguments)
    found: list[dict[str, Any]] = []
    for num_tokens in arguments.sequences:
        torch.manual_seed(0)
        tokens = torch.randint(0, sizes["vocab_size"], (1, num_tokens + 1))
        models: dict[str, nn.Module] = {}
        steps: dict[str, Step] = {}
        for name, changes in VARIANTS.items():
            if arguments.only in name:
                model = HopeModel(HopeConfig(**{**sizes, **changes}))
                models[name], steps[name] = model, _hope_step(model, tokens)
        titans = _titans(arguments) if arguments.only in TITANS and num_tokens <= arguments.titans_limit else None
        if titans is not None:
            models[TITANS] = titans
            steps[TITANS] = _loss_step(titans, lambda m=titans, t=tokens: m(t, return_loss=True))  # type: ignore[misc]
        bases, dense_sizes = {}, {}
        for name, model in list(models.items()):
            total = num_parameters(model)
            dense = dense_decoder_of(
                sizes["vocab_size"], sizes["d_model"], sizes["num_layers"], sizes["num_heads"], total
            )
            bases[name], dense_sizes[name] = f"dense for {name}", num_parameters(dense)
            steps[bases[name]] = _loss_step(dense, lambda m=dense, t=tokens: m(t))  # type: ignore[misc]
        # Each contender is followed by its own dense decoder, so that both meet the same machine.
        order = {key: steps[key] for name in models for key in (name, bases[name])}
        times = measuring.interleaved(order, arguments.repeats, arguments.warmups, bases)
        for name, model in models.items():
            dense_times = times[bases[name]]
            found.append(
                {
                    "family": "hope",
                    "model": name,
                    "tokens": num_tokens,
                    "parameters": num_parameters(model),
                    **times[name],
                    "dense_parameters": dense_sizes[name],
                    "dense_wall_seconds": dense_times["wall_seconds"],
                    "dense_cpu_seconds": dense_times["cpu_seconds"],
                }
            )
        if titans is None and arguments.only in TITANS:
            found.append({"family": "hope", "model": TITANS, "tokens": num_tokens, "status": _titans_status(arguments)})
    return found


def _titans_status(arguments: argparse.Namespace) -> str:
    missing = _titans(arguments) is None
    return "not measured: not installed" if missing else f"not measured: above --titans-limit {arguments.titans_limit}"


def goals(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The issue's goals beside what these rows say."""
    by_place = {(row["model"], row["tokens"]): row for row in found}
    entries = [
        ("attention + decay CMS over dense at 1,024", "attention + decay CMS", 1024, 1.15),
        ("linear + decay CMS over dense at 2,048", "linear + decay CMS", 2048, 1.0),
        ("linear + decay CMS over dense at 4,096", "linear + decay CMS", 4096, 1.0),
        ("linear + decay CMS over dense at 8,192", "linear + decay CMS", 8192, 1.0),
        ("self-modifying over dense at 1,024", "self-modifying + decay CMS", 1024, 3.0),
        ("token-cadence CMS over dense at 1,024", "attention + token-cadence CMS", 1024, 3.0),
    ]
    listed = [
        measuring.goal(what, limit, by_place.get((name, tokens), {}).get("cpu_share"))
        for what, name, tokens, limit in entries
    ]
    for name in ("linear + decay CMS", "self-modifying + decay CMS"):
        pair = [by_place.get((name, tokens), {}).get("cpu_seconds") for tokens in (4096, 8192)]
        if None not in pair:
            listed.append(measuring.goal(f"8,192 over 4,096 tokens, CPU time, {name}", 2.1, pair[1] / pair[0]))
    return listed
