"""A row block by block: the largest logit of a block, its terms exp(x - top), and their sum.

The logits come from memory once: what a second walk over a block wants is still in the first-level cache. The terms stay in scratch
memory, each thread's own, so that no exp is computed twice: the gradient, the probabilities are a term times a number of the block.
A kernel that needs them when the whole row has been seen keeps those of every block (`keep` = 1); else each block's take the place of
the last one's (`keep` = 0). Terms, tops and totals have the same bits in every kernel, so it does not matter to a gradient which
kernel wrote it.
"""

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .math import INLINE, exp, exp_for
from .memory import load, offset, prefetch, store
from .rows import Walk, lanes_for
from .simd import fma, lane_max, lane_sum, lanes_of, larger, lowest, select, splat

BLOCK = 128  # vectors: 8 KB of float32, so that a block, the next one and its terms fit the first-level cache
ROOM = BLOCK + 1  # vectors of scratch for a block: its terms, its top
KEPT_BYTES = 1 << 20  # scratch for a whole row: more would leave the second-level cache


def blocks_in(way: Walk, logits: Tensor) -> int:
    """How many blocks a row has, or a tile of rows."""
    return max(1, -(-way.classes // (BLOCK if way.tile > 1 else BLOCK * lanes_for(logits))))


def blocks_kept(way: Walk, logits: Tensor) -> int:
    """How many blocks to have room for so that the terms of a whole row are kept; 1 if that is too many."""
    blocks = blocks_in(way, logits)
    return blocks if blocks * ROOM * 64 <= KEPT_BYTES else 1


def blocks_apart(way: Walk, logits: Tensor) -> int:
    """How many blocks of a row to hand out one by one: all of them if there are fewer rows than threads, else 1."""
    return blocks_in(way, logits) if way.tile == 1 and way.batch * way.positions < torch.get_num_threads() else 1


def scratch(blocks: int) -> Tensor:
    """Room for so many blocks for each thread."""
    return torch.empty(torch.get_num_threads() * blocks * ROOM * 64, dtype=torch.uint8, device="cpu")


@njit(**INLINE)
def block_of(terms: Any, number: Any) -> Any:
    """The scratch of one block."""
    return offset(terms, number * ROOM * lanes_of(terms))


@njit(**INLINE)
def block_size(terms: Any, tile: Any) -> Any:
    """Classes in a block."""
    return BLOCK if tile > 1 else BLOCK * lanes_of(terms)


@njit(**INLINE)
def all_kept(terms: Any, kept: Any, classes: Any, tile: Any) -> Any:
    """1 if there is room for all blocks of a row among `kept`, else 0: what `keep` is in a kernel that wants all of them."""
    return 1 if kept * block_size(terms, tile) >= classes else 0


@njit(**INLINE)
def _top(x: Any, first: Any, last: Any, class_stride: Any, lane_stride: Any, tile: Any, count: Any) -> Any:
    step, n = (1, count) if tile > 1 else (lanes_of(x), lanes_of(x))
    top, c = lowest(x), first
    while c + 4 * step <= last:
        x0 = load(x, c * class_stride, lane_stride, n, -np.inf)
        x1 = load(x, (c + step) * class_stride, lane_stride, n, -np.inf)
        x2 = load(x, (c + 2 * step) * class_stride, lane_stride, n, -np.inf)
        x3 = load(x, (c + 3 * step) * class_stride, lane_stride, n, -np.inf)
        top = larger(larger(top, larger(x0, x1)), larger(x2, x3))
        c += 4 * step
    while c < last:
        top = larger(top, load(x, c * class_stride, lane_stride, count if tile > 1 else last - c, -np.inf))
        c += step
    return top if tile > 1 else splat(lane_max(top), x)


@njit(**INLINE)
def _statistics(x: Any, first: Any, last: Any, class_stride: Any, lane_stride: Any, tile: Any, count: Any, terms: Any) -> Any:
    lanes = lanes_of(x)
    step, n = (1, count) if tile > 1 else (lanes, lanes)
    top = _top(x, first, last, class_stride, lane_stride, tile, count)
    keep_top(terms, top)
    total, c = splat(0.0, x), first
    while c + 4 * step <= last:
        total = total + four_terms(x, top, c, class_stride, lane_stride, tile, n, terms, (c - first) // step * lanes)
        c += 4 * step
    return top, sum_with_rest(x, top, total, first, c, last, class_stride, lane_stride, tile, count, terms)


@njit(**INLINE)
def four_terms(x: Any, top: Any, c: Any, class_stride: Any, lane_stride: Any, tile: Any, n: Any, terms: Any, at: Any) -> Any:
    """The terms of four vectors from class c on, written to `terms` from element `at` on, and their sum."""
    lanes = lanes_of(x)
    step = 1 if tile > 1 else lanes
    if tile == 1:
        ahead = c * class_stride + BLOCK * lanes
        prefetch(x, ahead)
        prefetch(x, ahead + lanes)
        prefetch(x, ahead + 2 * lanes)
        prefetch(x, ahead + 3 * lanes)
    e0 = exp_for(x, load(x, c * class_stride, lane_stride, n, -np.inf) - top)
    e1 = exp_for(x, load(x, (c + step) * class_stride, lane_stride, n, -np.inf) - top)
    e2 = exp_for(x, load(x, (c + 2 * step) * class_stride, lane_stride, n, -np.inf) - top)
    e3 = exp_for(x, load(x, (c + 3 * step) * class_stride, lane_stride, n, -np.inf) - top)
    store(terms, at, 1, lanes, e0)
    store(terms, at + lanes, 1, lanes, e1)
    store(terms, at + 2 * lanes, 1, lanes, e2)
    store(terms, at + 3 * lanes, 1, lanes, e3)
    return (e0 + e1) + (e2 + e3)


@njit(**INLINE)
def sum_with_rest(
    x: Any, top: Any, total: Any, first: Any, c: Any, last: Any, class_stride: Any, lane_stride: Any, tile: Any, count: Any, terms: Any
) -> Any:
    """`total` with the terms of classes c .. last - 1, fewer than four vectors."""
    lanes = lanes_of(x)
    step = 1 if tile > 1 else lanes
    while c < last:
        e = exp_for(x, load(x, c * class_stride, lane_stride, count if tile > 1 else last - c, -np.inf) - top)
        store(terms, (c - first) // step * lanes, 1, lanes, e)
        total, c = total + e, c + step
    return total if tile > 1 else splat(lane_sum(total), x)


@njit(**INLINE)
def block_statistics(x: Any, first: Any, last: Any, class_stride: Any, lane_stride: Any, tile: Any, count: Any, terms: Any) -> Any:
    """`top` and `total` of classes first .. last - 1, the largest logit and the sum of exp(x - top): of the rows in the lanes, or of the
    one row, in every lane. The terms of the sum are written to `terms`, vector after vector, and `top` behind them."""
    # strides and counts that the compiler knows make loops without branches
    lanes = lanes_of(x)
    if tile == 1 and class_stride == 1:
        return _statistics(x, first, last, 1, 1, 1, lanes, terms)
    if tile > 1 and lane_stride == 1 and count == lanes:
        return _statistics(x, first, last, class_stride, 1, lanes, lanes, terms)
    return _statistics(x, first, last, class_stride, lane_stride, tile, count, terms)


@njit(**INLINE)
def merge(top: Any, total: Any, top2: Any, total2: Any) -> Any:
    """The statistics of two disjoint sets of classes taken together."""
    joint = larger(top, top2)
    return joint, fma(total, exp(top - joint), total2 * exp(top2 - joint))


@njit(**INLINE)
def real_total(total: Any) -> Any:
    """NaN where a row was all -inf: every other has its largest term, 1, in the sum."""
    return select(total > 0.5, total, np.nan)


@njit(**INLINE)
def row_statistics(x: Any, classes: Any, class_stride: Any, lane_stride: Any, tile: Any, count: Any, terms: Any, keep: Any) -> Any:
    """`top` and `total` of the rows in the lanes, or of one row, block by block in order."""
    size = block_size(terms, tile)
    top, total = block_statistics(x, 0, min(classes, size), class_stride, lane_stride, tile, count, terms)
    for first in range(size, classes, size):
        to = block_of(terms, first // size * keep)
        block = block_statistics(x, first, min(classes, first + size), class_stride, lane_stride, tile, count, to)
        top, total = merge(top, total, *block)
    return top, real_total(total)


@njit(**INLINE)
def block_top(x: Any, first: Any, last: Any, class_stride: Any, lane_stride: Any, tile: Any, count: Any) -> Any:
    """`top` alone, as `block_statistics` has it."""
    lanes = lanes_of(x)
    if tile == 1 and class_stride == 1:
        return _top(x, first, last, 1, 1, 1, lanes)
    if tile > 1 and lane_stride == 1 and count == lanes:
        return _top(x, first, last, class_stride, 1, lanes, lanes)
    return _top(x, first, last, class_stride, lane_stride, tile, count)


@njit(**INLINE)
def keep_top(terms: Any, top: Any) -> None:
    """Write `top` behind the terms of a block."""
    store(terms, BLOCK * lanes_of(terms), 1, lanes_of(terms), top)


@njit(**INLINE)
def kept_top(terms: Any) -> Any:
    """`top` of a block whose terms are in scratch memory."""
    return load(terms, BLOCK * lanes_of(terms), 1, lanes_of(terms), 0.0)


@njit(**INLINE)
def term(x: Any, top: Any, class_stride: Any, lane_stride: Any, terms: Any, kept: Any, first: Any, c: Any, tile: Any, n: Any) -> Any:
    """The terms of the n classes from c on, of a block that starts at class `first`, or of class c of n rows in the lanes: from scratch
    memory (`kept` = 1) or again from the logits (0), to the same bits."""
    lanes = lanes_of(x)
    if kept:
        return load(terms, (c - first) * lanes if tile > 1 else c - first, 1, lanes if tile > 1 else n, 0.0)
    if tile == 1:
        prefetch(x, c * class_stride + BLOCK * lanes)
    return exp_for(x, load(x, c * class_stride, lane_stride, n, 0.0) - top)
