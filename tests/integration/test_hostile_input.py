"""Fuzzers of everything small that a run reads: configurations, indexes, cursors, journals, archives, tokenizers, manifests, checkpoints.

The quick form has a few thousand cases; the slow one, with `test_hostile_shards.py`, more than a hundred thousand.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hsmn_dist.config.load import load_run_config
from hsmn_dist.continual.store import read_manifest as read_store_manifest
from hsmn_dist.data.shards.index import parse_index
from hsmn_dist.data.shards.tar_layout import END_OF_ARCHIVE, member, member_names
from hsmn_dist.data.stream.cursor import Cursor
from hsmn_dist.data.tokenizer import BpeTokenizer, load_tokenizer
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import CheckpointError
from hsmn_dist.foundation.files import read_json, verify_manifest
from hsmn_dist.orchestration.journal import read_events, run_status
from hsmn_dist.training.checkpoint import Checkpointer, TrainState
from tests.support.fuzzing import Tally, dump_json, mutate, mutate_json, outcome
from tests.support.models import tiny_batch
from tests.support.shards import write_folder
from tests.support.stages import TinyStage, training_config

RUN = Path(__file__).resolve().parents[2] / "configs" / "runs" / "hsmn_debug_demo_cpu.yaml"
MINIMAL = """name: tiny
model: {family: hsmn, vocab_size: 300, chunk_size: 8, chunk_stride: 4}
tokenizer: {kind: bytes}
data: {split: [0.6, 0.2, 0.2]}
training: {zero_stage: 2, l2: 1.0e-6, offload: {optimizer: none}}
cluster: {ranks_per_node: 1}
curriculum:
  stages:
    - {name: one, max_steps: 3, datasets: [{name: word_problems, weight: 1.5}]}
"""
JOURNAL = b"".join(
    dump_json({"time": 1.5 * number, "event": event, "attempt": "a1", "stage": number}) + b"\n"
    for number, event in enumerate(["run_started", "stage_started", "stage_completed", "run_failed", "run_resumed"])
)
Case = Callable[[random.Random], Callable[[], object]]


def config_case(folder: Path) -> Case:
    path, whole = folder / "run.yaml", yaml.safe_load(MINIMAL)
    shipped = RUN.read_text().replace("include: ../", f"include: {RUN.parent.parent}/").encode()

    def case(rng: random.Random) -> Callable[[], object]:
        kind = rng.randrange(10)
        if kind == 0:
            path.write_bytes(mutate(rng, shipped))
        elif kind < 5:
            path.write_bytes(mutate(rng, MINIMAL.encode()))
        else:
            path.write_text(yaml.safe_dump(mutate_json(rng, whole)), encoding="utf-8", errors="surrogatepass")
        return lambda: load_run_config(path)

    return case


def index_case(folder: Path) -> Case:
    index = json.loads((write_folder(folder / "shards", 3) / "index.json").read_text())
    return lambda rng: lambda value=mutate_json(rng, index): parse_index(value, "index.json")  # type: ignore[misc]


def cursor_case(_: Path) -> Case:
    cursor = Cursor(640, 40, 3, 2**47, 1).to_json()
    return lambda rng: lambda value=mutate_json(rng, cursor): Cursor.from_json(value)  # type: ignore[misc]


def journal_case(folder: Path) -> Case:
    path = folder / "journal.jsonl"

    def case(rng: random.Random) -> Callable[[], object]:
        path.write_bytes(mutate(rng, JOURNAL, most=6))
        return lambda: run_status(read_events(path))

    return case


def archive_case(folder: Path) -> Case:
    path = folder / "x.tar"
    whole = b"".join(member(f"a-{n}.{kind}", b"x" * 100 * n) for n in range(3) for kind in ("json", "tok"))

    def case(rng: random.Random) -> Callable[[], object]:
        path.write_bytes(mutate(rng, whole + END_OF_ARCHIVE))
        return lambda: _names(path)

    return case


def _names(path: Path) -> list[str]:
    try:
        return list(member_names(path))
    except ValueError:  # what `folder_problems` turns into a line of its report
        return []


def tokenizer_case(folder: Path) -> Case:
    path = folder / "tokenizer.json"
    BpeTokenizer.train(["a few words, and 12 numbers; a few more words"] * 3, 300).save(path)
    whole = path.read_bytes()

    def case(rng: random.Random) -> Callable[[], object]:
        changed = mutate(rng, whole) if rng.random() < 0.5 else dump_json(mutate_json(rng, json.loads(whole)))
        path.write_bytes(changed)
        return lambda: _round_trip(path)

    return case


def _round_trip(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    tokenizer.decode(tokenizer.encode("a few words 12 <eos>"))


def manifest_case(folder: Path) -> Case:
    (folder / "a.bin").write_bytes(b"x" * 10)
    path = folder / "manifest.json"
    whole: dict[str, Any] = {
        "parameters": {},
        "tasks": [],
        "files": {"a.bin": {"sha256": "0" * 64, "bytes": 10}},
        "format": "hsmn_dist.ewc",
        "version": 1,
    }

    def case(rng: random.Random) -> Callable[[], object]:
        changed = dump_json(mutate_json(rng, whole)) if rng.random() < 0.7 else mutate(rng, dump_json(whole))
        path.write_bytes(changed)

        def read() -> None:
            if rng.random() < 0.5:
                verify_manifest(folder, "manifest.json")
            else:
                read_store_manifest(folder)

        return read

    return case


def checkpoint_case(folder: Path) -> Case:
    """A damaged file of a checkpoint whose manifest, mostly, gives it the hash and size that it has."""
    engine = TinyStage(folder, World(), training_config(global_batch_examples=2)).parts().engine
    engine.forward_backward(tiny_batch(0, 2), 5)
    engine.step(0.01)
    state = TrainState(3, {"samples_seen": 4}, 0.25, 2, 1, [(0, 3.5), (2, 0.25)], 10, 20, 1, 1, [1.5])
    place = Checkpointer(folder / "c", World()).save(engine, state)
    Checkpointer(folder / "c", World()).restore(engine)  # what torch loads once, it loads here
    whole = {file.name: file.read_bytes() for file in place.iterdir()}

    def case(rng: random.Random) -> Callable[[], object]:
        shutil.rmtree(folder / "c")
        place.mkdir(parents=True)
        files = dict(whole)
        name = rng.choice(["manifest.json", "state.json", "rng_00000.json", "rank_00000.safetensors"])
        if rng.random() < 0.2:
            files[name] = mutate(rng, whole[name])
        elif name.endswith(".json"):
            files[name] = dump_json(mutate_json(rng, json.loads(whole[name])))
        else:
            files[name] = with_header(whole[name], lambda header: mutate_json(rng, header, most=2))
        if rng.random() < 0.2:
            stranger = rng.choice(["rng_00001.json", "rank_00001.safetensors", "state.json.x"])
            files[stranger] = mutate(rng, whole["rank_00000.safetensors"])
        if name != "manifest.json" and rng.random() < 0.9:
            manifest = json.loads(whole["manifest.json"])
            manifest["files"][name] = {"sha256": hashlib.sha256(files[name]).hexdigest(), "bytes": len(files[name])}
            files["manifest.json"] = dump_json(manifest)
        for file, data in files.items():
            (place / file).write_bytes(data)
        return lambda: Checkpointer(folder / "c", World()).restore(engine)

    return case


def with_header(data: bytes, change: Callable[[Any], Any]) -> bytes:
    """A safetensors file with our own part of its header, or all of it, changed."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    ours = change(json.loads(header["__metadata__"]["hsmn_dist"]))
    header["__metadata__"]["hsmn_dist"] = json.dumps(ours)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


