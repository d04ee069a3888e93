"""`hsmn-dist verify` and `generate` on exported models of the demo's size, every family: what a user sees in the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import TypeAdapter

from hsmn_dist.cli.main import run_command
from hsmn_dist.config.models import ModelConfig
from hsmn_dist.config.optim import OptimConfig
from hsmn_dist.config.training import TrainingConfig
from hsmn_dist.data.tokenizer import TOKENIZER_NAME, ByteTokenizer
from hsmn_dist.distributed.world import World
from hsmn_dist.models.build import build_model
from hsmn_dist.models.generation import GenerationSettings
from hsmn_dist.models.pretrained import save_pretrained
from hsmn_dist.models.pruning import apply_masks, compute_masks
from hsmn_dist.models.text_model import LocalTextModel
from hsmn_dist.training.build import build_engine
from hsmn_dist.training.export import export_weights, load_exported, save_weights

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "models"
FAMILIES = ("hsmn", "hope", "hsmn_hope")
CHECKS = 7


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> a folder as a stage leaves it: weights, configuration, manifest, tokenizer."""
    folders = {}
    for family in FAMILIES:
        content = yaml.safe_load((CONFIGS / f"{family}_debug.yaml").read_text())
        config: ModelConfig = TypeAdapter(ModelConfig).validate_python(content)
        torch.manual_seed(0)
        training = TrainingConfig(engine="local")
        engine = build_engine(training, OptimConfig(), lambda config=config: build_model(config), World())  # type: ignore[misc]
        folders[family] = tmp_path_factory.mktemp(family) / "weights"
        export_weights(engine, config, folders[family], {})
        ByteTokenizer().save(folders[family] / TOKENIZER_NAME)
        engine.close()
    return folders


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_prints_a_table_in_which_every_invariant_holds(
    family: str, exported: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["verify", str(exported[family])]) == 0
    page = capsys.readouterr().out
    assert page.count("holds") == CHECKS and "broken" not in page
    for words in ("finite", "later", "neighbours", "padded", "token by token", "windows", "gradient"):
        assert words in page, page


def test_verify_as_json_has_the_same_lines(exported: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["verify", str(exported["hope"]), "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert len(lines) == CHECKS and all(line["passed"] for line in lines)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_reads_a_file_before_the_prompt_and_writes_as_it_goes(
    family: str, exported: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    book = tmp_path / "book.txt"
    book.write_text("The river runs slowly past the old mill. " * 12, encoding="utf-8")
    words = ["generate", str(exported[family]), "--context", str(book), "--prompt", "Who", "--max-new-tokens", "9"]
    assert run_command(words) == 0
    printed = capsys.readouterr().out
    model = LocalTextModel(load_exported(exported[family]).eval(), ByteTokenizer(), 1, 512)
    whole = model.generate([f"{book.read_text()}\nWho"], GenerationSettings(max_new_tokens=9))[0]
    assert printed == whole + "\n"
    pieces = list(model.stream(f"{book.read_text()}\nWho", GenerationSettings(max_new_tokens=9)))
    assert "".join(pieces) == whole


def test_verify_takes_a_folder_of_save_pretrained_which_has_no_manifest_and_no_tokenizer(
    exported: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_exported(exported["hope"])
    save_pretrained(model, model.config, tmp_path / "saved")  # type: ignore[arg-type]
    assert run_command(["verify", str(tmp_path / "saved")]) == 0
    assert capsys.readouterr().out.count("holds") == CHECKS
    assert run_command(["generate", str(tmp_path / "saved"), "--prompt", "x"]) == 2
    assert "tokenizer" in capsys.readouterr().err
    ByteTokenizer().save(tmp_path / "saved" / TOKENIZER_NAME)
    assert run_command(["generate", str(tmp_path / "saved"), "--prompt", "x", "--max-new-tokens", "2"]) == 0


def test_verify_reads_the_step_of_gradual_pruning_from_the_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = {"schedule": "gradual", "end_step": 100, "every_steps": 10, "sparsity": 0.5}
    content = yaml.safe_load((CONFIGS / "hsmn_debug.yaml").read_text())
    config = TypeAdapter(ModelConfig).validate_python({**content, "pruning": schedule})
    torch.manual_seed(0)
    model = build_model(config)
    names = model.prunable_parameters()
    # 38 steps were done; the last masks are those behind step 30.
    apply_masks(model, compute_masks(dict(model.named_parameters()), names, config.pruning, 30))  # type: ignore[union-attr]
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_weights(weights, config, tmp_path / "weights", {"step": 38})
    assert run_command(["verify", str(tmp_path / "weights")]) == 0
    assert run_command(["verify", str(tmp_path / "weights"), "--step", "100"]) == 1
    assert "scheduled" in capsys.readouterr().out


def test_generate_says_what_it_does_not_read_and_reads_it_when_asked(
    exported: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    book = tmp_path / "book.txt"
    book.write_text("key 7. " + "noise " * 120, encoding="utf-8")
    words = ["generate", str(exported["hope"]), "--context", str(book), "--prompt", "?", "--max-new-tokens", "4"]
    text = f"{book.read_text()}\n?"
    assert run_command(words) == 0
    cut = capsys.readouterr()
    assert f"of the {len(text)} context tokens the last 512" in cut.err and "--max-context-tokens" in cut.err
    assert run_command([*words, "--max-context-tokens", "2000"]) == 0
    whole = capsys.readouterr()
    assert whole.err == ""
    model = LocalTextModel(load_exported(exported["hope"]), ByteTokenizer(), 1, 2000)
    assert whole.out == model.generate([text], GenerationSettings(max_new_tokens=4))[0] + "\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_sparse_kernels_without_a_gpu_are_a_message(
    exported: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["generate", str(exported["hsmn"]), "--prompt", "x", "--sparse-kernels"]) == 2
    text = capsys.readouterr().err
    assert "on cpu" in text and "allowed:" in text and "do:" in text


def test_what_generate_cannot_read_is_a_message(
    exported: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, problem in (
        (["--context", str(tmp_path / "absent.txt")], "absent.txt"),
        ([], "no prompt and no context"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
    ):
        assert run_command(["generate", str(exported["hsmn"]), *words]) == 2
        text = capsys.readouterr().err
        assert problem in text and "allowed:" in text and "do:" in text and "Traceback" not in text
