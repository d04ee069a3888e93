"""Losses that the Fisher estimators differentiate: true labels, labels drawn from the model, reversed logits; random signs.

What is drawn for a token depends on (seed, global example index, position) alone, through an integer hash, so that any
number of ranks and any micro-batch size draw what one rank draws.

Sources: van de Ven 2025, arXiv 2502.11756 (sampled against empirical); EWC-DR, CVPR 2026, arXiv 2603.18596 (logits reversed
in sign when the importance is taken); the hash is the finaliser of SplitMix64 (Steele, Lea and Flood 2014, OOPSLA).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from hsmn_dist.config.continual import Estimator
from hsmn_dist.models.contract import TargetLoss
from hsmn_dist.models.token_loss import token_cross_entropy

_BLOCK_ENTRIES = 1 << 22
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_NEXT_DATASET = 1 << 40
SAMPLED: tuple[Estimator, ...] = ("sampled", "sampled_sum")


def target_loss(estimator: Estimator, seed: int, example_index: Tensor) -> TargetLoss:
    """The loss of scored positions that an estimator differentiates; `example_index` [B] names the rows of the batch."""
    if estimator in SAMPLED:
        return _SampledLoss(seed, example_index)
    return reversed_cross_entropy if estimator == "logit_reversal" else wide_cross_entropy


class ExampleNumbers:
    """A number for each example of a sequence that no other example has, and the same however many ranks share it.

    An index that comes for the first time is its own number; where it comes again, in a later dataset, that is added.
    """

    def __init__(self) -> None:
        self._times_seen: Counter[int] = Counter()

    def of_step(self, indexes: Sequence[int]) -> list[int]:
        """Numbers of the examples that all ranks together see next, in the order of the sequence; -1 (padding) stays."""
        numbers = []
        for index in indexes:
            numbers.append(index if index < 0 else index + self._times_seen[index] * _NEXT_DATASET)
            self._times_seen[index] += 1
        return numbers


def wide_cross_entropy(logits: Tensor, labels: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """The models' cross entropy in fp32, and in float64 for such logits, so that closed forms are met to float64."""
    return token_cross_entropy(logits, labels)


def reversed_cross_entropy(logits: Tensor, labels: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """-log softmax(-z)[label], shapes as in `TargetLoss`: a confident token keeps a large gradient."""
    return wide_cross_entropy(-logits, labels, rows, positions)


class _SampledLoss:
    """Negative log-likelihood of labels drawn from the model's own distribution at each scored position."""

    def __init__(self, seed: int, example_index: Tensor) -> None:
        self.seed = seed
        self.example_index = example_index

    def __call__(self, logits: Tensor, labels: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        owners = self.example_index.to(rows.device)[rows]
        drawn = sample_labels(logits.detach(), uniform(self.seed, owners, positions))
        return wide_cross_entropy(logits, drawn, rows, positions)


def sample_labels(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Labels [M] drawn by inverting the cumulative softmax of logits [M, V] at `uniforms` [M] in [0, 1)."""
    drawn = torch.empty(logits.shape[0], dtype=torch.long, device=logits.device)
    step = max(1, _BLOCK_ENTRIES // max(1, logits.shape[1]))
    for start in range(0, logits.shape[0], step):
        block = slice(start, start + step)
        # float64, because a cumulative sum of 50k fp32 terms is off by more than a rare label's probability.
        cumulative = torch.softmax(logits[block].double(), -1).cumsum(-1)
        points = uniforms[block].to(cumulative).unsqueeze(1) * cumulative[:, -1:]
        drawn[block] = torch.searchsorted(cumulative, points, right=True).squeeze(1)
    return drawn.clamp_(max=logits.shape[1] - 1)


def signs(seed: int, example_index: Tensor) -> Tensor:
    """+1 or -1 with equal chance for each example [B], fp32."""
    bits = _hashed(seed + 1, example_index, torch.zeros_like(example_index)) & 1
    return (2 * bits - 1).float()


def uniform(seed: int, example_index: Tensor, positions: Tensor) -> Tensor:
    """Numbers in [0, 1), float64, one for each (example, position)."""
    bits = _shifted(_hashed(seed, example_index, positions), 11)
    return bits.double() * 2.0**-53


def _hashed(seed: int, first: Tensor, second: Tensor) -> Tensor:
    state = torch.full_like(first, seed, dtype=torch.int64)
    for word in (first, second):
        state = _mixed(state * _GOLDEN + word.to(torch.int64) + 1)
    return state


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _MIX_1
    x = (x ^ _shifted(x, 27)) * _MIX_2
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift right of a signed 64-bit integer."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
