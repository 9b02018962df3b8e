"""Softmax cross-entropy with class probabilities q as targets; keep = 1 - label smoothing, spread = label smoothing / C.

k_c = w_c (keep q_c + spread)      mass = sum k      loss = sum_c k_c (-log p_c)
dlogits = dloss (mass p - k)       dtarget = dloss keep w_c (-log p_c)
"""

from typing import Any

import numpy as np
from numba import njit
from torch import Tensor

from .launch import next_task, region, unpack
from .math import INLINE, exp, log
from .memory import load, offset, prefetch, store, stream
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
from .simd import fma, lanes_of, larger, splat
from .weighted import add_class, follow, merge, merge_lanes, no_classes, settle

_FORWARD = "TTCCCCCxxnnnn" + WALK
_BACKWARD = "TTCCCCCTxxnnnnnnnnn" + WALK
_TARGET_BACKWARD = "TCCCCTxnnnnn" + WALK


def soft_cross_entropy_forward(
    logits: Tensor, target: Tensor, weight: Tensor, keep: float, spread: float, loss: Tensor, mass: Tensor, top: Tensor, total: Tensor
) -> None:
    way = walk(logits)
    _forward(
        logits.dtype, way.tasks,
        logits.data_ptr(), target.data_ptr(), weight.data_ptr(), loss.data_ptr(), mass.data_ptr(), top.data_ptr(), total.data_ptr(),
        keep, spread, weight.stride(0), *strides_of(target), *way,
    )  # fmt: skip


def soft_cross_entropy_backward(
    logits: Tensor, target: Tensor, weight: Tensor, keep: float, spread: float,
    mass: Tensor, top: Tensor, total: Tensor, dloss: Tensor, dlogits: Tensor,
) -> None:  # fmt: skip
    way = walk(logits)
    _backward(
        logits.dtype, way.tasks,
        logits.data_ptr(), target.data_ptr(), weight.data_ptr(), mass.data_ptr(), top.data_ptr(), total.data_ptr(), dloss.data_ptr(),
        dlogits.data_ptr(), keep, spread, weight.stride(0), dloss.stride(0), bypass_caches(logits, dlogits),
        *strides_of(target), *strides_of(dlogits), *way,
    )  # fmt: skip


def soft_cross_entropy_target_backward(
    logits: Tensor, weight: Tensor, keep: float, top: Tensor, total: Tensor, dloss: Tensor, dtarget: Tensor
) -> None:
    way = walk(logits)
    _target_backward(
        logits.dtype, way.tasks,
        logits.data_ptr(), weight.data_ptr(), top.data_ptr(), total.data_ptr(), dloss.data_ptr(), dtarget.data_ptr(),
        keep, weight.stride(0), dloss.stride(0), *strides_of(dtarget), *way,
    )  # fmt: skip


@njit(**INLINE)
def _factor(q: Any, at_q: Any, q_lane: Any, weight: Any, at_w: Any, w_lane: Any, n: Any, keep: Any, spread: Any) -> Any:
    """k of the classes in the lanes, 0 in lanes not in use."""
    return load(weight, at_w, w_lane, n, 0.0) * fma(load(q, at_q, q_lane, n, 0.0), keep, spread)


