"""How one stage trains: batches, precision, ZeRO, checkpoints, early stopping."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from hsmn_dist.config.section import Section

STORE_SCHEMES = ("s3", "gs", "gcs", "abfs", "az", "file", "memory")
STORE_RULE = (
    ", ".join(f"{scheme}://..." for scheme in STORE_SCHEMES) + " without a password; no commands, no chained URLs"
)
_STORE_URI = re.compile(r"([a-z][a-z0-9+.-]*)://([^?#]*)")


def store_uri_problem(uri: str) -> str | None:
    """What is wrong with the URI of an object store, in words without the URI itself (it may hold a password); None: nothing."""
    match = _STORE_URI.fullmatch(uri)
    if match is None or match.group(1) not in STORE_SCHEMES or "::" in uri:
        return "no plain URI of a known store"
    parts = match.group(2).split("/")
    if "@" in parts[0] and ":" in parts[0]:
        return "a name and password in the URI"
    return "'..' in the path" if ".." in parts else None


class OffloadConfig(Section):
    """ZeRO-Offload and ZeRO-Infinity (GPU runs)."""

    optimizer: Literal["none", "cpu", "nvme"] = Field("none", description="Where optimizer state lives.")
    parameters: Literal["none", "cpu", "nvme"] = Field("none", description="Where parameters live; needs zero_stage 3.")
    nvme_path: str = Field("", description="Folder on a local NVMe disk; needed when either is `nvme`.")


class TrainingConfig(Section):
    """One stage's training loop."""

    engine: Literal["deepspeed", "local"] = Field("deepspeed", description="deepspeed, or its exact one-process twin.")
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="ZeRO stage (Rajbhandari et al. 2020, arXiv 1910.02054).")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16 keeps fp32 master weights; not with zero_stage 0."
    )
    global_batch_examples: int = Field(16, ge=1, description="Examples per optimizer step over all ranks.")
    micro_batch_examples: int = Field(
        4, ge=1, description="Examples per forward pass and rank; accumulation follows from the two."
    )
    context_parallel: int = Field(
        1,
        ge=1,
        description="Ranks that share the chunks of each context (family hsmn); the others divide the examples. 1: off.",
    )
    max_gradient_norm: float = Field(
        1.0, ge=0, description="Global gradient norm above which gradients are scaled down; 0 switches clipping off."
    )
    max_steps: int = Field(200, ge=1, description="Optimizer steps of a stage, unless the stage says otherwise.")
    validate_every_steps: int = Field(50, ge=1, description="Optimizer steps between two validation losses.")
    num_validation_examples: int = Field(
        64, ge=1, description="Validation examples per validation, the same ones each time."
    )
    patience: int = Field(10, ge=1, description="Validations without a better loss before the stage stops early.")
    checkpoint_every_steps: int = Field(50, ge=1, description="Optimizer steps between two checkpoints.")
    saves_in_background: bool = Field(
        True,
        description="Training waits for the copy of its state only, and a thread writes it; needs host memory for the copy.",
    )
    keep_last_checkpoints: int = Field(2, ge=1, description="Older checkpoints are removed, the best one excepted.")
    checkpoint_uri: str = Field(
        "",
        description="Folder in an object store (s3://, gs://, abfs://, file://) that checkpoints are also sent to, behind the "
        "training, and fetched from when the local ones are gone; each stage of each run has its own folder there.",
    )
    checkpoint_upload_wait_seconds: float = Field(
        60.0, ge=0, description="How long the end of a stage waits for an upload that is on its way."
    )
    log_every_steps: int = Field(10, ge=1, description="Optimizer steps between two points on the tracker.")
    activation_checkpointing: Literal["none", "every_block", "every_second_block"] = Field(
        "none", description="Recompute blocks in the backward pass to save memory."
    )
    compiles_model: bool = Field(False, description="torch.compile the model.")
    offload: OffloadConfig = Field(OffloadConfig(), description="Offload to CPU or NVMe.")
    persistent_parameter_elements: int = Field(
        100_000,
        ge=0,
        description="ZeRO 3 keeps parameters smaller than this whole on every rank (DeepSpeed's default).",
    )
    on_non_finite: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="At a loss or gradient that is infinite or NaN: stop the stage, skip the batch, or go back to the last "
        "checkpoint and leave out the batches since then.",
    )
    on_loss_spike: Literal["ignore", "stop", "skip", "rollback"] = Field(
        "ignore",
        description="At a loss far above the recent ones: train on, stop, skip the batch, or go back as above.",
    )
    spike_sigma: float = Field(
        6.0, gt=0, description="Standard deviations above the mean of the recent losses that count as a spike."
    )
    spike_window_steps: int = Field(128, ge=8, description="Recent losses that a spike is measured against.")
    max_skipped_steps: int = Field(
        16, ge=0, description="Skips and rollbacks allowed in a stage; one more stops it (0: none is allowed)."
    )
    records_examples: bool = Field(
        False,
        description="Write the example indexes of every global batch to the stage's examples.jsonl (a line a step).",
    )
    l2: float = Field(
        0.0, ge=0, description="Coefficient of sum(w^2) added to the loss as the original does (1e-6 there)."
    )

    def data_ranks(self, world_size: int) -> int:
        """Parts into which `world_size` ranks divide the examples: ranks of one context group share theirs."""
        return max(1, world_size // self.context_parallel)
