"""Softmax cross-entropy with class indices as targets and label smoothing.

    k_c = keep w_y onehot(y) + spread w_c      mass = sum k_c      gap = sum k_c (top - x_c)
    loss = mass log total + gap                dlogits = dloss (mass p - k)

Smoothing is two numbers, keep = 1 - eps and spread = eps / C. The gap follows the running top: no digits cancel, nor do masks.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..groups import Rows, Smoothing
from .launch import device_of, launch
from .math import _exp, _wide, fp64
from .plan import TILE, class_stride, reading_tiles, tiles, view
from .rows import _blocks_of, _class_weights, _gap_of, _lanes_at, _loss_of, _merge, _no_statistics, _see, _tile_of, _weight_of


def smoothed_cross_entropy_forward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, smoothing: Smoothing, loss: Tensor, rows: Rows
) -> None:
    (keep, spread), (row_weight, mass, top, total) = smoothing, rows
    v = view(logits.shape, logits.stride())
    t = reading_tiles(v, device_of(logits), TILE // 2)
    launch(
        _smoothed_cross_entropy_forward, t.programs, t.num_warps, logits,
        logits, v.strides[0], target, ignore_index, weight, class_stride(weight.stride(0)), keep, spread,
        loss, row_weight, mass, top, total, v.classes, v.positions, BLOCK_N=t.BLOCK_N, BLOCK_C=t.BLOCK_C,
    )  # fmt: skip


def smoothed_cross_entropy_backward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, smoothing: Smoothing, rows: Rows, dloss: Tensor, dlogits: Tensor
) -> None:
    (keep, spread), (row_weight, mass, top, total) = smoothing, rows
    v = view(logits.shape, logits.stride(), dlogits.stride())
    t = tiles(v, device_of(logits))
    launch(
        _smoothed_cross_entropy_backward, t.elementwise_programs, t.num_warps, logits,
        logits, v.strides[0], target, ignore_index, weight, class_stride(weight.stride(0)), keep, spread, row_weight, mass, top, total,
        dloss, dloss.stride(0), dlogits, v.strides[1], v.classes, v.positions, BLOCK_N=t.BLOCK_N, BLOCK_C=t.BLOCK_C,
    )  # fmt: skip


def smoothed_cross_entropy_forward_backward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, smoothing: Smoothing,
    dloss: Tensor, loss: Tensor, rows: Rows, dlogits: Tensor,
) -> None:  # fmt: skip
    """In two visits: only plain cross-entropy has a kernel for one."""
    smoothed_cross_entropy_forward(logits, target, weight, ignore_index, smoothing, loss, rows)
    smoothed_cross_entropy_backward(logits, target, weight, ignore_index, smoothing, rows, dloss, dlogits)


@triton.jit
def _smoothed_cross_entropy_forward(
    logits_ptr, strides, target_ptr, ignore_index, weight_ptr, weight_stride, keep: "fp64", spread: "fp64",
    loss_ptr, row_weight_ptr, mass_ptr, top_ptr, total_ptr, C, P, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """logits [B, C, P]; target, loss, row_weight, mass, top, total [B * P]; weight [C]. One program: all classes of BLOCK_N positions."""
    real: tl.constexpr = top_ptr.dtype.element_ty
    b, p, row, inside = _tile_of(tl.program_id(0), P, BLOCK_N)
    y = tl.load(target_ptr + row, mask=inside, other=ignore_index)
    is_row = y != ignore_index
    # statistics
    tops, totals = _no_statistics([BLOCK_N, BLOCK_C], real)
    gaps = tl.zeros([BLOCK_N, BLOCK_C], real)
    weights = tl.zeros([1, BLOCK_C], real)
    for first in tl.range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        lanes = inside[:, None] & (c < C)[None, :]
        x = _wide(tl.load(_lanes_at(logits_ptr, strides, b, p, c), mask=lanes, other=float("-inf")))
        w = _class_weights(weight_ptr, weight_stride, c, C)
        before = tops
        tops, totals = _see(tops, totals, x)
        # in the first step nothing rises: from the lowest number that could be infinite, and 0 x inf
        gaps += tl.where(first > 0, weights * (tops - before), 0.0) + tl.where(lanes, w * (tops - x), 0.0)
        weights += w
    top, total = _merge(tops, totals, 1)
    gap = _gap_of(gaps, weights, tops, totals, top) * spread.to(real)
    # target logit and class weight: outside [0, C) a target is no index, and its weight is NaN
    is_class = is_row & (y >= 0) & (y < C)
    x_y = _wide(tl.load(logits_ptr + b * strides.batch + p * strides.position + y * strides.class_, mask=is_class, other=0.0))
    w_y = _weight_of(weight_ptr, weight_stride, y, is_class)
    # loss
    kept, smooth_mass = keep.to(real) * w_y, spread.to(real) * tl.sum(tl.sum(weights, 1), 0)
    log_total = tl.log(total)
    mass = kept + smooth_mass
    nll = log_total - (x_y - top)
    tl.store(loss_ptr + row, tl.where(is_row, kept * nll + _loss_of(smooth_mass, log_total, gap), 0.0), mask=inside)
    tl.store(row_weight_ptr + row, tl.where(is_row, w_y, 0.0), mask=inside)
    tl.store(mass_ptr + row, tl.where(is_row, mass, 0.0), mask=inside)
    tl.store(top_ptr + row, tl.where(is_row, top, 0.0), mask=inside)
    tl.store(total_ptr + row, tl.where(is_row, total, 1.0), mask=inside)


@triton.jit
def _smoothed_cross_entropy_backward(
    logits_ptr, strides, target_ptr, ignore_index, weight_ptr, weight_stride, keep: "fp64", spread: "fp64",
    row_weight_ptr, mass_ptr, top_ptr, total_ptr, dloss_ptr, dloss_stride, dlogits_ptr, dstrides, C, P,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """logits, dlogits [B, C, P]; weight [C]; the others [B * P]. One program: BLOCK_C classes of BLOCK_N positions."""
    real: tl.constexpr = top_ptr.dtype.element_ty
    blocks = _blocks_of(C, BLOCK_C)
    b, p, row, inside = _tile_of(tl.program_id(0) // blocks, P, BLOCK_N)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    # row numbers
    y = tl.load(target_ptr + row, mask=inside, other=ignore_index)
    is_row = y != ignore_index
    g = tl.load(dloss_ptr + row * dloss_stride, mask=is_row, other=0.0)
    top = tl.load(top_ptr + row, mask=is_row, other=0.0)
    scale = g * tl.load(mass_ptr + row, mask=is_row, other=0.0) / tl.load(total_ptr + row, mask=is_row, other=1.0)
    kept = g * keep.to(real) * tl.load(row_weight_ptr + row, mask=is_row, other=0.0)
    # gradient
    lanes = inside[:, None] & (c < C)[None, :]
    x = _wide(tl.load(_lanes_at(logits_ptr, strides, b, p, c), mask=lanes, other=0.0))
    w = _class_weights(weight_ptr, weight_stride, c, C) * spread.to(real)
    d = _exp(x - top[:, None]) * scale[:, None] - g[:, None] * w
    d = tl.where(c[None, :] == y[:, None], d - kept[:, None], d)
    tl.store(_lanes_at(dlogits_ptr, dstrides, b, p, c), tl.where(is_row[:, None], d, 0.0), mask=lanes)
