"""Row statistics where every class counts with a factor k_c = w_c (keep q_c + spread): beside `top` and `total` mass = sum k and
gap = sum k (top - x). Then sum_c k_c (-log p_c) = mass log total + gap, without ever subtracting two large numbers.

The gradient of such a loss is dloss (mass p - k), less something at the target if there is a class index too.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from torch import Tensor

from ..groups import Smoothing
from .blocks import Block, block_of, block_reference, block_size, block_statistics, kept_reference, real_total, term
from .inline import INLINE
from .math import exp
from .prefetch import ask_for_seam, prefetch, prefetch_four
from .rows import Lanes, Walk, advance, first_vector, load_at, one_row, store_at, whole_vectors
from .simd import fma, lane_numbers, lane_sum, lanes_of, larger, lowest, select, splat
from .stream import stream_row
from .targets import less_at


class Factors(NamedTuple):
    """k_c of the rows of a tile. Both `Lanes` have steps of 0 where one number serves all."""

    q: Any  # class probabilities, as `Lanes`
    weight: Any  # the same
    smoothing: Any
    one_weight: Any  # see there; 1: `smoothing` has the weight in it


class WeightedNumbers(NamedTuple):
    """What a gradient wants of a row: one number for each lane, or the row's in every lane."""

    top: Any
    g: Any  # dloss
    scale: Any  # g mass / total
    y: Any  # the target where the lanes are rows; -1 for one that does not count
    y_row: int  # the target where the lanes are one row
    g_y: Any  # what there is less at class y


def one_weight(way: Walk, weight: Tensor) -> int:
    """1 if long rows are to be compiled for one weight that all classes share, else 0: without weights there are no ones to read."""
    return int(way.tile == 1 and weight.stride(0) == 0)


@njit(**INLINE)
def factors_of(x: Any, q: Any, weight: Any, weight_stride: Any, smoothing: Any) -> Any:
    """The factors of the rows at x whose class probabilities are at q."""
    return Factors(q, Lanes(weight, weight_stride, 0 if x.tile > 1 else weight_stride, x.tile, x.rows), smoothing, 0)


@njit(**INLINE)
def known_factors_of(a: Any, x: Any, q: Any) -> Any:
    """The same in a region that is compiled for `one_weight`."""
    if a.one_weight:
        w = a.weight[0]
        return Factors(q, Lanes(a.weight, 0, 0, x.tile, x.rows), Smoothing(a.smoothing.keep * w, a.smoothing.spread * w), 1)
    return factors_of(x, q, a.weight, a.weight_stride, a.smoothing)


@njit(**INLINE)
def factor_at(k: Any, c: Any, n: Any) -> Any:
    """k of the classes in the lanes, 0 in lanes not in use."""
    shares = fma(load_at(k.q, c, n, 0.0), k.smoothing.keep, k.smoothing.spread)
    return select(lane_numbers(shares) < n, shares, 0.0) if k.one_weight else load_at(k.weight, c, n, 0.0) * shares


@njit(**INLINE)
def side_by_side(k: Any, q_class: Any) -> Any:
    """The factors of one row, with steps that the compiler knows."""
    return Factors(Lanes(k.q.at, q_class, q_class, 1, 1), one_row(k.weight.at), k.smoothing, k.one_weight)


@njit(**INLINE)
def _weights_side_by_side(k: Any) -> Any:
    return k.one_weight or k.weight.class_ == 1


@njit(**INLINE)
def _masses(x: Any, top: Any, k: Any, first: Any, last: Any) -> Any:
    lanes = lanes_of(x.at)
    step, n = (1, x.rows) if x.tile > 1 else (lanes, lanes)
    mass, gap, c = splat(0.0, x.at), splat(0.0, x.at), first
    while c + 4 * step <= last:
        # sums of sums lose fewer digits
        four_mass, four_gap = splat(0.0, x.at), splat(0.0, x.at)
        if x.tile == 1:
            prefetch_four(k.q.at, c * k.q.class_)
        for i in range(c, c + 4 * step, step):
            factor = factor_at(k, i, n)
            four_mass = four_mass + factor
            four_gap = fma(factor, top - load_at(x, i, n, 0.0), four_gap)
        mass, gap, c = mass + four_mass, gap + four_gap, c + 4 * step
    return masses_of_rest(x, top, k, c, last, mass, gap)


@njit(**INLINE)
def masses_of_rest(x: Any, top: Any, k: Any, c: Any, last: Any, mass: Any, gap: Any) -> Any:
    """`mass` and `gap` with classes c .. last - 1, fewer than four vectors: the sums over the lanes, where these are one row."""
    while c < last:
        n = x.rows if x.tile > 1 else last - c
        factor = factor_at(k, c, n)
        mass, gap = mass + factor, fma(factor, top - load_at(x, c, n, 0.0), gap)
        c += 1 if x.tile > 1 else lanes_of(x.at)
    if x.tile == 1:
        mass, gap = splat(lane_sum(mass), x.at), splat(lane_sum(gap), x.at)
    return mass, gap


