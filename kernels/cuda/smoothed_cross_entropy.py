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
from .plan import TILE, Strides, Walk, backward_rows, class_stride, reading_tiles, takes_rows, tiles, view, whole_rows
from .rows import (
    _blocks_of,
    _body_of,
    _edges_of,
    _first_vector,
    _lanes_at,
    _lanes_of_vectors,
    _merge,
    _no_statistics,
    _row_of,
    _see,
    _tile_of,
    _weight_of,
)
from .weighted import _class_weights, _gap_of, _loss_of, _merge_weighted, _no_weighted, _see_weighted_vectors


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
    a = Forward(
        logits=logits, target=target, weight=weight, weight_stride=class_stride(weight.stride(0)), ignore_index=ignore_index,
        loss=loss, rows=rows, way=v.way,
    )  # fmt: skip
    if takes_rows(v, a.weight_stride):
        r = whole_rows(v, logits.element_size(), device_of(logits))
        sizes = {"VEC": r.VEC, "BLOCK_C": r.BLOCK_C}
        launch(_smoothed_cross_entropy_forward_rows, r.programs, r.num_warps, logits, a, *smoothing, **sizes)
    else:
        t = reading_tiles(v, device_of(logits), TILE // 2)
        sizes = {"BLOCK_N": t.BLOCK_N, "BLOCK_C": t.BLOCK_C}
        launch(_smoothed_cross_entropy_forward_tiles, t.programs, t.num_warps, logits, a, *smoothing, **sizes)


def smoothed_cross_entropy_backward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, smoothing: Smoothing, rows: Rows, dloss: Tensor, dlogits: Tensor
) -> None:
    v = view(logits.shape, logits.stride(), dlogits.stride())
    a = Backward(
        logits=logits, target=target, weight=weight, weight_stride=class_stride(weight.stride(0)), ignore_index=ignore_index,
        rows=rows, dloss=dloss, dloss_stride=dloss.stride(0), dlogits=dlogits, dstrides=v.strides[1], way=v.way,
    )  # fmt: skip
    if takes_rows(v, a.weight_stride):
        r = backward_rows(v, logits.element_size(), device_of(logits))
        sizes = {"VEC": r.VEC, "BLOCK_C": r.BLOCK_C}
        launch(_smoothed_cross_entropy_backward_rows, r.programs, r.num_warps, logits, a, r.splits, r.chunk, *smoothing, **sizes)
    else:
        t = tiles(v, device_of(logits))
        sizes = {"BLOCK_N": t.BLOCK_N, "BLOCK_C": t.BLOCK_C}
        launch(_smoothed_cross_entropy_backward_tiles, t.elementwise_programs, t.num_warps, logits, a, *smoothing, **sizes)


def smoothed_cross_entropy_forward_backward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, smoothing: Smoothing,
    dloss: Tensor, loss: Tensor, rows: Rows, dlogits: Tensor,
) -> None:  # fmt: skip
    """In two visits: only plain cross-entropy has a kernel for one."""
    smoothed_cross_entropy_forward(logits, target, weight, ignore_index, smoothing, loss, rows)
    smoothed_cross_entropy_backward(logits, target, weight, ignore_index, smoothing, rows, dloss, dlogits)


@triton.jit
def _write_loss(a, x_ptr, row, inside, y, numbers, keep, spread):
    """The numbers of rows whose first classes x_ptr points to, from those of all their classes, before smoothing."""
    top, total, gap, mass = numbers
    is_row = y != a.ignore_index
    # target logit and class weight: outside [0, C) a target is no index, and its weight is NaN
    is_class = inside & is_row & (y >= 0) & (y < a.way.classes)
    x_y = _wide(tl.load(x_ptr + y * a.way.strides.class_, mask=is_class, other=0.0))
    w_y = _weight_of(a, y, is_class)
    # loss
    kept, smooth_mass, log_total = keep * w_y, spread * mass, tl.log(total)
    nll = log_total - (x_y - top)
    tl.store(a.loss + row, tl.where(is_row, kept * nll + _loss_of(smooth_mass, log_total, gap * spread), 0.0), mask=inside)
    tl.store(a.rows.row_weight + row, tl.where(is_row, w_y, 0.0), mask=inside)
    tl.store(a.rows.mass + row, tl.where(is_row, kept + smooth_mass, 0.0), mask=inside)
    tl.store(a.rows.top + row, tl.where(is_row, top, 0.0), mask=inside)
    tl.store(a.rows.total + row, tl.where(is_row, total, 1.0), mask=inside)


