"""What an exact per-example Fisher costs beside one plain forward and backward pass of the same examples.

    python benchmarks/fisher.py [--json] [--rounds 5] [--model decoder|hsmn|both] [--ways plain ours loop] [--device cpu|cuda]

Ways: ours (taps), a loop of single examples, `torch.func.vmap(grad)`, opacus' GradSampleModule. Each way runs in a process
of its own with one thread, in turns with the others, so that all of them meet the same machine; the time is CPU time on a CPU
and wall time on a GPU. A ratio is the median over the rounds of the quotient within a round; memory is the peak beyond the
resident weights. The head is untied, because opacus gives wrong gradients for a tied one. How far each way is from the loop's
numbers stands beside its time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measuring
import torch
from torch import Tensor, nn
from torch.nn import functional

from hsmn_dist.config.models import HsmnConfig
from hsmn_dist.continual.example_gradients import ExampleGradients
from hsmn_dist.continual.square_sums import add_squares
from hsmn_dist.models.build import build_model
from hsmn_dist.models.contract import ModelInput, cross_entropy

BATCH, TOKENS, VOCAB, WIDTH, LAYERS = 8, 128, 4096, 256, 10
WAYS = ("plain", "ours", "loop", "vmap", "opacus")


class Block(nn.Module):
    """A pre-norm decoder block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.project, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        query, key, value = (
            t.unflatten(-1, (8, -1)).transpose(-3, -2) for t in self.project(self.norm_1(x)).chunk(3, -1)
        )
        read = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(read.transpose(-3, -2).flatten(-2))
        return x + self.down(functional.gelu(self.up(self.norm_2(x))))


class Decoder(nn.Module):
    """About 10M parameters, untied."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> each example's mean loss [B]."""
        x = self.table(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device).expand(ids.shape[0], -1))
        logits = self.head(self.norm(self.blocks(x)))
        losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return losses.view(ids.shape[0], -1).mean(1)


class HsmnLosses(nn.Module):
    """An HSMN of about 10M parameters reading 128 context tokens and writing 128."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build_model(
            HsmnConfig(
                vocab_size=VOCAB,
                d_model=WIDTH,
                num_heads=8,
                d_feed_forward=4 * WIDTH,
                num_encoder_layers=2,
                num_decoder_layers=5,
                chunk_size=64,
                chunk_stride=32,
                encoder_dropout=0.0,
                decoder_dropout=0.0,
            )
        )

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> each example's mean loss [B]; the context is the target in reverse."""
        everything = torch.ones_like(ids, dtype=torch.bool)
        inputs = ModelInput(ids.flip(1), everything, ids, everything)
        return self.model(inputs, target_loss=cross_entropy).nll.mean(1)


def ours(model: nn.Module, ids: Tensor, totals: dict[str, Tensor]) -> None:
    """Taps: one batched backward pass."""
    taps = ExampleGradients(model, dict(model.named_parameters()))
    with taps.installed():
        taps.run(lambda: model(ids).sum(), len(ids), lambda name, uses: add_squares(uses, len(ids), totals[name]))


def loop(model: nn.Module, ids: Tensor, totals: dict[str, Tensor]) -> None:
    """One forward and backward pass an example."""
    weights = list(model.parameters())
    for row in range(len(ids)):
        found = torch.autograd.grad(model(ids[row : row + 1]).sum(), weights, allow_unused=True)
        for total, gradient in zip(totals.values(), found, strict=True):
            if gradient is not None:
                total.addcmul_(gradient, gradient)


def vmap_grad(model: nn.Module, ids: Tensor, totals: dict[str, Tensor]) -> None:
    """`torch.func`."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (row[None],)).sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, ids)
    for name, gradient in found.items():
        totals[name].add_(gradient.square_().sum(0))


def opacus_grads(model: nn.Module, ids: Tensor, totals: dict[str, Tensor]) -> None:
    """Opacus' hooks, gradients per sample, then squared."""
    from opacus import GradSampleModule

    wrapped = getattr(model, "_wrapped", None)
    if wrapped is None:
        wrapped = GradSampleModule(model, loss_reduction="sum")
        object.__setattr__(model, "_wrapped", wrapped)
    wrapped.zero_grad()
    wrapped(ids).sum().backward()
    for name, parameter in model.named_parameters():
        totals[name].add_(parameter.grad_sample.square_().sum(0))
        parameter.grad_sample = None


def plain(model: nn.Module, ids: Tensor, totals: dict[str, Tensor]) -> None:
    """What every ratio is of."""
    model.zero_grad(set_to_none=True)
    model(ids).sum().backward()


