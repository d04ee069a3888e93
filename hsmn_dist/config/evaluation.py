"""What is scored after each stage, and under which conditions."""

from __future__ import annotations

from pydantic import Field

from hsmn_dist.config.section import Section


class EvaluationConfig(Section):
    """Scoring of every task after every stage. Greedy unless a temperature is given."""

    num_examples: int = Field(32, ge=1, description="Test examples per task, the first ones of the test split.")
    num_shots: int = Field(
        0, ge=0, description="Solved training examples shown before each question; 0 asks without any."
    )
    num_loss_examples: int = Field(128, ge=1, description="Test examples per task for the loss column of the matrix.")
    max_new_tokens: int = Field(64, ge=1, description="Longest generated answer.")
    temperature: float = Field(0.0, ge=0, description="0 is greedy.")
    seed: int = Field(0, description="Seed of sampling.")
    batch_examples: int = Field(8, ge=1, description="Prompts generated together.")
    runs_model_code: bool = Field(
        False,
        description="Run model-written programs in the sandbox for code tasks; off: those scores are `not measured`.",
    )
    sandbox_timeout_seconds: float = Field(5.0, gt=0, description="Time limit of one program.")
    code_samples: int = Field(
        1, ge=1, description="Programs drawn per problem; pass@k is estimated for k of 1, 10, 100 up to this number."
    )
    sandbox_memory_bytes: int = Field(
        512 * 2**20, ge=64 * 2**20, description="Memory limit of one process of a program."
    )
    sandbox_workers: int = Field(2, ge=1, description="Programs that run at the same time.")
    bootstrap_samples: int = Field(
        1000, ge=0, description="Resamples of the 95 percent confidence interval; 0 leaves it out."
    )
