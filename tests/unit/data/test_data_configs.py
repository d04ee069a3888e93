"""Every file of configs/data is a valid `data` section, and the terminal's progress bars take what preparation says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hsmn_dist.config.data import DataConfig
from hsmn_dist.data.catalogue import check_folder, list_datasets, show_dataset
from hsmn_dist.data.progress import TerminalProgress
from hsmn_dist.foundation.errors import ConfigError
from tests.support.shards import write_folder

FILES = sorted((Path(__file__).resolve().parents[3] / "configs" / "data").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_file_is_a_valid_data_section(path: Path) -> None:
    assert DataConfig.model_validate(yaml.safe_load(path.read_text())) != DataConfig()


def test_there_are_such_files() -> None:
    assert len(FILES) >= 4


def test_bars_take_known_and_unknown_totals() -> None:
    with TerminalProgress() as bars:
        for done in (500, 1000):
            bars.update("gsm8k: examples", done)
        bars.update("gsm8k: examples", 1200, 1200)
        bars.update("samples written", 1200, 2400)
        tasks = {task.description: (task.completed, task.total) for task in bars._bars.tasks}
    assert tasks == {"gsm8k: examples": (1200, 1200), "samples written": (1200, 2400)}


def test_the_catalogue_lists_and_shows_every_dataset() -> None:
    lines = list_datasets()
    assert len(lines) == 39 and [line.name for line in lines] == sorted(line.name for line in lines)
    for line in lines:
        shown = show_dataset(line.name)
        assert shown["name"] == line.name and shown["columns"] and shown["reads"]
    assert not next(line for line in lines if line.name == "human_eval").may_train
    with pytest.raises(ConfigError, match="gsm9k") as caught:
        show_dataset("gsm9k")
    assert "gsm8k" in caught.value.action


def test_checking_a_folder_reports_counts_and_problems(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "demo", 20)
    report = check_folder(folder)
    assert report.is_whole and report.num_samples == {"train": 20}
    sorted(folder.glob("*.tar"))[0].unlink()
    assert not check_folder(folder).is_whole and "missing" in check_folder(folder).problems[0]
    assert "index.json" in check_folder(tmp_path / "absent").problems[0]
