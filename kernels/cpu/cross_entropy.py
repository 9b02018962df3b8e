"""Softmax cross-entropy with class indices as targets.

    nll = log total - (x_y - top)      loss = w_y nll      dlogits = dloss w_y (p - onehot(y)),  p = exp(x - top) / total

One visit to the logits going forward, one coming back; all else happens on [N] vectors.
"""

from typing import Any

from numba import njit
from torch import Tensor

from .launch import next_task, raise_flag, region, unpack
from .math import INLINE, exp, log
from .memory import load, load_classes, load_one, offset, prefetch, store, stream
from .rows import (
    AHEAD,
    CHUNK,
    FEW_CLASSES,
    SHORT_ROW,
    WALK,
    advance,
    bypass_caches,
    chunk_statistics,
    chunks_apart,
    first_vector,
    last_tile,
    merge,
    real_total,
    row_statistics,
    rows_of,
    strides_of,
    walk,
    whole_vectors,
)
from .simd import first_lane, lane_numbers, lanes_of, pick, select, splat
from .targets import refuse_out_of_bounds

_CHUNKS = "TCCn" + WALK
_FORWARD = "TICCCCCCCnnn" + WALK
_BACKWARD = "TICCCCTnnnnnnn" + WALK


def cross_entropy_forward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, loss: Tensor, row_weight: Tensor, top: Tensor, total: Tensor
) -> None:
    way = walk(logits)
    chunks = chunks_apart(way)
    chunk_tops = chunk_totals = top  # not looked at unless there are chunks
    if chunks > 1:
        chunk_tops, chunk_totals = top.new_empty(loss.numel() * chunks), top.new_empty(loss.numel() * chunks)
        _statistics_of_chunks(
            logits.dtype, chunk_tops.numel(), logits.data_ptr(), chunk_tops.data_ptr(), chunk_totals.data_ptr(), chunks, *way
        )
    out_of_bounds = _forward(
        logits.dtype, way.tasks,
        logits.data_ptr(), target.data_ptr(), weight.data_ptr(), loss.data_ptr(), row_weight.data_ptr(), top.data_ptr(), total.data_ptr(),
        chunk_tops.data_ptr(), chunk_totals.data_ptr(), chunks, ignore_index, weight.stride(0), *way,
    )  # fmt: skip
    if out_of_bounds:
        refuse_out_of_bounds(target, way.classes, ignore_index)


def cross_entropy_backward(
    logits: Tensor, target: Tensor, ignore_index: int, row_weight: Tensor, top: Tensor, total: Tensor, dloss: Tensor, dlogits: Tensor
) -> None:
    without_gaps = logits.dim() == 2 and logits.is_contiguous() and dlogits.is_contiguous()
    way = walk(logits, SHORT_ROW if without_gaps else FEW_CLASSES)
    chunks = chunks_apart(way)
    _backward(
        logits.dtype, way.tasks * chunks,
        logits.data_ptr(), target.data_ptr(), row_weight.data_ptr(), top.data_ptr(), total.data_ptr(), dloss.data_ptr(), dlogits.data_ptr(),
        chunks, ignore_index, dloss.stride(0), bypass_caches(logits, dlogits), *strides_of(dlogits), *way,
    )  # fmt: skip


