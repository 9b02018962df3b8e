"""Row statistics where every class counts with a factor k_c = w_c (keep q_c + spread): beside `top` and `total` mass = sum k and
gap = sum k (top - x). Then sum_c k_c (-log p_c) = mass log total + gap, without ever subtracting two large numbers.

The gradient of such a loss is dloss (mass p - k), less something at the target if there is a class index too.
"""

from typing import Any

import numpy as np
from numba import njit

from .blocks import BLOCK, block_of, block_size, block_statistics, block_top, kept_top, real_total, term
from .math import INLINE, exp
from .memory import load, offset, prefetch, store, stream
from .rows import advance, first_vector, whole_vectors
from .simd import fma, lane_sum, lanes_of, larger, lowest, select, splat
from .targets import less_at


@njit(**INLINE)
def _factor(q: Any, at_q: Any, q_lane: Any, weight: Any, at_w: Any, w_lane: Any, n: Any, keep: Any, spread: Any) -> Any:
    """k of the classes in the lanes, 0 in lanes not in use."""
    return load(weight, at_w, w_lane, n, 0.0) * fma(load(q, at_q, q_lane, n, 0.0), keep, spread)


@njit(**INLINE)
def _masses(
    x: Any, top: Any, q: Any, weight: Any, keep: Any, spread: Any, first: Any, last: Any,
    class_stride: Any, lane_stride: Any, q_class: Any, q_lane: Any, w_class: Any, w_lane: Any, tile: Any, count: Any,
) -> Any:  # fmt: skip
    lanes = lanes_of(x)
    step, n = (1, count) if tile > 1 else (lanes, lanes)
    mass, gap, c = splat(0.0, x), splat(0.0, x), first
    while c + 4 * step <= last:
        # sums of sums lose fewer digits
        four_mass, four_gap = splat(0.0, x), splat(0.0, x)
        for i in range(c, c + 4 * step, step):
            if tile == 1:
                prefetch(q, i * q_class + BLOCK * lanes)
            k = _factor(q, i * q_class, q_lane, weight, i * w_class, w_lane, n, keep, spread)
            four_mass = four_mass + k
            four_gap = fma(k, top - load(x, i * class_stride, lane_stride, n, 0.0), four_gap)
        mass, gap, c = mass + four_mass, gap + four_gap, c + 4 * step
    while c < last:
        n = count if tile > 1 else last - c
        k = _factor(q, c * q_class, q_lane, weight, c * w_class, w_lane, n, keep, spread)
        mass, gap, c = mass + k, fma(k, top - load(x, c * class_stride, lane_stride, n, 0.0), gap), c + step
    if tile == 1:
        mass, gap = splat(lane_sum(mass), x), splat(lane_sum(gap), x)
    return mass, gap


@njit(**INLINE)
def _block_masses(
    x: Any, top: Any, q: Any, weight: Any, keep: Any, spread: Any, first: Any, last: Any,
    class_stride: Any, lane_stride: Any, q_class: Any, q_lane: Any, w_class: Any, w_lane: Any, tile: Any, count: Any,
) -> Any:  # fmt: skip
    """`mass` and `gap` of classes first .. last - 1 whose largest logit is `top`: see `blocks.block_statistics`."""
    lanes = lanes_of(x)
    if tile == 1 and class_stride == q_class == w_class == 1:
        return _masses(x, top, q, weight, keep, spread, first, last, 1, 1, 1, 1, 1, 1, 1, lanes)
    if tile == 1 and class_stride == w_class == 1 and q_class == 0:
        return _masses(x, top, q, weight, keep, spread, first, last, 1, 1, 0, 0, 1, 1, 1, lanes)
    return _masses(x, top, q, weight, keep, spread, first, last, class_stride, lane_stride, q_class, q_lane, w_class, w_lane, tile, count)


@njit(**INLINE)
def _merge(top: Any, total: Any, mass: Any, gap: Any, top2: Any, total2: Any, mass2: Any, gap2: Any) -> Any:
    """The statistics of two disjoint sets of classes taken together."""
    joint = larger(top, top2)
    total = fma(total, exp(top - joint), total2 * exp(top2 - joint))
    # where nothing rises, an infinite mass would make a NaN of it
    gap = select(top < joint, fma(mass, joint - top, gap), gap) + select(top2 < joint, fma(mass2, joint - top2, gap2), gap2)
    return joint, total, mass + mass2, gap


@njit(**INLINE)
def weighted_loss(mass: Any, log_total: Any, gap: Any) -> Any:
    """sum k (-log p). Where a k is infinite, so is its product with any -log p above 0; mass or gap may have met 0 x inf instead."""
    endless = select(log_total > 0.0, mass, gap + log_total)
    return select((mass == np.inf) | (mass == -np.inf), endless, mass * log_total + gap)


