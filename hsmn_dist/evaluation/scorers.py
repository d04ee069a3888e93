"""One scorer for each kind of example: text in, a score per example out.

| kind | main score | how |
| --- | --- | --- |
| multiple_choice | acc_norm | nll of each choice per byte; `accuracy` by the plain sum; `accuracy_letter` by the letter |
| exact_answer | exact_match | final answer in the taught form, compared as mathematics; `exact_match_flexible` beside it |
| open_question | exact_match | first line against any right answer, words normalised; `f1` beside it |
| code | pass@1 | the program runs in the sandbox; not measured unless `runs_model_code` |
| preference | accuracy_norm | nll per byte of the chosen reply is the lower; `accuracy` by the plain sum |
| dialogue, free_text | chrf | greedy reply against the reference; `rouge_l`; `hits_at_1` and word `f1` for dialogues |
| ranking | map | candidates by nll per byte; `mrr` beside it |

Ties give the credit of a fair draw, so that a model that knows nothing scores chance and not the position of the gold
choice. A likelihood with no bytes counts as one byte long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hsmn_dist.config.evaluation import EvaluationConfig
from hsmn_dist.data.example import Example
from hsmn_dist.evaluation import answers, metrics
from hsmn_dist.evaluation.code_scoring import score_code
from hsmn_dist.evaluation.kind_scores import KindScores
from hsmn_dist.models.generation import GenerationSettings
from hsmn_dist.models.text_model import LogLikelihood, TextModel

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Scorer = Callable[[TextModel, Sequence[Example], EvaluationConfig], KindScores]


def generation_settings(settings: EvaluationConfig, stop: tuple[str, ...] = ()) -> GenerationSettings:
    """Decoding of the evaluation: greedy unless a temperature is set."""
    return GenerationSettings(
        max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, stop=stop, seed=settings.seed
    )


def _grouped(model: TextModel, groups: Sequence[tuple[str, Sequence[str]]]) -> list[list[LogLikelihood]]:
    """Likelihoods of several continuations of each context, asked in one call so that the model can batch them."""
    pairs = [(context, continuation) for context, continuations in groups for continuation in continuations]
    flat = iter(model.loglikelihood(pairs))
    return [[next(flat) for _ in continuations] for _, continuations in groups]


def _per_byte(result: LogLikelihood) -> float:
    return result.nll_sum / max(1, result.num_bytes)


def score_multiple_choice(model: TextModel, examples: Sequence[Example], settings: EvaluationConfig) -> KindScores:
    """Likelihood of each choice's text; and of its letter, where the context shows lettered choices."""
    groups = []
    for example in examples:
        choices = list(example.meta["choices"])
        groups.append((example.context, [*choices, *(LETTERS[: len(choices)] if shows_letters(example) else "")]))
    normalised, plain, lettered = [], [], []
    for example, results in zip(examples, _grouped(model, groups), strict=True):
        gold, num_choices = int(example.meta["gold"]), len(example.meta["choices"])
        choices, letters = results[:num_choices], results[num_choices:]
        normalised.append(metrics.choice_credit([_per_byte(choice) for choice in choices], gold))
        plain.append(metrics.choice_credit([choice.nll_sum for choice in choices], gold))
        if letters:
            lettered.append(metrics.choice_credit([letter.nll_sum for letter in letters], gold))
    extra = {"accuracy": plain, "accuracy_letter": lettered}
    return KindScores("acc_norm", normalised, extra, {"extraction": "log-likelihood per byte"})


def shows_letters(example: Example) -> bool:
    """Whether every choice stands in the context behind its letter ("B. a whale")."""
    choices = example.meta["choices"]
    return len(choices) <= len(LETTERS) and all(
        f"\n{letter}. {choice}" in example.context for letter, choice in zip(LETTERS, choices, strict=False)
    )


def score_preference(model: TextModel, examples: Sequence[Example], settings: EvaluationConfig) -> KindScores:
    """Whether the chosen reply is the likelier of the two."""
    results = _grouped(
        model, [(example.context, (example.meta["chosen"], example.meta["rejected"])) for example in examples]
    )
    normalised = [metrics.choice_credit([_per_byte(reply) for reply in pair], 0) for pair in results]
    plain = [metrics.choice_credit([reply.nll_sum for reply in pair], 0) for pair in results]
    return KindScores("accuracy_norm", normalised, {"accuracy": plain}, {"extraction": "log-likelihood per byte"})


