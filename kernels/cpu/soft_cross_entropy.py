"""Softmax cross-entropy with class probabilities q as targets; keep = 1 - label smoothing, spread = label smoothing / C.

k_c = w_c (keep q_c + spread)      mass = sum k      loss = sum_c k_c (-log p_c)
dlogits = dloss (mass p - k)       dtarget = dloss keep w_c (-log p_c)
"""

from typing import Any, NamedTuple

from numba import njit
from torch import Tensor

from ..groups import Rows, Smoothing
from .arguments import Computed, Floats, Known, Stored, arguments
from .blocks import all_kept, block_of, blocks_kept, scratch
from .inline import INLINE
from .launch import next_task, next_worker, region
from .math import log
from .memory import load, store
from .rows import Strides, Walk, advance, bypass_caches, lanes_at, last_tile, load_at, load_numbers, store_at, strides_of, tile_of, walk
from .simd import lane_numbers, lanes_of, splat
from .weighted import WeightedNumbers, factors_of, weighted_gradient_of_row, weighted_loss, weighted_statistics


class Forward(NamedTuple):
    logits: Stored
    target: Floats
    target_strides: Strides
    weight: Computed
    weight_stride: int
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
        smoothing=smoothing, loss=loss, rows=rows, terms=scratch(1, logits), way=way,
    ))  # fmt: skip


def soft_cross_entropy_backward(
    logits: Tensor, target: Tensor, weight: Tensor, smoothing: Smoothing, rows: Rows, dloss: Tensor, dlogits: Tensor
) -> None:
    way = walk(logits)
    _backward(way.tasks, Backward(
        logits=logits, target=target, target_strides=strides_of(target, way.tile), weight=weight, weight_stride=weight.stride(0),
        smoothing=smoothing, rows=rows, dloss=dloss, dloss_stride=dloss.stride(0), dlogits=dlogits, dstrides=strides_of(dlogits, way.tile),
        past_caches=bypass_caches(logits, dlogits), way=way,
    ))  # fmt: skip


def soft_cross_entropy_forward_backward(
    logits: Tensor, target: Tensor, weight: Tensor, smoothing: Smoothing, dloss: Tensor, loss: Tensor, rows: Rows, dlogits: Tensor
) -> None:
    way = walk(logits)
    kept = blocks_kept(way, logits)
    _forward_backward(way.tasks, ForwardBackward(
        logits=logits, target=target, target_strides=strides_of(target, way.tile), weight=weight, weight_stride=weight.stride(0),
        smoothing=smoothing, dloss=dloss, dloss_stride=dloss.stride(0), loss=loss, rows=rows, dlogits=dlogits,
        dstrides=strides_of(dlogits, way.tile), terms=scratch(kept, logits), kept=kept, past_caches=bypass_caches(logits, dlogits), way=way,
    ))  # fmt: skip


def soft_cross_entropy_target_backward(logits: Tensor, weight: Tensor, keep: float, rows: Rows, dloss: Tensor, dtarget: Tensor) -> None:
    way = walk(logits)
    _target_backward(way.tasks, TargetBackward(
        logits=logits, weight=weight, weight_stride=weight.stride(0), keep=keep, rows=rows, dloss=dloss,
        dloss_stride=dloss.stride(0), dtarget=dtarget, dstrides=strides_of(dtarget, way.tile), way=way,
    ))  # fmt: skip


@njit(**INLINE)
def _factors(a: Any, x: Any, t: Any) -> Any:
    return factors_of(x, lanes_at(a.target, a.target_strides, t, a.way), a.weight, a.weight_stride, a.smoothing)


@njit(**INLINE)
def _see_row(a: Any, x: Any, t: Any, terms: Any, kept: Any) -> None:
    """Write the losses and the numbers of the rows at x."""
    # statistics
    tops, totals, masses, gaps = weighted_statistics(x, _factors(a, x, t), a.way.classes, terms, kept)
    # loss
    store(a.rows.top, t.row, 1, t.rows, tops)
    store(a.rows.total, t.row, 1, t.rows, totals)
    store(a.rows.mass, t.row, 1, t.rows, masses)
    store(a.loss, t.row, 1, t.rows, weighted_loss(masses, log(totals), gaps))


@njit(**INLINE)
def _gradient(a: Any, x: Any, t: Any, terms: Any, kept: Any) -> None:
    """Write the gradients of the rows at x."""
    # row numbers
    top, g = load_numbers(a.rows.top, 1, t.row, x, 0.0), load_numbers(a.dloss, a.dloss_stride, t.row, x, 0.0)
    scale = g * load_numbers(a.rows.mass, 1, t.row, x, 0.0) / load_numbers(a.rows.total, 1, t.row, x, 1.0)
    y, nothing = lane_numbers(splat(0.0, a.logits)), splat(0.0, a.logits)  # no class is the target
    # gradient
    dx = lanes_at(a.dlogits, a.dstrides, t, a.way)
    numbers = WeightedNumbers(top, g, scale, y, -1, nothing)
    weighted_gradient_of_row(x, dx, _factors(a, x, t), a.way.classes, terms, kept, numbers, a.past_caches)


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
