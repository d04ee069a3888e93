"""The invariants of a language model, run on any weights, on a CPU: what `hsmn-dist verify CHECKPOINT` prints.

Unusual: the same checks for every family, on random tokens in float64, so a failure is a fault of the weights or of the code
and never of rounding. Long stacks are checked whole; inputs are as long as the slowest memory needs to be written once and read
behind it, so it takes seconds, and minutes where a period is thousands of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hsmn_dist.config.models import CmsConfig, HopeConfig, HsmnHopeConfig, PruningConfig
from hsmn_dist.models.contract import LanguageModel, ModelInput
from hsmn_dist.models.pruning import expected_zeros, is_two_four, mask_step, sparsity_at_step

FIRST_TEXT_ID = 4
NUM_ROWS = 3
NUM_TARGETS = 9
NUM_CHANGED_POSITIONS = 16
TOLERANCE = 1e-8
# Beside the masked weights a few may have become 0 by themselves; a hundredth of a matrix has not.
MOST_OTHER_ZEROS = 0.01


@dataclass(frozen=True)
class CheckResult:
    """One line of the table.

    Attributes:
        name: the invariant, as a statement.
        passed: whether it holds.
        detail: what was measured.
    """

    name: str
    passed: bool
    detail: str


def verify_model(model: LanguageModel, step: int | None = None, seed: int = 0) -> list[CheckResult]:
    """Run every invariant; the model comes back as it was (values, dtype, mode).

    Args:
        model: on the CPU.
        step: optimizer step (0-based) behind which the weights were taken, for the pruning schedule; None takes its end.
        seed: seed of the random tokens.
    """
    names = dict(model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in names.items()}
    was_training, dtypes = model.training, {name: parameter.dtype for name, parameter in names.items()}
    finite = _finite(model)
    results = [finite]
    if finite.passed:
        model.double().eval()
        try:
            inputs = _random_inputs(model, seed)
            checks: list[Callable[[LanguageModel, ModelInput], CheckResult]] = [
                _causal,
                _isolated,
                _padding_free,
                _cached,
                _windowed,
                _reached,
            ]
            results += [check(model, inputs) for check in checks]
        finally:
            model.zero_grad()
            with torch.no_grad():
                for name, parameter in names.items():
                    parameter.data = before[name].to(dtypes[name])
            model.train(was_training)
    results += _sparsity(model, step)
    return results


def _memory_span(config: object) -> int:
    """Tokens behind which every memory of the model has been written at least once."""
    cms = getattr(config, "cms", None)
    spans = [1]
    if isinstance(cms, CmsConfig) and getattr(config, "uses_cms", True):
        in_sequence = cms.form == "chain" and cms.cadence == "tokens"
        spans += [level.period for level in cms.levels] if in_sequence else [getattr(config, "chunk_tokens", 1)]
    if isinstance(config, HopeConfig) and config.mixer == "self_modifying":
        spans += [config.self_modifying.chunk_tokens, config.self_modifying.memory_chunk_tokens]
    return max(spans)


def _sizes(model: LanguageModel) -> tuple[int, int]:
    """Longest context and number of targets: no longer than the model's positions, and as long as its memories need."""
    config = getattr(model, "config", None)
    num_context, num_targets = 2 * getattr(config, "chunk_size", 16) + 5, NUM_TARGETS
    if isinstance(config, HsmnHopeConfig):  # memories over the target
        num_targets = max(num_targets, _memory_span(config) + NUM_TARGETS // 2)
    elif isinstance(config, HopeConfig):  # memories over the whole row; the slowest is written among the targets
        num_context = max(num_context, _memory_span(config) - NUM_TARGETS // 2)
        if config.positions == "learned":
            num_targets = max(1, min(num_targets, config.max_tokens // 2))
            num_context = min(num_context, config.max_tokens - num_targets)
    return num_context, min(num_targets, model.max_target_tokens or num_targets)


def _random_inputs(model: LanguageModel, seed: int) -> ModelInput:
    generator = torch.Generator().manual_seed(seed)
    low = min(FIRST_TEXT_ID, model.vocab_size - 1)
    width, num_targets = _sizes(model)
    chunk = getattr(getattr(model, "config", None), "chunk_size", 16)
    lengths = torch.tensor([width, 0, min(chunk // 2 + 1, width)])
    context = torch.randint(low, model.vocab_size, (NUM_ROWS, width), generator=generator)
    target = torch.randint(low, model.vocab_size, (NUM_ROWS, num_targets), generator=generator)
    mask = torch.arange(width)[None] < lengths[:, None]
    return ModelInput(context * mask, mask, target, torch.ones_like(target, dtype=torch.bool))


def _logits(model: LanguageModel, inputs: ModelInput) -> Tensor:
    with torch.no_grad():
        logits = model(inputs).logits
    assert logits is not None
    return logits


def _gap(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected number (at least 1)."""
    if found.numel() == 0:
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def _compared(name: str, gap: float) -> CheckResult:
    return CheckResult(name, gap <= TOLERANCE, f"largest difference {gap:.1e}")


def _finite(model: LanguageModel) -> CheckResult:
    bad = [name for name, parameter in model.named_parameters() if not bool(torch.isfinite(parameter).all())]
    detail = (
        f"NaN or infinite: {', '.join(bad[:3])}" if bad else f"{sum(p.numel() for p in model.parameters()):,} numbers"
    )
    return CheckResult("every weight is finite", not bad, detail)


def _changed(ids: Tensor, vocab_size: int) -> Tensor:
    low = min(FIRST_TEXT_ID, vocab_size - 1)
    return (ids - low + 1) % (vocab_size - low) + low


def _causal(model: LanguageModel, inputs: ModelInput) -> CheckResult:
    logits, gap = _logits(model, inputs), 0.0
    num_targets = inputs.target_ids.shape[1]
    positions = list(range(num_targets))
    if num_targets > NUM_CHANGED_POSITIONS:  # spread over a long target, the first and the last among them
        positions = sorted(
            {round(x * (num_targets - 1) / (NUM_CHANGED_POSITIONS - 1)) for x in range(NUM_CHANGED_POSITIONS)}
        )
    for position in positions:
        target = inputs.target_ids.clone()
        target[:, position:] = _changed(target[:, position:], model.vocab_size)
        other = ModelInput(inputs.context_ids, inputs.context_mask, target, inputs.loss_mask)
        gap = max(gap, _gap(_logits(model, other)[:, : position + 1], logits[:, : position + 1]))
    return _compared("a target position does not depend on later ones", gap)


def _isolated(model: LanguageModel, inputs: ModelInput) -> CheckResult:
    """One row stays and all others change, in the single pass and in generation with a cache."""
    whole, steps, gap = _logits(model, inputs), _stepped(model, inputs), 0.0
    for row in (0, NUM_ROWS - 1):
        others = torch.arange(NUM_ROWS) != row
        is_other = others[:, None]
        context = torch.where(
            is_other & inputs.context_mask, _changed(inputs.context_ids, model.vocab_size), inputs.context_ids
        )
        target = torch.where(is_other, _changed(inputs.target_ids, model.vocab_size), inputs.target_ids)
        other = ModelInput(context, inputs.context_mask, target, inputs.loss_mask)
        gap = max(gap, _gap(_logits(model, other)[row], whole[row]), _gap(_stepped(model, other)[row], steps[row]))
    return _compared("a row does not depend on its neighbours", gap)


def _padding_free(model: LanguageModel, inputs: ModelInput) -> CheckResult:
    logits, gap = _logits(model, inputs), 0.0
    for row in range(inputs.target_ids.shape[0]):
        num_tokens = int(inputs.context_mask[row].sum())
        alone = ModelInput(
            inputs.context_ids[row : row + 1, :num_tokens],
            inputs.context_mask[row : row + 1, :num_tokens],
            inputs.target_ids[row : row + 1],
            inputs.loss_mask[row : row + 1],
        )
        gap = max(gap, _gap(_logits(model, alone)[0], logits[row]))
    return _compared("a row alone equals the row in a padded batch", gap)


def _stepped(model: LanguageModel, inputs: ModelInput) -> Tensor:
    """Logits [B, T, V] of the targets, appended one by one."""
    with torch.no_grad():
        now, state = model.start(inputs.context_ids, inputs.context_mask)
        steps = [now]
        for position in range(inputs.target_ids.shape[1] - 1):
            now, state = model.advance(inputs.target_ids[:, position], state)
            steps.append(now)
    return torch.stack(steps, dim=1)


def _cached(model: LanguageModel, inputs: ModelInput) -> CheckResult:
    gap = _gap(_stepped(model, inputs), _logits(model, inputs))
    return _compared("token by token equals the whole target", gap)


def _windowed(model: LanguageModel, inputs: ModelInput) -> CheckResult:
    with torch.no_grad():
        split = model.forward_windows(inputs).logits
    assert split is not None
    whole = _logits(model, inputs)
    gap = _gap(split, whole)
    if isinstance(
        getattr(model, "config", None), HopeConfig
    ):  # its `forward_windows` is one pass: the stream is split here
        gap = max(gap, _gap(_streamed(model, inputs), whole))
    return _compared("a target read in windows equals the whole", gap)


def _streamed(model: LanguageModel, inputs: ModelInput) -> Tensor:
    """Logits [B, T, V] with carried state: half of the contexts, the rest of them with one target, then pieces of targets."""
    num_context, num_targets = inputs.context_ids.shape[1], inputs.target_ids.shape[1]
    half = num_context // 2
    state, parts = model.initial_state(NUM_ROWS), []  # type: ignore[operator]
    nothing = torch.zeros_like(inputs.loss_mask[:, :1])
    pad_id = getattr(getattr(model, "config", None), "pad_id", 0)
    pieces = [ModelInput(inputs.context_ids[:, :half], inputs.context_mask[:, :half], nothing.long() + pad_id, nothing)]
    cuts = sorted({0, 1, num_targets // 2, num_targets})
    for start, stop in pairwise(cuts):
        place = slice(half, num_context) if start == 0 else slice(0, 0)
        pieces.append(
            ModelInput(
                inputs.context_ids[:, place],
                inputs.context_mask[:, place],
                inputs.target_ids[:, start:stop],
                inputs.loss_mask[:, start:stop],
            )
        )
    with torch.no_grad():
        for piece in pieces:
            output = model(piece, state)
            state = output.state
            parts.append(output.logits)
    return torch.cat(parts[1:], dim=1)


def _reached(model: LanguageModel, inputs: ModelInput) -> CheckResult:
    model.zero_grad()

    def loss(logits: Tensor, labels: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    nll = model(inputs, target_loss=loss).nll
    assert nll is not None
    nll.sum().backward()
    missed, broken = [], []
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not bool((parameter.grad != 0).any()):
            missed.append(name)
        elif not bool(torch.isfinite(parameter.grad).all()):
            broken.append(name)
    problems = [f"none at {', '.join(missed[:3])}"] * bool(missed) + [f"not finite at {', '.join(broken[:3])}"] * bool(
        broken
    )
    return CheckResult("a finite gradient reaches every parameter", not problems, "; ".join(problems) or "all reached")


def _sparsity(model: LanguageModel, step: int | None) -> list[CheckResult]:
    config = getattr(getattr(model, "config", None), "pruning", PruningConfig())
    names = model.prunable_parameters()
    if config.schedule == "none" or not names:
        return []
    computed = mask_step(config, max(config.begin_step, config.end_step) if step is None else step)
    wanted = 0.0 if computed is None else sparsity_at_step(config, computed)
    parameters = dict(model.named_parameters())
    problems = []
    for name in names:
        weight = parameters[name]
        found, expected = int((weight == 0).sum()), expected_zeros(tuple(weight.shape), wanted, config.structure)
        if not expected <= found <= expected + 1 + MOST_OTHER_ZEROS * weight.numel():
            problems.append(f"{found:,} zeros at {name}, scheduled {expected:,}")
    detail = "; ".join(problems[:2]) or f"{wanted:.3f}, as many zeros as scheduled in {len(names)} matrices"
    results = [CheckResult("sparsity is as scheduled", not problems, detail)]
    if config.structure == "2:4" and wanted >= 0.5:
        dense = [name for name in names if not is_two_four(parameters[name])]
        results.append(
            CheckResult("weights have the 2:4 structure", not dense, f"dense groups in {dense[0]}" if dense else "all")
        )
    return results
