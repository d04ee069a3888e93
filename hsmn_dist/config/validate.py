"""Checks that need more than one section: batch arithmetic, vocabulary, precision and ZeRO, stage names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hsmn_dist.config.continual import COMPONENTS
from hsmn_dist.config.run import RunConfig
from hsmn_dist.config.training import STORE_RULE, store_uri_problem
from hsmn_dist.config.yaml_source import KeyPath
from hsmn_dist.foundation.errors import ConfigError
from hsmn_dist.foundation.redact import is_secret_name, redact_patterns
from hsmn_dist.foundation.registry import near_name

Where = Callable[[KeyPath], str]
BYTE_VOCAB_SIZE = 260


def check_run(config: RunConfig, where: Where) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ConfigError: names the key path, its file and line, what is allowed, and what to change.
    """
    for check in (
        _check_secrets,
        _check_context_parallel,
        _check_elastic,
        _check_batch,
        _check_checkpoint_uri,
        _check_precision,
        _check_offload,
        _check_optimizer,
        _check_model,
        _check_vocabulary,
        _check_data,
        _check_stages,
        _check_continual,
    ):
        check(config, where)


def _refuse(where: Where, path: str, problem: str, allowed: str, action: str) -> None:
    raise ConfigError(f"{where(tuple(path.split('.')))}: {path}: {problem}", allowed=allowed, action=action)


def _check_secrets(config: RunConfig, where: Where) -> None:
    """A configuration is copied into the run folder, to trackers and to cluster nodes: no secret may stand in it."""
    for path, text in _texts(config.model_dump(mode="json"), ()):
        if text and (is_secret_name(path[-1]) or redact_patterns(text) != text):
            _refuse(
                where,
                ".".join(path),
                "holds a secret (its name says so, or it is a URL with a password)",
                "addresses without passwords; secrets only by the environment or by a file",
                "remove it: MLflow reads MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, PostgreSQL PGPASSFILE, Ray "
                "RAY_AUTH_TOKEN_PATH",
            )


def _texts(value: Any, path: KeyPath) -> list[tuple[KeyPath, str]]:
    """Every text of plain data with its key path."""
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _texts(inner, (*path, str(key)))]
    if isinstance(value, list):
        return [pair for index, inner in enumerate(value) for pair in _texts(inner, (*path, str(index)))]
    return [(path, value)] if isinstance(value, str) else []


def _check_elastic(config: RunConfig, where: Where) -> None:
    cluster, training = config.cluster, config.training
    if not cluster.num_workers:
        return
    text = list(cluster.num_workers)
    if len(text) != 2 or not 1 <= text[0] <= text[1]:
        _refuse(
            where, "cluster.num_workers", f"{text} is no range", "[min, max] with 1 <= min <= max", "for example [1, 4]"
        )
    if cluster.launcher != "ray":
        _refuse(
            where,
            "cluster.num_workers",
            f"launcher {cluster.launcher} starts a fixed number of ranks",
            "cluster.launcher ray",
            "set cluster.launcher to ray, or cluster.num_workers to []",
        )
    if training.data_ranks(text[1]) > training.global_batch_examples:
        _refuse(
            where,
            "cluster.num_workers",
            f"a global batch of {training.global_batch_examples} examples leaves some of {text[1]} ranks without one",
            "at most as many ranks as training.global_batch_examples",
            "raise training.global_batch_examples, or narrow the range",
        )


