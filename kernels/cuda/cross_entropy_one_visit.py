"""Softmax cross-entropy and its gradient in one visit to the logits, for callers who know the upstream gradient beforehand.

A row waits in registers between its statistics and its gradient: in those of one program, or of a cluster of up to 16 thread blocks
(`num_ctas`, on GPUs of capability 9 and above) that exchange their maxima and sums through each other's shared memory.
Clusters have never run on hardware here: FASTLOSS_CLUSTER=1 turns them on. Without them, long rows take two visits.
"""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..groups import Reduction, Rows
from .cross_entropy import cross_entropy_backward, cross_entropy_forward
from .launch import device_of, launch
from .math import _exp, _lowest, _wide
from .nll_loss import sum_weights
from .plan import Strides, Walk, class_stride, one_visit, view
from .reduction import sum_rows
from .rows import _row_of, _weight_of

# Before 3.8 Triton failed to compile reductions across a cluster
_TRITON_HAS_CLUSTERS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 8)


class ForwardBackward(NamedTuple):
    logits: Tensor  # [B, C, P]
    target: Tensor  # [B * P], as `dloss`, `loss` and `rows`
    weight: Tensor  # [C]
    weight_stride: int | None
    ignore_index: int
    dloss: Tensor
    dloss_stride: int
    loss: Tensor
    rows: Rows
    dlogits: Tensor  # [B, C, P]
    dstrides: Strides
    way: Walk


def cross_entropy_forward_backward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, dloss: Tensor, loss: Tensor, rows: Rows, dlogits: Tensor
) -> None:
    """What `cross_entropy_forward` and then `cross_entropy_backward` with this `dloss` compute."""
    v = view(logits.shape, logits.stride(), dlogits.stride())
    clusters = _TRITON_HAS_CLUSTERS and os.environ.get("FASTLOSS_CLUSTER", "0") == "1"
    plan = one_visit(v, logits.element_size(), device_of(logits), clusters)
    if plan is None:
        cross_entropy_forward(logits, target, weight, ignore_index, loss, rows)
        cross_entropy_backward(logits, target, ignore_index, rows, dloss, dlogits)
        return
    a = ForwardBackward(
        logits=logits, target=target, weight=weight, weight_stride=class_stride(weight.stride(0)), ignore_index=ignore_index,
        dloss=dloss, dloss_stride=dloss.stride(0), loss=loss, rows=rows, dlogits=dlogits, dstrides=v.strides[1], way=v.way,
    )  # fmt: skip
    launch(
        _cross_entropy_forward_backward, plan.rows, plan.num_warps, logits, a, BLOCK_C=plan.BLOCK_C, num_ctas=plan.num_ctas
    )  # fmt: skip


def reduced_cross_entropy_forward_backward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, reduction: Reduction, loss: Tensor, rows: Rows, dlogits: Tensor
) -> None:
    dloss = torch.full((), reduction.dloss, dtype=loss.dtype, device=loss.device)
    if reduction.divisor.numel():
        sum_weights(target, weight, ignore_index, reduction.divisor)
        dloss.div_(reduction.divisor)
    cross_entropy_forward_backward(logits, target, weight, ignore_index, dloss.expand(loss.numel()), loss, rows, dlogits)
    sum_rows(loss, reduction.total)
    if reduction.divisor.numel():
        reduction.total.div_(reduction.divisor)


@triton.jit
def _cross_entropy_forward_backward(a, BLOCK_C: tl.constexpr):
    """Where the class strides are 1. One program (a cluster): one row, C <= BLOCK_C."""
    row = tl.program_id(0)
    x_ptr = a.logits + _row_of(row, a.way.positions, a.way.strides)
    y = tl.load(a.target + row)
    is_row = y != a.ignore_index
    is_class = is_row & (y >= 0) & (y < a.way.classes)
    # target logit and class weight: before the gradient may take its place
    x_y = _wide(tl.load(x_ptr + y, mask=is_class, other=0.0))
    w_y = tl.where(is_row, _weight_of(a, y, is_class), 0.0)
    # statistics
    c = tl.arange(0, BLOCK_C)
    x = _wide(tl.load(x_ptr + c, mask=(c < a.way.classes) & is_row, other=float("-inf")))
    top = tl.maximum(tl.max(x, 0), _lowest(x.dtype))
    terms = _exp(x - top)
    total = tl.sum(terms, 0)
    # loss
    nll = tl.log(total) - (x_y - top)
    tl.store(a.loss + row, tl.where(is_row, w_y * nll, 0.0))
    tl.store(a.rows.row_weight + row, w_y)
    tl.store(a.rows.top + row, tl.where(is_row, top, 0.0))
    tl.store(a.rows.total + row, tl.where(is_row, total, 1.0))
    # gradient
    g = tl.where(is_row, tl.load(a.dloss + row * a.dloss_stride) * w_y, 0.0)
    d = terms * tl.where(is_row, g / total, 0.0)
    d = tl.where(c == tl.where(is_class, y, -1).to(tl.int32), d - g, d)
    tl.store(a.dlogits + _row_of(row, a.way.positions, a.dstrides) + c, d, mask=c < a.way.classes)
