"""What a disturbed run is held against: numbers, batches and weights of the undisturbed one, and the table that is printed."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hsmn_dist.orchestration.journal import read_events
from hsmn_dist.orchestration.run_folder import RunFolder
from hsmn_dist.tracking.jsonl_tracker import read_metric_lines
from tests.support.whole_job import final_weights

GLOBAL_BATCH = 8


def series(run: RunFolder) -> dict[tuple[str, str, int], float]:
    """(stage, metric, step) -> value of everything that does not measure time; a point that exists twice is an error."""
    points: dict[tuple[str, str, int], float] = {}
    for stage in sorted((run.path / "stages").iterdir()):
        for line in read_metric_lines(stage / "metrics.jsonl"):
            for name, value in line.values.items():
                assert (line.stage, name, line.step) not in points, f"{line.stage} {name} step {line.step} twice"
                points[line.stage, name, line.step] = value
    return points


def examples_of(run: RunFolder, stage: int) -> dict[int, list[int]]:
    """Step -> example indexes of the global batch, sorted."""
    path = sorted((run.path / "stages").iterdir())[stage] / "examples.jsonl"
    lines = {int(event["step"]): event["examples"] for event in read_events(path)}
    return {step: sorted(index for rank in lines[step] for index in rank) for step in sorted(lines)}


def check_epochs(run: RunFolder) -> list[int]:
    """Every example once per epoch: at the end of every batch no example was seen more than once more often than another."""
    epochs = []
    for stage in range(len(sorted((run.path / "stages").iterdir()))):
        batches = examples_of(run, stage)
        assert list(batches) == list(range(len(batches))), list(batches)
        everything = {index for batch in batches.values() for index in batch}
        seen: Counter[int] = Counter(dict.fromkeys(everything, 0))
        for step, batch in batches.items():
            assert len(batch) == GLOBAL_BATCH
            seen.update(batch)
            assert max(seen.values()) - min(seen.values()) <= 1, f"stage {stage}, step {step}: {seen.most_common(3)}"
        epochs.append(min(seen.values()))
        assert epochs[-1] >= 1, f"stage {stage} has fewer steps than an epoch"
    return epochs


def compare(run: RunFolder, undisturbed: RunFolder) -> dict[str, Any]:
    """Weights, losses, batches and metric points of both runs, bit for bit."""
    wanted, found = final_weights(undisturbed), final_weights(run)
    assert found == wanted, [name for name in wanted if found.get(name) != wanted[name]]
    for stage in range(len(sorted((run.path / "stages").iterdir()))):
        assert examples_of(run, stage) == examples_of(undisturbed, stage), f"stage {stage} saw other batches"
    ours, theirs = series(run), series(undisturbed)
    assert set(ours) == set(theirs), sorted(set(ours) ^ set(theirs))[:5]
    numbers = {key for key in theirs if not key[1].startswith(("perf/", "system/")) and "seconds" not in key[1]}
    unequal = [key for key in numbers if repr(ours[key]) != repr(theirs[key])]
    assert not unequal, unequal[:5]
    return {"parameters": len(wanted), "metric_points": len(ours), "compared_values": len(numbers)}


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """For people."""
    print(
        f"\n{title}\n{'no':>3} {'fault':<38} {'stage':>5} {'step':>4} {'rank':>4} {'under':<6} {'exit':>5} {'seconds':>8}"
    )
    for row in rows:
        end = "" if row["exit_code"] is None else row["exit_code"]
        cost = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        print(
            f"{row['number']:3d} {row['kind']:<38} {row['stage']:5d} {row['step'] if row['step'] is not None else '':>4} "
            f"{row['rank']:4d} {row['launcher']:<6} {end:>5} {cost:>8}"
        )
