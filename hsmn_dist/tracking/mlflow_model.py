"""Exported weights as an MLflow model: saved with signature and input example, logged, registered.

Unusual: nothing is pickled. The model is stored as its weights folder and the name of a loader module
(`mlflow.pyfunc`'s `loader_module`), with the package's own source beside it, so `mlflow models serve` needs the listed
packages alone. This file knows no model; the loader module does.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hsmn_dist.foundation.extras import require
from hsmn_dist.tracking.mlflow_tracker import MlflowPlace, MlflowWriter

MODEL_FOLDER = "model"
REQUIREMENTS = ("torch", "safetensors", "tokenizers", "pydantic", "pyyaml", "numpy", "pandas")


def save_model_folder(
    weights: Path, folder: Path, loader_module: str, parameters: Mapping[str, Any], prompt: str, answer: str
) -> Path:
    """Write a folder that `mlflow.pyfunc.load_model` opens.

    Args:
        weights: exported weights with their tokenizer.
        folder: where to; must not exist.
        loader_module: dotted name of a module with `_load_pyfunc(path)`, whose result has `predict(frame, params)`.
        parameters: generation parameters with their defaults; the signature gives them types.
        prompt: input example, in a column `prompt`.
        answer: its output, in a column `text`, for the signature.
    """
    pyfunc, models, pandas = require("mlflow.pyfunc"), require("mlflow.models"), require("pandas")
    example = pandas.DataFrame({"prompt": [prompt]})
    signature = models.infer_signature(example, pandas.DataFrame({"text": [answer]}), params=dict(parameters))
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    package = Path(__file__).resolve().parents[1]
    pyfunc.save_model(
        path=str(folder),
        loader_module=loader_module,
        data_path=str(weights),
        code_paths=[str(package)],
        signature=signature,
        input_example=example,
        pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in REQUIREMENTS],
    )
    return folder


def register_model(place: MlflowPlace, folder: Path, name: str, stage: str = "") -> int:
    """Upload a saved model to the run's artifacts and register it; returns the new version.

    Raises:
        Whatever MLflow raises, and ConnectionError when no server answers; the caller decides what that means.
    """
    writer = MlflowWriter(place)
    writer.connect()
    client, run_id = writer.client, writer.run_of(stage)
    client.log_artifacts(run_id, str(folder), MODEL_FOLDER)
    exceptions = require("mlflow.exceptions")
    try:
        client.create_registered_model(name, description="Text generation: prompts in, continuations out")
    except exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"{client.get_run(run_id).info.artifact_uri}/{MODEL_FOLDER}"
    version = client.create_model_version(name, source=source, run_id=run_id, tags=dict(place.tags))
    return int(version.version)
