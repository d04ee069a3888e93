"""A whole curriculum under a seeded schedule of real faults, compared with one that nothing disturbed.

    python -m tests.support.chaos [--seed 7] [--folder runs/chaos] [--short]

One run of `hsmn-dist run`, taken up again by `--resume` as often as a fault ends it, must end with the bits of the undisturbed run,
every example of an epoch seen once, every metric point once, and no process left. Faults that change numbers by design (memory that
ran out, steps that were skipped) have a curriculum of their own with assertions of their own. Everything is on the disk, so the same
command goes on where an interrupted one stopped; a report of all faults, with the seconds each cost, is `report.json` in the folder.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hsmn_dist.foundation.files import read_json, write_json
from hsmn_dist.orchestration.heartbeat import Beat, read_beats
from hsmn_dist.orchestration.journal import read_events, run_status
from hsmn_dist.orchestration.post_mortem import explain
from hsmn_dist.orchestration.run_folder import RunFolder, list_runs
from tests.support.chaos_checks import GLOBAL_BATCH, check_epochs, compare, examples_of, print_table, series
from tests.support.chaos_plan import (
    CHECKPOINT_EVERY,
    NUM_STEPS,
    Fault,
    changing_schedule,
    full_schedule,
    short_schedule,
)
from tests.support.chaos_services import (
    ObjectStore,
    RayCluster,
    TrackerServer,
    environment,
    marked_processes,
    mount_disk,
    unmount_disk,
)
from tests.support.ray_cluster import free_ports
from tests.support.whole_job import DEMO, command_line

DISK_BYTES = 192 * 2**20
ATTEMPT_SECONDS = 420.0
STALL_SECONDS = 45
"""A rank that stands still is found after so long; longer than a start takes on a busy machine."""
STAGES = ("word_problems", "stdlib_code", "passkey")
PHASES = ("prepare", "baseline", "train", "fisher", "export", "evaluate", "done")
ONE_RANK = {"training.engine": "local", "cluster.ranks_per_node": 1}
SITE = '''"""Every Python process of a run under chaos imports this."""
import sys
sys.path.append({root!r})
from tests.support.chaos_inject import install
install({folder!r})
'''
CHANGEABLE = ("train/loss_nats", "validation/loss_nats")


def settings(num_steps: int, **changes: Any) -> list[str]:
    """`--set` words of a curriculum so small that a recovery costs seconds."""
    values = {
        "name": "chaos",
        "tokenizer.kind": "bytes",
        "tokenizer.vocab_size": 300,
        "model.vocab_size": 300,
        "model.d_model": 16,
        "model.num_heads": 2,
        "model.d_feed_forward": 32,
        "model.d_compressed": 8,
        "model.d_aggregator": 16,
        "model.aggregator_rank": 4,
        "model.num_decoder_layers": 1,
        "data.max_context_tokens": 48,
        "data.max_target_tokens": 16,
        "data.fetch_attempts": 5,
        "training.max_steps": num_steps,
        "training.validate_every_steps": 6,
        "training.patience": 100,
        "training.num_validation_examples": 8,
        "training.checkpoint_every_steps": CHECKPOINT_EVERY,
        "training.log_every_steps": 1,
        "training.global_batch_examples": GLOBAL_BATCH,
        "training.micro_batch_examples": 4,
        "training.records_examples": "true",
        "training.on_loss_spike": "stop",
        "training.spike_window_steps": 24,
        "continual.fisher.num_fisher_examples": 8,
        "evaluation.num_examples": 1,
        "evaluation.num_loss_examples": 2,
        "evaluation.max_new_tokens": 2,
        "evaluation.bootstrap_samples": 20,
        "cluster.max_failures": 50,
        "cluster.stall_seconds": 300,
        "cluster.grace_seconds": 60,
        "tracking.registered_model": "''",
        "tracking.finish_timeout_seconds": 1,
        "tracking.system_metrics_seconds": 0,
        **{f"curriculum.stages.{index}.datasets.0.num_examples": 80 for index in range(3)},
        **changes,
    }
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


class Chaos:
    """One curriculum under one schedule; state is on the disk, so that a second object goes on with it."""

    def __init__(self, folder: Path, faults: Sequence[Fault], services: Services, config: list[str]) -> None:
        self.folder, self.faults, self.services = folder, list(faults), services
        self.config = config
        self.site = folder / "site"
        self.run_root = services.disk / folder.parent.name / "runs"  # each part has a folder of its own
        (folder / "fired").mkdir(parents=True, exist_ok=True)
        self.site.mkdir(exist_ok=True)
        root = str(Path(__file__).resolve().parents[2])
        (self.site / "sitecustomize.py").write_text(SITE.format(root=root, folder=str(folder)))
        plan = {
            "faults": [fault.to_json() for fault in self.faults],
            "run_root": str(self.run_root),
            "has_own_disk": services.has_own_disk,
            "local_datasets": {str(index): name for index, name in enumerate(STAGES)},
            "cache_folder": str(folder / "cache"),
            "store": services.store_url,
        }
        write_json(folder / "plan.json", plan)
        self.costs: dict[int, float] = read_json(folder / "costs.json") if self._has("costs.json") else {}
        self.costs = {int(key): value for key, value in self.costs.items()}
        self.attempts: list[dict[str, Any]] = read_json(folder / "attempts.json") if self._has("attempts.json") else []
        self._attempt_started = 0.0
        self.unmeasured = set(self.fired()) - set(self.costs)  # an interrupted session did not see their end

    def _has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def fired(self) -> dict[int, dict[str, Any]]:
        """Marks of the faults that struck, by their number."""
        return {int(path.stem): read_json(path) for path in sorted((self.folder / "fired").glob("*.json"))}

    def run(self) -> RunFolder:
        """Attempt after attempt, until the run is complete."""
        while not (runs := list_runs(self.run_root)) or run_status(read_events(runs[-1].journal)) != "complete":
            self._attempt(runs[-1] if runs else None)
        return list_runs(self.run_root)[-1]

    def _attempt(self, run: RunFolder | None) -> None:
        before = set(self.fired())
        pending = next((fault for fault in self.faults if fault.id not in before), None)
        launcher = pending.launcher if pending is not None else "local"
        self.services.heal(self.run_root)
        self.services.provide_ray(launcher == "ray", self.site, self.folder)
        if run is None:
            words = [
                "run",
                str(DEMO["hsmn"]),
                *self.config,
                "--set",
                f"run_root={self.run_root}",
                "--launcher",
                launcher,
            ]
        else:
            words = ["run", "--resume", run.run_id, "--run-root", str(self.run_root), "--launcher", launcher]
        started = self._attempt_started = time.time()
        with (self.folder / "driver.log").open("ab") as log:
            log.write(f"\n=== attempt {len(self.attempts) + 1}: {launcher}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command_line(*words), cwd=self.folder, env=environment(self.site), stdout=log, stderr=log
            )
            try:
                code = self._watch(process)
            except BaseException:
                process.kill()  # its ranks end with it
                raise
        new = sorted(set(self.fired()) - before)
        note = {"number": len(self.attempts) + 1, "launcher": launcher, "exit_code": code, "struck": new}
        told = explain(list_runs(self.run_root)[-1]) if list_runs(self.run_root) else []
        self.attempts.append({**note, "seconds": round(time.time() - started, 1), "runs_show": told})
        write_json(self.folder / "attempts.json", self.attempts)
        print(
            f"attempt {note['number']:2d} ({launcher}): exit {code}, struck {new}, {time.time() - started:.0f} s",
            flush=True,
        )
        self._check_attempt(code, new)

    def _watch(self, process: subprocess.Popen[bytes]) -> int:
        deadline = time.monotonic() + ATTEMPT_SECONDS
        while (code := process.poll()) is None:
            assert time.monotonic() < deadline, f"an attempt did not end in {ATTEMPT_SECONDS:g} s: see {self.folder}"
            self._note_costs()
            time.sleep(0.1)
        self._note_costs(is_over=code == 0)
        return code

    def _note_costs(self, is_over: bool = False) -> None:
        """A fault's cost is the time from its strike until the run, resumed if need be, is past that place."""
        ends = {fault.id for fault in self.faults if fault.exit_code is not None}
        for number, mark in self.fired().items():
            is_ending = number in ends and mark["time"] > self._attempt_started
            if number in self.costs or number in self.unmeasured or is_ending:
                continue
            if is_over or any(_is_beyond(beat, mark) for beat in self._beats()):
                self.costs[number] = round(time.time() - mark["time"], 2)
                write_json(self.folder / "costs.json", self.costs)

    def _beats(self) -> list[Beat]:
        return [beat for run in list_runs(self.run_root)[-1:] for beat in read_beats(run.path / "heartbeats")]

    def _check_attempt(self, code: int, new: list[int]) -> None:
        by_id = {fault.id: fault for fault in self.faults}
        ended_by = [by_id[number] for number in new if by_id[number].exit_code is not None]
        tail = (self.folder / "driver.log").read_text(errors="replace")[-3000:]
        if code != 0:
            assert ended_by, f"exit {code} and no fault that would end the run\n{tail}"
            last = ended_by[-1]
            assert code == last.exit_code, f"{last.kind}: exit {code}, not {last.exit_code}\n{tail}"
            event = read_events(list_runs(self.run_root)[-1].journal)[-1]
            is_told = event["event"] == "run_failed" and event["kind"] == last.failure
            # On a full disk the journal may have no room; then the terminal alone was told.
            assert not last.failure or is_told or (last.action == "fill_disk" and "No space left" in tail), event
            told = self.attempts[-1]["runs_show"]
            assert told[-1].startswith("resume: hsmn-dist run --resume"), told
            assert not is_told or any(
                f"({last.failure})" in line for line in told if line.startswith("what failed:")
            ), told
        if not any(fault.launcher == "ray" for fault in self.faults if fault.id in new):
            self._check_leftovers()

    def _check_leftovers(self) -> None:
        deadline = time.monotonic() + 20
        own = set(self.services.ray_processes())
        while left := {pid: words for pid, words in marked_processes(str(self.site)).items() if pid not in own}:
            assert time.monotonic() < deadline, f"processes left behind: {left}"
            time.sleep(0.2)


