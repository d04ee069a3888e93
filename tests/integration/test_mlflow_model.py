"""The registered model of a run generates text in a fresh process, by MLflow alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

mlflow = pytest.importorskip("mlflow")

from hsmn_dist.config.tracking import TrackingConfig  # noqa: E402
from hsmn_dist.data.tokenizer import TOKENIZER_NAME, ByteTokenizer  # noqa: E402
from hsmn_dist.models.generation import GenerationSettings  # noqa: E402
from hsmn_dist.orchestration.run_folder import RunFolder  # noqa: E402
from hsmn_dist.orchestration.served_model import ServedTextModel, _load_pyfunc, log_final_model  # noqa: E402
from hsmn_dist.training.export import save_weights  # noqa: E402
from tests.support.byte_models import byte_config, byte_text_model  # noqa: E402

FRESH = """
import json, sys, mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
frame = pandas.DataFrame({"prompt": ["Two plus two is ", "def f("]})
print(json.dumps(list(model.predict(frame, params={"max_new_tokens": 10})["text"])))
"""


class Stage:
    name = "a"


def run_config(**changes):
    """The parts of a RunConfig that are read here."""

    class Config:
        tracking = TrackingConfig(**{"registered_model": "tiny_text", **changes})

        class data:
            max_context_tokens = 64

        class curriculum:
            stages = (Stage,)

    return Config()


@pytest.fixture
def finished_run(tmp_path, monkeypatch):
    """A run folder with one complete stage of a tiny HOPE model."""
    monkeypatch.setattr("hsmn_dist.orchestration.served_model.training_stages", lambda config: config.curriculum.stages)
    folder = RunFolder(tmp_path / "runs" / "r1")
    stage = folder.stage(0, "a")
    text_model = byte_text_model("hope", max_context_tokens=64)
    save_weights(text_model.model.state_dict(), byte_config("hope"), stage.weights, {})
    ByteTokenizer().save(stage.weights / TOKENIZER_NAME)
    stage.complete.write_text("{}")
    return folder, text_model


def test_the_registered_model_generates_the_same_text_in_a_fresh_process(finished_run, tmp_path):
    folder, text_model = finished_run
    assert log_final_model(run_config(), folder, {"family": "hope"}) == 1
    uri = f"sqlite:///{folder.root}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    version = client.get_model_version("tiny_text", "1")
    assert version.tags["family"] == "hope"
    assert client.get_run(version.run_id).data.tags["hsmn_dist.run_id"] == "r1"
    done = subprocess.run(
        [sys.executable, "-c", FRESH, uri, "models:/tiny_text/1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = text_model.generate(["Two plus two is ", "def f("], GenerationSettings(max_new_tokens=10))
    assert json.loads(done.stdout.splitlines()[-1]) == expected
    saved = Path(client.get_run(version.run_id).info.artifact_uri.removeprefix("file://")) / "model"
    assert (saved / "input_example.json").is_file()
    assert not list(saved.rglob("*.pkl")), "nothing in it is unpickled"
    assert "temperature" in (saved / "MLmodel").read_text()
    assert not list(folder.path.glob(".served-*")), "the scratch folder is gone"


def test_prompts_may_be_a_frame_a_list_or_one_text(finished_run):
    folder, text_model = finished_run
    served = _load_pyfunc(str(folder.stage(0, "a").weights))
    assert isinstance(served, ServedTextModel)
    one = served.predict("abc", {"max_new_tokens": 5})["text"].tolist()
    assert one == served.predict(["abc"], {"max_new_tokens": 5})["text"].tolist()
    assert one == text_model.generate(["abc"], GenerationSettings(max_new_tokens=5))


def test_a_run_is_not_failed_by_a_server_that_is_away(finished_run):
    folder, _ = finished_run
    assert log_final_model(run_config(uri="http://127.0.0.1:9"), folder) is None
    assert log_final_model(run_config(registered_model=""), folder) is None
    assert log_final_model(run_config(backend="none"), folder) is None
