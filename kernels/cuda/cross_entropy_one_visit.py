"""Softmax cross-entropy and its gradient in one visit to the logits, for callers who know the upstream gradient beforehand.

A row waits in registers between its statistics and its gradient: in those of one program, or of a cluster of up to 16 thread blocks
(`num_ctas`, on GPUs of capability 9 and above) that exchange their maxima and sums through each other's shared memory.
Clusters have never run on hardware here: FASTLOSS_CLUSTER=1 turns them on. Without them, long rows take two visits.
"""

import os

import triton
import triton.language as tl
from torch import Tensor

from ..groups import Rows
from .cross_entropy import cross_entropy_backward, cross_entropy_forward
from .launch import device_of, launch
from .math import _exp, _lowest, _wide
from .plan import class_stride, one_visit, view
from .rows import _row_of, _weight_of

# Before 3.8 Triton failed to compile reductions across a cluster
_TRITON_HAS_CLUSTERS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 8)


def cross_entropy_forward_backward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, dloss: Tensor, loss: Tensor, rows: Rows, dlogits: Tensor
) -> None:
    """What `cross_entropy_forward` and then `cross_entropy_backward` with this `dloss` compute."""
    row_weight, _, top, total = rows
    v = view(logits.shape, logits.stride(), dlogits.stride())
    clusters = _TRITON_HAS_CLUSTERS and os.environ.get("FASTLOSS_CLUSTER", "0") == "1"
    plan = one_visit(v, logits.element_size(), device_of(logits), clusters)
    if plan is None:
        cross_entropy_forward(logits, target, weight, ignore_index, loss, rows)
        cross_entropy_backward(logits, target, ignore_index, rows, dloss, dlogits)
        return
    launch(
        _cross_entropy_forward_backward, plan.rows, plan.num_warps, logits,
        logits, v.strides[0], target, ignore_index, weight, class_stride(weight.stride(0)), dloss, dloss.stride(0),
        loss, row_weight, top, total, dlogits, v.strides[1], v.classes, v.positions, BLOCK_C=plan.BLOCK_C, num_ctas=plan.num_ctas,
    )  # fmt: skip


@triton.jit
def _cross_entropy_forward_backward(
    logits_ptr, strides, target_ptr, ignore_index, weight_ptr, weight_stride, dloss_ptr, dloss_stride,
    loss_ptr, row_weight_ptr, top_ptr, total_ptr, dlogits_ptr, dstrides, C, P, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """logits, dlogits [B, C, P] with class stride 1; weight [C]; the others [B * P]. One program (a cluster): one row, C <= BLOCK_C."""
    row = tl.program_id(0)
    x_ptr = logits_ptr + _row_of(row, P, strides)
    y = tl.load(target_ptr + row)
    is_row = y != ignore_index
    is_class = is_row & (y >= 0) & (y < C)
    # target logit and class weight: before the gradient may take its place
    x_y = _wide(tl.load(x_ptr + y, mask=is_class, other=0.0))
    w_y = tl.where(is_row, _weight_of(weight_ptr, weight_stride, y, is_class), 0.0)
    # statistics
    c = tl.arange(0, BLOCK_C)
    x = _wide(tl.load(x_ptr + c, mask=(c < C) & is_row, other=float("-inf")))
    top = tl.maximum(tl.max(x, 0), _lowest(x.dtype))
    terms = _exp(x - top)
    total = tl.sum(terms, 0)
    # loss
    nll = tl.log(total) - (x_y - top)
    tl.store(loss_ptr + row, tl.where(is_row, w_y * nll, 0.0))
    tl.store(row_weight_ptr + row, w_y)
    tl.store(top_ptr + row, tl.where(is_row, top, 0.0))
    tl.store(total_ptr + row, tl.where(is_row, total, 1.0))
    # gradient
    g = tl.where(is_row, tl.load(dloss_ptr + row * dloss_stride) * w_y, 0.0)
    d = terms * tl.where(is_row, g / total, 0.0)
    d = tl.where(c == tl.where(is_class, y, -1).to(tl.int32), d - g, d)
    tl.store(dlogits_ptr + _row_of(row, P, dstrides) + c, d, mask=c < C)
