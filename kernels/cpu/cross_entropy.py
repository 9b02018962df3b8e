"""Softmax cross-entropy with class indices as targets.

    nll = log total - (x_y - top)      loss = w_y nll      dlogits = dloss w_y (p - onehot(y)),  p = exp(x - top) / total

One visit to the logits going forward, one coming back; all else happens on [N] vectors. `cross_entropy_one_visit` makes do with one.
"""

from typing import Any

from numba import njit
from torch import Tensor

from ..groups import Rows
from .blocks import (
    block_of,
    block_size,
    block_statistics,
    block_top,
    blocks_apart,
    kept_top,
    merge,
    real_total,
    row_statistics,
    scratch,
    term,
)
from .launch import next_task, next_worker, raise_flag, region, unpack
from .math import INLINE, exp, exp_for, log
from .memory import load, load_classes, load_each, load_one, offset, store, stream, to_alignment
from .rows import (
    FEW_CLASSES,
    SHORT_ROW,
    WALK,
    advance,
    bypass_caches,
    first_vector,
    last_tile,
    rows_of,
    strides_of,
    walk,
)
from .simd import any_lane, first_lane, lane_numbers, lanes_of, pick, select, splat
from .targets import refuse_out_of_bounds, weights_of

# up to here lanes are rows going forward: for more classes, gathering them costs more than the ends of rows do. Less than FEW_CLASSES,
# because all that happens once for each row happens here to many rows at once even if they are taken one by one
FEW_TO_GATHER = 31
_BLOCKS = "TCCCn" + WALK
_FORWARD = "TICCCCCCCCnnn" + WALK
_BACKWARD = "TICCCCTnnnnnnn" + WALK


def cross_entropy_forward(logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, loss: Tensor, rows: Rows) -> None:
    row_weight, _, top, total = rows
    way = walk(logits, FEW_TO_GATHER)
    terms, blocks = scratch(1), blocks_apart(way, logits)
    block_tops = block_totals = top  # not looked at unless blocks are handed out
    if blocks > 1:
        block_tops, block_totals = top.new_empty(loss.numel() * blocks), top.new_empty(loss.numel() * blocks)
        _statistics_of_blocks(
            logits.dtype, block_tops.numel(), logits.data_ptr(), block_tops.data_ptr(), block_totals.data_ptr(), terms.data_ptr(), blocks,
            *way,
        )  # fmt: skip
    out_of_bounds = _forward(
        logits.dtype, way.tasks,
        logits.data_ptr(), target.data_ptr(), weight.data_ptr(), loss.data_ptr(), row_weight.data_ptr(), top.data_ptr(), total.data_ptr(),
        block_tops.data_ptr(), block_totals.data_ptr(), terms.data_ptr(), blocks, ignore_index, weight.stride(0), *way,
    )  # fmt: skip
    if out_of_bounds:
        refuse_out_of_bounds(target, way.classes, ignore_index)


def cross_entropy_backward(logits: Tensor, target: Tensor, ignore_index: int, rows: Rows, dloss: Tensor, dlogits: Tensor) -> None:
    row_weight, _, top, total = rows
    without_gaps = logits.dim() == 2 and logits.is_contiguous() and dlogits.is_contiguous()
    way = walk(logits, SHORT_ROW if without_gaps else FEW_CLASSES)
    blocks = blocks_apart(way, logits)
    _backward(
        logits.dtype, way.tasks * blocks,
        logits.data_ptr(), target.data_ptr(), row_weight.data_ptr(), top.data_ptr(), total.data_ptr(), dloss.data_ptr(), dlogits.data_ptr(),
        blocks, ignore_index, dloss.stride(0), bypass_caches(logits, dlogits), *strides_of(dlogits), *way,
    )  # fmt: skip


