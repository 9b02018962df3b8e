"""Softmax cross-entropy with class indices and label smoothing; keep = 1 - label smoothing, spread = label smoothing / C.

mass = keep w_y + spread sum(w)      loss = keep w_y (-log p_y) + spread sum_c w_c (-log p_c)
dlogits = dloss (mass p - spread w - keep w_y onehot(y))
"""

from typing import Any

import numpy as np
from numba import njit
from torch import Tensor

from .launch import next_task, raise_flag, region, unpack
from .math import INLINE, exp, log
from .memory import load, load_classes, load_one, offset, prefetch, store, stream
from .rows import (
    AHEAD,
    WALK,
    WEIGHTED_CHUNK,
    advance,
    bypass_caches,
    first_vector,
    last_tile,
    real_total,
    rows_of,
    strides_of,
    walk,
    whole_vectors,
)
from .simd import fma, lane_numbers, lanes_of, larger, select, splat
from .targets import refuse_out_of_bounds
from .weighted import add_class, follow, merge, merge_lanes, no_classes, settle

_FORWARD = "TICCCCCCxxnn" + WALK
_BACKWARD = "TICCCCCCTxxnnnnnnn" + WALK


def smoothed_cross_entropy_forward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, keep: float, spread: float,
    loss: Tensor, row_weight: Tensor, mass: Tensor, top: Tensor, total: Tensor,
) -> None:  # fmt: skip
    way = walk(logits)
    out_of_bounds = _forward(
        logits.dtype, way.tasks,
        logits.data_ptr(), target.data_ptr(), weight.data_ptr(), loss.data_ptr(), row_weight.data_ptr(), mass.data_ptr(),
        top.data_ptr(), total.data_ptr(), keep, spread, ignore_index, weight.stride(0), *way,
    )  # fmt: skip
    if out_of_bounds:
        refuse_out_of_bounds(target, way.classes, ignore_index)


def smoothed_cross_entropy_backward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, keep: float, spread: float,
    row_weight: Tensor, mass: Tensor, top: Tensor, total: Tensor, dloss: Tensor, dlogits: Tensor,
) -> None:  # fmt: skip
    way = walk(logits)
    _backward(
        logits.dtype, way.tasks,
        logits.data_ptr(), target.data_ptr(), weight.data_ptr(), row_weight.data_ptr(), mass.data_ptr(), top.data_ptr(), total.data_ptr(),
        dloss.data_ptr(), dlogits.data_ptr(), keep, spread, ignore_index, weight.stride(0), dloss.stride(0),
        bypass_caches(logits, dlogits), *strides_of(dlogits), *way,
    )  # fmt: skip


@njit(**INLINE)
def _statistics(
    x: Any, weight: Any, first: Any, last: Any, class_stride: Any, lane_stride: Any, w_class: Any, w_lane: Any, tile: Any, count: Any
) -> Any:
    lanes = lanes_of(x)
    top, anchor, total, mass, gap = no_classes(x)
    c = first
    if tile == 1 and class_stride == w_class == 1:
        while c + 4 * lanes <= last:
            prefetch(x, c + AHEAD)
            prefetch(x, c + lanes + AHEAD)
            prefetch(x, c + 2 * lanes + AHEAD)
            prefetch(x, c + 3 * lanes + AHEAD)
            v0 = load(x, c, 1, lanes, -np.inf)
            v1 = load(x, c + lanes, 1, lanes, -np.inf)
            v2 = load(x, c + 2 * lanes, 1, lanes, -np.inf)
            v3 = load(x, c + 3 * lanes, 1, lanes, -np.inf)
            top = larger(larger(top, larger(v0, v1)), larger(v2, v3))
            anchor, total, gap = follow(top, anchor, total, mass, gap)
            none = splat(0.0, x)
            four = add_class(anchor, none, none, none, v0, v0, load(weight, c, 1, lanes, 0.0))
            four = add_class(anchor, *four, v1, v1, load(weight, c + lanes, 1, lanes, 0.0))
            four = add_class(anchor, *four, v2, v2, load(weight, c + 2 * lanes, 1, lanes, 0.0))
            four = add_class(anchor, *four, v3, v3, load(weight, c + 3 * lanes, 1, lanes, 0.0))
            total, mass, gap = total + four[0], mass + four[1], gap + four[2]
            c += 4 * lanes
    recent, since = splat(0.0, x), 0  # the k of the last few classes: sums of sums lose fewer digits
    n = count if tile > 1 else min(lanes, last - c)
    while c < last:
        value = load(x, c * class_stride, lane_stride, n, -np.inf)
        term = value if n == lanes else load(x, c * class_stride, lane_stride, n, 0.0)
        top = larger(top, value)
        anchor, total, gap = follow(top, anchor, total, mass + recent, gap)
        total, recent, gap = add_class(anchor, total, recent, gap, value, term, load(weight, c * w_class, w_lane, n, 0.0))
        since += 1
        if since == 8:
            mass, recent, since = mass + recent, splat(0.0, x), 0
        c, n = advance(c, n, last, tile, lanes)
    return settle(top, anchor, total, mass + recent, gap)


