"""Softmax cross-entropy of a linear layer's logits with class probabilities as targets, without ever holding all logits. With
logits x = softcap(scale (input W^T + b)), of each row

    loss = -sum_c w_c q_c log p_c,    p = softmax(x),    q = (1 - eps) target + eps / C

and 'mean' divides by the number of rows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import memory, rows
from ..arguments import class_weight_misfit, dtype_misfit, linear_misfit, smoothing_misfit
from ..backends import kernels_for
from ..chunks import Chunks, layer_of, logits_of, stand_in
from ..kernels.groups import Rows, Smoothing
from ..loss import COMPUTE, Loss, Spec


class Tensors(NamedTuple):
    input: Tensor  # (D,) or (N, D)
    linear_weight: Tensor  # (C, D) or (C, d1, ..., D)
    linear_bias: Tensor | None  # the shape of `linear_weight` without D
    target: Tensor  # class probabilities, the shape of the logits (C,), (N, C) or (N, C, d1, ...)
    weight: Tensor | None  # (C,)


class Options(NamedTuple):
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


class LinearSoftCrossEntropy(Loss[Tensors, Options, Saved]):
    tensors, options, results, saved = Tensors, Options, Results, Saved
    differentiable = 4
    one_visit = 3

    def misfit(self, t: Tensors, o: Options) -> str | None:
        misfit = linear_misfit(t.input, t.linear_weight, t.linear_bias, o)
        if misfit is not None:
            return misfit
        logits = stand_in(t, o.products)
        if t.target.shape != logits.shape or COMPUTE.get(t.target.dtype) != COMPUTE[o.products]:
            return f"target is {t.target.dtype} {tuple(t.target.shape)}, logits are {o.products} {tuple(logits.shape)}"
        if o.dtype is o.products:
            misfit = dtype_misfit(logits, "target", t.target) or dtype_misfit(logits, "weight", t.weight)
        return misfit or smoothing_misfit(logits, o.label_smoothing) or class_weight_misfit(logits, t.weight)

    def outputs(self, t: Tensors, o: Options) -> tuple[Spec, ...]:
        logits = stand_in(t, o.products)
        return rows.loss_spec(logits, o.reduction, o.dtype), rows.divisor_spec(logits, o.reduction)

    def definition(self, t: Tensors, o: Options) -> Tensor:
        return rows.soft_loss(logits_of(t, o), t.target, t.weight, o)

    def forward(self, t: Tensors, o: Options) -> tuple[Tensor, ...]:
        r = self.allocate(t, o)
        r.divisor.fill_(rows.rows_in(stand_in(t, o.products)))
        _visit(t, o, None, r, (False,) * 4)
        return tuple(r)

    def forward_backward(
        self, dloss: float, t: Tensors, o: Options, needed: tuple[bool, ...]
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
        r, logits = self.allocate(t, o), stand_in(t, o.products)
        r.divisor.fill_(rows.rows_in(logits))
        return _visit(t, o, rows.row_gradient_of(dloss, r.divisor, logits), r, (*needed[:3], False))[:3], tuple(r)

    def backward(self, dloss: Tensor, s: Saved, o: Options, needed: tuple[bool, ...], result: Tensor | None) -> tuple[Tensor | None, ...]:
        return _visit(s, o, rows.row_gradient(dloss, s.divisor, stand_in(s, o.products)), None, needed)


def _visit(t: Any, o: Options, dloss: Tensor | None, r: Results | None, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Write the loss, if there is a place for it; the gradients of input, weight, bias and target for those of the rows' losses."""
    layer, logits, kernels, target = layer_of(t, o), stand_in(t, o.products), kernels_for(t.input), rows.as_rows(t.target.detach())
    positions, weight = layer.columns // rows.classes_of(logits), rows.dense_class_weight(t.weight, logits)
    smoothing = Smoothing(1 - o.label_smoothing, o.label_smoothing / rows.classes_of(logits))
    loss = memory.empty((rows.rows_in(logits),), weight.dtype, weight.device)
    dtarget = memory.empty_like(t.target) if needed[3] else None
    written = None if dtarget is None else rows.as_rows(dtarget)
    chunks = Chunks(layer, needed[:3])
    for at, x in chunks:
        here = slice(at.start // positions, at.stop // positions)
        q, numbers = target[here], Rows(None, *loss.new_empty(3, at.stop - at.start).unbind())
        if written is not None and dloss is not None:  # before the logits are overwritten
            kernels.soft_cross_entropy_forward(x, q, weight, smoothing, loss[at], numbers)
            found = torch.empty_like(x, dtype=written.dtype)
            kernels.soft_cross_entropy_target_backward(x, weight, smoothing.keep, numbers, dloss[at], found)
            written[here].copy_(found)
        if dloss is None:
            kernels.soft_cross_entropy_forward(x, q, weight, smoothing, loss[at], numbers)
        elif any(needed[:3]):
            kernels.soft_cross_entropy_forward_backward(x, q, weight, smoothing, dloss[at], loss[at], numbers, x)
    if r is not None:
        rows.reduce_rows(loss, r.divisor, o.reduction, r.loss)
    return *chunks.gradients(), None if dtarget is None or written is None else rows.settle(dtarget, written)


linear_soft_cross_entropy = LinearSoftCrossEntropy("linear_soft_cross_entropy")
