"""Is it right? Every provider against float64, at full size, before it is timed."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Inputs

_CHUNK = 1 << 23
_SAMPLE = 1 << 21

# How far a provider may be beyond torch's own error in the same dtype: a few units in the last place of the result.
_SLACK = {"float64": 1e-14, "float32": 5e-7, "float16": 2e-3, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Truth:
    """The loss of every row, and the gradient of some, in float64. A loss that is no number (softmax) is known for these rows only."""

    rows: Tensor
    output: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Error:
    """Largest error of the output and of the gradient, each relative to the largest true value."""

    output: float
    gradient: float

    @property
    def worst(self) -> float:
        return max(self.output, self.gradient)


def truth(case: Case, one: Inputs) -> Truth:
    """float64 by torch, in pieces of dim 0 so that the whole never is in memory."""
    spec = case.spec
    function = spec.in_torch
    options = {name: value.double() if isinstance(value, Tensor) else value for name, value in one.options.items()}
    divisor = spec.divisor(one.target, one.options, case.logits_shape) if spec.scalar else 1.0
    if spec.scalar:
        options["reduction"] = "sum"

    def piece(rows: Any, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        x = one.input[rows].double().requires_grad_(with_gradient)
        target = one.target if one.target is None else one.target[rows]
        if target is not None and target.is_floating_point():
            target = target.double()
        output = spec.call(function, x, target, options)
        if with_gradient:
            output.backward(None if one.upstream is None else one.upstream[rows].double())  # type: ignore[no-untyped-call]
        return output.detach(), None if x.grad is None else x.grad / divisor

    per_row = case.logits // case.shape[0]
    rows = torch.linspace(0, case.shape[0] - 1, min(case.shape[0], max(1, _SAMPLE // per_row)), dtype=torch.float64).long()
    sample, gradient = piece(rows, True)
    assert gradient is not None
    if not spec.scalar:
        return Truth(rows, sample, gradient)
    step = max(1, _CHUNK // per_row)
    total = sum(float(piece(slice(start, start + step), False)[0]) for start in range(0, case.shape[0], step))
    return Truth(rows, torch.tensor(total / divisor, dtype=torch.float64), gradient)


def error_of(true: Truth, output: Tensor, gradient: Tensor | None) -> Error:
    """How far a provider is from the truth; inf for NaN, a wrong shape or no gradient."""
    if output.dim():
        output = output[true.rows.to(output.device)]
    if gradient is None or output.shape != true.output.shape:
        return Error(float("inf"), float("inf"))
    return Error(_distance(output, true.output), _distance(gradient[true.rows.to(gradient.device)], true.gradient))


def _distance(found: Tensor, true: Tensor) -> float:
    distance = float((found.double().cpu() - true.cpu()).abs().max() / true.abs().max().cpu())
    return distance if distance == distance else float("inf")


def allowed(case: Case, eager: Error) -> Error:
    """The largest errors with which a provider is still timed: twice torch's in the same dtype, and some units in the last place."""
    slack = _SLACK[case.dtype]
    return Error(2 * eager.output + slack, 2 * eager.gradient + slack)
