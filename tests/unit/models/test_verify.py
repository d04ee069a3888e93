"""Every check passes on a sound model, and each one fails on the fault it is there for."""

from __future__ import annotations

import pytest
import torch

from hsmn_dist.config.models import HsmnHopeConfig
from hsmn_dist.models import pruning
from hsmn_dist.models.build import build_model
from hsmn_dist.models.hsmn.model import HsmnModel
from hsmn_dist.models.verify import verify_model
from tests.support import hope_models
from tests.support.hsmn_models import tiny_config, tiny_model


def failures(model, **settings) -> list[str]:
    return [result.name for result in verify_model(model, **settings) if not result.passed]


@pytest.mark.parametrize("changes", [{}, {"ties_embeddings": True, "attention_span_tokens": 3}])
def test_a_sound_hsmn_passes_every_check(changes):
    torch.manual_seed(0)
    model = build_model(tiny_config(**changes)).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    results = verify_model(model)
    assert len(results) == 7 and [r for r in results if not r.passed] == []
    assert model.training
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())


@pytest.mark.parametrize("changes", [{}, {"mixer": "linear"}])
def test_a_sound_hope_passes_every_check(changes):
    torch.manual_seed(0)
    assert failures(build_model(hope_models.tiny_config(**changes))) == []


SLOW = {"period": 64, "hidden_units": 8}, {"period": 256, "hidden_units": 8}
SOUND = {
    "default periods": {"cms": {"form": "chain", "levels": SLOW}},
    "nested, stopped": {"cms": hope_models.chain((8, 64), variant="nested", writes="stop_gradient")},
    "optimizer": {"cms": hope_models.chain((8, 64), cadence="optimizer")},
    "self-modifying": {"mixer": "self_modifying", "self_modifying": {"hidden_units": 5, "reads_at": "chunk"}},
    "keys at every token": {
        "mixer": "self_modifying",
        "self_modifying": hope_models.small_memories(chunk_tokens=1, memory_chunk_tokens=3),
    },
    "tied": {"ties_embeddings": True},
    **{f"{n} learned positions": {"positions": "learned", "max_tokens": n} for n in (2, 10, 45, 46)},
}


@pytest.mark.parametrize("changes", SOUND.values(), ids=SOUND.keys())
def test_a_sound_hope_with_slow_memories_or_few_positions_passes(changes):
    torch.manual_seed(0)
    model = build_model(hope_models.tiny_config(num_layers=1, **changes))
    assert [result for result in verify_model(model) if not result.passed] == []


def test_a_sound_hybrid_with_the_default_periods_passes():
    settings = tiny_config(num_decoder_layers=1, max_target_tokens=300).model_dump()
    torch.manual_seed(0)
    cms = {"form": "chain", "levels": SLOW}
    model = build_model(HsmnHopeConfig(**{**settings, "family": "hsmn_hope", "cms": cms}))
    assert [result for result in verify_model(model) if not result.passed] == []


@pytest.mark.parametrize("part", ["mixer", "cms"])
@pytest.mark.parametrize("changes", [{}, {"mixer": "linear"}, {"cms": hope_models.chain()}], ids=str)
def test_a_state_that_is_lost_between_segments_is_found(monkeypatch, changes, part):
    model = hope_models.tiny_model(num_layers=1, **changes)
    inner = getattr(model.layers[0], part)
    forward = inner.forward
    # Only where more than one token is read: generation does not see it.
    monkeypatch.setattr(inner, "forward", lambda x, state, info: forward(x, state if x.shape[1] == 1 else None, info))
    assert failures(model) == ["a target read in windows equals the whole"]


def test_a_leak_between_rows_of_a_cached_generation_is_found(monkeypatch):
    model = hope_models.tiny_model()
    advance = model.advance

    def leaking(token_ids, state):
        logits, state = advance(token_ids, state)
        return logits + 1e-3 * logits.mean(0, keepdim=True), state

    monkeypatch.setattr(model, "advance", leaking)
    assert "a row does not depend on its neighbours" in failures(model)


def test_nan_is_found():
    model = tiny_model()
    with torch.no_grad():
        model.compressor.weight[0, 0] = float("nan")
    results = verify_model(model)
    assert [r.passed for r in results] == [False] and "compressor.weight" in results[0].detail


def test_a_look_ahead_is_found(monkeypatch):
    model = tiny_model()
    block = model.decoder.stack[0]
    monkeypatch.setattr(block, "_attend", lambda x, cache: block.self_attention(x, cache=cache))
    assert "a target position does not depend on later ones" in failures(model)


def test_a_leak_between_rows_is_found(monkeypatch):
    model = tiny_model()
    decode = model.decoder.forward
    monkeypatch.setattr(
        model.decoder, "forward", lambda x, memory, mask: decode(x, memory + memory.mean(0, keepdim=True), mask)
    )
    found = failures(model)
    assert "a row does not depend on its neighbours" in found
    assert "a row alone equals the row in a padded batch" in found


def test_positions_that_restart_in_the_cache_are_found(monkeypatch):
    model = tiny_model()
    embed = model.decoder._embed
    monkeypatch.setattr(model.decoder, "_embed", lambda embedded, first: embed(embedded, 0))
    found = failures(model)
    assert "token by token equals the whole target" in found
    assert "a target read in windows equals the whole" in found


def test_a_parameter_without_gradient_is_found():
    model = tiny_model()
    model.forgotten = torch.nn.Linear(2, 2)
    (missed,) = [r for r in verify_model(model) if not r.passed]
    assert "forgotten.weight" in missed.detail


def pruned(step, **changes) -> HsmnModel:
    config = tiny_config(pruning={"sparsity": 0.5, **changes})
    torch.manual_seed(0)
    model = build_model(config)
    masks = pruning.compute_masks(
        dict(model.named_parameters()),
        model.prunable_parameters(),
        config.pruning,
        pruning.mask_step(config.pruning, step),
    )
    pruning.apply_masks(model, masks)
    return model


@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
def test_missing_sparsity_is_found(structure):
    torch.manual_seed(0)
    fresh = build_model(tiny_config(pruning={"schedule": "constant", "structure": structure}))
    assert "sparsity is as scheduled" in failures(fresh)
    # Ranks and widths of the tiny model are not multiples of four: columns behind the last full group stay.
    assert failures(pruned(0, schedule="constant", structure=structure)) == []


@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
@pytest.mark.parametrize("step", [10, 149, 150, 399, 450, 451, 900])
def test_gradual_pruning_is_as_scheduled_between_two_masks_too(step, structure):
    schedule = {"schedule": "gradual", "begin_step": 10, "end_step": 450, "every_steps": 100, "structure": structure}
    assert failures(pruned(step, **schedule), step=step) == []


def test_a_model_that_is_sparser_than_its_schedule_is_found():
    model = pruned(200, schedule="gradual", end_step=300)
    assert failures(model, step=200) == []
    assert failures(model, step=0) == ["sparsity is as scheduled"]
    with torch.no_grad():
        model.compressor.weight[:, :4] = 0.0
    assert failures(model, step=200) == ["sparsity is as scheduled"]