class Services:
    """The store, the tracker, the disk and the cluster around all curricula of one session."""

    def __init__(self, folder: Path, disk: Path, has_own_disk: bool) -> None:
        self.folder, self.disk, self.has_own_disk = folder, disk, has_own_disk
        ports_file = folder / "ports.json"
        if not ports_file.is_file():
            write_json(ports_file, free_ports(3))
        self.store_port, self.tracker_port, self.ray_port = read_json(ports_file)
        self.store_url = f"http://127.0.0.1:{self.store_port}"
        (folder / "store").mkdir(parents=True, exist_ok=True)
        self.store = ObjectStore(folder / "store", self.store_port)
        self.tracker = TrackerServer(folder / "tracker", self.tracker_port)
        self._ray: RayCluster | None = None

    def heal(self, run_root: Path) -> None:
        """Undo what a fault left broken outside the run: the disk, the store, the shards."""
        for path in run_root.rglob("ballast"):
            path.unlink()
        for whole in run_root.rglob("*.tar.whole"):
            whole.replace(whole.with_suffix(""))
        self.store.heal()

    def provide_ray(self, is_wanted: bool, site: Path, chaos: Path) -> None:
        """A cluster for the Ray attempts, and none for the others."""
        if self._ray is not None and not is_wanted:
            self._ray.close()
            self._ray = None
        if self._ray is None and is_wanted:
            self._ray = RayCluster(site, self.ray_port, num_nodes=3)
            write_json(chaos / "ray_head.json", {"pids": self._ray.head_processes()})

    def ray_processes(self) -> list[int]:
        """Processes that belong to the cluster and not to the run."""
        return [] if self._ray is None else list(marked_processes(str(self._ray.folder)))

    def close(self) -> None:
        """End everything."""
        self.store.close()
        self.tracker.kill()
        if self._ray is not None:
            self._ray.close()