CASES: dict[str, tuple[Callable[[Path], Case], int, int]] = {
    # name: (cases, how many in the quick form, how many in the slow form)
    "configurations": (config_case, 100, 3_000),
    "indexes": (index_case, 250, 20_000),
    "cursors": (cursor_case, 400, 20_000),
    "journals": (journal_case, 400, 20_000),
    "archives": (archive_case, 400, 20_000),
    "tokenizers": (tokenizer_case, 200, 4_000),
    "manifests": (manifest_case, 300, 10_000),
    "checkpoints": (checkpoint_case, 100, 3_000),
}


def fuzz(name: str, folder: Path, num_cases: int, first_seed: int) -> Tally:
    folder.mkdir(exist_ok=True)
    case, tally = CASES[name][0](folder), Tally(name)
    for seed in range(first_seed, first_seed + num_cases):
        tally.case(seed, case(random.Random(seed)))
    return tally


@pytest.mark.parametrize("name", sorted(CASES))
def test_no_damaged_input_crashes_hangs_or_runs_anything(name: str, tmp_path: Path) -> None:
    tally = fuzz(name, tmp_path, CASES[name][1], 0)
    print(tally.report())
    assert len(tally.counts) > 1 or name == "archives", "nothing was refused: the fuzzer does not reach the parser"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CASES))
def test_many_damaged_inputs_crash_hang_or_run_nothing(name: str, tmp_path: Path) -> None:
    tally = fuzz(name, tmp_path, CASES[name][2], 10**6)
    print(tally.report())
    assert tally.total == CASES[name][2]


