"""Softmax cross-entropy with class probabilities q as targets.

k_c = w_c (keep q_c + spread)      mass = sum k_c      gap = sum k_c (top - x_c)
loss = mass log total + gap        dlogits = dloss (mass p - k)      dtarget = dloss keep w_c (-log p_c)
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..groups import Rows, Smoothing
from .launch import device_of, launch
from .math import _exp, _wide, fp64
from .plan import TILE, Strides, Walk, class_stride, looping_tiles, tiles, view
from .rows import _blocks_of, _class_weights, _gap_of, _lanes_at, _loss_of, _merge, _no_statistics, _see, _tile_of


class Forward(NamedTuple):
    logits: Tensor  # [B, C, P], as `target`
    target: Tensor
    target_strides: Strides
    weight: Tensor  # [C]
    weight_stride: int | None
    loss: Tensor  # [B * P], as `rows`
    rows: Rows
    way: Walk


class Backward(NamedTuple):
    logits: Tensor  # [B, C, P], as `target` and `dlogits`
    target: Tensor
    target_strides: Strides
    weight: Tensor  # [C]
    weight_stride: int | None
    rows: Rows  # [B * P], as `dloss`
    dloss: Tensor
    dloss_stride: int
    dlogits: Tensor
    dstrides: Strides
    way: Walk


class TargetBackward(NamedTuple):
    logits: Tensor  # [B, C, P], as `dtarget`
    weight: Tensor  # [C]
    weight_stride: int | None
    rows: Rows  # [B * P], as `dloss`
    dloss: Tensor
    dloss_stride: int
    dtarget: Tensor
    dstrides: Strides
    way: Walk


def soft_cross_entropy_forward(logits: Tensor, target: Tensor, weight: Tensor, smoothing: Smoothing, loss: Tensor, rows: Rows) -> None:
    v = view(logits.shape, logits.stride(), target.stride())
    t = looping_tiles(v, device_of(logits), TILE // 2)
    a = Forward(
        logits=logits, target=target, target_strides=v.strides[1], weight=weight, weight_stride=class_stride(weight.stride(0)),
        loss=loss, rows=rows, way=v.way,
    )  # fmt: skip
    launch(_soft_cross_entropy_forward, t.programs, t.num_warps, logits, a, *smoothing, BLOCK_N=t.BLOCK_N, BLOCK_C=t.BLOCK_C)


def soft_cross_entropy_backward(
    logits: Tensor, target: Tensor, weight: Tensor, smoothing: Smoothing, rows: Rows, dloss: Tensor, dlogits: Tensor
) -> None:
    v = view(logits.shape, logits.stride(), target.stride(), dlogits.stride())
    t = tiles(v, device_of(logits))
    a = Backward(
        logits=logits, target=target, target_strides=v.strides[1], weight=weight, weight_stride=class_stride(weight.stride(0)),
        rows=rows, dloss=dloss, dloss_stride=dloss.stride(0), dlogits=dlogits, dstrides=v.strides[2], way=v.way,
    )  # fmt: skip
    launch(
        _soft_cross_entropy_backward, t.elementwise_programs, t.num_warps, logits, a, *smoothing, BLOCK_N=t.BLOCK_N, BLOCK_C=t.BLOCK_C
    )  # fmt: skip


def soft_cross_entropy_forward_backward(
    logits: Tensor, target: Tensor, weight: Tensor, smoothing: Smoothing, dloss: Tensor, loss: Tensor, rows: Rows, dlogits: Tensor
) -> None:
    """In two visits: only plain cross-entropy has a kernel for one."""
    soft_cross_entropy_forward(logits, target, weight, smoothing, loss, rows)
    soft_cross_entropy_backward(logits, target, weight, smoothing, rows, dloss, dlogits)


def soft_cross_entropy_target_backward(logits: Tensor, weight: Tensor, keep: float, rows: Rows, dloss: Tensor, dtarget: Tensor) -> None:
    v = view(logits.shape, logits.stride(), dtarget.stride())
    t = tiles(v, device_of(logits))
    a = TargetBackward(
        logits=logits, weight=weight, weight_stride=class_stride(weight.stride(0)), rows=rows, dloss=dloss, dloss_stride=dloss.stride(0),
        dtarget=dtarget, dstrides=v.strides[1], way=v.way,
    )  # fmt: skip
    launch(
        _soft_cross_entropy_target_backward, t.elementwise_programs, t.num_warps, logits, a, keep, BLOCK_N=t.BLOCK_N, BLOCK_C=t.BLOCK_C
    )  # fmt: skip


# keep and spread come one by one: Triton rounds the floats of a tuple to float32
@triton.jit
def _soft_cross_entropy_forward(a, keep: "fp64", spread: "fp64", BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program: all classes of BLOCK_N positions."""
    real: tl.constexpr = a.rows.top.dtype.element_ty
    b, p, row, inside = _tile_of(tl.program_id(0), a.way.positions, BLOCK_N)
    # statistics
    tops, totals = _no_statistics([BLOCK_N, BLOCK_C], real)
    gaps = tl.zeros([BLOCK_N, BLOCK_C], real)
    masses = tl.zeros([BLOCK_N, BLOCK_C], real)
    for first in tl.range(0, a.way.classes, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        lanes = inside[:, None] & (c < a.way.classes)[None, :]
        x = _wide(tl.load(_lanes_at(a.logits, a.way.strides, b, p, c), mask=lanes, other=float("-inf")))
        q = _wide(tl.load(_lanes_at(a.target, a.target_strides, b, p, c), mask=lanes, other=0.0))
        w = _class_weights(a, c)
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
    tl.store(a.loss + row, _loss_of(mass, tl.log(total), gap), mask=inside)
    tl.store(a.rows.mass + row, mass, mask=inside)
    tl.store(a.rows.top + row, top, mask=inside)
    tl.store(a.rows.total + row, total, mask=inside)


@triton.jit
def _soft_cross_entropy_backward(a, keep: "fp64", spread: "fp64", BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program: BLOCK_C classes of BLOCK_N positions."""
    real: tl.constexpr = a.rows.top.dtype.element_ty
    blocks = _blocks_of(a.way.classes, BLOCK_C)
    b, p, row, inside = _tile_of(tl.program_id(0) // blocks, a.way.positions, BLOCK_N)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    # row numbers
    g = tl.load(a.dloss + row * a.dloss_stride, mask=inside, other=0.0)
    top = tl.load(a.rows.top + row, mask=inside, other=0.0)
    scale = tl.load(a.rows.mass + row, mask=inside, other=0.0) / tl.load(a.rows.total + row, mask=inside, other=1.0)
    # gradient
    lanes = inside[:, None] & (c < a.way.classes)[None, :]
    x = _wide(tl.load(_lanes_at(a.logits, a.way.strides, b, p, c), mask=lanes, other=0.0))
    q = _wide(tl.load(_lanes_at(a.target, a.target_strides, b, p, c), mask=lanes, other=0.0))
    w = _class_weights(a, c)
    k = w * (keep.to(real) * q + spread.to(real))
    d = g[:, None] * (_exp(x - top[:, None]) * scale[:, None] - k)
    tl.store(_lanes_at(a.dlogits, a.dstrides, b, p, c), d, mask=lanes)


@triton.jit
def _soft_cross_entropy_target_backward(a, keep: "fp64", BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program: BLOCK_C classes of BLOCK_N positions."""
    real: tl.constexpr = a.rows.top.dtype.element_ty
    blocks = _blocks_of(a.way.classes, BLOCK_C)
    b, p, row, inside = _tile_of(tl.program_id(0) // blocks, a.way.positions, BLOCK_N)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    # row numbers
    g = tl.load(a.dloss + row * a.dloss_stride, mask=inside, other=0.0) * keep.to(real)
    top = tl.load(a.rows.top + row, mask=inside, other=0.0)
    log_total = tl.log(tl.load(a.rows.total + row, mask=inside, other=1.0))
    # gradient
    lanes = inside[:, None] & (c < a.way.classes)[None, :]
    x = _wide(tl.load(_lanes_at(a.logits, a.way.strides, b, p, c), mask=lanes, other=0.0))
    w = _class_weights(a, c)
    d = g[:, None] * w * (log_total[:, None] - (x - top[:, None]))
    tl.store(_lanes_at(a.dtarget, a.dstrides, b, p, c), d, mask=lanes)
