"""Tokens a second, MFU and peak memory of a bf16 training step on one GPU: both families beside plain models of the same size.

    python benchmarks/gpu_step.py --json                              # about 350M and 1B parameters, torch
    torchrun --nproc-per-node 1 benchmarks/gpu_step.py --json --engine deepspeed      # the same under DeepSpeed, ZeRO-1
    python benchmarks/gpu_step.py --device cpu --tiny --json          # toy sizes on a CPU, to see that the script works

Needs torch (and deepspeed for `--engine deepspeed`) and nothing else. A step is forward, backward and AdamW; parameters and optimizer
state are fp32, products run in bf16 by autocast (`deepspeed` keeps bf16 parameters and fp32 masters). MFU counts the matrix FLOPs that
the model owes (three forward passes; recomputation is not counted) against the device's dense bf16 peak. Without a CUDA device the
script says so and ends with code 3.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measuring
from dense_decoder import DenseDecoder, dense_decoder_of, num_parameters
from dense_encoder_decoder import DenseEncoderDecoder

from hsmn_dist.config.models import HopeConfig, HsmnConfig, ModelConfig
from hsmn_dist.foundation.errors import PlanError
from hsmn_dist.models.build import build_model
from hsmn_dist.models.contract import ModelInput, cross_entropy
from hsmn_dist.planner.flops import Lengths, forward_flops
from hsmn_dist.planner.hardware import DEVICES, find_device
from hsmn_dist.training.activation_checkpointing import checkpoint_blocks

NO_DEVICE, NO_LAUNCHER = 3, 4
GOALS = {"hsmn": 0.45, "hope": 0.40}
HSMN_350M = {
    "vocab_size": 32000,
    "d_model": 1024,
    "num_heads": 16,
    "d_feed_forward": 4096,
    "num_encoder_layers": 4,
    "num_decoder_layers": 14,
    "d_compressed": 256,
    "d_aggregator": 512,
    "aggregator_rank": 128,
    "encoder_dropout": 0.0,
    "decoder_dropout": 0.0,
}
HOPE_350M = {"vocab_size": 32000, "d_model": 1024, "num_layers": 18, "num_heads": 16, "d_feed_forward": 4096}
CONFIGS: dict[str, dict[str, ModelConfig]] = {
    "350M": {"hsmn": HsmnConfig(**HSMN_350M), "hope": HopeConfig(**HOPE_350M)},
    "1B": {
        "hsmn": HsmnConfig(
            **{**HSMN_350M, "d_model": 1536, "d_feed_forward": 6144, "num_decoder_layers": 20},
        ),
        "hope": HopeConfig(**{**HOPE_350M, "d_model": 1536, "num_layers": 24, "d_feed_forward": 6144}),
    },
    "tiny": {
        "hsmn": HsmnConfig(
            vocab_size=64,
            d_model=32,
            num_heads=2,
            d_feed_forward=64,
            num_encoder_layers=1,
            num_decoder_layers=1,
            d_compressed=8,
            d_aggregator=16,
            aggregator_rank=4,
        ),
        "hope": HopeConfig(vocab_size=64, d_model=32, num_layers=1, num_heads=2, d_feed_forward=64),
    },
}
Loss = Callable[[], Tensor]


def lengths_of(family: str, arguments: argparse.Namespace) -> Lengths:
    """Context and target tokens of an example: HSMN reads a long context, HOPE has targets alone."""
    if family == "hsmn":
        return Lengths(arguments.context, arguments.target)
    return Lengths(0, arguments.sequence)


def random_batch(config: ModelConfig, lengths: Lengths, arguments: argparse.Namespace) -> ModelInput:
    """Every target scored."""
    size = arguments.batch
    context = torch.randint(4, config.vocab_size, (size, lengths.context_tokens))
    target = torch.randint(4, config.vocab_size, (size, lengths.target_tokens))
    whole = ModelInput(
        context, torch.ones_like(context, dtype=torch.bool), target, torch.ones_like(target, dtype=torch.bool)
    )
    return whole.to(arguments.device)


class MeanLoss(nn.Module):
    """The mean loss of one of the contenders, so that both engines wrap one module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: ModelInput) -> Tensor:
        """Mean nats a target token."""
        if isinstance(self.model, DenseDecoder):
            return self.model(torch.cat([torch.ones_like(inputs.target_ids[:, :1]), inputs.target_ids], dim=1))  # type: ignore[no-any-return]
        if isinstance(self.model, DenseEncoderDecoder):
            return self.model(inputs)  # type: ignore[no-any-return]
        return self.model(inputs, target_loss=cross_entropy).nll.mean()  # type: ignore[no-any-return]


