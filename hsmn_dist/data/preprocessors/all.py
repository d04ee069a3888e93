"""The whole table of preprocessors: importing the families fills the registry, which is then frozen."""

from __future__ import annotations

from hsmn_dist.data.preprocessors import code, dialogue, instruction, knowledge, math, prose, reasoning
from hsmn_dist.data.preprocessors.base import PREPROCESSORS, Preprocessor

FAMILIES = (math, code, knowledge, reasoning, dialogue, instruction, prose)

PREPROCESSORS.freeze()


def get_preprocessor(name: str) -> Preprocessor:
    """The preprocessor of a dataset.

    Raises:
        ConfigError: no dataset has that name; the nearest name is suggested.
    """
    return PREPROCESSORS.get(name)


def preprocessor_names() -> list[str]:
    """Every dataset that has a preprocessor, sorted."""
    return PREPROCESSORS.names()
