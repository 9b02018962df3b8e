"""Softmax cross-entropy with class probabilities as targets. Of each row

    loss = -sum_c w_c q_c log p_c,    p = softmax(input),    q = (1 - eps) target + eps / C

and 'mean' divides by the number of rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import rows
from ..arguments import class_weight_misfit, smoothing_misfit
from ..backends import kernels_for
from ..kernels.groups import Rows, Smoothing
from ..loss import COMPUTE, Loss, Spec, compute_dtype
from ..memory import empty_like


class Tensors(NamedTuple):
    input: Tensor  # logits (C,), (N, C) or (N, C, d1, ...)
    target: Tensor  # class probabilities, shape of `input`, as `weight` of a dtype that is computed with as `input` is
    weight: Tensor | None  # (C,)


class Options(NamedTuple):
    label_smoothing: float  # eps
    reduction: str
    dtype: torch.dtype  # of the loss


class Results(NamedTuple):
    loss: Tensor
    divisor: Tensor
    numbers: Tensor  # [3, N]: mass, top and total of `Rows`


class Saved(NamedTuple):
    input: Tensor
    target: Tensor
    weight: Tensor | None
    divisor: Tensor
    numbers: Tensor


class SoftCrossEntropy(Loss[Tensors, Options, Saved]):
    tensors, options, results, saved = Tensors, Options, Results, Saved
    typed_by = 0, 1, 2
    differentiable = 2
    one_visit = 1

    def misfit(self, t: Tensors, o: Options) -> str | None:
        if COMPUTE.get(t.target.dtype) != compute_dtype(t.input) or t.target.shape != t.input.shape:
            return f"target is {t.target.dtype} {tuple(t.target.shape)}, logits are {t.input.dtype} {tuple(t.input.shape)}"
        return smoothing_misfit(t.input, o.label_smoothing) or class_weight_misfit(t.input, t.weight)

    def outputs(self, t: Tensors, o: Options) -> tuple[Spec, ...]:
        numbers = rows.numbers_spec(t.input, 3)
        return rows.loss_spec(t.input, o.reduction, o.dtype), rows.divisor_spec(t.input, o.reduction), numbers

    def definition(self, t: Tensors, o: Options) -> Tensor:
        return rows.soft_loss(t.input, t.target, t.weight, o)

    def forward(self, t: Tensors, o: Options) -> tuple[Tensor, ...]:
        r, logits, target, weight = (
            self.allocate(t, o),
            rows.as_rows(t.input),
            rows.as_rows(t.target),
            rows.class_weight_along(t.weight, t.input),
        )
        loss = rows.row_losses(r.loss, t.input, o.reduction)
        r.divisor.fill_(loss.numel())
        kernels_for(t.input).soft_cross_entropy_forward(logits, target, weight, _smoothing(t, o), loss, _numbers(r.numbers))
        rows.reduce_rows(loss, r.divisor, o.reduction, r.loss)
        return tuple(r)

    def forward_backward(
        self, dloss: float, t: Tensors, o: Options, needed: tuple[bool, ...]
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
        r, logits, target, weight = (
            self.allocate(t, o),
            rows.as_rows(t.input),
            rows.as_rows(t.target),
            rows.class_weight_along(t.weight, t.input),
        )
        loss, dinput = rows.row_losses(r.loss, t.input, o.reduction), empty_like(t.input)
        dlogits = rows.as_rows(dinput)
        r.divisor.fill_(loss.numel())
        g = rows.row_gradient_of(dloss, r.divisor, t.input)
        kernels_for(t.input).soft_cross_entropy_forward_backward(
            logits, target, weight, _smoothing(t, o), g, loss, _numbers(r.numbers), dlogits
        )
        rows.reduce_rows(loss, r.divisor, o.reduction, r.loss)
        return (rows.settle(dinput, dlogits),), tuple(r)

    def backward(self, dloss: Tensor, s: Saved, o: Options, needed: tuple[bool, ...], result: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, target, weight, kernels = (
            rows.as_rows(s.input),
            rows.as_rows(s.target),
            rows.class_weight_along(s.weight, s.input),
            kernels_for(s.input),
        )
        g = rows.row_gradient(dloss, s.divisor, s.input)
        smoothing, numbers = _smoothing(s, o), _numbers(s.numbers)
        dinput = dtarget = None
        if needed[1]:  # before the logits may be overwritten
            dtarget = empty_like(s.target)
            written = rows.as_rows(dtarget)
            kernels.soft_cross_entropy_target_backward(logits, weight, smoothing.keep, numbers, g, written)
            rows.settle(dtarget, written)
        if needed[0]:
            dinput = empty_like(s.input) if result is None else result
            written = rows.as_rows(dinput)
            kernels.soft_cross_entropy_backward(logits, target, weight, smoothing, numbers, g, written)
            rows.settle(dinput, written)
        return dinput, dtarget


def _numbers(numbers: Tensor) -> Rows:
    return Rows(None, *rows.each_number(numbers))


def _smoothing(t: Tensors | Saved, o: Options) -> Smoothing:
    return Smoothing(1 - o.label_smoothing, o.label_smoothing / rows.classes_of(t.input))


soft_cross_entropy = SoftCrossEntropy("soft_cross_entropy")
