"""Negative log-likelihood: -w_y input_y of each row whose target y is not `ignore_index`; 'mean' divides by the sum of w_y."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import rows
from ..arguments import autocast_is_active, class_indices_misfit, dtype_misfit
from ..backends import kernels_for
from ..loss import Loss, Spec, Worth, compute_dtype
from ..memory import empty_like


class Tensors(NamedTuple):
    input: Tensor  # log-probabilities (C,), (N, C) or (N, C, d1, ...)
    target: Tensor  # class indices, the shape of `input` without its classes, int64 or uint8
    weight: Tensor | None  # (C,), of a dtype that is computed with as `input` is


class Options(NamedTuple):
    ignore_index: int
    reduction: str
    dtype: torch.dtype  # of the loss


class Results(NamedTuple):
    loss: Tensor
    divisor: Tensor
    row_weight: Tensor  # [N]


class Saved(NamedTuple):
    input: Tensor  # of which only shape, dtype and strides matter
    target: Tensor
    weight: Tensor | None
    divisor: Tensor
    row_weight: Tensor


class NLLLoss(Loss[Tensors, Options, Saved]):
    tensors, options, results, saved = Tensors, Options, Results, Saved
    worth = Worth(16.0, 64.0, few=1.0)  # torch reads N numbers, too; it is slow where its gradient is fresh memory at every step

    def misfit(self, t: Tensors, o: Options) -> str | None:
        if t.input.dim() == 1 and t.target.dim() != 0:
            return "one row of log-probabilities has one target"
        return class_indices_misfit(t.input, t.target, t.weight, o.ignore_index)

    def mixture_misfit(self, t: Tensors) -> str | None:
        return None if autocast_is_active(t.input) else dtype_misfit(t.input, "weight", t.weight)

    def outputs(self, t: Tensors, o: Options) -> tuple[Spec, ...]:
        row_weight = Spec((rows.rows_in(t.input),), compute_dtype(t.input))
        return rows.loss_spec(t.input, o.reduction, o.dtype), rows.divisor_spec(t.input, o.reduction), row_weight

    def definition(self, t: Tensors, o: Options) -> Tensor:
        log_prob, target = rows.one_row_each(t.input), t.target.reshape(-1).long()
        weight = log_prob.new_ones(log_prob.shape[1]) if t.weight is None else t.weight.to(log_prob.dtype)
        return rows.reduced_rows(*rows.picked(log_prob, target, weight, o.ignore_index), o.reduction, t.input)

    def forward(self, t: Tensors, o: Options) -> tuple[Tensor, ...]:
        r, log_prob, target, weight = (
            self.allocate(t, o),
            rows.as_rows(t.input),
            rows.as_indices(t.target),
            rows.class_weight(t.weight, t.input),
        )
        loss = rows.row_losses(r.loss, t.input, o.reduction)
        kernels_for(t.input).nll_loss_forward(log_prob, target, weight, o.ignore_index, loss, r.row_weight)
        rows.reduce_rows(loss, r.divisor, o.reduction, r.loss, r.row_weight)
        return tuple(r)

    def backward(self, dloss: Tensor, s: Saved, o: Options, needed: tuple[bool, ...], result: Tensor | None) -> tuple[Tensor | None, ...]:
        dinput = empty_like(s.input)
        written, g = rows.as_rows(dinput), rows.row_gradient(dloss, s.divisor, s.input)
        kernels_for(s.input).nll_loss_backward(rows.as_indices(s.target), o.ignore_index, s.row_weight.contiguous(), g, written)
        return (rows.settle(dinput, written),)


nll_loss = NLLLoss("nll_loss")
