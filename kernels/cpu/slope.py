"""The gradient of rows of logits that is a polynomial of p and log p, and numbers at some classes:

    dlogits_c = scale (p_c (alpha + beta log p_c + gamma p_c) + sum of a_k over all k with y_k = c)

With z = scale (x - top) and e = exp(z), which is 0 where z is -inf, it is e (a + b z + c e): one walk over the logits.
"""

from typing import Any, NamedTuple

from numba import njit

from .inline import INLINE
from .math import exp
from .memory import load, store
from .moments import NEVER
from .prefetch import ask_for_seam, prefetch
from .rows import fills_lines, first_line, load_at, one_row, store_at, whole_tile
from .simd import fma, lanes_of, larger, select, splat
from .stream import line_of, stream, stream_row

LOG, SQUARE = 1, 2  # whether there is a beta, a gamma, as the bits of a number


class SlopeNumbers(NamedTuple):
    """What a gradient wants of a row: one number for each lane, or the row's in every lane."""

    top: Any
    scale: float  # of the logits
    a: Any
    b: Any
    c: Any
    counts: Any  # which rows count
    y: Any  # the one target where the lanes are rows, -1 for none
    g: Any  # what it takes


class Piece(NamedTuple):
    """Some classes of a row, or of a tile of rows."""

    first: int
    last: int  # one past it
    values: Any  # scratch memory
    ready: int  # 1 if the gradient is there


@njit(**INLINE)
def _slope(x: Any, c: Any, n: Any, r: Any, powers: Any) -> Any:
    z = (load_at(x, c, n, 0.0) - r.top) * r.scale
    if powers & LOG:
        z = larger(z, splat(NEVER, z))
    e = exp(z)
    factor = r.a
    if powers & LOG:
        factor = fma(z, r.b, factor)
    if powers & SQUARE:
        factor = fma(e, r.c, factor)
    return e * factor


@njit(**INLINE)
def _value(x: Any, piece: Any, c: Any, n: Any, r: Any, powers: Any) -> Any:
    """The gradient of the n classes from c on, or of class c of n rows in the lanes."""
    lanes = lanes_of(x.at)
    if piece.ready:
        return load(piece.values, (c - piece.first) * lanes if x.tile > 1 else c - piece.first, 1, lanes if x.tile > 1 else n, 0.0)
    if x.tile == 1:
        prefetch(x.at, c * x.class_)
    return _slope(x, c, n, r, powers)


@njit(**INLINE)
def _through_caches(x: Any, dx: Any, piece: Any, c: Any, stop: Any, r: Any, powers: Any) -> None:
    """The gradient of classes c .. stop - 1 of one row, which do not fill a line."""
    lanes = lanes_of(x.at)
    while c < stop:
        n = min(lanes, stop - c)
        store_at(dx, c, n, _value(x, piece, c, n, r, powers))
        c += n


@njit(**INLINE)
def write_slope(x: Any, dx: Any, piece: Any, r: Any, powers: Any, past_caches: Any) -> None:
    """The gradient of a piece, from scratch memory or from the logits."""
    lanes, first, last = lanes_of(x.at), piece.first, piece.last
    if x.tile > 1 and x.lane == dx.lane == 1 and x.rows == lanes:
        x, past_caches = whole_tile(x, 1), past_caches if fills_lines(dx) else 0
        for c in range(first, last):
            stream(dx.at, c * dx.class_, _of_rows(x, piece, c, r, powers), past_caches)
    elif x.tile > 1:
        for c in range(first, last):
            store_at(dx, c, x.rows, _of_rows(x, piece, c, r, powers))
    elif x.class_ == dx.class_ == 1:
        # whole lines, with what is left over before and behind them
        x, dx = one_row(x.at), one_row(dx.at)
        begin = first_line(dx.at, first, last, past_caches)
        end = begin + (last - begin) // line_of(dx.at) * line_of(dx.at)
        ask_for_seam(dx.at, last, past_caches)
        _through_caches(x, dx, piece, first, begin, r, powers)
        c = begin
        while c + 4 * lanes <= end:
            for i in range(c, c + 4 * lanes, lanes):
                stream_row(dx.at, i, _value(x, piece, i, lanes, r, powers), past_caches)
            c += 4 * lanes
        while c < end:
            stream(dx.at, c, _value(x, piece, c, lanes, r, powers), past_caches)
            c += lanes
        _through_caches(x, dx, piece, end, last, r, powers)
    else:
        for c in range(first, last, lanes):
            store_at(dx, c, last - c, _value(x, piece, c, last - c, r, powers))


@njit(**INLINE)
def _of_rows(x: Any, piece: Any, c: Any, r: Any, powers: Any) -> Any:
    d = _value(x, piece, c, x.rows, r, powers)
    return select(r.counts, select(r.y == c, d + r.g, d), 0.0)


@njit(**INLINE)
def keep_slope(x: Any, piece: Any, r: Any, powers: Any) -> None:
    """Write the gradient of a piece, without what targets take, to scratch memory: vector after vector."""
    lanes = lanes_of(x.at)
    if x.tile > 1:
        for c in range(piece.first, piece.last):
            store(piece.values, (c - piece.first) * lanes, 1, lanes, _slope(x, c, x.rows, r, powers))
    else:
        for c in range(piece.first, piece.last, lanes):
            store(piece.values, c - piece.first, 1, lanes, _slope(x, c, piece.last - c, r, powers))
