"""Softmax cross-entropy with class probabilities q as targets; keep = 1 - label smoothing, spread = label smoothing / C.

k_c = w_c (keep q_c + spread)      mass = sum k      loss = sum_c k_c (-log p_c)
dlogits = dloss (mass p - k)       dtarget = dloss keep w_c (-log p_c)
"""

from typing import Any, NamedTuple

from numba import njit
from torch import Tensor

from ..groups import Rows, Smoothing
from .arguments import Computed, Floats, Known, Stored, arguments
from .blocks import all_kept, block_of, blocks_kept, kept_in_turn, scratch
from .inline import INLINE
from .launch import next_task, next_worker, region
from .math import log
from .memory import load, store
from .rows import (
    Strides,
    Walk,
    advance,
    bypass_caches,
    lanes_at,
    last_tile,
    load_at,
    load_numbers,
    one_row,
    row_at,
    store_at,
    strides_of,
    tile_of,
    walk,
)
from .simd import lane_numbers, lanes_of, splat
from .weighted import (
    WeightedNumbers,
    known_factors_of,
    one_weight,
    side_by_side,
    weighted_gradient_of_row,
    weighted_loss,
    weighted_statistics,
)
from .weighted_in_turn import Waiting, statistics_and_weighted_gradient


class Forward(NamedTuple):
    logits: Stored
    target: Floats
    target_strides: Strides
    weight: Computed
    weight_stride: int
    one_weight: Known  # see `weighted.one_weight`
    smoothing: Smoothing
    loss: Computed
    rows: Rows
    terms: Computed
    way: Walk


class Backward(NamedTuple):
    logits: Stored
    target: Floats
    target_strides: Strides
    weight: Computed
    weight_stride: int
    one_weight: Known  # see `weighted.one_weight`
    smoothing: Smoothing
    rows: Rows
    dloss: Computed
    dloss_stride: int
    dlogits: Stored
    dstrides: Strides
    past_caches: Known
    way: Walk


class ForwardBackward(NamedTuple):
    logits: Stored
    target: Floats
    target_strides: Strides
    weight: Computed
    weight_stride: int
    one_weight: Known  # see `weighted.one_weight`
    smoothing: Smoothing
    dloss: Computed
    dloss_stride: int
    loss: Computed
    rows: Rows
    dlogits: Stored
    dstrides: Strides
    terms: Computed
    kept: int  # blocks that there is room for in `terms`
    past_caches: Known
    way: Walk


class TargetBackward(NamedTuple):
    logits: Stored
    weight: Computed
    weight_stride: int
    keep: float
    rows: Rows
    dloss: Computed
    dloss_stride: int
    dtarget: Floats
    dstrides: Strides
    way: Walk


def soft_cross_entropy_forward(logits: Tensor, target: Tensor, weight: Tensor, smoothing: Smoothing, loss: Tensor, rows: Rows) -> None:
    way = walk(logits)
    _forward(way.tasks, Forward(
        logits=logits, target=target, target_strides=strides_of(target, way.tile), weight=weight, weight_stride=weight.stride(0),
        one_weight=one_weight(way, weight), smoothing=smoothing, loss=loss, rows=rows, terms=scratch(1, logits), way=way,
    ))  # fmt: skip


def soft_cross_entropy_backward(
    logits: Tensor, target: Tensor, weight: Tensor, smoothing: Smoothing, rows: Rows, dloss: Tensor, dlogits: Tensor
) -> None:
    way = walk(logits)
    _backward(way.tasks, Backward(
        logits=logits, target=target, target_strides=strides_of(target, way.tile), weight=weight, weight_stride=weight.stride(0),
        one_weight=one_weight(way, weight), smoothing=smoothing, rows=rows, dloss=dloss, dloss_stride=dloss.stride(0),
        dlogits=dlogits, dstrides=strides_of(dlogits, way.tile), past_caches=bypass_caches(logits, dlogits), way=way,
    ))  # fmt: skip


