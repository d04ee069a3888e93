"""Drop examples that were there before: exact ones by hash, near ones by MinHash with a check of the true overlap.

One pass in stream order, the first of several equals is kept, so the result is a function of the stream alone. Near
duplicates are looked for in other groups only: the turns of one conversation and the verses of one chapter overlap by
design. What it costs: a 16-byte key and an id for each example kept; for near ones also about the size of the text kept, because
every candidate is checked against its real shingles. What it may miss: MinHash finds a pair that overlaps by `threshold` with a
probability of about 0.99 (see the test), never a wrong one. Source: Broder 1997, "On the resemblance and containment of
documents"; Lee et al. 2021 (arXiv 2107.06499) for the use on training text. The hashing tables are `datasketch`'s.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hsmn_dist.data.example import Example
from hsmn_dist.data.preprocessors.base import SkipCounter
from hsmn_dist.data.preprocessors.wording import without_wording
from hsmn_dist.foundation.errors import ConfigError
from hsmn_dist.foundation.extras import require

_WORD = re.compile(r"\w+")
_CANDIDATE_MARGIN = 0.2


@dataclass(frozen=True)
class DedupSettings:
    """How duplicates are found.

    Attributes:
        method: "none", "exact", or "near" (which includes exact).
        threshold: Jaccard overlap of the word shingles from which on two examples are near-duplicates.
        shingle_words: words in a shingle; shorter texts are one shingle.
        num_permutations: MinHash permutations; more finds more of the pairs close to the threshold.
        seed: of the permutations.
    """

    method: Literal["none", "exact", "near"] = "exact"
    threshold: float = 0.8
    shingle_words: int = 5
    num_permutations: int = 128
    seed: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold <= 1.0 or self.shingle_words < 1 or self.num_permutations < 16:
            raise ConfigError(
                f"near-duplicate settings threshold {self.threshold}, shingle_words {self.shingle_words}, "
                f"num_permutations {self.num_permutations}",
                allowed="0 < threshold <= 1, at least 1 word, at least 16 permutations",
                action="correct the settings; 0.8, 5 and 128 are usual",
            )


def exact_key(example: Example) -> bytes:
    """16 bytes that are equal for examples which differ in blanks or in Unicode composition only."""
    parts = (" ".join(unicodedata.normalize("NFC", part).split()) for part in (example.context, example.target))
    return hashlib.blake2b("\x1f".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def shingles(text: str, num_words: int) -> frozenset[int]:
    """64-bit hashes of all runs of `num_words` words, case and punctuation apart; a shorter text is one run."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    last = max(1, len(words) - num_words + 1)
    return frozenset(_hash64(" ".join(words[start : start + num_words])) for start in range(last))


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    """Shared shingles over all shingles; 1.0 for two empty sets."""
    union = len(one | other)
    return len(one & other) / union if union else 1.0


class NearDuplicates:
    """The texts kept so far, and whether a new one is nearly one of them."""

    def __init__(self, settings: DedupSettings) -> None:
        datasketch = require("datasketch")
        self._settings = settings
        # A lower threshold for candidates than for duplicates: nearly all true pairs then become candidates.
        lowest = max(0.05, settings.threshold - _CANDIDATE_MARGIN)
        self._table = datasketch.MinHashLSH(threshold=lowest, num_perm=settings.num_permutations)
        self._empty = datasketch.MinHash(num_perm=settings.num_permutations, seed=settings.seed, hashfunc=_identity)
        self._kept: list[tuple[str, str, frozenset[int]]] = []

    def find_or_add(self, text: str, identity: str, group: str) -> str | None:
        """The id of the first kept text of another group that nearly equals this one; else None, and this one is kept."""
        runs = shingles(text, self._settings.shingle_words)
        sketch = self._sketch(runs)
        for number in sorted(self._table.query(sketch)):
            kept, other_group, other = self._kept[number]
            if other_group != group and jaccard(runs, other) >= self._settings.threshold:
                return kept
        self._table.insert(len(self._kept), sketch, check_duplication=False)
        self._kept.append((identity, group, runs))
        return None

    def _sketch(self, runs: frozenset[int]) -> Any:
        sketch = self._empty.copy()
        sketch.update_batch(np.array(sorted(run & 0xFFFFFFFF for run in runs), dtype=np.uint64))
        return sketch


def _identity(value: Any) -> int:
    # The shingles are hashes already.
    return int(value)


def deduplicated(examples: Iterable[Example], settings: DedupSettings, skipped: SkipCounter) -> Iterator[Example]:
    """The examples without duplicates, in their order; each dropped one is counted with the one that it repeats."""
    if settings.method == "none":
        yield from examples
        return
    seen: dict[bytes, str] = {}
    near = NearDuplicates(settings) if settings.method == "near" else None
    for example in examples:
        key = exact_key(example)
        if key in seen:
            skipped.count("an exact duplicate", f"{example.id} (as {seen[key]})")
            continue
        if near is not None:
            text = f"{without_wording(example.context)}\n{example.target}"
            other = near.find_or_add(text, example.id, example.group)
            if other is not None:
                skipped.count(f"a near-duplicate (overlap >= {settings.threshold})", f"{example.id} (as {other})")
                continue
        seen[key] = example.id
        yield example
