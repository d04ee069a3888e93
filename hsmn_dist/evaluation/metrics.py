"""Scores as pure functions of plain values; every one is in [0, 1] and higher is better, unless its name says nats or bits.

Sources: pass@k, Chen et al. 2021 (arXiv 2107.03374), equation 1; F1 of words, Rajpurkar et al. 2016 (arXiv 1606.05250);
Wilson interval, Wilson 1927; chrF, Popovic 2015, by sacrebleu; ROUGE-L, Lin 2004, by rouge-score.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Sequence

from hsmn_dist.evaluation.answers import normalised_words
from hsmn_dist.foundation.extras import require

_TIE = 1e-9


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k samples passes): 1 - C(n - c, k) / C(n, k). Needs k <= n."""
    if not 0 < k <= num_samples or not 0 <= num_passed <= num_samples:
        raise ValueError(f"pass@{k} of {num_passed} in {num_samples}: needs 0 < k <= samples and passed <= samples")
    return 1.0 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def choice_credit(costs: Sequence[float], gold: int) -> float:
    """1 if the gold choice has the lowest cost; a tie of n choices that holds it gives 1/n, the chance of a fair draw."""
    best = min(costs)
    tied = [index for index, cost in enumerate(costs) if cost <= best + _TIE * max(1.0, abs(best))]
    return 1.0 / len(tied) if gold in tied else 0.0


def word_f1(prediction: str, answers: Sequence[str]) -> float:
    """Best F1 of shared words over the right answers."""
    return max((_word_f1(prediction, answer) for answer in answers), default=0.0)


def _word_f1(prediction: str, answer: str) -> float:
    ours, theirs = normalised_words(prediction).split(), normalised_words(answer).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2.0 * shared / (len(ours) + len(theirs))


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals one of the answers after normalising words. Answers of articles alone never match ""."""
    ours = normalised_words(prediction)
    return float(any(ours == normalised_words(answer) for answer in answers if normalised_words(answer) or not ours))


def average_precision(costs: Sequence[float], labels: Sequence[int], tie_seed: str = "") -> float:
    """Mean of the precision at each right candidate, lowest cost first; ties are drawn by `tie_seed`. 0 with no right one."""
    hits, total = 0, 0.0
    for rank, index in enumerate(_ranking(costs, tie_seed), 1):
        if labels[index]:
            hits += 1
            total += hits / rank
    return total / hits if hits else 0.0


def reciprocal_rank(costs: Sequence[float], labels: Sequence[int], tie_seed: str = "") -> float:
    """1 / rank of the first right candidate, lowest cost first; ties are drawn by `tie_seed`. 0 with no right one."""
    for rank, index in enumerate(_ranking(costs, tie_seed), 1):
        if labels[index]:
            return 1.0 / rank
    return 0.0


def _ranking(costs: Sequence[float], tie_seed: str) -> list[int]:
    # Rounded, so that costs which differ by rounding alone count as tied; the draw depends on the seed's text only.
    draw = random.Random(hashlib.sha256(tie_seed.encode()).digest())
    order = list(range(len(costs)))
    draw.shuffle(order)
    return sorted(order, key=lambda index: float(f"{costs[index]:.9g}"))


def chrf(prediction: str, reference: str) -> float:
    """Character n-gram F-score (chrF2 of sacrebleu), in [0, 1]."""
    sacrebleu = require("sacrebleu")
    return float(sacrebleu.sentence_chrf(prediction, [reference]).score) / 100.0


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (rouge-score, no stemming), in [0, 1].

    Texts without a single letter or digit of ASCII have no words for that library: there equal texts score 1.
    """
    scorer = require("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    score = float(scorer.score(reference, prediction)["rougeL"].fmeasure)
    has_words = any(letter.isascii() and letter.isalnum() for letter in reference)
    return score if has_words else float(prediction.strip() == reference.strip())


def bits_per_byte(nll_nats: float, num_bytes: int) -> float:
    """Cross-entropy in bits per UTF-8 byte: comparable between tokenizers. nan without bytes."""
    return nll_nats / math.log(2) / num_bytes if num_bytes else math.nan


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; ValueError for no values, because "not measured" is not 0."""
    if not values:
        raise ValueError("the mean of no values")
    return math.fsum(values) / len(values)


def wilson_interval(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """95 percent interval of a proportion; right also at 0 and at all."""
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(values: Sequence[float], num_samples: int, seed: int) -> tuple[float, float]:
    """95 percent percentile interval of the mean under resampling of examples."""
    draw = random.Random(seed)
    means = sorted(math.fsum(draw.choices(values, k=len(values))) / len(values) for _ in range(num_samples))
    low, high = int(0.025 * num_samples), min(num_samples - 1, math.ceil(0.975 * num_samples) - 1)
    return means[low], means[high]
