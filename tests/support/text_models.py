"""Two text models whose scores are known beforehand: one knows nothing, the other knows every answer."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from hsmn_dist.data.example import Example
from hsmn_dist.models.generation import GenerationSettings
from hsmn_dist.models.text_model import LogLikelihood


class UniformTextModel:
    """Every byte is as likely as any other; generates random letters."""

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        sizes = [len(target.encode()) for _, target in pairs]
        return [LogLikelihood(size * math.log(256), size, size, size == 0) for size in sizes]

    def generate(self, prompts: Sequence[str], settings: GenerationSettings) -> list[str]:
        draw = random.Random(settings.seed)
        letters = "abcdefghijklmnopqrstuvwxyz 0123456789\n"
        return ["".join(draw.choices(letters, k=settings.max_new_tokens)) for _ in prompts]


class OracleTextModel:
    """Finds the example of a context and gives its gold answer: 0.01 nats a byte for what is right, 1 for the rest."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.by_context: dict[str, list[Example]] = {}
        for example in examples:
            self.by_context.setdefault(example.context, []).append(example)

    def right(self, context: str) -> set[str]:
        """Every continuation of a context that counts as right."""
        texts = set()
        for example in self.by_context[context]:
            texts.add(example.target)
            meta = example.meta
            if example.kind == "ranking":
                texts |= {text for text, label in zip(meta["candidates"], meta["labels"], strict=True) if label}
            elif "choices" in meta:
                texts.add(meta["choices"][meta["gold"]])
                letter = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[meta["gold"]]
                if example.kind == "multiple_choice" and letter not in meta["choices"]:
                    texts.add(letter)
        return texts

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        results = []
        for context, target in pairs:
            is_right, size = target in self.right(context), len(target.encode())
            results.append(LogLikelihood((0.01 if is_right else 1.0) * size, size, size, is_right))
        return results

    def generate(self, prompts: Sequence[str], settings: GenerationSettings) -> list[str]:
        served: dict[str, int] = {}
        texts = []
        for prompt in prompts:
            # The n-th time a context is asked, the n-th example that has it is answered.
            index = served[prompt] = served.get(prompt, -1) + 1
            examples = self.by_context[prompt]
            example = examples[index % len(examples)]
            answer = str(example.meta.get("answer", ""))
            is_unmarked = example.kind == "exact_answer" and answer not in ("", example.target)
            has_mark = "####" in example.target or "\\boxed" in example.target
            texts.append(example.target + (f"\n\\boxed{{{answer}}}" if is_unmarked and not has_mark else ""))
        return texts
