from __future__ import annotations

import pytest

from hsmn_dist.config.training import OffloadConfig, TrainingConfig
from hsmn_dist.foundation.errors import ConfigError
from hsmn_dist.training.deepspeed_config import accumulation_steps, deepspeed_config

COMMON = {
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": None,
    "wall_clock_breakdown": False,
}


def test_the_default_on_two_ranks_of_a_cpu() -> None:
    assert deepspeed_config(TrainingConfig(), 2, "cpu") == {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "train_batch_size": 16,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 2, "contiguous_gradients": True, "overlap_comm": False},
        **COMMON,
    }


def test_a_large_run_on_gpus_with_everything_offloaded() -> None:
    training = TrainingConfig(
        zero_stage=3,
        precision="bf16",
        global_batch_examples=512,
        micro_batch_examples=8,
        max_gradient_norm=0.5,
        persistent_parameter_elements=10_000,
        offload=OffloadConfig(optimizer="cpu", parameters="nvme", nvme_path="/local/nvme"),
    )
    assert deepspeed_config(training, 16, "cuda") == {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 4,
        "train_batch_size": 512,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 3,
            "contiguous_gradients": True,
            "overlap_comm": True,
            "stage3_param_persistence_threshold": 10_000,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "nvme", "pin_memory": True, "nvme_path": "/local/nvme"},
        },
        **COMMON,
    }


def test_stage_0_leaves_clipping_to_the_engine() -> None:
    config = deepspeed_config(TrainingConfig(zero_stage=0), 1, "cuda")
    assert config["gradient_clipping"] == 0.0
    assert config["zero_optimization"] == {"stage": 0, "contiguous_gradients": True, "overlap_comm": False}


def test_bf16_with_stage_0_is_refused() -> None:
    with pytest.raises(ConfigError, match="zero_stage 0"):
        deepspeed_config(TrainingConfig(zero_stage=0, precision="bf16"), 1, "cpu")


@pytest.mark.parametrize(("world_size", "steps"), [(1, 4), (2, 2), (3, 2), (4, 1), (5, 1), (16, 1)])
def test_a_global_batch_that_does_not_divide_is_filled_up(world_size: int, steps: int) -> None:
    training = TrainingConfig(global_batch_examples=16, micro_batch_examples=4)
    assert accumulation_steps(training, world_size) == steps
    # DeepSpeed asserts that its three sizes agree.
    assert deepspeed_config(training, world_size, "cpu")["train_batch_size"] == 4 * steps * world_size