def soft_cross_entropy_forward_backward(
    logits: Tensor, target: Tensor, weight: Tensor, smoothing: Smoothing, dloss: Tensor, loss: Tensor, rows: Rows, dlogits: Tensor
) -> None:
    way = walk(logits)
    kept, target_strides, dstrides = blocks_kept(way, logits), strides_of(target, way.tile), strides_of(dlogits, way.tile)
    in_turn = kept_in_turn(way, kept, logits, target_strides, dstrides) and weight.stride(0) <= 1
    (_rows_in_turn if in_turn else _forward_backward)(way.tasks, ForwardBackward(
        logits=logits, target=target, target_strides=target_strides, weight=weight, weight_stride=weight.stride(0),
        one_weight=one_weight(way, weight), smoothing=smoothing, dloss=dloss, dloss_stride=dloss.stride(0), loss=loss, rows=rows,
        dlogits=dlogits, dstrides=dstrides, terms=scratch(kept, logits), kept=kept,
        past_caches=bypass_caches(logits, dlogits), way=way,
    ))  # fmt: skip


def soft_cross_entropy_target_backward(logits: Tensor, weight: Tensor, keep: float, rows: Rows, dloss: Tensor, dtarget: Tensor) -> None:
    way = walk(logits)
    _target_backward(way.tasks, TargetBackward(
        logits=logits, weight=weight, weight_stride=weight.stride(0), keep=keep, rows=rows, dloss=dloss,
        dloss_stride=dloss.stride(0), dtarget=dtarget, dstrides=strides_of(dtarget, way.tile), way=way,
    ))  # fmt: skip


@njit(**INLINE)
def _factors(a: Any, x: Any, t: Any) -> Any:
    return known_factors_of(a, x, lanes_at(a.target, a.target_strides, t, a.way))


@njit(**INLINE)
def _factors_in_turn(a: Any, q: Any) -> Any:
    """Those of one row whose class probabilities lie side by side at q, as the weights do unless one is for all."""
    return side_by_side(known_factors_of(a, one_row(q), one_row(q)), 1)


@njit(**INLINE)
def _see_row(a: Any, x: Any, t: Any, terms: Any, kept: Any) -> None:
    """Write the losses and the numbers of the rows at x."""
    # statistics
    statistics = weighted_statistics(x, _factors(a, x, t), a.way.classes, terms, kept)
    # loss
    _note(a, t.row, t.rows, statistics)


@njit(**INLINE)
def _note(a: Any, row: Any, rows: Any, statistics: Any) -> None:
    """Write the losses and the numbers of so many rows, the first of which is `row`."""
    tops, totals, masses, gaps = statistics
    store(a.rows.top, row, 1, rows, tops)
    store(a.rows.total, row, 1, rows, totals)
    store(a.rows.mass, row, 1, rows, masses)
    store(a.loss, row, 1, rows, weighted_loss(masses, log(totals), gaps))


@njit(**INLINE)
def _row_numbers(a: Any, x: Any, row: Any) -> Any:
    """The numbers of the rows at x, the first of which is `row`."""
    top, g = load_numbers(a.rows.top, 1, row, x, 0.0), load_numbers(a.dloss, a.dloss_stride, row, x, 0.0)
    scale = g * load_numbers(a.rows.mass, 1, row, x, 0.0) / load_numbers(a.rows.total, 1, row, x, 1.0)
    y, nothing = lane_numbers(splat(0.0, a.logits)), splat(0.0, a.logits)  # no class is the target
    return WeightedNumbers(top, g, scale, y, -1, nothing)


@njit(**INLINE)
def _gradient(a: Any, x: Any, t: Any, terms: Any, kept: Any) -> None:
    """Write the gradients of the rows at x."""
    # row numbers
    r = _row_numbers(a, x, t.row)
    # gradient
    dx = lanes_at(a.dlogits, a.dstrides, t, a.way)
    weighted_gradient_of_row(x, dx, _factors(a, x, t), a.way.classes, terms, kept, r, a.past_caches)


