"""Small prepared folders written straight through the shard writer, without rows or a tokenizer to train."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hsmn_dist.data.shards.index import ShardIndex, SplitEntry, save_index, save_samples
from hsmn_dist.data.shards.writer import ShardWriter
from hsmn_dist.data.tokenizer import ByteTokenizer


def example_text(name: str, number: int) -> tuple[str, str]:
    """A context and a target whose lengths vary with the number."""
    return f"{name} context {number} " + "x" * (number * 7 % 23), f"target {number}" + "y" * (number * 5 % 11)


def write_folder(
    folder: Path, num_samples: int, *, name: str = "demo", shard_bytes: int = 16384, splits: Sequence[str] = ("train",)
) -> Path:
    """A complete folder; each split holds `num_samples` samples."""
    folder.mkdir(parents=True)
    tokenizer = ByteTokenizer()
    entries = {}
    for split in splits:
        with ShardWriter(folder, f"{split}-00000", shard_bytes=shard_bytes, token_dtype="<u2") as writer:
            for number in range(num_samples):
                context, target = example_text(name, number)
                example = {
                    "context": context,
                    "target": target,
                    "task": "chat",
                    "id": f"{name}-{split}-{number}",
                    "group": str(number),
                    "kind": "free_text",
                    "meta": {},
                }
                ids = [*tokenizer.encode(target), tokenizer.eos_id]
                writer.write(json.dumps(example).encode(), tokenizer.encode(context), ids)
        file = f"{split}.samples.npy"
        entries[split] = SplitEntry(tuple(writer.shards), file, save_samples(folder / file, writer.samples))
    index = ShardIndex(name, "digest", tokenizer.digest, "<u2", entries)
    save_index(folder, index)
    return folder
