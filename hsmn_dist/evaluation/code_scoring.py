"""pass@k: programs drawn from the model, run in the sandbox against the tests of their problem.

Two forms of tests (`meta["test_format"]`): "python" tests are put after the program and raise when it is wrong; "stdin"
tests are JSON pairs of input and output, one run each, stopped at the first failure.

A problem that has several right outputs and a checker of its own (some of CodeContests) is scored too low: outputs are
compared with the one that is given.

A python test passes only if the line after the last test was reached: a random word is printed there, so `exit()` in the
middle of a program does not count as a pass. Source: Chen et al. 2021 (arXiv 2107.03374).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import replace

from hsmn_dist.config.evaluation import EvaluationConfig
from hsmn_dist.data.example import Example
from hsmn_dist.evaluation import metrics
from hsmn_dist.evaluation.answers import CODE_STOPS, code_completion
from hsmn_dist.evaluation.kind_scores import KindScores
from hsmn_dist.evaluation.sandbox import Program, Sandbox, SandboxLimits
from hsmn_dist.foundation.errors import SandboxError
from hsmn_dist.foundation.log import logger
from hsmn_dist.models.generation import GenerationSettings
from hsmn_dist.models.text_model import TextModel

_STDIN_BATCH = 8
_log = logger(__name__)


def score_code(model: TextModel, examples: Sequence[Example], settings: EvaluationConfig) -> KindScores:
    """pass@1 of each problem, and pass@10, pass@100 as far as `code_samples` goes.

    Not measured, with the reason, unless `runs_model_code` is set and the sandbox works. Several samples need a
    temperature; with greedy decoding they would be the same program.
    """
    if not settings.runs_model_code:
        return KindScores(
            "pass@1",
            [],
            reason="model-written code is not run (evaluation.runs_model_code is false; `hsmn-dist evaluate --run-model-code` runs it in the sandbox)",
        )
    if any(example.meta.get("language", "python") != "python" for example in examples):
        return KindScores("pass@1", [], reason="the sandbox runs Python alone, and a problem asks for another language")
    limits = SandboxLimits(timeout_seconds=settings.sandbox_timeout_seconds, memory_bytes=settings.sandbox_memory_bytes)
    try:
        sandbox = Sandbox(limits, settings.sandbox_workers)
    except SandboxError as error:
        # Training of hours must not be lost to a missing package: the score says why it is absent.
        _log.warning("code is not scored: %s", error)
        return KindScores("pass@1", [], reason=f"{error.found}; {error.action}")
    num_samples = settings.code_samples if settings.temperature > 0 else 1
    passed = [0] * len(examples)
    for sample in range(num_samples):
        completions = _complete(model, examples, settings, sample)
        for index, is_right in enumerate(run_tests(sandbox, examples, completions)):
            passed[index] += is_right
    extra = {
        f"pass@{k}": [metrics.pass_at_k(num_samples, right, k) for right in passed]
        for k in (10, 100)
        if k <= num_samples
    }
    conditions = {"samples_per_problem": num_samples, "sandbox_timeout_seconds": settings.sandbox_timeout_seconds}
    return KindScores(
        "pass@1", [right / num_samples for right in passed], extra, {**conditions, "extraction": "body or fence"}
    )


def _complete(model: TextModel, examples: Sequence[Example], settings: EvaluationConfig, sample: int) -> list[str]:
    decoding = GenerationSettings(
        max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, seed=settings.seed + sample
    )
    completions = [""] * len(examples)
    for has_prompt in (True, False):
        places = [i for i, example in enumerate(examples) if bool(example.meta.get("prompt")) == has_prompt]
        stops = CODE_STOPS if has_prompt else ()
        texts = model.generate([examples[i].context for i in places], replace(decoding, stop=stops)) if places else []
        for place, text in zip(places, texts, strict=True):
            completions[place] = text
    return completions


def run_tests(sandbox: Sandbox, examples: Sequence[Example], completions: Sequence[str]) -> list[bool]:
    """Whether each completion passes every test of its problem."""
    verdicts = [False] * len(examples)
    python = [i for i, example in enumerate(examples) if example.meta.get("test_format", "python") == "python"]
    words = [secrets.token_hex(16) for _ in python]
    programs = [python_program(examples[i], completions[i], word) for i, word in zip(python, words, strict=True)]
    for i, word, outcome in zip(python, words, sandbox.run_many(programs), strict=True):
        verdicts[i] = outcome.status == "ok" and outcome.stdout.rstrip().endswith(word)
    for i, example in enumerate(examples):
        if example.meta.get("test_format", "python") == "stdin":
            verdicts[i] = _passes_stdin(sandbox, example, completions[i])
    return verdicts


def python_program(example: Example, completion: str, last_word: str) -> Program:
    """Program, setup and tests in one file; it prints `last_word` when all tests were reached."""
    prompt = str(example.meta.get("prompt") or "")
    body = prompt + code_completion(completion, prompt)
    tests = "\n".join(str(test) for test in example.meta["tests"])
    setup = str(example.meta.get("setup") or "")
    # The setup comes after the program, as in MBPP: it may use what the program defines.
    return Program(f"{body}\n{setup}\n{tests}\nprint({last_word!r})\n")


def _passes_stdin(sandbox: Sandbox, example: Example, completion: str) -> bool:
    source = code_completion(completion, str(example.meta.get("prompt") or ""))
    tests = [json.loads(test) for test in example.meta["tests"]]
    for start in range(0, len(tests), _STDIN_BATCH):
        part = tests[start : start + _STDIN_BATCH]
        outcomes = sandbox.run_many([Program(source, test["input"]) for test in part])
        for test, outcome in zip(part, outcomes, strict=True):
            if outcome.status != "ok" or not is_same_output(outcome.stdout, test["output"]):
                return False
    return bool(tests)


def is_same_output(ours: str, wanted: str) -> bool:
    """Equal word by word; words with a decimal point may differ by 1e-6, relative or absolute, as contests allow."""
    first, second = ours.split(), wanted.split()
    return len(first) == len(second) and all(_is_same_word(a, b) for a, b in zip(first, second, strict=True))


def _is_same_word(ours: str, wanted: str) -> bool:
    if ours == wanted:
        return True
    if "." not in wanted:
        return False
    try:
        return abs(float(ours) - float(wanted)) <= 1e-6 * max(1.0, abs(float(wanted)))
    except ValueError:
        return False