# The same readers under hypothesis, which makes values of its own in place of damaged ones, and shrinks what fails.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(
    ["name", "model", "family", "training", "data", "split", "curriculum", "stages", "datasets", "include"]
)
YAML_VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["hsmn", "hope", "none"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=6), inner, max_size=4),
    max_leaves=10,
)
YAML_TEXT = st.text(alphabet=st.sampled_from(list("a1:{}[]&*!,-?|>#'\"\n %@<=.~\\\t\0")), max_size=40)
INDEX_KEYS = (
    "dataset",
    "config_digest",
    "tokenizer_digest",
    "token_dtype",
    "splits",
    "skipped",
    "truncated",
    "origin",
    "notes",
)


def under_hypothesis(strategy: Any, prepare: Callable[[Any], Callable[[], object]], num_cases: int) -> int:
    """Read what `prepare` makes of values of `strategy`; gives the number of cases."""
    count = 0

    @settings(
        max_examples=num_cases,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(value: Any) -> None:
        nonlocal count
        count += 1
        outcome(prepare(value))

    run()
    return count


def hypothesis_cases(folder: Path) -> dict[str, tuple[Any, Callable[[Any], Callable[[], object]]]]:
    """Values, and what writes them down and gives the reading of them."""
    path, journal = folder / "run.yaml", folder / "journal.jsonl"

    def config(value: Any) -> Callable[[], object]:
        path.write_bytes(value.encode("utf-8", "replace") if isinstance(value, str) else dump_yaml(value))
        return lambda: load_run_config(path)

    def events(value: list[Any]) -> Callable[[], object]:
        journal.write_bytes(b"\n".join(part if isinstance(part, bytes) else dump_json(part) for part in value))
        return lambda: run_status(read_events(journal))

    indexes = st.fixed_dictionaries({"format": st.just(1) | JSON, **{key: JSON for key in INDEX_KEYS}}) | JSON
    cursors = st.fixed_dictionaries({key: st.integers() | JSON for key in Cursor().to_json()}) | JSON
    lines = st.dictionaries(st.sampled_from(["event", "time", "stage"]), JSON) | JSON | st.binary(max_size=20)
    return {
        "configurations": (YAML_TEXT | st.dictionaries(KEYS, YAML_VALUE, max_size=5), config),
        "indexes": (indexes, lambda value: lambda: parse_index(value, "index.json")),
        "cursors": (cursors, lambda value: lambda: Cursor.from_json(value)),
        "journals": (st.lists(lines, max_size=5), events),
    }


def dump_yaml(value: Any) -> bytes:
    return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "replace")


@pytest.mark.parametrize("name", ["configurations", "cursors", "indexes", "journals"])
def test_values_of_any_shape_are_refused_in_words(name: str, tmp_path: Path) -> None:
    strategy, prepare = hypothesis_cases(tmp_path)[name]
    print(f"{name} under hypothesis: {under_hypothesis(strategy, prepare, 60)} cases")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["configurations", "cursors", "indexes", "journals"])
def test_many_values_of_any_shape_are_refused_in_words(name: str, tmp_path: Path) -> None:
    strategy, prepare = hypothesis_cases(tmp_path)[name]
    count = under_hypothesis(strategy, prepare, 3000)
    print(f"{name} under hypothesis: {count} cases")
    assert count >= 1000  # cursors and journals have fewer distinct values than asked for


# Things that a fuzzer would take years to find.

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
DOCUMENTS = {
    "aliases of aliases": BOMB,
    "a list inside itself": "name: &a [*a]\n",
    "a mapping inside itself": "name: &a {b: *a}\n",
    "a hundred thousand brackets": "name: " + "[" * 100_000,
    "a tag on a wrong value": "seed: !!timestamp x\n",
    "an empty number": "seed: !!int ''\n",
    "a number of ten thousand digits": "seed: " + "9" * 10_000 + "\n",
    "python/object/apply": "seed: !!python/object/apply:os.system ['touch owned']\n",
    "python/name": "seed: !!python/name:os.system\n",
    "python/object/new": "seed: !!python/object/new:os.mkdir [owned]\n",
    "python/module": "seed: !!python/module:os\n",
    "a tag in a key": "? !!python/object/apply:os.mkdir [owned]\n: 1\n",
    "an include of a device": "include: /dev/zero\n",
    "an include of a folder": "include: /\n",
    "an include with a zero byte": 'include: "a\\0b"\n',
    "a huge list of includes": f"include: [{', '.join(['absent.yaml'] * 5000)}]\n",
}


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_documents_made_to_hurt_are_refused_at_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(DOCUMENTS[name])
    assert outcome(lambda: load_run_config(path)) == "ConfigError"
    assert outcome(lambda: load_run_config(RUN, [f"seed={DOCUMENTS[name].partition(':')[2].strip()}"])) == "ConfigError"
    assert not (tmp_path / "owned").exists()


def test_json_nested_without_end_is_a_damaged_file(tmp_path: Path) -> None:
    for content in ("[" * 200_000, "9" * 10_000, '{"a":' * 100_000, "\ufeff{}"):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(CheckpointError):
            read_json(tmp_path / "x.json")
