"""What a checkpoint says in JSON, read as if a stranger had written it: the manifest, where training stands, random states.

Every value is typed and bounded before it is used, and only files that the manifest lists, with their size and hash, are read.
Unusual: a numpy generator takes any position and would then read beyond its words, so that random states are checked too.
"""

from __future__ import annotations

import base64
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hsmn_dist.distributed.determinism import restore_rng
from hsmn_dist.foundation.errors import CheckpointError
from hsmn_dist.foundation.files import file_problem, read_json

MANIFEST = "manifest.json"
STATE = "state.json"
_PLAIN_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
_LARGEST = 2**63
_NUM_WORDS = 624
"""Words of a Mersenne twister, Python's and numpy's."""


@dataclass
class TrainState:
    """Where a stage stands, but for weights, moments and random states. JSON.

    Attributes:
        step: optimizer steps done.
        cursor: the stream's position (`Cursor.to_json`), None before the first batch.
        best_loss: lowest validation loss so far, None before the first validation.
        best_step: the step it was measured at; its weights are in `best_NNNNNNNN`.
        num_bad_validations: validations since then.
        validations: (step, loss) of each validation.
        num_tokens: target tokens trained on.
        num_examples: examples trained on.
        num_skipped_steps: steps whose gradient was not applied.
        num_rollbacks: times that training went back to a checkpoint.
        recent_losses: the losses that the spike detector looks at.
    """

    step: int = 0
    cursor: dict[str, Any] | None = None
    best_loss: float | None = None
    best_step: int = 0
    num_bad_validations: int = 0
    validations: list[tuple[int, float]] = field(default_factory=list)
    num_tokens: int = 0
    num_examples: int = 0
    num_skipped_steps: int = 0
    num_rollbacks: int = 0
    recent_losses: list[float] = field(default_factory=list)

    @classmethod
    def from_json(cls, value: Any) -> TrainState:
        """Inverse of `dataclasses.asdict`; missing keys keep their default.

        Raises:
            CheckpointError: no mapping, an unknown key, or a value of another type or size.
        """
        if not isinstance(value, dict):
            raise _strange(f"a training state that is {_short(value)}", "a mapping")
        names = {entry.name for entry in fields(cls)}
        if unknown := sorted(set(value) - names):
            raise CheckpointError(
                f"a training state with the keys {_short(unknown)}",
                allowed=", ".join(sorted(names)),
                action="resume with the program version that wrote the checkpoint",
            )
        for name, entry in value.items():
            if not _fits(name, entry):
                raise _strange(f"a training state whose {name} is {_short(entry)}", "what this program wrote there")
        state = cls(**value)
        state.validations = [(int(step), float(loss)) for step, loss in state.validations]
        return state


def _fits(name: str, value: Any) -> bool:
    if name == "cursor":
        return value is None or isinstance(value, dict)
    if name == "best_loss":
        return value is None or _is_number(value)
    if name == "recent_losses":
        return isinstance(value, list) and all(map(_is_number, value))
    if name == "validations":
        return isinstance(value, list) and all(
            isinstance(pair, list | tuple) and len(pair) == 2 and is_count(pair[0]) and _is_number(pair[1])
            for pair in value
        )
    return is_count(value)


def is_count(value: Any) -> bool:
    """Whether a decoded JSON value is a whole number from 0 that 64 bits can hold."""
    return type(value) is int and 0 <= value < _LARGEST


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < _LARGEST)


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _strange(found: str, allowed: str) -> CheckpointError:
    return CheckpointError(found, allowed=allowed, action="remove that checkpoint; an older complete one is used")


@dataclass(frozen=True)
class Listing:
    """What a manifest lists: file -> (SHA-256, bytes), and how many ranks wrote it."""

    files: dict[str, tuple[str, int]]
    world_size: int

    def is_as_listed(self, folder: Path, name: str) -> bool:
        """Whether a file is there with its size and hash."""
        return not file_problem(folder / name, *self.files[name])


def read_listing(folder: Path) -> Listing:
    """The manifest of a checkpoint; its files are not looked at.

    Raises:
        CheckpointError: not such a manifest as this program writes.
        OSError: it cannot be read.
    """
    value = read_json(folder / MANIFEST)
    files = value.get("files") if isinstance(value, dict) else None
    if not isinstance(files, dict) or not all(_is_entry(name, entry) for name, entry in files.items()):
        raise _strange(
            f"{folder / MANIFEST}: no list of plain names with a size and a SHA-256 each",
            "a manifest written whole by this program",
        )
    world_size = value.get("world_size", 0)
    if not is_count(world_size):
        raise _strange(
            f"{folder / MANIFEST}: a world_size of {_short(world_size)}", "the number of ranks that wrote it"
        )
    return Listing({name: (entry["sha256"], entry["bytes"]) for name, entry in files.items()}, world_size)


def _is_entry(name: str, entry: Any) -> bool:
    return (
        _PLAIN_NAME.match(name) is not None
        and isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and is_count(entry.get("bytes"))
    )


def read_state(folder: Path) -> TrainState:
    """Where training stood when a checkpoint was written.

    Raises:
        CheckpointError: its state.json is not what this program writes, or is of another step than the folder's name says.
    """
    state = TrainState.from_json(read_json(folder / STATE))
    if state.step != step_of(folder):
        raise _strange(f"{folder / STATE}: is of step {state.step}", "the step of the folder's name")
    return state


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.rsplit("_", 1)[1])


def rng_name(rank: int) -> str:
    """Where a rank's random states are."""
    return f"rng_{rank:05d}.json"


def restore_generators(path: Path) -> None:
    """Set every random generator to the states in a file.

    Raises:
        CheckpointError: the file holds something else.
    """
    value = read_json(path)
    if not _is_rng(value):
        raise _strange(
            f"{path}: is not the states of Python's, numpy's and torch's generators", "what capture_rng gave"
        )
    try:
        restore_rng(value)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise _strange(f"{path}: a generator refuses its state ({error})", "what capture_rng gave") from error


def _is_rng(value: Any) -> bool:
    """As strict as `capture_rng` is regular."""
    if not isinstance(value, dict) or set(value) != {"python", "numpy", "torch", "cuda"}:
        return False
    python, numpy, cuda = value["python"], value["numpy"], value["cuda"]
    return (
        isinstance(python, list)
        and len(python) == 3
        and python[0] == 3
        and isinstance(python[1], list)
        and len(python[1]) == _NUM_WORDS + 1
        and all(type(word) is int and 0 <= word < 2**32 for word in python[1])
        and python[1][-1] <= _NUM_WORDS
        and (python[2] is None or _is_number(python[2]))
        and isinstance(numpy, list)
        and len(numpy) == 5
        and numpy[0] == "MT19937"
        and _num_bytes(numpy[1]) == 4 * _NUM_WORDS
        and type(numpy[2]) is int
        and 0 <= numpy[2] <= _NUM_WORDS
        and numpy[3] in (0, 1)
        and _is_number(numpy[4])
        and math.isfinite(numpy[4])
        and _num_bytes(value["torch"]) > 0
        and isinstance(cuda, list)
        and all(_num_bytes(text) > 0 for text in cuda)
    )


def _num_bytes(text: Any) -> int:
    """Bytes behind a base64 text; -1 where it is none."""
    if not isinstance(text, str):
        return -1
    try:
        return len(base64.b64decode(text, validate=True))
    except ValueError:
        return -1
