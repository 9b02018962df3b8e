"""Softmax cross-entropy with class probabilities q as targets.

k_c = w_c (keep q_c + spread)      mass = sum k_c      gap = sum k_c (top - x_c)
loss = mass log total + gap        dlogits = dloss (mass p - k)      dtarget = dloss keep w_c (-log p_c)
"""

import triton
import triton.language as tl
from torch import Tensor

from ..groups import Rows, Smoothing
from .launch import device_of, launch
from .math import _exp, _wide, fp64
from .plan import TILE, class_stride, looping_tiles, tiles, view
from .rows import _blocks_of, _class_weights, _gap_of, _lanes_at, _loss_of, _merge, _no_statistics, _see, _tile_of


def soft_cross_entropy_forward(logits: Tensor, target: Tensor, weight: Tensor, smoothing: Smoothing, loss: Tensor, rows: Rows) -> None:
    (keep, spread), (_, mass, top, total) = smoothing, rows
    v = view(logits.shape, logits.stride(), target.stride())
    t = looping_tiles(v, device_of(logits), TILE // 2)
    launch(
        _soft_cross_entropy_forward, t.programs, t.num_warps, logits,
        logits, v.strides[0], target, v.strides[1], weight, class_stride(weight.stride(0)), keep, spread, loss, mass, top, total,
        v.classes, v.positions, BLOCK_N=t.BLOCK_N, BLOCK_C=t.BLOCK_C,
    )  # fmt: skip


def soft_cross_entropy_backward(
    logits: Tensor, target: Tensor, weight: Tensor, smoothing: Smoothing, rows: Rows, dloss: Tensor, dlogits: Tensor
) -> None:
    (keep, spread), (_, mass, top, total) = smoothing, rows
    v = view(logits.shape, logits.stride(), target.stride(), dlogits.stride())
    t = tiles(v, device_of(logits))
    launch(
        _soft_cross_entropy_backward, t.elementwise_programs, t.num_warps, logits,
        logits, v.strides[0], target, v.strides[1], weight, class_stride(weight.stride(0)), keep, spread, mass, top, total,
        dloss, dloss.stride(0), dlogits, v.strides[2], v.classes, v.positions, BLOCK_N=t.BLOCK_N, BLOCK_C=t.BLOCK_C,
    )  # fmt: skip


def soft_cross_entropy_forward_backward(
    logits: Tensor, target: Tensor, weight: Tensor, smoothing: Smoothing, dloss: Tensor, loss: Tensor, rows: Rows, dlogits: Tensor
) -> None:
    """In two visits: only plain cross-entropy has a kernel for one."""
    soft_cross_entropy_forward(logits, target, weight, smoothing, loss, rows)
    soft_cross_entropy_backward(logits, target, weight, smoothing, rows, dloss, dlogits)


def soft_cross_entropy_target_backward(logits: Tensor, weight: Tensor, keep: float, rows: Rows, dloss: Tensor, dtarget: Tensor) -> None:
    _, _, top, total = rows
    v = view(logits.shape, logits.stride(), dtarget.stride())
    t = tiles(v, device_of(logits))
    launch(
        _soft_cross_entropy_target_backward, t.elementwise_programs, t.num_warps, logits,
        logits, v.strides[0], weight, class_stride(weight.stride(0)), keep, top, total, dloss, dloss.stride(0), dtarget, v.strides[1],
        v.classes, v.positions, BLOCK_N=t.BLOCK_N, BLOCK_C=t.BLOCK_C,
    )  # fmt: skip


@triton.jit
def _soft_cross_entropy_forward(
    logits_ptr, strides, target_ptr, target_strides, weight_ptr, weight_stride, keep: "fp64", spread: "fp64",
    loss_ptr, mass_ptr, top_ptr, total_ptr, C, P, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """logits, target [B, C, P]; weight [C]; loss, mass, top, total [B * P]. One program: all classes of BLOCK_N positions."""
    real: tl.constexpr = top_ptr.dtype.element_ty
    b, p, row, inside = _tile_of(tl.program_id(0), P, BLOCK_N)
    # statistics
    tops, totals = _no_statistics([BLOCK_N, BLOCK_C], real)
    gaps = tl.zeros([BLOCK_N, BLOCK_C], real)
    masses = tl.zeros([BLOCK_N, BLOCK_C], real)
    for first in tl.range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        lanes = inside[:, None] & (c < C)[None, :]
        x = _wide(tl.load(_lanes_at(logits_ptr, strides, b, p, c), mask=lanes, other=float("-inf")))
        q = _wide(tl.load(_lanes_at(target_ptr, target_strides, b, p, c), mask=lanes, other=0.0))
        w = _class_weights(weight_ptr, weight_stride, c, C)
        k = w * (keep.to(real) * q + spread.to(real))
        before = tops
        tops, totals = _see(tops, totals, x)
        # in the first step nothing rises: from the lowest number that could be infinite, and 0 x inf
        gaps += tl.where(first > 0, masses * (tops - before), 0.0) + tl.where(lanes, k * (tops - x), 0.0)
        masses += k
    top, total = _merge(tops, totals, 1)
    gap = _gap_of(gaps, masses, tops, totals, top)
    # loss
    mass = tl.sum(masses, 1)
    tl.store(loss_ptr + row, _loss_of(mass, tl.log(total), gap), mask=inside)
    tl.store(mass_ptr + row, mass, mask=inside)
    tl.store(top_ptr + row, top, mask=inside)
    tl.store(total_ptr + row, total, mask=inside)


@triton.jit
def _soft_cross_entropy_backward(
    logits_ptr, strides, target_ptr, target_strides, weight_ptr, weight_stride, keep: "fp64", spread: "fp64",
    mass_ptr, top_ptr, total_ptr, dloss_ptr, dloss_stride, dlogits_ptr, dstrides, C, P, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """logits, target, dlogits [B, C, P]; weight [C]; the others [B * P]. One program: BLOCK_C classes of BLOCK_N positions."""
    real: tl.constexpr = top_ptr.dtype.element_ty
    blocks = _blocks_of(C, BLOCK_C)
    b, p, row, inside = _tile_of(tl.program_id(0) // blocks, P, BLOCK_N)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    # row numbers
    g = tl.load(dloss_ptr + row * dloss_stride, mask=inside, other=0.0)
    top = tl.load(top_ptr + row, mask=inside, other=0.0)
    scale = tl.load(mass_ptr + row, mask=inside, other=0.0) / tl.load(total_ptr + row, mask=inside, other=1.0)
    # gradient
    lanes = inside[:, None] & (c < C)[None, :]
    x = _wide(tl.load(_lanes_at(logits_ptr, strides, b, p, c), mask=lanes, other=0.0))
    q = _wide(tl.load(_lanes_at(target_ptr, target_strides, b, p, c), mask=lanes, other=0.0))
    w = _class_weights(weight_ptr, weight_stride, c, C)
    k = w * (keep.to(real) * q + spread.to(real))
    d = g[:, None] * (_exp(x - top[:, None]) * scale[:, None] - k)
    tl.store(_lanes_at(dlogits_ptr, dstrides, b, p, c), d, mask=lanes)


@triton.jit
def _soft_cross_entropy_target_backward(
    logits_ptr, strides, weight_ptr, weight_stride, keep: "fp64", top_ptr, total_ptr, dloss_ptr, dloss_stride,
    dtarget_ptr, dstrides, C, P, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """logits, dtarget [B, C, P]; weight [C]; the others [B * P]. One program: BLOCK_C classes of BLOCK_N positions."""
    real: tl.constexpr = top_ptr.dtype.element_ty
    blocks = _blocks_of(C, BLOCK_C)
    b, p, row, inside = _tile_of(tl.program_id(0) // blocks, P, BLOCK_N)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    # row numbers
    g = tl.load(dloss_ptr + row * dloss_stride, mask=inside, other=0.0) * keep.to(real)
    top = tl.load(top_ptr + row, mask=inside, other=0.0)
    log_total = tl.log(tl.load(total_ptr + row, mask=inside, other=1.0))
    # gradient
    lanes = inside[:, None] & (c < C)[None, :]
    x = _wide(tl.load(_lanes_at(logits_ptr, strides, b, p, c), mask=lanes, other=0.0))
    w = _class_weights(weight_ptr, weight_stride, c, C)
    d = g[:, None] * w * (log_total[:, None] - (x - top[:, None]))
    tl.store(_lanes_at(dtarget_ptr, dstrides, b, p, c), d, mask=lanes)
