"""Taps: the gradient of each example's loss for every weight, from one batched backward pass, without storing gradients.

A forward hook puts an identity on the output of each module that has a rule. In the backward pass the identity sees the
output's gradient, and together with the saved input it has all that the weight gradient of any example is made of. The
backward runs towards one dummy scalar that feeds every identity, so that autograd forms no weight gradient at all and never
reaches a parameter: what an engine accumulates, reduces or steps stays untouched. Inputs are kept by `save_for_backward`,
so activation checkpointing drops and recomputes them as it does any activation.

All uses of a parameter are put together before squaring; a use that never fires (its output did not reach the loss) adds
nothing. Source: continual.md section 3 and the trial in section 7.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hsmn_dist.continual.gradient_rules import Dense, Outer, Rule, is_rms_norm, rms_norm_of_others, rule_of
from hsmn_dist.continual.square_sums import Use
from hsmn_dist.models.example_rows import current_rows, listening

Finished = Callable[[str, list[Use]], None]


class UnknownRowsError(Exception):
    """A module's input has another number of rows than there are examples, and the model did not say whose they are."""


class Uncovered(Exception):
    """Parameters that no rule covers; internal, answered by one backward per example."""


@dataclass
class _Pass:
    """State of one forward and backward pass."""

    num_examples: int
    finished: Finished
    counts: dict[str, int] = field(default_factory=dict)
    uses: dict[str, list[Use]] = field(default_factory=dict)
    is_recording: bool = True
    has_broadcast: bool = False

    def add(self, name: str, use: Use) -> None:
        """File a use that fired; the last one of a parameter finishes it."""
        self.uses.setdefault(name, []).append(use)
        self.counts[name] -= 1
        if self.counts[name] == 0:
            self.finished(name, self.uses.pop(name))


