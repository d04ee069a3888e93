"""Text in and out of a model, and the decoding loop below it."""

from __future__ import annotations

import math

import pytest
import torch

from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.models.generation import GenerationSettings, generate_tokens
from hsmn_dist.models.text_model import LocalTextModel, cut_at_stop, held_back
from tests.support.hsmn_models import batch, tiny_model


class LetterTokenizer:
    """One id for each of the letters a to z, from 4 on; 30 is half of a character."""

    pad_id, bos_id, eos_id = 0, 1, 2

    def encode(self, text):
        return [4 + (ord(letter) - ord("a")) % 26 for letter in text]

    def decode(self, ids):
        return "".join("\ufffd" if i == 30 else chr(ord("a") + i - 4) for i in ids if i >= 4)


def text_model(**changes):
    return LocalTextModel(tiny_model(**changes), LetterTokenizer(), batch_examples=2)


PAIRS = [("hello", "abc"), ("", "zz"), ("averylongcontextindeed", "q"), ("x", ""), ("hi", "abcdefghijk")]


def test_likelihoods_equal_those_of_the_model_and_do_not_depend_on_the_batch():
    model = text_model()
    found = model.loglikelihood(PAIRS)
    for pair, result in zip(PAIRS, found, strict=True):
        ids = torch.tensor([model.tokenizer.encode(pair[0])], dtype=torch.int64).view(1, -1)
        target = torch.tensor([model.tokenizer.encode(pair[1])], dtype=torch.int64).view(1, -1)
        assert (result.num_tokens, result.num_bytes) == (len(pair[1]), len(pair[1]))
        if pair[1]:
            inputs = batch([1], [1])
            inputs.context_ids, inputs.context_mask = ids, torch.ones_like(ids, dtype=torch.bool)
            inputs.target_ids, inputs.loss_mask = target, torch.ones_like(target, dtype=torch.bool)
            log_probabilities = model.model(inputs).logits.log_softmax(-1)
            expected = -float(log_probabilities.gather(-1, target[..., None]).sum().detach())
            assert result.nll_sum == pytest.approx(expected, rel=1e-5)
            assert result.is_greedy == bool((log_probabilities.argmax(-1) == target).all())
        else:
            assert result.nll_sum == 0.0 and result.is_greedy


def test_the_greedy_continuation_is_greedy():
    model = text_model()
    (text,) = model.generate(["hello"], GenerationSettings(3))
    if len(text) == 3 and "\ufffd" not in text:
        assert model.loglikelihood([("hello", text)])[0].is_greedy
    other = "".join("a" if letter != "a" else "b" for letter in text) or "a"
    assert not model.loglikelihood([("hello", other)])[0].is_greedy


def test_eos_is_scored_when_asked():
    model = text_model()
    model.scores_eos = True
    (result,) = model.loglikelihood([("hello", "abc")])
    assert result.num_tokens == 4 and result.num_bytes == 3
    assert math.isfinite(result.nll_sum)


def test_a_target_beyond_the_model_is_scored_on_its_first_tokens():
    model = text_model(max_target_tokens=5)
    cut, whole = model.loglikelihood([("hello", "abcdefgh"), ("hello", "abcde")])
    assert cut == whole and cut.num_tokens == cut.num_bytes == 5


def test_long_contexts_lose_their_oldest_tokens():
    model = text_model()
    model.max_context_tokens = 4
    long, short = model.loglikelihood([("aaaaaaabcde", "xyz"), ("bcde", "xyz")])
    assert long.nll_sum == pytest.approx(short.nll_sum)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_does_not_depend_on_the_batch(temperature):
    model = text_model()
    settings = GenerationSettings(9, temperature=temperature, seed=3)
    prompts = ["hello", "", "averylongcontextindeed", "x", "hi"]
    pairs = model.generate(prompts, settings)
    model.batch_examples = 5
    assert model.generate(prompts, settings) == pairs


def test_generated_tokens_are_the_most_probable_of_the_full_pass():
    model = tiny_model()
    inputs = batch([20, 3], [1, 1])
    rows = generate_tokens(model, inputs.context_ids, inputs.context_mask, GenerationSettings(8), eos_id=-1)
    target = torch.tensor(rows)
    inputs.target_ids, inputs.loss_mask = target, torch.ones_like(target, dtype=torch.bool)
    assert torch.equal(model(inputs).logits.argmax(-1), target)


def test_stop_strings_end_the_text_and_are_not_part_of_it():
    model = text_model()
    plain = model.generate(["hello"], GenerationSettings(30, temperature=1.5, seed=1))[0]
    stop = plain[6:8]
    cut = model.generate(["hello"], GenerationSettings(30, temperature=1.5, seed=1, stop=(stop, "##")))[0]
    assert cut == plain[: plain.index(stop)]


@pytest.mark.parametrize("seed", range(6))
def test_the_stream_equals_the_text(seed):
    model = text_model()
    settings = GenerationSettings(25, temperature=2.0, seed=seed, stop=("ab", "q", "zzz"))
    pieces = list(model.stream("hello", settings))
    assert "".join(pieces) == model.generate(["hello"], settings)[0]
    assert all(pieces)


def test_pieces_hold_back_what_may_become_a_stop_string_or_half_a_character():
    assert held_back("good Q", ("Q:", "\n\n")) == 1
    assert held_back("good\n", ("Q:", "\n\n")) == 1
    assert held_back("good", ("Q:", "\n\n")) == 0
    assert held_back("good\ufffd", ()) == 1
    assert cut_at_stop("one two three", ("three", " two")) == "one"


def test_settings_that_cannot_be_are_refused():
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"stop": ("",)}):
        with pytest.raises(ModelError) as caught:
            GenerationSettings(**{"max_new_tokens": 5, **wrong})
        assert next(iter(wrong)) in caught.value.found


def test_new_tokens_are_bounded_by_the_position_table():
    model = text_model(max_target_tokens=4)
    assert len(model.generate(["hello"], GenerationSettings(50, temperature=1.0))[0]) <= 4
