"""How one sample lies in a tar shard: bytes and arithmetic only.

A sample is two members behind each other, `KEY.json` (the example: text, ids, what scoring needs) and `KEY.tok` (its tokens),
each a 512-byte ustar header, the payload, and zeros up to the next multiple of 512. That is the layout of webdataset, whose
plain reader groups members by key. What is unusual: no member is ever compressed or pickled, so every position follows from
the sample's offset and the two sizes, and one positioned read gives the tokens of any sample.

The token payload is a little-endian uint32 with the number of context tokens, then context and target ids in the folder's
token type. Source of the header layout: POSIX.1-1988 ustar, as written by the standard library.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

BLOCK_BYTES = 512
_NAME_BYTES = 100
_MEMBER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.(json|tok)")
END_OF_ARCHIVE = bytes(2 * BLOCK_BYTES)
EXAMPLE_SUFFIX = "json"
TOKENS_SUFFIX = "tok"
_COUNT = struct.Struct("<I")
COUNT_BYTES = _COUNT.size


Size = TypeVar("Size", int, np.ndarray)


def padded(num_bytes: Size) -> Size:
    """The size on disk of a payload: the next multiple of 512. Takes one number or an array."""
    return (num_bytes + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES


def header(name: str, num_bytes: int) -> bytes:
    """The 512-byte ustar header of a plain file: fields of fixed width in octal, and a checksum over the header itself.

    Time, owner and mode are constants, so equal input gives equal bytes, whatever the Python version (the standard
    library's fields for device numbers were once filled and are now empty).
    """
    encoded = name.encode("ascii")
    if len(encoded) > _NAME_BYTES:
        raise ValueError(f"member name {name!r} has more than {_NAME_BYTES} bytes")
    start = (
        encoded.ljust(_NAME_BYTES, b"\0") + b"0000444\0" + b"0000000\0" * 2 + b"%011o\0" % num_bytes + b"0" * 11 + b"\0"
    )
    rest = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + bytes(16) + bytes(167)
    checksum_field = b"%06o\0 " % (sum(start) + 8 * ord(" ") + sum(rest))  # counted as if it were eight blanks
    return start + checksum_field + rest


def member(name: str, payload: bytes) -> bytes:
    """One tar member: header, payload, padding."""
    return header(name, len(payload)) + payload + bytes(padded(len(payload)) - len(payload))


def member_names(path: Path) -> Iterator[str]:
    """Names of the members of a shard, in order, each header checked to be the very one that `header` writes.

    So links, folders, other places (`../x`), compressed or extended members and sizes that lie are found, and nothing is
    ever followed or unpacked.

    Raises:
        ValueError: the first member that is not ours, or an archive that does not end as ours do.
    """
    num_bytes = path.stat().st_size
    with path.open("rb") as stream:
        place = 0
        while place + BLOCK_BYTES <= num_bytes:
            stream.seek(place)
            block = stream.read(BLOCK_BYTES)
            if not any(block):
                if stream.read().strip(b"\0") or num_bytes - place < len(END_OF_ARCHIVE):
                    raise ValueError(f"bytes behind the end of the archive, at {place}")
                return
            name, size = _plain_member(block)
            if name is None:
                shown = block[:_NAME_BYTES].rstrip(b"\0").decode("ascii", "backslashreplace")
                raise ValueError(
                    f"holds {shown!r} at {place}; members are plain .{EXAMPLE_SUFFIX} and .{TOKENS_SUFFIX} files"
                )
            yield name
            place += BLOCK_BYTES + padded(size)
    raise ValueError(f"not a whole tar file: it ends in a member, at {num_bytes}")


def _plain_member(block: bytes) -> tuple[str | None, int]:
    """Name and size of a header that this module could have written; (None, 0) for any other."""
    try:
        name, size = block[:_NAME_BYTES].rstrip(b"\0").decode("ascii"), int(block[124:135], 8)
        is_ours = _MEMBER_NAME.fullmatch(name) is not None and header(name, size) == block
    except ValueError:  # no ASCII, no octal number, or a number that does not fit its field
        is_ours = False
    return (name, size) if is_ours else (None, 0)


def example_span(offset: Size, example_bytes: Size) -> tuple[Size, Size]:
    """Start and length in the shard of the whole example member, header and padding included."""
    return offset, BLOCK_BYTES + padded(example_bytes)


def tokens_span(offset: Size, example_bytes: Size, token_bytes: Size) -> tuple[Size, Size]:
    """Start and length in the shard of the whole token member, header and padding included."""
    return offset + BLOCK_BYTES + padded(example_bytes), BLOCK_BYTES + padded(token_bytes)


def checksum(data: bytes | memoryview) -> int:
    """CRC-32 of a member as it lies on disk; the index holds it, and each read compares it."""
    return zlib.crc32(data)


def pack_tokens(context: list[int], target: list[int], dtype: str) -> bytes:
    """The payload of a token member."""
    return _COUNT.pack(len(context)) + np.asarray(context + target, dtype=dtype).tobytes()


def unpack_tokens(payload: bytes, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Context and target ids of a token payload, as read-only views."""
    (num_context,) = _COUNT.unpack_from(payload)
    ids = np.frombuffer(payload, dtype=dtype, offset=COUNT_BYTES)
    return ids[:num_context], ids[num_context:]


def token_dtype(vocab_size: int) -> str:
    """The smallest of the two stored types that holds every id below `vocab_size`."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"
