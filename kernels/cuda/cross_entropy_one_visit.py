"""Softmax cross-entropy and its gradient in one visit to the logits, for callers who know the upstream gradient beforehand, or guess it.

A row waits in registers between its statistics and its gradient: in those of one program, or of a cluster of up to 16 thread blocks
(`num_ctas`, on GPUs of capability 9 and above) that exchange their maxima and sums through each other's shared memory.
Clusters have never run on hardware here: FASTLOSS_CLUSTER=1 turns them on. Without them, long rows take two visits.

A guess stays on the device: nobody waits for it. `cross_entropy_repair` asks there whether it was right, and if not writes the gradient
again, from the row numbers of this visit and in the same arithmetic, so that it has the same bits.
"""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..groups import Foreseen, Reduction, Rows
from .cross_entropy import Guess, backward_unless, cross_entropy_backward, cross_entropy_forward
from .launch import device_of, launch
from .math import _exp, _lowest, _wide
from .nll_loss import sum_weights
from .plan import ONE_VISIT_BYTES, OneVisitPlan, Strides, View, Walk, class_stride, one_visit, view
from .reduction import sum_rows
from .rows import _body_of, _edges_of, _first_vector, _lanes_of_vectors, _row_of, _weight_of

# Before 3.8 Triton failed to compile reductions across a cluster
_TRITON_HAS_CLUSTERS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 8)


class ForwardBackward(NamedTuple):
    foreseen: Tensor | None  # [2]: no gradient is wanted if they differ
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


def one_visit_pays(logits: Tensor) -> bool:
    """Whether loss and gradient of such logits, with a gradient that lies like them, take less time in one visit."""
    v = view(logits.shape, logits.stride(), logits.stride())
    return v.rows * v.classes * logits.element_size() >= ONE_VISIT_BYTES and _plan(v, logits) is not None


def _plan(v: View, logits: Tensor) -> OneVisitPlan | None:
    clusters = _TRITON_HAS_CLUSTERS and os.environ.get("FASTLOSS_CLUSTER", "0") == "1"
    return one_visit(v, logits.element_size(), device_of(logits), clusters)


def cross_entropy_forward_backward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, dloss: Tensor, loss: Tensor, rows: Rows, dlogits: Tensor
) -> None:
    """What `cross_entropy_forward` and then `cross_entropy_backward` with this `dloss` compute."""
    _visit(None, logits, target, weight, ignore_index, dloss, loss, rows, dlogits)


def reduced_cross_entropy_forward_backward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, reduction: Reduction, loss: Tensor, rows: Rows, dlogits: Tensor
) -> None:
    dloss = torch.full((1,), reduction.dloss, dtype=loss.dtype, device=loss.device)
    g = _share_of_rows(dloss, target, weight, ignore_index, reduction.divisor)
    _visit(None, logits, target, weight, ignore_index, g, loss, rows, dlogits)
    _reduce(loss, reduction)


def foreseen_cross_entropy_forward_backward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, foreseen: Foreseen, loss: Tensor, rows: Rows, dlogits: Tensor
) -> None:
    g = _share_of_rows(foreseen.dloss[:1], target, weight, ignore_index, foreseen.divisor)
    _visit(foreseen.dloss, logits, target, weight, ignore_index, g, loss, rows, dlogits)
    _reduce(loss, foreseen)


def cross_entropy_repair(
    logits: Tensor, target: Tensor, ignore_index: int, rows: Rows, dloss: Tensor, upstream: Tensor, foreseen: Tensor, dlogits: Tensor
) -> None:
    backward_unless(Guess(upstream, foreseen), logits, target, ignore_index, rows, dloss, dlogits)


def _share_of_rows(dloss: Tensor, target: Tensor, weight: Tensor, ignore_index: int, divisor: Tensor) -> Tensor:
    """The gradient of every row's loss [N], from that of their sum or mean, whose divisor is written."""
    if divisor.numel():
        sum_weights(target, weight, ignore_index, divisor)
        dloss = dloss / divisor
    return dloss.expand(target.numel())


def _reduce(loss: Tensor, reduction: Reduction | Foreseen) -> None:
    sum_rows(loss, reduction.total)
    if reduction.divisor.numel():
        reduction.total.div_(reduction.divisor)


def _visit(
    foreseen: Tensor | None, logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int,
    dloss: Tensor, loss: Tensor, rows: Rows, dlogits: Tensor,
) -> None:  # fmt: skip
    v = view(logits.shape, logits.stride(), dlogits.stride())
    plan = _plan(v, logits)
    if plan is None:
        cross_entropy_forward(logits, target, weight, ignore_index, loss, rows)
        cross_entropy_backward(logits, target, ignore_index, rows, dloss, dlogits)
        return
    a = ForwardBackward(
        foreseen=foreseen, logits=logits, target=target, weight=weight, weight_stride=class_stride(weight.stride(0)),
        ignore_index=ignore_index, dloss=dloss, dloss_stride=dloss.stride(0), loss=loss, rows=rows, dlogits=dlogits,
        dstrides=v.strides[1], way=v.way,
    )  # fmt: skip
    if plan.num_ctas == 1:
        launch(_cross_entropy_forward_backward_rows, plan.rows, plan.num_warps, logits, a, VEC=plan.VEC, BLOCK_C=plan.BLOCK_C)
    else:
        launch(
            _cross_entropy_forward_backward_cluster, plan.rows, plan.num_warps, logits, a, BLOCK_C=plan.BLOCK_C, num_ctas=plan.num_ctas
        )  # fmt: skip


