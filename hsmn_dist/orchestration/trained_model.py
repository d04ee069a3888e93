"""A trained model by name: a run (its newest complete stage, or a given one) or a folder of weights.

Unusual: a folder outside a run may also be one that `save_pretrained` wrote, without a manifest; a run's weights may not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from hsmn_dist.config.run import RunConfig
from hsmn_dist.data.tokenizer import TOKENIZER_NAME, Tokenizer, load_tokenizer
from hsmn_dist.foundation.errors import CheckpointError, ConfigError
from hsmn_dist.foundation.files import read_json
from hsmn_dist.models.contract import LanguageModel
from hsmn_dist.models.pretrained import from_pretrained
from hsmn_dist.models.text_model import LocalTextModel
from hsmn_dist.orchestration.curriculum import load_stored_config
from hsmn_dist.orchestration.run_folder import RunFolder, find_run
from hsmn_dist.orchestration.stage import training_stages
from hsmn_dist.training.export import MANIFEST, load_exported

DEFAULT_CONTEXT_TOKENS = 512


@dataclass(frozen=True)
class TrainedModel:
    """A model with its tokenizer; `config` and `folder` are None for weights that lie outside a run."""

    model: LanguageModel
    tokenizer: Tokenizer
    weights: Path
    config: RunConfig | None
    folder: RunFolder | None

    @property
    def max_context_tokens(self) -> int:
        """Longest context of the training, or a guess for weights that lie outside a run."""
        return self.config.data.max_context_tokens if self.config else DEFAULT_CONTEXT_TOKENS

    def text_model(self, batch_examples: int = 8, max_context_tokens: int | None = None) -> LocalTextModel:
        """The model behind the text interface, in eval mode; contexts up to those of the training unless given."""
        limit = max_context_tokens or self.max_context_tokens
        return LocalTextModel(
            self.model.eval(), self.tokenizer, batch_examples=batch_examples, max_context_tokens=limit
        )


def load_trained(reference: str, run_root: Path, stage: int | None = None) -> TrainedModel:
    """Load weights by run or by folder.

    Args:
        reference: a run (id, beginning or end, path, `latest`) or a folder with `model.safetensors`, its configuration and a
            tokenizer.
        run_root: where runs are looked for.
        stage: number of the stage, from 0; the newest complete one when None.

    Raises:
        ConfigError: no such run or stage.
        CheckpointError: the run has no complete stage, or its weights are damaged.
    """
    weights, config, folder = _find(reference, run_root, stage)
    torch.manual_seed(0)
    return TrainedModel(_load(weights, folder), load_tokenizer(weights / TOKENIZER_NAME), weights, config, folder)


def load_model(reference: str, run_root: Path, stage: int | None = None) -> tuple[LanguageModel, int | None]:
    """As `load_trained`, without a tokenizer: the model, and the optimizer steps of its weights where they are known."""
    weights, _, folder = _find(reference, run_root, stage)
    model = _load(weights, folder)
    facts = read_json(weights / MANIFEST) if (weights / MANIFEST).is_file() else {}
    steps = facts.get("step")
    return model, steps if isinstance(steps, int) else None


def _find(reference: str, run_root: Path, stage: int | None) -> tuple[Path, RunConfig | None, RunFolder | None]:
    """The folder of weights, and the run that it belongs to."""
    path = Path(reference)
    if (path / "model.safetensors").is_file():
        return path, None, None
    folder = find_run(reference, run_root)
    config = load_stored_config(folder)
    return _stage_weights(config, folder, stage), config, folder


def _load(weights: Path, folder: RunFolder | None) -> LanguageModel:
    if folder is None and not (weights / MANIFEST).is_file():
        return from_pretrained(weights)
    return load_exported(weights)


def _stage_weights(config: RunConfig, folder: RunFolder, stage: int | None) -> Path:
    stages = [folder.stage(index, item.name) for index, item in enumerate(training_stages(config))]
    if stage is not None and not 0 <= stage < len(stages):
        raise ConfigError(f"--stage {stage}", allowed=f"0 to {len(stages) - 1}", action="count stages from 0")
    wanted = stages if stage is None else [stages[stage]]
    complete = [item for item in wanted if item.is_complete]
    if not complete:
        what = "no complete stage" if stage is None else f"no weights of stage {stage}: it is not complete"
        raise CheckpointError(
            f"run {folder.run_id} has {what}",
            allowed="a stage with its COMPLETE manifest",
            action=f"hsmn-dist run --resume {folder.run_id}",
        )
    return complete[-1].weights
