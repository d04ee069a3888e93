"""What nobody should give a model, through every public door, for every family: an answer in three parts, or a right result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from hsmn_dist.config.load import load_run_config
from hsmn_dist.config.models import ModelConfig
from hsmn_dist.data.tokenizer import ByteTokenizer
from hsmn_dist.foundation.errors import HsmnError, ModelError
from hsmn_dist.models.build import build_model
from hsmn_dist.models.contract import LanguageModel, ModelInput, cross_entropy
from hsmn_dist.models.generation import GenerationSettings, generate_tokens
from hsmn_dist.models.pretrained import from_pretrained, save_pretrained
from hsmn_dist.models.text_model import LocalTextModel
from hsmn_dist.training.export import load_exported
from hsmn_dist.training.export import save_weights as save_exported

VOCAB_SIZE = 260
HSMN = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 16,
    "num_heads": 2,
    "d_feed_forward": 24,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "chunk_size": 6,
    "chunk_stride": 3,
    "d_compressed": 8,
    "d_aggregator": 12,
    "aggregator_rank": 5,
    "max_target_tokens": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "hsmn": {"family": "hsmn", **HSMN},
    "hsmn_hope": {"family": "hsmn_hope", **HSMN, "num_memory_modules": 2, "chunk_tokens": 4},
    "hope": {
        "family": "hope",
        "vocab_size": VOCAB_SIZE,
        "d_model": 16,
        "num_layers": 1,
        "num_heads": 2,
        "d_feed_forward": 24,
        "num_memory_modules": 2,
        "chunk_tokens": 4,
    },
}
every_family = pytest.mark.parametrize("family", FAMILIES)
with_chunks = pytest.mark.parametrize("family", ["hsmn", "hsmn_hope"])


def fresh(family: str, **changes: Any) -> LanguageModel:
    torch.manual_seed(0)
    return build_model(TypeAdapter(ModelConfig).validate_python({**FAMILIES[family], **changes})).eval()


def inputs_of(context: torch.Tensor, target: torch.Tensor) -> ModelInput:
    return ModelInput(context, torch.ones_like(context).bool(), target, torch.ones_like(target).bool())


def tokens(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(4, VOCAB_SIZE, (rows, columns), generator=torch.Generator().manual_seed(columns))


def refusal(call: Callable[[], Any]) -> HsmnError:
    with pytest.raises(HsmnError) as caught:
        call()
    error = caught.value
    assert error.found and error.allowed and error.action
    return error


def run_file(folder: Path, family: str, **changes: Any) -> Path:
    path = folder / "run.yaml"
    stages = [{"name": "one", "datasets": [{"name": "passkey"}]}]
    content = {"name": "tiny", "model": {**FAMILIES[family], **changes}, "tokenizer": {"kind": "bytes"}}
    data = {"max_target_tokens": 16}
    path.write_text(yaml.safe_dump({**content, "data": data, "curriculum": {"stages": stages}}))
    return path


def saved(folder: Path, family: str) -> Path:
    model = fresh(family)
    save_pretrained(model, model.config, folder)  # type: ignore[arg-type]
    return folder


def with_setting(folder: Path, name: str, value: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    return folder


@every_family
def test_heads_that_do_not_divide_the_width_are_refused_by_run_file_and_weights_folder(
    tmp_path: Path, family: str
) -> None:
    assert "model" in refusal(lambda: load_run_config(run_file(tmp_path, family, num_heads=3))).found
    folder = with_setting(saved(tmp_path / "weights", family), "num_heads", 3)
    assert "3" in refusal(lambda: from_pretrained(folder)).found


@with_chunks
def test_a_stride_larger_than_the_chunk_is_refused_by_run_file_model_and_weights_folder(
    tmp_path: Path, family: str
) -> None:
    error = refusal(lambda: load_run_config(run_file(tmp_path, family, chunk_stride=7)))
    assert "model.chunk_stride" in error.found and "7" in error.found
    assert "7" in refusal(lambda: fresh(family, chunk_stride=7)).found
    folder = with_setting(saved(tmp_path / "weights", family), "chunk_stride", 7)
    assert "7" in refusal(lambda: from_pretrained(folder)).found


def test_memories_whose_chunks_do_not_fit_each_other_are_refused_by_the_run_file(tmp_path: Path) -> None:
    bad = {"chunk_tokens": 4, "memory_chunk_tokens": 6}
    error = refusal(lambda: load_run_config(run_file(tmp_path, "hope", mixer="self_modifying", self_modifying=bad)))
    assert "memory_chunk_tokens" in f"{error.found} {error.allowed} {error.action}"


@every_family
@pytest.mark.parametrize("beyond", [VOCAB_SIZE, -1])
def test_token_ids_beyond_the_vocabulary_are_refused_wherever_they_enter(family: str, beyond: int) -> None:
    model, context, target = fresh(family), tokens(2, 9), tokens(2, 4)
    wrong_context, wrong_target = context.clone(), target.clone()
    wrong_context[1, 3] = wrong_target[0, 1] = beyond
    settings = GenerationSettings(max_new_tokens=2)
    mask = torch.ones_like(context).bool()
    _, state = model.start(context, mask)
    for call in (
        lambda: model(inputs_of(wrong_context, target)),
        lambda: model(inputs_of(context, wrong_target)),
        lambda: model(inputs_of(context, wrong_target), target_loss=cross_entropy),
        lambda: model.start(wrong_context, mask),
        lambda: generate_tokens(model, wrong_context, mask, settings),
        lambda: model.advance(torch.tensor([4, beyond]), state),
    ):
        assert str(beyond) in refusal(call).found


@every_family
def test_the_last_target_token_is_checked_although_no_model_reads_it(family: str) -> None:
    model, context, target = fresh(family), tokens(2, 9), tokens(2, 4)
    target[:, -1] = VOCAB_SIZE
    assert str(VOCAB_SIZE) in refusal(lambda: model(inputs_of(context, target), target_loss=cross_entropy)).found


@every_family
def test_a_tokenizer_with_more_ids_than_the_model_is_refused_by_the_run_file(tmp_path: Path, family: str) -> None:
    error = refusal(lambda: load_run_config(run_file(tmp_path, family, vocab_size=100)))
    assert "model.vocab_size" in error.found and "260" in error.action


@every_family
@pytest.mark.parametrize("length", [0, 1])
def test_a_context_of_length_zero_or_one_gives_finite_losses_gradients_and_text(family: str, length: int) -> None:
    model, inputs = fresh(family), inputs_of(tokens(2, length), tokens(2, 4))
    nll = model(inputs, target_loss=cross_entropy).nll
    assert nll is not None and bool(torch.isfinite(nll).all()) and float(nll.detach().min()) > 0
    nll.sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        logits, _ = model.start(inputs.context_ids, inputs.context_mask)
        whole = model(inputs).logits
    assert whole is not None
    torch.testing.assert_close(logits, whole[:, 0], rtol=1e-4, atol=1e-5)
    text_model = LocalTextModel(model, ByteTokenizer(), batch_examples=2, max_context_tokens=16)
    settings = GenerationSettings(max_new_tokens=3)
    assert len(text_model.generate(["a" * length, "ab"], settings)) == 2
    assert "".join(text_model.stream("a" * length, settings)) == text_model.generate(["a" * length], settings)[0]


@every_family
def test_an_empty_target_is_refused_by_the_model_and_scores_nothing_as_text(family: str) -> None:
    model, context = fresh(family), tokens(2, 9)
    error = refusal(lambda: model(inputs_of(context, tokens(2, 0))))
    assert isinstance(error, ModelError) and "target" in f"{error.found} {error.allowed} {error.action}"
    text_model = LocalTextModel(model, ByteTokenizer(), batch_examples=2, max_context_tokens=16)
    empty, other = text_model.loglikelihood([("abc", ""), ("abc", "d")])
    assert empty.nll_sum == 0 and empty.num_tokens == 0 and other.num_tokens == 1


@every_family
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused_on_load_by_name(tmp_path: Path, family: str, poison: float) -> None:
    path = saved(tmp_path, family) / "model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[-1]
    weights[name].view(-1)[0] = poison
    save_file(weights, path)
    model = fresh(family)
    exported = dict(model.named_parameters()) | {name: weights[name]}
    save_exported({n: t.detach() for n, t in exported.items()}, model.config, tmp_path / "exported", {})  # type: ignore[arg-type]
    for load in (lambda: from_pretrained(tmp_path), lambda: load_exported(tmp_path / "exported")):
        error = refusal(load)
        assert "not finite" in error.found and name in error.found


@every_family
def test_a_state_of_another_batch_size_is_refused_by_advance_and_forward(family: str) -> None:
    model, context = fresh(family), tokens(2, 9)
    _, state = model.start(context, torch.ones_like(context).bool())
    assert "3" in refusal(lambda: model.advance(torch.tensor([4, 5, 6]), state)).found
    three = inputs_of(tokens(3, 0) if family == "hope" else tokens(3, 9), tokens(3, 4))
    assert "3" in refusal(lambda: model(three, state)).found


@every_family
def test_no_state_and_a_state_of_another_family_are_refused(family: str) -> None:
    model, context = fresh(family), tokens(2, 9)
    other = fresh("hope" if family != "hope" else "hsmn")
    _, foreign = other.start(context, torch.ones_like(context).bool())
    for state in (None, foreign, torch.zeros(2), object()):
        error = refusal(lambda state=state: model.advance(torch.tensor([4, 5]), state))  # type: ignore[misc]
        assert type(state).__name__ in error.found
    assert type(foreign).__name__ in refusal(lambda: model(inputs_of(context, tokens(2, 4)), foreign)).found


@every_family
def test_a_state_behind_which_nothing_is_pending_is_refused_by_forward(family: str) -> None:
    model, context = fresh(family), tokens(2, 9)
    _, state = model.start(context, torch.ones_like(context).bool())
    assert "given to forward()" in refusal(lambda: model(inputs_of(tokens(2, 0), tokens(2, 4)), state)).found


@every_family
def test_ids_that_are_not_integers_are_refused_wherever_they_enter(family: str) -> None:
    model, context, target = fresh(family), tokens(2, 9), tokens(2, 4)
    mask = torch.ones_like(context).bool()
    _, state = model.start(context, mask)
    owners = torch.tensor([0, 1])
    for wrong in (torch.float32, torch.bool):
        for call in (
            lambda w=wrong: model(inputs_of(context.to(w), target)),
            lambda w=wrong: model(inputs_of(context, target.to(w))),
            lambda w=wrong: model.start(context.to(w), mask),
            lambda w=wrong: model.advance(torch.tensor([4, 5]).to(w), state),
            lambda w=wrong: model.score_continuations(inputs_of(context.to(w), target), owners, None),
        ):
            assert str(wrong) in refusal(call).found
    assert "[2, 1]" in refusal(lambda: model.advance(torch.tensor([[4], [5]]), state)).found


@every_family
def test_masks_of_another_batch_or_type_and_batches_without_rows_are_refused(family: str) -> None:
    model, context, target = fresh(family), tokens(2, 9), tokens(2, 4)
    mask, scored = torch.ones_like(context).bool(), torch.ones_like(target).bool()
    for call in (
        lambda: model(ModelInput(context, mask[:1], target, scored)),
        lambda: model(ModelInput(context, mask, target, scored[:1])),
        lambda: model(ModelInput(context, mask.long(), target, scored)),
        lambda: model(ModelInput(context[:1], mask[:1], target, scored)),
        lambda: model.start(context, mask[:1]),
        lambda: model.start(context, mask[:, :4]),
        lambda: model(inputs_of(context[:0], target[:0])),
        lambda: model.start(context[:0], mask[:0]),
        lambda: generate_tokens(model, context[:0], mask[:0], GenerationSettings(max_new_tokens=1)),
    ):
        assert isinstance(refusal(call), ModelError)


@every_family
def test_padding_in_front_of_a_context_is_refused_by_every_door(family: str) -> None:
    model, context, target = fresh(family), tokens(2, 9), tokens(2, 4)
    mask = torch.ones_like(context).bool()
    mask[1, :3] = False
    inputs = ModelInput(context, mask, target, torch.ones_like(target).bool())
    for call in (
        lambda: model(inputs),
        lambda: model(inputs, target_loss=cross_entropy),
        lambda: model.forward_windows(inputs),
        lambda: model.start(context, mask),
        lambda: generate_tokens(model, context, mask, GenerationSettings(max_new_tokens=1)),
        lambda: model.score_continuations(inputs, torch.tensor([0, 1]), cross_entropy),
    ):
        assert "row 1" in refusal(call).found


@every_family
def test_continuations_without_tokens_or_without_their_contexts_are_refused(family: str) -> None:
    model, context, target = fresh(family), tokens(2, 9), tokens(3, 4)
    owners = torch.tensor([0, 1, 1])
    score = model.score_continuations
    for call in (
        lambda: score(inputs_of(context, target[:, :0]), owners, cross_entropy),
        lambda: score(inputs_of(context, target), owners[:2], cross_entropy),
        lambda: score(inputs_of(context, target), owners + 1, cross_entropy),
        lambda: score(inputs_of(context, target), owners.float(), cross_entropy),
    ):
        assert "owners" in refusal(call).found


@with_chunks
@pytest.mark.parametrize("span", [0, 2])
@pytest.mark.parametrize("has_gradients", [False, True])
def test_a_state_that_was_advanced_is_refused_and_a_fork_goes_on(family: str, span: int, has_gradients: bool) -> None:
    model, context = fresh(family, attention_span_tokens=span), tokens(2, 9)
    with torch.set_grad_enabled(has_gradients):
        _, state = model.start(context, torch.ones_like(context).bool())
        fork = state.fork()
        token = torch.tensor([4, 5])
        expected, after = model.advance(token, state)
        for _ in range(2):
            assert "cache has gone on" in refusal(lambda: model.advance(token, state)).found
        torch.testing.assert_close(model.advance(token, fork)[0], expected)
        model.advance(token, after)