def _is_beyond(beat: Beat, mark: dict[str, Any]) -> bool:
    phase = {"fisher": "fisher", "export": "export"}.get(mark["point"], "train")
    here = (beat.stage_index, PHASES.index(beat.phase) if beat.phase in PHASES else 0, beat.step)
    there = (mark["stage"], PHASES.index(phase), 10**9 if mark["point"] in ("fisher", "export") else mark["step"])
    return beat.time > mark["time"] and here > there


def check_said(chaos: Chaos, run: RunFolder) -> None:
    """Every fault struck, at or after its step, and where it must be named, it is."""
    marks = chaos.fired()
    missing = [fault for fault in chaos.faults if fault.id not in marks]
    assert not missing, f"did not strike: {missing}"
    text = (chaos.folder / "driver.log").read_text(errors="replace") + run.journal.read_text()
    for log in (run.path / "ranks.log", chaos.folder / "ranks.log"):
        text += log.read_text(errors="replace") if log.is_file() else ""
    for fault in chaos.faults:
        mark = marks[fault.id]
        assert (mark["stage"], mark["rank"]) == (fault.stage, fault.rank) and mark["step"] >= fault.step, mark
        words = fault.says.format(host=platform.node())
        assert words in text, f"nobody said {words!r}"


def undisturbed_run(folder: Path, config: list[str]) -> RunFolder:
    """The same curriculum in peace; kept for a second call."""
    root = folder / "undisturbed"
    runs = list_runs(root)
    if not runs or run_status(read_events(runs[-1].journal)) != "complete":
        shutil.rmtree(root, ignore_errors=True)
        words = ["run", str(DEMO["hsmn"]), *config, "--set", f"run_root={root}", "--launcher", "local"]
        with (folder / "undisturbed.log").open("wb") as log:
            done = subprocess.run(
                command_line(*words), cwd=folder, env=environment(), stdout=log, stderr=log, timeout=400
            )
        assert done.returncode == 0, (folder / "undisturbed.log").read_text()[-3000:]
    return list_runs(root)[-1]


