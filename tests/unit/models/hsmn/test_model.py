"""What the parity tests do not cover: cost, training aids, start, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.foundation.param_role import ParamRole
from hsmn_dist.models.build import build_model
from hsmn_dist.models.contract import ModelInput, cross_entropy
from hsmn_dist.models.hsmn.model import HsmnModel
from tests.support.hsmn_models import assert_gradients_close, batch, gradients, tiny_config, tiny_model


def number_of_parameters(c) -> int:
    """The formula of the parameter count: token tables, head, encoder, compression, tree, codes, decoder."""
    d, ff, k, i, r = c.d_model, c.d_feed_forward, c.d_compressed, c.d_aggregator, c.aggregator_rank
    norm, attention = 2 * d, 4 * d * d + 3 * d
    feed_forward = 2 * d * ff + ff + d
    final_norm = norm if c.norm_placement == "pre" else 0
    tables = c.vocab_size * d * (2 if c.ties_embeddings else 3)
    encoder = (c.chunk_size + 1) * d + c.num_encoder_layers * (2 * norm + attention + feed_forward) + final_norm
    compression = d * k + k + k * d + d
    tree = (2 * k * r + r * i + i) + (i * r + r * k + k)
    codes = (48 + 32) * d if c.uses_level_embedding else 0
    decoder = c.max_target_tokens * d + c.num_decoder_layers * (3 * norm + 2 * attention + feed_forward) + final_norm
    return tables + encoder + compression + tree + codes + decoder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ties_embeddings": True, "norm_placement": "post"},
        {"uses_level_embedding": False, "d_compressed": 10, "aggregator_rank": 3, "chunk_size": 11, "d_aggregator": 7},
    ],
)
def test_parameter_count_follows_the_formula(changes):
    config = tiny_config(**changes)
    assert sum(p.numel() for p in HsmnModel(config).parameters()) == number_of_parameters(config)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_loss_at_step_0_is_ln_v(ties, placement):
    for seed in range(3):
        torch.manual_seed(seed)
        config = tiny_config(
            vocab_size=260, d_model=64, num_heads=4, d_feed_forward=128, ties_embeddings=ties, norm_placement=placement
        )
        inputs = batch([40, 33, 20, 9], [60, 60, 60, 60], vocab_size=260, seed=seed)
        nll = build_model(config).eval()(inputs, target_loss=cross_entropy).nll
        assert abs(float(nll.mean().detach()) / math.log(260) - 1) < 0.02


def test_names_roles_and_components_cover_every_parameter_once():
    model = tiny_model()
    names = [name for name, _ in model.named_parameters()]
    roles, components = model.parameter_roles(), model.parameter_components()
    assert len(set(names)) == len(names)
    assert set(roles) == set(components) == set(names)
    assert set(components.values()) == {
        "embedding", "encoder", "compressor", "aggregator", "decompressor", "decoder", "head"
    }  # fmt: skip
    assert [name for name, role in roles.items() if role is ParamRole.HEAD] == ["head.weight"]
    matrices = {name for name, role in roles.items() if role is ParamRole.MATRIX}
    assert all(dict(model.named_parameters())[name].dim() == 2 for name in matrices)
    assert "tree.aggregator.inner.first.weight" in matrices and "context_embedding.weight" not in matrices


def test_only_plain_modules_hold_parameters():
    allowed = (torch.nn.Linear, torch.nn.Embedding, torch.nn.LayerNorm)
    for name, module in tiny_model().named_modules():
        if list(module.parameters(recurse=False)):
            assert type(module) in allowed, name


def test_padding_chunks_and_padded_targets_cost_nothing(monkeypatch):
    model = tiny_model()
    encoded, scored = [], []
    model.encoder.register_forward_hook(lambda module, args, out: encoded.append(out.shape[0]))
    model.head.register_forward_hook(lambda module, args, out: scored.append(out.shape[0]))
    inputs = batch([60, 1, 0, 7], [9, 1, 2, 1])
    model(inputs, target_loss=cross_entropy)
    # 60 tokens fill all their chunks, 1 token one of its two, none none, 7 tokens two.
    assert encoded == [model.chunker.num_chunks(60) + 1 + 0 + 2]
    assert scored == [13]


def test_the_last_encoder_layer_computes_the_cls_row_alone():
    model = tiny_model()
    shapes = []
    for layer in model.encoder.layers:
        layer.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape[1:])))
    model(batch([60], [3]))
    assert shapes == [(7, 16), (1, 16)]


@pytest.mark.parametrize("recompute", ["none", "attention", "sublayers", "all"])
@pytest.mark.parametrize(("group", "placement"), [(1, "pre"), (4, "post"), (100, "pre")])
def test_encoding_in_groups_changes_nothing(group, placement, recompute):
    inputs = batch([60, 0, 33], [5, 4, 3])
    whole = tiny_model(norm_placement=placement)
    grouped = tiny_model(norm_placement=placement, encoder_group_chunks=group, encoder_recompute=recompute)
    first = gradients(whole, whole(inputs, target_loss=cross_entropy).nll.sum())
    second = gradients(grouped, grouped(inputs, target_loss=cross_entropy).nll.sum())
    assert_gradients_close(second, first, tolerance=1e-6)


def test_a_token_of_overlapping_chunks_is_looked_up_once():
    model = tiny_model(encoder_group_chunks=2)
    looked_up = []
    model.context_embedding.register_forward_hook(lambda module, args, out: looked_up.append(args[0]))
    ids = torch.tensor([[5, 6, 5, 7, 6, 5, 7, 8, 5, 6], [5, 5, 5, 5, 9, 9, 9, 9, 9, 9]])
    model.read_context(ids, torch.ones_like(ids, dtype=torch.bool))
    # Four tokens of the first row and two of the second, and padding once in each.
    assert sorted(looked_up[0].tolist()) == [0, 0, 5, 5, 6, 7, 8, 9]


def largest_tensor_in_backward(model, inputs):
    """Elements of the largest tensor that the backward pass forms."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.largest = max(self.largest, out.numel())
            return out

    loss = model(inputs, target_loss=cross_entropy).nll.sum()
    with Sizes() as sizes:
        loss.backward()
    return sizes.largest