def build(name: str, config: ModelConfig, arguments: argparse.Namespace) -> nn.Module:
    """`ours`, or the plain model with (about) as many parameters."""
    torch.manual_seed(0)
    if name == "ours":
        model = build_model(config)
        checkpoint_blocks(model, arguments.recompute)
        return model
    if isinstance(config, HsmnConfig):
        return DenseEncoderDecoder(config)
    assert isinstance(config, HopeConfig)
    total = num_parameters(build_model(config))
    return dense_decoder_of(config.vocab_size, config.d_model, config.num_layers, config.num_heads, total)


def torch_step(model: nn.Module, inputs: ModelInput, arguments: argparse.Namespace) -> Callable[[], None]:
    """Forward, backward and AdamW with autocast."""
    module = MeanLoss(model).to(arguments.device).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=arguments.device == "cuda")
    loss: Any = torch.compile(module) if arguments.compile else module

    def step() -> None:
        with torch.autocast(arguments.device, dtype=torch.bfloat16):
            value = loss(inputs)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def deepspeed_step(model: nn.Module, inputs: ModelInput, arguments: argparse.Namespace) -> Callable[[], None]:
    """The same under DeepSpeed's bf16 engine, ZeRO-1, one process."""
    import deepspeed
    import deepspeed.ops
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = "nccl" if arguments.device == "cuda" else "gloo"
        dist.init_process_group(backend)
        # On a CPU DeepSpeed would compile an all-reduce that one process has no use for.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    settings = {
        "train_micro_batch_size_per_gpu": arguments.batch,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=MeanLoss(model).train(), config=settings, dist_init_required=False)
    if arguments.compile:
        engine.compile()

    def step() -> None:
        engine.backward(engine(inputs))
        engine.step()

    return step


