"""hsmn_hope: HSMN whose reasoning blocks carry a CMS, by configuration alone."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import TypeAdapter

from hsmn_dist.config.models import HsmnHopeConfig, ModelConfig
from hsmn_dist.models.build import build_model
from hsmn_dist.models.contract import cross_entropy
from hsmn_dist.models.hsmn.model import HsmnModel
from hsmn_dist.models.pretrained import from_pretrained, save_pretrained
from hsmn_dist.models.verify import verify_model
from tests.support.hsmn_models import assert_gradients_close, batch, gradients, tiny_config

LEVELS = ({"period": 2, "hidden_units": 8}, {"period": 4, "hidden_units": 8})
FORMS = {
    "decay": {},
    "tokens": {"form": "chain", "levels": LEVELS},
    "tokens_independent": {"form": "chain", "levels": LEVELS, "variant": "independent"},
    "optimizer": {"form": "chain", "cadence": "optimizer", "levels": LEVELS},
}
every_form = pytest.mark.parametrize("form", FORMS)


def hybrid(form, **changes) -> HsmnModel:
    settings = tiny_config(**changes).model_dump()
    config = HsmnHopeConfig(**{**settings, "family": "hsmn_hope", "cms": FORMS[form], "chunk_tokens": 3})
    torch.manual_seed(0)
    return build_model(config)


@every_form
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_every_invariant_holds(form, placement):
    results = verify_model(hybrid(form, norm_placement=placement))
    assert [result for result in results if not result.passed] == []


@every_form
def test_without_the_memory_it_is_plain_hsmn(form):
    model = hybrid(form).double().eval()
    plain = HsmnModel(tiny_config()).double().eval()
    plain.load_state_dict({name: p for name, p in model.state_dict().items() if ".cms" not in name})
    inputs = batch([20, 0], [6, 3])
    assert not torch.allclose(model(inputs).logits, plain(inputs).logits)
    for block in model.decoder.stack:
        block.cms.register_forward_hook(lambda module, args, out: (torch.zeros_like(out[0]), *out[1:]))
    torch.testing.assert_close(model(inputs).logits, plain(inputs).logits)


@every_form
def test_windows_carry_the_memory_in_values_and_gradients(form):
    model = hybrid(form, window_size=3).double().eval()
    inputs = batch([20, 0, 9], [11, 11, 11])
    loss = lambda logits, labels, *_: torch.nn.functional.cross_entropy(logits, labels, reduction="none")  # noqa: E731
    whole = gradients(model, model(inputs, target_loss=loss).nll.sum())
    split = gradients(model, model.forward_windows(inputs, target_loss=loss).nll.sum())
    assert_gradients_close(split, whole, tolerance=1e-9)


@every_form
def test_loss_at_step_0_is_ln_v_and_names_are_complete(form):
    model = hybrid(form, vocab_size=260, d_model=64, num_heads=4).eval()
    inputs = batch([40, 33], [60, 60], vocab_size=260)
    nll = model(inputs, target_loss=cross_entropy).nll
    assert abs(float(nll.mean().detach()) / math.log(260) - 1) < 0.03
    names = {name for name, _ in model.named_parameters()}
    assert set(model.parameter_roles()) == set(model.parameter_components()) == names
    assert {name for name, part in model.parameter_components().items() if part == "cms"} == {
        name for name in names if ".cms" in name
    }


def test_optimizer_cadence_gives_its_periods():
    model = hybrid("optimizer")
    updates = model.parameter_updates()
    assert set(updates.values()) == {(2, 1.0), (4, 1.0)}
    assert set(updates) <= {name for name, _ in model.named_parameters()}
    assert hybrid("decay").parameter_updates() == {}


def test_health_of_the_levels_comes_out():
    aux = hybrid("tokens")(batch([20], [9])).aux
    assert aux and all("/block_" in name for name in aux)


def test_the_family_is_chosen_by_its_name_and_survives_saving(tmp_path):
    values = {**tiny_config().model_dump(), "family": "hsmn_hope"}
    config = TypeAdapter(ModelConfig).validate_python(values)
    assert type(config) is HsmnHopeConfig
    model = build_model(config).eval()
    save_pretrained(model, config, tmp_path)
    inputs = batch([20, 0], [5, 3])
    assert torch.equal(model(inputs).logits, from_pretrained(tmp_path)(inputs).logits)