@triton.jit
def _target_of(a, row, x_ptr):
    """The class of a row, -1 if it has none; whether the row counts; its target logit and class weight, read before the gradient may
    take their place."""
    y = tl.load(a.target + row)
    is_row = y != a.ignore_index
    is_class = is_row & (y >= 0) & (y < a.way.classes)
    x_y = _wide(tl.load(x_ptr + y, mask=is_class, other=0.0))
    w_y = tl.where(is_row, _weight_of(a, y, is_class), 0.0)
    return tl.where(is_class, y, -1).to(tl.int32), is_row, x_y, w_y


@triton.jit
def _write_loss(a, row, is_row, x_y, w_y, top, total):
    """The row's numbers. What its gradient wants: g, and g / total."""
    nll = tl.log(total) - (x_y - top)
    tl.store(a.loss + row, tl.where(is_row, w_y * nll, 0.0))
    tl.store(a.rows.row_weight + row, w_y)
    tl.store(a.rows.top + row, tl.where(is_row, top, 0.0))
    tl.store(a.rows.total + row, tl.where(is_row, total, 1.0))
    g = tl.where(is_row, tl.load(a.dloss + row * a.dloss_stride) * w_y, 0.0)
    return g, tl.where(is_row, g / total, 0.0)


@triton.jit
def _is_wanted(a, lanes):
    """Which lanes of a gradient are written: none if nothing is foreseen."""
    if a.foreseen is not None:
        number = tl.load(a.foreseen)
        lanes = lanes & (number == tl.load(a.foreseen + 1)) & (number != 0.0)
    return lanes


@triton.jit
def _cross_entropy_forward_backward_rows(a, VEC: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where the class strides are 1 and rows start alike modulo VEC. One program: one row, C <= BLOCK_C."""
    row, C = tl.program_id(0), a.way.classes
    start, to = _row_of(row, a.way.positions, a.way.strides), _row_of(row, a.way.positions, a.dstrides)
    y, is_row, x_y, w_y = _target_of(a, row, a.logits + start)
    head, vectors, first = _body_of(start, C, VEC)
    lane, offset = _lanes_of_vectors(BLOCK_C // VEC, VEC)
    inside = (lane < vectors)[:, None]
    c, at_edge = _edges_of(head, vectors, C, VEC)
    # statistics
    x = _wide(tl.load(a.logits + first + offset, mask=inside & is_row, other=float("-inf")))
    edges = _wide(tl.load(a.logits + start + c, mask=at_edge & is_row, other=float("-inf")))
    top = tl.maximum(tl.maximum(tl.max(tl.max(x, 1), 0), tl.max(edges, 0)), _lowest(x.dtype))
    terms, of_edges = _exp(x - top), _exp(edges - top)
    total = tl.sum(tl.sum(terms, 1), 0) + tl.sum(of_edges, 0)
    # loss and gradient
    g, scale = _write_loss(a, row, is_row, x_y, w_y, top, total)
    d = tl.where(offset == y - head, tl.fma(terms, scale, -g), terms * scale)
    tl.store(a.dlogits + _first_vector(to, VEC) + offset, d, mask=_is_wanted(a, inside))
    d = tl.where(c == y, tl.fma(of_edges, scale, -g), of_edges * scale)
    tl.store(a.dlogits + to + c, d, mask=_is_wanted(a, at_edge))


@triton.jit
def _cross_entropy_forward_backward_cluster(a, BLOCK_C: tl.constexpr):
    """Where the class strides are 1 and rows are aligned. One program, a cluster: one row, C <= BLOCK_C."""
    row = tl.program_id(0)
    x_ptr = a.logits + _row_of(row, a.way.positions, a.way.strides)
    y, is_row, x_y, w_y = _target_of(a, row, x_ptr)
    # statistics
    c = tl.arange(0, BLOCK_C)
    x = _wide(tl.load(x_ptr + c, mask=(c < a.way.classes) & is_row, other=float("-inf")))
    top = tl.maximum(tl.max(x, 0), _lowest(x.dtype))
    terms = _exp(x - top)
    total = tl.sum(terms, 0)
    # loss and gradient
    g, scale = _write_loss(a, row, is_row, x_y, w_y, top, total)
    d = tl.where(c == y, tl.fma(terms, scale, -g), terms * scale)
    tl.store(a.dlogits + _row_of(row, a.way.positions, a.dstrides) + c, d, mask=_is_wanted(a, c < a.way.classes))
