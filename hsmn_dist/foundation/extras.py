"""`require("deepspeed")`: import an optional package or say which extra brings it."""

from __future__ import annotations

import importlib
from types import ModuleType

from hsmn_dist.foundation.errors import MissingExtraError

EXTRA_OF_PACKAGE = {
    "lm_eval": "eval",
    "sacrebleu": "eval",
    "rouge_score": "eval",
    "pyseccomp": "eval",
    "datasketch": "data",
    "transformers": "hf",
}


def require(package: str) -> ModuleType:
    """Import `package`.

    Raises:
        MissingExtraError: it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        name = package.split(".")[0]
        what = f"'hsmn_dist[{EXTRA_OF_PACKAGE[name]}]'" if name in EXTRA_OF_PACKAGE else name
        raise MissingExtraError(
            f"the package {package!r} is needed here and is not installed ({error})",
            allowed=f"an environment that has {name}",
            action=f"pip install -c constraints.txt {what}",
        ) from error
