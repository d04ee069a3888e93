"""pass@k on the real rows of HumanEval, MBPP, APPS and CodeContests: canonical solutions pass, empty ones fail."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from hsmn_dist.config.evaluation import EvaluationConfig
from hsmn_dist.data.example import Example
from hsmn_dist.data.preprocessors.all import get_preprocessor
from hsmn_dist.data.preprocessors.base import Row, SkipCounter
from hsmn_dist.evaluation.code_scoring import is_same_output, run_tests
from hsmn_dist.evaluation.runner import evaluate_task
from hsmn_dist.evaluation.sandbox import Sandbox, SandboxLimits
from hsmn_dist.foundation.errors import SandboxError
from tests.support.shared import shared_data
from tests.support.text_models import OracleTextModel, UniformTextModel

LIMITS = SandboxLimits(timeout_seconds=20.0)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox(LIMITS, num_workers=2)
    except SandboxError as error:
        pytest.skip(f"no sandbox on this machine: {error.found}")


def examples_of(name: str) -> list[Example]:
    lines = (shared_data(name) / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [Row(f"{name}:{number}", json.loads(line)) for number, line in enumerate(lines)]
    return list(get_preprocessor(name)(rows, SkipCounter()))


@pytest.mark.parametrize(("name", "least"), [("human_eval", 100), ("mbpp", 195)])
def test_canonical_solutions_all_pass_and_empty_ones_all_fail(sandbox, name, least):
    examples = examples_of(name)
    assert len(examples) >= least
    right = run_tests(sandbox, examples, [example.target for example in examples])
    assert [example.id for example, passed in zip(examples, right, strict=True) if not passed] == []
    few = examples[::8]
    assert not any(run_tests(sandbox, few, ["    pass\n" if example.meta["prompt"] else "" for example in few]))


HAS_ITS_OWN_CHECKER = ("1041_E. Tree Reconstruction", "1118_F1. Tree Cutting (Easy Version)")


@pytest.mark.parametrize("name", ["apps", "codecontests"])
def test_solutions_that_read_standard_input_pass_their_own_tests(sandbox, name):
    # A few short ones: each of their tests is a run of its own. The rows of the two named problems disagree with
    # themselves: one accepts several outputs, the other has tests of another version of the problem.
    examples = [example for example in examples_of(name) if example.group not in HAS_ITS_OWN_CHECKER]
    examples = [example for example in examples if len(example.meta["tests"]) <= 20][:3]
    if not examples:
        pytest.skip(f"no short problem among the rows of {name}")
    right = run_tests(sandbox, examples, [example.target for example in examples])
    assert all(right), [example.id for example, passed in zip(examples, right, strict=True) if not passed]
    assert not any(run_tests(sandbox, examples, ["print('wrong')"] * len(examples)))


def problem(tests: Sequence[str], prompt: str = "", test_format: str = "python") -> Example:
    meta = {
        "tests": list(tests),
        "entry_point": "f",
        "prompt": prompt,
        "language": "python",
        "test_format": test_format,
    }
    return Example("context", "target", "code", "p", "p", "code", meta)


def test_leaving_early_does_not_pass(sandbox):
    task = problem(["assert f() == 1"])
    cheats = ["def f(): return 2\nimport sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "quit()"]
    assert run_tests(sandbox, [task] * 4, cheats) == [False] * 4
    assert run_tests(sandbox, [task], ["def f(): return 1"]) == [True]
    assert run_tests(sandbox, [task], ["print('assert passed')\ndef f(): return 1"]) == [True], "own output is allowed"


def test_endless_and_broken_programs_fail_and_do_not_stop_the_others(sandbox):
    quick = Sandbox(SandboxLimits(timeout_seconds=1.0), num_workers=2)
    task = problem(["assert f() == 1"])
    programs = ["while True: pass", "def f(:", "def f(): return 1", "x = bytearray(8 << 30)"]
    assert run_tests(quick, [task] * 4, programs) == [False, False, True, False]


def test_standard_input_tests_compare_words_and_stop_at_the_first_failure(sandbox):
    tests = [json.dumps({"input": f"{n}\n", "output": f"{2 * n}\n"}) for n in range(10)]
    task = problem(tests, test_format="stdin")
    assert run_tests(sandbox, [task] * 2, ["print(2 * int(input()))", "print(2 * int(input()) % 18)"]) == [True, False]
    assert not run_tests(sandbox, [problem([], test_format="stdin")], ["print(1)"])[0], "no tests is no pass"


@pytest.mark.parametrize(
    ("ours", "wanted", "same"),
    [
        ("1 2\n", "1  2", True),
        ("1", "1 2", False),
        ("0.3333333", "0.33333333", True),
        ("0.34", "0.33", False),
        ("YES", "yes", False),
        ("10000001", "10000002", False),
        ("nan", "0.5", False),
        ("x", "0.5", False),
    ],
)
def test_outputs_are_compared_word_by_word(ours, wanted, same):
    assert is_same_output(ours, wanted) is same


def test_the_runner_scores_code_only_when_told_to(sandbox):
    examples = examples_of("human_eval")[:6]
    settings = EvaluationConfig(num_examples=6, num_loss_examples=6, runs_model_code=True, sandbox_timeout_seconds=20)
    oracle = evaluate_task(OracleTextModel(examples), "human_eval", examples, settings)
    assert (oracle.metric, oracle.score, oracle.conditions["samples_per_problem"]) == ("pass@1", 1.0, 1)
    assert evaluate_task(UniformTextModel(), "human_eval", examples, settings).score == 0.0
    off = evaluate_task(OracleTextModel(examples), "human_eval", examples, EvaluationConfig())
    assert off.score is None


class SometimesRight:
    """Right on every second seed."""

    def __init__(self, oracle: OracleTextModel) -> None:
        self.oracle = oracle
        self.loglikelihood = oracle.loglikelihood

    def generate(self, prompts, settings):
        texts = self.oracle.generate(prompts, settings)
        return texts if settings.seed % 2 == 0 else ["    pass\n"] * len(texts)


def test_pass_at_k_comes_from_several_samples_with_their_own_seeds(sandbox):
    examples = examples_of("human_eval")[:2]
    settings = EvaluationConfig(
        runs_model_code=True, code_samples=10, temperature=0.8, sandbox_timeout_seconds=20, bootstrap_samples=0
    )
    result = evaluate_task(SometimesRight(OracleTextModel(examples)), "t", examples, settings)
    assert result.score == pytest.approx(0.5)
    assert result.extra == {"pass@10": 1.0}
    greedy = EvaluationConfig(runs_model_code=True, code_samples=10, sandbox_timeout_seconds=20, bootstrap_samples=0)
    assert evaluate_task(OracleTextModel(examples), "t", examples, greedy).conditions["samples_per_problem"] == 1
