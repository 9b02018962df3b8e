"""Softmax cross-entropy with a few classes y_k of probability q_k as a target; keep = 1 - label smoothing, spread = smoothing / C.

k_k = keep w_{y_k} q_k      mass = sum_k k_k + spread sum(w)      loss = sum_k k_k (-log p_{y_k}) + spread sum_c w_c (-log p_c)
dlogits = dloss (mass p - spread w - sum_k k_k onehot(y_k))      dprob_k = dloss keep w_{y_k} (-log p_{y_k})
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..groups import PAD, Rows, Smoothing
from .launch import device_of, launch
from .math import _exp, _wide, fp64
from .plan import TILE, Strides, Walk, ceil_div, class_stride, reading_tiles, tiles, view
from .rows import _blocks_of, _lanes_at, _merge, _no_statistics, _row_of, _see, _tile_of, _weight_of
from .weighted import _class_weights, _gap_of, _loss_of

_PAD = tl.constexpr(PAD)
_ENTRIES = 256  # in a program that takes them one by one


class Entries(NamedTuple):
    """The targets of all rows."""

    indices: Tensor  # [B * P, K], as `prob`
    prob: Tensor
    row_stride: int  # of `prob`
    entry_stride: int
    per_row: int  # K


class Forward(NamedTuple):
    logits: Tensor  # [B, C, P]
    entries: Entries
    weight: Tensor  # [C]
    weight_stride: int | None
    loss: Tensor  # [B * P], as `rows`
    rows: Rows
    way: Walk


class Backward(NamedTuple):
    logits: Tensor  # [B, C, P], as `dlogits`
    entries: Entries
    weight: Tensor  # [C]
    weight_stride: int | None
    rows: Rows  # [B * P], as `dloss`
    dloss: Tensor
    dloss_stride: int
    dlogits: Tensor
    dstrides: Strides
    way: Walk


class ProbBackward(NamedTuple):
    logits: Tensor  # [B, C, P]
    indices: Tensor  # [B * P, K], as `dprob`
    per_row: int
    weight: Tensor  # [C]
    weight_stride: int | None
    rows: Rows  # [B * P], as `dloss`
    dloss: Tensor
    dloss_stride: int
    dprob: Tensor
    way: Walk


def sparse_soft_cross_entropy_forward(
    logits: Tensor, indices: Tensor, prob: Tensor, weight: Tensor, smoothing: Smoothing, loss: Tensor, rows: Rows
) -> None:
    v = view(logits.shape, logits.stride())
    t = reading_tiles(v, device_of(logits), TILE // 4 if smoothing.spread > 0 else TILE // 2)
    a = Forward(
        logits=logits, entries=_entries_of(indices, prob), weight=weight, weight_stride=class_stride(weight.stride(0)),
        loss=loss, rows=rows, way=v.way,
    )  # fmt: skip
    launch(
        _sparse_soft_cross_entropy_forward, t.programs, t.num_warps, logits, a, *smoothing,
        SMOOTHED=smoothing.spread > 0, BLOCK_N=t.BLOCK_N, BLOCK_C=t.BLOCK_C,
    )  # fmt: skip


def sparse_soft_cross_entropy_backward(
    logits: Tensor, indices: Tensor, prob: Tensor, weight: Tensor, smoothing: Smoothing, rows: Rows, dloss: Tensor, dlogits: Tensor
) -> None:
    v = view(logits.shape, logits.stride(), dlogits.stride())
    t = tiles(v, device_of(logits))
    a = Backward(
        logits=logits, entries=_entries_of(indices, prob), weight=weight, weight_stride=class_stride(weight.stride(0)),
        rows=rows, dloss=dloss, dloss_stride=dloss.stride(0), dlogits=dlogits, dstrides=v.strides[1], way=v.way,
    )  # fmt: skip
    launch(
        _sparse_soft_cross_entropy_backward, t.elementwise_programs, t.num_warps, logits, a, *smoothing,
        SMOOTHED=smoothing.spread > 0, BLOCK_N=t.BLOCK_N, BLOCK_C=t.BLOCK_C,
    )  # fmt: skip


def sparse_soft_cross_entropy_forward_backward(
    logits: Tensor, indices: Tensor, prob: Tensor, weight: Tensor, smoothing: Smoothing,
    dloss: Tensor, loss: Tensor, rows: Rows, dlogits: Tensor,
) -> None:  # fmt: skip
    """In two visits: only plain cross-entropy has a kernel for one."""
    sparse_soft_cross_entropy_forward(logits, indices, prob, weight, smoothing, loss, rows)
    sparse_soft_cross_entropy_backward(logits, indices, prob, weight, smoothing, rows, dloss, dlogits)


def sparse_soft_cross_entropy_prob_backward(
    logits: Tensor, indices: Tensor, weight: Tensor, keep: float, rows: Rows, dloss: Tensor, dprob: Tensor
) -> None:
    v = view(logits.shape, logits.stride())
    a = ProbBackward(
        logits=logits, indices=indices, per_row=indices.shape[1], weight=weight, weight_stride=class_stride(weight.stride(0)),
        rows=rows, dloss=dloss, dloss_stride=dloss.stride(0), dprob=dprob, way=v.way,
    )  # fmt: skip
    count = indices.numel()
    launch(_sparse_soft_cross_entropy_prob_backward, ceil_div(count, _ENTRIES), 4, logits, a, count, keep, BLOCK=_ENTRIES)


def _entries_of(indices: Tensor, prob: Tensor) -> Entries:
    return Entries(indices, prob, prob.stride(0), prob.stride(1), indices.shape[1])


# keep and spread come one by one: Triton rounds the floats of a tuple to float32
@triton.jit
def _sparse_soft_cross_entropy_forward(
    a, keep: "fp64", spread: "fp64", SMOOTHED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """One program: all classes of BLOCK_N positions."""
    strides, e = a.way.strides, a.entries
    real: tl.constexpr = a.rows.top.dtype.element_ty
    b, p, row, inside = _tile_of(tl.program_id(0), a.way.positions, BLOCK_N)
    # statistics
    tops, totals = _no_statistics([BLOCK_N, BLOCK_C], real)
    gaps = tl.zeros([BLOCK_N, BLOCK_C], real)
    weights = tl.zeros([1, BLOCK_C], real)
    for first in tl.range(0, a.way.classes, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        lanes = inside[:, None] & (c < a.way.classes)[None, :]
        x = _wide(tl.load(_lanes_at(a.logits, strides, b, p, c), mask=lanes, other=float("-inf")))
        before = tops
        tops, totals = _see(tops, totals, x)
        if SMOOTHED:
            w = _class_weights(a, c, c < a.way.classes)[None, :]
            # in the first step nothing rises: from the lowest number that could be infinite, and 0 x inf
            gaps += tl.where(first > 0, weights * (tops - before), 0.0) + tl.where(lanes, w * (tops - x), 0.0)
            weights += w
    top, total = _merge(tops, totals, 1)
    log_total = tl.log(total)
    # what smoothing gives
    mass = tl.zeros([BLOCK_N], real)
    loss = tl.zeros([BLOCK_N], real)
    counts = tl.full([BLOCK_N], 1 if SMOOTHED else 0, tl.int32)
    if SMOOTHED:
        mass += spread.to(real) * tl.sum(tl.sum(weights, 1), 0)
        loss += _loss_of(mass, log_total, _gap_of(gaps, weights, tops, totals, top) * spread.to(real))
    # what the entries give: outside [0, C) a class is no index, and its weight is NaN
    for k in tl.range(0, e.per_row):
        y = tl.load(e.indices + row * e.per_row + k, mask=inside, other=_PAD)
        is_entry = y != _PAD
        is_class = is_entry & (y >= 0) & (y < a.way.classes)
        x_y = _wide(tl.load(a.logits + b * strides.batch + p * strides.position + y * strides.class_, mask=is_class, other=0.0))
        q = tl.load(e.prob + row * e.row_stride + k * e.entry_stride, mask=is_class, other=0.0)
        factor = keep.to(real) * _weight_of(a, y, is_class) * q
        mass += tl.where(is_entry, factor, 0.0)
        loss += tl.where(is_entry, factor * (log_total - (x_y - top)), 0.0)
        counts = tl.where(is_entry, 1, counts)
    is_row = counts > 0
    tl.store(a.loss + row, loss, mask=inside)
    tl.store(a.rows.row_weight + row, tl.where(mass == mass, counts.to(real), mass), mask=inside)
    tl.store(a.rows.mass + row, mass, mask=inside)
    tl.store(a.rows.top + row, tl.where(is_row, top, 0.0), mask=inside)
    tl.store(a.rows.total + row, tl.where(is_row, total, 1.0), mask=inside)


@triton.jit
def _sparse_soft_cross_entropy_backward(
    a, keep: "fp64", spread: "fp64", SMOOTHED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """One program: BLOCK_C classes of BLOCK_N positions."""
    e = a.entries
    real: tl.constexpr = a.rows.top.dtype.element_ty
    blocks = _blocks_of(a.way.classes, BLOCK_C)
    b, p, row, inside = _tile_of(tl.program_id(0) // blocks, a.way.positions, BLOCK_N)
    first = tl.program_id(0) % blocks * BLOCK_C
    c = first + tl.arange(0, BLOCK_C)
    # row numbers
    is_row = tl.load(a.rows.row_weight + row, mask=inside, other=0.0) != 0.0
    g = tl.load(a.dloss + row * a.dloss_stride, mask=inside, other=0.0)
    top = tl.load(a.rows.top + row, mask=inside, other=0.0)
    scale = g * tl.load(a.rows.mass + row, mask=inside, other=0.0) / tl.load(a.rows.total + row, mask=inside, other=1.0)
    # gradient
    lanes = inside[:, None] & (c < a.way.classes)[None, :]
    x = _wide(tl.load(_lanes_at(a.logits, a.way.strides, b, p, c), mask=lanes, other=0.0))
    d = _exp(x - top[:, None]) * scale[:, None]
    if SMOOTHED:
        d -= g[:, None] * (_class_weights(a, c, c < a.way.classes)[None, :] * spread.to(real))
    for k in tl.range(0, e.per_row):
        y = tl.load(e.indices + row * e.per_row + k, mask=inside, other=_PAD)
        here = (y >= first) & (y < first + BLOCK_C) & (y < a.way.classes)
        if tl.max(here.to(tl.int32), 0) > 0:
            q = tl.load(e.prob + row * e.row_stride + k * e.entry_stride, mask=here, other=0.0)
            less = g * (keep.to(real) * _weight_of(a, y, here) * q)
            d = tl.where(here[:, None] & (c[None, :] == y[:, None]), d - less[:, None], d)
    tl.store(_lanes_at(a.dlogits, a.dstrides, b, p, c), tl.where(is_row[:, None], d, 0.0), mask=lanes)


@triton.jit
def _sparse_soft_cross_entropy_prob_backward(a, count, keep: "fp64", BLOCK: tl.constexpr):
    """One program: BLOCK entries."""
    strides = a.way.strides
    real: tl.constexpr = a.rows.top.dtype.element_ty
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < count
    row = entry // a.per_row
    y = tl.load(a.indices + entry, mask=inside, other=_PAD)
    is_entry = y != _PAD
    is_class = is_entry & (y >= 0) & (y < a.way.classes)
    # row numbers
    g = tl.load(a.dloss + row * a.dloss_stride, mask=inside, other=0.0) * keep.to(real)
    top = tl.load(a.rows.top + row, mask=inside, other=0.0)
    log_total = tl.log(tl.load(a.rows.total + row, mask=inside, other=1.0))
    # gradient
    x_y = _wide(tl.load(a.logits + _row_of(row, a.way.positions, strides) + y * strides.class_, mask=is_class, other=0.0))
    d = g * _weight_of(a, y, is_class) * (log_total - (x_y - top))
    tl.store(a.dprob + entry, tl.where(is_entry, d, 0.0), mask=inside)
