from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hsmn_dist.foundation.errors import CheckpointError
from hsmn_dist.models.build import build_model
from hsmn_dist.models.pretrained import from_pretrained, save_pretrained
from tests.support import hope_models
from tests.support.hsmn_models import batch, tiny_config


def saved(folder, config=None):
    torch.manual_seed(0)
    config = config or tiny_config()
    model = build_model(config).eval()
    save_pretrained(model, config, folder)
    return model


@pytest.mark.parametrize("changes", [{}, {"ties_embeddings": True}, {"encoder_group_chunks": 2}])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, changes):
    model = saved(tmp_path / "model", tiny_config(**changes))
    again = from_pretrained(tmp_path / "model")
    assert again.config == model.config and not again.training
    for name, parameter in model.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], parameter)
    inputs = batch([20, 0], [5, 3])
    assert torch.equal(model(inputs).logits, again(inputs).logits)


HOPE_VARIANTS = [
    {},
    {"ties_embeddings": True},
    {"mixer": "self_modifying"},
    {"mixer": "linear", "positions": "learned"},
    {"mixer": "linear", "positions": "learned", "ties_embeddings": True},
]


@pytest.mark.parametrize("changes", HOPE_VARIANTS, ids=str)
def test_a_saved_hope_model_comes_back_bit_for_bit(tmp_path, changes):
    config = hope_models.tiny_config(**changes)
    model = saved(tmp_path, config)
    inputs = hope_models.batch([9, 3], [5, 3])
    again = from_pretrained(tmp_path)
    assert torch.equal(model(inputs).logits, again(inputs).logits)
    assert (again.head.weight is again.embedding.weight) == config.ties_embeddings
    assert {name for name, _ in again.named_parameters()} == {name for name, _ in model.named_parameters()}


def refusal(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(folder)
    assert caught.value.allowed and caught.value.action
    return caught.value.found


def test_damaged_weights_are_named_before_any_is_used(tmp_path):
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)

    def write(**changes):
        save_file({name: t for name, t in {**whole, **changes}.items() if t is not None}, path)

    poisoned = whole["compressor.weight"].clone()
    poisoned[0, 0] = float("nan")
    write(**{"compressor.weight": poisoned})
    assert "not finite: compressor.weight" in refusal(tmp_path)
    write(**{"compressor.bias": None})
    assert "missing: compressor.bias" in refusal(tmp_path)
    write(extra=torch.ones(2))
    assert "left over: extra" in refusal(tmp_path)
    write(**{"compressor.bias": torch.ones(3)})
    assert "compressor.bias [3] instead of [8]" in refusal(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    assert "cannot be read" in refusal(tmp_path)
    path.unlink()
    assert "no model.safetensors" in refusal(tmp_path)


def test_an_unknown_setting_is_named(tmp_path):
    saved(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "num_wings": 2}))
    assert "num_wings" in refusal(tmp_path)
    path.write_text(json.dumps([1, 2]))
    assert "holds a list" in refusal(tmp_path)
    path.write_text("{")
    assert "not valid JSON" in refusal(tmp_path)
    path.unlink()
    assert "no config.json" in refusal(tmp_path)
