"""Forward and backward of one very long context, its chunks divided over ranks: seconds, bytes sent, peak memory.

    python benchmarks/context_parallel.py --tokens 1000000 --ranks 2 --json

Each rank is a process of its own on this machine (gloo). Peak memory is the largest resident size of each, summed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from hsmn_dist.config.models import HsmnConfig
from hsmn_dist.config.training import TrainingConfig
from hsmn_dist.distributed.world import World
from hsmn_dist.models.build import build_model
from hsmn_dist.models.contract import ModelInput, cross_entropy
from hsmn_dist.models.hsmn.model import HsmnModel
from hsmn_dist.training.context_parallel import ChunkExchange, divide_context


def one_rank(arguments: argparse.Namespace) -> dict[str, Any]:
    """One pass on this rank; figures of it alone."""
    torch.set_num_threads(1)
    world = World.from_environment(device="cpu")
    torch.manual_seed(0)
    config = HsmnConfig(
        vocab_size=260,
        d_model=arguments.width,
        num_heads=2,
        d_feed_forward=2 * arguments.width,
        num_decoder_layers=2,
        encoder_group_chunks=arguments.group_chunks,
        encoder_dropout=0.0,
        decoder_dropout=0.0,
    )
    model = build_model(config)
    assert isinstance(model, HsmnModel)
    divide_context(model, TrainingConfig(context_parallel=world.world_size), world)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    context = torch.randint(4, 260, (1, arguments.tokens))
    target = torch.randint(4, 260, (1, arguments.target_tokens))
    inputs = ModelInput(context, torch.ones_like(context).bool(), target, torch.ones_like(target).bool())
    started = time.perf_counter()
    output = model(inputs, target_loss=cross_entropy)
    forward = time.perf_counter() - started
    output.nll.sum().backward()
    seconds = time.perf_counter() - started
    exchange = model.leaf_exchange
    sent = exchange.bytes if isinstance(exchange, ChunkExchange) else None
    return {
        "rank": world.rank,
        "chunks": model.chunker.num_chunks(arguments.tokens),
        "loss": float(output.nll.detach().mean()),
        "gradient_norm_squared": sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None),
        "forward_seconds": forward,
        "seconds": seconds,
        "bytes_forward": sent.forward if sent else 0,
        "bytes_backward": sent.backward if sent else 0,
        "bytes_padding": sent.padding if sent else 0,
        "process_bytes": before,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def all_ranks(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start every rank as this script's child and add their figures up."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ranks = []
    for rank in range(arguments.ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": arguments.ranks}
        environment = {**os.environ, **{key: str(value) for key, value in place.items()}}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, __file__, "--as-rank", *sys.argv[1:]]
        ranks.append(subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True))
    rows = [json.loads(process.communicate()[0].strip().splitlines()[-1]) for process in ranks]
    return {
        "tokens": arguments.tokens,
        "ranks": arguments.ranks,
        "width": arguments.width,
        "group_chunks": arguments.group_chunks,
        "chunks": rows[0]["chunks"],
        "bytes_expected_each_way": rows[0]["chunks"] * 128 * 4,
        "seconds": max(row["seconds"] for row in rows),
        "peak_gib_of_all_ranks": sum(row["peak_bytes"] for row in rows) / 2**30,
        "rows": rows,
    }


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--target-tokens", type=int, default=16)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--group-chunks", type=int, default=256)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_rank:
        print(json.dumps(one_rank(arguments)))
        return
    found = all_ranks(arguments)
    if arguments.json:
        print(json.dumps(found))
        return
    for row in found["rows"]:
        print(
            f"rank {row['rank']}: {row['seconds']:.1f} s, peak {row['peak_bytes'] / 2**30:.2f} GiB, loss {row['loss']:.4f}"
        )
    print(
        f"{found['tokens']:,} tokens, {found['chunks']:,} chunks on {found['ranks']} ranks: {found['seconds']:.1f} s, peak "
        f"{found['peak_gib_of_all_ranks']:.2f} GiB in all; sent {found['rows'][0]['bytes_forward']:,} bytes forward and "
        f"{found['rows'][0]['bytes_backward']:,} back (chunks x 128 x 4 = {found['bytes_expected_each_way']:,})"
    )


if __name__ == "__main__":
    main()
