"""How fast samples are read in shuffled order, side by side in one run: ours, plain tar, webdataset, HF datasets.

    python benchmarks/stream.py --samples 200000 --json

Every reader gives the same examples of about 1 KB of JSON, from files that were just written (so from the page cache: what is
measured is the reader, not the disk). "ours, examples" decodes the JSON, as webdataset and HF datasets do; "ours, tokens" gives
the token arrays that training reads; "ours, batches" goes through the whole loader, collated and padded. webdataset shuffles
shards and a buffer of 10,000; the others read any sample at any time. Each row is the best of `--repeats` turns: by the
clock, and for readers of one process by the processor's time, which other work on the machine disturbs less. The first 10,000
samples of a turn are not counted, because webdataset fills its buffer during them. Then the time to the first batch of a
resumed loader at 0, 50 and 99 percent of an epoch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hsmn_dist.data.shards.index import ShardIndex, SplitEntry, save_index, save_samples  # noqa: E402
from hsmn_dist.data.shards.reader import SplitReader  # noqa: E402
from hsmn_dist.data.shards.tar_layout import END_OF_ARCHIVE, member  # noqa: E402
from hsmn_dist.data.shards.writer import ShardWriter  # noqa: E402
from hsmn_dist.data.stream.cursor import Cursor  # noqa: E402
from hsmn_dist.data.stream.loader import build_loader  # noqa: E402
from hsmn_dist.data.stream.order import SampleOrder  # noqa: E402
from hsmn_dist.data.stream.plan import StreamSettings, StreamSource  # noqa: E402

SHARD_BYTES = 64 * 2**20
READ_TOGETHER = 256
SHUFFLE_BUFFER = 10_000
WORDS = [f"word{number}" for number in range(2000)]


def example(number: int, num_characters: int) -> dict[str, Any]:
    """An example whose JSON has about `num_characters`."""
    draw = random.Random(number)
    text = " ".join(draw.choices(WORDS, k=max(1, (num_characters - 150) // 8)))
    return {
        "context": text,
        "target": f"target {number}",
        "task": "chat",
        "id": str(number),
        "group": str(number),
        "kind": "free_text",
        "meta": {},
    }


def write_ours(folder: Path, num_samples: int, num_characters: int) -> None:
    """A prepared folder: JSON and tokens."""
    folder.mkdir(parents=True)
    with ShardWriter(folder, "train-00000", shard_bytes=SHARD_BYTES, token_dtype="<u2") as writer:
        for number in range(num_samples):
            value = example(number, num_characters)
            context = [4 + byte % 251 for byte in value["context"].encode()[::4]]
            target = [4 + byte for byte in value["target"].encode()] + [2]
            writer.write(json.dumps(value).encode(), context, target)
    name = "train.samples.npy"
    entry = SplitEntry(tuple(writer.shards), name, save_samples(folder / name, writer.samples))
    save_index(folder, ShardIndex("benchmark", "none", "none", "<u2", {"train": entry}))


def write_plain(folder: Path, num_samples: int, num_characters: int) -> None:
    """Tar shards with one JSON member a sample, the shape that favours webdataset most."""
    folder.mkdir(parents=True)
    shard_bytes = min(SHARD_BYTES, num_samples * num_characters // 8)  # at least one for each worker
    stream, size, shard = None, 0, 0
    for number in range(num_samples):
        data = member(f"{number:09d}.json", json.dumps(example(number, num_characters)).encode())
        if stream is None or size + len(data) > shard_bytes:
            if stream is not None:
                stream.write(END_OF_ARCHIVE)
                stream.close()
            stream, size, shard = (folder / f"{shard:05d}.tar").open("wb"), 0, shard + 1
        stream.write(data)
        size += len(data)
    if stream is not None:
        stream.write(END_OF_ARCHIVE)
        stream.close()


def ours_examples(folder: Path) -> Iterator[int]:
    """Decoded examples in shuffled order."""
    reader = SplitReader(folder, "train")
    order = SampleOrder(reader.shard_sizes.tolist(), 1, 0)
    for start in range(0, len(reader), READ_TOGETHER):
        positions = np.arange(start, min(start + READ_TOGETHER, len(reader)))
        for value in reader.read_many_json(order.sample_numbers(positions).tolist()):
            yield len(value["context"])


def ours_tokens(folder: Path) -> Iterator[int]:
    """Token arrays in shuffled order."""
    reader = SplitReader(folder, "train")
    order = SampleOrder(reader.shard_sizes.tolist(), 1, 0)
    for start in range(0, len(reader), READ_TOGETHER):
        positions = np.arange(start, min(start + READ_TOGETHER, len(reader)))
        for context, _ in reader.read_many_tokens(order.sample_numbers(positions).tolist()):
            yield len(context)


def ours_batches(folder: Path, workers: int) -> Iterator[int]:
    """Collated batches of 64; yields once a sample."""
    settings = StreamSettings(64, 64, seed=1, loader_workers=workers, prefetch_batches=4, shuffle_window_shards=0)
    with build_loader([StreamSource(folder)], "train", settings) as loader:
        num_samples = len(SplitReader(folder, "train"))
        for _ in range(num_samples // 64):
            for batch in next(loader):
                yield from [1] * len(batch["target_ids"])


def raw_tar(folder: Path) -> Iterator[int]:
    """The limit in Python's standard library: a sequential walk, nothing decoded, nothing shuffled."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path, "r|") as archive:
            for info in archive:
                stream = archive.extractfile(info)
                yield len(stream.read()) if stream is not None else 0


