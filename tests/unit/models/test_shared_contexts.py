"""Several targets after one context: the context is read once, and every loss stays what it was."""

from __future__ import annotations

import pytest
import torch

from hsmn_dist.models.contract import LanguageModel, ModelInput, cross_entropy
from hsmn_dist.models.text_model import LocalTextModel
from tests.support import hope_models, hsmn_models
from tests.support.byte_models import byte_text_model

MODELS = {
    "hsmn": lambda: hsmn_models.tiny_model().double(),
    "hope attention": lambda: hope_models.tiny_model(),
    "hope linear": lambda: hope_models.tiny_model(mixer="linear"),
    "hope self-modifying": lambda: hope_models.tiny_model(
        mixer="self_modifying", self_modifying=hope_models.small_memories()
    ),
    "hope chain memory": lambda: hope_models.tiny_model(cms=hope_models.chain()),
}
OWNERS = torch.tensor([0, 0, 1, 2, 2, 2, 0])


def shared(context_lengths: list[int]) -> tuple[ModelInput, torch.Tensor]:
    contexts = hope_models.batch(context_lengths, [1] * len(context_lengths), vocab_size=20)
    targets = hope_models.batch([1] * len(OWNERS), [3, 7, 1, 5, 2, 6, 4], seed=1, vocab_size=20)
    return ModelInput(contexts.context_ids, contexts.context_mask, targets.target_ids, targets.loss_mask), OWNERS


@pytest.mark.parametrize("context_lengths", [[13, 5, 9], [1, 2, 17], [6, 0, 3]])
@pytest.mark.parametrize("name", MODELS)
def test_losses_after_a_shared_context_equal_those_after_repeated_ones(name, context_lengths):
    model = MODELS[name]()
    inputs, owners = shared(context_lengths)
    with torch.no_grad():
        found = model.score_continuations(inputs, owners, cross_entropy).nll
        expected = LanguageModel.score_continuations(model, inputs, owners, cross_entropy).nll
    assert torch.count_nonzero(expected) == int(inputs.loss_mask.sum())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["hsmn", "hope"])
def test_a_question_with_four_answers_is_read_once(family, monkeypatch):
    model = byte_text_model(family, batch_examples=8)
    widths = []
    original = type(model.model).score_continuations

    def counted(self, inputs, owners, target_loss):
        widths.append((inputs.context_ids.shape[0], owners.numel()))
        return original(self, inputs, owners, target_loss)

    monkeypatch.setattr(type(model.model), "score_continuations", counted)
    pairs = [(f"question {number}?", answer) for number in range(2) for answer in ("one", "two", "three", "four!")]
    together = model.loglikelihood(pairs)
    assert widths == [(2, 8)]
    alone = [model.loglikelihood([pair])[0] for pair in pairs]
    assert widths == [(2, 8)], "a single pair takes the plain path"
    for one, other in zip(together, alone, strict=True):
        assert one.nll_sum == pytest.approx(other.nll_sum, rel=1e-5)
        assert (one.num_tokens, one.num_bytes, one.is_greedy) == (other.num_tokens, other.num_bytes, other.is_greedy)


def test_answers_come_back_in_the_order_asked_when_contexts_are_mixed():
    model: LocalTextModel = byte_text_model("hsmn", batch_examples=3)
    pairs = [("same length a", "x"), ("same length b", "xy"), ("same length a", "xyz"), ("same length b", "w")]
    for pair, found in zip(pairs, model.loglikelihood(pairs), strict=True):
        assert found.nll_sum == pytest.approx(model.loglikelihood([pair])[0].nll_sum, rel=1e-5)
