"""Cursor: the whole resume state of a stream, six integers.

The order is a pure function of the seed and the data, so a position is a number of samples. It says nothing of ranks, threads
or batch size: a run may go on with other numbers of them. `order_id` lets the loader refuse data that is not the data the
position was counted in.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hsmn_dist.foundation.errors import DataError

LARGEST = 1 << 62
"""Of any field: far above any run, and within 64-bit arithmetic."""


@dataclass(frozen=True)
class Cursor:
    """Where a stream stands after the batches that were handed out.

    Attributes:
        samples_seen: samples of all ranks together.
        batches_seen: global batches (optimizer steps) handed out.
        seed: seed of the order.
        order_id: 48 bits of a hash over sources, weights, split and order settings.
        num_quarantined: damaged samples that this rank passed over.
        version: of this record.
    """

    samples_seen: int = 0
    batches_seen: int = 0
    seed: int = 0
    order_id: int = 0
    num_quarantined: int = 0
    version: int = 1

    def to_json(self) -> dict[str, int]:
        """Six integers by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Cursor:
        """The cursor that `to_json` wrote.

        Raises:
            DataError: the value is not such a record, or of another version.
        """
        names = set(cls.__dataclass_fields__)
        is_cursor = isinstance(value, dict) and set(value) == names
        if not is_cursor or not all(type(number) is int and 0 <= number < LARGEST for number in value.values()):
            raise DataError(
                f"stream cursor {value!r}",
                allowed=f"whole numbers below 2^62: {', '.join(sorted(names))}",
                action="use another checkpoint",
            )
        cursor = cls(**value)
        if cursor.version != 1:
            raise DataError(
                f"stream cursor of version {cursor.version}",
                allowed="version 1",
                action="resume with the program version that wrote the checkpoint",
            )
        return cursor
