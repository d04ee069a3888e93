"""Is this cluster fit to train? Measured from every node: all-reduce rate, shared storage, clocks, MLflow; and what is wrong.

    python cluster/smoke.py --address auto --shared /shared --mlflow http://mlflow:5000

Runs on a Ray cluster, one rank per GPU, or one per node without GPUs. Exit code 1 when something is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

MIN_ALL_REDUCE = {"gpu": 10e9, "cpu": 0.05e9}
MIN_STORAGE = 50e6
MAX_SKEW_SECONDS = 1.0


@dataclass
class Report:
    """Measured values and what is wrong with them."""

    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def check(self, is_wrong: bool, problem: str) -> None:
        """Note a problem."""
        if is_wrong:
            self.problems.append(problem)


@ray.remote(num_cpus=0)
def clock() -> float:
    """Seconds since 1970 by this node's clock."""
    return time.time()


@ray.remote(num_cpus=0)
def write_file(folder: str, name: str, num_bytes: int) -> float:
    """Write and flush a file; bytes per second."""
    block = os.urandom(2**20)
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with path.open("wb") as stream:
        for _ in range(num_bytes // len(block)):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    return num_bytes / (time.perf_counter() - start)


@ray.remote(num_cpus=0)
def read_file(folder: str, name: str) -> tuple[int, float]:
    """Size of a file that another node wrote, and bytes per second."""
    start = time.perf_counter()
    try:
        size = len((Path(folder) / name).read_bytes())
    except OSError:
        return 0, 0.0
    return size, size / (time.perf_counter() - start)


@ray.remote(num_cpus=0)
def mlflow_answer(uri: str) -> str:
    """Empty when the server answers, else why not."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10) as answer:
            return "" if answer.status == 200 else f"status {answer.status}"
    except OSError as error:
        return str(error)


@ray.remote(num_cpus=0)
class Rank:
    """One rank of an all-reduce."""

    def address(self) -> str:
        """Host and a free port of it."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as listener:
            listener.bind((host, 0))
            return f"{host}:{listener.getsockname()[1]}"

    def all_reduce(self, address: str, rank: int, world_size: int, num_bytes: int) -> float:
        """Bus bytes per second of a ring all-reduce of `num_bytes`."""
        import torch
        import torch.distributed as dist

        is_gpu = torch.cuda.is_available() and bool(ray.get_gpu_ids())
        device = torch.device("cuda", 0) if is_gpu else torch.device("cpu")
        dist.init_process_group(
            "nccl" if is_gpu else "gloo", init_method=f"tcp://{address}", rank=rank, world_size=world_size
        )
        tensor = torch.ones(num_bytes // 4, device=device)
        best = float("inf")
        for _ in range(5):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(tensor)
            if is_gpu:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
            tensor.fill_(1.0)
        dist.all_reduce(tensor)
        assert tensor[0].item() == world_size, "an all-reduce gave a wrong sum"
        dist.destroy_process_group()
        return 2 * (world_size - 1) / world_size * num_bytes / best


def on(node: dict[str, Any]) -> dict[str, Any]:
    """Options that place a task or actor on a node."""
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)}


def measure_clocks(nodes: list[dict[str, Any]], report: Report) -> None:
    """Offset of each node's clock from this one's, by the shortest of five round trips."""
    for node in nodes:
        ray.get(clock.options(**on(node)).remote())
        trips = []
        for _ in range(5):
            before = time.time()
            there = ray.get(clock.options(**on(node)).remote())
            after = time.time()
            trips.append((after - before, there - (before + after) / 2))
        trip, offset = min(trips)
        host = node["NodeManagerHostname"]
        report.values[f"clock/{host}_seconds"] = round(offset, 3)
        report.check(
            abs(offset) > MAX_SKEW_SECONDS + trip, f"{host}: its clock is {offset:+.1f} s off; run chrony or ntpd"
        )


def measure_storage(nodes: list[dict[str, Any]], folder: str, num_bytes: int, report: Report) -> None:
    """Every node writes a file, and reads the next node's."""
    names = [f"smoke-{os.getpid()}-{index}" for index in range(len(nodes))]
    writes = ray.get(
        [write_file.options(**on(n)).remote(folder, f, num_bytes) for n, f in zip(nodes, names, strict=True)]
    )
    turned = names[1:] + names[:1]
    reads = ray.get([read_file.options(**on(n)).remote(folder, f) for n, f in zip(nodes, turned, strict=True)])
    for node, written, (size, rate) in zip(nodes, writes, reads, strict=True):
        host = node["NodeManagerHostname"]
        report.values[f"storage/{host}_write_bytes_per_second"] = round(written)
        report.values[f"storage/{host}_read_bytes_per_second"] = round(rate)
        report.check(written < MIN_STORAGE, f"{host}: writes {folder} at {written / 1e6:.0f} MB/s")
        report.check(size != num_bytes, f"{host}: does not see what another node wrote to {folder}; it is not shared")
    for name in names:
        (Path(folder) / name).unlink(missing_ok=True)


def measure_all_reduce(nodes: list[dict[str, Any]], num_bytes: int, report: Report) -> None:
    """One ring over all GPUs; over one CPU rank per node where there are none."""
    kind = "gpu" if any(node["Resources"].get("GPU") for node in nodes) else "cpu"
    places = [node for node in nodes for _ in range(int(node["Resources"].get("GPU", 0)) if kind == "gpu" else 1)]
    if len(places) < 2:
        report.values["all_reduce/ranks"] = len(places)
        return
    ranks = [Rank.options(num_gpus=int(kind == "gpu"), **on(node)).remote() for node in places]
    address = ray.get(ranks[0].address.remote())
    rates = ray.get([r.all_reduce.remote(address, i, len(ranks), num_bytes) for i, r in enumerate(ranks)])
    report.values["all_reduce/ranks"] = len(ranks)
    report.values["all_reduce/bus_bytes_per_second"] = round(min(rates))
    report.check(
        min(rates) < MIN_ALL_REDUCE[kind],
        f"all-reduce over {len(ranks)} ranks moves {min(rates) / 1e9:.2f} GB/s: set NCCL_DEBUG=INFO and see which network "
        "it chose (cluster/nccl.env)",
    )
    for rank in ranks:
        ray.kill(rank)


def main() -> int:
    """Measure, print, say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", default="auto")
    parser.add_argument("--nodes", type=int, default=0, help="nodes that must be there")
    parser.add_argument("--shared", default="", help="folder that every node should see")
    parser.add_argument("--mlflow", default="", help="URI of the tracking server")
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    ray.init(address=arguments.address, log_to_driver=False, logging_level="ERROR")
    nodes = [node for node in ray.nodes() if node["Alive"]]
    report = Report({"nodes": len(nodes)})
    report.check(len(nodes) < arguments.nodes, f"{len(nodes)} of {arguments.nodes} nodes are there")
    num_bytes = arguments.megabytes * 2**20
    measure_clocks(nodes, report)
    if arguments.shared:
        measure_storage(nodes, arguments.shared, num_bytes, report)
    if arguments.mlflow:
        for node in nodes:
            why = ray.get(mlflow_answer.options(**on(node)).remote(arguments.mlflow))
            report.check(bool(why), f"{node['NodeManagerHostname']}: MLflow at {arguments.mlflow}: {why}")
    measure_all_reduce(nodes, num_bytes, report)
    if arguments.json:
        print(json.dumps({"values": report.values, "problems": report.problems}, indent=2))
    else:
        for name, value in report.values.items():
            print(f"{name:<56} {value:,}")
        print("\n".join(f"PROBLEM {problem}" for problem in report.problems) or "nothing is wrong")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
