"""From the training section to an engine: LocalEngine, or DeepSpeedEngine where the package is wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hsmn_dist.config.optim import OptimConfig
from hsmn_dist.config.training import TrainingConfig
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.extras import require
from hsmn_dist.foundation.param_role import ParamUpdate
from hsmn_dist.models.contract import LanguageModel
from hsmn_dist.training.activation_checkpointing import checkpoint_blocks
from hsmn_dist.training.context_parallel import divide_context
from hsmn_dist.training.engine import Engine
from hsmn_dist.training.local_engine import LocalEngine


def build_engine(
    training: TrainingConfig,
    optim: OptimConfig,
    model_factory: Callable[[], LanguageModel],
    world: World,
    updates: Mapping[str, ParamUpdate] | None = None,
) -> Engine:
    """An engine around a new model.

    Args:
        training: the stage's training section.
        optim: the optimizer section.
        model_factory: gives a model with its weights drawn; called once, after which every rank holds equal weights
            (seed all ranks alike before).
        world: this rank.
        updates: period and rate by parameter name; None takes the model's own.

    Raises:
        ConfigError: a setting that this engine or number of ranks cannot have.
        MissingExtraError: engine 'deepspeed' without the package.
    """
    model = model_factory()
    divide_context(model, training, world)
    checkpoint_blocks(model, training.activation_checkpointing)
    updates = model.parameter_updates() if updates is None else updates
    if training.engine == "local":
        return LocalEngine(training, optim, model, world, updates)
    require("deepspeed")
    from hsmn_dist.training.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(training, optim, model, world, updates)