@njit(**INLINE)
def _statistics(
    x: Any, q: Any, weight: Any, keep: Any, spread: Any, first: Any, last: Any,
    class_stride: Any, lane_stride: Any, q_class: Any, q_lane: Any, w_class: Any, w_lane: Any, tile: Any, count: Any,
) -> Any:  # fmt: skip
    lanes = lanes_of(x)
    top, anchor, total, mass, gap = no_classes(x)
    c = first
    if tile == 1 and class_stride == q_class == w_class == 1:
        while c + 4 * lanes <= last:
            prefetch(x, c + AHEAD)
            prefetch(q, c + AHEAD)
            prefetch(x, c + lanes + AHEAD)
            prefetch(q, c + lanes + AHEAD)
            prefetch(x, c + 2 * lanes + AHEAD)
            prefetch(q, c + 2 * lanes + AHEAD)
            prefetch(x, c + 3 * lanes + AHEAD)
            prefetch(q, c + 3 * lanes + AHEAD)
            v0 = load(x, c, 1, lanes, -np.inf)
            v1 = load(x, c + lanes, 1, lanes, -np.inf)
            v2 = load(x, c + 2 * lanes, 1, lanes, -np.inf)
            v3 = load(x, c + 3 * lanes, 1, lanes, -np.inf)
            top = larger(larger(top, larger(v0, v1)), larger(v2, v3))
            anchor, total, gap = follow(top, anchor, total, mass, gap)
            none = splat(0.0, x)
            four = add_class(anchor, none, none, none, v0, v0, _factor(q, c, 1, weight, c, 1, lanes, keep, spread))
            four = add_class(anchor, *four, v1, v1, _factor(q, c + lanes, 1, weight, c + lanes, 1, lanes, keep, spread))
            four = add_class(anchor, *four, v2, v2, _factor(q, c + 2 * lanes, 1, weight, c + 2 * lanes, 1, lanes, keep, spread))
            four = add_class(anchor, *four, v3, v3, _factor(q, c + 3 * lanes, 1, weight, c + 3 * lanes, 1, lanes, keep, spread))
            total, mass, gap = total + four[0], mass + four[1], gap + four[2]
            c += 4 * lanes
    recent, since = splat(0.0, x), 0  # the k of the last few classes: sums of sums lose fewer digits
    n = count if tile > 1 else min(lanes, last - c)
    while c < last:
        value = load(x, c * class_stride, lane_stride, n, -np.inf)
        term = value if n == lanes else load(x, c * class_stride, lane_stride, n, 0.0)
        k = _factor(q, c * q_class, q_lane, weight, c * w_class, w_lane, n, keep, spread)
        top = larger(top, value)
        anchor, total, gap = follow(top, anchor, total, mass + recent, gap)
        total, recent, gap = add_class(anchor, total, recent, gap, value, term, k)
        since += 1
        if since == 8:
            mass, recent, since = mass + recent, splat(0.0, x), 0
        c, n = advance(c, n, last, tile, lanes)
    return settle(top, anchor, total, mass + recent, gap)


@region(_FORWARD)
def _forward(a: Any) -> None:
    (logits, target, weight, loss, mass, top, total, keep, spread, w_class, q_batch, q_class, q_position,
     batch, classes, positions, batch_stride, class_stride, position_stride, tile, grain) = unpack(a, _FORWARD)  # fmt: skip
    lane_stride, q_lane, w_lane = (position_stride, q_position, 0) if tile > 1 else (class_stride, q_class, w_class)
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_tile(task, grain, batch, positions, tile)):
            b, p, row, count = rows_of(number, positions, tile)
            x = offset(logits, b * batch_stride + p * position_stride)
            q = offset(target, b * q_batch + p * q_position)
            # statistics
            stop = classes if tile > 1 else min(classes, WEIGHTED_CHUNK)
            tops, totals, masses, gaps = _statistics(
                x, q, weight, keep, spread, 0, stop, class_stride, lane_stride, q_class, q_lane, w_class, w_lane, tile, count
            )
            if tile == 1:
                tops, totals, masses, gaps = merge_lanes(tops, totals, masses, gaps)
                for first in range(WEIGHTED_CHUNK, classes, WEIGHTED_CHUNK):
                    chunk = _statistics(
                        x, q, weight, keep, spread, first, min(classes, first + WEIGHTED_CHUNK),
                        class_stride, lane_stride, q_class, q_lane, w_class, w_lane, tile, count,
                    )  # fmt: skip
                    tops, totals, masses, gaps = merge(tops, totals, masses, gaps, *merge_lanes(*chunk))
            # loss
            totals = real_total(totals)
            store(top, row, 1, count, tops)
            store(total, row, 1, count, totals)
            store(mass, row, 1, count, masses)
            store(loss, row, 1, count, masses * log(totals) + gaps)
        task = next_task(a)


