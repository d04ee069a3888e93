"""Probes of memory: a pass key at every depth and length, one key among many, and learning inside the context.

The filler and the wording are those of the built-in `passkey` dataset, so a model that was trained on it is asked in its own
words. A cell says how often the key was written out (`recalled`), and how often it was the likeliest of `num_choices` keys
(`chosen`, chance 1 / num_choices), which shows memory in models too small to copy digits.

What a cell does not tell: lengths are in words, not tokens; a model whose context limit is shorter loses the oldest words,
and the cell says so in `is_longer_than_limit`.

Sources: passkey retrieval, Mohtashami and Jaggi 2023 (arXiv 2305.16300); keys among many, Hsieh et al. 2024 (RULER, arXiv
2404.06654); in-context loss over repetitions, after Olsson et al. 2022 (arXiv 2209.11895).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from hsmn_dist.config.data import DatasetConfig
from hsmn_dist.data.builtin import passkey
from hsmn_dist.evaluation.metrics import choice_credit
from hsmn_dist.foundation.errors import ConfigError
from hsmn_dist.models.generation import GenerationSettings
from hsmn_dist.models.text_model import TextModel

ProbeKind = Literal["passkey", "multi_key"]
DOORS = ("red", "blue", "green", "white", "black", "brown", "grey", "pink", "gold", "silver", "orange", "purple")
_KEY_SENTENCE = re.compile(r" ?The pass key is \d+\. Remember \d+\.")
_SENTENCE_END = re.compile(r"(?<=[.!?]) ")


@dataclass(frozen=True)
class RecallSettings:
    """What is asked.

    Attributes:
        kind: `passkey` hides one key; `multi_key` hides `num_keys` keys of named doors and asks for one.
        lengths: words of filler.
        depths: where the asked key lies: 0 is the beginning of the text, 1 its end.
        num_trials: questions of each cell.
        num_keys: keys of `multi_key`.
        num_choices: keys that the right one is compared with by likelihood, itself included.
        max_new_tokens: of an answer.
        seed: of keys, doors and places.
    """

    kind: ProbeKind = "passkey"
    lengths: tuple[int, ...] = (64, 256, 1024, 4096)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    num_trials: int = 8
    num_keys: int = 4
    num_choices: int = 4
    max_new_tokens: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        problems = {
            "lengths": not self.lengths or min(self.lengths) < 1,
            "depths": not self.depths or not all(0.0 <= depth <= 1.0 for depth in self.depths),
            "num_trials": self.num_trials < 1,
            "num_keys": not 1 <= self.num_keys <= len(DOORS),
            "num_choices": self.num_choices < 2,
        }
        for name, is_bad in problems.items():
            if is_bad:
                raise ConfigError(
                    f"{name} = {getattr(self, name)!r} of a recall probe",
                    allowed=f"lengths from 1, depths from 0 to 1, 1 to {len(DOORS)} keys, 2 or more choices",
                    action=f"change {name}",
                )


@dataclass(frozen=True)
class RecallQuestion:
    """One text with its question, the right key, and keys that are wrong."""

    context: str
    key: str
    wrong_keys: tuple[str, ...]


@dataclass(frozen=True)
class RecallResult:
    """Shares by depth (row) and length (column)."""

    settings: dict[str, Any]
    recalled: list[list[float]]
    chosen: list[list[float]]
    is_longer_than_limit: list[bool] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def run_recall_probe(
    model: TextModel, settings: RecallSettings, progress: Callable[[int, int], None] | None = None
) -> RecallResult:
    """Ask every cell. `progress(done, all)` is called after each."""
    recalled = [[0.0] * len(settings.lengths) for _ in settings.depths]
    chosen = [[0.0] * len(settings.lengths) for _ in settings.depths]
    decoding = GenerationSettings(max_new_tokens=settings.max_new_tokens, stop=("\n",))
    done = 0
    for column, length in enumerate(settings.lengths):
        for row, depth in enumerate(settings.depths):
            questions = [recall_question(settings, length, depth, trial) for trial in range(settings.num_trials)]
            texts = model.generate([question.context for question in questions], decoding)
            hits = [_first_number(text) == question.key for text, question in zip(texts, questions, strict=True)]
            recalled[row][column] = sum(hits) / len(hits)
            chosen[row][column] = _chosen(model, questions)
            done += 1
            if progress:
                progress(done, len(settings.lengths) * len(settings.depths))
    limit = getattr(model, "max_context_tokens", None)
    longer = [limit is not None and length > limit for length in settings.lengths]
    return RecallResult(asdict(settings), recalled, chosen, longer)


def _first_number(text: str) -> str | None:
    found = re.search(r"\d+", text)
    return found.group() if found else None


def _chosen(model: TextModel, questions: Sequence[RecallQuestion]) -> float:
    pairs = [(question.context, key) for question in questions for key in (question.key, *question.wrong_keys)]
    results = iter(model.loglikelihood(pairs))
    credits = []
    for question in questions:
        costs = [next(results).nll_sum for _ in range(1 + len(question.wrong_keys))]
        credits.append(choice_credit(costs, 0))
    return sum(credits) / len(credits)


def recall_question(settings: RecallSettings, num_words: int, depth: float, trial: int) -> RecallQuestion:
    """The text of one trial: the same filler at every depth, so that only the key's place differs."""
    draw = random.Random(f"{settings.seed} {settings.kind} {num_words} {trial}")
    sentences = filler_sentences(num_words, trial)
    keys = [str(key) for key in draw.sample(range(10_000, 100_000), settings.num_keys + settings.num_choices - 1)]
    asked, wrong = keys[0], tuple(keys[settings.num_keys :])
    place = round(depth * len(sentences))
    if settings.kind == "passkey":
        facts = [(place, f"The pass key is {asked}. Remember {asked}.")]
        question = "What is the pass key?"
    else:
        doors = draw.sample(DOORS, settings.num_keys)
        places = [place, *(draw.randint(0, len(sentences)) for _ in doors[1:])]
        facts = [
            (where, f"The pass key of the {door} door is {key}.")
            for where, door, key in zip(places, doors, keys, strict=False)
        ]
        question = f"What is the pass key of the {doors[0]} door?"
        # The other doors' keys are in the text, so they are the hard wrong answers.
        wrong = (*keys[1 : settings.num_keys], *wrong)[: settings.num_choices - 1]
    for where, fact in sorted(facts, reverse=True):
        sentences.insert(where, fact)
    return RecallQuestion(f"{' '.join(sentences)}\nQuestion: {question}\nAnswer: ", asked, wrong)