@region(_FORWARD)
def _forward(a: Any) -> None:
    (logits, target, weight, loss, row_weight, mass, top, total, keep, spread, ignore_index, w_class,
     batch, classes, positions, batch_stride, class_stride, position_stride, tile, grain) = unpack(a, _FORWARD)  # fmt: skip
    lane_stride, w_lane = (position_stride, 0) if tile > 1 else (class_stride, w_class)
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_tile(task, grain, batch, positions, tile)):
            b, p, row, count = rows_of(number, positions, tile)
            x = offset(logits, b * batch_stride + p * position_stride)
            # statistics
            tops, totals, masses, gaps = splat(0.0, x), splat(1.0, x), splat(0.0, x), splat(0.0, x)
            if tile > 1:
                tops, totals, masses, gaps = _statistics(x, weight, 0, classes, class_stride, lane_stride, w_class, w_lane, tile, count)
            elif target[row] != ignore_index:
                stop = min(classes, WEIGHTED_CHUNK)
                tops, totals, masses, gaps = merge_lanes(
                    *_statistics(x, weight, 0, stop, class_stride, lane_stride, w_class, w_lane, tile, count)
                )
                for first in range(WEIGHTED_CHUNK, classes, WEIGHTED_CHUNK):
                    stop = min(classes, first + WEIGHTED_CHUNK)
                    chunk = _statistics(x, weight, first, stop, class_stride, lane_stride, w_class, w_lane, tile, count)
                    tops, totals, masses, gaps = merge(tops, totals, masses, gaps, *merge_lanes(*chunk))
            totals = real_total(totals)
            # target logit and class weight
            for i in range(row, row + count):
                y = target[i]
                if y == ignore_index or y < 0 or y >= classes:
                    loss[i], row_weight[i] = 0, 0
                    if y != ignore_index:
                        raise_flag(a)
                else:
                    loss[i], row_weight[i] = load_one(x, (i - row) * position_stride + y * class_stride), weight[y * w_class]
            # loss
            valid = load_classes(target, row, 1, count, ignore_index, tops) > -1
            tops, totals = select(valid, tops, 0.0), select(valid, totals, 1.0)
            kept = keep * load(row_weight, row, 1, count, 0.0)
            log_total = log(totals)
            smooth = spread * (masses * log_total + gaps)
            nll = log_total - (load(loss, row, 1, count, 0.0) - tops)
            store(loss, row, 1, count, select(valid, kept * nll + smooth, 0.0))
            store(mass, row, 1, count, select(valid, fma(masses, spread, kept), 0.0))
            store(top, row, 1, count, tops)
            store(total, row, 1, count, totals)
        task = next_task(a)


@region(_BACKWARD)
def _backward(a: Any) -> None:
    (logits, target, weight, row_weight, mass, top, total, dloss, dlogits, keep, spread, ignore_index, w_class, dloss_stride, past_caches,
     to_batch, to_class, to_position,
     batch, classes, positions, batch_stride, class_stride, position_stride, tile, grain) = unpack(a, _BACKWARD)  # fmt: skip
    lanes, across = lanes_of(logits), 1 if tile > 1 else 0
    lane_stride, to_lane, w_lane = (position_stride, to_position, 0) if tile > 1 else (class_stride, to_class, w_class)
    consecutive = class_stride == to_class == w_class == 1
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_tile(task, grain, batch, positions, tile)):
            b, p, row, count = rows_of(number, positions, tile)
            x = offset(logits, b * batch_stride + p * position_stride)
            dx = offset(dlogits, b * to_batch + p * to_position)
            # row numbers: one for each lane, or the row's in every lane
            size = count if tile > 1 else lanes
            tops = load(top, row, across, size, 0.0)
            y = load_classes(target, row, across, size, ignore_index, tops)
            g = load(dloss, row * dloss_stride, across * dloss_stride, size, 0.0)
            scale = g * load(mass, row, across, size, 0.0) / load(total, row, across, size, 1.0)
            kept, spread_g = g * keep * load(row_weight, row, across, size, 0.0), g * spread
            # gradient
            y_row, ignored = target[row], tile == 1 and target[row] == ignore_index
            c, n = 0, first_vector(dx, classes, tile, count, past_caches)
            while c < classes:
                stop = whole_vectors(c, n, classes, tile, lanes) if consecutive and not ignored else c
                if c <= y_row < stop:
                    stop = c + (y_row - c) // lanes * lanes  # the target's vector goes by itself
                for k in range(c, stop, lanes):
                    prefetch(x, k + AHEAD)
                    prob = exp(load(x, k, 1, lanes, 0.0) - tops) * scale
                    stream(dx, k, prob - spread_g * load(weight, k, 1, lanes, 0.0), past_caches)
                if stop > c:
                    c, n = stop, min(lanes, classes - stop)
                else:
                    prob = splat(0.0, x)
                    if not ignored:
                        prob = exp(load(x, c * class_stride, lane_stride, n, 0.0) - tops) * scale
                        prob = prob - spread_g * load(weight, c * w_class, w_lane, n, 0.0)
                        prob = select(lane_numbers(prob) * (1 - across) + c == y, prob - kept, prob)
                    store(dx, c * to_class, to_lane, n, select(y > -1, prob, 0.0))
                    c, n = advance(c, n, classes, tile, lanes)
        task = next_task(a)
