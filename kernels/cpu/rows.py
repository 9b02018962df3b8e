"""How the kernels go over logits [N, C] or [B, C, P].

The lanes of a vector are either rows (*rows in lanes*: few classes, or classes that do not lie side by side) or classes of one row
(*row by row*). Every kernel is written once for both: lane i of the vector at class c lies at
c * class_stride + i * lane_stride; [N] vectors are read with a stride of `across` lanes, 1 or 0; `advance` goes on to the next vector.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .math import INLINE, exp, exp_for_sum
from .memory import load, prefetch, to_alignment
from .simd import any_lane, fma, lane_max, lane_sum, lanes_of, larger, lowest, select, splat

FEW_CLASSES = 48  # up to here lanes are rows
SHORT_ROW = 64  # up to here a gradient is faster over several rows at once, if they lie without gaps
TASK_NUMEL = (1 << 14, 1 << 16)  # logits in a task, at least and at most: 3 to 15 microseconds; less is not worth waking a thread
CHUNK = 8192  # classes between two merges of the lanes: keeps float32 sums accurate
WEIGHTED_CHUNK = 4096  # the same where the sums are the loss itself, not the argument of a logarithm
AHEAD = 512  # logits asked for ahead of their use: out-of-order execution alone does not look that far past an exp
STREAM_BYTES = 1 << 25  # results from here on bypass the caches: they would not stay there anyway
SLACK = 8.0  # how far the largest logit may run ahead of the anchor of the sum: e**8 costs float32 nothing


class Strides(NamedTuple):
    """Of a tensor shaped like the logits, in elements."""

    batch: int
    class_: int
    position: int


def strides_of(tensor: Tensor) -> Strides:
    """[B, C, P] as it is; the N rows of [N, C] are the positions of one batch entry."""
    return Strides(0, tensor.stride(1), tensor.stride(0)) if tensor.dim() == 2 else Strides(*tensor.stride())


class Walk(NamedTuple):
    """The way over the logits: all integers, handed to the region as they are (`WALK` are their kinds)."""

    batch: int
    classes: int
    positions: int
    batch_stride: int
    class_stride: int
    position_stride: int
    tile: int  # rows in a vector: 1 is row by row
    grain: int  # tiles in a task

    @property
    def tasks(self) -> int:
        return -(-self.batch * -(-self.positions // self.tile) // self.grain)


WALK = "n" * 8


def walk(logits: Tensor, few: int = FEW_CLASSES) -> Walk:
    """With at most `few` classes, lanes are rows."""
    batch, classes, positions = (1, logits.shape[1], logits.shape[0]) if logits.dim() == 2 else logits.shape
    strides = strides_of(logits)
    rows, lanes = batch * positions, 8 if logits.dtype == torch.float64 else 16
    tile = lanes if (classes <= few or strides.class_ != 1) and rows >= lanes else 1
    least, most = (numel // max(1, tile * classes) for numel in TASK_NUMEL)
    share = rows // (tile * 4 * torch.get_num_threads())  # tiles in a task if every thread is to get four
    return Walk(batch, classes, positions, *strides, tile, max(1, least, min(most, share)))


def chunks_apart(way: Walk) -> int:
    """How many chunks of a row to hand out one by one: all of them if there are fewer rows than threads, else 1."""
    few = way.tile == 1 and way.batch * way.positions < torch.get_num_threads()
    return -(-way.classes // CHUNK) if few and way.classes > CHUNK else 1


def bypass_caches(source: Tensor, result: Tensor) -> bool:
    """Whether to write a result past the caches: it is large, and it is not the memory just read."""
    return result.numel() * result.element_size() >= STREAM_BYTES and result.data_ptr() != source.data_ptr()


@njit(**INLINE)
def last_tile(task: Any, grain: Any, batch: Any, positions: Any, tile: Any) -> Any:
    """One past the last tile of a task."""
    return min((task + 1) * grain, batch * ((positions + tile - 1) // tile))


@njit(**INLINE)
def rows_of(number: Any, positions: Any, tile: Any) -> Any:
    """A tile's batch entry, first position, first row and number of rows."""
    tiles = (positions + tile - 1) // tile
    b, p = number // tiles, number % tiles * tile
    return b, p, b * positions + p, min(tile, positions - p)


@njit(**INLINE)
def first_vector(result: Any, classes: Any, tile: Any, count: Any, past_caches: Any) -> Any:
    """How many lanes the first vector fills: every row of a tile; or so many classes that all further vectors lie aligned."""
    if tile > 1:
        return count
    head = to_alignment(result) if past_caches else 0
    return min(classes, head if head > 0 else lanes_of(result))