def filler_sentences(num_words: int, number: int) -> list[str]:
    """About `num_words` words of the built-in `passkey` dataset's filler, its key taken out, begun elsewhere by `number`."""
    row = next(iter(passkey(DatasetConfig(name="passkey", passkey_tokens=max(16, num_words), num_examples=1))))
    sentences = _SENTENCE_END.split(_KEY_SENTENCE.sub("", str(row.value["context"])).strip())
    start = 13 * number % len(sentences)
    return sentences[start:] + sentences[:start]


@dataclass(frozen=True)
class AdaptationResult:
    """Mean loss of a pair's second word after it was seen `repeats[i]` times in the context, in nats per byte."""

    repeats: list[int]
    nats_per_byte: list[float]
    num_trials: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def run_adaptation_probe(
    model: TextModel, repeats: Sequence[int] = (0, 1, 2, 4, 8), num_trials: int = 16, seed: int = 0
) -> AdaptationResult:
    """Learning inside the context: invented words are paired at random, so that weights cannot know a pair beforehand.

    A model that learns from its context (fast memory or attention) has a curve that falls; others stay flat.
    """
    pairs = []
    for trial in range(num_trials):
        draw = random.Random(f"{seed} {trial}")
        words = [_invented_word(draw) for _ in range(8)]
        facts = [f"{first} goes with {second}." for first, second in zip(words[::2], words[1::2], strict=True)]
        for count in repeats:
            shown: list[str] = []
            for _ in range(count):
                draw.shuffle(facts)
                shown += facts
            pairs.append((" ".join([*shown, f"{words[0]} goes with "]), words[1]))
    results = iter(model.loglikelihood(pairs))
    totals, sizes = [0.0] * len(repeats), [0] * len(repeats)
    for _ in range(num_trials):
        for index in range(len(repeats)):
            result = next(results)
            totals[index] += result.nll_sum
            sizes[index] += result.num_bytes
    return AdaptationResult(list(repeats), [t / n for t, n in zip(totals, sizes, strict=True)], num_trials, seed)


def _invented_word(draw: random.Random) -> str:
    return "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3))