def _check_batch(config: RunConfig, where: Where) -> None:
    training, cluster = config.training, config.cluster
    if cluster.num_workers:
        return  # where a number of ranks does not divide the batch, the last micro-batches are filled up with rows that score nothing
    world_size = cluster.num_nodes * cluster.ranks_per_node
    if training.engine == "local" and world_size != 1:
        _refuse(
            where,
            "training.engine",
            f"local runs one rank, not {world_size}",
            "one rank",
            "set cluster.ranks_per_node to 1, or use engine deepspeed",
        )
    data_ranks = training.data_ranks(world_size)
    unit = training.micro_batch_examples * data_ranks
    if training.global_batch_examples % unit:
        near = max(unit, round(training.global_batch_examples / unit) * unit)
        _refuse(
            where,
            "training.global_batch_examples",
            f"{training.global_batch_examples} is not a multiple of micro_batch_examples x ranks = {training.micro_batch_examples} x {data_ranks}",
            f"a multiple of {unit}",
            f"for example {near}, or a smaller micro_batch_examples",
        )


def _check_context_parallel(config: RunConfig, where: Where) -> None:
    size = config.training.context_parallel
    bad = [ranks for ranks in config.cluster.world_sizes if ranks % size]
    if size == 1:
        return
    if bad:
        problem = f"{size} on {bad[0]} ranks"
        allowed = "a divisor of the number of ranks (of every number in cluster.num_workers)"
    elif config.model.family not in ("hsmn", "hsmn_hope"):
        problem, allowed = (
            f"{size} with family {config.model.family!r}, which has no chunks",
            "family hsmn or hsmn_hope",
        )
    elif config.training.compiles_model:
        problem, allowed = f"{size} with training.compiles_model", "a model that is not compiled"
    else:
        return
    _refuse(where, "training.context_parallel", problem, allowed, "change it, or set it to 1 (off)")


def _check_checkpoint_uri(config: RunConfig, where: Where) -> None:
    uri = config.training.checkpoint_uri
    problem = store_uri_problem(uri) if uri else None
    if problem is not None:
        action = "name one store; give credentials by the store's own environment variables or files"
        _refuse(where, "training.checkpoint_uri", problem, STORE_RULE, action)


def _check_precision(config: RunConfig, where: Where) -> None:
    training = config.training
    if training.precision == "bf16" and training.zero_stage == 0 and training.engine == "deepspeed":
        _refuse(
            where,
            "training.precision",
            "bf16 with zero_stage 0 trains wrongly (DeepSpeed's start-up takes a step that advances Adam's step count)",
            "bf16 with zero_stage 1, 2 or 3; fp32 with any",
            "set training.zero_stage to 1",
        )


def _check_offload(config: RunConfig, where: Where) -> None:
    offload, stage = config.training.offload, config.training.zero_stage
    if offload.parameters != "none" and stage != 3:
        _refuse(
            where,
            "training.offload.parameters",
            f"{offload.parameters!r} with zero_stage {stage}",
            "parameter offload with zero_stage 3",
            "set training.zero_stage to 3",
        )
    if offload.optimizer != "none" and stage == 0:
        _refuse(
            where,
            "training.offload.optimizer",
            "optimizer offload with zero_stage 0",
            "zero_stage 1, 2 or 3",
            "set training.zero_stage to 2",
        )
    if "nvme" in (offload.optimizer, offload.parameters) and not offload.nvme_path:
        _refuse(
            where,
            "training.offload.nvme_path",
            "empty although something is offloaded to nvme",
            "a folder on a local disk",
            "name one",
        )


def _check_optimizer(config: RunConfig, where: Where) -> None:
    kind, training, model = config.optim.optimizer.kind, config.training, config.model
    if kind == "adam":
        return
    if training.engine == "deepspeed" and training.offload.optimizer != "none":
        _refuse(
            where,
            "training.offload.optimizer",
            f"{training.offload.optimizer!r} with optim.optimizer.kind {kind!r}, whose whole matrices cannot be offloaded",
            "matrix rules without optimizer offload, or kind adam",
            "set training.offload.optimizer to none",
        )
    cms = getattr(model, "cms", None) if getattr(model, "uses_cms", True) else None
    if cms is not None and cms.form == "chain" and cms.cadence == "optimizer" and any(e.period > 1 for e in cms.levels):
        _refuse(
            where,
            "optim.optimizer.kind",
            f"{kind!r} with model.cms.cadence 'optimizer': levels with update periods",
            "periods with kind adam",
            "set optim.optimizer.kind to adam, or model.cms.cadence to tokens",
        )


