"""What makes the faults of `tests.support.chaos` happen inside the ranks of a real run, at exact steps.

Every Python process of the run imports a `sitecustomize` that calls `install(folder)`. It hooks the import of a few modules of the
library and, where the plan's next fault is due, does to this process (or its driver, raylet or neighbours) what the fault says, with
real signals, real full disks and real broken bytes. Each fault writes a mark before it strikes, so it strikes once in the life of a
run; only the first fault without a mark may strike. Nothing here is imported by the library.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import resource
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

BALLAST = "ballast"
SLOW_SECONDS = 0.4


class Injector:
    """The faults of one plan, seen from one process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        plan = json.loads((folder / "plan.json").read_text())
        self.faults: list[dict[str, Any]] = plan["faults"]
        self.seconds_per_step = float(plan.get("seconds_per_step", 0.0))
        self.place: dict[str, Any] = {"stage": -1, "rank": -1, "step": 0}
        self.lock = threading.Lock()
        self.is_slow = False

    def mark(self, fault: dict[str, Any]) -> Path:
        """The file that says that a fault struck."""
        return self.folder / "fired" / f"{fault['id']:02d}.json"

    def due(self, point: str) -> dict[str, Any] | None:
        """The next fault of the plan when it strikes here and now, else None."""
        pending = (fault for fault in self.faults if not self.mark(fault).exists())
        fault = next(pending, None)
        return fault if fault is not None and fault["point"] == point and self.is_here(fault) else None

    def is_here(self, fault: dict[str, Any]) -> bool:
        """Whether this process is where and when a fault strikes."""
        same = (self.place["stage"], self.place["rank"]) == (fault["stage"], fault["rank"])
        return same and bool(self.place["step"] >= fault["step"])

    def strike(self, fault: dict[str, Any], **facts: Any) -> None:
        """Write the mark, flushed, so that the fault cannot come twice."""
        text = json.dumps({**fault, **self.place, **facts, "pid": os.getpid(), "time": time.time()})
        aside = self.mark(fault).with_suffix(f".{os.getpid()}")
        aside.write_text(text)
        aside.replace(self.mark(fault))

    def at(self, point: str) -> None:
        """Look whether a fault is due, and let it happen."""
        with self.lock:
            fault = self.due(point)
            if fault is not None:
                action: Callable[[Injector, dict[str, Any]], None] = ACTIONS[fault["action"]]
                action(self, fault)


