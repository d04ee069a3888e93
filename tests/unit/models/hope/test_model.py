"""HopeModel behind the contract: layout, causality, isolation, caches, streams, packing, init."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hsmn_dist.config.models import HopeConfig
from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.models.contract import ModelInput, cross_entropy
from hsmn_dist.models.hope.model import HOPE, HopeModel
from tests.support.hope_models import batch, chain, row, small_memories, tiny_config, tiny_model

VARIANTS = {
    "attention": {},
    "attention_learned_positions": {"positions": "learned", "max_tokens": 64},
    "linear": {"mixer": "linear"},
    "no_cms": {"uses_cms": False},
    "no_mlp": {"uses_mlp": False},
    "tied": {"ties_embeddings": True},
    "self_modifying": {"mixer": "self_modifying", "self_modifying": small_memories()},
    "self_modifying_momentum": {
        "mixer": "self_modifying",
        "self_modifying": small_memories(momentum=0.8, adapts_query=True, objective="half_l2"),
    },
    "self_modifying_two_chunk_sizes": {"mixer": "self_modifying", "self_modifying": small_memories(chunk_tokens=8)},
    "self_modifying_slow_memory": {"mixer": "self_modifying", "self_modifying": small_memories(chunk_tokens=2)},
    "self_modifying_keys_every_token": {
        "mixer": "self_modifying",
        "self_modifying": small_memories(chunk_tokens=1, memory_chunk_tokens=3),
    },
    "self_modifying_memory_every_token": {
        "mixer": "self_modifying",
        "self_modifying": small_memories(chunk_tokens=3, memory_chunk_tokens=1),
    },
    "self_modifying_matrix": {"mixer": "self_modifying", "self_modifying": small_memories(memory="matrix")},
    "self_modifying_reads_at_chunk": {"mixer": "self_modifying", "self_modifying": small_memories(reads_at="chunk")},
    "chain": {"cms": chain()},
    "chain_nested": {"cms": chain(variant="nested")},
    "chain_independent_linear": {"cms": chain((3, 6, 0), variant="independent"), "mixer": "linear"},
    "chain_by_depth_without_mlp": {"cms": chain((4, 0), spread="by_depth"), "uses_mlp": False},
    "chain_stopped_writes": {"cms": chain(writes="stop_gradient", objective="dot")},
    "chain_optimizer": {"cms": chain((1, 4), cadence="optimizer")},
    "chain_optimizer_independent": {"cms": chain((1, 4), cadence="optimizer", variant="independent")},
}
every_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())


def _close(left, right, tolerance=1e-10):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@every_variant
def test_every_row_of_a_mixed_batch_equals_the_row_alone(changes):
    model, inputs = tiny_model(**changes), batch([7, 0, 3], [5, 6, 1])
    logits = model(inputs).logits
    for index in range(3):
        alone = row(inputs, index)
        _close(logits[index : index + 1, : alone.target_ids.shape[1]], model(alone).logits)


@every_variant
def test_logits_depend_on_the_whole_context_and_on_earlier_targets_only(changes):
    model, inputs = tiny_model(**changes), batch([6], [7])
    before = model(inputs).logits
    for position in range(7):
        inputs.target_ids[0, position] = (inputs.target_ids[0, position] + 1) % 29
        after = model(inputs).logits
        assert torch.equal(before[:, : position + 1], after[:, : position + 1])
        if position < 6:
            assert (before[:, position + 1] - after[:, position + 1]).abs().max() > 1e-9
        before = after
    inputs.context_ids[0, 0] = 5 if inputs.context_ids[0, 0] != 5 else 6
    assert (model(inputs).logits[:, -1] - before[:, -1]).abs().max() > 1e-12


@every_variant
def test_nll_of_scored_positions_equals_cross_entropy_of_the_logits(changes):
    model, inputs = tiny_model(**changes), batch([4, 2], [5, 3])
    inputs.loss_mask[0, 1] = False
    logits = model(inputs).logits
    nll = model(inputs, target_loss=cross_entropy).nll
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), inputs.target_ids.flatten(), reduction="none"
    )
    _close(nll, expected.reshape(2, 5) * inputs.loss_mask, 1e-6)


@every_variant
def test_cached_decoding_equals_the_parallel_pass(changes):
    model, inputs = tiny_model(**changes), batch([9, 0, 4], [6, 6, 6])
    expected = model(inputs).logits
    logits, state = model.start(inputs.context_ids, inputs.context_mask)
    for step in range(6):
        _close(logits, expected[:, step])
        logits, state = model.advance(inputs.target_ids[:, step], state)


@every_variant
def test_a_stream_cut_into_segments_with_carried_state_equals_the_whole(changes):
    model, inputs = tiny_model(**changes), batch([0, 0], [13, 13])
    whole = model(inputs, model.initial_state(2))
    state, parts = model.initial_state(2), []
    for start, stop in ((0, 1), (1, 6), (6, 13)):
        piece = ModelInput(
            inputs.context_ids, inputs.context_mask, inputs.target_ids[:, start:stop], inputs.loss_mask[:, start:stop]
        )
        out = model(piece, state)
        parts.append(out.logits)
        state = out.state.detach()
    _close(torch.cat(parts, 1), whole.logits)
    for left, right in zip(state.tensors(), whole.state.tensors(), strict=True):
        _close(left.double(), right.double())


@every_variant
def test_a_stream_with_pieces_that_are_all_padding_for_a_row_equals_the_row_alone(changes):
    """Row 0 is always there; row 1 pauses for the second piece; row 2 begins only in the third one."""
    model, lengths = tiny_model(**changes), torch.tensor([[4, 3, 5], [2, 0, 4], [0, 0, 5]])
    empty = torch.zeros(3, 0, dtype=torch.long)
    tokens = batch([0, 0, 0], [12, 12, 12]).target_ids
    state, read = model.initial_state(3), torch.zeros(3, dtype=torch.long)
    found = [[], [], []]
    for piece in range(3):
        width = int(lengths[:, piece].max())
        mask = torch.arange(width)[None] < lengths[:, piece, None]
        places = (read[:, None] + torch.arange(width)).clamp(max=11)
        out = model(ModelInput(empty, empty.bool(), tokens.gather(1, places) * mask, mask), state)
        for index in range(3):
            found[index].append(out.logits[index][mask[index]])
        state, read = out.state, read + lengths[:, piece]
    for index in range(3):
        target = tokens[index : index + 1, : int(read[index])]
        alone = ModelInput(empty[:1], empty[:1].bool(), target, torch.ones_like(target, dtype=torch.bool))
        expected = model(alone, model.initial_state(1))
        _close(torch.cat(found[index])[None], expected.logits)
        assert int(state.pending[index]) == int(target[0, -1])


def test_a_generation_goes_on_from_a_stream_and_reads_its_pending_token_first():
    model, inputs = tiny_model(cms=chain()), batch([5, 5], [7, 7])
    stream = ModelInput(inputs.context_ids, inputs.context_mask, inputs.target_ids[:, :3], inputs.loss_mask[:, :3])
    state, expected = model(stream, model.initial_state(2)).state, model(inputs).logits
    for step in range(3, 6):
        logits, state = model.advance(inputs.target_ids[:, step], state)
        _close(logits, expected[:, step + 1])


def test_only_padding_may_stand_beyond_the_learned_positions():
    model = tiny_model(positions="learned", max_tokens=8)
    inputs = batch([6, 0], [2, 8])  # 14 columns; no row is longer than 8
    for index in range(2):
        alone = row(inputs, index)
        found = model(inputs).logits[index : index + 1, : alone.target_ids.shape[1]]
        _close(found, model(alone).logits)
    with pytest.raises(ModelError, match="position 8"):
        model(batch([7, 0], [2, 8]))


def test_a_context_without_targets_leaves_its_last_token_pending():
    model = tiny_model()
    inputs, context = batch([3, 2], [2, 2]), batch([3, 2], [1, 1])
    nothing = ModelInput(
        context.context_ids, context.context_mask, context.target_ids * 0, torch.zeros(2, 1, dtype=torch.bool)
    )
    state = model(nothing, model.initial_state(2)).state
    rest = ModelInput(inputs.context_ids[:, :0], inputs.context_mask[:, :0], inputs.target_ids, inputs.loss_mask)
    inputs.context_ids, inputs.context_mask = context.context_ids, context.context_mask
    _close(model(rest, state).logits, model(inputs).logits)


@every_variant
def test_segments_of_a_packed_row_equal_the_segments_alone(changes):
    model, alone = tiny_model(**changes), batch([0, 0, 0], [3, 7, 2])
    pieces = [row(alone, index).target_ids for index in range(3)]
    target = torch.cat([*pieces, torch.zeros(1, 2, dtype=torch.long)], 1)
    segments = torch.tensor([[1] * 3 + [2] * 7 + [3] * 2 + [0] * 2])
    empty = torch.zeros(1, 0, dtype=torch.long)
    packed = model(ModelInput(empty, empty.bool(), target, segments > 0, segments)).logits
    start = 0
    for piece in pieces:
        width = piece.shape[1]
        expected = model(ModelInput(empty, empty.bool(), piece, piece > 0)).logits
        _close(packed[:, start : start + width], expected)
        start += width


@every_variant
def test_gradient_reaches_every_parameter_and_rows_without_targets_are_harmless(changes):
    model, inputs = tiny_model(**changes), batch([5, 3, 0], [6, 4, 5])
    inputs.loss_mask[1] = False
    model(inputs, target_loss=cross_entropy).nll.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    model.zero_grad()
    inputs.loss_mask[:] = False
    nll = model(inputs, target_loss=cross_entropy).nll
    assert nll.shape == (3, 6) and float(nll.detach().sum()) == 0.0
    nll.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@every_variant
def test_recomputed_blocks_give_the_same_gradients_with_dropout_on(changes):
    model, inputs = tiny_model(**changes, dropout=0.3).train(), batch([5, 3], [6, 4])

    def gradients():
        torch.manual_seed(11)
        model.zero_grad()
        model(inputs, target_loss=cross_entropy).nll.sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    for block in model.blocks:
        inner = block.forward
        block.forward = lambda *args, inner=inner: checkpoint(inner, *args, use_reentrant=False)
    for left, right in zip(plain, gradients(), strict=True):
        assert torch.equal(left, right)


@every_variant
@pytest.mark.parametrize("d_model", [64, 256])
def test_loss_of_a_fresh_model_is_ln_v_within_five_percent(changes, d_model):
    torch.manual_seed(3)
    model = HopeModel(tiny_config(**{**changes, "d_model": d_model, "num_heads": 4, "vocab_size": 4096}))
    inputs = batch([20, 10], [20, 20], vocab_size=4096)
    nll = model(inputs, target_loss=cross_entropy).nll
    assert float(nll[inputs.loss_mask].mean()) == pytest.approx(math.log(4096), rel=0.05)


@every_variant
def test_every_parameter_has_a_role_and_a_component(changes):
    model = tiny_model(**changes)
    names = {name for name, _ in model.named_parameters()}
    assert set(model.parameter_roles()) == names == set(model.parameter_components())
    expected = {"embedding", "mixer", "cms", "mlp", "head"}
    expected -= {"cms"} if changes.get("uses_cms") is False else set()
    expected -= {"mlp"} if changes.get("uses_mlp") is False else set()
    assert set(model.parameter_components().values()) == expected


def test_use_cms_false_removes_exactly_the_cms_parameters():
    torch.manual_seed(0)
    names = {n for n, _ in HOPE(29, 16, 2, 2, use_cms=True).named_parameters()}
    without = {n for n, _ in HOPE(29, 16, 2, 2, use_cms=False).named_parameters()}
    assert names - without == {n for n in names if ".cms" in n} != set()


def test_the_simple_interface_trains_and_generates():
    torch.manual_seed(0)
    model = HOPE(vocab_size=29, dim=16, num_layers=1, num_heads=2, num_memory_modules=5, use_cms=True)
    tokens = torch.randint(0, 29, (2, 9))
    logits, loss = model(tokens, tokens)
    assert logits.shape == (2, 9, 29) and float(loss) == pytest.approx(math.log(29), rel=0.05)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    _close(loss, expected, 1e-6)
    _close(model(tokens[:, :-1], tokens[:, 1:], targets_are_shifted=True)[1], loss, 1e-5)
    assert model(tokens)[1] is None
    written = model.generate(tokens, max_new_tokens=7, temperature=0.8)
    assert written.shape == (2, 16) and torch.equal(written[:, :9], tokens)


def test_greedy_generation_of_the_simple_interface_equals_repeated_full_passes():
    torch.manual_seed(1)
    model = HOPE(vocab_size=29, dim=16, num_layers=2, num_heads=2)
    tokens = torch.randint(0, 29, (2, 5))
    written = model.generate(tokens, max_new_tokens=6, temperature=0.0)
    for _ in range(6):
        tokens = torch.cat([tokens, model(tokens)[0][:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(written, tokens)


def test_bad_inputs_get_the_three_part_message():
    model, inputs = tiny_model(), batch([3, 2], [4, 4])
    out_of_range = batch([3, 2], [4, 4])
    out_of_range.context_ids[0, 0] = 29
    no_target = ModelInput(inputs.context_ids, inputs.context_mask, inputs.target_ids[:, :0], inputs.loss_mask[:, :0])
    for bad in (out_of_range, no_target):
        with pytest.raises(ModelError) as error:
            model(bad)
        assert error.value.found and error.value.allowed and error.value.action
    _, state = model.start(inputs.context_ids, inputs.context_mask)
    with pytest.raises(ModelError, match="sequences"):
        model.advance(torch.tensor([4, 4, 4]), state)
    with pytest.raises(ModelError, match="positions"):
        tiny_model(positions="learned", max_tokens=4)(inputs)
    with pytest.raises(ModelError, match="num_heads"):
        HOPE(vocab_size=29, dim=10, num_heads=3, num_layers=1)


def test_the_simple_interface_scores_nothing_as_zero_without_gradient():
    model = HOPE(vocab_size=29, dim=16, num_layers=1, num_heads=2)
    tokens = torch.randint(0, 29, (2, 5))
    _, loss = model(tokens, torch.full_like(tokens, -100))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_bad_arguments_of_the_simple_interface_get_the_three_part_message():
    model = HOPE(vocab_size=29, dim=16, num_layers=1, num_heads=2).train()
    tokens = torch.randint(0, 29, (2, 5))
    for call, words in (
        (lambda: model(tokens[:, :1], tokens[:, :1]), "one token"),
        (lambda: model(tokens, tokens.clamp(min=29)), "label 29"),
        (lambda: model(tokens, tokens[:, :4]), "targets of shape"),
        (lambda: model(tokens, tokens[:1]), "targets of shape"),
        (lambda: model(tokens, tokens.float()), "targets of shape"),
        (lambda: model(tokens.float()), "tokens of shape"),
        (lambda: model(tokens[:0]), "tokens of shape"),
        (lambda: model(tokens[0]), "tokens of shape"),
        (lambda: model.generate(tokens[:, :0]), "tokens of shape"),
        (lambda: model.generate(tokens + 29), "vocabulary"),
        (lambda: model.generate(tokens, max_new_tokens=-1), "max_new_tokens"),
        (lambda: model.generate(tokens, temperature=float("nan")), "temperature"),
    ):
        with pytest.raises(ModelError, match=words) as error:
            call()
        assert error.value.found and error.value.allowed and error.value.action
        assert model.training and model.model.training
    assert torch.isfinite(model(tokens[:, :1], tokens[:, :1], targets_are_shifted=True)[1])


def test_heads_that_do_not_divide_the_width_are_refused_by_the_configuration():
    with pytest.raises(ValueError, match="num_heads"):
        HopeConfig(d_model=10, num_heads=3)


def test_permuting_the_batch_permutes_the_outputs():
    model, inputs = tiny_model(), batch([4, 4, 4], [5, 5, 5])
    order = torch.tensor([2, 0, 1])
    shuffled = ModelInput(inputs.context_ids[order], inputs.context_mask, inputs.target_ids[order], inputs.loss_mask)
    _close(model(shuffled).logits, model(inputs).logits[order])
