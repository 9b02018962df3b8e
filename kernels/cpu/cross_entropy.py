"""Softmax cross-entropy with class indices as targets.

    nll = log total - (x_y - top)      loss = w_y nll      dlogits = dloss w_y (p - onehot(y)),  p = exp(x - top) / total

One visit to the logits going forward, one coming back; all else happens on [N] vectors. `cross_entropy_one_visit` makes do with one.
"""

from typing import Any, NamedTuple

from numba import njit
from torch import Tensor

from ..groups import Rows
from .arguments import Computed, Int64, Known, Stored, arguments
from .blocks import block_of, block_size, block_statistics, blocks_apart, merge, real_total, row_statistics, scratch
from .gradient import ABREAST, GAPLESS, abreast, gradient_of_row, gradient_of_short_rows, layout_of, row_numbers, write_zeros
from .inline import INLINE
from .launch import next_task, next_worker, raise_flag, region
from .math import log
from .memory import load, load_classes, load_each, load_one, store
from .rows import FEW_CLASSES, SHORT_ROW, Strides, Walk, bypass_caches, lanes_at, last_tile, strides_of, tile_of, tiles_of, walk
from .simd import any_lane, first_lane, lanes_of, select, splat
from .targets import refuse_out_of_bounds, weights_of


class Blocks(NamedTuple):
    logits: Stored
    tops: Computed  # [N, blocks], as `totals`
    totals: Computed
    terms: Computed
    blocks: int
    way: Walk


class Forward(NamedTuple):
    logits: Stored
    target: Int64
    weight: Computed
    weight_stride: int
    ignore_index: int
    loss: Computed
    rows: Rows
    tops: Computed | None  # [N, blocks], as `totals`, if blocks were handed out one by one
    totals: Computed | None
    terms: Computed
    blocks: int
    way: Walk


class Backward(NamedTuple):
    logits: Stored
    target: Int64
    ignore_index: int
    rows: Rows
    dloss: Computed
    dloss_stride: int
    dlogits: Stored
    dstrides: Strides
    layout: Known  # see `gradient.layout_of`
    blocks: int
    past_caches: Known
    way: Walk


def cross_entropy_forward(logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, loss: Tensor, rows: Rows) -> None:
    way = walk(logits, SHORT_ROW)
    terms, blocks = scratch(1, logits), blocks_apart(way, logits)
    tops = totals = None
    if blocks > 1:
        tops, totals = loss.new_empty(loss.numel() * blocks), loss.new_empty(loss.numel() * blocks)
        _statistics_of_blocks(tops.numel(), Blocks(logits, tops, totals, terms, blocks, way))
    out_of_bounds = _forward(way.tasks, Forward(
        logits=logits, target=target, weight=weight, weight_stride=weight.stride(0), ignore_index=ignore_index, loss=loss, rows=rows,
        tops=tops, totals=totals, terms=terms, blocks=blocks, way=way,
    ))  # fmt: skip
    if out_of_bounds:
        refuse_out_of_bounds(target, way.classes, ignore_index)


def cross_entropy_backward(logits: Tensor, target: Tensor, ignore_index: int, rows: Rows, dloss: Tensor, dlogits: Tensor) -> None:
    without_gaps = logits.dim() == 2 and logits.is_contiguous() and dlogits.is_contiguous()
    way = walk(logits, SHORT_ROW if without_gaps else FEW_CLASSES)
    blocks, dstrides = blocks_apart(way, logits), strides_of(dlogits, way.tile)
    _backward(way.tasks * blocks, Backward(
        logits=logits, target=target, ignore_index=ignore_index, rows=rows, dloss=dloss, dloss_stride=dloss.stride(0),
        dlogits=dlogits, dstrides=dstrides, layout=layout_of(way, dstrides), blocks=blocks,
        past_caches=bypass_caches(logits, dlogits), way=way,
    ))  # fmt: skip