# keep and spread come one by one: Triton rounds the floats of a tuple to float32
@triton.jit
def _smoothed_cross_entropy_forward_rows(a, keep: "fp64", spread: "fp64", VEC: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where the class stride is 1. One program: one row."""
    LANES: tl.constexpr = BLOCK_C // VEC
    real: tl.constexpr = a.rows.top.dtype.element_ty
    row = tl.program_id(0)
    y = tl.load(a.target + row)
    C = tl.where(y == a.ignore_index, 0, a.way.classes)  # an ignored row is not read
    start = _row_of(row, a.way.positions, a.way.strides)
    head, vectors, first = _body_of(start, C, VEC)
    x_ptr = a.logits + first
    # statistics
    tops, totals, gaps, weights = _no_weighted([LANES], real)
    lane, offset = _lanes_of_vectors(LANES, VEC)
    for v in tl.range(0, vectors, LANES):
        inside = (v + lane < vectors)[:, None]
        x = _wide(tl.load(x_ptr + (v * VEC + offset), mask=inside, other=float("-inf")))
        # masked once more: Triton 3.8 fails to compile a sum of what was just loaded (TritonGPUOptimizeThreadLocality)
        w = tl.where(inside, _class_weights(a, head + v * VEC + offset, inside), 0.0)
        tops, totals, gaps, weights = _see_weighted_vectors(tops, totals, gaps, weights, x, w, inside, v > 0)
    # edges
    c, at_edge = _edges_of(head, vectors, C, VEC)
    x = _wide(tl.load(a.logits + start + c, mask=at_edge, other=float("-inf")))
    w = _class_weights(a, c, at_edge)
    numbers = _merge_weighted(tops, totals, gaps, weights, x, w, at_edge)
    _write_loss(a, a.logits + start, row, row >= 0, y, numbers, keep.to(real), spread.to(real))


@triton.jit
def _smoothed_cross_entropy_forward_tiles(a, keep: "fp64", spread: "fp64", BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program: all classes of BLOCK_N positions."""
    strides = a.way.strides
    real: tl.constexpr = a.rows.top.dtype.element_ty
    b, p, row, inside = _tile_of(tl.program_id(0), a.way.positions, BLOCK_N)
    y = tl.load(a.target + row, mask=inside, other=a.ignore_index)
    # statistics
    tops, totals = _no_statistics([BLOCK_N, BLOCK_C], real)
    gaps = tl.zeros([BLOCK_N, BLOCK_C], real)
    weights = tl.zeros([1, BLOCK_C], real)
    for first in tl.range(0, a.way.classes, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        lanes = inside[:, None] & (c < a.way.classes)[None, :]
        x = _wide(tl.load(_lanes_at(a.logits, strides, b, p, c), mask=lanes, other=float("-inf")))
        w = _class_weights(a, c, c < a.way.classes)[None, :]
        before = tops
        tops, totals = _see(tops, totals, x)
        # in the first step nothing rises: from the lowest number that could be infinite, and 0 x inf
        gaps += tl.where(first > 0, weights * (tops - before), 0.0) + tl.where(lanes, w * (tops - x), 0.0)
        weights += w
    top, total = _merge(tops, totals, 1)
    gap = _gap_of(gaps, weights, tops, totals, top)
    x_ptr = a.logits + b * strides.batch + p * strides.position
    smooth_mass = tl.sum(tl.sum(weights, 1), 0) + tl.zeros([BLOCK_N], real)
    _write_loss(a, x_ptr, row, inside, y, (top, total, gap, smooth_mass), keep.to(real), spread.to(real))


@triton.jit
def _smoothed_cross_entropy_backward_rows(a, splits, chunk, keep: "fp64", spread: "fp64", VEC: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where the class strides are 1 and rows start alike modulo VEC. One program: `chunk` classes of a row."""
    LANES: tl.constexpr = BLOCK_C // VEC
    real: tl.constexpr = a.rows.top.dtype.element_ty
    row, part = tl.program_id(0) // splits, tl.program_id(0) % splits * chunk
    count = tl.minimum(chunk, a.way.classes - part)
    start, to = _row_of(row, a.way.positions, a.way.strides) + part, _row_of(row, a.way.positions, a.dstrides) + part
    head, vectors, first = _body_of(start, count, VEC)
    x_ptr, dx_ptr = a.logits + first, a.dlogits + _first_vector(to, VEC)
    # row numbers: an ignored row is not read, its logits count as 0, and its numbers are 0
    y = tl.load(a.target + row)
    is_row = y != a.ignore_index
    y = tl.where((y >= part) & (y < part + count), y - part, -1).to(tl.int32)
    g = tl.where(is_row, tl.load(a.dloss + row * a.dloss_stride), 0.0)
    top = tl.where(is_row, tl.load(a.rows.top + row), 0.0)
    scale = tl.where(is_row, g * tl.load(a.rows.mass + row) / tl.load(a.rows.total + row), 0.0)
    kept = tl.where(is_row, g * keep.to(real) * tl.load(a.rows.row_weight + row), 0.0)
    # gradient
    lane, offset = _lanes_of_vectors(LANES, VEC)
    for v in tl.range(0, vectors, LANES):
        inside = (v + lane < vectors)[:, None]
        x = _wide(tl.load(x_ptr + (v * VEC + offset), mask=inside & is_row, other=0.0))
        w = _class_weights(a, part + head + v * VEC + offset, inside) * spread.to(real)
        d = _exp(x - top) * scale - tl.where(is_row, g * w, 0.0)
        # only the block that holds y compares
        y_here = y - head - v * VEC
        if (y_here >= 0) & (y_here < BLOCK_C):
            d = tl.where(offset == y_here, d - kept, d)
        tl.store(dx_ptr + (v * VEC + offset), d, mask=inside)
    # edges
    c, at_edge = _edges_of(head, vectors, count, VEC)
    x = _wide(tl.load(a.logits + start + c, mask=at_edge & is_row, other=0.0))
    d = _exp(x - top) * scale - tl.where(is_row, g * (_class_weights(a, part + c, at_edge) * spread.to(real)), 0.0)
    tl.store(a.dlogits + to + c, tl.where(c == y, d - kept, d), mask=at_edge)


@triton.jit
def _smoothed_cross_entropy_backward_tiles(a, keep: "fp64", spread: "fp64", BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
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
    w = _class_weights(a, c, c < a.way.classes)[None, :] * spread.to(real)
    d = _exp(x - top[:, None]) * scale[:, None] - g[:, None] * w
    d = tl.where(c[None, :] == y[:, None], d - kept[:, None], d)
    tl.store(_lanes_at(a.dlogits, a.dstrides, b, p, c), tl.where(is_row[:, None], d, 0.0), mask=lanes)
