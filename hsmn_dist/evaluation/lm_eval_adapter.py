"""Any TextModel as a model of lm-evaluation-harness, so that every task of that harness can be run on it.

Gate: the only file that imports lm_eval, which takes ten seconds, so it is imported by whoever runs the harness.

Unusual: the adapter works on text, as TextModel does. `loglikelihood_rolling` therefore scores a document in pieces of at
most `max_target_tokens` bytes (a token is at least one byte), each after the text before it. Pieces end at white space
where there is any, so a byte-level BPE sees the same words; with a tokenizer that joins words the sum may differ a little
from one pass over the tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from hsmn_dist.foundation.errors import ConfigError
from hsmn_dist.foundation.registry import near_name
from hsmn_dist.models.generation import GenerationSettings
from hsmn_dist.models.text_model import TextModel

DEFAULT_NEW_TOKENS = 256
_BATCH_REQUESTS = 512


class HarnessModel(LM):
    """`TextModel` with the harness's three methods.

    Args:
        model: what is evaluated.
        max_target_tokens: longest target that the model scores at once; None has no bound.
        max_new_tokens: for tasks that set no `max_gen_toks`.
        seed: of tasks that sample.
    """

    def __init__(
        self,
        model: TextModel,
        max_target_tokens: int | None = None,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._model = model
        self._max_target_bytes = max_target_tokens or getattr(model, "max_target_tokens", None)
        self._max_new_tokens = max_new_tokens
        self._seed = seed

    @property
    def tokenizer_name(self) -> str:
        """Fingerprint of request caches: the model's class."""
        return type(self._model).__name__

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding gives it) of each (context, continuation)."""
        answers: list[tuple[float, bool]] = []
        for start in range(0, len(requests), _BATCH_REQUESTS):
            part = requests[start : start + _BATCH_REQUESTS]
            results = self._model.loglikelihood([(str(r.args[0]), str(r.args[1])) for r in part])
            for request, result in zip(part, results, strict=True):
                answer = (-result.nll_sum, result.is_greedy)
                self.cache_hook.add_partial("loglikelihood", request.args, answer)
                answers.append(answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-probability in nats of each whole text."""
        totals = []
        for request in requests:
            text = str(request.args[0])
            pieces = split_text(text, self._max_target_bytes)
            starts = [sum(map(len, pieces[:index])) for index in range(len(pieces))]
            pairs = [(text[:start], piece) for start, piece in zip(starts, pieces, strict=True)]
            total = -sum(result.nll_sum for result in self._model.loglikelihood(pairs))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            totals.append(total)
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Text after each prompt up to a stop string; requests of equal settings are generated together."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        texts = [""] * len(requests)
        for places in groups.values():
            settings = self._settings(requests[places[0]].args[1])
            found = self._model.generate([str(requests[place].args[0]) for place in places], settings)
            for place, text in zip(places, found, strict=True):
                texts[place] = text
                self.cache_hook.add_partial("generate_until", requests[place].args, text)
        return texts

    def _settings(self, asked: Mapping[str, Any]) -> GenerationSettings:
        until = asked.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(text for text in until if text)
        is_sampled = bool(asked.get("do_sample", float(asked.get("temperature") or 0.0) > 0))
        return GenerationSettings(
            max_new_tokens=int(asked.get("max_gen_toks") or asked.get("max_new_tokens") or self._max_new_tokens),
            temperature=float(asked.get("temperature", 1.0)) if is_sampled else 0.0,
            top_k=int(asked.get("top_k") or 0),
            top_p=float(asked.get("top_p") or 1.0),
            stop=stop,
            seed=self._seed,
        )


def split_text(text: str, max_bytes: int | None) -> list[str]:
    """Pieces of at most `max_bytes` UTF-8 bytes that join to the text; cut before white space where there is any."""
    if not max_bytes or len(text.encode()) <= max_bytes:
        return [text]
    pieces, start = [], 0
    while start < len(text):
        end, size, blank = start, 0, 0
        while end < len(text) and size + len(text[end].encode()) <= max_bytes:
            if text[end].isspace() and end > start:
                blank = end
            size += len(text[end].encode())
            end += 1
        if end < len(text) and blank:
            end = blank
        # A character wider than the bound would never fit: it goes alone.
        end = max(end, start + 1)
        pieces.append(text[start:end])
        start = end
    return pieces


def run_harness(
    model: TextModel,
    tasks: Sequence[str],
    include_path: Path | None = None,
    num_shots: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    max_target_tokens: int | None = None,
) -> dict[str, Any]:
    """Run tasks of the harness and give its result dictionary (`results`, `versions`, `n-shot`, `configs` ...).

    Args:
        model: what is evaluated.
        tasks: names of tasks or groups.
        include_path: folder of further task YAML files; with it the harness's own tasks are not indexed (offline).
        num_shots: shots; None leaves each task's own number.
        limit: examples of each task; None takes all.
        seed: of shots and sampling.
        max_target_tokens: see HarnessModel.

    Raises:
        ConfigError: a task is not known.
    """
    manager = TaskManager(
        include_path=str(include_path) if include_path else None, include_defaults=include_path is None
    )
    for name in tasks:
        if name not in manager.all_tasks:
            near = near_name(name, manager.all_tasks)
            raise ConfigError(
                f"lm-eval has no task {name!r}",
                allowed=f"one of {len(manager.all_tasks)} tasks" + (f" (of {include_path})" if include_path else ""),
                action=f"did you mean {near!r}?" if near else "`lm-eval ls tasks` lists them",
            )
    result = lm_eval.simple_evaluate(
        model=HarnessModel(model, max_target_tokens, seed=seed),
        tasks=list(tasks),
        num_fewshot=num_shots,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        confirm_run_unsafe_code=False,
    )
    return {} if result is None else dict(result)
