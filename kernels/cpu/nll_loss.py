"""Negative log-likelihood: loss = -w_y log_prob_y, dlog_prob = -dloss w_y onehot(y). One number is read in each row."""

from typing import Any, NamedTuple

from torch import Tensor

from .arguments import Computed, Int64, Known, Stored, arguments
from .launch import next_task, raise_flag, region
from .memory import load_classes, load_one
from .rows import Walk, advance, bypass_caches, first_vector, lanes_at, last_tile, load_numbers, store_at, tile_of, walk, whole_vectors
from .simd import lanes_of, select, splat
from .stream import stream_row
from .targets import less_at, refuse_out_of_bounds


class Forward(NamedTuple):
    log_prob: Stored
    target: Int64
    weight: Computed
    weight_stride: int
    ignore_index: int
    loss: Computed
    row_weight: Computed
    way: Walk


class Backward(NamedTuple):
    target: Int64
    ignore_index: int
    row_weight: Computed
    dloss: Computed
    dloss_stride: int
    dlog_prob: Stored
    past_caches: Known
    way: Walk


def nll_loss_forward(log_prob: Tensor, target: Tensor, weight: Tensor, ignore_index: int, loss: Tensor, row_weight: Tensor) -> None:
    way = walk(log_prob)
    out_of_bounds = _forward(way.tasks, Forward(
        log_prob=log_prob, target=target, weight=weight, weight_stride=weight.stride(0), ignore_index=ignore_index,
        loss=loss, row_weight=row_weight, way=way,
    ))  # fmt: skip
    if out_of_bounds:
        refuse_out_of_bounds(target, way.classes, ignore_index)


def nll_loss_backward(target: Tensor, ignore_index: int, row_weight: Tensor, dloss: Tensor, dlog_prob: Tensor) -> None:
    way = walk(dlog_prob)
    _backward(way.tasks, Backward(
        target=target, ignore_index=ignore_index, row_weight=row_weight, dloss=dloss, dloss_stride=dloss.stride(0),
        dlog_prob=dlog_prob, past_caches=bypass_caches(target, dlog_prob), way=way,
    ))  # fmt: skip


@region(Forward)
def _forward(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_tile(task, a.way)):
            t = tile_of(number, a.way)
            x = lanes_at(a.log_prob, a.way.strides, t, a.way)
            for row in range(t.row, t.row + t.rows):
                y = a.target[row]
                if y == a.ignore_index or y < 0 or y >= a.way.classes:
                    a.loss[row], a.row_weight[row] = 0, 0
                    if y != a.ignore_index:
                        raise_flag(block)
                else:
                    a.row_weight[row] = a.weight[y * a.weight_stride]
                    a.loss[row] = -a.row_weight[row] * load_one(x.at, (row - t.row) * a.way.strides.position + y * x.class_)
        task = next_task(block)


@region(Backward)
def _backward(block: Any) -> None:
    a = arguments(block)
    lanes, classes, nothing = lanes_of(a.dlog_prob), a.way.classes, splat(0.0, a.dlog_prob)
    across = 1 if a.way.tile > 1 else 0
    consecutive = a.way.tile == a.way.strides.class_ == 1
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_tile(task, a.way)):
            t = tile_of(number, a.way)
            dx = lanes_at(a.dlog_prob, a.way.strides, t, a.way)
            # row numbers
            y = load_classes(a.target, t.row, across, t.rows if across else lanes, a.ignore_index, nothing)
            g = load_numbers(a.dloss, a.dloss_stride, t.row, dx, 0.0) * load_numbers(a.row_weight, 1, t.row, dx, 0.0)
            # gradient
            y_row = -1 if a.target[t.row] == a.ignore_index else a.target[t.row]
            c, n = 0, first_vector(dx, 0, classes, a.past_caches)
            while c < classes:
                stop = whole_vectors(dx.at, c, n, classes, a.past_caches) if consecutive else c
                if c <= y_row < stop:
                    stop = c + (y_row - c) // lanes * lanes  # the target's vector goes by itself
                for k in range(c, stop, lanes):
                    stream_row(dx.at, k, nothing, a.past_caches)
                if stop > c:
                    c, n = stop, min(lanes, classes - stop)
                else:
                    value = select(y == c, nothing - g, nothing) if dx.tile > 1 else less_at(nothing, y_row - c, g)
                    store_at(dx, c, n, value)
                    c, n = advance(dx, c, n, classes)
        task = next_task(block)
