"""The loop of losses where every class counts with a factor (`weighted`) in one visit: the gradient of a row is written while the next
one is read, as `cross_entropy_one_visit` says why. The bits are those of `weighted_statistics` and `weighted_gradient_of_row`."""

from typing import Any, NamedTuple

from numba import njit

from .blocks import BLOCK, Block, block_of, block_size, block_top, four_terms, keep_top, kept_top, real_total, sum_with_rest, term
from .inline import INLINE
from .math import exp
from .memory import load, offset, prefetch, store, stream, to_alignment
from .rows import Lanes, one_row
from .simd import fma, lanes_of, splat
from .targets import less_at
from .weighted import Factors, factor_at, masses_of_rest, merge_weighted


class Waiting(NamedTuple):
    """A row whose gradient is still to be written: where to, its factors, its terms, all side by side, and its numbers."""

    dx: Any  # a pointer
    k: Any
    terms: Any
    r: Any


@njit(**INLINE)
def factors_in_turn(a: Any, q: Any) -> Any:
    """The factors of one row whose class probabilities lie side by side at q, as the weights do unless one is for all."""
    step = 0 if a.one_weight else 1
    return Factors(one_row(q), Lanes(a.weight, step, step, 1, 1), a.smoothing)


@njit(**INLINE)
def statistics_and_weighted_gradient(x: Any, k: Any, classes: Any, terms: Any, waiting: Any, past_caches: Any) -> Any:
    """`weighted_statistics` of the row at x, whose classes and factors lie side by side, and meanwhile the gradient of the waiting one."""
    lanes, size, dx, r = lanes_of(x.at), block_size(terms, 1), waiting.dx, waiting.r
    zero = splat(0.0, x.at)
    top, total, mass, gap = zero, zero, zero, zero
    for first in range(0, classes, size):
        last = min(classes, first + size)
        mine, theirs = block_of(terms, first // size), block_of(waiting.terms, first // size)
        other = Block(first, last, r.scale, theirs, 1)  # of kept terms the top is not asked for
        factor = exp(kept_top(theirs) - r.top) * r.scale
        top2, total2, mass2, gap2 = block_top(x, first, last), zero, zero, zero
        keep_top(mine, top2)
        # c goes over the classes of this row, i over those of the other: from where its vectors lie aligned
        c, i = first, min(last, first + to_alignment(offset(dx, first))) if past_caches else first
        if i > first:
            store(dx, first, 1, i - first, _gradient_at(x, other, first, i - first, factor, waiting))
        while c + 4 * lanes <= last and i + 4 * lanes <= last:
            four_mass, four_gap = _four_masses(x, top2, k, c)
            total2 = total2 + four_terms(x, top2, c, mine, c - first)
            mass2, gap2 = mass2 + four_mass, gap2 + four_gap
            _four_of_gradient(x, other, i, factor, waiting, past_caches)
            c, i = c + 4 * lanes, i + 4 * lanes
        if c + 4 * lanes <= last:  # i was ahead by less than a vector
            four_mass, four_gap = _four_masses(x, top2, k, c)
            total2 = total2 + four_terms(x, top2, c, mine, c - first)
            mass2, gap2, c = mass2 + four_mass, gap2 + four_gap, c + 4 * lanes
        total2 = sum_with_rest(x, top2, total2, first, c, last, mine)
        mass2, gap2 = masses_of_rest(x, top2, k, c, last, mass2, gap2)
        while i < last:
            n = min(lanes, last - i)
            store(dx, i, 1, n, _gradient_at(x, other, i, n, factor, waiting))
            i += n
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
    for i in range(c, c + 4 * lanes, lanes):
        prefetch(k.q.at, i * k.q.class_ + BLOCK * lanes)
        factor = factor_at(k, i, lanes)
        mass, gap = mass + factor, fma(factor, (load(x.at, i, 1, lanes, 0.0) - top) * -1.0, gap)
    return mass, gap


@njit(**INLINE)
def _gradient_at(x: Any, other: Any, c: Any, n: Any, factor: Any, waiting: Any) -> Any:
    """The gradient of n classes from c on, one of which may be the target."""
    r = waiting.r
    return less_at(term(x, other, c, n) * factor - r.g * factor_at(waiting.k, c, n), r.y_row - c, r.g_y)


@njit(**INLINE)
def _four_of_gradient(x: Any, other: Any, c: Any, factor: Any, waiting: Any, past_caches: Any) -> None:
    """Four whole vectors of the waiting row from class c on."""
    lanes, r = lanes_of(x.at), waiting.r
    if c <= r.y_row < c + 4 * lanes:
        for i in range(c, c + 4 * lanes, lanes):
            stream(waiting.dx, i, _gradient_at(x, other, i, lanes, factor, waiting), past_caches)
    else:
        for i in range(c, c + 4 * lanes, lanes):
            d = term(x, other, i, lanes) * factor - r.g * factor_at(waiting.k, i, lanes)
            stream(waiting.dx, i, d, past_caches)
