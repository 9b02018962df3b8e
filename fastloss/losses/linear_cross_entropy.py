"""Softmax cross-entropy of a linear layer's logits with class indices as targets, without ever holding all logits. With
logits x = softcap(scale (input W^T + b)), of each row whose target y is not `ignore_index`

    loss = -(1 - eps) w_y log p_y - eps / C sum_c w_c log p_c,    p = softmax(x)

and 'mean' divides by the sum of w_y.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import memory, rows
from ..arguments import class_indices_misfit, dtype_misfit, linear_misfit, smoothing_misfit
from ..backends import kernels_for
from ..chunks import Chunks, layer_of, logits_of, not_ignored, some_rows, stand_in
from ..kernels.groups import Rows, Smoothing
from ..loss import Loss, Spec


class Tensors(NamedTuple):
    input: Tensor  # (D,) or (N, D)
    linear_weight: Tensor  # (C, D) or (C, d1, ..., D)
    linear_bias: Tensor | None  # the shape of `linear_weight` without D
    target: Tensor  # class indices, the shape of the logits (N, C, d1, ...) without their classes, int64 or uint8
    weight: Tensor | None  # (C,)


class Options(NamedTuple):
    ignore_index: int
    label_smoothing: float  # eps
    logit_scale: float
    logit_softcap: float  # 0: none
    chunk_rows: int  # 0: by `config.linear_chunk_bytes`
    products: torch.dtype  # of the matrix products
    sums: torch.dtype  # of the sums of half precision products over chunks
    reduction: str
    dtype: torch.dtype  # of the loss


class Results(NamedTuple):
    loss: Tensor
    divisor: Tensor


class Saved(NamedTuple):
    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None
    divisor: Tensor


class LinearCrossEntropy(Loss[Tensors, Options, Saved]):
    tensors, options, results, saved = Tensors, Options, Results, Saved
    differentiable = one_visit = 3

    def misfit(self, t: Tensors, o: Options) -> str | None:
        misfit = linear_misfit(t.input, t.linear_weight, t.linear_bias, o)
        if misfit is not None:
            return misfit
        logits = stand_in(t, o.products)
        misfit = dtype_misfit(logits, "weight", t.weight) if o.dtype is o.products else None
        misfit = misfit or smoothing_misfit(logits, o.label_smoothing)
        return misfit or class_indices_misfit(logits, t.target, t.weight, o.ignore_index)

    def outputs(self, t: Tensors, o: Options) -> tuple[Spec, ...]:
        logits = stand_in(t, o.products)
        return rows.loss_spec(logits, o.reduction, o.dtype), rows.divisor_spec(logits, o.reduction)

    def definition(self, t: Tensors, o: Options) -> Tensor:
        return rows.index_loss(logits_of(t, o), t.target, t.weight, o)

    def forward(self, t: Tensors, o: Options) -> tuple[Tensor, ...]:
        r = self.allocate(t, o)
        _divide(t, o, r.divisor)
        _visit(t, o, None, r, (False,) * 3)
        return tuple(r)

    def forward_backward(
        self, dloss: float, t: Tensors, o: Options, needed: tuple[bool, ...]
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
        r = self.allocate(t, o)
        _divide(t, o, r.divisor)
        g = rows.row_gradient_of(dloss, r.divisor, stand_in(t, o.products))
        return _visit(t, o, g, r, needed), tuple(r)

    def backward(self, dloss: Tensor, s: Saved, o: Options, needed: tuple[bool, ...], result: Tensor | None) -> tuple[Tensor | None, ...]:
        return _visit(s, o, rows.row_gradient(dloss, s.divisor, stand_in(s, o.products)), None, needed)


def _divide(t: Tensors, o: Options, divisor: Tensor) -> None:
    """Write what 'mean' divides by, which is known from the targets."""
    if o.reduction == "mean":
        target, weight = rows.as_indices(t.target), rows.class_weight(t.weight, stand_in(t, o.products))
        kernels_for(t.input).sum_weights(target, weight, o.ignore_index, divisor)


def _visit(t: Any, o: Options, dloss: Tensor | None, r: Results | None, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Write the loss, if there is a place for it; the gradients of input, weight and bias for those of the rows' losses."""
    layer, logits, kernels, target = layer_of(t, o), stand_in(t, o.products), kernels_for(t.input), rows.as_indices(t.target)
    classes, positions = rows.classes_of(logits), layer.columns // rows.classes_of(logits)
    weight = rows.dense_class_weight(t.weight, logits) if o.label_smoothing > 0 else rows.class_weight(t.weight, logits)
    smoothing = Smoothing(1 - o.label_smoothing, o.label_smoothing / classes)
    chosen = not_ignored(target, o.ignore_index, positions)
    target = some_rows(target, chosen, positions)
    loss = memory.empty(target.shape, weight.dtype, target.device)
    dloss = None if dloss is None else some_rows(dloss, chosen, positions)
    chunks = Chunks(layer, needed, chosen)
    for at, x in chunks:
        y, written = target[at], loss[at]
        numbers = Rows(*written.new_empty(4, len(written)).unbind())
        if dloss is None and o.label_smoothing > 0:
            kernels.smoothed_cross_entropy_forward(x, y, weight, o.ignore_index, smoothing, written, numbers)
        elif dloss is None:
            kernels.cross_entropy_forward(x, y, weight, o.ignore_index, written, numbers)
        elif o.label_smoothing > 0:
            kernels.smoothed_cross_entropy_forward_backward(x, y, weight, o.ignore_index, smoothing, dloss[at], written, numbers, x)
        else:
            kernels.cross_entropy_forward_backward(x, y, weight, o.ignore_index, dloss[at], written, numbers, x)
    if r is not None:
        _reduce(loss, chosen, positions, r, o, logits)
    return chunks.gradients()


def _reduce(losses: Tensor, chosen: Tensor | None, positions: int, r: Results, o: Options, logits: Tensor) -> None:
    if chosen is not None:
        every = losses.new_zeros(rows.rows_in(logits))
        every.view(-1, positions)[chosen] = losses.view(-1, positions)
        losses = every
    rows.reduce_index_rows(losses, r.divisor, o, r.loss)


linear_cross_entropy = LinearCrossEntropy("linear_cross_entropy")