def table(chaos: Chaos) -> list[dict[str, Any]]:
    """A row for each fault, in the order in which they struck."""
    marks = chaos.fired()
    rows = []
    for fault in chaos.faults:
        mark = marks.get(fault.id, {})
        rows.append(
            {
                "number": fault.id,
                "kind": fault.kind,
                "stage": fault.stage,
                "step": mark.get("step"),
                "rank": fault.rank,
                "launcher": fault.launcher,
                "exit_code": fault.exit_code,
                "seconds": chaos.costs.get(fault.id),
            }
        )
    return rows


def same_bits(folder: Path, services: Services, faults: list[Fault], is_short: bool) -> dict[str, Any]:
    """The main part: a disturbed run ends with the bits of the undisturbed one."""
    changes: dict[str, Any] = {"tracking.backend": "none", **(ONE_RANK if is_short else {})}
    num_steps = 12 if is_short else NUM_STEPS
    undisturbed = undisturbed_run(folder, settings(num_steps, **changes))
    uses_store = any(fault.action == "break_store" for fault in faults)
    if uses_store:
        source = Path(read_json(undisturbed.prepared)["folders"]["passkey"])
        shutil.copytree(source, services.folder / "store" / "passkey", dirs_exist_ok=True)
        changes["curriculum.stages.2.datasets.0.shards"] = f"{services.store_url}/passkey"
        changes["data.cache_folder"] = folder / "faulty" / "cache"
    if any(fault.action == "stand_still" for fault in faults):
        changes["cluster.stall_seconds"] = STALL_SECONDS
    if any(fault.launcher == "ray" for fault in faults):
        changes["cluster.ray_address"] = f"127.0.0.1:{services.ray_port}"
    chaos = Chaos(folder / "faulty", faults, services, settings(num_steps, **changes))
    run = chaos.run()
    facts = compare(run, undisturbed)
    facts["epochs"] = check_epochs(run)
    check_said(chaos, run)
    if uses_store:
        facts["store"] = services.store.served
    rows = table(chaos)
    print_table(f"{len(rows)} faults; weights equal bit for bit", rows)
    return {"faults": rows, "attempts": chaos.attempts, **facts}