@region(_BLOCKS)
def _statistics_of_blocks(a: Any) -> None:
    (logits, tops, totals, terms, blocks, _batch, classes, positions, batch_stride, class_stride, position_stride, _tile, _grain) = unpack(
        a, _BLOCKS
    )
    terms = block_of(terms, next_worker(a))
    size = block_size(terms, 1)
    task = next_task(a)
    while task >= 0:
        b, p, _row, _count = rows_of(task // blocks, positions, 1)
        x, first = offset(logits, b * batch_stride + p * position_stride), task % blocks * size
        top, total = block_statistics(x, first, min(classes, first + size), class_stride, class_stride, 1, lanes_of(x), terms)
        tops[task], totals[task] = first_lane(top), first_lane(total)
        task = next_task(a)


@njit(**INLINE)
def _merged(tops: Any, totals: Any, first: Any, blocks: Any, like: Any) -> Any:
    """What `row_statistics` gives, from statistics of its blocks that are there already: the same steps, the same bits."""
    top, total = splat(tops[first], like), splat(totals[first], like)
    for i in range(first + 1, first + blocks):
        top, total = merge(top, total, splat(tops[i], like), splat(totals[i], like))
    return top, real_total(total)


@region(_FORWARD)
def _forward(a: Any) -> None:
    (logits, target, weight, loss, row_weight, top, total, block_tops, block_totals, terms, blocks, ignore_index, weight_stride,
     batch, classes, positions, batch_stride, class_stride, position_stride, tile, grain) = unpack(a, _FORWARD)  # fmt: skip
    terms = block_of(terms, next_worker(a))
    lane_stride = position_stride if tile > 1 else class_stride
    task = next_task(a)
    while task >= 0:
        begin = rows_of(task * grain, positions, tile)[2]
        end = begin
        for number in range(task * grain, last_tile(task, grain, batch, positions, tile)):
            b, p, row, count = rows_of(number, positions, tile)
            end = row + count
            x = offset(logits, b * batch_stride + p * position_stride)
            # statistics
            if tile > 1:
                tops, totals = row_statistics(x, classes, class_stride, lane_stride, tile, count, terms, 0)
            elif target[row] == ignore_index:
                tops, totals = no_statistics(x)
            elif blocks > 1:
                tops, totals = _merged(block_tops, block_totals, row * blocks, blocks, x)
            else:
                tops, totals = row_statistics(x, classes, class_stride, lane_stride, tile, count, terms, 0)
            # target logit and class weight
            if see_targets(
                x, tops, totals, target, ignore_index, weight, weight_stride, loss, row_weight, top, total,
                row, tile, count, classes, class_stride, lane_stride,
            ):  # fmt: skip
                raise_flag(a)
        write_losses(loss, row_weight, top, total, begin, end)
        task = next_task(a)


@njit(**INLINE)
def no_statistics(like: Any) -> Any:
    """`top` and `total` of a row that does not count."""
    return splat(0.0, like), splat(1.0, like)


@njit(**INLINE)
def see_targets(
    x: Any, tops: Any, totals: Any, target: Any, ignore_index: Any, weight: Any, weight_stride: Any,
    loss: Any, row_weight: Any, top: Any, total: Any, row: Any, tile: Any, count: Any, classes: Any, class_stride: Any, lane_stride: Any,
) -> Any:  # fmt: skip
    """Write `top`, `total`, the class weight and, for now in `loss`, the target logit of the rows at x; 0, 1, 0 and 0 where they do not
    count. True if a target is no class."""
    if tile > 1:
        y = load_classes(target, row, 1, count, ignore_index, tops)
        is_class = (y > -1) & (y < classes)
        store(loss, row, 1, count, load_each(x, lane_stride, y, class_stride, is_class))
        store(row_weight, row, 1, count, weights_of(weight, weight_stride, y, classes))
        store(top, row, 1, count, select(is_class, tops, 0.0))
        store(total, row, 1, count, select(is_class, totals, 1.0))
        return any_lane((y < -1) | (y > classes - 1))
    y_row = target[row]
    if y_row == ignore_index or y_row < 0 or y_row >= classes:
        loss[row], row_weight[row], top[row], total[row] = 0, 0, 0, 1
        return y_row != ignore_index
    loss[row], row_weight[row] = load_one(x, y_row * class_stride), weight[y_row * weight_stride]
    top[row], total[row] = first_lane(tops), first_lane(totals)
    return False


@njit(**INLINE)
def write_losses(loss: Any, row_weight: Any, top: Any, total: Any, begin: Any, end: Any) -> None:
    """w_y nll of rows begin .. end - 1."""
    for row in range(begin, end, lanes_of(top)):
        n = end - row
        nll = log(load(total, row, 1, n, 1.0)) - (load(loss, row, 1, n, 0.0) - load(top, row, 1, n, 0.0))
        store(loss, row, 1, n, load(row_weight, row, 1, n, 0.0) * nll)


@region(_BACKWARD)
def _backward(a: Any) -> None:
    (logits, target, row_weight, top, total, dloss, dlogits, blocks, ignore_index, dloss_stride, past_caches,
     to_batch, to_class, to_position,
     batch, classes, positions, batch_stride, class_stride, position_stride, tile, grain) = unpack(a, _BACKWARD)  # fmt: skip
    size = block_size(top, tile)
    lane_stride, to_lane = (position_stride, to_position) if tile > 1 else (class_stride, to_class)
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_tile(task, grain, batch * blocks, positions, tile)):
            b, p, row, count = rows_of(number // blocks, positions, tile)
            x = offset(logits, b * batch_stride + p * position_stride)
            dx = offset(dlogits, b * to_batch + p * to_position)
            tops, y, g, scale = row_numbers(target, ignore_index, row_weight, top, total, dloss, dloss_stride, row, tile, count)
            if gapless(class_stride, position_stride, to_class, to_position, classes, tile, count, lanes_of(x)):
                gradient_of_short_rows(x, dx, classes, y, tops, scale, g)
                continue
            first, last = number % blocks * size, min(classes, (number % blocks + 1) * size) if blocks > 1 else classes
            if tile == 1 and target[row] == ignore_index:
                write_zeros(dx, first, last, to_class, past_caches)
            else:
                gradient_of_row(
                    x, dx, first, last, classes, class_stride, lane_stride, to_class, to_lane, tile, count, top, 0,
                    tops, y, target[row], g, scale, past_caches,
                )  # fmt: skip
        task = next_task(a)


@njit(**INLINE)
def gradient_of_row(
    x: Any, dx: Any, begin: Any, end: Any, classes: Any, class_stride: Any, lane_stride: Any, to_class: Any, to_lane: Any,
    tile: Any, count: Any, terms: Any, kept: Any, tops: Any, y: Any, y_row: Any, g: Any, scale: Any, past_caches: Any,
) -> None:  # fmt: skip
    """dlogits of classes begin .. end - 1, whole blocks: g / total exp(x - tops), less g at the target. `y_row` is y where the lanes are
    one row. `terms` has the terms of all blocks (`kept` = 1), or none (0)."""
    size = block_size(tops, tile)
    for first in range(begin, end, size):
        last = min(end, first + size)
        block, top, factor = terms, tops, scale  # the top of the only block is the row's
        if kept:
            block = block_of(terms, first // size)
        if classes > size:
            top = kept_top(block) if kept else block_top(x, first, last, class_stride, lane_stride, tile, count)
            factor = exp(top - tops) * scale
        if kept:
            _gradient_of_block(
                x, top, class_stride, lane_stride, block, 1, dx, first, last, to_class, to_lane, tile, count, factor, y, y_row, g,
                past_caches,
            )  # fmt: skip
        else:
            _gradient_of_block(
                x, top, class_stride, lane_stride, block, 0, dx, first, last, to_class, to_lane, tile, count, factor, y, y_row, g,
                past_caches,
            )  # fmt: skip


@njit(**INLINE)
def _gradient_of_block(
    x: Any, top: Any, class_stride: Any, lane_stride: Any, terms: Any, kept: Any, dx: Any, first: Any, last: Any,
    to_class: Any, to_lane: Any, tile: Any, count: Any, factor: Any, y: Any, y_row: Any, g: Any, past_caches: Any,
) -> None:  # fmt: skip
    """term * factor, less g at the target, of classes first .. last - 1."""
    lanes = lanes_of(x)
    if tile > 1 and lane_stride == to_lane == 1 and count == lanes:
        aligned = to_alignment(dx) == to_alignment(offset(dx, to_class)) == 0
        for c in range(first, last):
            d = term(x, top, class_stride, 1, terms, kept, first, c, lanes, lanes) * factor
            stream(dx, c * to_class, select(y > -1, select(y == c, d - g, d), 0.0), past_caches if aligned else 0)
    elif tile > 1:
        for c in range(first, last):
            d = term(x, top, class_stride, lane_stride, terms, kept, first, c, tile, count) * factor
            store(dx, c * to_class, to_lane, count, select(y > -1, select(y == c, d - g, d), 0.0))
    elif class_stride == to_class == 1:
        # whole vectors, aligned, with what is left over before and behind them; the one with the target by itself
        begin = min(last, first + to_alignment(offset(dx, first))) if past_caches else first
        end = begin + (last - begin) // lanes * lanes
        middle = begin + (y_row - begin) // lanes * lanes if begin <= y_row < end else end
        if begin > first:
            store(dx, first, 1, begin - first, near_target(x, top, 1, terms, kept, first, first, begin - first, factor, y, g))
        for c in range(begin, middle, lanes):
            stream(dx, c, term(x, top, 1, 1, terms, kept, first, c, 1, lanes) * factor, past_caches)
        if middle < end:
            stream(dx, middle, near_target(x, top, 1, terms, kept, first, middle, lanes, factor, y, g), past_caches)
        for c in range(middle + lanes, end, lanes):
            stream(dx, c, term(x, top, 1, 1, terms, kept, first, c, 1, lanes) * factor, past_caches)
        if end < last:
            store(dx, end, 1, last - end, near_target(x, top, 1, terms, kept, first, end, last - end, factor, y, g))
    else:
        for c in range(first, last, lanes):
            d = near_target(x, top, class_stride, terms, kept, first, c, last - c, factor, y, g)
            store(dx, c * to_class, to_class, last - c, d)


@njit(**INLINE)
def near_target(x: Any, top: Any, class_stride: Any, terms: Any, kept: Any, first: Any, c: Any, n: Any, factor: Any, y: Any, g: Any) -> Any:
    """The gradient of n classes of one row from c on, one of which may be the target."""
    d = term(x, top, class_stride, class_stride, terms, kept, first, c, 1, n) * factor
    return select(lane_numbers(d) + c == y, d - g, d)


@njit(**INLINE)
def row_numbers(
    target: Any, ignore_index: Any, row_weight: Any, top: Any, total: Any, dloss: Any, dloss_stride: Any, row: Any, tile: Any, count: Any
) -> Any:
    """top, y, g = dloss w_y and g / total, one for each lane, or the row's in every lane; y is -1 for a row that does not count."""
    if tile == 1:
        return _row_numbers(target, ignore_index, row_weight, top, total, dloss, dloss_stride, row, 0, lanes_of(top))
    return _row_numbers(target, ignore_index, row_weight, top, total, dloss, dloss_stride, row, 1, count)


@njit(**INLINE)
def _row_numbers(
    target: Any, ignore_index: Any, row_weight: Any, top: Any, total: Any, dloss: Any, dloss_stride: Any, row: Any, across: Any, n: Any
) -> Any:
    tops = load(top, row, across, n, 0.0)
    y = load_classes(target, row, across, n, ignore_index, tops)
    g = load(dloss, row * dloss_stride, across * dloss_stride, n, 0.0) * load(row_weight, row, across, n, 0.0)
    return tops, y, g, g / load(total, row, across, n, 1.0)


@njit(**INLINE)
def write_zeros(dx: Any, first: Any, last: Any, to_class: Any, past_caches: Any) -> None:
    """The gradient of a row that does not count."""
    c, n = first, first_vector(offset(dx, first * to_class), last - first, 1, 0, past_caches)
    while c < last:
        store(dx, c * to_class, to_class, n, splat(0.0, dx))
        c, n = advance(c, n, last, 1, lanes_of(dx))


@njit(**INLINE)
def gapless(
    class_stride: Any, position_stride: Any, to_class: Any, to_position: Any, classes: Any, tile: Any, count: Any, lanes: Any
) -> Any:
    """Whether a whole tile of short rows, of logits and of gradients, lies in one piece of memory."""
    return (
        classes <= SHORT_ROW and tile > 1 and count == lanes and class_stride == to_class == 1 and position_stride == to_position == classes
    )


@njit(**INLINE)
def gradient_of_short_rows(x: Any, dx: Any, classes: Any, y: Any, top: Any, scale: Any, g: Any) -> None:
    """Rows that follow one another without a gap: the lanes go over their numbers as they lie in memory, and each picks its row's."""
    lanes = lanes_of(x)
    for v in range(classes):
        number = lane_numbers(top) + v * lanes
        row = (number * ((1 << 20) // classes + 1)) >> 20  # number // classes, exact up to 255 classes
        prob = exp_for(x, load(x, v * lanes, 1, lanes, 0.0) - pick(top, row)) * pick(scale, row)
        y_row = pick(y, row)
        prob = select(y_row == number - row * classes, prob - pick(g, row), prob)
        store(dx, v * lanes, 1, lanes, select(y_row > -1, prob, 0.0))
