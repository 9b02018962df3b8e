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
from .plan import Strides, View, Walk, looping_tiles, view
from .rows import _lanes_at, _merge, _no_statistics, _see, _tile_of


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
    _launch_forward(_softmax_forward, logits, prob)


def softmax_backward(prob: Tensor, dprob: Tensor, dlogits: Tensor) -> None:
    _launch_backward(_softmax_backward, prob, dprob, dlogits)


def log_softmax_forward(logits: Tensor, log_prob: Tensor) -> None:
    _launch_forward(_log_softmax_forward, logits, log_prob)


def log_softmax_backward(log_prob: Tensor, dlog_prob: Tensor, dlogits: Tensor) -> None:
    _launch_backward(_log_softmax_backward, log_prob, dlog_prob, dlogits)


def _launch_forward(kernel: Any, logits: Tensor, prob: Tensor) -> None:
    v = view(logits.shape, logits.stride(), prob.stride())
    _row_by_row(kernel, v, logits, Forward(logits=logits, prob=prob, prob_strides=v.strides[1], way=v.way))


def _launch_backward(kernel: Any, prob: Tensor, dprob: Tensor, dlogits: Tensor) -> None:
    v = view(prob.shape, prob.stride(), dprob.stride(), dlogits.stride())
    a = Backward(prob=prob, dprob=dprob, d_strides=v.strides[1], dlogits=dlogits, to_strides=v.strides[2], way=v.way)
    _row_by_row(kernel, v, prob, a)


def _row_by_row(kernel: Any, v: View, on: Tensor, a: Forward | Backward) -> None:
    t = looping_tiles(v, device_of(on))
    launch(kernel, t.programs, t.num_warps, on, a, BLOCK_N=t.BLOCK_N, BLOCK_C=t.BLOCK_C)


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
def _softmax_forward(a, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
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
def _log_softmax_forward(a, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
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
def _softmax_backward(a, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
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
def _log_softmax_backward(a, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
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