@region(_BACKWARD)
def _backward(a: Any) -> None:
    (logits, target, weight, mass, top, total, dloss, dlogits, keep, spread, w_class, dloss_stride, past_caches,
     q_batch, q_class, q_position, to_batch, to_class, to_position,
     batch, classes, positions, batch_stride, class_stride, position_stride, tile, grain) = unpack(a, _BACKWARD)  # fmt: skip
    lanes, across = lanes_of(logits), 1 if tile > 1 else 0
    lane_stride, to_lane = (position_stride, to_position) if tile > 1 else (class_stride, to_class)
    q_lane, w_lane = (q_position, 0) if tile > 1 else (q_class, w_class)
    consecutive = class_stride == to_class == q_class == w_class == 1
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_tile(task, grain, batch, positions, tile)):
            b, p, row, count = rows_of(number, positions, tile)
            x = offset(logits, b * batch_stride + p * position_stride)
            q = offset(target, b * q_batch + p * q_position)
            dx = offset(dlogits, b * to_batch + p * to_position)
            # row numbers: one for each lane, or the row's in every lane
            size = count if tile > 1 else lanes
            tops = load(top, row, across, size, 0.0)
            g = load(dloss, row * dloss_stride, across * dloss_stride, size, 0.0)
            scale = g * load(mass, row, across, size, 0.0) / load(total, row, across, size, 1.0)
            # gradient
            c, n = 0, first_vector(dx, classes, tile, count, past_caches)
            while c < classes:
                stop = whole_vectors(c, n, classes, tile, lanes) if consecutive else c
                for k in range(c, stop, lanes):
                    prefetch(x, k + AHEAD)
                    prefetch(q, k + AHEAD)
                    prob = exp(load(x, k, 1, lanes, 0.0) - tops) * scale
                    stream(dx, k, prob - g * _factor(q, k, 1, weight, k, 1, lanes, keep, spread), past_caches)
                if stop > c:
                    c, n = stop, classes - stop
                else:
                    factor = _factor(q, c * q_class, q_lane, weight, c * w_class, w_lane, n, keep, spread)
                    prob = exp(load(x, c * class_stride, lane_stride, n, 0.0) - tops) * scale
                    store(dx, c * to_class, to_lane, n, prob - g * factor)
                    c, n = advance(c, n, classes, tile, lanes)
        task = next_task(a)


@region(_TARGET_BACKWARD)
def _target_backward(a: Any) -> None:
    (logits, weight, top, total, dloss, dtarget, keep, w_class, dloss_stride, to_batch, to_class, to_position,
     batch, classes, positions, batch_stride, class_stride, position_stride, tile, grain) = unpack(a, _TARGET_BACKWARD)  # fmt: skip
    lanes, across = lanes_of(logits), 1 if tile > 1 else 0
    lane_stride, to_lane, w_lane = (position_stride, to_position, 0) if tile > 1 else (class_stride, to_class, w_class)
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_tile(task, grain, batch, positions, tile)):
            b, p, row, count = rows_of(number, positions, tile)
            x = offset(logits, b * batch_stride + p * position_stride)
            dq = offset(dtarget, b * to_batch + p * to_position)
            # row numbers: one for each lane, or the row's in every lane
            size = count if tile > 1 else lanes
            tops = load(top, row, across, size, 0.0)
            log_total = log(load(total, row, across, size, 1.0))
            g = load(dloss, row * dloss_stride, across * dloss_stride, size, 0.0) * keep
            # gradient
            c, n = 0, count if tile > 1 else min(lanes, classes)
            while c < classes:
                nll = log_total - (load(x, c * class_stride, lane_stride, n, 0.0) - tops)
                store(dq, c * to_class, to_lane, n, g * load(weight, c * w_class, w_lane, n, 0.0) * nll)
                c, n = advance(c, n, classes, tile, lanes)
        task = next_task(a)