@region(Blocks)
def _statistics_of_blocks(block: Any) -> None:
    a = arguments(block)
    terms = block_of(a.terms, next_worker(block))
    size = block_size(terms, 1)
    task = next_task(block)
    while task >= 0:
        x = lanes_at(a.logits, a.way.strides, tile_of(task // a.blocks, a.way), a.way)
        first = task % a.blocks * size
        top, total = block_statistics(x, first, min(a.way.classes, first + size), terms)
        a.tops[task], a.totals[task] = first_lane(top), first_lane(total)
        task = next_task(block)


@njit(**INLINE)
def _merged(a: Any, row: Any) -> Any:
    """What `row_statistics` gives, from statistics of its blocks that are there already: the same steps, the same bits."""
    first, last = row * a.blocks, (row + 1) * a.blocks
    top, total = splat(a.tops[first], a.logits), splat(a.totals[first], a.logits)
    for i in range(first + 1, last):
        top, total = merge(top, total, splat(a.tops[i], a.logits), splat(a.totals[i], a.logits))
    return top, real_total(total)


@region(Forward)
def _forward(block: Any) -> None:
    a = arguments(block)
    terms = block_of(a.terms, next_worker(block))
    task = next_task(block)
    while task >= 0:
        begin = tile_of(task * a.way.grain, a.way).row
        end = begin
        for number in range(task * a.way.grain, last_tile(task, a.way)):
            t = tile_of(number, a.way)
            end = t.row + t.rows
            x = lanes_at(a.logits, a.way.strides, t, a.way)
            # statistics
            if x.tile > 1:
                tops, totals = row_statistics(x, a.way.classes, terms, 0)
            elif a.target[t.row] == a.ignore_index:
                tops, totals = no_statistics(x)
            elif a.blocks > 1:
                tops, totals = _merged(a, t.row)
            else:
                tops, totals = row_statistics(x, a.way.classes, terms, 0)
            # target logit and class weight
            if see_targets(a, x, t.row, tops, totals):
                raise_flag(block)
        write_losses(a, begin, end)
        task = next_task(block)


@njit(**INLINE)
def no_statistics(x: Any) -> Any:
    """`top` and `total` of a row that does not count."""
    return splat(0.0, x.at), splat(1.0, x.at)


@njit(**INLINE)
def see_targets(a: Any, x: Any, row: Any, tops: Any, totals: Any) -> Any:
    """Write `top`, `total`, the class weight and, for now in `loss`, the target logit of the rows at x, `row` and those after it; 0, 1, 0
    and 0 where they do not count. True if a target is no class."""
    classes = a.way.classes
    if x.tile > 1:
        y = load_classes(a.target, row, 1, x.rows, a.ignore_index, tops)
        is_class = (y > -1) & (y < classes)
        store(a.loss, row, 1, x.rows, load_each(x.at, x.lane, y, x.class_, is_class))
        store(a.rows.row_weight, row, 1, x.rows, weights_of(a.weight, a.weight_stride, y, classes))
        store(a.rows.top, row, 1, x.rows, select(is_class, tops, 0.0))
        store(a.rows.total, row, 1, x.rows, select(is_class, totals, 1.0))
        return any_lane((y < -1) | (y > classes - 1))
    y_row = a.target[row]
    if y_row == a.ignore_index or y_row < 0 or y_row >= classes:
        a.loss[row], a.rows.row_weight[row], a.rows.top[row], a.rows.total[row] = 0, 0, 0, 1
        return y_row != a.ignore_index
    a.loss[row], a.rows.row_weight[row] = load_one(x.at, y_row * x.class_), a.weight[y_row * a.weight_stride]
    a.rows.top[row], a.rows.total[row] = first_lane(tops), first_lane(totals)
    return False


@njit(**INLINE)
def write_losses(a: Any, begin: Any, end: Any) -> None:
    """w_y nll of rows begin .. end - 1."""
    for row in range(begin, end, lanes_of(a.loss)):
        n = end - row
        nll = log(load(a.rows.total, row, 1, n, 1.0)) - (load(a.loss, row, 1, n, 0.0) - load(a.rows.top, row, 1, n, 0.0))
        store(a.loss, row, 1, n, load(a.rows.row_weight, row, 1, n, 0.0) * nll)


@region(Backward)
def _backward(block: Any) -> None:
    a = arguments(block)
    size = block_size(a.dloss, a.way.tile)
    blocks = 1 if a.way.tile > 1 else a.blocks
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, min((task + 1) * a.way.grain, tiles_of(a.way) * blocks)):
            t = tile_of(number // blocks, a.way)
            x, dx = lanes_at(a.logits, a.way.strides, t, a.way), lanes_at(a.dlogits, a.dstrides, t, a.way)
            if a.layout == ABREAST:
                x, dx = abreast(x), abreast(dx)
            r = row_numbers(a, a.rows.row_weight, x, t.row)
            first = number % blocks * size
            last = min(a.way.classes, first + size) if blocks > 1 else a.way.classes
            if a.layout == GAPLESS:
                gradient_of_short_rows(x, dx, a.way.classes, r)
            elif x.tile == 1 and r.y_row == a.ignore_index:
                write_zeros(dx, first, last, a.past_caches)
            else:
                gradient_of_row(x, dx, first, last, a.way.classes, a.rows.top, 0, r, a.past_caches)
        task = next_task(block)
