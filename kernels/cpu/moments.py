"""What there is to know of the distribution of a row, block by block: beside `top` and `total` (here of z = scale x) two moments,

    gap = sum e^(z - top) (z - top)        squares = sum e^(2 (z - top))

so that entropy = log total - gap / total, whose terms all have one sign, and sum p^2 = squares / total^2.

Nothing is kept of a block but these numbers: the terms of its sums are made and added in one walk.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from .blocks import block_top
from .inline import INLINE
from .math import exp
from .memory import load_one
from .prefetch import prefetch_four
from .rows import advance, load_at, one_row, whole_tile
from .simd import any_lane, first_lane, fma, lane_numbers, lane_sum, lanes_of, larger, lowest, select, splat

GAP, SQUARES = 1, 2  # which moments are wanted, as the bits of a number
NEVER = -1000.0  # e^NEVER is 0, and 0 times NEVER too, which 0 times -inf is not


class Moments(NamedTuple):
    """Of the rows in the lanes, or of one row in every lane; 0 where not wanted."""

    top: Any  # of x
    total: Any  # 0 for nothing but -inf
    gap: Any
    squares: Any


@njit(**INLINE)
def _sums(x: Any, top: Any, scale: Any, first: Any, last: Any, wanted: Any) -> Any:
    lanes = lanes_of(x.at)
    step, n = (1, x.rows) if x.tile > 1 else (lanes, lanes)
    nothing = splat(0.0, x.at)
    total, gap, squares, c = nothing, nothing, nothing, first
    while c + 4 * step <= last:
        # sums of sums lose fewer digits
        four, four_gap, four_squares = nothing, nothing, nothing
        if x.tile == 1:
            prefetch_four(x.at, c * x.class_)
        for i in range(c, c + 4 * step, step):
            z = (load_at(x, i, n, -np.inf) - top) * scale
            if wanted & GAP:
                z = larger(z, splat(NEVER, x.at))
            e = exp(z)
            four = four + e
            if wanted & GAP:
                four_gap = fma(e, z, four_gap)
            if wanted & SQUARES:
                four_squares = fma(e, e, four_squares)
        total, gap, squares, c = total + four, gap + four_gap, squares + four_squares, c + 4 * step
    while c < last:
        z = (load_at(x, c, x.rows if x.tile > 1 else last - c, -np.inf) - top) * scale
        if wanted & GAP:
            z = larger(z, splat(NEVER, x.at))
        e = exp(z)
        total = total + e
        if wanted & GAP:
            gap = fma(e, z, gap)
        if wanted & SQUARES:
            squares = fma(e, e, squares)
        c += step
    if x.tile == 1:
        total = splat(lane_sum(total), x.at)
        gap = splat(lane_sum(gap), x.at) if wanted & GAP else gap
        squares = splat(lane_sum(squares), x.at) if wanted & SQUARES else squares
    return Moments(top, total, gap, squares)


@njit(**INLINE)
def block_moments(x: Any, scale: Any, first: Any, last: Any, wanted: Any) -> Any:
    """The moments of classes first .. last - 1: see `blocks.block_statistics`."""
    top = block_top(x, first, last)
    if x.tile == 1 and x.class_ == 1:
        return _sums(one_row(x.at), top, scale, first, last, wanted)
    if x.tile > 1 and x.rows == lanes_of(x.at):
        if x.lane == 1:
            return _sums(whole_tile(x, 1), top, scale, first, last, wanted)
        return _sums(whole_tile(x, x.lane), top, scale, first, last, wanted)
    return _sums(x, top, scale, first, last, wanted)


@njit(**INLINE)
def no_moments(x: Any) -> Any:
    """Of no class at all."""
    return Moments(lowest(x.at), splat(0.0, x.at), splat(0.0, x.at), splat(0.0, x.at))


@njit(**INLINE)
def _risen(m: Any, joint: Any, scale: Any, wanted: Any) -> Any:
    """The same moments about a larger top."""
    rise = (m.top - joint) * scale
    if wanted & GAP:
        rise = larger(rise, splat(NEVER, rise))
    e = exp(rise)
    gap = e * fma(rise, m.total, m.gap) if wanted & GAP else m.gap
    squares = e * e * m.squares if wanted & SQUARES else m.squares
    return Moments(joint, e * m.total, gap, squares)


@njit(**INLINE)
def merge_moments(m: Any, m2: Any, scale: Any, wanted: Any) -> Any:
    """The moments of two disjoint sets of classes taken together."""
    joint = larger(m.top, m2.top)
    a, b = _risen(m, joint, scale, wanted), _risen(m2, joint, scale, wanted)
    return Moments(joint, a.total + b.total, a.gap + b.gap, a.squares + b.squares)


@njit(**INLINE)
def first_at(x: Any, first: Any, last: Any, top: Any) -> Any:
    """The first of these classes that holds `top`, `first` if none does: for each row in the lanes, or for one row in every lane."""
    found = splat(first, lane_numbers(top))
    if x.tile > 1:
        for back in range(last - first):
            c = last - 1 - back
            found = select(load_at(x, c, x.rows, np.nan) == top, splat(c, found), found)
        return found
    lanes, wanted, c = lanes_of(x.at), first_lane(top), first
    while c < last:
        if any_lane(load_at(x, c, last - c, np.nan) == top):
            while load_one(x.at, c * x.class_) != wanted:
                c += 1
            return splat(c, found)
        c += lanes
    return found


@njit(**INLINE)
def first_nan(x: Any, classes: Any) -> Any:
    """The first class that is NaN, -1 if none is."""
    found = splat(-1, lane_numbers(splat(0.0, x.at)))
    c, n = 0, x.rows if x.tile > 1 else min(lanes_of(x.at), classes)
    while c < classes:
        logits = load_at(x, c, n, 0.0)
        odd = logits != logits
        if x.tile > 1:
            found = select((found < 0) & odd, splat(c, found), found)
        elif any_lane(odd):
            while load_one(x.at, c * x.class_) == load_one(x.at, c * x.class_):
                c += 1
            return splat(c, found)
        c, n = advance(x, c, n, classes)
    return found
