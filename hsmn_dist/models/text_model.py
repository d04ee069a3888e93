"""TextModel: text in, log-likelihoods or text out; all that evaluation and a server see of a model.

Unusual: requests are sorted by length and context before they are batched, a context that several targets of a batch share
is read once, and answers come back in the order asked; a row's answer depends neither on its batch nor on that order.
Contexts longer than `max_context_tokens` lose their oldest tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from hsmn_dist.foundation.log import logger, warn_once
from hsmn_dist.models.contract import LanguageModel, ModelInput, cross_entropy
from hsmn_dist.models.generation import GenerationSettings, StopRule, generate_tokens, iter_tokens

REPLACEMENT = "\ufffd"
_LOG = logger(__name__)


class TextTokenizer(Protocol):
    """What a text model needs of a tokenizer."""

    pad_id: int
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out."""
        ...


@dataclass(frozen=True)
class LogLikelihood:
    """Score of a target after its context.

    Attributes:
        nll_sum: nats, summed over the target's tokens.
        num_tokens: tokens scored.
        num_bytes: UTF-8 bytes of the target.
        is_greedy: every token was the most probable one.
    """

    nll_sum: float
    num_tokens: int
    num_bytes: int
    is_greedy: bool


class TextModel(Protocol):
    """Scores and writes text."""

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        """Score each (context, target)."""
        ...

    def generate(self, prompts: Sequence[str], settings: GenerationSettings) -> list[str]:
        """Text after each prompt, up to a stop string, <eos> or `max_new_tokens`."""
        ...