def score_ranking(model: TextModel, examples: Sequence[Example], settings: EvaluationConfig) -> KindScores:
    """Candidates ordered by likelihood per byte; questions without a right candidate are not asked by the data room."""
    results = _grouped(model, [(example.context, example.meta["candidates"]) for example in examples])
    precisions, reciprocals = [], []
    for example, candidates in zip(examples, results, strict=True):
        costs, labels = [_per_byte(candidate) for candidate in candidates], example.meta["labels"]
        precisions.append(metrics.average_precision(costs, labels, example.id))
        reciprocals.append(metrics.reciprocal_rank(costs, labels, example.id))
    return KindScores("map", precisions, {"mrr": reciprocals}, {"extraction": "log-likelihood per byte"})


def score_exact_answer(model: TextModel, examples: Sequence[Example], settings: EvaluationConfig) -> KindScores:
    """Final answer of a generated solution; strict in the form of the example's own target, and flexible."""
    stops = ("\nProblem:", "\nQuestion:")
    completions = model.generate([example.context for example in examples], generation_settings(settings, stops))
    strict, flexible = [], []
    for example, completion in zip(examples, completions, strict=True):
        gold = str(example.meta["answer"])
        found = answers.strict_answer(completion, answers.answer_form(example.target, gold))
        strict.append(float(answers.is_same_answer(found, gold)))
        flexible.append(float(answers.is_same_answer(answers.flexible_answer(completion, gold), gold)))
    forms = sorted({answers.answer_form(example.target, str(example.meta["answer"])) for example in examples})
    conditions = {"extraction": "strict: " + ", ".join(forms)}
    return KindScores("exact_match", strict, {"exact_match_flexible": flexible}, conditions)


def score_open_question(model: TextModel, examples: Sequence[Example], settings: EvaluationConfig) -> KindScores:
    """First line of the answer against every right answer."""
    stops = ("\n",)
    completions = model.generate([example.context for example in examples], generation_settings(settings, stops))
    matches, overlaps = [], []
    for example, completion in zip(examples, completions, strict=True):
        prediction = answers.first_line(completion)
        matches.append(metrics.exact_match(prediction, example.meta["answers"]))
        overlaps.append(metrics.word_f1(prediction, example.meta["answers"]))
    return KindScores("exact_match", matches, {"f1": overlaps}, {"extraction": "first line, words normalised"})


def score_free_text(model: TextModel, examples: Sequence[Example], settings: EvaluationConfig) -> KindScores:
    """Overlap of the generated text with the one reference: weak as a judge of quality, so read bits_per_byte beside it."""
    completions = model.generate([example.context for example in examples], generation_settings(settings))
    values = [metrics.chrf(text.strip(), example.target.strip()) for text, example in _with(completions, examples)]
    rouge = [metrics.rouge_l(text.strip(), example.target.strip()) for text, example in _with(completions, examples)]
    return KindScores("chrf", values, {"rouge_l": rouge}, {"extraction": "whole text, chrF2 (sacrebleu), ROUGE-L"})


def score_dialogue(model: TextModel, examples: Sequence[Example], settings: EvaluationConfig) -> KindScores:
    """As free text, with word F1, and hits@1 where the example has candidate replies."""
    stops = ("\nUser:", "\nAssistant:")
    completions = model.generate([example.context for example in examples], generation_settings(settings, stops))
    values = [metrics.chrf(text.strip(), example.target.strip()) for text, example in _with(completions, examples)]
    extra = {
        "rouge_l": [
            metrics.rouge_l(text.strip(), example.target.strip()) for text, example in _with(completions, examples)
        ],
        "f1": [metrics.word_f1(text, [example.target]) for text, example in _with(completions, examples)],
    }
    choosing = [example for example in examples if "candidates" in example.meta and "gold" in example.meta]
    if choosing:
        results = _grouped(model, [(example.context, example.meta["candidates"]) for example in choosing])
        extra["hits_at_1"] = [
            metrics.choice_credit([_per_byte(reply) for reply in replies], int(example.meta["gold"]))
            for example, replies in zip(choosing, results, strict=True)
        ]
    return KindScores("chrf", values, extra, {"extraction": "whole reply, chrF2 (sacrebleu), ROUGE-L"})


def _with(completions: Sequence[str], examples: Sequence[Example]) -> list[tuple[str, Example]]:
    return list(zip(completions, examples, strict=True))


SCORERS: dict[str, Scorer] = {
    "multiple_choice": score_multiple_choice,
    "preference": score_preference,
    "ranking": score_ranking,
    "exact_answer": score_exact_answer,
    "open_question": score_open_question,
    "free_text": score_free_text,
    "dialogue": score_dialogue,
    "code": score_code,
}