@pytest.mark.parametrize("recompute", ["none", "attention", "sublayers", "all"])
def test_no_tensor_of_the_backward_pass_grows_with_the_number_of_groups(recompute):
    model = tiny_model(encoder_group_chunks=8, encoder_recompute=recompute, d_feed_forward=256).train()
    short, long = (largest_tensor_in_backward(model, batch([n], [4])) for n in (100, 400))
    assert long == short


def wrap_blocks(model):
    """Activation checkpointing from outside, as training does it."""
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda *args, inner=forward: checkpoint(inner, *args, use_reentrant=False)


def seeded_loss(model, inputs):
    torch.manual_seed(7)
    losses = model(
        inputs,
        target_loss=lambda logits, labels, *_: torch.nn.functional.cross_entropy(logits, labels, reduction="none"),
    )
    return losses.nll.sum()


@pytest.mark.parametrize(
    ("group", "recompute"), [(0, "all"), (3, "all"), (3, "sublayers"), (3, "attention"), (3, "none")]
)
def test_gradients_with_dropout_under_activation_checkpointing_equal_finite_differences(group, recompute):
    model = tiny_model(
        encoder_dropout=0.3, decoder_dropout=0.3, encoder_group_chunks=group, encoder_recompute=recompute
    ).train()
    if recompute == "all":
        wrap_blocks(model)
    inputs = batch([30, 7], [6, 4])
    found = gradients(model, seeded_loss(model, inputs))
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    for name in sorted(parameters)[::5]:
        parameter = parameters[name]
        index = int(torch.randint(parameter.numel(), (), generator=generator))
        flat, step = parameter.data.view(-1), 1e-6
        start = float(flat[index])
        with torch.no_grad():
            flat[index] = start + step
            above = float(seeded_loss(model, inputs))
            flat[index] = start - step
            below = float(seeded_loss(model, inputs))
            flat[index] = start
        difference = (above - below) / (2 * step)
        assert abs(difference - float(found[name].view(-1)[index])) < 1e-6 * max(1.0, abs(difference)), name


