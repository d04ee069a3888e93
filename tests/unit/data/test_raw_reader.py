"""Raw readers: every kind of file gives the same rows, and a row that cannot be read is named."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hsmn_dist.config.data import DatasetConfig
from hsmn_dist.data import raw_reader
from hsmn_dist.data.raw_reader import hub_configurations, hub_revision, hub_split, read_path, read_rows
from hsmn_dist.foundation.errors import ConfigError, DataError

ROWS = [{"question": f"What is {n}, doubled?\nSay it.", "answer": f'"{2 * n}"\n#### {2 * n}'} for n in range(5)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if ".jsonl" in path.name:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.tsv", "a.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROWS)
    found = list(read_rows(DatasetConfig(name="gsm8k", source=str(path))))
    assert [row.value for row in found] == ROWS
    assert all(row.origin.startswith(str(path)) for row in found) and len({row.origin for row in found}) == 5


def test_cells_of_a_csv_get_the_types_of_the_dataset(tmp_path: Path) -> None:
    rows = [{"question": "Q", "choices": '["a", "b"]', "answer": "1", "subject": "3"}]
    (row,) = read_path(write(tmp_path / "a.csv", rows), "mmlu")
    assert row.value == {"question": "Q", "choices": ["a", "b"], "answer": 1, "subject": "3"}
    rows[0]["choices"] = "['a', \"it's\"]"  # as pandas writes a list
    assert next(iter(read_path(write(tmp_path / "a.csv", rows), "mmlu"))).value["choices"] == ["a", "it's"]
    rows[0]["answer"] = "one"
    with pytest.raises(DataError, match="column 'answer'"):
        list(read_path(write(tmp_path / "a.csv", rows), "mmlu"))


def test_a_folder_of_text_gives_one_row_a_file_in_a_fixed_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "sub/a.md", "a.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    rows = list(read_path(tmp_path, "text"))
    assert [row.value["file"] for row in rows] == ["a.txt", "b.txt", "sub/a.md"]
    assert rows[0].value["text"] == "text of a.txt"


def test_a_folder_of_tables_ignores_its_readme(tmp_path: Path) -> None:
    write(tmp_path / "part-1.jsonl", ROWS[:2])
    write(tmp_path / "part-2.parquet", ROWS[2:])
    (tmp_path / "README.md").write_text("about")
    assert [row.value for row in read_path(tmp_path, "gsm8k")] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2"),
        ("a.jsonl", b'{"a": 1}\n\n[1]\n', "line 3"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff\xfe"}\n', "line"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 5000)[:-20], "line"),
        ("a.json", b'[{"a": 1}, 2]', "item 2"),
        ("a.json", b'[{"a": 1}', "not JSON"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "line 3"),
        ("a.csv", b'a,b\n1,"2\n', "line"),
        ("a.parquet", b"PAR1 nonsense", "Parquet"),
        ("a.txt", b"\xff\xfe\xfa", "a.txt"),
    ],
)
def test_a_row_that_cannot_be_read_stops_with_file_and_place(
    tmp_path: Path, name: str, content: bytes, where: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_path(path, "text"))
    assert str(path) in caught.value.found and where in caught.value.found


def test_a_missing_or_unknown_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.docx").write_bytes(b"PK")
    for name in ("absent.jsonl", "a.docx", "empty"):
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            list(read_path(tmp_path / name, "gsm8k"))


# The hub, without one: what is asked of the client, and what its failures become.


def test_a_hub_dataset_is_streamed_at_its_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load_dataset(path: str, **options: Any) -> list[dict[str, Any]]:
        asked.update(path=path, **options)
        return ROWS

    monkeypatch.setattr(raw_reader, "require", lambda name: SimpleNamespace(load_dataset=load_dataset))
    rows = list(read_rows(DatasetConfig(name="gsm8k", revision="a" * 40)))
    assert [row.value for row in rows] == ROWS and rows[1].origin == "openai/gsm8k/train row 2"
    expected = {"path": "openai/gsm8k", "name": "main", "split": "train", "revision": "a" * 40, "streaming": True}
    assert asked == expected


def test_a_revision_is_resolved_to_a_commit_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        def dataset_info(self, hub_id: str, revision: str | None) -> SimpleNamespace:
            assert (hub_id, revision) == ("openai/gsm8k", "main")
            return SimpleNamespace(sha="b" * 40)

    monkeypatch.setattr(raw_reader, "require", lambda name: SimpleNamespace(HfApi=Api))
    assert hub_revision(DatasetConfig(name="gsm8k", revision="main")) == "b" * 40
    assert hub_revision(DatasetConfig(name="gsm8k", revision="c" * 40)) == "c" * 40


def test_a_hub_that_cannot_be_reached_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the hub\nlong trace")

    monkeypatch.setattr(raw_reader, "require", lambda name: SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match="Couldn't reach the hub") as caught:
        list(read_rows(DatasetConfig(name="gsm8k", revision="a" * 40)))
    assert "source" in caught.value.action and "long trace" not in caught.value.found


def test_a_benchmarks_test_split_never_trains() -> None:
    assert hub_split(DatasetConfig(name="gsm8k")) == "train"
    assert hub_split(DatasetConfig(name="human_eval")) == "test"
    with pytest.raises(ConfigError, match="'test' of 'gsm8k'"):
        hub_split(DatasetConfig(name="gsm8k", hub_split="test"))


def test_a_dataset_that_is_nowhere_asks_for_a_source() -> None:
    with pytest.raises(DataError) as caught:
        list(read_rows(DatasetConfig(name="text")))
    assert "source: PATH" in caught.value.action


def test_parts_of_a_hub_dataset_are_all_read_and_alternatives_are_not() -> None:
    assert len(hub_configurations(DatasetConfig(name="math"))) == 7
    assert len(hub_configurations(DatasetConfig(name="bbh"))) == 27
    assert hub_configurations(DatasetConfig(name="gsm8k")) == ("main",)
    assert hub_configurations(DatasetConfig(name="math", hub_configuration="algebra")) == ("algebra",)
