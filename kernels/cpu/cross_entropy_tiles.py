"""Softmax cross-entropy and its gradient in one visit, for short rows: as many of them at a time as a vector has lanes, a tile.

What a row has of its own, a target logit, a logarithm, a division, is computed for all rows of a tile at once. The gradient of a tile is
written behind the logits of the next one, and before their terms: neither waits for the other.
"""

from typing import Any

import numpy as np
from numba import njit

from .arguments import arguments
from .blocks import ROOM, block_of, four_terms, real_total
from .cross_entropy_visit import ForwardBackward, after_all_rows, before_all_rows
from .gradient import ABREAST, GAPLESS, RowNumbers, abreast, gradient_of_tile, write_zeros
from .inline import INLINE
from .launch import last_task, next_task, next_worker, raise_flag, region
from .math import exp, log
from .memory import load, load_classes, load_each, offset, store
from .prefetch import ask_for_seam
from .rows import Lanes, Walk, first_line, lanes_at, last_tile, load_at, one_row, row_at, store_at, tile_of, whole_tile
from .simd import any_lane, lane_numbers, lanes_of, larger, lowest, select, splat
from .stream import line_of, stream, stream_two
from .targets import weights_of
from .tiles import bring_tile, terms_of_tile
from .transpose import largest_of_each, sum_of_each

FEW_VECTORS = 15  # in a row: up to here rows that are taken one by one are taken in tiles
SEAMS_AHEAD = 8  # rows: a line that two rows share is asked for so long before it is written


