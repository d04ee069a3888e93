"""Which split an example belongs to: decided by a hash of its group, so a group never stands on both sides."""

from __future__ import annotations

import hashlib

from hsmn_dist.data.shards.index import SPLITS


def split_of(group: str, shares: tuple[float, float, float], seed: int) -> str:
    """The split of a group: "train", "validation" or "test".

    The hash takes no other example into account: a dataset that grows keeps every example where it was.
    """
    digest = hashlib.sha256(f"{seed}\x1f{group}".encode("utf-8", "surrogatepass")).digest()
    place = int.from_bytes(digest[:8], "big") / 2.0**64
    train, validation, _ = shares
    if place < train:
        return SPLITS[0]
    return SPLITS[1] if place < train + validation else SPLITS[2]
