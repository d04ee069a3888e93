from __future__ import annotations

import logging
import time

import pytest
import torch

from hsmn_dist.training import stragglers
from hsmn_dist.training.stragglers import ForwardTimer, report_straggler, slowest


def test_the_slow_rank_is_compared_with_the_others_not_with_itself() -> None:
    assert slowest([1.0, 3.0]).rank == 1 and slowest([1.0, 3.0]).ratio == 3.0
    assert slowest([1.0, 1.1, 0.9, 2.0]).rank == 3 and slowest([1.0, 1.1, 0.9, 2.0]).ratio == pytest.approx(2.0)
    assert slowest([5.0]).ratio == 1.0
    assert slowest([0.0, 0.0]).ratio == 1.0


def test_only_the_time_inside_counts() -> None:
    timer = ForwardTimer(torch.device("cpu"))
    with timer:
        time.sleep(0.02)
    time.sleep(0.05)
    with timer:
        time.sleep(0.02)
    assert 0.04 <= timer.take() < 10.0
    assert timer.take() == 0.0


def test_a_slow_rank_is_named_with_its_host(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(stragglers, "all_gather_objects", lambda own: [own, (4.0, "node-b")])
    with caplog.at_level(logging.WARNING):
        assert report_straggler(1.0, 7).rank == 1
    assert "rank 1 on node-b" in caplog.text and "4.00" in caplog.text
    caplog.clear()
    monkeypatch.setattr(stragglers, "all_gather_objects", lambda own: [own, (1.2, "node-b")])
    report_straggler(1.0, 7)
    assert caplog.text == ""