def measured(name: str, family: str, size: str, peak_flops: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: the model is built, timed and let go."""
    config = CONFIGS[size][family]
    lengths = lengths_of(family, arguments)
    inputs = random_batch(config, lengths, arguments)
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = build(name, config, arguments)
    parameters = num_parameters(model)
    step = (deepspeed_step if arguments.engine == "deepspeed" else torch_step)(model, inputs, arguments)
    seconds = []
    for number in range(arguments.warmups + arguments.steps):
        started = _now(arguments.device)
        step()
        if number >= arguments.warmups:
            seconds.append(_now(arguments.device) - started)
    median = statistics.median(seconds)
    flops = 3 * arguments.batch * _forward_flops(name, model, config, lengths)
    row: dict[str, Any] = {
        "family": family,
        "size": size,
        "model": name,
        "parameters": parameters,
        "tokens": arguments.batch * lengths.tokens,
        "step_seconds": median,
        "tokens_per_second": arguments.batch * lengths.tokens / median,
        "mfu": flops / median / peak_flops,
        "peak_bytes": torch.cuda.max_memory_allocated() if arguments.device == "cuda" else measuring.peak_bytes(),
    }
    if name == "ours":
        row["mfu_goal"] = GOALS[family]
    return row


def _forward_flops(name: str, model: nn.Module, config: ModelConfig, lengths: Lengths) -> float:
    if name == "ours":
        return forward_flops(config, lengths).total
    # The plain models: two for each weight that a token meets, and attention in full.
    width, targets, context = config.d_model, lengths.target_tokens, lengths.context_tokens
    if isinstance(model, DenseDecoder):
        weights = num_parameters(model) - model.embedding.weight.numel()
        return 2.0 * weights * targets + len(model.blocks) * 4.0 * targets * targets * width
    assert isinstance(model, DenseEncoderDecoder)
    encoder = 2.0 * num_parameters(model.encoder) * context + len(model.encoder) * 4.0 * context * context * width
    decoder = 2.0 * num_parameters(model.decoder) * targets + len(model.decoder) * 4.0 * targets * targets * width
    # Keys and values of the context are maps of its tokens, not of the targets; and every target reads every context token.
    cross = len(model.decoder) * (4.0 * width * width * (context - targets) + 4.0 * targets * context * width)
    return encoder + decoder + cross + 2.0 * model.head.weight.numel() * targets


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_flops_of(arguments: argparse.Namespace) -> tuple[str, float]:
    """The device's name and its dense bf16 FLOP/s, from the planner's table or `--peak-tflops`."""
    if arguments.device == "cpu":
        device = find_device("cpu")
        return device.name, (arguments.peak_tflops or 0) * 1e12 or device.bf16_flops
    name = torch.cuda.get_device_name()
    if arguments.peak_tflops:
        return name, arguments.peak_tflops * 1e12
    known = [key for key in DEVICES if key.split("_")[0] in name.lower().replace(" ", "")]
    if not known:
        raise PlanError(
            f"the device {name!r}, whose peak rate is not in the table",
            allowed=", ".join(DEVICES),
            action="give its dense bf16 rate with --peak-tflops",
        )
    return name, DEVICES[known[0]].bf16_flops


def parsed() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--engine", choices=["torch", "deepspeed"], default="torch")
    parser.add_argument("--families", nargs="+", choices=["hsmn", "hope"], default=["hsmn", "hope"])
    parser.add_argument("--sizes", nargs="+", choices=list(CONFIGS), default=["350M", "1B"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=16384, help="HSMN: context tokens of an example")
    parser.add_argument("--target", type=int, default=1024, help="HSMN: target tokens of an example")
    parser.add_argument("--sequence", type=int, default=4096, help="HOPE: tokens of a row")
    parser.add_argument("--recompute", choices=["none", "every_block", "every_second_block"], default="none")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmups", type=int, default=3)
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 rate of a device that the table does not know")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that the script works")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.sizes, arguments.batch, arguments.steps, arguments.warmups = ["tiny"], 2, 2, 1
        arguments.context, arguments.target, arguments.sequence, arguments.compile = 300, 16, 80, False
    return arguments


def refused(code: int, why: str) -> int:
    """Say why nothing is measured; the exit code."""
    print(f"gpu_step: {why}", file=sys.stderr)
    return code


def main() -> int:
    arguments = parsed()
    if arguments.engine == "deepspeed" and not torch.distributed.is_torchelastic_launched():
        return refused(
            NO_LAUNCHER,
            "--engine deepspeed without a launcher; allowed: one process that torchrun started; "
            "to do: torchrun --nproc-per-node 1 benchmarks/gpu_step.py --engine deepspeed ...",
        )
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return refused(
            NO_DEVICE,
            "no CUDA device is visible to torch; allowed: a machine with an NVIDIA GPU and a CUDA build of torch; "
            "to do: run it there, or give --device cpu --tiny to see that the script works",
        )
    try:
        device, peak_flops = peak_flops_of(arguments)
    except PlanError as error:
        return refused(NO_DEVICE, str(error))
    rows: list[dict[str, Any]] = []
    for family in arguments.families:
        for size in arguments.sizes:
            for name in ("ours", "plain"):
                try:
                    rows.append(measured(name, family, size, peak_flops, arguments))
                except torch.cuda.OutOfMemoryError:
                    rows.append(
                        {"family": family, "size": size, "model": name, "status": "not measured: out of memory"}
                    )
                gc.collect()
                if arguments.device == "cuda":
                    torch.cuda.empty_cache()
    facts = {
        "torch": torch.__version__,
        "device": device,
        "peak_bf16_flops": peak_flops,
        "engine": arguments.engine,
        "precision": "bf16",
        "is_compiled": arguments.compile,
        "recompute": arguments.recompute,
    }
    measuring.report(rows, facts, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