def blocks_of_tile(way: Walk) -> int:
    """How many blocks have room for a tile of rows that are taken one by one: their terms, a vector for each and two for all of them."""
    return -(-(way.tile * (-(-way.classes // way.tile) + 1) + 2) // ROOM)


@region(ForwardBackward)
def tiles_in_turn(block: Any) -> None:
    """Rows in lanes, of one block."""
    a = arguments(block)
    way, classes = a.way, a.way.classes
    mine = block_of(a.terms, next_worker(block) * 2 * a.kept)
    theirs = block_of(mine, a.kept)
    if a.alone:
        before_all_rows(a)
    task = next_task(block)
    while task >= 0:
        begin, end = task * way.grain, last_tile(task, way)
        t = tile_of(begin, way)
        dx = _tile_at(a.dlogits, a.dstrides, t, a)
        nothing = splat(0.0, a.terms)
        y = lane_numbers(nothing)
        is_class, x_y, tops = y > -1, nothing, nothing
        r, waits = RowNumbers(nothing, y, 0, nothing, nothing), dx
        for number in range(begin, end + 1):
            if number < end:
                t = tile_of(number, way)
                x, dx = _tile_at(a.logits, way.strides, t, a), _tile_at(a.dlogits, a.dstrides, t, a)
                y = load_classes(a.target, t.row, 1, t.rows, a.ignore_index, nothing)
                is_class = (y > -1) & (y < classes)
                if a.layout == ABREAST and t.rows == lanes_of(nothing):
                    tops = bring_tile(whole_tile(x, 1), 0, classes, mine)
                else:
                    tops = bring_tile(x, 0, classes, mine)
            if number > begin:
                gradient_of_tile(waits, classes, theirs, r, a.past_caches)
            if number < end:
                x_y = load_each(mine, 1, y, lanes_of(nothing), is_class)
                totals = real_total(terms_of_tile(dx, classes, mine, tops))
                if any_lane((y < -1) | (y > classes - 1)):
                    raise_flag(block)
                r, waits = see_tile(a, t, y, x_y, tops, totals), dx
                mine, theirs = theirs, mine
        if last_task(block) and a.alone:
            after_all_rows(a)
        task = next_task(block)


@region(ForwardBackward)
def short_rows_in_turn(block: Any) -> None:
    """Rows one by one, of consecutive classes, a few vectors each. No branch asks where a target lies: nobody could predict it."""
    a = arguments(block)
    way, classes, lanes = a.way, a.way.classes, lanes_of(a.terms)
    apart = (classes + lanes - 1) // lanes * lanes  # from the terms of a row to those of the next one
    mine = block_of(a.terms, next_worker(block) * 2 * a.kept)
    theirs = block_of(mine, a.kept)
    if a.alone:
        before_all_rows(a)
    task = next_task(block)
    while task >= 0:
        begin, end = task * way.grain, last_tile(task, way)
        t = before = tile_of(begin, way)
        nothing = splat(0.0, a.terms)
        y = lane_numbers(nothing)
        is_class, x_y, tops = y > -1, nothing, nothing
        for number in range(begin, end + 1):
            rows, waiting = 0, before.rows if number > begin else 0
            # behind the terms of a tile: a vector for each of its rows, then their numbers: tops, and later g and scale
            folded, tops_at, numbers = offset(mine, lanes * apart), lanes * (apart + lanes), offset(theirs, lanes * (apart + lanes))
            if number < end:
                t = tile_of(number, way)
                rows = t.rows
            x, dx = row_at(a.logits, way.strides, t.b, t.p), row_at(a.dlogits, a.dstrides, before.b, before.p)
            if number < end:
                y = load_classes(a.target, t.row, 1, rows, a.ignore_index, nothing)
                is_class = (y > -1) & (y < classes)
                for i in range(rows):
                    store(folded, i * lanes, 1, lanes, _largest(one_row(offset(x, i * way.strides.lane)), classes))
                tops = largest_of_each(folded, 0)
                x_y = load_each(x, way.strides.lane, y, 1, is_class)
                store(mine, tops_at, 1, lanes, tops)
            for i in range(max(rows, waiting)):
                if i < rows and a.target[t.row + i] != a.ignore_index:
                    top = load(mine, tops_at + i, 0, lanes, 0.0)
                    total = _terms_of_row(one_row(offset(x, i * way.strides.lane)), classes, offset(mine, i * apart), top)
                    store(folded, i * lanes, 1, lanes, total)
                if i < waiting:
                    row, y_row = one_row(offset(dx, i * a.dstrides.lane)), a.target[before.row + i]
                    if y_row == a.ignore_index:
                        write_zeros(row, 0, classes, a.past_caches)
                    else:
                        g, scale = load(numbers, i, 0, lanes, 0.0), load(numbers, lanes + i, 0, lanes, 0.0)
                        _gradient_of_row(row, classes, offset(theirs, i * apart), y_row, g, scale, a.past_caches)
            if number < end:
                if any_lane((y < -1) | (y > classes - 1)):
                    raise_flag(block)
                r = see_tile(a, t, y, x_y, tops, real_total(sum_of_each(folded, 0)))
                store(mine, tops_at, 1, lanes, r.g)
                store(mine, tops_at + lanes, 1, lanes, r.scale)
                before, mine, theirs = t, theirs, mine
        if last_task(block) and a.alone:
            after_all_rows(a)
        task = next_task(block)


@njit(**INLINE)
def _largest(x: Any, classes: Any) -> Any:
    """The largest logits of a row, for each lane."""
    lanes, top, c = lanes_of(x.at), lowest(x.at), 0
    while c + 4 * lanes <= classes:
        two = larger(load_at(x, c, lanes, -np.inf), load_at(x, c + lanes, lanes, -np.inf))
        top = larger(larger(top, two), larger(load_at(x, c + 2 * lanes, lanes, -np.inf), load_at(x, c + 3 * lanes, lanes, -np.inf)))
        c += 4 * lanes
    while c < classes:
        top = larger(top, load_at(x, c, classes - c, -np.inf))
        c += lanes
    return top


@njit(**INLINE)
def _terms_of_row(x: Any, classes: Any, terms: Any, top: Any) -> Any:
    """The terms of a row, and for each lane their sum, as `row_statistics` has them."""
    lanes, total, c = lanes_of(x.at), splat(0.0, x.at), 0
    while c + 4 * lanes <= classes:
        four, _ = four_terms(x, top, top, c, terms, c)
        total, c = total + four, c + 4 * lanes
    while c < classes:
        e = exp(load_at(x, c, classes - c, -np.inf) - top)
        store(terms, c, 1, lanes, e)
        total = total + e
        c += lanes
    return total


@njit(**INLINE)
def _gradient_of_row(dx: Any, classes: Any, terms: Any, y: Any, g: Any, scale: Any, past_caches: Any) -> None:
    lanes = lanes_of(dx.at)
    line, c = line_of(dx.at), first_line(dx.at, 0, classes, past_caches)
    ask_for_seam(dx.at, SEAMS_AHEAD * classes, past_caches)
    _through_caches(dx, terms, 0, c, y, g, scale)
    left = lane_numbers(g) - (y - c)  # 0 at the target
    while c + 4 * lanes <= classes:
        d, e = _of_classes(terms, c, left == 0, g, scale), _of_classes(terms, c + lanes, left == -lanes, g, scale)
        stream_two(dx.at, c, d, e, past_caches)
        d = _of_classes(terms, c + 2 * lanes, left == -2 * lanes, g, scale)
        e = _of_classes(terms, c + 3 * lanes, left == -3 * lanes, g, scale)
        stream_two(dx.at, c + 2 * lanes, d, e, past_caches)
        c, left = c + 4 * lanes, left + 4 * lanes
    while c + line <= classes:
        for i in range(0, line, lanes):
            stream(dx.at, c + i, _of_classes(terms, c + i, left == 0 - i, g, scale), past_caches)
        c, left = c + line, left + line
    _through_caches(dx, terms, c, classes, y, g, scale)


@njit(**INLINE)
def _through_caches(dx: Any, terms: Any, c: Any, stop: Any, y: Any, g: Any, scale: Any) -> None:
    """The gradient of classes c .. stop - 1, which do not fill a line."""
    lanes = lanes_of(dx.at)
    while c < stop:
        n = min(lanes, stop - c)
        store_at(dx, c, n, _of_classes(terms, c, lane_numbers(g) == y - c, g, scale))
        c += n


@njit(**INLINE)
def _of_classes(terms: Any, c: Any, here: Any, g: Any, scale: Any) -> Any:
    """The gradient of a vector of classes from c on, one of which may be the target."""
    d = load(terms, c, 1, lanes_of(terms), 0.0) * scale
    return select(here, d - g, d)


@njit(**INLINE)
def _tile_at(pointer: Any, strides: Any, t: Any, a: Any) -> Any:
    """What the layout says of its strides is known to the compiler."""
    x = lanes_at(pointer, strides, t, a.way)
    if a.layout == ABREAST:
        return abreast(x)
    return Lanes(x.at, 1, x.lane, x.tile, x.rows) if a.layout == GAPLESS else x


@njit(**INLINE)
def see_tile(a: Any, t: Any, y: Any, x_y: Any, tops: Any, totals: Any) -> Any:
    """Write the losses of the rows of a tile, and what a backward wants of them; give what their gradient wants."""
    is_class = (y > -1) & (y < a.way.classes)
    weights = weights_of(a.weight, a.weight_stride, y, a.way.classes)
    tops, totals = select(is_class, tops, 0.0), select(is_class, totals, 1.0)
    store(a.rows.row_weight, t.row, 1, t.rows, weights)
    store(a.rows.top, t.row, 1, t.rows, tops)
    store(a.rows.total, t.row, 1, t.rows, totals)
    store(a.loss, t.row, 1, t.rows, weights * (log(totals) - (x_y - tops)))
    g = load(a.dloss, t.row * a.dloss_stride, a.dloss_stride, t.rows, 0.0) * weights
    return RowNumbers(tops, y, 0, g, g / totals)
