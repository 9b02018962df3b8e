"""Row statistics where every class counts with a factor k_c: `top`, `total`, mass = sum k, and gap = sum k (top - x).

Then sum_c k_c (-log p_c) = mass log total + gap, without ever subtracting two large numbers.
"""

from typing import Any

from numba import njit

from .math import INLINE, exp
from .simd import fma, lane_max, lane_sum, larger, lowest, select, splat


@njit(**INLINE)
def no_classes(x: Any) -> Any:
    """The statistics before the first class."""
    return lowest(x), splat(0.0, x), splat(0.0, x), splat(0.0, x)


@njit(**INLINE)
def _rise(top: Any, joint: Any) -> Any:
    """joint - top, but finite, so that a mass of 0 cancels it."""
    return 0.0 - larger(lowest(top), top - joint)


@njit(**INLINE)
def add_class(top: Any, total: Any, mass: Any, gap: Any, value: Any, term: Any, k: Any) -> Any:
    """One more class in every lane. `term` is `value`, but finite where a lane is not in use (and k is 0)."""
    higher = value > top
    e = exp(select(higher, top - value, value - top))
    total = fma(select(higher, total, 1.0), e, select(higher, 1.0, total))
    joint = select(higher, value, top)
    gap = gap + fma(mass, _rise(top, joint), k * (joint - term))
    return joint, total, mass + k, gap


@njit(**INLINE)
def merge(top: Any, total: Any, mass: Any, gap: Any, top2: Any, total2: Any, mass2: Any, gap2: Any) -> Any:
    """Two disjoint sets of classes taken together."""
    joint = select(top2 > top, top2, top)
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