def check_tracker(services: Services, chaos: Chaos, run: RunFolder) -> dict[str, int]:
    """The killed server comes back, gets what it missed, and has every point of the files once."""
    services.tracker.start(chaos.folder / "tracker.json")
    services.tracker.wait()
    words = ["track", "sync", run.run_id, "--run-root", str(chaos.run_root)]
    done = subprocess.run(command_line(*words), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    import mlflow

    client = mlflow.MlflowClient(services.tracker.uri)
    experiment = client.get_experiment_by_name("hsmn_dist")
    assert experiment is not None
    stages = {item.data.tags["hsmn_dist.stage"]: item for item in client.search_runs([experiment.experiment_id])}
    wanted: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for (stage, name, step), value in series(run).items():
        wanted.setdefault((stage, name), []).append((step, value))
    total = 0
    for (stage, name), points in wanted.items():
        history = client.get_metric_history(stages[stage].info.run_id, name)
        found = sorted((point.step, point.value) for point in history)
        assert [step for step, _ in found] == [step for step, _ in sorted(points)], (stage, name)
        total += len(found)
    return {"points_on_the_server": total}


def other_numbers(folder: Path, services: Services) -> dict[str, Any]:
    """The small part: what memory, skips and rollbacks change, and what they must not."""
    policies = {"training.on_non_finite": "rollback", "training.on_loss_spike": "skip", "tracking.backend": "none"}
    undisturbed = undisturbed_run(folder, settings(24, **policies))
    tracked = policies | {"tracking.backend": "mlflow", "tracking.uri": services.tracker.uri}
    chaos = Chaos(folder / "faulty", changing_schedule(), services, settings(24, **tracked))
    if not any(fault.action == "silence_tracker" and fault.id in chaos.fired() for fault in chaos.faults):
        services.tracker.start(chaos.folder / "tracker.json")
        services.tracker.wait()
    run = chaos.run()
    assert not services.tracker.is_alive(), "the tracker was killed"
    check_said(chaos, run)
    retried = [event for event in read_events(run.journal) if event["event"] == "retried"]
    assert [event["kind"] for event in retried] == ["out_of_memory"], retried
    assert read_json(run.adjustments)["micro_batch_examples"] == 2
    # Smaller micro-batches: the same global batches, and losses within the order of additions.
    assert examples_of(run, 0) == examples_of(undisturbed, 0)
    ours, theirs = series(run), series(undisturbed)
    keys = [key for key in theirs if key[0].startswith("00_") and key[1] in CHANGEABLE]
    difference = max(abs(ours[key] - theirs[key]) for key in keys)
    assert keys and difference < 1e-5, difference
    # A rollback leaves out the batches since the checkpoint; a skipped spike leaves out its own batch from the weights.
    results = [read_json(stage / "results.json")["training"] for stage in sorted((run.path / "stages").iterdir())]
    assert [result["skipped_steps"] for result in results] == [0, 1, 1], results
    rows = table(chaos)
    print_table(f"{len(rows)} faults: the tracker, and those that change numbers by design", rows)
    return {
        "faults": rows,
        "attempts": chaos.attempts,
        "largest_loss_difference_after_out_of_memory": difference,
        "tracker": check_tracker(services, chaos, run),
    }


def main(words: Sequence[str] | None = None) -> None:
    """Parse, run both parts, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--short", action="store_true", help="a few faults on one rank")
    parser.add_argument("--fresh", action="store_true", help="forget an interrupted session")
    arguments = parser.parse_args(words)
    folder: Path = arguments.folder.resolve()
    if (folder / "report.json").is_file() or arguments.fresh:
        unmount_disk(folder / "disk")
        shutil.rmtree(folder, ignore_errors=True)  # an earlier session that came to its end
    folder.mkdir(parents=True, exist_ok=True)
    started = time.time()
    report: dict[str, Any] = {"seed": arguments.seed, "host": platform.node(), "cores": os.cpu_count()}
    has_own_disk = mount_disk(folder / "disk", DISK_BYTES)
    services = Services(folder, folder / "disk", has_own_disk)
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "bits": lambda place: same_bits(place, services, full_schedule(arguments.seed), False),
        "numbers": lambda place: other_numbers(place, services),
    }
    if arguments.short:
        parts = {"bits": lambda place: same_bits(place, services, short_schedule(arguments.seed), True)}
    try:
        for name, part in parts.items():
            (folder / name).mkdir(exist_ok=True)
            done = folder / f"{name}.json"
            if not done.is_file():
                write_json(done, part(folder / name))
            report[name] = read_json(done)
    finally:
        services.close()
    unmount_disk(folder / "disk")  # not after an error: what happened is still there to be read, and to go on from
    left = marked_processes(str(folder))
    assert not left, f"processes left behind: {left}"
    seconds = sum(attempt["seconds"] for name in parts for attempt in report[name]["attempts"])
    report |= {
        "has_own_disk": has_own_disk,
        "seconds": round(time.time() - started, 1),
        "attempt_seconds": round(seconds, 1),
    }
    write_json(folder / "report.json", report)
    count = sum(len(report[name]["faults"]) for name in parts)
    print(f"\n{count} faults, {seconds:.0f} s of disturbed runs; no process left; report: {folder / 'report.json'}")


if __name__ == "__main__":
    main(sys.argv[1:])
