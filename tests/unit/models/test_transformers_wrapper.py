"""The optional transformers door (extra `hf`); skipped where transformers is absent."""

from __future__ import annotations

import pytest
import torch

from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.models.build import build_model
from hsmn_dist.models.pretrained import save_pretrained
from tests.support import hope_models
from tests.support.hsmn_models import batch, tiny_config

pytest.importorskip("transformers", reason="extra hf is not installed")


def exported(config, folder):
    torch.manual_seed(0)
    save_pretrained(build_model(config), config, folder)
    return folder


def test_hope_predicts_the_next_token_and_scores_as_transformers_do(tmp_path):
    from hsmn_dist.models.transformers_wrapper import HopeForCausalLM

    model = HopeForCausalLM.from_run(exported(hope_models.tiny_config(), tmp_path))
    tokens = torch.randint(4, 29, (2, 9))
    out = model(tokens, labels=tokens)
    assert out.logits.shape == (2, 9, 29)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    changed = tokens.clone()
    changed[:, 5:] = 4
    torch.testing.assert_close(model(changed).logits[:, :5], out.logits[:, :5])
    new = model.generate(tokens, max_new_tokens=1, eos_token_id=-1)
    assert torch.equal(new[:, 0], out.logits[:, -1].argmax(-1))


def test_hsmn_scores_labels_behind_its_context_and_survives_saving(tmp_path):
    from hsmn_dist.models.transformers_wrapper import HsmnForConditionalGeneration

    model = HsmnForConditionalGeneration.from_run(exported(tiny_config(), tmp_path / "ours"))
    inputs = batch([20, 5], [6, 3])
    labels = inputs.target_ids.masked_fill(~inputs.loss_mask, -100)
    out = model(inputs.context_ids, inputs.context_mask.long(), labels)
    expected = torch.nn.functional.cross_entropy(model.inner(inputs).logits[inputs.loss_mask], labels[inputs.loss_mask])
    torch.testing.assert_close(out.loss, expected)
    model.save_pretrained(tmp_path / "theirs")
    again = HsmnForConditionalGeneration.from_pretrained(tmp_path / "theirs").eval()
    torch.testing.assert_close(again(inputs.context_ids, inputs.context_mask.long(), labels).logits, out.logits)
    assert model.generate(inputs.context_ids, inputs.context_mask, max_new_tokens=3, eos_token_id=-1).shape == (2, 3)


def test_the_wrong_family_is_refused(tmp_path):
    from hsmn_dist.models.transformers_wrapper import HopeForCausalLM

    with pytest.raises(ModelError, match="family 'hsmn' for HopeForCausalLM"):
        HopeForCausalLM.from_run(exported(tiny_config(), tmp_path))
