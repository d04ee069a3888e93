"""A scorecard with every case in it: a stage that was not measured, fractions, references, a title that wants escaping."""

from __future__ import annotations

from hsmn_dist.evaluation.scorecard import Scorecard, StageLine, build_scorecard
from hsmn_dist.evaluation.task_result import TaskResult

TASKS = ("word_problems", "stdlib_code", "passkey")
SCORES = [[0.5, 0.0, 0.25], [0.25, 0.75, 0.25], [0.25, 0.5, 1.0]]
LOSSES = [[1.0, 4.0, 3.0], [1.5, 2.0, 3.0], [2.0, 2.5, 0.5]]
BASELINE = ([0.0, 0.0, 0.25], [5.5, 5.5, 5.5])


def result(task: str, score: float | None, loss: float | None, num_examples: int = 4) -> TaskResult:
    """A result whose example scores are ones and zeros that give `score`."""
    right = round((score or 0.0) * num_examples)
    values = [] if score is None else [1.0] * right + [0.0] * (num_examples - right)
    return TaskResult(
        task=task,
        kind="exact_answer",
        metric="exact_match",
        status="not measured" if score is None else "measured",
        score=score,
        nll_per_token=loss,
        bits_per_byte=None if loss is None else loss / 2,
        num_examples=len(values),
        num_loss_examples=8,
        conditions={"split": "test", "shots": 0, "seed": 0, "temperature": 0.0},
        reason="model-written code is not run" if score is None else "",
        interval=None if score is None else (max(0.0, score - 0.2), min(1.0, score + 0.2)),
        interval_method="" if score is None else "wilson",
        extra={} if score is None else {"exact_match_flexible": score},
        example_ids=[f"{task}-{index}" for index in range(len(values))],
        example_scores=values,
    )


def rows(scores=SCORES, losses=LOSSES) -> list[dict[str, TaskResult]]:
    return [
        {task: result(task, score, loss) for task, score, loss in zip(TASKS, score_row, loss_row, strict=True)}
        for score_row, loss_row in zip(scores, losses, strict=True)
    ]


def sample_scorecard(**changes) -> Scorecard:
    """Three stages, three tasks; `changes` go to `build_scorecard`."""
    arguments = {
        "run": {
            "run_id": "20260101-demo <b>&",
            "family": "hsmn",
            "num_parameters": 1_234_567,
            "world_size": 2,
            "device": "cpu",
            "packages": {"torch": "2.13.0"},
            "datasets": {"word_problems": ["gsm8k"]},
        },
        "stages": [
            StageLine(
                name, steps=100, target_tokens=50_000, seconds=60.0, first_validation_loss=5.0, best_validation_loss=1.0
            )
            for name in TASKS
        ],
        "results": rows(),
        "baseline": rows([BASELINE[0]], [BASELINE[1]])[0],
        "references": [
            {
                "benchmark": "gsm8k",
                "model": "A model",
                "score": 0.571,
                "metric": "exact match",
                "split": "test",
                "shots": 5,
                "source": "https://example.org",
                "date": "2024-01-01",
                "verification": "unverified",
            },
            {"benchmark": "mmlu", "model": "A model", "score": 0.7},
        ],
        "contamination": {"word_problems": {"status": "measured", "exact": 0, "near": 2}},
        "reproduce": ["hsmn-dist run configs/runs/demo.yaml"],
    }
    return build_scorecard(**{**arguments, **changes})