def raw_bytes(folder: Path) -> Iterator[int]:
    """The limit of the disk: blocks of 1 MiB; counts the samples that the bytes hold by their mean size."""
    paths = sorted(folder.glob("*.tar"))
    total = sum(path.stat().st_size for path in paths)
    per_sample, left = total / ours_count(folder), 0.0
    for path in paths:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                left += len(block)
                whole = int(left / per_sample)
                left -= whole * per_sample
                yield from [1] * whole


def ours_count(folder: Path) -> int:
    """Samples of the folder with the plain tars: written beside them."""
    return int((folder / "count").read_text())


def webdataset_samples(folder: Path, workers: int) -> Iterator[int]:
    """webdataset, shards and buffer shuffled, JSON decoded."""
    import webdataset

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=1).shuffle(SHUFFLE_BUFFER).decode()
    if workers:
        import torch

        loader = torch.utils.data.DataLoader(dataset, batch_size=64, num_workers=workers, collate_fn=list)
        for batch in loader:
            yield from (len(sample["json"]["context"]) for sample in batch)
        return
    for sample in dataset:
        yield len(sample["json"]["context"])


def hf_samples(folder: Path, workers: int) -> Iterator[int]:
    """HF datasets on its own Arrow files, in a shuffled order, row by row as its DataLoader integration reads."""
    import datasets

    dataset = datasets.load_from_disk(str(folder)).shuffle(seed=1)
    if workers:
        import torch

        loader = torch.utils.data.DataLoader(dataset, batch_size=64, num_workers=workers, collate_fn=list)
        for batch in loader:
            yield from (len(row["context"]) for row in batch)
        return
    for row in dataset:
        yield len(row["context"])


def write_hf(folder: Path, num_samples: int, num_characters: int) -> None:
    """The examples as an Arrow dataset."""
    import datasets

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(num_samples):
            value = example(number, num_characters)
            value.pop("meta")
            yield value

    with tempfile.TemporaryDirectory() as cache:
        datasets.disable_progress_bars()
        datasets.Dataset.from_generator(rows, cache_dir=cache).save_to_disk(str(folder))


def measure(read: Callable[[], Iterator[int]], seconds: float, warm_up: int) -> tuple[int, float, float]:
    """Samples, seconds by the clock and by the processor of one pass, which stops after `seconds`.

    The first `warm_up` samples are not counted: webdataset fills its shuffle buffer during them and is slower.
    """
    samples = read()
    for _ in range(warm_up):
        next(samples)
    start, start_cpu = time.perf_counter(), time.process_time()
    count = 0
    for _length in samples:
        count += 1
        if count % 1024 == 0 and time.perf_counter() - start > seconds:
            break
    return count, time.perf_counter() - start, time.process_time() - start_cpu


def rates(
    readers: dict[str, Callable[[], Iterator[int]]], repeats: int, seconds: float, warm_up: int
) -> dict[str, Any]:
    """Best rates over the passes. Readers take turns, so that other work on the machine meets all of them alike."""
    best: dict[str, list[float]] = {name: [0.0, 0.0] for name in readers}
    counts = dict.fromkeys(readers, 0)
    for turn in range(repeats):
        for name, read in readers.items():
            counts[name], clock, cpu = measure(read, seconds, warm_up)
            best[name] = [max(best[name][0], counts[name] / clock), max(best[name][1], counts[name] / cpu)]
            by_clock, by_cpu = best[name]
            print(f"{turn} {name:36} {by_clock:>10,.0f} samples/s {by_cpu:>10,.0f} samples/CPU s", file=sys.stderr)
    return {
        name: {
            "samples_per_second": round(by_clock),
            "samples_per_cpu_second": round(by_cpu),
            "samples_read": counts[name],
        }
        for name, (by_clock, by_cpu) in best.items()
    }


