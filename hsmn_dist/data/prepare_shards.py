"""Second half of preparation: one part of examples -> tokens -> tar shards, and the parts together -> the index.

A part is done when its own manifest is there; a part that was cut short is made again, to the same bytes. Contexts that are
too long lose their oldest tokens. Targets end with <eos>; a target that is too long is cut and has none, since its text
does not end there. Both are counted.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hsmn_dist.data.prepare_examples import iter_part, read_manifest
from hsmn_dist.data.shards.index import SAMPLE_DTYPE, SPLITS, ShardEntry, ShardIndex, SplitEntry, save_samples
from hsmn_dist.data.shards.tar_layout import token_dtype
from hsmn_dist.data.shards.writer import ShardWriter
from hsmn_dist.data.tokenizer import Tokenizer, load_tokenizer
from hsmn_dist.foundation.files import read_json, write_json


@dataclass(frozen=True)
class ShardsTask:
    """Turn part `part` of `work_folder` into shards of `folder`."""

    folder: str
    work_folder: str
    part: int
    tokenizer_path: str
    max_context_tokens: int
    max_target_tokens: int
    shard_bytes: int


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of one example, and whether the limits took some."""

    context: list[int]
    target: list[int]
    is_context_cut: bool
    is_target_cut: bool


def encode_example(tokenizer: Tokenizer, context: str, target: str, limits: tuple[int, int]) -> EncodedExample:
    """Tokens of a pair under (max_context_tokens, max_target_tokens)."""
    max_context, max_target = limits
    context_ids = tokenizer.encode(context)
    target_ids = [*tokenizer.encode(target), tokenizer.eos_id]
    return EncodedExample(
        context=context_ids[-max_context:],
        target=target_ids[:max_target],
        is_context_cut=len(context_ids) > max_context,
        is_target_cut=len(target_ids) > max_target,
    )


def run_shards_task(task: ShardsTask) -> tuple[str, int, int]:
    """Write the shards of one part and then the part's manifest; gives (folder, part, number of samples)."""
    folder, work = Path(task.folder), Path(task.work_folder)
    manifest = _part_manifest(work, task.part)
    if manifest.is_file():
        done = read_json(manifest)
        if _is_whole(folder, done):
            return task.folder, task.part, _num_samples(done)
        manifest.unlink()
    tokenizer = load_tokenizer(Path(task.tokenizer_path))
    dtype = token_dtype(tokenizer.vocab_size)
    limits = (task.max_context_tokens, task.max_target_tokens)
    truncated = {"contexts": 0, "targets": 0}
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                ShardWriter(folder, f"{split}-{task.part:05d}", shard_bytes=task.shard_bytes, token_dtype=dtype)
            )
            for split in SPLITS
        }
        for split, example in iter_part(work, task.part):
            encoded = encode_example(tokenizer, example["context"], example["target"], limits)
            truncated["contexts"] += encoded.is_context_cut
            truncated["targets"] += encoded.is_target_cut
            line = json.dumps(example, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
            writers[split].write(line, encoded.context, encoded.target)
    shards = {}
    for split, writer in writers.items():
        save_samples(_part_samples(work, task.part, split), writer.samples)
        shards[split] = [asdict(shard) for shard in writer.shards]
    value = {"shards": shards, "truncated": truncated}
    write_json(manifest, value)
    return task.folder, task.part, _num_samples(value)


def build_index(
    folder: Path, work: Path, tokenizer: Tokenizer, dataset: str, config_digest: str, notes: dict[str, Any]
) -> ShardIndex:
    """Join the parts: write each split's samples file, and give the index (not yet written)."""
    examples = read_manifest(work)
    parts = [read_json(_part_manifest(work, part)) for part in range(examples["num_parts"])]
    splits = {}
    for split in SPLITS:
        shards = tuple(ShardEntry(**shard) for part in parts for shard in part["shards"][split])
        arrays = [np.load(_part_samples(work, part, split), allow_pickle=False) for part in range(len(parts))]
        samples = np.concatenate(arrays) if arrays else np.empty(0, dtype=SAMPLE_DTYPE)
        name = f"{split}.samples.npy"
        splits[split] = SplitEntry(shards, name, save_samples(folder / name, samples))
    return ShardIndex(
        dataset=dataset,
        config_digest=config_digest,
        tokenizer_digest=tokenizer.digest,
        token_dtype=token_dtype(tokenizer.vocab_size),
        splits=splits,
        skipped=examples["skipped"],
        truncated={key: sum(part["truncated"][key] for part in parts) for key in ("contexts", "targets")},
        origin=notes.pop("origin", {}),
        notes=notes,
    )


def _part_manifest(work: Path, part: int) -> Path:
    return work / f"part-{part:05d}.json"


def _part_samples(work: Path, part: int, split: str) -> Path:
    return work / f"part-{part:05d}.{split}.npy"


def _is_whole(folder: Path, manifest: dict[str, Any]) -> bool:
    entries = [ShardEntry(**shard) for shards in manifest["shards"].values() for shard in shards]
    return all((folder / e.name).is_file() and (folder / e.name).stat().st_size == e.bytes for e in entries)


def _num_samples(manifest: dict[str, Any]) -> int:
    return sum(shard["num_samples"] for shards in manifest["shards"].values() for shard in shards)