class _Tap(torch.autograd.Function):
    """Identity on a module's output; its backward hands (saved input, output gradient) to `fire`."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, dummy: Tensor, saved: Tensor, fire: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(saved)
        ctx.fire = fire
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        (saved,) = ctx.saved_tensors
        ctx.fire(saved, gradients[0].detach())
        return gradients[0], None, None, None


class ExampleGradients:
    """Hooks on a module for the parameters wanted.

    Use: `with taps.installed(): taps.run(loss_of, num_examples, finished)`.
    """

    def __init__(
        self, module: nn.Module, wanted: Mapping[str, nn.Parameter], expands_single_rows: bool = False
    ) -> None:
        """`expands_single_rows` gives an output of one row that all examples share (position embeddings of [1, T] ids) to
        each example as a row of its own. Only for callers who compare with another way: a model may do with that row
        what it would not do with many.
        """
        self._expands_single_rows = expands_single_rows
        self._is_sharded = any(hasattr(parameter, "to_local") for parameter in wanted.values())
        self._verified: set[int] = set()
        self._names = {id(parameter): name for name, parameter in wanted.items()}
        self._pass: _Pass | None = None
        self._ruled: list[tuple[nn.Module, Rule, dict[str, str]]] = []
        covered: set[str] = set()
        blocked: set[str] = set()
        for child in module.modules():
            own = {
                local: self._names[id(parameter)]
                for local, parameter in child.named_parameters(recurse=False, remove_duplicate=False)
                if id(parameter) in self._names
            }
            rule = rule_of(child)
            if own and rule is not None:
                self._ruled.append((child, rule, own))
                covered.update(own.values())
            else:
                blocked.update(own.values())
        self._expanded: set[str] = set()
        self._without_rule = set(wanted) - (covered - blocked)

    def uncovered(self) -> set[str]:
        """Parameters that neither a rule nor `per_example` covers; complete after the first forward pass."""
        return self._without_rule - self._expanded

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the hooks are on the modules."""
        handles = [
            child.register_forward_hook(self._hook(rule, own), with_kwargs=True) for child, rule, own in self._ruled
        ]
        try:
            with listening(self):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, loss_of: Callable[[], Tensor], num_examples: int, finished: Finished) -> None:
        """One forward and backward pass; `finished(name, uses)` is called once for each parameter that was used.

        Args:
            loss_of: gives the scalar to differentiate, the sum of the examples' losses.
            num_examples: rows of the batch.
            finished: receives the uses of one parameter, in the order in which the backward pass completes them.

        Raises:
            Uncovered: the model uses parameters that no rule covers.
            UnknownRowsError: rows whose example is not known.
        """
        self._pass = current = _Pass(num_examples, finished)
        self._dummy = torch.zeros((), requires_grad=True)
        try:
            with torch.enable_grad():
                loss = self._loss(loss_of, current)
            current.is_recording = False
            if self.uncovered():
                raise Uncovered(", ".join(sorted(self.uncovered())))
            if loss.requires_grad and current.counts:
                torch.autograd.grad(loss, self._dummy, allow_unused=True)
            for name in [name for name, uses in current.uses.items() if uses]:
                finished(name, current.uses.pop(name))
        finally:
            self._pass = None

    def _loss(self, loss_of: Callable[[], Tensor], current: _Pass) -> Tensor:
        try:
            return loss_of()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            if not current.has_broadcast:
                raise
            raise UnknownRowsError(f"a row that all examples share cannot be one row for each: {error}") from error

    def _hook(self, rule: Rule, own: dict[str, str]) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            current = self._pass
            if current is None or not torch.is_grad_enabled():
                return None
            saved = args[0] if args else next(iter(kwargs.values()))
            if rule is rms_norm_of_others and id(module) not in self._verified:
                if not is_rms_norm(module, saved, output):
                    raise Uncovered(", ".join(own.values()))
                self._verified.add(id(module))
            if self._is_shared_row(current, saved, output):
                current.has_broadcast = True
                saved, output = (x.expand(current.num_examples, *x.shape[1:]) for x in (saved, output))
            owners = self._owners(current, saved, type(module).__name__)

            def fire(x: Tensor, gradient: Tensor) -> None:
                for local, contribution in rule(module, x, gradient).items():
                    if local in own:
                        current.add(own[local], Use(contribution, owners))

            self._count(current, own.values())
            return self._tapped(output, saved, fire)

        return hook

    def expand(self, parameter: Tensor, num_examples: int) -> Tensor:
        """See `example_rows.Listener`."""
        name = self._names.get(id(parameter))
        expanded = parameter.expand(num_examples, *parameter.shape)
        current = self._pass
        if name is None or current is None or not torch.is_grad_enabled():
            return expanded
        self._expanded.add(name)
        owners = self._owners(current, expanded, f"per_example({name})")

        def fire(_: Tensor, gradient: Tensor) -> None:
            current.add(name, Use(Dense(gradient), owners))

        self._count(current, [name])
        return self._tapped(expanded, torch.empty(0), fire)

    def linear(self, x: Tensor, weight: Tensor, is_transposed: bool, output: Tensor) -> Tensor:
        """See `example_rows.Listener`."""
        name, current = self._names.get(id(weight)), self._pass
        if name is None and current is not None and self._is_sharded and weight.requires_grad:
            # While a module runs, FSDP puts another tensor in its parameter's place.
            raise Uncovered(f"a sharded weight {tuple(weight.shape)} used by tied_linear")
        if name is None or current is None or not torch.is_grad_enabled():
            return output
        owners = self._owners(current, x, f"tied_linear({name})")

        def fire(saved: Tensor, gradient: Tensor) -> None:
            current.add(name, Use(Outer(gradient, saved) if is_transposed else Outer(saved, gradient), owners))

        self._count(current, [name])
        return self._tapped(output, x, fire)

    def _count(self, current: _Pass, names: Any) -> None:
        # Activation checkpointing calls the hooks again in the backward pass; those identities never see a gradient.
        if current.is_recording:
            for name in names:
                current.counts[name] = current.counts.get(name, 0) + 1

    def _is_shared_row(self, current: _Pass, saved: Tensor, output: Tensor) -> bool:
        """One row, broadcast over the examples later: there its gradient is a sum over examples, of no use for squares."""
        is_one = saved.dim() > 1 and saved.shape[0] == 1 and output.shape[:1] == (1,)
        return is_one and self._expands_single_rows and current.num_examples > 1 and current_rows() is None

    def _owners(self, current: _Pass, saved: Tensor, what: str) -> Tensor | None:
        owners = current_rows()
        if owners is not None and owners.shape[0] == saved.shape[0]:
            return owners
        if not current.is_recording or (owners is None and saved.dim() > 0 and saved.shape[0] == current.num_examples):
            return None
        raise UnknownRowsError(
            f"{what} got {tuple(saved.shape)} in a batch of {current.num_examples} examples"
            + ("" if owners is None else f", inside example_rows of {owners.shape[0]} rows")
        )

    def _tapped(self, output: Tensor, saved: Tensor, fire: Callable[[Tensor, Tensor], None]) -> Tensor:
        return _Tap.apply(output, self._dummy, saved.detach(), fire)  # type: ignore[no-any-return]