def test_dropout_is_on_in_training_and_off_in_evaluation():
    model = tiny_model(decoder_dropout=0.5)
    inputs = batch([30], [6])
    assert torch.equal(model(inputs).logits, model(inputs).logits)
    model.train()
    assert not torch.equal(model(inputs).logits, model(inputs).logits)


def test_bf16_autocast_is_close_to_fp32_and_gives_finite_gradients():
    model = tiny_model().float()
    inputs = batch([30, 0], [6, 4])
    exact = model(inputs, target_loss=cross_entropy).nll
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(inputs, target_loss=cross_entropy).nll
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.1)
    assert all(torch.isfinite(g).all() for g in gradients(model, rough.sum()).values())


def test_whole_model_in_bf16_runs_forward_and_backward():
    model = tiny_model().to(torch.bfloat16)
    nll = model(batch([30, 0], [6, 4]), target_loss=cross_entropy).nll
    assert nll.dtype == torch.float32
    assert all(torch.isfinite(g).all() for g in gradients(model, nll.sum()).values())


def refusal(call) -> ModelError:
    with pytest.raises(ModelError) as caught:
        call()
    assert caught.value.allowed and caught.value.action
    return caught.value


def test_bad_inputs_are_refused_with_three_parts():
    model = tiny_model(max_target_tokens=8)
    good = batch([9], [4])
    inputs = ModelInput(good.context_ids, good.context_mask, good.target_ids, good.loss_mask, good.target_ids)
    assert "segment_ids" in refusal(lambda: model(inputs)).found
    empty = good.target_ids[:, :0]
    assert "empty target" in refusal(
        lambda: model(ModelInput(good.context_ids, good.context_mask, empty, empty.bool()))
    ).found  # fmt: skip
    assert "9 tokens" in refusal(lambda: model(batch([9], [9]))).found
    beyond = ModelInput(good.context_ids + 31, good.context_mask, good.target_ids, good.loss_mask)
    assert "token id" in refusal(lambda: model(beyond)).found
    negative = ModelInput(good.context_ids, good.context_mask, good.target_ids - 40, good.loss_mask)
    assert "token id -" in refusal(lambda: model(negative)).found
    two = batch([9, 9], [4, 4])
    mixed = ModelInput(two.context_ids, two.context_mask, good.target_ids, good.loss_mask)
    assert "2 contexts for 1 targets" in refusal(lambda: model(mixed)).found
    _, state = model.start(good.context_ids, good.context_mask)
    assert "batch size 1 for 2" in refusal(lambda: model.advance(torch.tensor([4, 4]), state)).found
    assert "batch size 1 for 2" in refusal(lambda: model(two, state)).found
    assert "start() or advance()" in refusal(lambda: model(good, state)).found
    wrong = ModelInput(good.context_ids, good.context_mask[:, :3], good.target_ids, good.loss_mask)
    assert "with a mask [1, 3]" in refusal(lambda: model(wrong)).found


def test_generation_beyond_the_position_table_is_refused():
    model = tiny_model(max_target_tokens=3)
    with torch.no_grad():
        _, state = model.start(*[batch([9], [1]).context_ids, batch([9], [1]).context_mask])
        for _ in range(2):
            _, state = model.advance(torch.tensor([4]), state)
        assert "4 tokens" in refusal(lambda: model.advance(torch.tensor([4]), state)).found


def test_heads_that_do_not_divide_the_width_are_refused():
    assert "3 heads for a width of 16" in refusal(lambda: HsmnModel(tiny_config(num_heads=3))).found


@pytest.mark.slow
def test_compiles_into_one_graph_for_fixed_shapes():
    torch.manual_seed(0)
    model = build_model(tiny_config()).eval()
    inputs = batch([40, 40], [6, 6])
    compiled = torch.compile(lambda x: model(x, target_loss=cross_entropy).nll, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), model(inputs, target_loss=cross_entropy).nll)
