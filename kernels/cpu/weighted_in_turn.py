"""The loop of losses where every class counts with a factor (`weighted`) in one visit: the gradient of a row is written while the next
one is read, as `cross_entropy_one_visit` says why. The bits are those of `weighted_statistics` and `weighted_gradient_of_row`.

A row's terms take the place of those of the row before it, vectors that have just been read: with a place of their own, what is written
past the caches and what comes from the second-level cache wait for the same line buffers longer.
"""

from typing import Any, NamedTuple

from numba import njit

from .blocks import Block, block_of, block_size, block_top, four_terms, kept_reference, real_total, reference_below, settled, sum_with_rest
from .inline import INLINE
from .math import exp
from .memory import load, store
from .prefetch import ask_for_seam, prefetch_four
from .rows import first_line
from .simd import first_lane, fma, lanes_of, splat
from .stream import line_of, stream, stream_two
from .targets import less_at
from .weighted import factor_at, masses_of_rest, merge_weighted, slope_at


class Waiting(NamedTuple):
    """A row whose gradient is still to be written: where to, its factors, all side by side, and its numbers."""

    dx: Any  # a pointer
    k: Any
    r: Any


@njit(**INLINE)
def statistics_and_weighted_gradient(x: Any, k: Any, classes: Any, terms: Any, waiting: Any, past_caches: Any) -> Any:
    """`weighted_statistics` of the row at x, whose classes and factors lie side by side, and meanwhile the gradient of the waiting one,
    whose terms are in `terms`; the row's own are there afterwards."""
    lanes, size, dx, r = lanes_of(x.at), block_size(terms, 1), waiting.dx, waiting.r
    line, zero = line_of(dx), splat(0.0, x.at)
    top, total, mass, gap = zero, zero, zero, zero
    for first in range(0, classes, size):
        last = min(classes, first + size)
        mine = block_of(terms, first // size)
        other = Block(first, last, r.scale, mine, 1)  # of kept terms the reference is not asked for
        factor = exp(kept_reference(mine) - r.top) * r.scale
        top2, total2, mass2, gap2 = block_top(x, first, last), zero, zero, zero
        reference = reference_below(x, first, last, first_lane(top2))
        # c goes over the classes of this row, i over those of the other, ahead: from where its lines begin
        c, i = first, first_line(dx, first, last, past_caches)
        ask_for_seam(dx, last, past_caches)
        _through_caches(x, other, first, i, factor, waiting)
        while i + 4 * lanes <= last:
            _four_of_gradient(x, other, i, factor, waiting, past_caches)
            four_mass, four_gap = _four_masses(x, top2, k, c)
            four, _ = four_terms(x, reference, top2, c, mine, c - first)
            total2 = total2 + four
            mass2, gap2 = mass2 + four_mass, gap2 + four_gap
            c, i = c + 4 * lanes, i + 4 * lanes
        while i + line <= last:
            for j in range(i, i + line, lanes):
                stream(dx, j, _gradient_at(x, other, j, lanes, factor, waiting), past_caches)
            i += line
        _through_caches(x, other, i, last, factor, waiting)
        if c + 4 * lanes <= last:  # i was ahead by less than a line
            four_mass, four_gap = _four_masses(x, top2, k, c)
            four, _ = four_terms(x, reference, top2, c, mine, c - first)
            total2 = total2 + four
            mass2, gap2, c = mass2 + four_mass, gap2 + four_gap, c + 4 * lanes
        top2, total2 = sum_with_rest(x, reference, top2, total2, first, c, last, mine)
        total2 = settled(x, reference, top2, total2, first, last, mine)
        mass2, gap2 = masses_of_rest(x, top2, k, c, last, mass2, gap2)
        if first == 0:
            top, total, mass, gap = top2, total2, mass2, gap2
        else:
            top, total, mass, gap = merge_weighted(top, total, mass, gap, top2, total2, mass2, gap2)
    return top, real_total(total), mass, gap


@njit(**INLINE)
def _four_masses(x: Any, top: Any, k: Any, c: Any) -> Any:
    """What four vectors of one row from class c on add to `mass` and `gap`. The differences are those of `four_terms`."""
    lanes = lanes_of(x.at)
    mass, gap = splat(0.0, x.at), splat(0.0, x.at)
    if k.q.class_ > 0:
        prefetch_four(k.q.at, c)
    for i in range(c, c + 4 * lanes, lanes):
        factor = factor_at(k, i, lanes)
        mass, gap = mass + factor, fma(factor, (load(x.at, i, 1, lanes, 0.0) - top) * -1.0, gap)
    return mass, gap


@njit(**INLINE)
def _gradient_at(x: Any, other: Any, c: Any, n: Any, factor: Any, waiting: Any) -> Any:
    """The gradient of n classes of the waiting row from c on, one of which may be the target."""
    r = waiting.r
    return less_at(slope_at(x, waiting.k, other, c, n, factor, r.g), r.y_row - c, r.g_y)


@njit(**INLINE)
def _through_caches(x: Any, other: Any, c: Any, stop: Any, factor: Any, waiting: Any) -> None:
    """The gradient of classes c .. stop - 1 of the waiting row, which do not fill a line."""
    lanes = lanes_of(x.at)
    while c < stop:
        n = min(lanes, stop - c)
        store(waiting.dx, c, 1, n, _gradient_at(x, other, c, n, factor, waiting))
        c += n


@njit(**INLINE)
def _four_of_gradient(x: Any, other: Any, c: Any, factor: Any, waiting: Any, past_caches: Any) -> None:
    """Four whole vectors of the waiting row from class c on."""
    lanes, r = lanes_of(x.at), waiting.r
    if c <= r.y_row < c + 4 * lanes:
        for i in range(c, c + 4 * lanes, 2 * lanes):
            d, e = _gradient_at(x, other, i, lanes, factor, waiting), _gradient_at(x, other, i + lanes, lanes, factor, waiting)
            stream_two(waiting.dx, i, d, e, past_caches)
    else:
        for i in range(c, c + 4 * lanes, 2 * lanes):
            d, e = slope_at(x, waiting.k, other, i, lanes, factor, r.g), slope_at(x, waiting.k, other, i + lanes, lanes, factor, r.g)
            stream_two(waiting.dx, i, d, e, past_caches)
