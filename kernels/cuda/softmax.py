"""softmax and log_softmax over the classes, and their gradients.

    p = exp(x - top) / total             dlogits = p (dp - sum_c dp_c p_c)
    log p = (x - top) - log total        dlogits = d - p sum_c d_c

A program visits its rows twice: once for their numbers, once to write; the second visit finds them in the cache.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import device_of, launch
from .math import _exp, _wide
from .plan import Strides, View, Walk, has_long_rows, looping_tiles, view, whole_rows
from .rows import (
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
)


class Forward(NamedTuple):
    """All tensors are [B, C, P]."""

    logits: Tensor
    prob: Tensor  # or its logarithm
    prob_strides: Strides
    way: Walk


class Backward(NamedTuple):
    """All tensors are [B, C, P]."""

    prob: Tensor  # or its logarithm
    dprob: Tensor
    d_strides: Strides
    dlogits: Tensor
    to_strides: Strides
    way: Walk


def softmax_forward(logits: Tensor, prob: Tensor) -> None:
    _launch_forward((_softmax_forward_rows, _softmax_forward_tiles), logits, prob)


def softmax_backward(prob: Tensor, dprob: Tensor, dlogits: Tensor) -> None:
    _launch_backward((_softmax_backward_rows, _softmax_backward_tiles), prob, dprob, dlogits)


def log_softmax_forward(logits: Tensor, log_prob: Tensor) -> None:
    _launch_forward((_log_softmax_forward_rows, _log_softmax_forward_tiles), logits, log_prob)


def log_softmax_backward(log_prob: Tensor, dlog_prob: Tensor, dlogits: Tensor) -> None:
    _launch_backward((_log_softmax_backward_rows, _log_softmax_backward_tiles), log_prob, dlog_prob, dlogits)


def _launch_forward(kernels: tuple[Any, Any], logits: Tensor, prob: Tensor) -> None:
    v = view(logits.shape, logits.stride(), prob.stride())
    _row_by_row(kernels, v, logits, Forward(logits=logits, prob=prob, prob_strides=v.strides[1], way=v.way))


def _launch_backward(kernels: tuple[Any, Any], prob: Tensor, dprob: Tensor, dlogits: Tensor) -> None:
    v = view(prob.shape, prob.stride(), dprob.stride(), dlogits.stride())
    a = Backward(prob=prob, dprob=dprob, d_strides=v.strides[1], dlogits=dlogits, to_strides=v.strides[2], way=v.way)
    _row_by_row(kernels, v, prob, a)


def _row_by_row(kernels: tuple[Any, Any], v: View, on: Tensor, a: Forward | Backward) -> None:
    """The first kernel takes rows, the second one tiles."""
    if has_long_rows(v):
        r = whole_rows(v, on.element_size(), device_of(on))
        launch(kernels[0], r.programs, r.num_warps, on, a, VEC=r.VEC, BLOCK_C=r.BLOCK_C)
    else:
        t = looping_tiles(v, device_of(on))
        launch(kernels[1], t.programs, t.num_warps, on, a, BLOCK_N=t.BLOCK_N, BLOCK_C=t.BLOCK_C)


@triton.jit
def _statistics(a, b, p, inside, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """`top` and `total` [BLOCK_N] of all classes of a tile's positions."""
    real: tl.constexpr = tl.float64 if a.logits.dtype.element_ty == tl.float64 else tl.float32
    tops, totals = _no_statistics([BLOCK_N, BLOCK_C], real)
    for first in tl.range(0, a.way.classes, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        x = tl.load(_lanes_at(a.logits, a.way.strides, b, p, c), mask=inside[:, None] & (c < a.way.classes)[None, :], other=float("-inf"))
        tops, totals = _see(tops, totals, _wide(x))
    return _merge(tops, totals, 1)


@triton.jit
def _softmax_forward_rows(a, VEC: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where the class strides are 1 and rows start alike modulo VEC. One program: one row."""
    LANES: tl.constexpr = BLOCK_C // VEC
    row, C = tl.program_id(0), a.way.classes
    start, to = _row_of(row, a.way.positions, a.way.strides), _row_of(row, a.way.positions, a.prob_strides)
    # statistics
    top, total = _row_statistics(a.logits, start, C, VEC, BLOCK_C)
    scale = 1.0 / total
    # probabilities
    head, vectors, first = _body_of(start, C, VEC)
    x_ptr, y_ptr = a.logits + first, a.prob + _first_vector(to, VEC)
    lane, offset = _lanes_of_vectors(LANES, VEC)
    for v in tl.range(0, vectors, LANES):
        inside = (v + lane < vectors)[:, None]
        x = _wide(tl.load(x_ptr + (v * VEC + offset), mask=inside, other=0.0))
        tl.store(y_ptr + (v * VEC + offset), _exp(x - top) * scale, mask=inside)
    # edges
    c, at_edge = _edges_of(head, vectors, C, VEC)
    x = _wide(tl.load(a.logits + start + c, mask=at_edge, other=0.0))
    tl.store(a.prob + to + c, _exp(x - top) * scale, mask=at_edge)


@triton.jit
def _softmax_forward_tiles(a, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program: all classes of BLOCK_N positions."""
    b, p, _row, inside = _tile_of(tl.program_id(0), a.way.positions, BLOCK_N)
    # statistics
    top, total = _statistics(a, b, p, inside, BLOCK_N, BLOCK_C)
    scale = 1.0 / total
    # probabilities
    for first in tl.range(0, a.way.classes, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        lanes = inside[:, None] & (c < a.way.classes)[None, :]
        x = _wide(tl.load(_lanes_at(a.logits, a.way.strides, b, p, c), mask=lanes, other=0.0))
        tl.store(_lanes_at(a.prob, a.prob_strides, b, p, c), _exp(x - top[:, None]) * scale[:, None], mask=lanes)


@triton.jit
def _log_softmax_forward_rows(a, VEC: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where the class strides are 1 and rows start alike modulo VEC. One program: one row."""
    LANES: tl.constexpr = BLOCK_C // VEC
    row, C = tl.program_id(0), a.way.classes
    start, to = _row_of(row, a.way.positions, a.way.strides), _row_of(row, a.way.positions, a.prob_strides)
    # statistics
    top, total = _row_statistics(a.logits, start, C, VEC, BLOCK_C)
    log_total = tl.log(total)
    # log-probabilities
    head, vectors, first = _body_of(start, C, VEC)
    x_ptr, y_ptr = a.logits + first, a.prob + _first_vector(to, VEC)
    lane, offset = _lanes_of_vectors(LANES, VEC)
    for v in tl.range(0, vectors, LANES):
        inside = (v + lane < vectors)[:, None]
        x = _wide(tl.load(x_ptr + (v * VEC + offset), mask=inside, other=0.0))
        tl.store(y_ptr + (v * VEC + offset), (x - top) - log_total, mask=inside)
    # edges
    c, at_edge = _edges_of(head, vectors, C, VEC)
    x = _wide(tl.load(a.logits + start + c, mask=at_edge, other=0.0))
    tl.store(a.prob + to + c, (x - top) - log_total, mask=at_edge)


@triton.jit
def _log_softmax_forward_tiles(a, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program: all classes of BLOCK_N positions."""
    b, p, _row, inside = _tile_of(tl.program_id(0), a.way.positions, BLOCK_N)
    # statistics
    top, total = _statistics(a, b, p, inside, BLOCK_N, BLOCK_C)
    log_total = tl.log(total)
    # log-probabilities
    for first in tl.range(0, a.way.classes, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        lanes = inside[:, None] & (c < a.way.classes)[None, :]
        x = _wide(tl.load(_lanes_at(a.logits, a.way.strides, b, p, c), mask=lanes, other=0.0))
        tl.store(_lanes_at(a.prob, a.prob_strides, b, p, c), (x - top[:, None]) - log_total[:, None], mask=lanes)


@triton.jit
def _softmax_backward_rows(a, VEC: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where the class strides are 1 and rows start alike modulo VEC. One program: one row."""
    LANES: tl.constexpr = BLOCK_C // VEC
    real: tl.constexpr = tl.float64 if a.prob.dtype.element_ty == tl.float64 else tl.float32
    row, P = tl.program_id(0), a.way.positions
    start, given, to = _row_of(row, P, a.way.strides), _row_of(row, P, a.d_strides), _row_of(row, P, a.to_strides)
    head, vectors, first = _body_of(start, a.way.classes, VEC)
    y_ptr, dy_ptr, dx_ptr = a.prob + first, a.dprob + _first_vector(given, VEC), a.dlogits + _first_vector(to, VEC)
    lane, offset = _lanes_of_vectors(LANES, VEC)
    # edges
    c, at_edge = _edges_of(head, vectors, a.way.classes, VEC)
    y_edges = _wide(tl.load(a.prob + start + c, mask=at_edge, other=0.0))
    dy_edges = _wide(tl.load(a.dprob + given + c, mask=at_edge, other=0.0))
    # sum of dp p
    dots = tl.zeros([LANES], real)
    for v in tl.range(0, vectors, LANES):
        inside = (v + lane < vectors)[:, None]
        y = _wide(tl.load(y_ptr + (v * VEC + offset), mask=inside, other=0.0))
        dy = _wide(tl.load(dy_ptr + (v * VEC + offset), mask=inside, other=0.0))
        dots += tl.sum(y * dy, 1)
    dot = tl.sum(dots, 0) + tl.sum(y_edges * dy_edges, 0)
    # gradient
    for v in tl.range(0, vectors, LANES):
        inside = (v + lane < vectors)[:, None]
        y = _wide(tl.load(y_ptr + (v * VEC + offset), mask=inside, other=0.0))
        dy = _wide(tl.load(dy_ptr + (v * VEC + offset), mask=inside, other=0.0))
        tl.store(dx_ptr + (v * VEC + offset), y * (dy - dot), mask=inside)
    tl.store(a.dlogits + to + c, y_edges * (dy_edges - dot), mask=at_edge)


@triton.jit
def _softmax_backward_tiles(a, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program: all classes of BLOCK_N positions."""
    real: tl.constexpr = tl.float64 if a.prob.dtype.element_ty == tl.float64 else tl.float32
    b, p, _row, inside = _tile_of(tl.program_id(0), a.way.positions, BLOCK_N)
    # sum of dp p
    dots = tl.zeros([BLOCK_N, BLOCK_C], real)
    for first in tl.range(0, a.way.classes, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        lanes = inside[:, None] & (c < a.way.classes)[None, :]
        y = _wide(tl.load(_lanes_at(a.prob, a.way.strides, b, p, c), mask=lanes, other=0.0))
        dots += y * _wide(tl.load(_lanes_at(a.dprob, a.d_strides, b, p, c), mask=lanes, other=0.0))
    dot = tl.sum(dots, 1)
    # gradient
    for first in tl.range(0, a.way.classes, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        lanes = inside[:, None] & (c < a.way.classes)[None, :]
        y = _wide(tl.load(_lanes_at(a.prob, a.way.strides, b, p, c), mask=lanes, other=0.0))
        dy = _wide(tl.load(_lanes_at(a.dprob, a.d_strides, b, p, c), mask=lanes, other=0.0))
        tl.store(_lanes_at(a.dlogits, a.to_strides, b, p, c), y * (dy - dot[:, None]), mask=lanes)


@triton.jit
def _log_softmax_backward_rows(a, VEC: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where the class strides are 1 and rows start alike modulo VEC. One program: one row."""
    LANES: tl.constexpr = BLOCK_C // VEC
    real: tl.constexpr = tl.float64 if a.prob.dtype.element_ty == tl.float64 else tl.float32
    row, P = tl.program_id(0), a.way.positions
    start, given, to = _row_of(row, P, a.way.strides), _row_of(row, P, a.d_strides), _row_of(row, P, a.to_strides)
    head, vectors, first = _body_of(start, a.way.classes, VEC)
    y_ptr, dy_ptr, dx_ptr = a.prob + first, a.dprob + _first_vector(given, VEC), a.dlogits + _first_vector(to, VEC)
    lane, offset = _lanes_of_vectors(LANES, VEC)
    # edges
    c, at_edge = _edges_of(head, vectors, a.way.classes, VEC)
    y_edges = _wide(tl.load(a.prob + start + c, mask=at_edge, other=0.0))
    dy_edges = _wide(tl.load(a.dprob + given + c, mask=at_edge, other=0.0))
    # sum of d
    dots = tl.zeros([LANES], real)
    for v in tl.range(0, vectors, LANES):
        inside = (v + lane < vectors)[:, None]
        dy = _wide(tl.load(dy_ptr + (v * VEC + offset), mask=inside, other=0.0))
        dots += tl.sum(dy, 1)
    dot = tl.sum(dots, 0) + tl.sum(dy_edges, 0)
    # gradient
    for v in tl.range(0, vectors, LANES):
        inside = (v + lane < vectors)[:, None]
        y = _wide(tl.load(y_ptr + (v * VEC + offset), mask=inside, other=0.0))
        dy = _wide(tl.load(dy_ptr + (v * VEC + offset), mask=inside, other=0.0))
        tl.store(dx_ptr + (v * VEC + offset), dy - _exp(y) * dot, mask=inside)
    tl.store(a.dlogits + to + c, dy_edges - _exp(y_edges) * dot, mask=at_edge)


@triton.jit
def _log_softmax_backward_tiles(a, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program: all classes of BLOCK_N positions."""
    real: tl.constexpr = tl.float64 if a.prob.dtype.element_ty == tl.float64 else tl.float32
    b, p, _row, inside = _tile_of(tl.program_id(0), a.way.positions, BLOCK_N)
    # sum of d
    dots = tl.zeros([BLOCK_N, BLOCK_C], real)
    for first in tl.range(0, a.way.classes, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        lanes = inside[:, None] & (c < a.way.classes)[None, :]
        dots += _wide(tl.load(_lanes_at(a.dprob, a.d_strides, b, p, c), mask=lanes, other=0.0))
    dot = tl.sum(dots, 1)
    # gradient
    for first in tl.range(0, a.way.classes, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        lanes = inside[:, None] & (c < a.way.classes)[None, :]
        y = _wide(tl.load(_lanes_at(a.prob, a.way.strides, b, p, c), mask=lanes, other=0.0))
        dy = _wide(tl.load(_lanes_at(a.dprob, a.d_strides, b, p, c), mask=lanes, other=0.0))
        tl.store(_lanes_at(a.dlogits, a.to_strides, b, p, c), dy - _exp(y) * dot[:, None], mask=lanes)
