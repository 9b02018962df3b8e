"""Softmax cross-entropy with class indices as targets.

    nll = log total - (x_y - top)      loss = w_y nll      dlogits = dloss w_y (p - onehot(y)),  p = exp(x - top) / total

One visit to the logits going forward, one coming back; all else happens on [N] vectors.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..groups import Rows
from .launch import device_of, launch
from .math import _exp, _wide
from .plan import Strides, Walk, backward_rows, class_stride, forward_rows, has_long_rows, power_of_two_from, reading_tiles, tiles, view
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
    _row_statistics,
    _see,
    _tile_of,
    _weight_of,
)


class Forward(NamedTuple):
    logits: Tensor  # [B, C, P]
    target: Tensor  # [B * P], as `loss` and `rows`
    weight: Tensor  # [C]
    weight_stride: int | None
    ignore_index: int
    loss: Tensor
    rows: Rows
    way: Walk


class Parts(NamedTuple):
    """The statistics of the parts of a row."""

    tops: Tensor  # [B * P, splits], as `totals`
    totals: Tensor
    splits: int
    chunk: int  # classes in a part


class Guess(NamedTuple):
    """The upstream gradient that came, and the two numbers [2] of which one was foreseen if they are the same."""

    upstream: Tensor
    foreseen: Tensor


class Backward(NamedTuple):
    guess: Guess | None  # nothing is to be done if it was right
    logits: Tensor  # [B, C, P]
    target: Tensor  # [B * P], as `rows` and `dloss`
    ignore_index: int
    rows: Rows
    dloss: Tensor
    dloss_stride: int
    dlogits: Tensor  # [B, C, P]
    dstrides: Strides
    way: Walk


def cross_entropy_forward(logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, loss: Tensor, rows: Rows) -> None:
    v = view(logits.shape, logits.stride())
    a = Forward(
        logits=logits, target=target, weight=weight, weight_stride=class_stride(weight.stride(0)), ignore_index=ignore_index,
        loss=loss, rows=rows, way=v.way,
    )  # fmt: skip
    if not has_long_rows(v):
        t = reading_tiles(v, device_of(logits))
        launch(_cross_entropy_forward_tiles, t.programs, t.num_warps, logits, a, BLOCK_N=t.BLOCK_N, BLOCK_C=t.BLOCK_C)
        return
    r = forward_rows(v, logits.element_size(), device_of(logits))
    if r.splits == 1:
        launch(_cross_entropy_forward_rows, r.programs, r.num_warps, logits, a, VEC=r.VEC, BLOCK_C=r.BLOCK_C)
        return
    tops, totals = torch.empty(2, r.programs, dtype=loss.dtype, device=loss.device)
    parts = Parts(tops, totals, r.splits, r.chunk)
    launch(_statistics_of_parts, r.programs, r.num_warps, logits, a, parts, VEC=r.VEC, BLOCK_C=r.BLOCK_C)
    launch(_cross_entropy_forward_parts, r.rows, 1, logits, a, parts, SPLITS=power_of_two_from(r.splits))


def cross_entropy_backward(logits: Tensor, target: Tensor, ignore_index: int, rows: Rows, dloss: Tensor, dlogits: Tensor) -> None:
    backward_unless(None, logits, target, ignore_index, rows, dloss, dlogits)


def backward_unless(
    guess: Guess | None, logits: Tensor, target: Tensor, ignore_index: int, rows: Rows, dloss: Tensor, dlogits: Tensor
) -> None:
    """The gradient, unless the guess was right. Nobody waits to see: the programs do."""
    v = view(logits.shape, logits.stride(), dlogits.stride())
    a = Backward(
        guess=guess, logits=logits, target=target, ignore_index=ignore_index, rows=rows, dloss=dloss, dloss_stride=dloss.stride(0),
        dlogits=dlogits, dstrides=v.strides[1], way=v.way,
    )  # fmt: skip
    if has_long_rows(v):
        r = backward_rows(v, logits.element_size(), device_of(logits))
        launch(
            _cross_entropy_backward_rows, r.programs, r.num_warps, logits, a, r.splits, r.chunk, VEC=r.VEC, BLOCK_C=r.BLOCK_C
        )  # fmt: skip
    else:
        t = tiles(v, device_of(logits))
        launch(_cross_entropy_backward_tiles, t.elementwise_programs, t.num_warps, logits, a, BLOCK_N=t.BLOCK_N, BLOCK_C=t.BLOCK_C)


@triton.jit
def _write_loss(a, x_ptr, row, inside, y, top, total):
    """The numbers of rows whose first classes x_ptr points to."""
    is_row = y != a.ignore_index
    is_class = inside & is_row & (y >= 0) & (y < a.way.classes)
    # target logit and class weight
    x_y = _wide(tl.load(x_ptr + y * a.way.strides.class_, mask=is_class, other=0.0))
    w_y = _weight_of(a, y, is_class)
    # loss
    nll = tl.log(total) - (x_y - top)
    tl.store(a.loss + row, tl.where(is_row, w_y * nll, 0.0), mask=inside)
    tl.store(a.rows.row_weight + row, tl.where(is_row, w_y, 0.0), mask=inside)
    tl.store(a.rows.top + row, tl.where(is_row, top, 0.0), mask=inside)
    tl.store(a.rows.total + row, tl.where(is_row, total, 1.0), mask=inside)


@triton.jit
def _cross_entropy_forward_rows(a, VEC: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where the class stride is 1. One program: one row."""
    row = tl.program_id(0)
    y = tl.load(a.target + row)
    start = _row_of(row, a.way.positions, a.way.strides)
    # statistics
    top, total = _row_statistics(a.logits, start, tl.where(y == a.ignore_index, 0, a.way.classes), VEC, BLOCK_C)
    _write_loss(a, a.logits + start, row, row >= 0, y, top, total)


