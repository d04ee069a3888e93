"""The journal survives torn lines, and says where a run stands."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsmn_dist.foundation.errors import CheckpointError, HsmnError
from hsmn_dist.orchestration.journal import append_event, read_events, run_status


def test_events_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert read_events(path) == []
    for number in range(5):
        append_event(path, "stage_completed", stage=number)
    assert [event["stage"] for event in read_events(path)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_passed_over_and_the_next_line_is_whole(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal.jsonl"
    append_event(path, "run_started")
    append_event(path, "stage_completed", stage=0)
    path.write_bytes(path.read_bytes()[:-cut])
    append_event(path, "run_completed")
    names = [event["event"] for event in read_events(path)]
    assert names[0] == "run_started"
    assert names[-1] == "run_completed"


def test_damage_in_the_middle_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for _ in range(4):
        append_event(path, "stage_completed")
    lines = path.read_text().splitlines()
    lines[1] = "{'not json'}"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(CheckpointError, match=r"journal\.jsonl:2"):
        read_events(path)


@pytest.mark.parametrize(
    ("events", "status"),
    [
        ([], "new"),
        (["run_started"], "running"),
        (["run_started", "run_failed"], "failed"),
        (["run_started", "run_preempted", "run_resumed"], "running"),
        (["run_started", "run_preempted"], "preempted"),
        (["run_started", "run_failed", "run_resumed", "run_completed"], "complete"),
    ],
)
def test_status_follows_the_last_decisive_event(events: list[str], status: str) -> None:
    assert run_status([{"event": name} for name in events]) == status


def test_the_end_of_an_attempt_that_was_replaced_does_not_count() -> None:
    events = [
        {"event": "run_started", "attempt": "a"},
        {"event": "run_resumed", "attempt": "b"},
        {"event": "run_failed", "attempt": "a"},
    ]
    assert run_status(events) == "running"
    assert run_status([*events, {"event": "run_completed", "attempt": "b"}]) == "complete"
    assert run_status([*events, {"event": "run_preempted", "attempt": "b"}, events[-1]]) == "preempted"


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_with_a_message(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    path.write_bytes(data)
    try:
        assert isinstance(read_events(path), list)
    except HsmnError as error:
        assert error.found
        assert error.action