def _check_model(config: RunConfig, where: Where) -> None:
    model = config.model
    if model.d_model % model.num_heads:
        _refuse(
            where,
            "model.num_heads",
            f"{model.num_heads} heads do not divide d_model {model.d_model}",
            "a divisor of d_model",
            "change one of the two",
        )
    stride, size = getattr(model, "chunk_stride", 0), getattr(model, "chunk_size", 0)
    if stride > size:
        _refuse(
            where,
            "model.chunk_stride",
            f"stride {stride} is larger than chunk_size {size}: tokens between chunks would be lost",
            f"1 to {size}",
            "make it smaller",
        )


def _check_vocabulary(config: RunConfig, where: Where) -> None:
    tokenizer = config.tokenizer
    if tokenizer.kind == "file" and not tokenizer.path:
        _refuse(
            where, "tokenizer.path", "empty for kind 'file'", "a tokenizer.json", "name one, or use kind bpe or bytes"
        )
    needed = {"bpe": tokenizer.vocab_size, "bytes": BYTE_VOCAB_SIZE}.get(tokenizer.kind, 0)
    if config.model.vocab_size < needed:
        _refuse(
            where,
            "model.vocab_size",
            f"{config.model.vocab_size} is smaller than the tokenizer's {needed}: its highest ids would have no row",
            f"at least {needed}",
            f"set model.vocab_size to {needed}",
        )


def _check_data(config: RunConfig, where: Where) -> None:
    data = config.data
    if min(data.split) <= 0 or abs(sum(data.split) - 1) > 1e-9:
        _refuse(
            where,
            "data.split",
            f"{list(data.split)} sums to {sum(data.split):g}",
            "three positive shares that sum to 1",
            "for example [0.6, 0.2, 0.2]",
        )
    if data.packs_examples and config.model.family != "hope":
        _refuse(
            where,
            "data.packs_examples",
            f"packing with family {config.model.family!r}",
            "packing with family 'hope'",
            "set data.packs_examples to false",
        )
    limit = getattr(config.model, "max_target_tokens", None)
    if limit is not None and data.max_target_tokens > limit:
        _refuse(
            where,
            "data.max_target_tokens",
            f"{data.max_target_tokens} is more than model.max_target_tokens {limit}",
            f"at most {limit}",
            "change one of the two",
        )


def _check_stages(config: RunConfig, where: Where) -> None:
    names = [stage.name for stage in config.curriculum.stages]
    for index, name in enumerate(names):
        if name in names[:index]:
            _refuse(
                where,
                f"curriculum.stages.{index}.name",
                f"two stages are called {name!r}",
                "a name of its own for each stage",
                "rename one",
            )


def _check_continual(config: RunConfig, where: Where) -> None:
    continual = config.continual
    known = COMPONENTS[config.model.family]
    for name, factor in continual.component_strength.items():
        path = f"continual.component_strength.{name}"
        if name not in known:
            near = near_name(name, known)
            action = f"did you mean {near!r}?" if near else "use one of them"
            problem = f"family {config.model.family!r} has no such component"
            _refuse(where, path, problem, ", ".join(known), action)
        if not (math.isfinite(factor) and factor >= 0):
            _refuse(where, path, f"{factor}", "finite factors of 0 and above", "change it")
    start = continual.start
    if start.fisher and "ewc" not in continual.method:
        _refuse(
            where,
            "continual.start.fisher",
            f"a store to keep with method {continual.method!r}, which keeps none",
            "method ewc or ewc+replay",
            "set continual.method to ewc, or leave the store out",
        )
    if start.fisher and not start.weights:
        _refuse(
            where,
            "continual.start.fisher",
            "a store without the weights that it belongs to",
            "continual.start.weights and continual.start.fisher together",
            "name the folder of weights that the store was measured on",
        )
