"""A model as a folder: `model.safetensors` and `config.json`, in the manner of the Hub, on a local disk.

Unusual: loading names every tensor that is missing, left over, of another shape, or not finite, before any is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hsmn_dist import __version__
from hsmn_dist.config.models import ModelConfig
from hsmn_dist.foundation.errors import CheckpointError
from hsmn_dist.foundation.files import atomic_path, read_json, write_json
from hsmn_dist.models.build import construct_model
from hsmn_dist.models.contract import LanguageModel

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
VERSION_KEY = "hsmn_dist_version"
MAX_NAMES = 5


def save_weights(weights: Mapping[str, Tensor], config: ModelConfig, folder: Path) -> None:
    """Write whole weights by parameter name, and the architecture, into `folder` (made if absent)."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    with atomic_path(folder / WEIGHTS_NAME) as path:
        save_file(whole, path, metadata={"format": "pt", VERSION_KEY: __version__})
    write_json(folder / CONFIG_NAME, {VERSION_KEY: __version__, **config.model_dump(mode="json")})


def save_pretrained(model: LanguageModel, config: ModelConfig, folder: Path) -> None:
    """Write a model that is whole on this process."""
    save_weights(dict(model.named_parameters()), config, folder)


def load_config(folder: Path) -> ModelConfig:
    """The architecture stored in `folder`.

    Raises:
        CheckpointError: no such file, or settings that this version does not know.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise _refusal(f"{folder} has no {CONFIG_NAME}", "a folder written by save_pretrained or by a run's export")
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise _refusal(f"{path} holds a {type(stored).__name__}", "an object with the settings of ModelConfig")
    values: dict[str, Any] = dict(stored)
    version = values.pop(VERSION_KEY, "unknown")
    try:
        return TypeAdapter(ModelConfig).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise _refusal(
            f"{path}, written by version {version}: {place}: {first['msg']}", "the settings of ModelConfig"
        ) from error


def load_weights(folder: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors stored in `folder`.

    Raises:
        CheckpointError: no such file, or a damaged one.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise _refusal(f"{folder} has no {WEIGHTS_NAME}", "a folder written by save_pretrained or by a run's export")
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise _refusal(f"{path} cannot be read: {error}", "a complete safetensors file") from error


def from_pretrained(folder: str | Path, device: torch.device | str = "cpu") -> LanguageModel:
    """The model stored in `folder`, in eval mode.

    Raises:
        CheckpointError: names, shapes or numbers that cannot be this model's.
    """
    folder = Path(folder)
    config = load_config(folder)
    weights = load_weights(folder, device)
    with torch.device("meta"):
        model = construct_model(config)
    check_weights(model, weights, str(folder / WEIGHTS_NAME))
    _fill(model, weights, device)
    return model.eval()


def _fill(model: LanguageModel, weights: Mapping[str, Tensor], device: torch.device | str) -> None:
    """Give a model on the meta device its weights; a parameter of two modules (a tied head) stays one."""
    uses: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append(name)
    model.to_empty(device=device)  # a new parameter for each use
    whole = dict(weights)
    for first, *others in uses.values():
        for name in others:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, model.get_parameter(first))
            whole[name] = weights[first]
    model.load_state_dict(whole)


def check_weights(model: LanguageModel, weights: Mapping[str, Tensor], origin: str) -> None:
    """Raises CheckpointError unless `weights` are exactly the parameters of `model`, and finite."""
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    problems = {
        "missing": sorted(set(wanted) - set(weights)),
        "left over": sorted(set(weights) - set(wanted)),
        "of another shape": [
            f"{name} {list(weights[name].shape)} instead of {list(shape)}"
            for name, shape in wanted.items()
            if name in weights and tuple(weights[name].shape) != shape
        ],
        "not finite": [name for name in wanted if name in weights and not bool(torch.isfinite(weights[name]).all())],
    }
    for kind, names in problems.items():
        if names:
            shown = ", ".join(names[:MAX_NAMES]) + (
                f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            )
            raise _refusal(f"{origin}: tensors {kind}: {shown}", "exactly the model's parameters, all finite")


def _refusal(found: str, allowed: str) -> CheckpointError:
    return CheckpointError(found, allowed=allowed, action="check the folder, or export the run again")
