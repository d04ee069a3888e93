"""Preparation: rows to shards; the same bytes however it was run, stopped and started again."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hsmn_dist.config.data import DataConfig, DatasetConfig, TokenizerConfig
from hsmn_dist.data.catalogue import check_folder
from hsmn_dist.data.prepare import PreparedData, prepare_curriculum, prepare_dataset
from hsmn_dist.data.prepare_shards import encode_example
from hsmn_dist.data.shards.index import SPLITS, load_index
from hsmn_dist.data.shards.reader import SplitReader, open_folder, read_examples, verify_folder
from hsmn_dist.data.shards.remote import folder_name
from hsmn_dist.data.split import split_of
from hsmn_dist.data.tokenizer import ByteTokenizer, load_tokenizer
from hsmn_dist.foundation.errors import ConfigError, DataError
from tests.support.shared import shared_file

ROOT = Path(__file__).resolve().parents[3]
BYTES = TokenizerConfig(kind="bytes")
DATA = DataConfig(part_examples=40, shard_bytes=20_000, max_context_tokens=200, max_target_tokens=60)
DATASETS = [DatasetConfig(name="word_problems", num_examples=150), DatasetConfig(name="passkey", num_examples=60)]


def files_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that a reader may use, by relative path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "fingerprints.json" and not path.name.endswith(".lock")
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return prepare_curriculum(DATASETS, DATA, TokenizerConfig(vocab_size=400), tmp_path_factory.mktemp("data"))


def test_each_dataset_is_whole_and_split_by_group(prepared: PreparedData) -> None:
    assert set(prepared.folders) == {"word_problems", "passkey"}
    for name, folder in prepared.folders.items():
        index = verify_folder(folder)
        assert index.dataset == name and index.tokenizer_digest == load_tokenizer(prepared.tokenizer_path).digest
        groups: dict[str, set[str]] = {}
        total = 0
        for split in SPLITS:
            found = list(read_examples(folder, split))
            groups[split] = {example.group for example in found}
            total += len(found)
            assert {split_of(group, DATA.split, DATA.split_seed) for group in groups[split]} == {split}
        assert not groups["train"] & groups["validation"] and not groups["train"] & groups["test"]
        assert total + sum(index.skipped["counts"].values()) >= {"word_problems": 150, "passkey": 60}[name]
        assert not list(folder.glob(".*")), "nothing is left of the work"


def test_tokens_are_those_of_the_text_and_targets_end_with_eos(prepared: PreparedData) -> None:
    tokenizer = load_tokenizer(prepared.tokenizer_path)
    reader = SplitReader(prepared.folders["word_problems"], "train")
    for number in range(len(reader)):
        context, target = reader.read_tokens(number)
        example = reader.read_example(number)
        assert tokenizer.decode(context.tolist()) == example.context
        assert tokenizer.decode(target.tolist()) == example.target
        assert target[-1] == tokenizer.eos_id and (target[:-1] >= 4).all()


def test_what_is_too_long_is_cut_and_counted() -> None:
    encoded = encode_example(ByteTokenizer(), "abcdef", "uvwxyz", (4, 3))
    assert ByteTokenizer().decode(encoded.context) == "cdef" and encoded.is_context_cut
    assert ByteTokenizer().decode(encoded.target) == "uvw" and encoded.is_target_cut
    assert encoded.target[-1] != ByteTokenizer.eos_id, "its text does not end there"
    whole = encode_example(ByteTokenizer(), "abcd", "uv", (4, 3))
    assert (whole.is_context_cut, whole.is_target_cut, whole.target[-1]) == (False, False, ByteTokenizer.eos_id)


def test_a_second_call_finds_the_work_done(prepared: PreparedData) -> None:
    root = prepared.tokenizer_path.parent.parent
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.tar")}
    told: list[str] = []

    class Listening:
        def update(self, phase: str, done: int, total: int = 0) -> None:
            told.append(phase)

    again = prepare_curriculum(DATASETS, DATA, TokenizerConfig(vocab_size=400), root, progress=Listening())
    assert again == prepared and not told
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.tar")} == before


def test_weights_and_order_of_stages_share_one_preparation(prepared: PreparedData) -> None:
    root = prepared.tokenizer_path.parent.parent
    twice = [DATASETS[0].model_copy(update={"weight": 3.0}), *DATASETS]
    assert prepare_curriculum(twice, DATA, TokenizerConfig(vocab_size=400), root) == prepared
    with pytest.raises(ConfigError, match="twice"):
        prepare_curriculum([DATASETS[0], DATASETS[0].model_copy(update={"num_examples": 9})], DATA, BYTES, root)


def test_other_settings_go_to_another_folder(tmp_path: Path) -> None:
    first = prepare_curriculum(DATASETS[1:], DATA, BYTES, tmp_path)
    for change in ({"split_seed": 1}, {"max_target_tokens": 50}, {"deduplicate": "none"}):
        other = prepare_curriculum(DATASETS[1:], DATA.model_copy(update=change), BYTES, tmp_path)
        assert other.folders["passkey"] != first.folders["passkey"]
    same = prepare_curriculum(DATASETS[1:], DATA.model_copy(update={"loader_workers": 4}), BYTES, tmp_path)
    assert same == first


def test_a_damaged_shard_is_made_again_to_the_same_bytes(tmp_path: Path) -> None:
    folder = prepare_curriculum(DATASETS[1:], DATA, BYTES, tmp_path).folders["passkey"]
    before = files_of(folder)
    shard = next(iter(sorted(folder.glob("*.tar"))))
    shard.write_bytes(shard.read_bytes()[:-700])
    (folder / "test.samples.npy").unlink()
    prepare_curriculum(DATASETS[1:], DATA, BYTES, tmp_path)
    assert files_of(folder) == before


class BackwardsExecutor:
    """Runs tasks in the opposite order, as a cluster might."""

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        return map(function, reversed(list(items)))


def test_processes_and_executors_do_not_change_a_byte(prepared: PreparedData, tmp_path: Path) -> None:
    tokenizer = TokenizerConfig(vocab_size=400)
    expected = files_of(prepared.tokenizer_path.parent)
    two = DATA.model_copy(update={"prepare_workers": 2})
    assert multiprocessing.get_start_method(allow_none=True) in (None, "fork", "spawn", "forkserver")
    assert files_of(prepare_curriculum(DATASETS, two, tokenizer, tmp_path / "a").tokenizer_path.parent) == expected
    other = prepare_curriculum(DATASETS, DATA, tokenizer, tmp_path / "b", executor=BackwardsExecutor())
    assert files_of(other.tokenizer_path.parent) == expected


CHILD = """
import os, signal, sys
from pathlib import Path
from hsmn_dist.config.data import DataConfig, DatasetConfig, TokenizerConfig
from hsmn_dist.data import prepare, prepare_examples, prepare_shards
from hsmn_dist.data.shards import writer
place, count, root = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
calls = 0
def killing(real):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
owner, name = {
    "example": (prepare_examples._PartWriter, "write"),
    "sample": (writer.ShardWriter, "write"),
    "part": (prepare_shards, "write_json"),
    "index": (prepare, "save_index"),
}[place]
setattr(owner, name, killing(getattr(owner, name)))
data = DataConfig(part_examples=40, shard_bytes=20_000, max_context_tokens=200, max_target_tokens=60)
datasets = [DatasetConfig(name="word_problems", num_examples=150), DatasetConfig(name="passkey", num_examples=60)]
prepare.prepare_curriculum(datasets, data, TokenizerConfig(vocab_size=400), root)
"""


@pytest.mark.parametrize(("place", "count"), [("example", 95), ("sample", 70), ("part", 3), ("index", 2)])
def test_killed_and_started_again_it_ends_with_the_same_bytes(
    prepared: PreparedData, tmp_path: Path, place: str, count: int
) -> None:
    command = [sys.executable, "-c", CHILD, place, str(count), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, timeout=120, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    again = prepare_curriculum(DATASETS, DATA, TokenizerConfig(vocab_size=400), tmp_path)
    assert files_of(again.tokenizer_path.parent) == files_of(prepared.tokenizer_path.parent)


def test_progress_counts_every_sample(tmp_path: Path) -> None:
    last: dict[str, tuple[int, int]] = {}

    class Listening:
        def update(self, phase: str, done: int, total: int = 0) -> None:
            assert done >= last.get(phase, (0, 0))[0]
            last[phase] = (done, total)

    prepare_curriculum(DATASETS, DATA, BYTES, tmp_path, progress=Listening())
    done, total = last["samples written"]
    assert done == total == last["passkey: examples"][0] + last["word_problems: examples"][0]


def test_shards_prepared_before_are_used_with_their_tokenizer_from_a_folder_or_a_url(
    prepared: PreparedData, tmp_path: Path
) -> None:
    folder = prepared.folders["passkey"]
    theirs = TokenizerConfig(kind="file", path=str(prepared.tokenizer_path))
    data = DATA.model_copy(update={"cache_folder": str(tmp_path / "cache")})
    for shards in (str(folder), f"file://{folder}"):
        datasets = [DatasetConfig(name="passkey", shards=shards), DATASETS[0]]
        again = prepare_curriculum(datasets, data, theirs, tmp_path / "root")
        assert folder_name(again.folders["passkey"]) == shards and again.folders["word_problems"].is_dir()
        assert load_tokenizer(again.tokenizer_path).digest == load_tokenizer(prepared.tokenizer_path).digest
        found = open_folder(again.folders["passkey"], "train", data)
        assert [e.tolist() for e, _ in found.read_many_tokens(range(5))] == [
            e.tolist() for e, _ in SplitReader(folder, "train").read_many_tokens(range(5))
        ]
    with pytest.raises(ConfigError, match="bpe"):
        prepare_curriculum(datasets, data, TokenizerConfig(), tmp_path / "root")
    with pytest.raises(DataError, match="another tokenizer"):
        prepare_curriculum(datasets, data, BYTES, tmp_path / "root")


# One dataset from a file


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def gsm8k_rows(num: int) -> list[dict[str, Any]]:
    return [{"question": f"How much is {n} plus 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(num)]


def test_one_file_becomes_one_folder_with_its_tokenizer(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", gsm8k_rows(40))
    dataset = DatasetConfig(name="gsm8k", source=str(source))
    out = prepare_dataset(dataset, DATA, BYTES, tmp_path / "out")
    report = check_folder(out)
    assert report.is_whole and report.num_samples is not None and sum(report.num_samples.values()) == 40
    assert load_tokenizer(out / "tokenizer.json").vocab_size == 260
    assert prepare_dataset(dataset, DATA, BYTES, out) == out
    with pytest.raises(DataError, match="other settings"):
        prepare_dataset(dataset, DATA.model_copy(update={"split_seed": 9}), BYTES, out)


def test_an_unfinished_preparation_with_other_settings_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    write_rows(first, gsm8k_rows(90))
    write_rows(second, gsm8k_rows(40))
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("hsmn_dist.data.prepare.save_index", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare_dataset(DatasetConfig(name="gsm8k", source=str(first)), DATA, TokenizerConfig(vocab_size=300), out)
    prepare_dataset(DatasetConfig(name="gsm8k", source=str(second)), DATA, BYTES, out)
    clean = prepare_dataset(DatasetConfig(name="gsm8k", source=str(second)), DATA, BYTES, tmp_path / "clean")
    assert files_of(out) == {**files_of(clean), ".fingerprints.json": files_of(out)[".fingerprints.json"]}


def test_a_folder_with_files_of_the_user_is_left_alone(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", gsm8k_rows(40))
    with pytest.raises(DataError, match="no preparation made"):
        prepare_dataset(DatasetConfig(name="gsm8k", source=str(source)), DATA, BYTES, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_folder_name_follows_the_content_not_the_place(tmp_path: Path) -> None:
    names = set()
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        source = write_rows(tmp_path / place / "rows.jsonl", gsm8k_rows(40))
        prepared = prepare_curriculum([DatasetConfig(name="gsm8k", source=str(source))], DATA, BYTES, tmp_path / "root")
        names.add(prepared.folders["gsm8k"])
    assert len(names) == 1
    source = write_rows(tmp_path / "b" / "rows.jsonl", gsm8k_rows(41))
    prepared = prepare_curriculum([DatasetConfig(name="gsm8k", source=str(source))], DATA, BYTES, tmp_path / "root")
    assert prepared.folders["gsm8k"] not in names


def test_unusable_rows_are_counted_by_reason_in_the_index(tmp_path: Path) -> None:
    rows = [*gsm8k_rows(30), *gsm8k_rows(2), {"question": "Q", "answer": "no number"}, {"question": "", "answer": "x"}]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    out = prepare_dataset(DatasetConfig(name="gsm8k", source=str(source)), DATA, BYTES, tmp_path / "out")
    counts = load_index(out).skipped["counts"]
    assert sum(counts.values()) == 4 and counts["an exact duplicate"] == 2
    assert any(
        "line 33" in origin for origins in load_index(out).skipped["first_origins"].values() for origin in origins
    )


def test_a_missing_column_names_file_row_and_columns_and_leaves_no_index(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [*gsm8k_rows(3), {"prompt": "x", "reply": "y"}])
    with pytest.raises(DataError) as caught:
        prepare_dataset(DatasetConfig(name="gsm8k", source=str(source)), DATA, BYTES, tmp_path / "out")
    assert f"{source} line 4" in caught.value.found and "'prompt', 'reply'" in caught.value.found
    assert not list((tmp_path / "out").glob("*.tar")) and not (tmp_path / "out" / "index.json").exists()


def test_an_error_in_another_process_keeps_its_three_parts(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [*gsm8k_rows(3), {"prompt": "x"}])
    datasets = [DatasetConfig(name="gsm8k", source=str(rows)), DATASETS[1]]
    with pytest.raises(DataError, match="line 4"):
        prepare_curriculum(datasets, DATA.model_copy(update={"prepare_workers": 2}), BYTES, tmp_path / "root")


def test_a_dataset_whose_every_row_fails_is_an_error(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"question": "Q", "answer": "no number"}] * 5)
    with pytest.raises(DataError, match="no usable example"):
        prepare_dataset(DatasetConfig(name="gsm8k", source=str(source)), DATA, BYTES, tmp_path / "out")


def test_a_benchmark_without_training_split_goes_to_the_test_split_whole(tmp_path: Path) -> None:
    row = {
        "task_id": "T/0",
        "prompt": "def f():\n",
        "canonical_solution": "    return 1\n",
        "test": "def check(f): pass",
    }
    rows = [{**row, "task_id": f"T/{n}", "prompt": f"def f{n}():\n", "entry_point": f"f{n}"} for n in range(10)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    out = prepare_dataset(DatasetConfig(name="human_eval", source=str(source)), DATA, BYTES, tmp_path / "out")
    assert {name: split.num_samples for name, split in load_index(out).splits.items()} == {
        "train": 0,
        "validation": 0,
        "test": 10,
    }


def test_contamination_of_a_test_item_stands_in_the_index(tmp_path: Path) -> None:
    rows = gsm8k_rows(200)
    question = (
        "A farmer with nine red barns sells four old barns to his neighbour and then builds two more, how many barns?"
    )
    rows += [{"question": f"{question} ({n})", "answer": f"7 now\n#### {n}"} for n in range(20)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    out = prepare_dataset(DatasetConfig(name="gsm8k", source=str(source)), DATA, BYTES, tmp_path / "out")
    report = load_index(out).notes["contamination"]
    num_alike = sum("farmer" in example.context for example in read_examples(out, "test"))
    assert report["benchmark"] == "gsm8k" and report["num_contaminated"] == num_alike > 0


def test_real_rows_are_read_back_by_plain_webdataset_with_the_same_ids(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    source = shared_file("data", "gsm8k", "rows.jsonl")
    out = prepare_dataset(DatasetConfig(name="gsm8k", source=str(source)), DATA, BYTES, tmp_path / "out")
    num_rows = sum(1 for line in source.open() if line.strip())
    ids = set()
    for split in SPLITS:
        urls = [str(path) for path in sorted(out.glob(f"{split}-*.tar"))]
        theirs = [sample["json"]["id"] for sample in webdataset.WebDataset(urls, shardshuffle=False).decode()]
        assert theirs == [example.id for example in read_examples(out, split)]
        ids |= set(theirs)
    assert len(ids) == num_rows - sum(load_index(out).skipped["counts"].values())


def test_a_folder_of_text_is_prepared_and_read_back_by_plain_webdataset(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    (tmp_path / "texts").mkdir()
    for n in range(20):
        (tmp_path / "texts" / f"{n}.txt").write_text(" ".join(f"w{n}_{i}" for i in range(300)))
    out = prepare_dataset(DatasetConfig(name="text", source=str(tmp_path / "texts")), DATA, BYTES, tmp_path / "out")
    urls = [str(path) for path in sorted(out.glob("*.tar"))]
    theirs = sorted(sample["json"]["id"] for sample in webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert theirs == sorted(e.id for split in SPLITS for e in read_examples(out, split)) and len(theirs) == 60


def test_one_document_alone_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_text("a b c d e f")
    with pytest.raises(DataError, match="training split"):
        for seed in range(20):  # whichever split the one group falls into, some seed puts it elsewhere
            data = DATA.model_copy(update={"split_seed": seed})
            source = DatasetConfig(name="text", source=str(tmp_path / "only.txt"))
            prepare_dataset(source, data, BYTES, tmp_path / f"out{seed}")


def test_split_shares_are_met() -> None:
    counts = dict.fromkeys(SPLITS, 0)
    for number in range(20_000):
        counts[split_of(f"group {number}", (0.6, 0.2, 0.2), 42)] += 1
    assert counts["train"] == pytest.approx(12_000, abs=300) and counts["test"] == pytest.approx(4_000, abs=250)


@pytest.mark.parametrize("count", [3, 60, 250])
def test_a_disk_that_fills_up_leaves_nothing_that_the_next_run_would_trust(
    prepared: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    import os

    calls = 0
    real = os.fsync

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= count // 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    tokenizer = TokenizerConfig(vocab_size=400)
    with monkeypatch.context() as patch:
        patch.setattr("hsmn_dist.foundation.files.os.fsync", full)
        with pytest.raises(DataError, match="No space left"):
            prepare_curriculum(DATASETS, DATA, tokenizer, tmp_path)
    again = prepare_curriculum(DATASETS, DATA, tokenizer, tmp_path)
    assert files_of(again.tokenizer_path.parent) == files_of(prepared.tokenizer_path.parent)


def test_one_dataset_with_two_settings_needs_a_label(tmp_path: Path) -> None:
    short = DatasetConfig(name="passkey", num_examples=30, passkey_tokens=16)
    long = short.model_copy(update={"passkey_tokens": 64})
    with pytest.raises(ConfigError) as caught:
        prepare_curriculum([short, long], DATA, BYTES, tmp_path)
    assert "label" in caught.value.action
    labelled = long.model_copy(update={"label": "passkey_long"})
    prepared = prepare_curriculum([short, labelled], DATA, BYTES, tmp_path)
    assert set(prepared.folders) == {"passkey", "passkey_long"}
    words = {
        name: [len(example.context.split()) for example in read_examples(folder, "train")]
        for name, folder in prepared.folders.items()
    }
    assert max(words["passkey"]) < min(words["passkey_long"])
