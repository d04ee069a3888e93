"""TrainingConfig -> the dictionary that deepspeed.initialize takes: a pure function, golden-tested.

Unusual: no optimizer and no scheduler in it (ours are passed in), and no loss scaling. Gradients accumulate in fp32 under bf16 with
ZeRO 2 and 3; ZeRO 1 with fp32 accumulation would select DeepSpeed's BF16_Optimizer, whose shards look different, so there
gradients accumulate in bf16.
"""

from __future__ import annotations

from typing import Any, Literal

from hsmn_dist.config.training import TrainingConfig
from hsmn_dist.data.stream.partition import num_micro_batches
from hsmn_dist.foundation.errors import ConfigError


def accumulation_steps(training: TrainingConfig, world_size: int) -> int:
    """Micro-batches per optimizer step and rank, unpacked; where the batch does not divide, the last ones are filled up."""
    return num_micro_batches(
        training.global_batch_examples, training.micro_batch_examples, training.data_ranks(world_size)
    )


def deepspeed_config(training: TrainingConfig, world_size: int, device_type: Literal["cpu", "cuda"]) -> dict[str, Any]:
    """DeepSpeed's dictionary for this stage.

    Raises:
        ConfigError: bf16 with ZeRO stage 0 (DeepSpeed's start-up step advances Adam's step count).
    """
    stage = training.zero_stage
    is_bf16 = training.precision == "bf16"
    if is_bf16 and stage == 0:
        raise ConfigError(
            "training.precision bf16 with training.zero_stage 0",
            allowed="bf16 with zero_stage 1, 2 or 3; fp32 with any",
            action="set training.zero_stage to 1",
        )
    steps = accumulation_steps(training, world_size)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.micro_batch_examples,
        "gradient_accumulation_steps": steps,
        # DeepSpeed's own count of rows: filled-up ones too, and rows that ranks share once for each of them.
        "train_batch_size": training.micro_batch_examples * steps * world_size,
        # At stage 0 DeepSpeed clips without telling the norm, so the engine does it.
        "gradient_clipping": training.max_gradient_norm if stage else 0.0,
        "bf16": {"enabled": is_bf16},
        "zero_optimization": _zero(training, device_type),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if is_bf16 and stage >= 2:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _zero(training: TrainingConfig, device_type: str) -> dict[str, Any]:
    is_gpu = device_type == "cuda"
    zero: dict[str, Any] = {
        "stage": training.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": is_gpu and training.zero_stage >= 2,
    }
    if training.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = training.persistent_parameter_elements
    for key, where in (
        ("offload_optimizer", training.offload.optimizer),
        ("offload_param", training.offload.parameters),
    ):
        if where != "none":
            zero[key] = {"device": where, "pin_memory": is_gpu}
            if where == "nvme":
                zero[key]["nvme_path"] = training.offload.nvme_path
    return zero