@triton.jit
def _statistics_of_parts(a, parts, VEC: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where the class stride is 1. One program: `chunk` classes of a row."""
    number = tl.program_id(0)
    row, first = number // parts.splits, number % parts.splits * parts.chunk
    count = tl.where(tl.load(a.target + row) == a.ignore_index, 0, tl.minimum(parts.chunk, a.way.classes - first))
    top, total = _row_statistics(a.logits, _row_of(row, a.way.positions, a.way.strides) + first, count, VEC, BLOCK_C)
    tl.store(parts.tops + number, top)
    tl.store(parts.totals + number, total)


@triton.jit
def _cross_entropy_forward_parts(a, parts, SPLITS: tl.constexpr):
    """After `_statistics_of_parts`. One program: one row, merging its parts."""
    row = tl.program_id(0)
    y = tl.load(a.target + row)
    part = tl.arange(0, SPLITS)
    # statistics
    tops = tl.load(parts.tops + row * parts.splits + part, mask=part < parts.splits, other=float("-inf"))
    top, total = _merge(tops, tl.load(parts.totals + row * parts.splits + part, mask=part < parts.splits, other=0.0), 0)
    _write_loss(a, a.logits + _row_of(row, a.way.positions, a.way.strides), row, row >= 0, y, top, total)


@triton.jit
def _cross_entropy_forward_tiles(a, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program: all classes of BLOCK_N positions."""
    strides = a.way.strides
    b, p, row, inside = _tile_of(tl.program_id(0), a.way.positions, BLOCK_N)
    y = tl.load(a.target + row, mask=inside, other=0)
    # statistics
    tops, totals = _no_statistics([BLOCK_N, BLOCK_C], a.rows.top.dtype.element_ty)
    for first in tl.range(0, a.way.classes, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        lanes = inside[:, None] & (c < a.way.classes)[None, :]
        x = tl.load(_lanes_at(a.logits, strides, b, p, c), mask=lanes, other=float("-inf"))
        tops, totals = _see(tops, totals, _wide(x))
    top, total = _merge(tops, totals, 1)
    _write_loss(a, a.logits + b * strides.batch + p * strides.position, row, inside, y, top, total)


@triton.jit
def _was_right(guess):
    """Not if there was none, or for a zero, of which there are two, nor NaN."""
    right = tl.full([], False, tl.int1)
    if guess is not None:
        came = tl.load(guess.upstream)
        right = (tl.load(guess.foreseen) == came) & (tl.load(guess.foreseen + 1) == came) & (came != 0.0)
    return right


@triton.jit
def _cross_entropy_backward_rows(a, splits, chunk, VEC: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where the class strides are 1 and rows start alike modulo VEC. One program: `chunk` classes of a row."""
    if _was_right(a.guess):
        return
    LANES: tl.constexpr = BLOCK_C // VEC
    number = tl.program_id(0)
    row, part = number // splits, number % splits * chunk
    count = tl.minimum(chunk, a.way.classes - part)
    start, to = _row_of(row, a.way.positions, a.way.strides) + part, _row_of(row, a.way.positions, a.dstrides) + part
    head, vectors, first = _body_of(start, count, VEC)
    x_ptr, dx_ptr = a.logits + first, a.dlogits + _first_vector(to, VEC)
    # row numbers: an ignored row is not read, its logits count as 0, and its scale is 0
    y = tl.load(a.target + row)
    is_row = y != a.ignore_index
    y = tl.where((y >= part) & (y < part + count), y - part, -1).to(tl.int32)
    g = tl.where(is_row, tl.load(a.dloss + row * a.dloss_stride) * tl.load(a.rows.row_weight + row), 0.0)
    top = tl.where(is_row, tl.load(a.rows.top + row), 0.0)
    scale = tl.where(is_row, g / tl.load(a.rows.total + row), 0.0)
    # gradient
    lane, offset = _lanes_of_vectors(LANES, VEC)
    for v in tl.range(0, vectors, LANES):
        inside = (v + lane < vectors)[:, None]
        x = tl.load(x_ptr + (v * VEC + offset), mask=inside & is_row, other=0.0)
        e = _exp(_wide(x) - top)
        d = e * scale
        # only the block that holds y compares: elsewhere that would be a third of the work
        y_here = y - head - v * VEC
        if (y_here >= 0) & (y_here < BLOCK_C):
            d = tl.where(offset == y_here, tl.fma(e, scale, -g), d)  # by name: so it is in one visit, to the same bits
        tl.store(dx_ptr + (v * VEC + offset), d, mask=inside)
    # edges
    c, at_edge = _edges_of(head, vectors, count, VEC)
    edges = tl.load(a.logits + start + c, mask=at_edge & is_row, other=0.0)
    e = _exp(_wide(edges) - top)
    tl.store(a.dlogits + to + c, tl.where(c == y, tl.fma(e, scale, -g), e * scale), mask=at_edge)


@triton.jit
def _cross_entropy_backward_tiles(a, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program: BLOCK_C classes of BLOCK_N positions."""
    if _was_right(a.guess):
        return
    blocks = _blocks_of(a.way.classes, BLOCK_C)
    b, p, row, inside = _tile_of(tl.program_id(0) // blocks, a.way.positions, BLOCK_N)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    # row numbers
    y = tl.load(a.target + row, mask=inside, other=a.ignore_index)
    is_row = y != a.ignore_index
    g = tl.load(a.dloss + row * a.dloss_stride, mask=is_row, other=0.0) * tl.load(a.rows.row_weight + row, mask=is_row, other=0.0)
    top = tl.load(a.rows.top + row, mask=is_row, other=0.0)
    scale = g / tl.load(a.rows.total + row, mask=is_row, other=1.0)
    # gradient
    lanes = inside[:, None] & (c < a.way.classes)[None, :]
    x = _wide(tl.load(_lanes_at(a.logits, a.way.strides, b, p, c), mask=lanes, other=0.0))
    d = _exp(x - top[:, None]) * scale[:, None]
    d = tl.where(c[None, :] == y[:, None], d - g[:, None], d)
    tl.store(_lanes_at(a.dlogits, a.dstrides, b, p, c), tl.where(is_row[:, None], d, 0.0), mask=lanes)
