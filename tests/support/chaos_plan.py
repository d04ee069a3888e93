"""A seeded schedule of faults over three stages, and what each is expected to do to the run.

Faults strike in the order of the schedule, each at or after its step. Faults that need Ray's processes stand together at the start of
the second stage, behind one that ends the driver; the last of them loses the cluster, and the run goes on under torchrun.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any, Literal

NUM_STEPS = 42
CHECKPOINT_EVERY = 3
Launcher = Literal["local", "ray"]


@dataclass(frozen=True)
class Fault:
    """One row of the schedule.

    Attributes:
        kind: its name in the table.
        action: what `tests.support.chaos_inject` does.
        point: where in a rank: step, save:..., gradient, loss, memory, start, fisher or export.
        exit_code: how `hsmn-dist run` ends because of it; None where the run goes on by itself (a killed driver gives -9).
        failure: the failure kind that the journal must name, where the run ends with exit code 1 or 2.
        says: words that a log must hold afterwards.
        facts: further values for the action.
    """

    kind: str
    action: str
    point: str = "step"
    exit_code: int | None = None
    launcher: Launcher = "local"
    rank: int = 0
    stage: int = 0
    step: int = 0
    failure: str = ""
    says: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    id: int = 0

    @property
    def restarts(self) -> bool:
        """Whether the ranks are started again because of it."""
        return self.exit_code is not None or self.action in ("die", "stand_still", "truncate_checkpoint")

    def to_json(self) -> dict[str, Any]:
        """What the injector reads."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "facts"}
        return {**values, **self.facts}


def killed(rank: int) -> Fault:
    return Fault("worker killed", "die", rank=rank)


def during_save(point: str, when: str, rank: int = 0) -> Fault:
    return Fault(f"death {when} a save ({point})", "die", f"save:{point}", rank=rank)


STOPS_RANK_1 = Fault("hung rank", "stand_still", rank=1, says="rank 1 on {host} has been silent")
STOPS_RANK_0 = replace(STOPS_RANK_1, rank=0, says="rank 0 on {host} has been silent")
TRUNCATED = Fault("truncated checkpoint", "truncate_checkpoint", says="is damaged and passed over")
NO_MANIFEST = replace(TRUNCATED, facts={"file": "manifest.json"})
NAN = Fault("non-finite gradient", "poison", "gradient", 1, failure="non_finite", says="gradient norm nan")
SPIKE = Fault("loss spike", "spike", "loss", 1, failure="loss_spike", says="after a mean of", facts={"nats": 1000.0})
TERM = Fault("SIGTERM, twice", "terminate_twice", exit_code=75)
USR1 = Fault("SIGUSR1", "usr1", exit_code=75)
DRIVER = Fault("driver killed", "kill_driver", exit_code=-9)
DISK = Fault("disk full", "fill_disk", "save:folder_made", 1, failure="disk_full")
SHARD = Fault("corrupt shard", "corrupt_shards", "start", 2, failure="bad_input", says="train")
SLOW_STORE = Fault("object store slow", "break_store", "start", facts={"store": {"slow": 3}})
FAILING_STORE = Fault(
    "object store failing", "break_store", "start", facts={"store": {"fail": 3}}, says="attempt 1 of 5"
)
NO_STORE = Fault(
    "object store gone",
    "break_store",
    "start",
    1,
    failure="store_away",
    facts={"store": {"fail": 1000}},
    says="after 5 attempts",
)
TRACKER = Fault("tracker down", "silence_tracker")
STRAGGLER = Fault("straggler", "be_slow", rank=1, says="rank 1 on {host} is a straggler")
RAY_WORKER = replace(killed(1), launcher="ray")
RAYLET = Fault("raylet killed", "kill_raylet", launcher="ray")
NODE = Fault("node lost", "lose_node", launcher="ray", rank=1)
HEAD = Fault("Ray head lost", "lose_head", exit_code=1, failure="worker_lost", launcher="ray")