@region(Forward)
def _forward(block: Any) -> None:
    a = arguments(block)
    terms = block_of(a.terms, next_worker(block))
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_tile(task, a.way)):
            t = tile_of(number, a.way)
            _see_row(a, lanes_at(a.logits, a.way.strides, t, a.way), t, terms, 0)
        task = next_task(block)


@region(Backward)
def _backward(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_tile(task, a.way)):
            t = tile_of(number, a.way)
            _gradient(a, lanes_at(a.logits, a.way.strides, t, a.way), t, a.rows.top, 0)
        task = next_task(block)


@region(ForwardBackward)
def _forward_backward(block: Any) -> None:
    a = arguments(block)
    terms = block_of(a.terms, next_worker(block) * a.kept)
    keep = all_kept(terms, a.kept, a.way)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_tile(task, a.way)):
            t = tile_of(number, a.way)
            x = lanes_at(a.logits, a.way.strides, t, a.way)
            _see_row(a, x, t, terms, keep)
            _gradient(a, x, t, terms, keep)
        task = next_task(block)


@region(ForwardBackward)
def _rows_in_turn(block: Any) -> None:
    """Rows of consecutive classes. The gradient of a row is written while the next one is read: see `cross_entropy_one_visit`."""
    a = arguments(block)
    way, classes = a.way, a.way.classes
    terms = block_of(a.terms, next_worker(block) * a.kept)
    # the row whose gradient is still to be written, where, and its target: the terms are its own
    before, before_dx, before_q = -1, a.dlogits, a.target
    task = next_task(block)
    while task >= 0:
        for row in range(task * way.grain, last_tile(task, way)):
            t = tile_of(row, way)
            x, q = one_row(row_at(a.logits, way.strides, t.b, t.p)), row_at(a.target, a.target_strides, t.b, t.p)
            k = _factors_in_turn(a, q)
            if before < 0:
                statistics = weighted_statistics(x, k, classes, terms, 1)
            else:
                waiting = Waiting(before_dx, _factors_in_turn(a, before_q), _row_numbers(a, x, before))
                statistics = statistics_and_weighted_gradient(x, k, classes, terms, waiting, a.past_caches)
            _note(a, row, 1, statistics)
            before, before_dx, before_q = row, row_at(a.dlogits, a.dstrides, t.b, t.p), q
        task = next_task(block)
    if before >= 0:
        dx = one_row(before_dx)
        weighted_gradient_of_row(dx, dx, _factors_in_turn(a, before_q), classes, terms, 1, _row_numbers(a, dx, before), a.past_caches)


@region(TargetBackward)
def _target_backward(block: Any) -> None:
    a = arguments(block)
    lanes, classes = lanes_of(a.logits), a.way.classes
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_tile(task, a.way)):
            t = tile_of(number, a.way)
            x, dq = lanes_at(a.logits, a.way.strides, t, a.way), lanes_at(a.dtarget, a.dstrides, t, a.way)
            w_lane = 0 if x.tile > 1 else a.weight_stride
            # row numbers
            top, log_total = load_numbers(a.rows.top, 1, t.row, x, 0.0), log(load_numbers(a.rows.total, 1, t.row, x, 1.0))
            g = load_numbers(a.dloss, a.dloss_stride, t.row, x, 0.0) * a.keep
            # gradient
            c, n = 0, x.rows if x.tile > 1 else min(lanes, classes)
            while c < classes:
                nll = log_total - (load_at(x, c, n, 0.0) - top)
                store_at(dq, c, n, g * load(a.weight, c * a.weight_stride, w_lane, n, 0.0) * nll)
                c, n = advance(x, c, n, classes)
        task = next_task(block)
