"""Writer, index and reader: what is written is read back, by us and by plain webdataset; damage never passes."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from hsmn_dist.data.shards.index import INDEX_NAME, ShardEntry, load_index
from hsmn_dist.data.shards.reader import (
    DamagedSample,
    SplitReader,
    folder_problems,
    open_folder,
    read_examples,
    verify_folder,
)
from hsmn_dist.data.shards.tar_layout import header, member, pack_tokens, padded, token_dtype, unpack_tokens
from hsmn_dist.data.shards.writer import ShardWriter
from hsmn_dist.data.tokenizer import ByteTokenizer
from hsmn_dist.foundation.errors import DataError
from tests.support.shards import example_text, write_folder

NUM_SAMPLES = 50


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "demo", NUM_SAMPLES)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def read_all(folder: Path) -> list[tuple[list[int], list[int]]]:
    reader = SplitReader(folder, "train")
    return [(a.tolist(), b.tolist()) for a, b in (reader.read_tokens(number) for number in range(len(reader)))]


def test_every_sample_is_read_back_in_any_order(folder: Path) -> None:
    reader = SplitReader(folder, "train")
    tokenizer = ByteTokenizer()
    assert len(reader) == NUM_SAMPLES and len(reader.shard_sizes) > 2
    for number in reversed(range(NUM_SAMPLES)):
        context, target = example_text("demo", number)
        context_ids, target_ids = reader.read_tokens(number)
        assert context_ids.tolist() == tokenizer.encode(context)
        assert target_ids.tolist() == [*tokenizer.encode(target), tokenizer.eos_id]
        assert reader.read_example(number).context == context
        assert reader.lengths(np.array([number])).tolist() == [[len(context_ids), len(target_ids)]]


def test_read_examples_stops_at_its_limit(folder: Path) -> None:
    assert [example.id for example in read_examples(folder, "train", 3)] == [f"demo-train-{n}" for n in range(3)]
    assert len(list(read_examples(folder, "train"))) == NUM_SAMPLES


def test_plain_webdataset_reads_the_same_ids_in_the_same_count(folder: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in shards(folder)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["json"]["id"] for sample in samples] == [f"demo-train-{n}" for n in range(NUM_SAMPLES)]
    context, target = unpack_tokens(samples[7]["tok"], "<u2")
    assert ByteTokenizer().decode(context.tolist()) == example_text("demo", 7)[0]
    assert target[-1] == ByteTokenizer.eos_id


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = write_folder(tmp_path / "a", 20), write_folder(tmp_path / "b", 20)
    for path in sorted(first.iterdir()):
        assert path.read_bytes() == (second / path.name).read_bytes()


@pytest.mark.parametrize(("name", "size"), [("a.json", 0), ("train-00000-0000001.tok", 777), ("n" * 100, 8**11 - 1)])
def test_a_header_is_the_standard_librarys_byte_for_byte(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    assert header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_a_name_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="100 bytes"):
        header("n" * 101, 0)


def test_a_member_is_what_the_standard_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "one.tar"
    path.write_bytes(member("a.json", b"{}") + member("a.tok", b"x" * 512) + bytes(1024))
    with tarfile.open(path) as archive:
        assert archive.getnames() == ["a.json", "a.tok"]
        stream = archive.extractfile("a.tok")
        assert stream is not None and stream.read() == b"x" * 512
    assert (padded(0), padded(1), padded(512), padded(513)) == (0, 512, 512, 1024)


@pytest.mark.parametrize("vocab_size", [260, 65536, 65537, 200_000])
def test_tokens_survive_packing_in_either_type(vocab_size: int) -> None:
    dtype = token_dtype(vocab_size)
    assert dtype == ("<u2" if vocab_size <= 65536 else "<u4")
    for context, target in (([], [2]), ([5, vocab_size - 1], [vocab_size - 1, 2])):
        got = unpack_tokens(pack_tokens(context, target, dtype), dtype)
        assert (got[0].tolist(), got[1].tolist()) == (context, target)


def test_shards_respect_the_size_limit_unless_one_sample_is_larger(folder: Path) -> None:
    assert all(path.stat().st_size <= 16384 for path in shards(folder))


# Damage: each case breaks one real shard and must be found by reading and by verify_folder.


def cut_inside_a_member(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 + 100)


def cut_at_a_member_boundary(path: Path) -> None:
    with tarfile.open(path) as archive:
        middle = archive.getmembers()[len(archive.getmembers()) // 2]
    os.truncate(path, middle.offset)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(bytes(data))


def flip_in_a_header(path: Path) -> None:
    with tarfile.open(path) as archive:
        tokens = next(m for m in archive.getmembers() if m.name.endswith(".tok"))
    flip(path, tokens.offset + 3)


def flip_in_a_payload(path: Path) -> None:
    with tarfile.open(path) as archive:
        tokens = next(m for m in archive.getmembers() if m.name.endswith(".tok"))
    flip(path, tokens.offset_data + 9)


def flip_in_the_padding(path: Path) -> None:
    with tarfile.open(path) as archive:
        tokens = next(m for m in archive.getmembers() if m.name.endswith(".tok"))
    flip(path, tokens.offset_data + padded(tokens.size) - 1)


def remove(path: Path) -> None:
    path.unlink()


def replace_by_another_shard(path: Path) -> None:
    shutil.copy(shards(path.parent)[0], path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE = [
    cut_inside_a_member,
    cut_at_a_member_boundary,
    flip_in_a_header,
    flip_in_a_payload,
    flip_in_the_padding,
    remove,
    replace_by_another_shard,
    empty,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_when_the_sample_is_read_and_when_the_folder_is_checked(folder: Path, damage: object) -> None:
    path = shards(folder)[1]
    damage(path)  # type: ignore[operator]
    with pytest.raises(DamagedSample) as caught:
        read_all(folder)
    assert path.name in caught.value.found
    assert any(path.name in problem for problem in folder_problems(folder))
    with pytest.raises(DataError):
        verify_folder(folder)


def test_every_single_bit_of_a_token_member_is_guarded(folder: Path) -> None:
    path = shards(folder)[0]
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        tokens = next(m for m in archive.getmembers() if m.name.endswith(".tok"))
    reader = SplitReader(folder, "train")
    reader.read_tokens(0)
    for offset in range(tokens.offset, tokens.offset_data + padded(tokens.size), 13):
        data = bytearray(whole)
        data[offset] ^= 1 << offset % 8
        with path.open("r+b") as stream:
            stream.write(data)
        with pytest.raises(DamagedSample, match="checksum"):
            reader.read_tokens(0)


def test_a_flipped_bit_in_the_example_is_found_when_the_text_is_read(folder: Path) -> None:
    path = shards(folder)[0]
    flip(path, 512 + 20)
    assert len(SplitReader(folder, "train").read_tokens(0)[0]) > 0, "tokens of the sample are whole"
    with pytest.raises(DamagedSample, match="checksum"):
        next(read_examples(folder, "train"))


def test_an_undecodable_sample_is_an_error_even_with_a_right_checksum(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "demo", 1)
    other = tmp_path / "other"
    other.mkdir()
    with ShardWriter(other, "train-00000", shard_bytes=10_000, token_dtype="<u2") as writer:
        writer.write(b"{not json", [5], [2])
    value = json.loads((folder / INDEX_NAME).read_text())
    from hsmn_dist.data.shards.index import save_samples

    sha = save_samples(folder / "train.samples.npy", writer.samples)
    shutil.copy(other / writer.shards[0].name, folder / writer.shards[0].name)
    value["splits"]["train"]["shards"][0].update(bytes=writer.shards[0].bytes, sha256=writer.shards[0].sha256)
    value["splits"]["train"]["samples_sha256"] = sha
    (folder / INDEX_NAME).write_text(json.dumps(value))
    with pytest.raises(DamagedSample, match="JSON"):
        list(read_examples(folder, "train"))


def test_a_wrong_count_in_the_index_is_refused(folder: Path) -> None:
    value = json.loads((folder / INDEX_NAME).read_text())
    value["splits"]["train"]["shards"][0]["num_samples"] -= 1
    (folder / INDEX_NAME).write_text(json.dumps(value))
    with pytest.raises(DataError, match="counts 50 samples"):
        SplitReader(folder, "train")
    assert any("holds" in problem for problem in folder_problems(folder))


def test_a_changed_samples_file_is_refused(folder: Path) -> None:
    flip(folder / "train.samples.npy", 300)
    with pytest.raises(DataError, match="SHA-256"):
        SplitReader(folder, "train")


def test_a_folder_without_its_index_was_never_completed(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()
    with pytest.raises(DataError, match="no index"):
        load_index(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 99}', "null"])
def test_a_damaged_index_is_a_data_error(folder: Path, content: str) -> None:
    (folder / INDEX_NAME).write_text(content)
    with pytest.raises(DataError):
        load_index(folder)


def test_an_unknown_split_names_the_known_ones(folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        SplitReader(folder, "dev")
    assert caught.value.allowed == "'train'"


# Security: the rules of WDS_SECURE.


@pytest.mark.parametrize(
    "name", ["pipe:touch x.tar", "../a.tar", "/etc/a.tar", "a.pkl", "a.tar; ls", ".hidden.tar", ""]
)
def test_an_index_cannot_name_anything_but_a_tar_beside_it(name: str) -> None:
    with pytest.raises(DataError):
        ShardEntry(name, 0, "", 0, 0, 0)


@pytest.mark.parametrize("url", ["pipe:touch owned", "simplecache::s3://b/x", "s3:b/x", "ftp://host/x", "python:x"])
def test_commands_and_unknown_schemes_are_never_opened(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError):
        open_folder(url, "train")
    assert not list(tmp_path.iterdir())


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("owned",))


def test_a_pickle_member_is_reported_and_never_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    path = shards(folder)[0]
    path.write_bytes(path.read_bytes()[:-1024] + member("train-00000-0000000.pkl", pickle.dumps(_Evil())) + bytes(1024))
    assert any(".pkl" in problem for problem in folder_problems(folder))
    with pytest.raises(DamagedSample):
        read_all(folder)
    assert not (folder / "owned").exists()


# A disk that is full.


def test_a_full_disk_leaves_no_half_written_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(tmp_path, "train-00000", shard_bytes=20_000, token_dtype="<u2")
    real = ShardWriter._append
    written = []

    def append(self: ShardWriter, data: bytes) -> None:
        written.append(len(data))
        if len(written) > 15:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, data)

    monkeypatch.setattr(ShardWriter, "_append", append)
    with pytest.raises(DataError, match="No space left"), writer:
        for _ in range(100):
            writer.write(b"{}", [5] * 100, [2])
    left = list(tmp_path.iterdir())
    assert left and all(path.name.endswith(".tar") and not path.name.startswith(".") for path in left)
    assert {path.name: path.stat().st_size for path in left} == {s.name: s.bytes for s in writer.shards}


def test_a_file_size_limit_of_the_system_is_met_the_same_way(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom hsmn_dist.data.shards.writer import ShardWriter\n"
        "from hsmn_dist.foundation.errors import DataError\n"
        "w = ShardWriter(Path(sys.argv[1]), 'train-00000', shard_bytes=10**7, token_dtype='<u2')\n"
        "try:\n    with w:\n        [w.write(b'{}', [5] * 1000, [2]) for _ in range(1000)]\n"
        "except DataError as error:\n    print(error.found)\n    sys.exit(2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[4],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert done.returncode == 2 and "File too large" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())
