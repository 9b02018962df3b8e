"""Softmax cross-entropy with class indices as targets. Of each row whose target y is not `ignore_index`

    loss = -(1 - eps) w_y log p_y - eps / C sum_c w_c log p_c,    p = softmax(input)

and 'mean' divides by the sum of w_y.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import rows
from ..arguments import autocast_is_active, class_indices_misfit, dtype_misfit, smoothing_misfit
from ..backends import kernels_for, one_visit_pays
from ..kernels.groups import Foreseen, Reduction, Rows, Smoothing
from ..loss import Loss, Spec, Worth, compute_dtype
from ..memory import empty_like


class Tensors(NamedTuple):
    input: Tensor  # logits (C,), (N, C) or (N, C, d1, ...)
    target: Tensor  # class indices, the shape of `input` without its classes, int64 or uint8
    weight: Tensor | None  # (C,), of a dtype that is computed with as `input` is


class Options(NamedTuple):
    ignore_index: int
    label_smoothing: float  # eps
    reduction: str
    dtype: torch.dtype  # of the loss


class Results(NamedTuple):
    loss: Tensor
    divisor: Tensor
    numbers: Tensor  # [4, N], the fields of `Rows`; [3, N] if nothing is smoothed, and so there is no mass


class Saved(NamedTuple):
    input: Tensor
    target: Tensor
    weight: Tensor | None
    divisor: Tensor
    numbers: Tensor


class CrossEntropy(Loss[Tensors, Options, Saved]):
    tensors, options, results, saved = Tensors, Options, Results, Saved
    worth = Worth(0.125, 0.2, few=1 / 16)  # with probabilities and smoothing, too, which pay a little earlier
    one_visit = 1

    def misfit(self, t: Tensors, o: Options) -> str | None:
        return smoothing_misfit(t.input, o.label_smoothing) or class_indices_misfit(t.input, t.target, t.weight, o.ignore_index)

    def mixture_misfit(self, t: Tensors) -> str | None:
        return None if autocast_is_active(t.input) else dtype_misfit(t.input, "weight", t.weight)

    def outputs(self, t: Tensors, o: Options) -> tuple[Spec, ...]:
        numbers = rows.numbers_spec(t.input, 4 if o.label_smoothing > 0 else 3)
        return rows.loss_spec(t.input, o.reduction, o.dtype), rows.divisor_spec(t.input, o.reduction), numbers

    def definition(self, t: Tensors, o: Options) -> Tensor:
        return rows.index_loss(t.input, t.target, t.weight, o)

    def forward(self, t: Tensors, o: Options) -> tuple[Tensor, ...]:
        r, logits, target, kernels = self.allocate(t, o), rows.as_rows(t.input), rows.as_indices(t.target), kernels_for(t.input)
        loss, numbers = rows.row_losses(r.loss, t.input, o.reduction), _numbers(r.numbers)
        if o.label_smoothing > 0:
            weight = rows.class_weight_along(t.weight, t.input)
            kernels.smoothed_cross_entropy_forward(logits, target, weight, o.ignore_index, _smoothing(t, o), loss, numbers)
        else:
            weight = rows.class_weight(t.weight, t.input)
            kernels.cross_entropy_forward(logits, target, weight, o.ignore_index, loss, numbers)
        rows.reduce_index_rows(loss, r.divisor, o, r.loss, numbers.row_weight)
        return tuple(r)

    def one_visit_pays(self, t: Tensors, o: Options) -> bool:
        return t.input.is_cpu or (o.label_smoothing == 0 and one_visit_pays(rows.as_rows(t.input)))

    def forward_backward(
        self, dloss: float | Tensor, t: Tensors, o: Options, needed: tuple[bool, ...]
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
        r, logits, target, kernels = self.allocate(t, o), rows.as_rows(t.input), rows.as_indices(t.target), kernels_for(t.input)
        loss, weight, dinput = rows.row_losses(r.loss, t.input, o.reduction), rows.class_weight(t.weight, t.input), empty_like(t.input)
        dlogits, numbers = rows.as_rows(dinput), _numbers(r.numbers)
        if o.label_smoothing > 0:
            assert isinstance(dloss, float)
            if o.reduction == "mean":
                kernels.sum_weights(target, weight, o.ignore_index, r.divisor)
            g = rows.row_gradient_of(dloss, r.divisor, t.input)
            kernels.smoothed_cross_entropy_forward_backward(
                logits, target, rows.class_weight_along(t.weight, t.input), o.ignore_index, _smoothing(t, o), g, loss, numbers, dlogits
            )
            rows.reduce_index_rows(loss, r.divisor, o, r.loss)
        else:
            total = r.loss if r.loss.dtype is loss.dtype else loss.new_empty(())
            if isinstance(dloss, Tensor):
                foreseen = Foreseen(dloss, r.divisor, total)
                kernels.foreseen_cross_entropy_forward_backward(logits, target, weight, o.ignore_index, foreseen, loss, numbers, dlogits)
            else:
                reduction = Reduction(dloss, r.divisor, total)
                kernels.reduced_cross_entropy_forward_backward(logits, target, weight, o.ignore_index, reduction, loss, numbers, dlogits)
            if total is not r.loss:
                r.loss.copy_(total)
        return (rows.settle(dinput, dlogits),), tuple(r)

    def repair(self, dloss: Tensor, foreseen: Tensor, s: Saved, o: Options, gradients: tuple[Tensor | None, ...]) -> None:
        (dinput,) = gradients
        assert dinput is not None
        logits, dlogits, target = rows.as_rows(s.input), rows.as_rows(dinput), rows.as_indices(s.target)
        g, upstream = rows.row_gradient(dloss, s.divisor, s.input), dloss.to(compute_dtype(s.input))
        kernels_for(s.input).cross_entropy_repair(logits, target, o.ignore_index, _numbers(s.numbers), g, upstream, foreseen, dlogits)
        rows.settle(dinput, dlogits)

    def backward(self, dloss: Tensor, s: Saved, o: Options, needed: tuple[bool, ...], result: Tensor | None) -> tuple[Tensor | None, ...]:
        dinput = empty_like(s.input) if result is None else result
        logits, dlogits, target, kernels = rows.as_rows(s.input), rows.as_rows(dinput), rows.as_indices(s.target), kernels_for(s.input)
        g = rows.row_gradient(dloss, s.divisor, s.input)
        if o.label_smoothing > 0:
            weight = rows.class_weight_along(s.weight, s.input)
            kernels.smoothed_cross_entropy_backward(
                logits, target, weight, o.ignore_index, _smoothing(s, o), _numbers(s.numbers), g, dlogits
            )
        else:
            kernels.cross_entropy_backward(logits, target, o.ignore_index, _numbers(s.numbers), g, dlogits)
        return (rows.settle(dinput, dlogits),)


def _numbers(numbers: Tensor) -> Rows:
    row_weight, *mass, top, total = rows.each_number(numbers)
    return Rows(row_weight, mass[0] if mass else None, top, total)


def _smoothing(t: Tensors | Saved, o: Options) -> Smoothing:
    return Smoothing(1 - o.label_smoothing, o.label_smoothing / rows.classes_of(t.input))


cross_entropy = CrossEntropy("cross_entropy")
