"""Checkpoints in a store: sent behind the training, fetched when local ones are gone; stores that fail, hang, or lie."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import CheckpointError, ConfigError, StageFailed
from hsmn_dist.foundation.files import sha256_of_file
from hsmn_dist.training.checkpoint import Checkpointer, TrainState
from hsmn_dist.training.engine import Engine
from hsmn_dist.training.loop import train
from hsmn_dist.training.remote_checkpoints import MANIFEST, STAGING, Patience, RemoteCheckpoints
from tests.support.distributed import run_distributed
from tests.support.models import tiny_batch
from tests.support.stages import TinyStage, training_config


def make_engine(folder: Path) -> Engine:
    return TinyStage(folder, World(), training_config(global_batch_examples=2)).parts().engine


def train_a_step(engine: Engine, seed: int) -> None:
    engine.forward_backward(tiny_batch(seed, 2), 5)
    engine.step(0.01)


@pytest.fixture(params=["file", "memory"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield f"file://{tmp_path}/store/run/stage" if request.param == "file" else f"memory://{tmp_path.name}/run/stage"
    fsspec.filesystem("memory").store.clear()


def keeper_of(folder: Path, uri: str, keep_last: int = 2, **settings: Any) -> Checkpointer:
    patience = Patience(sleep=lambda _: None)
    remote = RemoteCheckpoints(uri, folder / STAGING, keep_last, patience=patience, **settings)
    return Checkpointer(folder, World(), keep_last, remote=remote)


def saved(folder: Path, uri: str, steps: int, keep_last: int = 2) -> tuple[Engine, TrainState]:
    engine, keeper, state = make_engine(folder), keeper_of(folder, uri, keep_last), TrainState()
    for step in range(1, steps + 1):
        train_a_step(engine, step)
        state.step = step
        if step in (1, 4):
            state.best_step, state.best_loss = step, 1.0 / step
            keeper.save_best(engine, state)
        keeper.save(engine, state)
        keeper.finish_uploads(30)
    return engine, state


def names_in(uri: str) -> list[str]:
    store, root = fsspec.core.url_to_fs(uri)
    return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in store.ls(root, detail=False))


def test_what_was_sent_comes_back_bit_for_bit_when_the_local_folder_is_gone(tmp_path: Path, uri: str) -> None:
    engine, state = saved(tmp_path / "here", uri, 3)
    rng = torch.get_rng_state()
    shutil.rmtree(tmp_path / "here")
    other, keeper = make_engine(tmp_path / "there"), keeper_of(tmp_path / "there", uri)
    assert keeper.restore(other) == state
    assert torch.equal(torch.get_rng_state(), rng)
    for name, value in engine.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert keeper.restore_best(other, state)
    assert not list((tmp_path / "there").glob(".*fetch*"))
    train_a_step(engine, 9)
    fresh = make_engine(tmp_path / "third")
    keeper_of(tmp_path / "third", uri).restore(fresh)
    train_a_step(fresh, 9)
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in engine.state_dict().items())


def test_old_checkpoints_go_from_the_store_and_the_best_weights_stay(tmp_path: Path, uri: str) -> None:
    saved(tmp_path / "c", uri, 6)
    assert names_in(uri) == ["best_00000004", "step_00000005", "step_00000006"]
    assert not list((tmp_path / "c" / STAGING).iterdir()), "nothing is left behind locally"


def test_local_checkpoints_are_preferred_and_the_store_is_not_asked(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "c", uri, 1)
    monkeypatch.setattr(RemoteCheckpoints, "names", lambda _: pytest.fail("the store was asked"))
    assert keeper_of(tmp_path / "c", uri).newest() == tmp_path / "c" / "step_00000001"


def test_the_manifest_is_sent_last_and_what_has_none_does_not_exist(tmp_path: Path, uri: str) -> None:
    saved(tmp_path / "c", uri, 2)
    store, root = fsspec.core.url_to_fs(uri)
    store.rm_file(f"{root}/step_00000002/{MANIFEST}")
    assert RemoteCheckpoints(uri, tmp_path / "s").names() == ["step_00000001"]
    order: list[str] = []

    class Recording:
        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def put_file(self, source: str, target: str) -> None:
            order.append(target)
            store.put_file(source, target)

        def pipe_file(self, target: str, data: bytes) -> None:
            order.append(target)
            store.pipe_file(target, data)

    remote = RemoteCheckpoints(uri, tmp_path / "s")
    remote._open = lambda: (Recording(), root)  # type: ignore[method-assign]
    remote.send(tmp_path / "c" / "step_00000002")
    assert remote.wait(30)
    assert order[-1].endswith(MANIFEST) and len(order) == 4 and remote.report.sent == 1


def test_a_damaged_checkpoint_in_the_store_is_passed_over_and_a_wholly_damaged_store_refused(
    tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path / "c", uri, 2)
    store, root = fsspec.core.url_to_fs(uri)
    for number, wanted in ((2, 1), (1, None)):
        path = f"{root}/step_{number:08d}/rank_00000.safetensors"
        data = bytearray(store.cat_file(path))
        data[len(data) // 2] ^= 1
        store.pipe_file(path, bytes(data))
        keeper = keeper_of(tmp_path / f"d{number}", uri)
        if wanted is None:
            with pytest.raises(CheckpointError, match="SHA-256"):
                keeper.newest()
        else:
            assert keeper.newest().name == f"step_{wanted:08d}"
    assert "passed over" in caplog.text


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "a/b", ".hidden", "", "..", "x\0y", "C:\\evil"])
def test_a_manifest_that_names_a_place_outside_is_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    store, root = fsspec.core.url_to_fs(f"file://{tmp_path}/store")
    store.makedirs(f"{root}/step_00000007")
    (tmp_path / "evil").write_bytes(b"bad")
    entry = {"sha256": sha256_of_file(tmp_path / "evil"), "bytes": 3}
    store.pipe_file(f"{root}/step_00000007/{MANIFEST}", json.dumps({"files": {name: entry}}).encode())
    with pytest.raises(CheckpointError, match="plain names") as caught:
        keeper_of(tmp_path / "a" / "b" / "c", f"file://{tmp_path}/store").newest()
    assert caught.value.allowed and caught.value.action
    assert list((tmp_path / "a").rglob("*evil*")) == []


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"files": 3}', b'{"files": {"a": 1}}', b"\xff\xfe", b"{}"])
def test_a_manifest_of_another_shape_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "store" / "step_00000007").mkdir(parents=True)
    (tmp_path / "store" / "step_00000007" / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError):
        keeper_of(tmp_path / "c", f"file://{tmp_path}/store").newest()


def failing(problem: Callable[[], Any]) -> Callable[[], Any]:
    def opens() -> Any:
        return problem()

    return opens


def test_a_store_that_fails_is_reported_and_training_ends_with_the_same_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = TinyStage(tmp_path / "plain", World(), training_config())
    train(plain.parts())
    wanted = plain.engine.state_dict()

    def refuse() -> Any:
        raise ConnectionResetError("connection reset by peer")

    stage = TinyStage(tmp_path / "c", World(), training_config())
    keeper = keeper_of(tmp_path / "c", f"file://{tmp_path}/store")
    keeper._has_asked_remote = True  # the stage began while the store still answered
    keeper._remote._open = failing(refuse)  # type: ignore[union-attr, method-assign]
    parts = stage.parts()
    parts.checkpointer = keeper
    train(parts)
    report = keeper.finish_uploads(30)
    assert report is not None and report.sent == 0 and report.failed >= 1
    assert "connection reset by peer" in caplog.text and "training goes on" in caplog.text
    assert all(torch.equal(value, wanted[name]) for name, value in stage.engine.state_dict().items())


def test_a_store_that_hangs_delays_no_save_and_the_newest_checkpoint_waits_alone(tmp_path: Path) -> None:
    may_go_on, entered = threading.Event(), threading.Event()
    real = RemoteCheckpoints._open

    def hang(remote: RemoteCheckpoints) -> Any:
        entered.set()
        may_go_on.wait(30)
        return real(remote)

    engine, keeper = make_engine(tmp_path), keeper_of(tmp_path / "c", f"file://{tmp_path}/store")
    remote = keeper._remote
    assert remote is not None
    remote._open = lambda: hang(remote)  # type: ignore[method-assign]
    started = time.monotonic()
    for step in range(1, 7):
        train_a_step(engine, step)
        keeper.save(engine, TrainState(step=step))
        if step == 1:
            assert entered.wait(30)
    assert keeper.finish_uploads(0.05).sent == 0
    assert time.monotonic() - started < 10
    may_go_on.set()
    report = keeper.finish_uploads(30)
    assert (report.sent, report.replaced, report.failed) == (2, 4, 0)
    # Step 1 was long pruned locally when it was sent: its links held it.
    assert names_in(f"file://{tmp_path}/store") == ["step_00000001", "step_00000006"]


def test_a_step_that_is_saved_again_while_it_is_sent_arrives_whole_and_in_its_later_form(tmp_path: Path) -> None:
    uri, entered, may_go_on = f"file://{tmp_path}/store", threading.Event(), threading.Event()
    engine, keeper = make_engine(tmp_path), keeper_of(tmp_path / "c", uri)
    store, root = fsspec.core.url_to_fs(uri)

    class Slow:
        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def put_file(self, source: str, target: str) -> None:
            entered.set()
            assert may_go_on.wait(30)
            store.put_file(source, target)

    remote = keeper._remote
    assert remote is not None
    remote._open = lambda: (Slow(), root)  # type: ignore[method-assign]
    keeper.save(engine, TrainState(step=1))
    assert entered.wait(30)
    for num_rollbacks in (1, 2):  # the second takes the place of the first, which waits
        train_a_step(engine, num_rollbacks)
        keeper.save(engine, TrainState(step=1, num_rollbacks=num_rollbacks))
    may_go_on.set()
    report = keeper.finish_uploads(30)
    assert (report.sent, report.replaced, report.failed) == (2, 1, 0), report.last_problem
    assert not list((tmp_path / "c" / STAGING).iterdir()), "nothing is left behind locally"
    other = make_engine(tmp_path / "there")
    assert keeper_of(tmp_path / "there", uri).restore(other) == TrainState(step=1, num_rollbacks=2)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in engine.state_dict().items())


def test_an_attempt_that_was_cut_off_touches_nothing_in_the_store_and_fetches_nothing(tmp_path: Path, uri: str) -> None:
    engine, _ = saved(tmp_path / "c", uri, 1)
    store, root = fsspec.core.url_to_fs(uri)
    before = {name: store.cat_file(name) for name in store.find(root)}

    def fenced() -> None:
        raise StageFailed("another attempt owns the run", kind="fenced")

    remote = RemoteCheckpoints(uri, tmp_path / "s", may_commit=fenced, patience=Patience(sleep=lambda _: None))
    remote.send(Checkpointer(tmp_path / "d", World()).save(engine, TrainState(step=1, num_tokens=7)))
    assert remote.wait(30) and remote.report.failed == 1
    assert {name: store.cat_file(name) for name in store.find(root)} == before
    with pytest.raises(StageFailed, match="another attempt"):
        remote.fetch("step_00000001", tmp_path / "e")
    assert not list((tmp_path / "e").iterdir())


def test_an_attempt_that_was_cut_off_cannot_complete_a_checkpoint_in_the_store(tmp_path: Path, uri: str) -> None:
    def fenced() -> None:
        raise StageFailed("another attempt owns the run", kind="fenced")

    remote = RemoteCheckpoints(uri, tmp_path / "s", may_commit=fenced, patience=Patience(sleep=lambda _: None))
    engine = make_engine(tmp_path)
    remote.send(Checkpointer(tmp_path / "c", World()).save(engine, TrainState(step=1)))
    assert remote.wait(30)
    assert remote.report.failed == 1 and "another attempt" in remote.report.last_problem
    assert RemoteCheckpoints(uri, tmp_path / "s").names() == []


def test_a_stage_does_not_begin_anew_while_the_store_cannot_be_read(tmp_path: Path) -> None:
    def refuse() -> Any:
        raise TimeoutError("the store does not answer")

    keeper = keeper_of(tmp_path / "c", f"file://{tmp_path}/store")
    keeper._remote._open = failing(refuse)  # type: ignore[union-attr, method-assign]
    with pytest.raises(CheckpointError, match="does not answer") as caught:
        keeper.newest()
    assert "checkpoint_uri" in caught.value.action


def test_only_plain_uris_of_known_stores_without_passwords_are_taken(tmp_path: Path) -> None:
    for uri in (
        "pipe:cat /etc/passwd",
        "simplecache::s3://b/x",
        "http://x/y",
        "s3://key:secret@b/x",
        "b/x",
        "file://a/../b",
    ):
        with pytest.raises(ConfigError) as caught:
            RemoteCheckpoints(uri, tmp_path)
        assert "secret" not in str(caught.value) and "s3://..." in caught.value.allowed


def _two_ranks(world: World, folder: str) -> list[Any]:
    settings = training_config(engine="deepspeed", zero_stage=2)
    first = TinyStage(Path(folder) / "one", world, settings)
    parts = first.parts()
    remote = RemoteCheckpoints(f"file://{folder}/store", Path(folder) / "one" / STAGING)
    parts.checkpointer = Checkpointer(Path(folder) / "one", world, remote=remote)
    train(parts)
    report = parts.checkpointer.finish_uploads(30)
    weights = first.engine.state_dict()
    first.engine.close()
    second = TinyStage(Path(folder) / "two", world, settings)
    parts = second.parts()
    remote = RemoteCheckpoints(f"file://{folder}/store", Path(folder) / "two" / STAGING)
    parts.checkpointer = Checkpointer(Path(folder) / "two", world, remote=remote)
    result = train(parts)
    same = all(torch.equal(value, weights[name]) for name, value in second.engine.state_dict().items())
    return [report.failed, report.sent > 0, result.num_steps, len(second.seen), same]


@pytest.mark.slow
def test_two_ranks_find_a_finished_stage_in_the_store_and_train_nothing_again(tmp_path: Path) -> None:
    for found in run_distributed(_two_ranks, 2, str(tmp_path)):
        assert found == [0, True, 12, 0, True]


def test_an_unknown_package_for_a_store_is_named(tmp_path: Path) -> None:
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(CheckpointError, match="s3fs"):
            RemoteCheckpoints("s3://bucket/x", tmp_path).names()
    else:
        pytest.skip("s3fs is installed")
