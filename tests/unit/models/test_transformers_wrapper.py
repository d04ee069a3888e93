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
    assert torch.equal(new[:, :-1], tokens)
    assert torch.equal(new[:, -1], out.logits[:, -1].argmax(-1))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_neither_logits_nor_loss_nor_text(tmp_path, side):
    from hsmn_dist.models.transformers_wrapper import HopeForCausalLM, HsmnForConditionalGeneration

    tokens, mask = torch.randint(4, 29, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    place = slice(0, 4) if side == "left" else slice(5, 9)
    real = slice(4, 9) if side == "left" else slice(0, 5)
    tokens[1, place], mask[1, place] = 0, 0
    model = HopeForCausalLM.from_run(exported(hope_models.tiny_config(), tmp_path / "hope"))
    alone = model(tokens[1:, real], labels=tokens[1:, real])
    out = model(tokens, mask, labels=tokens)
    torch.testing.assert_close(out.logits[1, real], alone.logits[0])
    torch.testing.assert_close(model(tokens[1:], mask[1:], labels=tokens[1:]).loss, alone.loss)
    new = model.generate(tokens, mask, max_new_tokens=3, eos_token_id=-1)
    assert torch.equal(new[1, 9:], model.generate(tokens[1:, real], max_new_tokens=3, eos_token_id=-1)[0, 5:])
    hsmn = HsmnForConditionalGeneration.from_run(exported(tiny_config(vocab_size=29), tmp_path / "hsmn"))
    labels = torch.randint(4, 29, (2, 4))
    torch.testing.assert_close(hsmn(tokens, mask, labels).logits[1], hsmn(tokens[1:, real], None, labels[1:]).logits[0])


def test_the_end_of_a_row_is_written_as_transformers_write_it(tmp_path):
    from hsmn_dist.models.transformers_wrapper import HopeForCausalLM

    model = HopeForCausalLM.from_run(exported(hope_models.tiny_config(), tmp_path))
    tokens = torch.randint(4, 29, (1, 5))
    free = model.generate(tokens, max_new_tokens=4, eos_token_id=-1)[0, 5:].tolist()
    ended = model.generate(tokens, max_new_tokens=4, eos_token_id=free[0], pad_token_id=0)
    assert ended[0, 5:].tolist() == free[:1]


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_auto_classes_find_both_models_and_a_tied_head_stays_one_parameter(tmp_path, is_tied):
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from hsmn_dist.models.transformers_wrapper import HopeForCausalLM, HsmnForConditionalGeneration

    folder = exported(hope_models.tiny_config(ties_embeddings=is_tied), tmp_path / "ours")
    model = HopeForCausalLM.from_run(folder)
    model.save_pretrained(tmp_path / "theirs")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    tokens = torch.randint(4, 29, (2, 9))
    assert isinstance(again, HopeForCausalLM)
    assert (again.inner.head.weight is again.inner.embedding.weight) == is_tied
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=0, atol=0)
    hsmn = HsmnForConditionalGeneration.from_run(exported(tiny_config(ties_embeddings=is_tied), tmp_path / "hsmn"))
    hsmn.save_pretrained(tmp_path / "their_hsmn")
    assert isinstance(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "their_hsmn"), HsmnForConditionalGeneration)


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
