"""Shards at a URL: fetched whole or not at all, checked on arrival, tried again, and kept within bounds."""

from __future__ import annotations

import errno
import functools
import http.server
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hsmn_dist.data.shards import remote as remote_module
from hsmn_dist.data.shards.reader import DamagedSample, SplitReader, open_folder, read_examples
from hsmn_dist.data.shards.remote import (
    FetchFailed,
    RemoteFiles,
    Retry,
    ShardCache,
    StoreAway,
    folder_name,
    is_url,
    own_cache_folder,
)
from hsmn_dist.data.stream.loader import build_loader, iter_split
from hsmn_dist.data.stream.plan import StreamSettings, StreamSource
from hsmn_dist.foundation.errors import DataError, StageFailed
from tests.support.shards import write_folder

NUM_SAMPLES = 50


@dataclass
class Store:
    """A store that fails as told: `faults` maps a file's name to what its next openings do."""

    faults: dict[str, list[str]] = field(default_factory=dict)
    opened: list[str] = field(default_factory=list)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "far", NUM_SAMPLES)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    real = remote_module._open_url

    class Cut:
        def __init__(self, inner: Any, fault: str) -> None:
            self._inner, self._fault, self._reads = inner, fault, 0

        def __enter__(self) -> Cut:
            return self

        def __exit__(self, *_: object) -> None:
            self._inner.close()

        def read(self, size: int) -> bytes:
            self._reads += 1
            if self._fault == "breaks" and self._reads == 2:
                raise ConnectionResetError("connection reset by peer")
            data: bytes = self._inner.read(1000 if self._fault == "breaks" else size)
            if self._fault == "ends early":
                return data[: len(data) // 2] if self._reads == 1 else b""
            return bytes([data[0] ^ 1]) + data[1:] if self._fault == "flips a bit" and data else data

    def open_url(url: str) -> Any:
        name = url.rsplit("/", 1)[-1]
        store.opened.append(name)
        fault = store.faults.get(name, [])
        kind = fault.pop(0) if fault else ""
        if kind == "refuses":
            raise ConnectionRefusedError("connection refused")
        return Cut(real(url), kind)

    monkeypatch.setattr(remote_module, "_open_url", open_url)
    return store


def far(folder: Path, cache: Path, cache_bytes: int = 2**30, waits: list[float] | None = None) -> RemoteFiles:
    waits = [] if waits is None else waits
    return RemoteFiles(f"file://{folder}", cache, cache_bytes, Retry(attempts=4, sleep=waits.append))


def read_all(reader: SplitReader) -> list[list[int]]:
    return [reader.read_tokens(number)[0].tolist() for number in range(len(reader))]


def test_a_remote_folder_reads_like_a_local_one(folder: Path, tmp_path: Path, store: Store) -> None:
    reader = SplitReader(f"file://{folder}", "train", far(folder, tmp_path / "cache"))
    assert read_all(reader) == read_all(SplitReader(folder, "train"))
    again = SplitReader(f"file://{folder}", "train", far(folder, tmp_path / "cache"))
    store.opened.clear()
    read_all(again)
    assert not store.opened, "the second reader finds every shard in the cache"


@pytest.mark.parametrize("fault", ["refuses", "breaks", "ends early", "flips a bit"])
def test_a_fault_on_the_way_is_tried_again_with_growing_waits(
    folder: Path, tmp_path: Path, store: Store, fault: str
) -> None:
    shard = sorted(folder.glob("*.tar"))[0].name
    store.faults[shard] = [fault] * 3
    waits: list[float] = []
    remote = far(folder, tmp_path / "cache", waits=waits)
    reader = SplitReader(f"file://{folder}", "train", remote)
    assert read_all(reader) == read_all(SplitReader(folder, "train"))
    assert remote.num_retries == 3 and waits == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("fault", ["refuses", "breaks"])
@pytest.mark.parametrize("policy", ["raise", "quarantine"])
def test_a_store_that_stays_away_is_a_failure_that_passes_and_no_damaged_sample(
    folder: Path, tmp_path: Path, store: Store, fault: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module.Retry, "wait_seconds", lambda self, attempt: 0.0)
    shards = [path.name for path in folder.glob("*.tar")]
    store.faults = {name: [fault] * 3 for name in shards}
    settings = StreamSettings(
        8, 4, 3, cache_folder=str(tmp_path / "c"), fetch_attempts=3, corrupt_policy=policy, quarantine_limit=1000
    )
    with build_loader([StreamSource(f"file://{folder}")], "train", settings) as stream:
        with pytest.raises(StageFailed, match=r"\.tar.*after 3 attempts") as caught:
            next(stream)
        assert (caught.value.kind, caught.value.exit_code) == ("store_away", 1)
    store.faults = {}
    with build_loader([StreamSource(f"file://{folder}")], "train", settings) as stream:
        assert next(stream), "it came back, and nothing was remembered as broken"


def test_a_local_disk_without_space_is_not_taken_for_the_store(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RemoteFiles, "_copy", full)
    with pytest.raises(OSError) as caught:
        far(folder, tmp_path / "cache").fetch_index()
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("status", [403, 404, 503])
def test_a_store_that_says_no_is_asked_less_often_than_one_that_says_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    class Answer(Exception):
        pass

    error = Answer()
    error.status = status  # type: ignore[attr-defined]
    monkeypatch.setattr(remote_module, "_open_url", lambda _: (_ for _ in ()).throw(error))
    waits: list[float] = []
    remote = RemoteFiles(f"file://{folder}", tmp_path / "cache", 2**30, Retry(sleep=waits.append))
    with pytest.raises(StoreAway if status == 503 else FetchFailed):
        remote.fetch_index()
    assert len(waits) == (7 if status == 503 else 4) and 55 < sum(Retry().wait_seconds(n) for n in range(7)) < 65


@pytest.mark.parametrize("fault", ["ends early", "flips a bit"])
def test_what_never_arrives_whole_is_never_trusted(folder: Path, tmp_path: Path, store: Store, fault: str) -> None:
    shard = sorted(folder.glob("*.tar"))[0].name
    store.faults[shard] = [fault] * 99
    reader = SplitReader(f"file://{folder}", "train", far(folder, tmp_path / "cache"))
    with pytest.raises(DamagedSample, match=f"{shard}.*after 4 attempts"):
        reader.read_tokens(0)
    num_opened = len(store.opened)
    with pytest.raises(DamagedSample):
        reader.read_tokens(1)
    assert len(store.opened) == num_opened, "it is not fetched again for every sample"
    assert not [
        path for path in (tmp_path / "cache").rglob("*") if "tar" in path.name and not path.name.endswith(".lock")
    ]


def test_a_samples_file_with_another_hash_is_refused(folder: Path, tmp_path: Path, store: Store) -> None:
    store.faults["train.samples.npy"] = ["flips a bit"] * 99
    with pytest.raises(FetchFailed, match="SHA-256"):
        SplitReader(f"file://{folder}", "train", far(folder, tmp_path / "cache"))


def test_the_cache_stays_within_its_bound_and_drops_what_was_used_longest_ago(
    folder: Path, tmp_path: Path, store: Store
) -> None:
    bound = 40_000
    remote = far(folder, tmp_path / "cache", cache_bytes=bound)
    reader = SplitReader(f"file://{folder}", "train", remote)
    assert len(reader.entry.shards) >= 5
    for number in range(len(reader)):
        reader.read_tokens(number)
        assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tar")) <= bound
    left = sorted(path.name.split("-", 1)[1] for path in (tmp_path / "cache").rglob("*.tar"))
    assert left == [shard.name for shard in reader.entry.shards][-len(left) :]
    assert read_all(SplitReader("file://x", "train", remote)) == read_all(SplitReader(folder, "train"))


def test_a_folder_prepared_anew_at_the_same_url_is_fetched_anew(folder: Path, tmp_path: Path, store: Store) -> None:
    read_all(SplitReader("file://x", "train", far(folder, tmp_path / "cache")))
    shutil.rmtree(folder)
    write_folder(folder, NUM_SAMPLES, name="ours")  # names of the same length: shards of the same size
    reader = SplitReader("file://x", "train", far(folder, tmp_path / "cache"))
    assert read_all(reader) == read_all(SplitReader(folder, "train"))


def test_the_ranks_of_a_machine_fetch_a_shard_once(folder: Path, tmp_path: Path, store: Store) -> None:
    readers = [SplitReader(f"file://{folder}", "train", far(folder, tmp_path / "cache")) for _ in range(6)]
    threads = [threading.Thread(target=reader.read_tokens, args=(0,)) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.opened.count(readers[0].entry.shards[0].name) == 1


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_stream_over_http_gives_the_batches_of_the_local_folder(folder: Path, server: str, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    settings = StreamSettings(8, 4, seed=3, cache_folder=str(tmp_path / "cache"), loader_workers=2)
    with (
        build_loader([StreamSource(server)], "train", settings) as one,
        build_loader([StreamSource(folder)], "train", settings) as two,
    ):
        for _ in range(8):
            for ours, theirs in zip(next(one), next(two), strict=True):
                assert ours["target_ids"].equal(theirs["target_ids"])


def test_a_url_that_does_not_exist_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module.Retry, "wait_seconds", lambda self, attempt: 0.0)
    with pytest.raises(DataError, match=r"index\.json"):
        open_folder(f"file://{tmp_path}/absent", "train", ShardCache(str(tmp_path / "cache")))


def test_the_default_cache_is_a_folder_of_this_user_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = own_cache_folder()
    assert own.parent == tmp_path and stat.S_IMODE(own.stat().st_mode) == 0o700
    assert len(open_folder(f"file://{folder}", "train")) > 0 and own_cache_folder() == own
    assert [path.name for path in own.iterdir()], "what was fetched lies there"


def test_a_default_cache_that_somebody_else_made_first_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    name = f"hsmn_dist-shards-{os.getuid()}"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="is no folder"):
        open_folder(f"file://{folder}", "train")
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    (tmp_path / name).chmod(0o777)
    with pytest.raises(DataError, match=r"written by others \(mode 0777\)"):
        open_folder(f"file://{folder}", "train")
    (tmp_path / name).chmod(0o700)
    real = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: real + 1)
    (tmp_path / name).rename(tmp_path / f"hsmn_dist-shards-{real + 1}")
    with pytest.raises(DataError, match=f"belongs to user {real}"):
        open_folder(f"file://{folder}", "train")
    assert len(open_folder(f"file://{folder}", "train", ShardCache(str(tmp_path / "cache")))) > 0


def test_a_split_is_read_through_the_configured_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    settings = StreamSettings(8, 4, seed=3, cache_folder=str(tmp_path / "cache"))
    assert list(iter_split(f"file://{folder}", "train", 4, settings=settings))
    assert list((tmp_path / "cache").rglob("*.tar"))


def test_paths_are_not_urls(folder: Path) -> None:
    assert not is_url(folder) and not is_url(str(folder)) and not is_url("relative/folder")
    assert is_url("s3://bucket/x") and is_url("pipe:cat x")
    assert len(list(read_examples(str(folder), "train", 2))) == 2


@pytest.mark.parametrize("url", ["s3://bucket/a/b", "https://host:8080/a", "gs://b", "file:///tmp/x"])
def test_a_url_survives_being_a_path(url: str) -> None:
    assert folder_name(Path(url)) == url == folder_name(url) and is_url(Path(url))
    assert folder_name(Path("/a/b")) == "/a/b" and not is_url(Path("/a/b"))
