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
from .plan import TILE, Strides, Walk, backward_rows, class_stride, looping_tiles, takes_rows, tiles, view, whole_rows
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
)
from .weighted import _class_weights, _gap_of, _loss_of, _merge_weighted, _no_weighted, _see_weighted_vectors


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
    a = Forward(
        logits=logits, target=target, target_strides=v.strides[1], weight=weight, weight_stride=class_stride(weight.stride(0)),
        loss=loss, rows=rows, way=v.way,
    )  # fmt: skip
    if takes_rows(v, a.weight_stride):
        r = whole_rows(v, logits.element_size(), device_of(logits))
        launch(_soft_cross_entropy_forward_rows, r.programs, r.num_warps, logits, a, *smoothing, VEC=r.VEC, BLOCK_C=r.BLOCK_C)
    else:
        t = looping_tiles(v, device_of(logits), TILE // 2)
        launch(_soft_cross_entropy_forward_tiles, t.programs, t.num_warps, logits, a, *smoothing, BLOCK_N=t.BLOCK_N, BLOCK_C=t.BLOCK_C)


def soft_cross_entropy_backward(
    logits: Tensor, target: Tensor, weight: Tensor, smoothing: Smoothing, rows: Rows, dloss: Tensor, dlogits: Tensor
) -> None:
    v = view(logits.shape, logits.stride(), target.stride(), dlogits.stride())
    a = Backward(
        logits=logits, target=target, target_strides=v.strides[1], weight=weight, weight_stride=class_stride(weight.stride(0)),
        rows=rows, dloss=dloss, dloss_stride=dloss.stride(0), dlogits=dlogits, dstrides=v.strides[2], way=v.way,
    )  # fmt: skip
    if takes_rows(v, a.weight_stride):
        r = backward_rows(v, logits.element_size(), device_of(logits))
        sizes = {"VEC": r.VEC, "BLOCK_C": r.BLOCK_C}
        launch(_soft_cross_entropy_backward_rows, r.programs, r.num_warps, logits, a, r.splits, r.chunk, *smoothing, **sizes)
    else:
        t = tiles(v, device_of(logits))
        sizes = {"BLOCK_N": t.BLOCK_N, "BLOCK_C": t.BLOCK_C}
        launch(_soft_cross_entropy_backward_tiles, t.elementwise_programs, t.num_warps, logits, a, *smoothing, **sizes)


def soft_cross_entropy_forward_backward(
    logits: Tensor, target: Tensor, weight: Tensor, smoothing: Smoothing, dloss: Tensor, loss: Tensor, rows: Rows, dlogits: Tensor
) -> None:
    """In two visits: only plain cross-entropy has a kernel for one."""
    soft_cross_entropy_forward(logits, target, weight, smoothing, loss, rows)
    soft_cross_entropy_backward(logits, target, weight, smoothing, rows, dloss, dlogits)


def soft_cross_entropy_target_backward(logits: Tensor, weight: Tensor, keep: float, rows: Rows, dloss: Tensor, dtarget: Tensor) -> None:
    v = view(logits.shape, logits.stride(), dtarget.stride())
    a = TargetBackward(
        logits=logits, weight=weight, weight_stride=class_stride(weight.stride(0)), rows=rows, dloss=dloss, dloss_stride=dloss.stride(0),
        dtarget=dtarget, dstrides=v.strides[1], way=v.way,
    )  # fmt: skip
    if takes_rows(v, a.weight_stride):
        r = backward_rows(v, logits.element_size(), device_of(logits))
        sizes = {"VEC": r.VEC, "BLOCK_C": r.BLOCK_C}
        launch(_soft_cross_entropy_target_backward_rows, r.programs, r.num_warps, logits, a, r.splits, r.chunk, keep, **sizes)
    else:
        t = tiles(v, device_of(logits))
        sizes = {"BLOCK_N": t.BLOCK_N, "BLOCK_C": t.BLOCK_C}
        launch(_soft_cross_entropy_target_backward_tiles, t.elementwise_programs, t.num_warps, logits, a, keep, **sizes)


# keep and spread come one by one: Triton rounds the floats of a tuple to float32
@triton.jit
def _soft_cross_entropy_forward_rows(a, keep: "fp64", spread: "fp64", VEC: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where the class strides are 1 and rows start alike modulo VEC. One program: one row."""
    LANES: tl.constexpr = BLOCK_C // VEC
    real: tl.constexpr = a.rows.top.dtype.element_ty
    row, C = tl.program_id(0), a.way.classes
    start, given = _row_of(row, a.way.positions, a.way.strides), _row_of(row, a.way.positions, a.target_strides)
    head, vectors, first = _body_of(start, C, VEC)
    x_ptr, q_ptr = a.logits + first, a.target + _first_vector(given, VEC)
    # statistics
    tops, totals, gaps, masses = _no_weighted([LANES], real)
    lane, offset = _lanes_of_vectors(LANES, VEC)
    for v in tl.range(0, vectors, LANES):
        inside = (v + lane < vectors)[:, None]
        x = _wide(tl.load(x_ptr + (v * VEC + offset), mask=inside, other=float("-inf")))
        q = _wide(tl.load(q_ptr + (v * VEC + offset), mask=inside, other=0.0))
        w = _class_weights(a, head + v * VEC + offset, inside)
        k = w * (keep.to(real) * q + spread.to(real))
        tops, totals, gaps, masses = _see_weighted_vectors(tops, totals, gaps, masses, x, k, inside, v > 0)
    # edges
    c, at_edge = _edges_of(head, vectors, C, VEC)
    x = _wide(tl.load(a.logits + start + c, mask=at_edge, other=float("-inf")))
    q = _wide(tl.load(a.target + given + c, mask=at_edge, other=0.0))
    k = _class_weights(a, c, at_edge) * (keep.to(real) * q + spread.to(real))
    top, total, gap, mass = _merge_weighted(tops, totals, gaps, masses, x, k, at_edge)
    # loss
    tl.store(a.loss + row, _loss_of(mass, tl.log(total), gap))
    tl.store(a.rows.mass + row, mass)
    tl.store(a.rows.top + row, top)
    tl.store(a.rows.total + row, total)


@triton.jit
def _soft_cross_entropy_forward_tiles(a, keep: "fp64", spread: "fp64", BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
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
        w = _class_weights(a, c, c < a.way.classes)[None, :]
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
def _soft_cross_entropy_backward_rows(a, splits, chunk, keep: "fp64", spread: "fp64", VEC: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where the class strides are 1 and rows start alike modulo VEC. One program: `chunk` classes of a row."""
    LANES: tl.constexpr = BLOCK_C // VEC
    real: tl.constexpr = a.rows.top.dtype.element_ty
    row, part = tl.program_id(0) // splits, tl.program_id(0) % splits * chunk
    count = tl.minimum(chunk, a.way.classes - part)
    start, given = _row_of(row, a.way.positions, a.way.strides) + part, _row_of(row, a.way.positions, a.target_strides) + part
    to = _row_of(row, a.way.positions, a.dstrides) + part
    head, vectors, first = _body_of(start, count, VEC)
    x_ptr, q_ptr, dx_ptr = a.logits + first, a.target + _first_vector(given, VEC), a.dlogits + _first_vector(to, VEC)
    # row numbers
    g = tl.load(a.dloss + row * a.dloss_stride)
    top = tl.load(a.rows.top + row)
    scale = tl.load(a.rows.mass + row) / tl.load(a.rows.total + row)
    # gradient
    lane, offset = _lanes_of_vectors(LANES, VEC)
    for v in tl.range(0, vectors, LANES):
        inside = (v + lane < vectors)[:, None]
        x = _wide(tl.load(x_ptr + (v * VEC + offset), mask=inside, other=0.0))
        q = _wide(tl.load(q_ptr + (v * VEC + offset), mask=inside, other=0.0))
        k = _class_weights(a, part + head + v * VEC + offset, inside) * (keep.to(real) * q + spread.to(real))
        tl.store(dx_ptr + (v * VEC + offset), g * (_exp(x - top) * scale - k), mask=inside)
    # edges
    c, at_edge = _edges_of(head, vectors, count, VEC)
    x = _wide(tl.load(a.logits + start + c, mask=at_edge, other=0.0))
    q = _wide(tl.load(a.target + given + c, mask=at_edge, other=0.0))
    k = _class_weights(a, part + c, at_edge) * (keep.to(real) * q + spread.to(real))
    tl.store(a.dlogits + to + c, g * (_exp(x - top) * scale - k), mask=at_edge)


@triton.jit
def _soft_cross_entropy_backward_tiles(a, keep: "fp64", spread: "fp64", BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
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
    w = _class_weights(a, c, c < a.way.classes)[None, :]
    k = w * (keep.to(real) * q + spread.to(real))
    d = g[:, None] * (_exp(x - top[:, None]) * scale[:, None] - k)
    tl.store(_lanes_at(a.dlogits, a.dstrides, b, p, c), d, mask=lanes)


@triton.jit
def _soft_cross_entropy_target_backward_rows(a, splits, chunk, keep: "fp64", VEC: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where the class strides are 1 and rows start alike modulo VEC. One program: `chunk` classes of a row."""
    LANES: tl.constexpr = BLOCK_C // VEC
    real: tl.constexpr = a.rows.top.dtype.element_ty
    row, part = tl.program_id(0) // splits, tl.program_id(0) % splits * chunk
    count = tl.minimum(chunk, a.way.classes - part)
    start, to = _row_of(row, a.way.positions, a.way.strides) + part, _row_of(row, a.way.positions, a.dstrides) + part
    head, vectors, first = _body_of(start, count, VEC)
    x_ptr, dq_ptr = a.logits + first, a.dtarget + _first_vector(to, VEC)
    # row numbers
    g = tl.load(a.dloss + row * a.dloss_stride) * keep.to(real)
    top = tl.load(a.rows.top + row)
    log_total = tl.log(tl.load(a.rows.total + row))
    # gradient
    lane, offset = _lanes_of_vectors(LANES, VEC)
    for v in tl.range(0, vectors, LANES):
        inside = (v + lane < vectors)[:, None]
        x = _wide(tl.load(x_ptr + (v * VEC + offset), mask=inside, other=0.0))
        d = g * _class_weights(a, part + head + v * VEC + offset, inside) * (log_total - (x - top))
        tl.store(dq_ptr + (v * VEC + offset), d, mask=inside)
    # edges
    c, at_edge = _edges_of(head, vectors, count, VEC)
    x = _wide(tl.load(a.logits + start + c, mask=at_edge, other=0.0))
    tl.store(a.dtarget + to + c, g * _class_weights(a, part + c, at_edge) * (log_total - (x - top)), mask=at_edge)


@triton.jit
def _soft_cross_entropy_target_backward_tiles(a, keep: "fp64", BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
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
    w = _class_weights(a, c, c < a.way.classes)[None, :]
    d = g[:, None] * w * (log_total[:, None] - (x - top[:, None]))
    tl.store(_lanes_at(a.dtarget, a.dstrides, b, p, c), d, mask=lanes)