FUNCTIONS = {"plain": plain, "ours": ours, "loop": loop, "vmap": vmap_grad, "opacus": opacus_grads}


def resident_bytes() -> int:
    """Memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def serve(way: str, model_name: str, device: str, pipe: Any) -> None:
    """A process for one way: runs it once when asked, and reports time, checksum and peak memory."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = (Decoder() if model_name == "decoder" else HsmnLosses()).to(device)
    ids = torch.randint(4, VOCAB, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1)).to(device)
    totals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    num_parameters = sum(p.numel() for p in model.parameters())
    before = resident_bytes()
    clock = time.process_time if device == "cpu" else time.perf_counter
    while pipe.recv() == "run":
        for total in totals.values():
            total.zero_()
        try:
            if device != "cpu":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = clock()
            FUNCTIONS[way](model, ids, totals)
            if device != "cpu":
                torch.cuda.synchronize()
            seconds = clock() - start
        except Exception as error:
            pipe.send({"error": f"{type(error).__name__}: {str(error)[:200]}"})
            continue
        peak = measuring.peak_bytes() - before
        if device != "cpu":
            peak = torch.cuda.max_memory_allocated() - 8 * num_parameters
        checksum = {name: float(total.double().sum()) for name, total in totals.items()}
        pipe.send({"seconds": seconds, "peak": peak, "checksum": checksum, "num_parameters": num_parameters})


def measure(model_name: str, device: str, rounds: int, ways: Sequence[str]) -> dict[str, Any]:
    """The ways in turns; ratios to plain."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, {}
    for way in ways:
        pipes[way], theirs = context.Pipe()
        processes[way] = context.Process(target=serve, args=(way, model_name, device, theirs), daemon=True)
        processes[way].start()
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    errors: dict[str, str] = {}
    for turn in range(rounds + 1):
        for way in ways:
            if way in errors:
                continue
            pipes[way].send("run")
            answer = pipes[way].recv()
            if "error" in answer:
                errors[way] = answer["error"]
            elif turn or rounds == 0:  # the first turn warms up
                results[way].append(answer)
    for way in ways:
        pipes[way].send("stop")
        processes[way].join(10)
    return summary(model_name, results, errors)


def summary(model_name: str, results: dict[str, list[dict[str, Any]]], errors: dict[str, str]) -> dict[str, Any]:
    """Seconds, ratios and agreement with the loop."""
    base = results["plain"]
    table: dict[str, Any] = {}
    for way in results:
        if way in errors:
            table[way] = {"error": errors[way]}
            continue
        seconds = [r["seconds"] for r in results[way]]
        rounds = zip(seconds, base, strict=True)
        peak = max(r["peak"] for r in results[way])
        table[way] = {
            "seconds": statistics.median(seconds),
            "ratio": statistics.median(mine / plain["seconds"] for mine, plain in rounds),
            "peak_bytes": peak,
            "memory_ratio": peak / max(r["peak"] for r in base),
        }
        if way != "plain":
            wanted, found = results["loop"][0]["checksum"], results[way][0]["checksum"]
            largest = max(wanted.values())
            table[way]["largest_difference"] = max(
                abs(found[name] - wanted[name]) / max(wanted[name], 1e-9 * largest) for name in wanted
            )
    return {"model": model_name, "num_parameters": base[0]["num_parameters"], "ways": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", choices=("decoder", "hsmn", "both"), default="both")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=WAYS, help="which; plain and loop are always among them"
    )
    options = parser.parse_args()
    ways = [way for way in WAYS if way in {"plain", "loop", *options.ways}]
    names = ("decoder", "hsmn") if options.model == "both" else (options.model,)
    results = [measure(name, options.device, options.rounds, ways) for name in names]
    if options.json:
        print(json.dumps({"batch": BATCH, "tokens": TOKENS, "device": options.device, "results": results}, indent=2))
        return
    for result in results:
        print(f"{result['model']}: {result['num_parameters']:,} parameters, batch {BATCH}, {TOKENS} tokens")
        for way, row in result["ways"].items():
            if "error" in row:
                print(f"  {way:7s} {row['error']}")
            else:
                print(
                    f"  {way:7s} {row['seconds']:7.3f} s  x{row['ratio']:.3f}  {row['peak_bytes'] / 2**20:7.0f} MiB "
                    f"x{row['memory_ratio']:.2f}  differs by {row.get('largest_difference', 0):.1e}"
                )


if __name__ == "__main__":
    main()