def resume_times(folder: Path, num_samples: int) -> dict[str, Any]:
    """Seconds from building the loader to its first batch, at places of an epoch; hash of the index included."""
    settings = StreamSettings(64, 64, seed=1)
    with build_loader([StreamSource(folder)], "train", settings) as loader:
        next(loader)
        zero = loader.cursor()
    times: dict[str, list[float]] = {"0": [], "50": [], "99": []}
    for _ in range(5):
        for percent in times:
            seen = int(num_samples * int(percent) / 100) // 64 * 64
            cursor = Cursor(seen, seen // 64, 1, zero.order_id)
            start = time.perf_counter()
            with build_loader([StreamSource(folder)], "train", settings, cursor=cursor) as loader:
                next(loader)
            times[percent].append(time.perf_counter() - start)
    return {
        f"{percent} percent": {"median_seconds": round(sorted(found)[2], 4), "worst_seconds": round(max(found), 4)}
        for percent, found in times.items()
    }


def run_readers(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Write the data once, then every reader over it."""
    write_ours(root / "ours", args.samples, args.characters)
    write_plain(root / "plain", args.samples, args.characters)
    (root / "plain" / "count").write_text(str(args.samples))
    has_hf = importlib.util.find_spec("datasets") is not None
    has_webdataset = importlib.util.find_spec("webdataset") is not None
    if has_hf:
        write_hf(root / "hf", args.samples, args.characters)
    readers: dict[str, Callable[[], Iterator[int]]] = {
        "ours, examples, 1 process": lambda: ours_examples(root / "ours"),
        "ours, tokens, 1 process": lambda: ours_tokens(root / "ours"),
        "ours, batches, 1 process": lambda: ours_batches(root / "ours", 0),
        "ours, batches, 2 threads": lambda: ours_batches(root / "ours", 2),
        "raw bytes, in order": lambda: raw_bytes(root / "plain"),
        "tarfile, in order, not decoded": lambda: raw_tar(root / "plain"),
    }
    if has_webdataset:
        readers["webdataset, 1 process"] = lambda: webdataset_samples(root / "plain", 0)
        readers["webdataset, 2 workers"] = lambda: webdataset_samples(root / "plain", 2)
        readers["webdataset, 1 process, our shards"] = lambda: webdataset_samples(root / "ours", 0)
    if has_hf:
        readers["HF datasets, 1 process"] = lambda: hf_samples(root / "hf", 0)
        readers["HF datasets, 2 workers"] = lambda: hf_samples(root / "hf", 2)
    results = rates(readers, args.repeats, args.seconds, min(SHUFFLE_BUFFER, args.samples // 4))
    for name in results:
        if "worker" in name or "thread" in name:
            del results[name]["samples_per_cpu_second"]  # of the parent process alone, so it says nothing
    mosaic = importlib.util.find_spec("streaming") is not None
    results["mosaicml-streaming"] = "not measured" + ("" if mosaic else " (not installed)")
    mean_bytes = len(json.dumps(example(0, args.characters)))
    for value in results.values():
        if isinstance(value, dict):
            value["megabytes_per_second"] = round(value["samples_per_second"] * mean_bytes / 1e6, 1)
    return results


def ratios(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Ours over the others, one process, shuffled, both decoding an example (and for training: tokens)."""
    found = {}
    for ours in ("examples", "tokens", "batches"):
        for other in ("webdataset, 1 process", "HF datasets, 1 process"):
            if other in results:
                mine, theirs = results[f"ours, {ours}, 1 process"], results[other]
                found[f"ours ({ours}) / {other}"] = {
                    unit: round(mine[unit] / theirs[unit], 2)
                    for unit in ("samples_per_second", "samples_per_cpu_second")
                }
    return found


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--characters", type=int, default=1000, help="about so many bytes of JSON a sample")
    parser.add_argument(
        "--resume-samples", type=int, default=0, help="samples of the epoch for the resume times; 0: none"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="longest pass of one reader")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: a temporary folder")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        root = Path(temporary)
        results = run_readers(args, root)
        report: dict[str, Any] = {
            "samples": args.samples,
            "load_average": os.getloadavg()[0],
            "cores": os.cpu_count(),
            "readers": results,
            "ratios": ratios(results),
        }
        if args.resume_samples:
            write_ours(root / "epoch", args.resume_samples, 200)
            report["resume"] = {"samples": args.resume_samples, **resume_times(root / "epoch", args.resume_samples)}
    if args.json:
        print(json.dumps(report, indent=2))
        return
    for name, ratio in report["ratios"].items():
        by_clock, by_cpu = ratio.values()
        print(f"{name:50} {by_clock:6.2f} by the clock {by_cpu:6.2f} by processor time")
    for name, value in report.get("resume", {}).items():
        print(f"resume at {name}: {value}")


if __name__ == "__main__":
    main()
