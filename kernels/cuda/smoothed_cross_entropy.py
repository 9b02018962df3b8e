"""Softmax cross-entropy with class indices as targets and label smoothing.

    k_c = keep w_y onehot(y) + spread w_c      mass = sum k_c      gap = sum k_c (top - x_c)
    loss = mass log total + gap                dlogits = dloss (mass p - k)

Smoothing is two numbers, keep = 1 - eps and spread = eps / C. The gap follows the running top: no digits cancel, nor do masks.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..groups import Rows, Smoothing
from .launch import device_of, launch
from .math import _exp, _wide, fp64
from .plan import TILE, Strides, Walk, class_stride, reading_tiles, tiles, view
from .rows import _blocks_of, _class_weights, _gap_of, _lanes_at, _loss_of, _merge, _no_statistics, _see, _tile_of, _weight_of


class Forward(NamedTuple):
    logits: Tensor  # [B, C, P]
    target: Tensor  # [B * P], as the results
    weight: Tensor  # [C]
    weight_stride: int | None
    ignore_index: int
    loss: Tensor
    rows: Rows
    way: Walk


class Backward(NamedTuple):
    logits: Tensor  # [B, C, P]
    target: Tensor  # [B * P], as `rows` and `dloss`
    weight: Tensor  # [C]
    weight_stride: int | None
    ignore_index: int
    rows: Rows
    dloss: Tensor
    dloss_stride: int
    dlogits: Tensor  # [B, C, P]
    dstrides: Strides
    way: Walk


def smoothed_cross_entropy_forward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, smoothing: Smoothing, loss: Tensor, rows: Rows
) -> None:
    v = view(logits.shape, logits.stride())
    t = reading_tiles(v, device_of(logits), TILE // 2)
    a = Forward(
        logits=logits, target=target, weight=weight, weight_stride=class_stride(weight.stride(0)), ignore_index=ignore_index,
        loss=loss, rows=rows, way=v.way,
    )  # fmt: skip
    launch(_smoothed_cross_entropy_forward, t.programs, t.num_warps, logits, a, *smoothing, BLOCK_N=t.BLOCK_N, BLOCK_C=t.BLOCK_C)


def smoothed_cross_entropy_backward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, smoothing: Smoothing, rows: Rows, dloss: Tensor, dlogits: Tensor
) -> None:
    v = view(logits.shape, logits.stride(), dlogits.stride())
    t = tiles(v, device_of(logits))
    a = Backward(
        logits=logits, target=target, weight=weight, weight_stride=class_stride(weight.stride(0)), ignore_index=ignore_index,
        rows=rows, dloss=dloss, dloss_stride=dloss.stride(0), dlogits=dlogits, dstrides=v.strides[1], way=v.way,
    )  # fmt: skip
    launch(
        _smoothed_cross_entropy_backward, t.elementwise_programs, t.num_warps, logits, a, *smoothing, BLOCK_N=t.BLOCK_N, BLOCK_C=t.BLOCK_C
    )  # fmt: skip


def smoothed_cross_entropy_forward_backward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, smoothing: Smoothing,
    dloss: Tensor, loss: Tensor, rows: Rows, dlogits: Tensor,
) -> None:  # fmt: skip
    """In two visits: only plain cross-entropy has a kernel for one."""
    smoothed_cross_entropy_forward(logits, target, weight, ignore_index, smoothing, loss, rows)
    smoothed_cross_entropy_backward(logits, target, weight, ignore_index, smoothing, rows, dloss, dlogits)


# keep and spread come one by one: Triton rounds the floats of a tuple to float32
@triton.jit
def _smoothed_cross_entropy_forward(a, keep: "fp64", spread: "fp64", BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program: all classes of BLOCK_N positions."""
    strides = a.way.strides
    real: tl.constexpr = a.rows.top.dtype.element_ty
    b, p, row, inside = _tile_of(tl.program_id(0), a.way.positions, BLOCK_N)
    y = tl.load(a.target + row, mask=inside, other=a.ignore_index)
    is_row = y != a.ignore_index
    # statistics
    tops, totals = _no_statistics([BLOCK_N, BLOCK_C], real)
    gaps = tl.zeros([BLOCK_N, BLOCK_C], real)
    weights = tl.zeros([1, BLOCK_C], real)
    for first in tl.range(0, a.way.classes, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        lanes = inside[:, None] & (c < a.way.classes)[None, :]
        x = _wide(tl.load(_lanes_at(a.logits, strides, b, p, c), mask=lanes, other=float("-inf")))
        w = _class_weights(a, c)
        before = tops
        tops, totals = _see(tops, totals, x)
        # in the first step nothing rises: from the lowest number that could be infinite, and 0 x inf
        gaps += tl.where(first > 0, weights * (tops - before), 0.0) + tl.where(lanes, w * (tops - x), 0.0)
        weights += w
    top, total = _merge(tops, totals, 1)
    gap = _gap_of(gaps, weights, tops, totals, top) * spread.to(real)
    # target logit and class weight: outside [0, C) a target is no index, and its weight is NaN
    is_class = is_row & (y >= 0) & (y < a.way.classes)
    x_y = _wide(tl.load(a.logits + b * strides.batch + p * strides.position + y * strides.class_, mask=is_class, other=0.0))
    w_y = _weight_of(a, y, is_class)
    # loss
    kept, smooth_mass = keep.to(real) * w_y, spread.to(real) * tl.sum(tl.sum(weights, 1), 0)
    log_total = tl.log(total)
    mass = kept + smooth_mass
    nll = log_total - (x_y - top)
    tl.store(a.loss + row, tl.where(is_row, kept * nll + _loss_of(smooth_mass, log_total, gap), 0.0), mask=inside)
    tl.store(a.rows.row_weight + row, tl.where(is_row, w_y, 0.0), mask=inside)
    tl.store(a.rows.mass + row, tl.where(is_row, mass, 0.0), mask=inside)
    tl.store(a.rows.top + row, tl.where(is_row, top, 0.0), mask=inside)
    tl.store(a.rows.total + row, tl.where(is_row, total, 1.0), mask=inside)


@triton.jit
def _smoothed_cross_entropy_backward(a, keep: "fp64", spread: "fp64", BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program: BLOCK_C classes of BLOCK_N positions."""
    real: tl.constexpr = a.rows.top.dtype.element_ty
    blocks = _blocks_of(a.way.classes, BLOCK_C)
    b, p, row, inside = _tile_of(tl.program_id(0) // blocks, a.way.positions, BLOCK_N)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    # row numbers
    y = tl.load(a.target + row, mask=inside, other=a.ignore_index)
    is_row = y != a.ignore_index
    g = tl.load(a.dloss + row * a.dloss_stride, mask=is_row, other=0.0)
    top = tl.load(a.rows.top + row, mask=is_row, other=0.0)
    scale = g * tl.load(a.rows.mass + row, mask=is_row, other=0.0) / tl.load(a.rows.total + row, mask=is_row, other=1.0)
    kept = g * keep.to(real) * tl.load(a.rows.row_weight + row, mask=is_row, other=0.0)
    # gradient
    lanes = inside[:, None] & (c < a.way.classes)[None, :]
    x = _wide(tl.load(_lanes_at(a.logits, a.way.strides, b, p, c), mask=lanes, other=0.0))
    w = _class_weights(a, c) * spread.to(real)
    d = _exp(x - top[:, None]) * scale[:, None] - g[:, None] * w
    d = tl.where(c[None, :] == y[:, None], d - kept[:, None], d)
    tl.store(_lanes_at(a.dlogits, a.dstrides, b, p, c), tl.where(is_row[:, None], d, 0.0), mask=lanes)
