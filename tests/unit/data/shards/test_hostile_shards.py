"""A seeded mutation fuzzer of prepared folders, at three depths, and folders made by an attacker who fixes every checksum."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hsmn_dist.data.shards.index import SAMPLE_DTYPE, load_index
from hsmn_dist.data.shards.reader import folder_problems, open_folder
from hsmn_dist.data.shards.tar_layout import checksum, example_span, tokens_span
from hsmn_dist.data.tokenizer import ByteTokenizer, load_tokenizer
from hsmn_dist.foundation.errors import DataError
from hsmn_dist.foundation.files import sha256_of_file
from tests.support.fuzzing import Tally, dump_json, mutate, mutate_json
from tests.support.shards import write_folder

NUM_SAMPLES = 3


class Victim:
    """A small prepared folder whose parts are replaced for each case and put back."""

    def __init__(self, folder: Path) -> None:
        self.folder = write_folder(folder, NUM_SAMPLES)
        self.files = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        self.changed: set[str] = set()
        self.shard = next(name for name in self.files if name.endswith(".tar"))
        self.samples = next(name for name in self.files if name.endswith(".npy"))

    def put(self, **changed: bytes) -> None:
        """Make the folder whole again but for some files (by the names index, samples, shard)."""
        for kind, name in {"index": "index.json", "samples": self.samples, "shard": self.shard}.items():
            data = changed.get(kind, self.files[name])
            if kind in changed or name in self.changed:
                (self.folder / name).write_bytes(data)
                (self.changed.add if kind in changed else self.changed.discard)(name)

    def vouch(self, index: Any, fixes_checksums: bool) -> None:
        """Make every hash, size and checksum agree with what lies there, as an attacker would."""
        self.changed.add("index.json")
        if fixes_checksums:
            self.changed.add(self.samples)
            rows = np.lib.format.open_memmap(self.folder / self.samples, mode="r+")
            data = (self.folder / self.shard).read_bytes()
            for row in rows:
                for span, name in ((example_span(int(row["offset"]), int(row["example_bytes"])), "example_crc"),):
                    row[name] = checksum(data[span[0] : span[0] + span[1]])
                start, length = tokens_span(int(row["offset"]), int(row["example_bytes"]), int(row["token_bytes"]))
                row["token_crc"] = checksum(data[start : start + length])
            rows.flush()
            del rows
        split = index["splits"]["train"]
        split["samples_sha256"] = sha256_of_file(self.folder / self.samples)
        split["shards"][0]["sha256"] = sha256_of_file(self.folder / self.shard)
        split["shards"][0]["bytes"] = (self.folder / self.shard).stat().st_size
        (self.folder / "index.json").write_bytes(dump_json(index))

    def read(self) -> None:
        """Everything that training, evaluation and `data verify` read."""
        folder_problems(self.folder)
        reader = open_folder(self.folder, "train")
        try:
            reader.lengths(np.arange(len(reader)))
            for number in range(min(len(reader), 8)):
                for part in (reader.read_tokens, reader.read_example):
                    try:
                        part(number)
                    except DataError as error:
                        assert error.found and error.allowed and error.action
        finally:
            reader.close()


def one_case(victim: Victim, rng: random.Random) -> None:
    """Damage a folder: a byte anywhere, a value of the index, or content whose checksums were made to agree."""
    kind = rng.randrange(6)
    index = json.loads(victim.files["index.json"])
    if kind == 0:
        victim.put(index=mutate(rng, victim.files["index.json"]))
    elif kind == 1:
        victim.put(index=dump_json(mutate_json(rng, index)))
    elif kind == 2:
        victim.put(
            **{rng.choice(["samples", "shard"]): mutate(rng, victim.files[rng.choice([victim.samples, victim.shard])])}
        )
    elif kind == 3:
        victim.put(samples=mutate(rng, victim.files[victim.samples]))
        victim.vouch(index, fixes_checksums=False)
    elif kind == 4:
        rows = np.load(io.BytesIO(victim.files[victim.samples]))
        for _ in range(rng.randint(1, 3)):
            field = rng.choice(SAMPLE_DTYPE.names)
            limit = 2**64 if field == "offset" else 2**32
            rows[field][rng.randrange(len(rows))] = rng.choice([0, 1, 511, 512, 1024, limit - 1, rng.randrange(limit)])
        buffer = io.BytesIO()
        np.save(buffer, rows)
        victim.put(samples=buffer.getvalue())
        victim.vouch(index, fixes_checksums=False)
    else:
        victim.put(shard=mutate_payload(rng, victim))
        victim.vouch(index, fixes_checksums=True)


def mutate_payload(rng: random.Random, victim: Victim) -> bytes:
    """The shard with one member's header or payload changed in place, its size kept."""
    data = bytearray(victim.files[victim.shard])
    rows = np.load(io.BytesIO(victim.files[victim.samples]))
    row = rows[rng.randrange(len(rows))]
    start, length = int(row["offset"]), 1024
    if rng.random() < 0.5:
        start, length = start + 512, int(row["example_bytes"])
    if rng.random() < 0.4:
        value = json.loads(bytes(data[int(row["offset"]) + 512 :][: int(row["example_bytes"])]))
        text = json.dumps(mutate_json(rng, value)).encode()[:length]
        data[start : start + length] = text.ljust(length)
        return bytes(data)
    piece = mutate(rng, bytes(data[start : start + length]))[:length]
    data[start : start + length] = piece.ljust(length, b"\0")
    return bytes(data)


