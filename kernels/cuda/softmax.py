"""softmax and log_softmax over the classes, and their gradients.

    p = exp(x - top) / total             dlogits = p (dp - sum_c dp_c p_c)
    log p = (x - top) - log total        dlogits = d - p sum_c d_c

A program visits its rows twice: once for their numbers, once to write; the second visit finds them in the cache.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import device_of, launch
from .math import _exp, _wide
from .plan import looping_tiles, view
from .rows import _lanes_at, _merge, _no_statistics, _see, _tile_of


def softmax_forward(logits: Tensor, prob: Tensor) -> None:
    _row_by_row(_softmax_forward, logits, prob)


def softmax_backward(prob: Tensor, dprob: Tensor, dlogits: Tensor) -> None:
    _row_by_row(_softmax_backward, prob, dprob, dlogits)


def log_softmax_forward(logits: Tensor, log_prob: Tensor) -> None:
    _row_by_row(_log_softmax_forward, logits, log_prob)


def log_softmax_backward(log_prob: Tensor, dlog_prob: Tensor, dlogits: Tensor) -> None:
    _row_by_row(_log_softmax_backward, log_prob, dlog_prob, dlogits)


def _row_by_row(kernel: Any, *tensors: Tensor) -> None:
    """Launch over tensors that are all shaped like the logits."""
    v = view(tensors[0].shape, *(t.stride() for t in tensors))
    t = looping_tiles(v, device_of(tensors[0]))
    arguments = [a for pair in zip(tensors, v.strides, strict=True) for a in pair]
    launch(kernel, t.programs, t.num_warps, tensors[0], *arguments, v.classes, v.positions, BLOCK_N=t.BLOCK_N, BLOCK_C=t.BLOCK_C)


@triton.jit
def _statistics(logits_ptr, strides, b, p, inside, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """`top` and `total` [BLOCK_N] of all classes of a tile's positions."""
    real: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    tops, totals = _no_statistics([BLOCK_N, BLOCK_C], real)
    for first in tl.range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        x = tl.load(_lanes_at(logits_ptr, strides, b, p, c), mask=inside[:, None] & (c < C)[None, :], other=float("-inf"))
        tops, totals = _see(tops, totals, _wide(x))
    return _merge(tops, totals, 1)


@triton.jit
def _softmax_forward(logits_ptr, strides, prob_ptr, prob_strides, C, P, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """logits, prob [B, C, P]. One program: all classes of BLOCK_N positions."""
    b, p, _row, inside = _tile_of(tl.program_id(0), P, BLOCK_N)
    # statistics
    top, total = _statistics(logits_ptr, strides, b, p, inside, C, BLOCK_N, BLOCK_C)
    scale = 1.0 / total
    # probabilities
    for first in tl.range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        lanes = inside[:, None] & (c < C)[None, :]
        x = _wide(tl.load(_lanes_at(logits_ptr, strides, b, p, c), mask=lanes, other=0.0))
        tl.store(_lanes_at(prob_ptr, prob_strides, b, p, c), _exp(x - top[:, None]) * scale[:, None], mask=lanes)


@triton.jit
def _log_softmax_forward(logits_ptr, strides, log_prob_ptr, log_prob_strides, C, P, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """logits, log_prob [B, C, P]. One program: all classes of BLOCK_N positions."""
    b, p, _row, inside = _tile_of(tl.program_id(0), P, BLOCK_N)
    # statistics
    top, total = _statistics(logits_ptr, strides, b, p, inside, C, BLOCK_N, BLOCK_C)
    log_total = tl.log(total)
    # log-probabilities
    for first in tl.range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        lanes = inside[:, None] & (c < C)[None, :]
        x = _wide(tl.load(_lanes_at(logits_ptr, strides, b, p, c), mask=lanes, other=0.0))
        tl.store(_lanes_at(log_prob_ptr, log_prob_strides, b, p, c), (x - top[:, None]) - log_total[:, None], mask=lanes)


@triton.jit
def _softmax_backward(prob_ptr, strides, dprob_ptr, d_strides, dlogits_ptr, to_strides, C, P, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """prob, dprob, dlogits [B, C, P]. One program: all classes of BLOCK_N positions."""
    real: tl.constexpr = tl.float64 if prob_ptr.dtype.element_ty == tl.float64 else tl.float32
    b, p, _row, inside = _tile_of(tl.program_id(0), P, BLOCK_N)
    # sum of dp p
    dots = tl.zeros([BLOCK_N, BLOCK_C], real)
    for first in tl.range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        lanes = inside[:, None] & (c < C)[None, :]
        y = _wide(tl.load(_lanes_at(prob_ptr, strides, b, p, c), mask=lanes, other=0.0))
        dots += y * _wide(tl.load(_lanes_at(dprob_ptr, d_strides, b, p, c), mask=lanes, other=0.0))
    dot = tl.sum(dots, 1)
    # gradient
    for first in tl.range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        lanes = inside[:, None] & (c < C)[None, :]
        y = _wide(tl.load(_lanes_at(prob_ptr, strides, b, p, c), mask=lanes, other=0.0))
        dy = _wide(tl.load(_lanes_at(dprob_ptr, d_strides, b, p, c), mask=lanes, other=0.0))
        tl.store(_lanes_at(dlogits_ptr, to_strides, b, p, c), y * (dy - dot[:, None]), mask=lanes)


@triton.jit
def _log_softmax_backward(
    log_prob_ptr, strides, dlog_prob_ptr, d_strides, dlogits_ptr, to_strides, C, P, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """log_prob, dlog_prob, dlogits [B, C, P]. One program: all classes of BLOCK_N positions."""
    real: tl.constexpr = tl.float64 if log_prob_ptr.dtype.element_ty == tl.float64 else tl.float32
    b, p, _row, inside = _tile_of(tl.program_id(0), P, BLOCK_N)
    # sum of d
    dots = tl.zeros([BLOCK_N, BLOCK_C], real)
    for first in tl.range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        lanes = inside[:, None] & (c < C)[None, :]
        dots += _wide(tl.load(_lanes_at(dlog_prob_ptr, d_strides, b, p, c), mask=lanes, other=0.0))
    dot = tl.sum(dots, 1)
    # gradient
    for first in tl.range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        lanes = inside[:, None] & (c < C)[None, :]
        y = _wide(tl.load(_lanes_at(log_prob_ptr, strides, b, p, c), mask=lanes, other=0.0))
        dy = _wide(tl.load(_lanes_at(dlog_prob_ptr, d_strides, b, p, c), mask=lanes, other=0.0))
        tl.store(_lanes_at(dlogits_ptr, to_strides, b, p, c), dy - _exp(y) * dot[:, None], mask=lanes)
