"""Softmax cross-entropy with class indices and label smoothing; keep = 1 - label smoothing, spread = label smoothing / C.

mass = keep w_y + spread sum(w)      loss = keep w_y (-log p_y) + spread sum_c w_c (-log p_c)
dlogits = dloss (mass p - spread w - keep w_y onehot(y))
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from numba import njit
from torch import Tensor

from ..groups import Rows, Smoothing
from .arguments import Computed, Int64, Known, Stored, arguments
from .blocks import all_kept, block_of, blocks_kept, kept_in_turn, scratch
from .cross_entropy import see_targets
from .gradient import row_numbers, write_zeros
from .inline import INLINE
from .launch import next_task, next_worker, raise_flag, region
from .math import log
from .memory import load, load_classes, store
from .rows import Lanes, Strides, Walk, bypass_caches, lanes_at, last_tile, load_numbers, one_row, row_at, strides_of, tile_of, walk
from .simd import select, splat
from .targets import refuse_out_of_bounds
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
    target: Int64
    zero: Stored  # the class probabilities of smoothing alone
    weight: Computed
    weight_stride: int
    one_weight: Known  # see `weighted.one_weight`
    ignore_index: int
    smoothing: Smoothing
    loss: Computed
    rows: Rows
    terms: Computed
    way: Walk


class Backward(NamedTuple):
    logits: Stored
    target: Int64
    zero: Stored
    weight: Computed
    weight_stride: int
    one_weight: Known  # see `weighted.one_weight`
    ignore_index: int
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
    target: Int64
    zero: Stored
    weight: Computed
    weight_stride: int
    one_weight: Known  # see `weighted.one_weight`
    ignore_index: int
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


def smoothed_cross_entropy_forward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, smoothing: Smoothing, loss: Tensor, rows: Rows
) -> None:
    way = walk(logits)
    out_of_bounds = _forward(way.tasks, Forward(
        logits=logits, target=target, zero=zero(logits.dtype), weight=weight, weight_stride=weight.stride(0),
        one_weight=one_weight(way, weight), ignore_index=ignore_index, smoothing=smoothing, loss=loss, rows=rows,
        terms=scratch(1, logits), way=way,
    ))  # fmt: skip
    if out_of_bounds:
        refuse_out_of_bounds(target, way.classes, ignore_index)


def smoothed_cross_entropy_backward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, smoothing: Smoothing, rows: Rows, dloss: Tensor, dlogits: Tensor
) -> None:
    way = walk(logits)
    _backward(way.tasks, Backward(
        logits=logits, target=target, zero=zero(logits.dtype), weight=weight, weight_stride=weight.stride(0),
        one_weight=one_weight(way, weight), ignore_index=ignore_index, smoothing=smoothing, rows=rows,
        dloss=dloss, dloss_stride=dloss.stride(0), dlogits=dlogits, dstrides=strides_of(dlogits, way.tile),
        past_caches=bypass_caches(logits, dlogits), way=way,
    ))  # fmt: skip


def smoothed_cross_entropy_forward_backward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, smoothing: Smoothing,
    dloss: Tensor, loss: Tensor, rows: Rows, dlogits: Tensor,
) -> None:  # fmt: skip
    way = walk(logits)
    kept, dstrides = blocks_kept(way, logits), strides_of(dlogits, way.tile)
    in_turn = kept_in_turn(way, kept, logits, dstrides) and weight.stride(0) <= 1
    out_of_bounds = (_rows_in_turn if in_turn else _forward_backward)(way.tasks, ForwardBackward(
        logits=logits, target=target, zero=zero(logits.dtype), weight=weight, weight_stride=weight.stride(0),
        one_weight=one_weight(way, weight), ignore_index=ignore_index, smoothing=smoothing,
        dloss=dloss, dloss_stride=dloss.stride(0), loss=loss, rows=rows, dlogits=dlogits, dstrides=dstrides,
        terms=scratch(kept, logits), kept=kept, past_caches=bypass_caches(logits, dlogits), way=way,
    ))  # fmt: skip
    if out_of_bounds:
        refuse_out_of_bounds(target, way.classes, ignore_index)


@cache
def zero(dtype: torch.dtype) -> Tensor:
    return torch.zeros(1, dtype=dtype, device="cpu")


@njit(**INLINE)
def _factors(a: Any, x: Any) -> Any:
    return known_factors_of(a, x, Lanes(a.zero, 0, 0, x.tile, x.rows))


@njit(**INLINE)
def _see_row(a: Any, x: Any, row: Any, terms: Any, kept: Any) -> Any:
    """Write the losses and the numbers of the rows at x. True if a target is no class."""
    # statistics
    seen = 0 if x.tile == 1 and a.target[row] == a.ignore_index else a.way.classes
    statistics = weighted_statistics(x, _factors(a, x), seen, terms, kept)
    return _note(a, x, row, statistics)


@njit(**INLINE)
def _note(a: Any, x: Any, row: Any, statistics: Any) -> Any:
    """Write the losses and the numbers of the rows at x, of which `statistics` is known. True if a target is no class."""
    tops, totals, masses, gaps = statistics
    # target logit and class weight
    out_of_bounds = see_targets(a, x, row, tops, totals)
    # loss
    tops, totals = load(a.rows.top, row, 1, x.rows, 0.0), load(a.rows.total, row, 1, x.rows, 1.0)
    valid = load_classes(a.target, row, 1, x.rows, a.ignore_index, tops) > -1
    kept_mass = a.smoothing.keep * load(a.rows.row_weight, row, 1, x.rows, 0.0)
    log_total = log(totals)
    nll = log_total - (load(a.loss, row, 1, x.rows, 0.0) - tops)
    store(a.loss, row, 1, x.rows, select(valid, kept_mass * nll + weighted_loss(masses, log_total, gaps), 0.0))
    store(a.rows.mass, row, 1, x.rows, select(valid, masses + kept_mass, 0.0))
    return out_of_bounds


@njit(**INLINE)
def _row_numbers(a: Any, x: Any, row: Any) -> Any:
    """The numbers of the rows at x, the first of which is `row`."""
    r, of_mass = row_numbers(a, a.rows.row_weight, x, row), row_numbers(a, a.rows.mass, x, row)
    g = load_numbers(a.dloss, a.dloss_stride, row, x, 0.0)
    return WeightedNumbers(r.top, g, of_mass.scale, r.y, r.y_row, a.smoothing.keep * r.g)


@njit(**INLINE)
def _gradient(a: Any, x: Any, dx: Any, row: Any, terms: Any, kept: Any) -> None:
    """Write the gradients of the rows at x."""
    # row numbers
    r = _row_numbers(a, x, row)
    # gradient
    if x.tile == 1 and r.y_row == a.ignore_index:
        write_zeros(dx, 0, a.way.classes, a.past_caches)
    else:
        weighted_gradient_of_row(x, dx, _factors(a, x), a.way.classes, terms, kept, r, a.past_caches)


@region(Forward)
def _forward(block: Any) -> None:
    a = arguments(block)
    terms = block_of(a.terms, next_worker(block))
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_tile(task, a.way)):
            t = tile_of(number, a.way)
            if _see_row(a, lanes_at(a.logits, a.way.strides, t, a.way), t.row, terms, 0):
                raise_flag(block)
        task = next_task(block)


@region(Backward)
def _backward(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_tile(task, a.way)):
            t = tile_of(number, a.way)
            x, dx = lanes_at(a.logits, a.way.strides, t, a.way), lanes_at(a.dlogits, a.dstrides, t, a.way)
            _gradient(a, x, dx, t.row, a.rows.top, 0)
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
            x, dx = lanes_at(a.logits, a.way.strides, t, a.way), lanes_at(a.dlogits, a.dstrides, t, a.way)
            if _see_row(a, x, t.row, terms, keep):
                raise_flag(block)
            _gradient(a, x, dx, t.row, terms, keep)
        task = next_task(block)


@region(ForwardBackward)
def _rows_in_turn(block: Any) -> None:
    """Rows of consecutive classes. The gradient of a row is written while the next one is read: see `cross_entropy_one_visit`."""
    a = arguments(block)
    way, classes = a.way, a.way.classes
    terms = block_of(a.terms, next_worker(block) * a.kept)
    k = side_by_side(_factors(a, one_row(a.logits)), 0)
    # the row whose gradient is still to be written, and where: the terms are its own
    before, before_dx = -1, a.dlogits
    task = next_task(block)
    while task >= 0:
        for row in range(task * way.grain, last_tile(task, way)):
            t = tile_of(row, way)
            x, dx = one_row(row_at(a.logits, way.strides, t.b, t.p)), row_at(a.dlogits, a.dstrides, t.b, t.p)
            counts = a.target[row] != a.ignore_index
            if not counts:
                zero = splat(0.0, a.logits)
                statistics = zero, zero, zero, zero
                write_zeros(one_row(dx), 0, classes, a.past_caches)
            elif before < 0:
                statistics = weighted_statistics(x, k, classes, terms, 1)
            else:
                waiting = Waiting(before_dx, k, _row_numbers(a, x, before))
                statistics = statistics_and_weighted_gradient(x, k, classes, terms, waiting, a.past_caches)
            if _note(a, x, row, statistics):
                raise_flag(block)
            if counts:
                before, before_dx = row, dx
        task = next_task(block)
    if before >= 0:
        dx = one_row(before_dx)
        weighted_gradient_of_row(dx, dx, k, classes, terms, 1, _row_numbers(a, dx, before), a.past_caches)
