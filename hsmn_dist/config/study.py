"""A study: one run configuration, varied by method and seed."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from hsmn_dist.config.load import load_run_config
from hsmn_dist.config.run import RunConfig
from hsmn_dist.config.section import Section
from hsmn_dist.config.yaml_source import read_yaml
from hsmn_dist.foundation.errors import ConfigError


class StudyConfig(Section):
    """What is compared. Every variant runs with every seed."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="Name of the study and of its folder.")
    base: str = Field(description="Run configuration, relative to this file.")
    overrides: tuple[str, ...] = Field((), description="Assignments for every run: section.key=value.")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="Seeds of weights, order and dropout.")
    variants: dict[str, tuple[str, ...]] = Field(min_length=1, description="Name of a variant -> its assignments.")
    reference: str = Field("none", description="Variant that the others are compared with.")


def load_study(path: Path) -> StudyConfig:
    """Read a study file.

    Raises:
        ConfigError: an unknown key, a wrong value, or a reference that is not a variant.
    """
    tree = read_yaml(path)
    try:
        study = StudyConfig.model_validate(tree.data)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = tuple(str(part) for part in problem["loc"])
        raise ConfigError(
            f"{tree.where(key)}: {'.'.join(key)}: {problem['msg']}",
            allowed=", ".join(StudyConfig.model_fields),
            action="mend the study file",
        ) from None
    if study.reference not in study.variants:
        raise ConfigError(
            f"{tree.where(('reference',))}: reference {study.reference!r} is not a variant",
            allowed=", ".join(study.variants),
            action="name one of the variants",
        )
    return study


def study_run_config(path: Path, study: StudyConfig, variant: str, seed: int, run_root: Path) -> RunConfig:
    """The configuration of one run of a study."""
    base = (path.parent / study.base).resolve()
    own = [f"name={study.name}-{variant.replace('+', '_')}-seed{seed}", f"seed={seed}", f"run_root={run_root}"]
    return load_run_config(base, [*study.overrides, *study.variants[variant], *own])