@njit(**INLINE)
def weighted_statistics(
    x: Any, q: Any, weight: Any, keep: Any, spread: Any, classes: Any,
    class_stride: Any, lane_stride: Any, q_class: Any, q_lane: Any, w_class: Any, w_lane: Any, tile: Any, count: Any, terms: Any, kept: Any,
) -> Any:  # fmt: skip
    """`top`, `total`, `mass` and `gap` of the rows in the lanes, or of one row, block by block in order. The terms of every block are
    kept (`kept` = 1), or each block's take the place of the last one's (0)."""
    size = block_size(terms, tile)
    top, total, mass, gap = lowest(x), splat(0.0, x), splat(0.0, x), splat(0.0, x)
    for first in range(0, classes, size):
        last = min(classes, first + size)
        top2, total2 = block_statistics(x, first, last, class_stride, lane_stride, tile, count, block_of(terms, first // size * kept))
        mass2, gap2 = _block_masses(
            x, top2, q, weight, keep, spread, first, last, class_stride, lane_stride, q_class, q_lane, w_class, w_lane, tile, count
        )
        if first == 0:
            top, total, mass, gap = top2, total2, mass2, gap2
        else:
            top, total, mass, gap = _merge(top, total, mass, gap, top2, total2, mass2, gap2)
    return top, real_total(total), mass, gap


@njit(**INLINE)
def weighted_gradient_of_row(
    x: Any, dx: Any, classes: Any, class_stride: Any, lane_stride: Any, to_class: Any, to_lane: Any, q: Any, q_class: Any, q_lane: Any,
    weight: Any, w_class: Any, w_lane: Any, keep: Any, spread: Any, tile: Any, count: Any, terms: Any, kept: Any,
    tops: Any, scale: Any, g: Any, y: Any, y_row: Any, g_y: Any, past_caches: Any,
) -> None:  # fmt: skip
    """scale exp(x - tops) - g k, less g_y at class y; zero where y is -1, a row that does not count. Where the lanes are one row, its class
    is `y_row`. `terms` has the terms of all blocks (`kept` = 1), or none (0)."""
    size = block_size(tops, tile)
    for first in range(0, classes, size):
        last = min(classes, first + size)
        if kept:
            block = block_of(terms, first // size)
            top = kept_top(block)
            _gradient_of_block(
                x, top, class_stride, lane_stride, block, 1, dx, first, last, to_class, to_lane, q, q_class, q_lane,
                weight, w_class, w_lane, keep, spread, tile, count, exp(top - tops) * scale, g, y, y_row, g_y, past_caches,
            )  # fmt: skip
        else:
            top = block_top(x, first, last, class_stride, lane_stride, tile, count)
            _gradient_of_block(
                x, top, class_stride, lane_stride, terms, 0, dx, first, last, to_class, to_lane, q, q_class, q_lane,
                weight, w_class, w_lane, keep, spread, tile, count, exp(top - tops) * scale, g, y, y_row, g_y, past_caches,
            )  # fmt: skip


@njit(**INLINE)
def _gradient_of_block(
    x: Any, top: Any, class_stride: Any, lane_stride: Any, terms: Any, kept: Any, dx: Any, first: Any, last: Any,
    to_class: Any, to_lane: Any, q: Any, q_class: Any, q_lane: Any, weight: Any, w_class: Any, w_lane: Any, keep: Any, spread: Any,
    tile: Any, count: Any, factor: Any, g: Any, y: Any, y_row: Any, g_y: Any, past_caches: Any,
) -> None:  # fmt: skip
    """The same for classes first .. last - 1: their terms times `factor`, less g k."""
    lanes = lanes_of(x)
    if tile > 1:
        for c in range(first, last):
            k = _factor(q, c * q_class, q_lane, weight, c * w_class, w_lane, count, keep, spread)
            d = term(x, top, class_stride, lane_stride, terms, kept, first, c, tile, count) * factor - g * k
            store(dx, c * to_class, to_lane, count, select(y > -1, select(y == c, d - g_y, d), 0.0))
        return
    consecutive = class_stride == to_class == w_class == 1 and 0 <= q_class <= 1
    c, n = first, first_vector(offset(dx, first * to_class), last - first, tile, count, past_caches)
    while c < last:
        stop = whole_vectors(c, n, last, tile, lanes) if consecutive else c
        if c <= y_row < stop:
            stop = c + (y_row - c) // lanes * lanes  # the target's vector goes by itself
        if q_class == 1:
            _stream(x, top, terms, kept, dx, first, c, stop, q, 1, weight, keep, spread, factor, g, past_caches)
        else:
            _stream(x, top, terms, kept, dx, first, c, stop, q, 0, weight, keep, spread, factor, g, past_caches)
        if stop > c:
            c, n = stop, min(lanes, last - stop)
        else:
            k = _factor(q, c * q_class, q_lane, weight, c * w_class, w_lane, n, keep, spread)
            d = term(x, top, class_stride, class_stride, terms, kept, first, c, 1, n) * factor - g * k
            store(dx, c * to_class, to_lane, n, less_at(d, y_row - c, g_y))
            c, n = advance(c, n, last, tile, lanes)


@njit(**INLINE)
def _stream(
    x: Any, top: Any, terms: Any, kept: Any, dx: Any, first: Any, c: Any, stop: Any, q: Any, q_class: Any, weight: Any,
    keep: Any, spread: Any, factor: Any, g: Any, past_caches: Any,
) -> None:  # fmt: skip
    """Whole vectors of one row."""
    lanes = lanes_of(x)
    for i in range(c, stop, lanes):
        if not kept:
            prefetch(q, i * q_class + BLOCK * lanes)
        k = _factor(q, i * q_class, q_class, weight, i, 1, lanes, keep, spread)
        stream(dx, i, term(x, top, 1, 1, terms, kept, first, i, 1, lanes) * factor - g * k, past_caches)