class LocalTextModel:
    """A model and its tokenizer in this process.

    Args:
        model: put into eval mode here.
        tokenizer: the one that the model was trained with.
        batch_examples: rows of a forward pass.
        max_context_tokens: longer contexts lose their oldest tokens.
        max_target_tokens: longer targets are scored on their first tokens; new tokens are bounded by it. At most the model's.
        scores_eos: add <eos> to every target in `loglikelihood`, as in training.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: TextTokenizer,
        batch_examples: int = 8,
        max_context_tokens: int = 8192,
        max_target_tokens: int | None = None,
        scores_eos: bool = False,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch_examples = max(1, batch_examples)
        self.max_context_tokens = max_context_tokens
        limit = model.max_target_tokens
        self.max_target_tokens = (
            min(max_target_tokens, limit) if max_target_tokens and limit else max_target_tokens or limit
        )
        self.scores_eos = scores_eos

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        """Score each (context, target); an empty target has 0 tokens and 0 nats."""
        encoded = [(self._context(context), self._target(target)) for context, target in pairs]
        results = [
            LogLikelihood(0.0, 0, self._num_bytes(target, ids), True)
            for (_, target), (_, ids) in zip(pairs, encoded, strict=True)
        ]
        order = sorted(
            (index for index, (_, target) in enumerate(encoded) if target),
            key=lambda index: (len(encoded[index][0]), encoded[index][0], len(encoded[index][1]), index),
        )
        for start in range(0, len(order), self.batch_examples):
            batch = order[start : start + self.batch_examples]
            sums, misses = self._score([encoded[index] for index in batch])
            for index, nll, num_misses in zip(batch, sums, misses, strict=True):
                num_tokens, num_bytes = len(encoded[index][1]), results[index].num_bytes
                results[index] = LogLikelihood(nll, num_tokens, num_bytes, num_misses == 0)
        return results

    def generate(self, prompts: Sequence[str], settings: GenerationSettings) -> list[str]:
        """Text after each prompt."""
        settings = self._bounded(settings)
        contexts = [self._context(prompt) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda index: (len(contexts[index]), index))
        texts = [""] * len(prompts)
        for start in range(0, len(order), self.batch_examples):
            batch = order[start : start + self.batch_examples]
            ids, mask = self._padded([contexts[index] for index in batch])
            rows = generate_tokens(
                self.model,
                ids,
                mask,
                settings,
                eos_id=self.tokenizer.eos_id,
                row_indices=batch,
                should_stop=self._stop_rule(settings.stop),
            )
            for index, tokens in zip(batch, rows, strict=True):
                texts[index] = cut_at_stop(self.tokenizer.decode(tokens), settings.stop)
        return texts

    def stream(self, prompt: str, settings: GenerationSettings) -> Iterator[str]:
        """Pieces of the text after `prompt`, as soon as no stop string can begin in them; together they equal `generate`."""
        settings = self._bounded(settings)
        ids, mask = self._padded([self._context(prompt)])
        tokens: list[int] = []
        given = ""
        steps = iter_tokens(
            self.model,
            ids,
            mask,
            settings,
            eos_id=self.tokenizer.eos_id,
            row_indices=[0],
            should_stop=self._stop_rule(settings.stop),
        )
        for new in steps:
            if new[0] is None:
                break
            tokens.append(new[0])
            text = cut_at_stop(self.tokenizer.decode(tokens), settings.stop)
            safe = text[: len(text) - held_back(text, settings.stop)]
            if len(safe) > len(given) and safe.startswith(given):
                yield safe[len(given) :]
                given = safe
        text = cut_at_stop(self.tokenizer.decode(tokens), settings.stop)
        if len(text) > len(given):
            yield text[len(given) :]

    def _context(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        if len(ids) > self.max_context_tokens:
            warn_once(
                _LOG,
                "context cut",
                f"a context of {len(ids)} tokens lost its oldest ones: max_context_tokens is {self.max_context_tokens}",
            )
            ids = ids[len(ids) - self.max_context_tokens :]
        return ids

    def _target(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        if ids and self.scores_eos:
            ids = [*ids, self.tokenizer.eos_id]
        if self.max_target_tokens and len(ids) > self.max_target_tokens:
            warn_once(
                _LOG,
                "target cut",
                f"a target of {len(ids)} tokens is scored on its first {self.max_target_tokens}, the model's longest",
            )
            ids = ids[: self.max_target_tokens]
        return ids

    def _num_bytes(self, target: str, ids: Sequence[int]) -> int:
        is_cut = self.max_target_tokens is not None and len(ids) == self.max_target_tokens
        return len((self.tokenizer.decode(ids) if is_cut else target).encode())

    def _bounded(self, settings: GenerationSettings) -> GenerationSettings:
        limit = self.max_target_tokens
        if limit and settings.max_new_tokens > limit:
            warn_once(
                _LOG,
                f"new tokens {limit}",
                f"max_new_tokens {settings.max_new_tokens} is more than the model's {limit} target tokens: using {limit}",
            )
            return replace(settings, max_new_tokens=limit)
        return settings

    def _stop_rule(self, stop: tuple[str, ...]) -> StopRule | None:
        if not stop:
            return None
        # A character takes at most four tokens (of a byte tokenizer), so this tail holds any stop string that just ended.
        tail = 4 * max(len(text) for text in stop) + 8
        return lambda row, tokens: any(text in self.tokenizer.decode(tokens[-tail:]) for text in stop)

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.tokenizer.pad_id, dtype=torch.int64)
        mask = torch.zeros((len(rows), width), dtype=torch.bool)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[index, : len(row)] = True
        return ids.to(self.device), mask.to(self.device)

    def _score(self, rows: Sequence[tuple[list[int], list[int]]]) -> tuple[list[float], list[int]]:
        """Nats and number of tokens that were not the most probable one, for each row; equal contexts are read once."""
        places = {tuple(context): place for place, context in enumerate(dict.fromkeys(tuple(c) for c, _ in rows))}
        owners = torch.tensor([places[tuple(context)] for context, _ in rows], device=self.device)
        inputs = ModelInput(*self._padded(list(places)), *self._padded([target for _, target in rows]))
        misses = torch.zeros(len(rows), dtype=torch.int64, device=self.device)

        def loss(logits: Tensor, labels: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
            misses.index_add_(0, rows, (logits.argmax(dim=-1) != labels).long())
            return cross_entropy(logits, labels, rows, positions)

        with torch.inference_mode():
            if len(places) < len(rows):
                output = self.model.score_continuations(inputs, owners, loss)
            else:
                output = self.model.forward_windows(inputs, target_loss=loss)
        assert output.nll is not None
        return output.nll.double().sum(dim=1).tolist(), misses.tolist()


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Text before the first stop string."""
    ends = [text.find(one) for one in stop if one in text]
    return text[: min(ends)] if ends else text


def held_back(text: str, stop: Sequence[str]) -> int:
    """Characters at the end of `text` that may still change: the beginning of a stop string, or half a character."""
    held = len(text) - len(text.rstrip(REPLACEMENT))
    for one in stop:
        for length in range(min(len(one) - 1, len(text)), held, -1):
            if text.endswith(one[:length]):
                held = max(held, length)
                break
    return held
