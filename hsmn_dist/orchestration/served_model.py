"""The final model of a run for `mlflow models serve` and `mlflow.pyfunc.load_model(...).predict`.

`_load_pyfunc` is what MLflow calls with the stored weights folder (its `loader_module` interface); MLflow itself is not
imported here. Input: a column (or list) of prompts; output: a column `text`. Parameters are those of generation.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hsmn_dist.config.run import RunConfig
from hsmn_dist.data.tokenizer import TOKENIZER_NAME, load_tokenizer
from hsmn_dist.foundation.extras import require
from hsmn_dist.foundation.files import read_json, write_json
from hsmn_dist.foundation.log import logger
from hsmn_dist.models.generation import GenerationSettings
from hsmn_dist.models.text_model import LocalTextModel
from hsmn_dist.orchestration.run_folder import RunFolder
from hsmn_dist.orchestration.stage import training_stages
from hsmn_dist.tracking.build import artifact_root, default_uri
from hsmn_dist.training.export import load_exported

PARAMETERS: dict[str, int | float] = {"max_new_tokens": 64, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
EXAMPLE_PROMPT = "Question: What is the pass key?\nAnswer: "
SETTINGS_NAME = "serving.json"

_log = logger(__name__)


class ServedTextModel:
    """What MLflow holds: `predict` generates one text for each prompt."""

    def __init__(self, model: LocalTextModel) -> None:
        self._model = model

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Texts for a DataFrame with a column `prompt`, a list of prompts, or one prompt; a DataFrame with `text`."""
        if hasattr(model_input, "columns"):
            prompts = [str(prompt) for prompt in model_input["prompt"]]
        else:
            prompts = [model_input] if isinstance(model_input, str) else [str(prompt) for prompt in model_input]
        chosen = {**PARAMETERS, **(params or {})}
        settings = GenerationSettings(
            max_new_tokens=int(chosen["max_new_tokens"]),
            temperature=float(chosen["temperature"]),
            top_k=int(chosen["top_k"]),
            top_p=float(chosen["top_p"]),
            seed=int(chosen["seed"]),
        )
        return require("pandas").DataFrame({"text": self._model.generate(prompts, settings)})


def _load_pyfunc(path: str) -> ServedTextModel:
    """MLflow's entry: the weights folder, with its tokenizer, to a model that predicts."""
    folder = Path(path)
    limits = read_json(folder / SETTINGS_NAME) if (folder / SETTINGS_NAME).is_file() else {}
    tokenizer = load_tokenizer(folder / TOKENIZER_NAME)
    return ServedTextModel(LocalTextModel(load_exported(folder), tokenizer, **limits))


def log_final_model(config: RunConfig, folder: RunFolder, tags: Mapping[str, str] | None = None) -> int | None:
    """Save the last complete stage's weights as an MLflow model and register it under `tracking.registered_model`.

    Returns the registered version; None where nothing was asked for, nothing is complete, or MLflow could not take it
    (which is warned about: a finished run must not fail at its last step).
    """
    name = config.tracking.registered_model
    stages = [folder.stage(index, stage.name) for index, stage in enumerate(training_stages(config))]
    complete = [stage for stage in stages if stage.is_complete]
    if config.tracking.backend != "mlflow" or not name or not complete:
        return None
    from hsmn_dist.tracking.mlflow_model import register_model, save_model_folder
    from hsmn_dist.tracking.mlflow_tracker import MlflowPlace

    uri = config.tracking.uri or default_uri(folder.root)
    place = MlflowPlace(
        uri,
        config.tracking.experiment,
        artifact_root(folder.root, uri),
        folder.run_id,
        {**config.tracking.tags, **(tags or {})},
    )
    with tempfile.TemporaryDirectory(dir=folder.path, prefix=".served-") as scratch:
        weights = Path(scratch) / "weights"
        shutil.copytree(complete[-1].weights, weights)
        write_json(weights / SETTINGS_NAME, {"max_context_tokens": config.data.max_context_tokens})
        # The edge of the process towards a server: its trouble is told, and the run is done all the same.
        try:
            answer = str(_load_pyfunc(str(weights)).predict([EXAMPLE_PROMPT], {"max_new_tokens": 8})["text"][0])
            saved = save_model_folder(weights, Path(scratch) / "saved", __name__, PARAMETERS, EXAMPLE_PROMPT, answer)
            return register_model(place, saved, name)
        except Exception as error:
            _log.warning("the final model was not registered with MLflow at %s: %s", uri, error)
            return None