def full_schedule(seed: int) -> list[Fault]:
    """At least 30 faults, every kind at least once; order and steps within the stages come from the seed."""
    draw = random.Random(seed)
    first = [
        killed(1),
        during_save("folder_made", "before"),
        during_save("shards_written", "during", rank=1),
        during_save("hashes_exchanged", "during"),
        during_save("manifest_written", "during"),
        during_save("renamed", "after"),
        TRUNCATED,
        STOPS_RANK_1,
        killed(0),
        TERM,
    ]
    second = [STRAGGLER, USR1, DISK, during_save("pruned", "after", rank=1), killed(0), NO_MANIFEST, DRIVER]
    third = [killed(1), during_save("state_written", "during"), TERM, STOPS_RANK_0]
    for part in (first, second, third):
        draw.shuffle(part)
    _insert_at_starts(second, [SHARD], draw)
    _insert_at_starts(third, [SLOW_STORE, FAILING_STORE, NO_STORE], draw)
    late = [
        replace(killed(0), kind="worker killed in the Fisher pass", point="fisher", step=NUM_STEPS),
        replace(killed(1), kind="worker killed before the export", point="export", step=NUM_STEPS),
    ]
    rows = _spread([NAN, *first, DRIVER], 0, draw, first_step=2)
    rows += _spread([RAY_WORKER, RAYLET, NODE, HEAD, *second], 1, draw, first_step=2)
    rows += _spread([*third], 2, draw, first_step=1)
    rows += [replace(fault, stage=2) for fault in late]
    return _numbered(_with_spike(rows))


def short_schedule(seed: int) -> list[Fault]:
    """A few faults for the quick tests, on one rank: one of each way in which a run goes on."""
    draw = random.Random(seed)
    rows = _spread([killed(0), TERM], 0, draw, first_step=4, last_step=10)
    rows += _spread([during_save("manifest_written", "during"), NAN], 1, draw, first_step=2, last_step=10)
    rows += _spread([TRUNCATED, DISK], 2, draw, first_step=7, last_step=9)
    return _numbered(rows)


def changing_schedule() -> list[Fault]:
    """Faults that change numbers by design, in a curriculum of their own: no memory, skipped and rolled-back steps.

    The tracker is killed here too, because its client costs seconds in each of the many starts of the other curriculum.
    """
    rows = [
        replace(TRACKER, stage=0, step=2),
        Fault("out of memory", "allocate", "memory", stage=0, step=5, says="allocate memory", facts={"rows": 2}),
        Fault("non-finite gradient, rollback", "poison", "gradient", stage=1, step=7, says="rollback"),
        Fault("loss spike, skip", "spike", "loss", stage=2, step=20, says="skip", facts={"nats": 1000.0}),
    ]
    return _numbered(rows)


def _insert_at_starts(faults: list[Fault], at_start: list[Fault], draw: random.Random) -> None:
    """What strikes at the start of a stage comes right behind something that makes it start again."""
    again = [index for index, fault in enumerate(faults) if fault.restarts]
    for index, fault in zip(sorted(draw.sample(again, len(at_start)), reverse=True), at_start, strict=True):
        faults.insert(index + 1, fault)


def _spread(
    faults: list[Fault], stage: int, draw: random.Random, first_step: int, last_step: int = NUM_STEPS - 4
) -> list[Fault]:
    """Rising steps, about evenly, moved a little by the seed; the truncated checkpoint needs two before it."""
    room = (last_step - first_step) / max(1, len(faults))
    steps = [int(first_step + room * index + draw.random() * room * 0.7) for index in range(len(faults))]
    rows = []
    for fault, step in zip(faults, steps, strict=True):
        least = 2 * CHECKPOINT_EVERY + 1 if fault.action == "truncate_checkpoint" else 0
        rows.append(replace(fault, stage=stage, step=0 if fault.point == "start" else max(step, least)))
    return rows


def _with_spike(rows: list[Fault]) -> list[Fault]:
    """The spike needs losses to be compared with and an exact step: it comes last in the second stage."""
    after = max(index for index, fault in enumerate(rows) if fault.stage == 1) + 1
    return [*rows[:after], replace(SPIKE, stage=1, step=NUM_STEPS - 2), *rows[after:]]


def _numbered(rows: list[Fault]) -> list[Fault]:
    return [replace(fault, id=number) for number, fault in enumerate(rows, 1)]