@region(_CHUNKS)
def _statistics_of_chunks(a: Any) -> None:
    (logits, tops, totals, chunks, _batch, classes, positions, batch_stride, class_stride, position_stride, _tile, _grain) = unpack(
        a, _CHUNKS
    )
    task = next_task(a)
    while task >= 0:
        b, p, _row, _count = rows_of(task // chunks, positions, 1)
        x, first = offset(logits, b * batch_stride + p * position_stride), task % chunks * CHUNK
        top, total = chunk_statistics(x, first, min(classes, first + CHUNK), class_stride)
        tops[task], totals[task] = first_lane(top), first_lane(total)
        task = next_task(a)


@njit(**INLINE)
def _merged(tops: Any, totals: Any, first: Any, chunks: Any, like: Any) -> Any:
    """What `row_statistics` gives, from statistics of its chunks that are there already: the same steps, the same bits."""
    top, total = splat(tops[first], like), splat(totals[first], like)
    for i in range(first + 1, first + chunks):
        top, total = merge(top, total, splat(tops[i], like), splat(totals[i], like))
    return top, real_total(total)


@region(_FORWARD)
def _forward(a: Any) -> None:
    (logits, target, weight, loss, row_weight, top, total, chunk_tops, chunk_totals, chunks, ignore_index, weight_stride,
     batch, classes, positions, batch_stride, class_stride, position_stride, tile, grain) = unpack(a, _FORWARD)  # fmt: skip
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
                tops, totals = row_statistics(x, classes, class_stride, position_stride, tile, count)
                store(top, row, 1, count, tops)
                store(total, row, 1, count, totals)
            elif target[row] != ignore_index:
                if chunks > 1:
                    tops, totals = _merged(chunk_tops, chunk_totals, row * chunks, chunks, x)
                else:
                    tops, totals = row_statistics(x, classes, class_stride, class_stride, tile, count)
                top[row], total[row] = first_lane(tops), first_lane(totals)
            # target logit and class weight
            for i in range(row, end):
                y = target[i]
                if y == ignore_index or y < 0 or y >= classes:
                    loss[i], row_weight[i], top[i], total[i] = 0, 0, 0, 1
                    if y != ignore_index:
                        raise_flag(a)
                else:
                    loss[i], row_weight[i] = load_one(x, (i - row) * position_stride + y * class_stride), weight[y * weight_stride]
        # loss
        for row in range(begin, end, lanes_of(top)):
            n = end - row
            nll = log(load(total, row, 1, n, 1.0)) - (load(loss, row, 1, n, 0.0) - load(top, row, 1, n, 0.0))
            store(loss, row, 1, n, load(row_weight, row, 1, n, 0.0) * nll)
        task = next_task(a)


@njit(**INLINE)
def _probability(x: Any, at: Any, lane_stride: Any, n: Any, top: Any, scale: Any) -> Any:
    return exp(load(x, at, lane_stride, n, 0.0) - top) * scale


@njit(**INLINE)
def _gradient_of_short_rows(x: Any, dx: Any, classes: Any, y: Any, top: Any, scale: Any, g: Any) -> None:
    """Rows that follow one another without a gap: the lanes go over their numbers as they lie in memory, and each picks its row's."""
    lanes = lanes_of(x)
    for v in range(classes):
        number = lane_numbers(top) + v * lanes
        row = (number * ((1 << 20) // classes + 1)) >> 20  # number // classes, exact up to 255 classes
        prob = exp(load(x, v * lanes, 1, lanes, 0.0) - pick(top, row)) * pick(scale, row)
        y_row = pick(y, row)
        prob = select(y_row == number - row * classes, prob - pick(g, row), prob)
        store(dx, v * lanes, 1, lanes, select(y_row > -1, prob, 0.0))


@region(_BACKWARD)
def _backward(a: Any) -> None:
    (logits, target, row_weight, top, total, dloss, dlogits, chunks, ignore_index, dloss_stride, past_caches,
     to_batch, to_class, to_position,
     batch, classes, positions, batch_stride, class_stride, position_stride, tile, grain) = unpack(a, _BACKWARD)  # fmt: skip
    lanes, across = lanes_of(logits), 1 if tile > 1 else 0
    lane_stride, to_lane = (position_stride, to_position) if tile > 1 else (class_stride, to_class)
    consecutive = class_stride == to_class == 1
    gapless = classes <= SHORT_ROW and consecutive and position_stride == to_position == classes
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_tile(task, grain, batch * chunks, positions, tile)):
            b, p, row, count = rows_of(number // chunks, positions, tile)
            first = number % chunks * CHUNK
            last = min(classes, first + CHUNK) if chunks > 1 else classes
            x = offset(logits, b * batch_stride + p * position_stride)
            dx = offset(dlogits, b * to_batch + p * to_position)
            # row numbers: one for each lane, or the row's in every lane
            size = count if tile > 1 else lanes
            tops = load(top, row, across, size, 0.0)
            y = load_classes(target, row, across, size, ignore_index, tops)
            g = load(dloss, row * dloss_stride, across * dloss_stride, size, 0.0) * load(row_weight, row, across, size, 0.0)
            scale = g / load(total, row, across, size, 1.0)
            # gradient
            if gapless and count == lanes:
                _gradient_of_short_rows(x, dx, classes, y, tops, scale, g)
                continue
            y_row, ignored = target[row], tile == 1 and target[row] == ignore_index
            c, n = first, first_vector(offset(dx, first * to_class), last - first, tile, count, past_caches)
            while c < last:
                stop = whole_vectors(c, n, last, tile, lanes) if consecutive and not ignored else c
                if c <= y_row < stop:
                    stop = c + (y_row - c) // lanes * lanes  # the target's vector goes by itself
                for k in range(c, stop, lanes):
                    prefetch(x, k + AHEAD)
                    stream(dx, k, _probability(x, k, 1, lanes, tops, scale), past_caches)
                if stop > c:
                    c, n = stop, min(lanes, last - stop)
                else:
                    prob = splat(0.0, x)
                    if not ignored:
                        prob = _probability(x, c * class_stride, lane_stride, n, tops, scale)
                        prob = select(lane_numbers(prob) * (1 - across) + c == y, prob - g, prob)
                    store(dx, c * to_class, to_lane, n, select(y > -1, prob, 0.0))
                    c, n = advance(c, n, last, tile, lanes)
        task = next_task(a)
