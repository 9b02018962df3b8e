"""Row statistics where every class counts with a factor k_c: `top`, `total`, mass = sum k, and gap = sum k (top - x).

Then sum_c k_c (-log p_c) = mass log total + gap, without ever subtracting two large numbers. As in `rows.statistics`, sums are kept
relative to an anchor that follows `top`.
"""

from typing import Any

from numba import njit

from .math import INLINE, exp, exp_for_sum
from .rows import SLACK
from .simd import any_lane, fma, lane_max, lane_sum, larger, lowest, splat


@njit(**INLINE)
def no_classes(x: Any) -> Any:
    """top, anchor, total, mass and gap before the first class."""
    return lowest(x), lowest(x), splat(0.0, x), splat(0.0, x), splat(0.0, x)


@njit(**INLINE)
def follow(top: Any, anchor: Any, total: Any, mass: Any, gap: Any) -> Any:
    """anchor, total and gap, with the anchor at `top` where it was left too far behind."""
    if any_lane(top > anchor + SLACK):
        gap = fma(mass, _rise(anchor, top), gap)
        total = total * exp(anchor - top)
        anchor = top
    return anchor, total, gap


@njit(**INLINE)
def add_class(anchor: Any, total: Any, mass: Any, gap: Any, value: Any, term: Any, k: Any) -> Any:
    """total, mass and gap with one more class. `term` is `value`, but finite in lanes not in use, where k is 0."""
    return total + exp_for_sum(value - anchor), mass + k, fma(k, anchor - term, gap)


@njit(**INLINE)
def settle(top: Any, anchor: Any, total: Any, mass: Any, gap: Any) -> Any:
    """top, total, mass and gap when all classes are in."""
    return top, total * exp_for_sum(anchor - top), mass, fma(mass, _rise(anchor, top), gap)


@njit(**INLINE)
def merge(top: Any, total: Any, mass: Any, gap: Any, top2: Any, total2: Any, mass2: Any, gap2: Any) -> Any:
    """Two disjoint sets of classes taken together."""
    joint = larger(top, top2)
    total = fma(total, exp(top - joint), total2 * exp(top2 - joint))
    gap = fma(mass, _rise(top, joint), gap) + fma(mass2, _rise(top2, joint), gap2)
    return joint, total, mass + mass2, gap


@njit(**INLINE)
def merge_lanes(top: Any, total: Any, mass: Any, gap: Any) -> Any:
    """All lanes taken together, the result in every lane."""
    joint = splat(lane_max(top), top)
    total = lane_sum(total * exp(top - joint))
    gap = lane_sum(fma(mass, _rise(top, joint), gap))
    return joint, splat(total, top), splat(lane_sum(mass), top), splat(gap, top)


@njit(**INLINE)
def _rise(low: Any, high: Any) -> Any:
    """high - low, but finite, so that a mass of 0 cancels it."""
    return 0.0 - larger(lowest(low), low - high)