@njit(**INLINE)
def _block_masses(x: Any, top: Any, k: Any, first: Any, last: Any) -> Any:
    """`mass` and `gap` of classes first .. last - 1 whose largest logit is `top`: see `blocks.block_statistics`."""
    if x.tile == x.class_ == k.q.class_ == 1 and _weights_side_by_side(k):
        return _masses(one_row(x.at), top, side_by_side(k, 1), first, last)
    if x.tile == x.class_ == 1 and k.q.class_ == 0 and _weights_side_by_side(k):
        return _masses(one_row(x.at), top, side_by_side(k, 0), first, last)
    return _masses(x, top, k, first, last)


@njit(**INLINE)
def merge_weighted(top: Any, total: Any, mass: Any, gap: Any, top2: Any, total2: Any, mass2: Any, gap2: Any) -> Any:
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
def weighted_statistics(x: Any, k: Any, classes: Any, terms: Any, kept: Any) -> Any:
    """`top`, `total`, `mass` and `gap` of the rows in the lanes, or of one row, block by block in order. The terms of every block are
    kept (`kept` = 1), or each block's take the place of the last one's (0)."""
    size = block_size(terms, x.tile)
    top, total, mass, gap = lowest(x.at), splat(0.0, x.at), splat(0.0, x.at), splat(0.0, x.at)
    for first in range(0, classes, size):
        last = min(classes, first + size)
        top2, total2 = block_statistics(x, first, last, block_of(terms, first // size * kept))
        mass2, gap2 = _block_masses(x, top2, k, first, last)
        if first == 0:
            top, total, mass, gap = top2, total2, mass2, gap2
        else:
            top, total, mass, gap = merge_weighted(top, total, mass, gap, top2, total2, mass2, gap2)
    return top, real_total(total), mass, gap


@njit(**INLINE)
def weighted_gradient_of_row(x: Any, dx: Any, k: Any, classes: Any, terms: Any, kept: Any, r: Any, past_caches: Any) -> None:
    """scale exp(x - top) - g k, less g_y at class y; zero where y is -1, a row that does not count. `terms` has the terms of all blocks
    (`kept` = 1), or none (0)."""
    size = block_size(terms, x.tile)
    for first in range(0, classes, size):
        last = min(classes, first + size)
        if kept:
            mine = block_of(terms, first // size)
            reference = kept_reference(mine)
            _gradient_of_block(x, dx, k, Block(first, last, reference, mine, 1), exp(reference - r.top) * r.scale, r, past_caches)
        else:
            reference = block_reference(x, first, last, r.top)
            _gradient_of_block(x, dx, k, Block(first, last, reference, terms, 0), exp(reference - r.top) * r.scale, r, past_caches)


@njit(**INLINE)
def slope_at(x: Any, k: Any, block: Any, c: Any, n: Any, factor: Any, g: Any) -> Any:
    """term * factor - g k of the n classes from c on, or of class c of n rows: the gradient where no class is the target."""
    # the larger product is not rounded
    return fma(term(x, block, c, n), factor, factor_at(k, c, n) * (g * -1.0))


@njit(**INLINE)
def _gradient_of_block(x: Any, dx: Any, k: Any, block: Any, factor: Any, r: Any, past_caches: Any) -> None:
    """The same for one block: its terms times `factor`, less g k."""
    lanes, last = lanes_of(x.at), block.last
    if x.tile > 1:
        for c in range(block.first, last):
            d = slope_at(x, k, block, c, x.rows, factor, r.g)
            store_at(dx, c, x.rows, select(r.y > -1, select(r.y == c, d - r.g_y, d), 0.0))
        return
    ask_for_seam(dx.at, last, past_caches)
    consecutive = x.class_ == dx.class_ == 1 and _weights_side_by_side(k) and 0 <= k.q.class_ <= 1
    c, n = block.first, first_vector(dx, block.first, last, past_caches)
    while c < last:
        stop = whole_vectors(dx.at, c, n, last, past_caches) if consecutive else c
        if c <= r.y_row < stop:
            stop = c + (r.y_row - c) // lanes * lanes  # the target's vector goes by itself
        if k.q.class_ == 1:
            _stream(one_row(x.at), dx, side_by_side(k, 1), block, c, stop, factor, r.g, past_caches)
        else:
            _stream(one_row(x.at), dx, side_by_side(k, 0), block, c, stop, factor, r.g, past_caches)
        if stop > c:
            c, n = stop, min(lanes, last - stop)
        else:
            d = slope_at(x, k, block, c, n, factor, r.g)
            store_at(dx, c, n, less_at(d, r.y_row - c, r.g_y))
            c, n = advance(x, c, n, last)


@njit(**INLINE)
def _stream(x: Any, dx: Any, k: Any, block: Any, c: Any, stop: Any, factor: Any, g: Any, past_caches: Any) -> None:
    """Whole vectors of one row."""
    lanes = lanes_of(x.at)
    for i in range(c, stop, lanes):
        if not block.kept:
            prefetch(k.q.at, i * k.q.class_)
        stream_row(dx.at, i, slope_at(x, k, block, i, lanes, factor, g), past_caches)
