"""How much of a benchmark stands in the training examples: word n-grams shared by a test item and any training example.

An item is contaminated when one of its runs of `ngram_words` words occurs in a training example; an item with fewer words
is looked for whole, and one with fewer than `min_words` is not judged, because "what is two plus two" proves nothing.
Words are letters and digits, case and punctuation apart; labels that our own wording adds are taken out first. The look-up
is exact (no hash can collide): words are numbered, and an n-gram is the bytes of its numbers. One pass over the training
examples; memory grows with the benchmark alone (about 200 bytes a word).

What it does not find: paraphrases, translations, items whose choices were put into another order and whose question is
shorter than an n-gram, and anything that a training example lost before it came here.

Source: Brown et al. 2020 (arXiv 2005.14165), appendix C: 13-grams, and no n-grams below 8 words.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hsmn_dist.data.example import Example
from hsmn_dist.data.preprocessors.wording import without_wording
from hsmn_dist.foundation.errors import ConfigError

DEFAULT_NGRAM_WORDS = 13
DEFAULT_MIN_WORDS = 8
NUM_SHOWN_MATCHES = 5
_WORD = re.compile(r"\w+")
_UNKNOWN = 0


@dataclass(frozen=True)
class ContaminationReport:
    """What was found for one benchmark; JSON values only, for the index and the scorecard.

    Attributes:
        benchmark: its dataset name.
        ngram_words: length of the n-grams.
        min_words: items with fewer words are not judged.
        num_items: items looked at.
        num_not_judged: of these, too short to judge.
        num_contaminated: of these, found in training examples.
        mean_coverage: over the contaminated items, the mean share of their n-grams that were found.
        by_training_dataset: training dataset -> number of items found in it (one item may be in several).
        contaminated_ids: ids of the items, for a score without them.
        matches: the first few findings: item, training dataset and example, the words that both have.
    """

    benchmark: str
    ngram_words: int
    min_words: int
    num_items: int
    num_not_judged: int
    num_contaminated: int
    mean_coverage: float
    by_training_dataset: dict[str, int]
    contaminated_ids: list[str]
    matches: list[dict[str, str]]

    @property
    def share(self) -> float:
        """Contaminated items over items judged; 0.0 when none could be judged."""
        judged = self.num_items - self.num_not_judged
        return self.num_contaminated / judged if judged else 0.0

    def sentence(self) -> str:
        """One line to print beside a score."""
        judged = self.num_items - self.num_not_judged
        if not judged:
            return f"contamination not measured: none of {self.num_items} items has {self.min_words} words"
        where = ", ".join(f"{name} {number}" for name, number in self.by_training_dataset.items())
        found = f"{self.num_contaminated} of {judged} items ({100 * self.share:.1f} %) share {self.ngram_words} words in a row"
        short = f"; {self.num_not_judged} too short to judge" if self.num_not_judged else ""
        return f"{found} with the training data" + (f" ({where})" if where else "") + short

    def scorecard_entry(self) -> dict[str, Any]:
        """What `build_scorecard(contamination={task: entry})` takes: a status and the counts, without ids and matches."""
        judged = self.num_items - self.num_not_judged
        if not judged:
            return {"status": "not measured", "items": self.num_items, "too short to judge": self.num_not_judged}
        entry: dict[str, Any] = {
            "status": "measured",
            "items": judged,
            "contaminated": self.num_contaminated,
            "share": round(self.share, 4),
            "words in a row": self.ngram_words,
        }
        if self.by_training_dataset:
            entry["in"] = ", ".join(f"{name} {number}" for name, number in self.by_training_dataset.items())
        if self.num_not_judged:
            entry["too short to judge"] = self.num_not_judged
        return entry

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ContaminationReport:
        """The report that `to_json` wrote."""
        return cls(**value)


@dataclass
class _Item:
    benchmark: str
    identity: str
    num_ngrams: int
    found: set[bytes] = field(default_factory=set)
    found_in: list[str] = field(default_factory=list)


def words_of(example: Example) -> list[str]:
    """The words of an example's own text (context without our labels, then target), folded for comparison."""
    text = f"{without_wording(example.context)}\n{example.target}"
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class ContaminationIndex:
    """The n-grams of benchmark items, and which of them training examples were seen to hold."""

    def __init__(self, ngram_words: int = DEFAULT_NGRAM_WORDS, min_words: int = DEFAULT_MIN_WORDS) -> None:
        if not 1 <= min_words <= ngram_words:
            raise ConfigError(
                f"contamination with n-grams of {ngram_words} words and at least {min_words} words an item",
                allowed="1 <= min_words <= ngram_words",
                action="13 and 8 are usual",
            )
        self._ngram_words = ngram_words
        self._min_words = min_words
        self._numbers: dict[str, int] = {}
        self._words: list[str] = [""]
        self._items: list[_Item] = []
        self._benchmarks: dict[str, list[int]] = {}  # items in all, items not judged
        self._postings: dict[int, dict[bytes, list[int]]] = {}  # length in words -> n-gram -> items
        self._matches: dict[str, list[dict[str, str]]] = {}

    def add_item(self, benchmark: str, example: Example) -> None:
        """Put a test item into the index. All items come before the first training example."""
        counts = self._benchmarks.setdefault(benchmark, [0, 0])
        counts[0] += 1
        words = words_of(example)
        if len(words) < self._min_words:
            counts[1] += 1
            return
        length = min(self._ngram_words, len(words))
        numbers = array("I", [self._number(word) for word in words])
        ngrams = {numbers[start : start + length].tobytes() for start in range(len(words) - length + 1)}
        postings = self._postings.setdefault(length, {})
        for ngram in ngrams:
            postings.setdefault(ngram, []).append(len(self._items))
        self._items.append(_Item(benchmark, example.id, len(ngrams)))

    def add_training(self, dataset: str, example: Example) -> int:
        """Look for the items in one training example; gives the number of items found in it."""
        known = [self._numbers.get(word, _UNKNOWN) for word in words_of(example)]
        raw = memoryview(array("I", known)).cast("B")
        size = array("I").itemsize
        touched: set[int] = set()
        for length, postings in self._postings.items():
            last_unknown = -1
            for end in range(len(known)):
                if known[end] == _UNKNOWN:
                    last_unknown = end
                start = end - length + 1
                if start <= last_unknown:  # covers start < 0 too, since last_unknown is at least -1
                    continue
                ngram = raw[start * size : (end + 1) * size].tobytes()
                for number in postings.get(ngram, ()):
                    self._found(number, ngram, dataset, example.id)
                    touched.add(number)
        return len(touched)

    def reports(self) -> list[ContaminationReport]:
        """One report per benchmark, sorted by name."""
        return [self._report(benchmark) for benchmark in sorted(self._benchmarks)]

    def _number(self, word: str) -> int:
        if word not in self._numbers:
            self._numbers[word] = len(self._words)
            self._words.append(word)
        return self._numbers[word]

    def _found(self, number: int, ngram: bytes, dataset: str, training_id: str) -> None:
        item = self._items[number]
        if not item.found:
            shown = self._matches.setdefault(item.benchmark, [])
            if len(shown) < NUM_SHOWN_MATCHES:
                words = " ".join(self._words[word] for word in array("I", ngram))
                shown.append({"item": item.identity, "dataset": dataset, "example": training_id, "words": words})
        item.found.add(ngram)
        if dataset not in item.found_in:
            item.found_in.append(dataset)

    def _report(self, benchmark: str) -> ContaminationReport:
        found = [item for item in self._items if item.benchmark == benchmark and item.found]
        num_items, num_not_judged = self._benchmarks[benchmark]
        by_dataset: dict[str, int] = {}
        for item in found:
            for dataset in item.found_in:
                by_dataset[dataset] = by_dataset.get(dataset, 0) + 1
        coverage = sum(len(item.found) / item.num_ngrams for item in found) / len(found) if found else 0.0
        return ContaminationReport(
            benchmark=benchmark,
            ngram_words=self._ngram_words,
            min_words=self._min_words,
            num_items=num_items,
            num_not_judged=num_not_judged,
            num_contaminated=len(found),
            mean_coverage=coverage,
            by_training_dataset=dict(sorted(by_dataset.items())),
            contaminated_ids=[item.identity for item in found],
            matches=self._matches.get(benchmark, []),
        )


def measure_contamination(
    benchmarks: Mapping[str, Iterable[Example]],
    training: Mapping[str, Iterable[Example]],
    ngram_words: int = DEFAULT_NGRAM_WORDS,
    min_words: int = DEFAULT_MIN_WORDS,
) -> list[ContaminationReport]:
    """Reports for all benchmarks after one pass over all training examples.

    Args:
        benchmarks: dataset name -> the items that are scored.
        training: dataset name -> the examples that are learned from.
        ngram_words: words in a row that make a finding.
        min_words: items with fewer words are not judged.

    Raises:
        ConfigError: the two lengths make no sense.
    """
    index = ContaminationIndex(ngram_words, min_words)
    for benchmark, items in benchmarks.items():
        for item in items:
            index.add_item(benchmark, item)
    for dataset, examples in training.items():
        for example in examples:
            index.add_training(dataset, example)
    return index.reports()