def parent_of(pid: int) -> int:
    """Parent process, by /proc."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def driver_of_this_rank() -> int:
    """rank -> torchrun -> `hsmn-dist run`."""
    return parent_of(os.getppid())


def die(injector: Injector, fault: dict[str, Any]) -> None:
    injector.strike(fault)
    os.kill(os.getpid(), signal.SIGKILL)


def stand_still(injector: Injector, fault: dict[str, Any]) -> None:
    injector.strike(fault)
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_driver(injector: Injector, fault: dict[str, Any]) -> None:
    injector.strike(fault)
    os.kill(driver_of_this_rank(), signal.SIGKILL)
    time.sleep(30)  # the kernel ends this rank as soon as its parents are gone


def terminate_twice(injector: Injector, fault: dict[str, Any]) -> None:
    injector.strike(fault)
    for _ in range(2):
        os.kill(driver_of_this_rank(), signal.SIGTERM)
        time.sleep(0.05)


def usr1(injector: Injector, fault: dict[str, Any]) -> None:
    injector.strike(fault)
    os.kill(driver_of_this_rank(), signal.SIGUSR1)


def kill_raylet(injector: Injector, fault: dict[str, Any]) -> None:
    injector.strike(fault)
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(30)


def lose_node(injector: Injector, fault: dict[str, Any]) -> None:
    """The raylet and every process below it at once, as when a machine loses its power."""
    raylet = os.getppid()
    injector.strike(fault, raylet=raylet)
    below = [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if _parent_or_none(int(entry.name)) == raylet]
    os.kill(raylet, signal.SIGKILL)
    for pid in [*(pid for pid in below if pid != os.getpid()), os.getpid()]:
        os.kill(pid, signal.SIGKILL)


def _parent_or_none(pid: int) -> int | None:
    try:
        return parent_of(pid)
    except OSError:
        return None


def lose_head(injector: Injector, fault: dict[str, Any]) -> None:
    injector.strike(fault)
    for pid in json.loads((injector.folder / "ray_head.json").read_text())["pids"]:
        os.kill(pid, signal.SIGKILL)


def truncate_checkpoint(injector: Injector, fault: dict[str, Any]) -> None:
    """Half of the newest checkpoint's file is gone, and so is this process."""
    newest = sorted(_stage_folder(injector).glob("checkpoints/step_*"))[-1]
    injector.strike(fault, checkpoint=newest.name)
    victim = next(iter(sorted(newest.glob(fault.get("file", "rank_*.safetensors")))))
    os.truncate(victim, victim.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk(injector: Injector, fault: dict[str, Any]) -> None:
    """A file system of our own is filled to the last byte; elsewhere this process may write no file beyond 512 bytes."""
    injector.strike(fault)
    if not json.loads((injector.folder / "plan.json").read_text())["has_own_disk"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return
    descriptor = os.open(_run_root(injector) / BALLAST, os.O_WRONLY | os.O_CREAT)
    for size in (1 << 20, 4096, 1):
        try:
            while True:
                os.write(descriptor, b"\0" * size)
        except OSError:
            continue


def corrupt_shards(injector: Injector, fault: dict[str, Any]) -> None:
    """The bytes of a stage's training shards are inverted where the samples are; a copy waits beside them."""
    stage = json.loads((injector.folder / "plan.json").read_text())["local_datasets"][str(fault["stage"])]
    prepared = json.loads((next(iter(sorted(_run_root(injector).glob("2*")))) / "prepared.json").read_text())
    injector.strike(fault)
    for shard in sorted(Path(prepared["folders"][stage]).glob("*train*.tar")):
        data = bytearray(shard.read_bytes())
        shard.with_suffix(".tar.whole").write_bytes(data)
        data[512:-1024] = bytes(byte ^ 0x40 for byte in data[512:-1024])
        shard.write_bytes(data)


def break_store(injector: Injector, fault: dict[str, Any]) -> None:
    """The object store answers late, or with errors, and nothing of it is in the cache."""
    injector.strike(fault)
    plan = json.loads((injector.folder / "plan.json").read_text())
    for path in Path(plan["cache_folder"]).glob("*/*.tar"):
        path.unlink()
    order = "&".join(f"{name}={value}" for name, value in fault["store"].items())
    urllib.request.urlopen(f"{plan['store']}/chaos?{order}", timeout=10).read()


def silence_tracker(injector: Injector, fault: dict[str, Any]) -> None:
    injector.strike(fault)
    os.killpg(json.loads((injector.folder / "tracker.json").read_text())["pid"], signal.SIGKILL)


def be_slow(injector: Injector, fault: dict[str, Any]) -> None:
    injector.strike(fault)
    injector.is_slow = True


ACTIONS: dict[str, Callable[[Injector, dict[str, Any]], None]] = {
    "die": die,
    "stand_still": stand_still,
    "kill_driver": kill_driver,
    "terminate_twice": terminate_twice,
    "usr1": usr1,
    "kill_raylet": kill_raylet,
    "lose_node": lose_node,
    "lose_head": lose_head,
    "truncate_checkpoint": truncate_checkpoint,
    "fill_disk": fill_disk,
    "corrupt_shards": corrupt_shards,
    "break_store": break_store,
    "silence_tracker": silence_tracker,
    "be_slow": be_slow,
}
"""What happens at once. Faults of the numbers (`poison`, `spike`, `no_memory`) are read by the wrappers below."""


def _run_root(injector: Injector) -> Path:
    return Path(json.loads((injector.folder / "plan.json").read_text())["run_root"])


def _stage_folder(injector: Injector) -> Path:
    run = next(iter(sorted(_run_root(injector).glob("2*"))))
    return next(iter(sorted(run.glob(f"stages/{injector.place['stage']:02d}_*"))))


def wrap_checkpoint(module: Any, injector: Injector) -> None:
    """Faults at each point of a save, in whichever thread it runs."""
    first = module.Checkpointer.__init__

    def __init__(self: Any, *words: Any, **names: Any) -> None:
        first(self, *words, **names)
        self._at_point = lambda point: injector.at(f"save:{point}")

    module.Checkpointer.__init__ = __init__


def wrap_loop(module: Any, injector: Injector) -> None:
    """Faults before a step, in its gradient and in its loss."""
    stage = module._Stage
    first_step, first_forward, first_penalties = stage._step, stage._forward_backward, stage._add_penalties

    def _step(self: Any, batch: Any, counts: Any) -> Any:
        injector.place["step"] = self._state.step
        time.sleep(injector.seconds_per_step)
        injector.at("step")
        slow, injector.is_slow = injector.is_slow, False
        try:
            if slow:
                self._engine.forward_timer.late = SLOW_SECONDS
            return first_step(self, batch, counts)
        finally:
            self._engine.forward_timer.late = 0.0

    def _forward_backward(self: Any, batch: Any, counts: Any) -> Any:
        rows = max(micro.target_ids.shape[0] for micro in batch)
        for fault in injector.faults:
            if fault["point"] == "memory" and injector.is_here(fault) and rows > fault["rows"]:
                allocate_too_much(injector, fault, rows)
        nll = first_forward(self, batch, counts)
        spike = agreed(injector, "loss")
        share = counts.num_scored / self._parts.world.world_size
        return nll if spike is None else nll + spike["nats"] * share

    def _add_penalties(self: Any, is_logged: bool) -> float:
        value = float(first_penalties(self, is_logged))
        fault = injector.due("gradient")
        if fault is not None:
            injector.strike(fault)
            for shard in self._engine.param_shards():
                if shard.gradient is not None and shard.gradient.numel():
                    shard.gradient[0] = float("nan")
                    break
        return value

    stage._step, stage._forward_backward, stage._add_penalties = _step, _forward_backward, _add_penalties


def agreed(injector: Injector, point: str) -> dict[str, Any] | None:
    """A fault that strikes every rank in the same step: each rank has a mark of its own, and the first rank's is the fault's."""
    place = injector.place
    for fault in injector.faults:
        if fault["point"] != point or (fault["stage"], fault["step"]) != (place["stage"], place["step"]):
            continue
        own = injector.folder / "fired" / f"{fault['id']:02d}.rank{place['rank']}"
        if own.exists():
            continue
        own.touch()
        if place["rank"] == fault["rank"]:
            injector.strike(fault)
        return fault
    return None


def allocate_too_much(injector: Injector, fault: dict[str, Any], rows: int) -> None:
    """The allocator's own error: the process may not grow, and torch is asked for a gigabyte. Every time that rows are too many."""
    import torch

    if not injector.mark(fault).exists():
        injector.strike(fault, rows_of_the_micro_batch=rows)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**26, hard))
    try:
        torch.empty(2**30, dtype=torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def wrap_timer(module: Any, injector: Injector) -> None:
    """A slow rank: it sleeps inside its forward pass."""
    first = module.ForwardTimer.__exit__

    def __exit__(self: Any, *words: Any) -> None:
        time.sleep(getattr(self, "late", 0.0))
        first(self, *words)

    module.ForwardTimer.__exit__ = __exit__


def wrap_stage(module: Any, injector: Injector) -> None:
    """Faults at the start of a stage, in its Fisher pass and at its export."""
    training = module.StageTraining
    first_run, first_fisher, first_export = training.run, training._fisher, training._export

    def run(self: Any) -> Any:
        injector.place.update(stage=self._spec.index, rank=self._context.world.rank, step=0)
        injector.at("start")
        return first_run(self)

    def _fisher(self: Any, *words: Any) -> Any:
        injector.place["step"] = self._num_steps
        injector.at("fisher")
        return first_fisher(self, *words)

    def _export(self: Any, *words: Any) -> Any:
        injector.at("export")
        return first_export(self, *words)

    training.run, training._fisher, training._export = run, _fisher, _export


WRAPPERS: dict[str, Callable[[Any, Injector], None]] = {
    "hsmn_dist.training.checkpoint": wrap_checkpoint,
    "hsmn_dist.training.loop": wrap_loop,
    "hsmn_dist.training.stragglers": wrap_timer,
    "hsmn_dist.orchestration.stage_training": wrap_stage,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Wraps the named modules right after they were executed."""

    def __init__(self, injector: Injector) -> None:
        self._injector = injector
        self._is_busy = False

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if name not in WRAPPERS or self._is_busy:
            return None
        self._is_busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._is_busy = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            WRAPPERS[name](module, self._injector)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install(folder: str) -> None:
    """Called by the run's `sitecustomize`. The driver alone has no rank, and nothing strikes there."""
    if (Path(folder) / "plan.json").is_file():
        sys.meta_path.insert(0, _Finder(Injector(Path(folder))))
