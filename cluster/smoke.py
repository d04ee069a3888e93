"""Is this cluster fit to train? Measured on every node: all-reduce, shared storage, clocks, MLflow; and what is wrong.

    python cluster/smoke.py --address auto --shared /shared --mlflow http://mlflow:5000

Runs on a Ray cluster, one rank per GPU, or one per node without GPUs. Every step waits a bounded time for every node,
and what a node cannot do is a line `PROBLEM HOST: why`. Exit code 1 when something is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import socket
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

MIN_ALL_REDUCE = {"nccl": 10e9, "gloo": 0.05e9}
MIN_STORAGE = 50e6
MAX_SKEW_SECONDS = 1.0
# A collective gives up before its caller does, so that the rank can say why.
MARGIN_SECONDS = 30.0


@dataclass
class Report:
    """Measured values and what is wrong with them. `seconds` is what each step may take on each node."""

    seconds: float
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def check(self, is_wrong: bool, problem: str) -> None:
        """Note a problem."""
        if is_wrong:
            self.problems.append(problem)


@dataclass(frozen=True)
class Host:
    """One node of the cluster."""

    name: str
    node_id: str
    num_gpus: int

    def place(self) -> dict[str, Any]:
        """Options that put a task or an actor on it."""
        return {"scheduling_strategy": NodeAffinitySchedulingStrategy(self.node_id, soft=False)}


def alive_hosts() -> list[Host]:
    """Every node that Ray counts as alive."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return [Host(n["NodeManagerHostname"], n["NodeID"], int(n["Resources"].get("GPU", 0))) for n in nodes]


def reason(error: BaseException) -> str:
    """One line: what a task raised on its node, without Ray's wrapping and without the traceback."""
    cause = getattr(error, "cause", None) or error
    text = " ".join(str(cause).split())[:300]
    return text if text.startswith(type(cause).__name__) else f"{type(cause).__name__}: {text}"


def gather(references: list[Any], hosts: list[Host], what: str, report: Report, margin: float = 0.0) -> list[Any]:
    """Results in the order of `hosts`; None, and a problem that names the host, where there is no result in time."""
    limit = report.seconds + margin
    done, _ = ray.wait(references, num_returns=len(references), timeout=limit) if references else ([], [])
    results: list[Any] = []
    for host, reference in zip(hosts, references, strict=True):
        value = None
        if reference in done:
            try:
                value = ray.get(reference, timeout=limit)
            except Exception as error:  # a task raises whatever its node makes it raise
                report.problems.append(f"{host.name}: {what}: {reason(error)}")
        else:
            report.problems.append(f"{host.name}: {what}: no answer within {limit:.0f} s")
            with contextlib.suppress(Exception):  # a method of an actor ends with its actor
                ray.cancel(reference, force=True)
        results.append(value)
    return results


@ray.remote(num_cpus=0, max_retries=0)
def clock() -> float:
    """Seconds since 1970 by this node's clock."""
    return time.time()


