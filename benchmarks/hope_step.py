"""Time of a training step (forward, backward, fp32) of HOPE's forms beside a plain dense decoder of the same parameters.

One run measures everything interleaved: round r times every model once, and medians over rounds are reported, in wall and
CPU seconds, as ratios to the dense decoder of the same round. `python benchmarks/hope_step.py --json` prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hsmn_dist.config.models import HopeConfig
from hsmn_dist.models.contract import ModelInput, cross_entropy
from hsmn_dist.models.hope.model import HopeModel
from hsmn_dist.models.layers.rotary import RotaryTable, rotary_table, rotate

Step = Callable[[Tensor], None]


class DenseBlock(nn.Module):
    """Pre-norm attention (SDPA, rotary) and MLP."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.project, self.output = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, table: RotaryTable) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        batch, tokens, width = x.shape
        heads = (
            t.reshape(batch, tokens, self.heads, -1).transpose(1, 2) for t in self.project(self.norm1(x)).chunk(3, -1)
        )
        query, key, value = heads
        read = F.scaled_dot_product_attention(rotate(query, table), rotate(key, table), value, is_causal=True)
        x = x + self.output(read.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Dense(nn.Module):
    """The plain decoder."""

    def __init__(self, vocab: int, width: int, layers: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.embedding = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(DenseBlock(width, heads, hidden) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width, eps=1e-6), nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean loss of the next tokens of [B, T]."""
        table = rotary_table(torch.arange(tokens.shape[1] - 1), self.head_dim)
        x = self.embedding(tokens[:, :-1])
        for block in self.blocks:
            x = block(x, table)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), tokens[:, 1:].flatten())


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def hope(arguments: argparse.Namespace, **changes: object) -> HopeModel:
    settings = {
        "vocab_size": arguments.vocab,
        "d_model": arguments.dim,
        "num_layers": arguments.layers,
        "num_heads": arguments.heads,
        "d_feed_forward": 4 * arguments.dim,
        **changes,
    }
    return HopeModel(HopeConfig(**settings))


def dense_like(arguments: argparse.Namespace, model: nn.Module) -> Dense:
    """The dense decoder whose MLP width makes its parameters equal `model`'s as closely as possible."""
    bare = num_parameters(Dense(arguments.vocab, arguments.dim, arguments.layers, arguments.heads, 0))
    per_unit = arguments.layers * (2 * arguments.dim + 1)
    hidden = max(1, round((num_parameters(model) - bare) / per_unit))
    return Dense(arguments.vocab, arguments.dim, arguments.layers, arguments.heads, hidden)


def hope_step(model: HopeModel) -> Step:
    def step(tokens: Tensor) -> None:
        empty = tokens[:, :0]
        inputs = ModelInput(empty, empty.bool(), tokens[:, 1:], torch.ones_like(tokens[:, 1:], dtype=torch.bool))
        nll = model(inputs, target_loss=cross_entropy).nll
        assert nll is not None
        model.zero_grad(set_to_none=True)
        nll.mean().backward()

    return step


def dense_step(model: Dense) -> Step:
    def step(tokens: Tensor) -> None:
        model.zero_grad(set_to_none=True)
        model(tokens).backward()

    return step


def titans_step(arguments: argparse.Namespace) -> tuple[Step, nn.Module] | None:
    """titans-pytorch's memory-as-context transformer, where installed."""
    try:
        from titans_pytorch import MemoryAsContextTransformer  # type: ignore[import-not-found]
    except ImportError:
        return None
    model = MemoryAsContextTransformer(
        num_tokens=arguments.vocab,
        dim=arguments.dim,
        depth=arguments.layers,
        heads=arguments.heads,
        dim_head=arguments.dim // arguments.heads,
        segment_len=64,
    )

    def step(tokens: Tensor) -> None:
        model.zero_grad(set_to_none=True)
        model(tokens, return_loss=True).backward()

    return step, model


def variants() -> dict[str, dict[str, object]]:
    chain = {"form": "chain", "levels": [{"period": 64, "hidden_units": 512}, {"period": 256, "hidden_units": 512}]}
    return {
        "attention + decay CMS": {},
        "linear + decay CMS": {"mixer": "linear"},
        "self-modifying + decay CMS": {"mixer": "self_modifying"},
        "attention + token-cadence CMS": {"cms": chain},
    }


def timed(step: Step, tokens: Tensor) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    step(tokens)
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(arguments: argparse.Namespace, tokens_per_row: int) -> list[dict[str, object]]:
    torch.manual_seed(0)
    tokens = torch.randint(0, arguments.vocab, (arguments.batch, tokens_per_row + 1))
    entries: list[tuple[str, Step, Step, int, int]] = []
    for name, changes in variants().items():
        if arguments.only and arguments.only not in name:
            continue
        model = hope(arguments, **changes)
        dense = dense_like(arguments, model)
        entries.append((name, hope_step(model), dense_step(dense), num_parameters(model), num_parameters(dense)))
    titans = None if arguments.only else titans_step(arguments)
    if titans is not None:
        dense = dense_like(arguments, titans[1])
        entries.append(
            ("titans-pytorch MAC", titans[0], dense_step(dense), num_parameters(titans[1]), num_parameters(dense))
        )
    times: dict[str, list[tuple[float, float, float, float]]] = {entry[0]: [] for entry in entries}
    for number in range(arguments.rounds + 1):
        for name, ours, theirs, _, _ in entries:
            pair = (*timed(ours, tokens), *timed(theirs, tokens))
            if number:  # the first round warms up
                times[name].append(pair)
    rows: list[dict[str, object]] = []
    for name, _, _, size, dense_size in entries:
        wall, cpu, dense_wall, dense_cpu = (statistics.median(column) for column in zip(*times[name], strict=True))
        ratio = statistics.median(pair[1] / pair[3] for pair in times[name])
        rows.append(
            {
                "model": name,
                "tokens": arguments.batch * tokens_per_row,
                "row_tokens": tokens_per_row,
                "parameters": size,
                "dense_parameters": dense_size,
                "wall_seconds": round(wall, 4),
                "cpu_seconds": round(cpu, 4),
                "dense_wall_seconds": round(dense_wall, 4),
                "dense_cpu_seconds": round(dense_cpu, 4),
                "cpu_ratio_to_dense": round(ratio, 3),
            }
        )
    if not arguments.only and titans is None:
        rows.append({"model": "titans-pytorch MAC", "row_tokens": tokens_per_row, "status": "not measured"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="measure only models whose name contains this")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [row for tokens in arguments.tokens for row in measure(arguments, tokens)]
    if arguments.json:
        print(json.dumps({"torch": torch.__version__, "threads": arguments.threads, "rows": rows}, indent=2))
        return
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
