"""Where examples come from, how they become tokens and shards, and how the stream hands them out."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hsmn_dist.config.section import Section


class TokenizerConfig(Section):
    """Text to token ids. Ids 0, 1, 2, 3 are <pad>, <bos>, <eos>, <unk> in every kind but `file`."""

    kind: Literal["bpe", "bytes", "file"] = Field(
        "bpe",
        description="bpe: byte-level BPE trained on the run's training text; bytes: one id per byte; file: a given tokenizer.json.",
    )
    vocab_size: int = Field(2048, ge=260, description="Ids of a trained BPE; ignored by the other kinds.")
    path: str = Field("", description="tokenizer.json for kind `file`.")
    max_training_bytes: int = Field(
        2**30,
        ge=1,
        description="Text read for training a BPE, in characters, dealt evenly over the datasets; bounds memory.",
    )


class DatasetConfig(Section):
    """One dataset of a curriculum stage."""

    name: str = Field(
        description="A built-in source (word_problems, stdlib_code, passkey) or one of the known datasets; it decides the preprocessor."
    )
    label: str = Field(
        "",
        pattern=r"^[a-z0-9_]*$",
        description="What this run calls it; needed where one dataset appears with two settings (a curriculum of lengths). "
        "Built-in rows are drawn anew for each label. Empty: the name.",
    )
    source: str = Field(
        "",
        description="Local JSONL, CSV, Parquet file or folder of text; empty: built-in rows or the dataset's hub id.",
    )
    shards: str = Field(
        "",
        description="Folder or URL (s3://, gs://, http://, https://) of shards prepared before; used as they are, and then the tokenizer must be theirs.",
    )
    revision: str = Field("", description="Hub revision (commit); pinned in the index.")
    hub_configuration: str = Field("", description="Hub configuration; empty: the dataset's usual one.")
    hub_split: str = Field("", description="Hub split to learn from; empty: the first that may train.")
    num_examples: int = Field(
        0,
        ge=0,
        description="Stop after this many examples; 0 means all (built-in sources generate this many, 2000 when 0).",
    )
    weight: float = Field(1.0, gt=0, description="Share in the stage's mixture.")
    passkey_tokens: int = Field(
        192, ge=16, description="Words of filler around the fact in the built-in `passkey` source."
    )
    passkey_digits: int = Field(5, ge=1, le=12, description="Digits of the key in the built-in `passkey` source.")

    @property
    def key(self) -> str:
        """What names it in this run: the label, or the name."""
        return self.label or self.name


class DataConfig(Section):
    """Preparation and streaming."""

    split: tuple[float, float, float] = Field(
        (0.6, 0.2, 0.2), description="Shares of training, validation and test; must sum to 1."
    )
    split_seed: int = Field(42, description="Seed of the split.")
    shard_bytes: int = Field(64 * 2**20, ge=4096, description="Size at which a tar shard is closed.")
    max_context_tokens: int = Field(512, ge=1, description="Longer contexts lose their oldest tokens (counted).")
    max_target_tokens: int = Field(128, ge=2, description="Longer targets are cut (counted).")
    deduplicate: Literal["none", "exact", "near"] = Field(
        "exact",
        description="Drop examples that were there before in the dataset; near (MinHash, needs the extra `data`) includes exact.",
    )
    near_duplicate_overlap: float = Field(
        0.8, gt=0, le=1, description="Overlap of word runs (Jaccard) from which two examples are near-duplicates."
    )
    contamination_words: int = Field(
        13,
        ge=0,
        description="Words in a row that a test item and a training example must share to count as contamination; 0: not measured.",
    )
    contamination_items: int = Field(
        5000,
        ge=1,
        description="Test items of each dataset that are looked for in the training examples; bounds memory.",
    )
    part_examples: int = Field(
        20_000,
        ge=1,
        description="Examples that one task tokenizes and writes; a part has shards of its own, so it also bounds their size.",
    )
    prepare_workers: int = Field(1, ge=1, description="Processes that prepare rows on this machine.")
    loader_workers: int = Field(
        0, ge=0, description="Background threads that read, decode and collate ahead; 0 reads in the training thread."
    )
    prefetch_batches: int = Field(2, ge=1, description="Global batches read ahead by each rank.")
    packs_examples: bool = Field(
        False, description="Put several short examples in one row without attention or loss across them (HOPE)."
    )
    length_buckets: int = Field(1, ge=1, description="Length classes inside a shuffle window; more means less padding.")
    shuffle_window_shards: int = Field(
        16, ge=0, description="Shards whose samples are shuffled together; 0: all of them. Bounds the shards in use."
    )
    cache_folder: str = Field(
        "",
        description="Folder for shards fetched from URLs; empty: one of this user's own in the system's temporary folder.",
    )
    cache_bytes: int = Field(
        16 * 2**30, ge=2**20, description="Size to which the cache of fetched shards is cut back, on each machine."
    )
    fetch_attempts: int = Field(
        8,
        ge=1,
        description="Attempts to fetch a file of a store that does not answer; waits double from 0.5 to 30 s: 8 are a minute.",
    )
    corrupt_policy: Literal["raise", "quarantine"] = Field("raise", description="What a damaged sample or shard does.")
    quarantine_limit: int = Field(0, ge=0, description="Damaged samples that may be passed over under `quarantine`.")