@ray.remote(num_cpus=0, max_retries=0)
def write_file(folder: str, name: str, num_bytes: int) -> float:
    """Write and flush a file; bytes per second."""
    block = os.urandom(2**20)
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    try:
        with path.open("wb") as stream:
            for _ in range(num_bytes // len(block)):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            path.unlink(missing_ok=True)
        raise
    return num_bytes / (time.perf_counter() - start)


@ray.remote(num_cpus=0, max_retries=0)
def read_file(folder: str, name: str) -> tuple[int, float]:
    """Size of a file that another node wrote, and bytes per second; 0 when it is not there."""
    start = time.perf_counter()
    try:
        size = len((Path(folder) / name).read_bytes())
    except FileNotFoundError:
        return 0, 0.0
    return size, size / (time.perf_counter() - start)


@ray.remote(num_cpus=0, max_retries=0)
def link_file(folder: str, name: str, taken: str) -> bool:
    """Give a file a second name, as a lease is taken; False when another node has that name already."""
    try:
        os.link(Path(folder) / name, Path(folder) / taken)
    except FileExistsError:
        return False
    return True


@ray.remote(num_cpus=0, max_retries=0)
def rename_file(folder: str, taken: str, name: str) -> bool:
    """Rename a file away, as a stale lease is cleared; False when another node did it before."""
    try:
        os.rename(Path(folder) / taken, Path(folder) / name)
    except FileNotFoundError:
        return False
    return True


@ray.remote(num_cpus=0, max_retries=0)
def remove_files(folder: str, names: list[str]) -> None:
    """Remove what a node wrote."""
    for name in names:
        (Path(folder) / name).unlink(missing_ok=True)


@ray.remote(num_cpus=0, max_retries=0)
def mlflow_answer(uri: str) -> str:
    """Empty when the server answers, else why not."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10) as answer:
            return "" if answer.status == 200 else f"status {answer.status}"
    except (OSError, ValueError) as error:
        return str(error)


@ray.remote(num_cpus=0)
class Rank:
    """One rank of an all-reduce."""

    def start(self, backend: str) -> str:
        """A free address of this host, once its device computes; a GPU whose driver does not work ends here."""
        import torch

        if backend == "nccl":
            if not torch.cuda.is_available():
                raise RuntimeError(
                    "Ray counts a GPU here and CUDA does not start: see `nvidia-smi` and the torch build"
                )
            torch.ones(8, device="cuda").sum().item()
        host = ray.util.get_node_ip_address()
        with socket.socket() as listener:
            listener.bind((host, 0))
            return f"{host}:{listener.getsockname()[1]}"

    def all_reduce(
        self, backend: str, address: str, rank: int, world_size: int, num_bytes: int, seconds: float
    ) -> float:
        """Bus bytes per second of a ring all-reduce of `num_bytes`.

        Every rank is told the backend: one that chose for itself would hang the others.
        """
        import torch
        import torch.distributed as dist

        is_gpu = backend == "nccl"
        dist.init_process_group(
            backend,
            init_method=f"tcp://{address}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=seconds),
        )
        tensor = torch.ones(num_bytes // 4, device="cuda" if is_gpu else "cpu")
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
        if tensor[0].item() != world_size:
            raise RuntimeError(f"an all-reduce of ones over {world_size} ranks gave {tensor[0].item()}")
        dist.destroy_process_group()
        return 2 * (world_size - 1) / world_size * num_bytes / best


def measure_clocks(hosts: list[Host], report: Report) -> list[Host]:
    """Offset of each clock from this one's, by the shortest of five round trips; returns the hosts that answer."""
    begun = gather([clock.options(**host.place()).remote() for host in hosts], hosts, "a first task", report)
    answering = [host for host, there in zip(hosts, begun, strict=True) if there is not None]
    for host in answering:
        trips = []
        for _ in range(5):
            before = time.time()
            (there,) = gather([clock.options(**host.place()).remote()], [host], "reading its clock", report)
            after = time.time()
            if there is None:
                break
            trips.append((after - before, there - (before + after) / 2))
        if not trips:
            continue
        trip, offset = min(trips)
        report.values[f"clock/{host.name}_seconds"] = round(offset, 3)
        report.check(
            abs(offset) > MAX_SKEW_SECONDS + trip, f"{host.name}: its clock is {offset:+.1f} s off; run chrony or ntpd"
        )
    return answering


def measure_storage(hosts: list[Host], folder: str, num_bytes: int, report: Report) -> None:
    """Every node writes a file and reads the next node's; then all try to take one name, as drivers of a run do."""
    token = secrets.token_hex(4)
    names = [f"smoke-{token}-{index}" for index in range(len(hosts))]
    tasks = [write_file.options(**h.place()).remote(folder, n, num_bytes) for h, n in zip(hosts, names, strict=True)]
    rates = gather(tasks, hosts, f"writing to {folder}", report)
    written = [(host, name, rate) for host, name, rate in zip(hosts, names, rates, strict=True) if rate is not None]
    hosts, names = [host for host, _, _ in written], [name for _, name, _ in written]
    turned = names[1:] + names[:1]
    tasks = [read_file.options(**h.place()).remote(folder, n) for h, n in zip(hosts, turned, strict=True)]
    reads = gather(tasks, hosts, f"reading from {folder}", report)
    for (host, _, write_rate), read in zip(written, reads, strict=True):
        report.values[f"storage/{host.name}_write_bytes_per_second"] = round(write_rate)
        report.check(write_rate < MIN_STORAGE, f"{host.name}: writes {folder} at {write_rate / 1e6:.0f} MB/s")
        if read is not None:
            report.values[f"storage/{host.name}_read_bytes_per_second"] = round(read[1])
            report.check(
                read[0] != num_bytes, f"{host.name}: does not see what another node wrote to {folder}; it is not shared"
            )
    check_names(hosts, names, folder, report)
    left = [f"{name}{end}" for name in names for end in ("", ".moved", ".taken")]
    gather(
        [remove_files.options(**host.place()).remote(folder, left) for host in hosts],
        hosts,
        f"removing its files from {folder}",
        report,
    )


def check_names(hosts: list[Host], names: list[str], folder: str, report: Report) -> None:
    """Leases stand on two promises of the storage: of many hard links of one name one succeeds, and of many renames."""
    if not hosts:
        return
    taken = f"{names[0]}.taken"
    links = [link_file.options(**h.place()).remote(folder, n, taken) for h, n in zip(hosts, names, strict=True)]
    linked = gather(links, hosts, f"a hard link in {folder}, which leases need", report)
    moves = [
        rename_file.options(**h.place()).remote(folder, taken, f"{n}.moved") for h, n in zip(hosts, names, strict=True)
    ]
    # Without a link there is nothing to rename, and the missing link is told already.
    moved = gather(moves, hosts, f"a rename in {folder}, which leases need", report)
    for what, won in (("hard link", linked), ("rename", moved)):
        report.values[f"storage/{what.replace(' ', '_')}_winners"] = won.count(True)
        is_told = None in linked + moved
        report.check(
            won.count(True) != 1 and not is_told,
            f"{', '.join(h.name for h in hosts)}: a {what} of one name in {folder} succeeded {won.count(True)} times, "
            "not once; leases do not hold there",
        )


def measure_all_reduce(hosts: list[Host], num_bytes: int, report: Report) -> None:
    """One ring over all GPUs; over one CPU rank per node where there are none."""
    backend = "nccl" if any(host.num_gpus for host in hosts) else "gloo"
    places = [host for host in hosts for _ in range(host.num_gpus if backend == "nccl" else 1)]
    ranks = [Rank.options(num_gpus=int(backend == "nccl"), **host.place()).remote() for host in places]
    try:
        addresses = gather([rank.start.remote(backend) for rank in ranks], places, f"starting a {backend} rank", report)
        # A rank that is not there would hang the others: they meet without it, and it is told already.
        ready = [(rank, h, a) for rank, h, a in zip(ranks, places, addresses, strict=True) if a is not None]
        report.values["all_reduce/ranks"] = len(ready)
        if len(ready) < 2:
            return
        calls = [
            rank.all_reduce.remote(backend, ready[0][2], index, len(ready), num_bytes, report.seconds)
            for index, (rank, _, _) in enumerate(ready)
        ]
        found = gather(calls, [h for _, h, _ in ready], f"all-reduce ({backend})", report, MARGIN_SECONDS)
        rates = [rate for rate in found if rate is not None]
        if len(rates) < len(ready):
            return
        report.values["all_reduce/bus_bytes_per_second"] = round(min(rates))
        report.check(
            min(rates) < MIN_ALL_REDUCE[backend],
            f"all-reduce over {len(ready)} ranks moves {min(rates) / 1e9:.2f} GB/s: set NCCL_DEBUG=INFO and see which "
            "network it chose (cluster/nccl.env)",
        )
    finally:
        for rank in ranks:
            ray.kill(rank)


def measure(arguments: argparse.Namespace, report: Report) -> None:
    """Every measurement, on the hosts that answer."""
    ray.init(address=arguments.address, log_to_driver=False, logging_level="ERROR")
    hosts = alive_hosts()
    report.values |= {"nodes": len(hosts), "gpus": sum(host.num_gpus for host in hosts)}
    report.check(len(hosts) < arguments.nodes, f"{len(hosts)} of {arguments.nodes} nodes are there")
    counts = ", ".join(f"{host.name} has {host.num_gpus}" for host in hosts)
    report.check(
        report.values["gpus"] < arguments.gpus,
        f"{report.values['gpus']} of {arguments.gpus} GPUs are there ({counts}): a broken driver hides its GPUs",
    )
    num_bytes = arguments.megabytes * 2**20
    hosts = measure_clocks(hosts, report)
    if arguments.shared:
        measure_storage(hosts, arguments.shared, num_bytes, report)
    if arguments.mlflow:
        what = f"MLflow at {arguments.mlflow}"
        answers = gather(
            [mlflow_answer.options(**host.place()).remote(arguments.mlflow) for host in hosts], hosts, what, report
        )
        for host, why in zip(hosts, answers, strict=True):
            report.check(bool(why), f"{host.name}: {what}: {why}")
    measure_all_reduce(hosts, num_bytes, report)


def main() -> int:
    """Measure, print, say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", default="auto")
    parser.add_argument("--nodes", type=int, default=0, help="nodes that must be there")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that must be there, of all nodes together")
    parser.add_argument("--shared", default="", help="folder that every node should see")
    parser.add_argument("--mlflow", default="", help="URI of the tracking server")
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120.0, help="what each step may take on each node")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    report = Report(arguments.seconds)
    try:
        measure(arguments, report)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        report.problems.append(f"{arguments.address}: the Ray cluster: {reason(error)}")
    if arguments.json:
        print(json.dumps({"values": report.values, "problems": report.problems}, indent=2))
    else:
        for name, value in report.values.items():
            print(f"{name:<56} {value:,}")
        print("\n".join(f"PROBLEM {problem}" for problem in report.problems) or "nothing is wrong")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