@njit(**INLINE)
def advance(c: Any, n: Any, classes: Any, tile: Any, lanes: Any) -> Any:
    """The class where the next vector starts, and how many lanes it fills."""
    return (c + 1, n) if tile > 1 else (c + n, min(lanes, classes - c - n))


@njit(**INLINE)
def whole_vectors(c: Any, n: Any, classes: Any, tile: Any, lanes: Any) -> Any:
    """Where the stretch of whole vectors of one row from class c on ends; c if there is none.

    Where classes lie side by side, such a stretch gets a loop of its own, with strides and counts that the compiler knows: only
    without a branch does it keep the constants of exp in registers.
    """
    return c + (classes - c) // lanes * lanes if tile == 1 and n == lanes else c


@njit(**INLINE)
def statistics(x: Any, first: Any, last: Any, class_stride: Any, lane_stride: Any, tile: Any, count: Any) -> Any:
    """`top` and `total` of every lane over classes first .. last - 1: the largest logit, and the sum of exp(x - top).

    The sum is kept relative to `anchor`, which follows `top` only when it is left behind by SLACK: rescaling is rare, and one exp
    for each class is enough.
    """
    lanes = lanes_of(x)
    top, anchor, total = lowest(x), lowest(x), splat(0.0, x)
    c, step = first, 1 if tile > 1 else lanes
    n = count if tile > 1 else lanes
    while c + 4 * step <= last and n == lanes:
        if tile == 1:
            prefetch(x, c * class_stride + AHEAD)
            prefetch(x, (c + step) * class_stride + AHEAD)
            prefetch(x, (c + 2 * step) * class_stride + AHEAD)
            prefetch(x, (c + 3 * step) * class_stride + AHEAD)
        v0 = load(x, c * class_stride, lane_stride, lanes, -np.inf)
        v1 = load(x, (c + step) * class_stride, lane_stride, lanes, -np.inf)
        v2 = load(x, (c + 2 * step) * class_stride, lane_stride, lanes, -np.inf)
        v3 = load(x, (c + 3 * step) * class_stride, lane_stride, lanes, -np.inf)
        top = larger(larger(top, larger(v0, v1)), larger(v2, v3))
        if any_lane(top > anchor + SLACK):
            total = total * exp(anchor - top)
            anchor = top
        total = total + ((exp_for_sum(v0 - anchor) + exp_for_sum(v1 - anchor)) + (exp_for_sum(v2 - anchor) + exp_for_sum(v3 - anchor)))
        c += 4 * step
    while c < last:
        v0 = load(x, c * class_stride, lane_stride, n if tile > 1 else last - c, -np.inf)
        top = larger(top, v0)
        if any_lane(top > anchor + SLACK):
            total = total * exp(anchor - top)
            anchor = top
        total = total + exp_for_sum(v0 - anchor)
        c += step
    return top, total * exp_for_sum(anchor - top)


@njit(**INLINE)
def chunk_statistics(x: Any, first: Any, last: Any, class_stride: Any) -> Any:
    """`top` and `total` of one row over classes first .. last - 1, the same in every lane."""
    tops, totals = statistics(x, first, last, class_stride, class_stride, 1, 0)
    top = splat(lane_max(tops), x)
    return top, splat(lane_sum(totals * exp(tops - top)), x)


@njit(**INLINE)
def real_total(total: Any) -> Any:
    """NaN where a row was all -inf: every other has its largest term, 1, in the sum."""
    return select(total > 0.5, total, np.nan)


@njit(**INLINE)
def merge(top: Any, total: Any, top2: Any, total2: Any) -> Any:
    """The statistics of two disjoint sets of classes taken together."""
    joint = larger(top, top2)
    return joint, fma(total, exp(top - joint), total2 * exp(top2 - joint))


@njit(**INLINE)
def row_statistics(x: Any, classes: Any, class_stride: Any, lane_stride: Any, tile: Any, count: Any) -> Any:
    """`top` and `total` of the rows in the lanes, or of one row, chunk by chunk in order."""
    if tile > 1:
        top, total = statistics(x, 0, classes, class_stride, lane_stride, tile, count)
    else:
        top, total = chunk_statistics(x, 0, min(classes, CHUNK), class_stride)
        for first in range(CHUNK, classes, CHUNK):
            top, total = merge(top, total, *chunk_statistics(x, first, min(classes, first + CHUNK), class_stride))
    return top, real_total(total)