def fuzz(tmp_path: Path, num_cases: int, first_seed: int = 0) -> Tally:
    victim, tally = Victim(tmp_path / "victim"), Tally("shards and index")
    victim.read()
    for seed in range(first_seed, first_seed + num_cases):
        one_case(victim, random.Random(seed))
        tally.case(seed, victim.read)
    return tally


def test_no_damaged_folder_crashes_hangs_or_runs_anything(tmp_path: Path) -> None:
    tally = fuzz(tmp_path, 600)
    print(tally.report())
    assert tally.counts["DataError"] > 200 and tally.counts["read"] > 120


@pytest.mark.slow
def test_no_damaged_folder_of_twenty_thousand_crashes_hangs_or_runs_anything(tmp_path: Path) -> None:
    tally = fuzz(tmp_path, 20_000, first_seed=10**6)
    print(tally.report())
    assert tally.total == 20_000


# Archives that an attacker made, with an index that vouches for them.


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("owned",))


def special(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", data: bytes = b"") -> bytes:
    """A tar with one member of any name and kind, as the standard library writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname, entry.size = kind, target, len(data)
        archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


HOSTILE = {
    "../": special("../../train.json", data=b"{}"),
    "absolute": special("/etc/cron.d/x.json", data=b"{}"),
    "symlink": special("train-00000-0000000.json", tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": special("train-00000-0000000.tok", tarfile.LNKTYPE, "/etc/passwd"),
    "device": special("train-00000-0000000.tok", tarfile.CHRTYPE),
    "pipe": special("train-00000-0000000.tok", tarfile.FIFOTYPE),
    "folder": special("train.json", tarfile.DIRTYPE),
    "pickle": special("train-00000-0000000.pkl", data=pickle.dumps(_Evil())),
    "pickle as json": special("train-00000-0000000.json", data=pickle.dumps(_Evil())),
    "long name": special("x" * 300 + ".json", data=b"{}"),
    "subfolder": special("a/b.json", data=b"{}"),
    "nul in the name": special("a\0b.json", data=b"{}"),
}


@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_members_that_are_no_plain_samples_are_refused_and_nothing_is_followed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    victim = Victim(tmp_path / "victim")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    victim.put(shard=HOSTILE[kind])
    victim.vouch(json.loads(victim.files["index.json"]), fixes_checksums=True)
    problems = folder_problems(victim.folder)
    assert any("holds" in problem for problem in problems), problems
    reader = open_folder(victim.folder, "train")
    for number in range(NUM_SAMPLES):
        for part in (reader.read_tokens, reader.read_example):
            with contextlib.suppress(DataError):  # bytes that the index vouches for are numbers like any others
                part(number)
    reader.close()
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "name", ["pipe:touch owned", "../other.tar", "/etc/x.tar", "x.tar\n", "x.pkl", "", "a b.tar", ".x.tar", "x.tar;y"]
)
def test_an_index_that_names_anything_but_a_plain_shard_beside_it_is_refused(name: str, tmp_path: Path) -> None:
    victim = Victim(tmp_path / "victim")
    index = json.loads(victim.files["index.json"])
    index["splits"]["train"]["shards"][0]["name"] = name
    victim.put(index=dump_json(index))
    with pytest.raises(DataError) as caught:
        load_index(victim.folder)
    assert caught.value.allowed and caught.value.action


def test_a_samples_file_that_is_a_pickle_is_refused_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    victim = Victim(tmp_path / "victim")
    array = io.BytesIO()
    np.save(array, np.array([_Evil()], dtype=object), allow_pickle=True)
    for content in (pickle.dumps(_Evil()), array.getvalue()):
        victim.put(samples=content)
        victim.vouch(json.loads(victim.files["index.json"]), fixes_checksums=False)
        with pytest.raises(DataError, match="no array of samples"):
            open_folder(victim.folder, "train")
    assert not (tmp_path / "owned").exists()


# Tokenizers.


def test_tokenizer_files_of_a_stranger_run_nothing_and_are_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tokenizer.json"
    contents: list[bytes] = [
        pickle.dumps(_Evil()),
        b"[" * 100_000,
        b'{"kind": "bytes", "auto_map": {"AutoTokenizer": "evil.Tokenizer"}}',
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": {"type": "Python"}}',
        b"\xff\xfe",
        b"",
        # The library walks over all ids up to the largest: half a minute, found by the fuzzer.
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 4294967290}, "merges": []}}',
    ]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            load_tokenizer(path)
        assert caught.value.found and caught.value.allowed and caught.value.action
    assert not (tmp_path / "owned").exists()


def test_the_byte_tokenizer_reads_its_own_form_alone(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path / "t.json")
    assert load_tokenizer(tmp_path / "t.json").vocab_size == 260
