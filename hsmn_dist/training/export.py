"""Exported weights: one portable `model.safetensors`, the model's configuration, and a manifest written last.

Unusual: loading checks every hash before a byte is read as weights, and builds the model from the stored configuration, so a folder
is all that evaluation and generation need.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hsmn_dist.config.models import ModelConfig
from hsmn_dist.distributed.collectives import barrier, rank_and_world_size
from hsmn_dist.foundation.errors import CheckpointError
from hsmn_dist.foundation.files import fsync_folder, read_json, verify_manifest, write_json, write_manifest
from hsmn_dist.models.build import construct_model
from hsmn_dist.models.contract import LanguageModel
from hsmn_dist.models.pretrained import check_weights
from hsmn_dist.training.engine import Engine

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
MANIFEST = "manifest.json"


def export_weights(
    engine: Engine, model_config: ModelConfig, folder: Path, facts: dict[str, Any] | None = None
) -> Path:
    """Write the engine's fp32 weights. Collective; rank 0 writes, and the folder appears whole or not at all.

    Args:
        engine: the engine to export.
        model_config: what the model was built from.
        folder: where to; replaced when it is there.
        facts: stored in the manifest (stage, step, provenance).
    """
    weights = engine.state_dict()
    if rank_and_world_size()[0] == 0:
        save_weights(weights, model_config, folder, facts or {})
    barrier()
    return folder


def save_weights(weights: dict[str, Tensor], model_config: ModelConfig, folder: Path, facts: dict[str, Any]) -> None:
    """As `export_weights`, for whole weights on one rank."""
    aside = folder.parent / f".{folder.name}.tmp-export"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, aside / WEIGHTS)
    write_json(aside / CONFIG, TypeAdapter(ModelConfig).dump_python(model_config, mode="json"))
    num_parameters = sum(tensor.numel() for tensor in weights.values())
    write_manifest(aside, MANIFEST, [WEIGHTS, CONFIG], {"num_parameters": num_parameters, **facts})
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    fsync_folder(folder.parent)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Whole fp32 weights by name, after every hash was checked.

    Raises:
        CheckpointError: incomplete or damaged.
    """
    verify_manifest(folder, MANIFEST)
    return load_file(folder / WEIGHTS)


def load_exported(folder: Path) -> LanguageModel:
    """The model in `folder`, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: incomplete, damaged, or weights that do not fit the stored configuration or are not finite.
    """
    weights = load_weights(folder)
    try:
        config = TypeAdapter(ModelConfig).validate_python(read_json(folder / CONFIG))
    except ValidationError as error:
        raise CheckpointError(
            f"{folder / CONFIG}: {error.error_count()} wrong keys, first {error.errors()[0]['loc']}",
            allowed="the configuration that this program version writes",
            action="use the program version that exported the weights",
        ) from error
    model = construct_model(config)
    check_weights(model, weights, str(folder / WEIGHTS))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return model.eval()
