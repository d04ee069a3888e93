"""The invariants of a language model, run on any weights, on a CPU: what `hsmn-dist verify CHECKPOINT` prints.

Unusual: the same checks for every family, on random tokens in float64, so a failure is a fault of the weights or of the code
and never of rounding. Long stacks are checked whole; inputs are short, so it takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hsmn_dist.config.models import PruningConfig
from hsmn_dist.models.contract import LanguageModel, ModelInput
from hsmn_dist.models.pruning import is_two_four, measured_sparsity, sparsity_at_step

FIRST_TEXT_ID = 4
NUM_ROWS = 3
NUM_TARGETS = 9
TOLERANCE = 1e-8


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
        step: optimizer step that the weights come from, for the pruning schedule; None takes its end.
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


def _random_inputs(model: LanguageModel, seed: int) -> ModelInput:
    generator = torch.Generator().manual_seed(seed)
    low = min(FIRST_TEXT_ID, model.vocab_size - 1)
    num_targets = min(NUM_TARGETS, model.max_target_tokens or NUM_TARGETS)
    chunk = getattr(getattr(model, "config", None), "chunk_size", 16)
    lengths = torch.tensor([2 * chunk + 5, 0, chunk // 2 + 1])
    width = int(lengths.max())
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
    for position in range(inputs.target_ids.shape[1]):
        target = inputs.target_ids.clone()
        target[:, position:] = _changed(target[:, position:], model.vocab_size)
        other = ModelInput(inputs.context_ids, inputs.context_mask, target, inputs.loss_mask)
        gap = max(gap, _gap(_logits(model, other)[:, : position + 1], logits[:, : position + 1]))
    return _compared("a target position does not depend on later ones", gap)


def _isolated(model: LanguageModel, inputs: ModelInput) -> CheckResult:
    logits = _logits(model, inputs)
    context, target = inputs.context_ids.clone(), inputs.target_ids.clone()
    context[1:] = torch.where(inputs.context_mask[1:], _changed(context[1:], model.vocab_size), context[1:])
    target[1:] = _changed(target[1:], model.vocab_size)
    other = ModelInput(context, inputs.context_mask, target, inputs.loss_mask)
    return _compared("a row does not depend on its neighbours", _gap(_logits(model, other)[:1], logits[:1]))


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


def _cached(model: LanguageModel, inputs: ModelInput) -> CheckResult:
    logits = _logits(model, inputs)
    steps = []
    with torch.no_grad():
        now, state = model.start(inputs.context_ids, inputs.context_mask)
        steps.append(now)
        for position in range(inputs.target_ids.shape[1] - 1):
            now, state = model.advance(inputs.target_ids[:, position], state)
            steps.append(now)
    return _compared("token by token equals the whole target", _gap(torch.stack(steps, dim=1), logits))


def _windowed(model: LanguageModel, inputs: ModelInput) -> CheckResult:
    with torch.no_grad():
        split = model.forward_windows(inputs).logits
    assert split is not None
    return _compared("a target read in windows equals the whole", _gap(split, _logits(model, inputs)))


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
    wanted = sparsity_at_step(config, config.end_step if step is None else step)
    parameters = dict(model.named_parameters())
    found = measured_sparsity(parameters, names)
    worst = min(found, key=found.__getitem__)
    enough = all(share >= wanted - 1.0 / parameters[name].numel() for name, share in found.items())
    detail = f"{found[worst]:.3f} at {worst}, scheduled {wanted:.3f}"
    results = [CheckResult("sparsity is as scheduled", enough, detail)]
    if config.structure == "2:4" and wanted >= 0.5:
        dense = [name for name in names if not is_two_four(parameters[name])]
        results.append(
            CheckResult("weights have the 2:4 structure", not dense, f"dense groups in {dense[0]}" if dense else "all")
        )
    return results
