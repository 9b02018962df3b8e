"""The gradient of rows with class indices as targets: scale exp(x - top), less g at the target."""

from typing import Any, NamedTuple

from numba import njit
from numba.extending import overload

from .blocks import Block, block_of, block_reference, block_size, kept_reference, relative, term
from .inline import INLINE
from .math import exp
from .memory import load, load_classes, store
from .prefetch import ask_for_seam
from .rows import (
    SHORT_ROW,
    Lanes,
    Strides,
    Walk,
    advance,
    fills_lines,
    first_line,
    first_vector,
    load_numbers,
    one_row,
    store_at,
    whole_tile,
)
from .simd import lane_numbers, lanes_of, pick, select, splat
from .stream import line_of, stream, stream_two
from .targets import less_at
from .transpose import turn_out

GAPLESS, ABREAST, IN_ROWS = 1, 2, 3  # see `layout_of`; a tile of rows that are taken one by one


class RowNumbers(NamedTuple):
    """What a gradient wants of a row: one number for each lane, or the row's in every lane."""

    top: Any
    y: Any  # the target where the lanes are rows; -1 for one that does not count
    y_row: int  # the target where the lanes are one row
    g: Any  # dloss w_y
    scale: Any  # g / total


def gradient_of_block(x: Any, dx: Any, block: Any, factor: Any, r: Any, past_caches: Any) -> None:
    """Write the gradient of the classes of a block: whatever kind of numbers its rows have (`targets_of`), as the next two."""
    raise NotImplementedError("compiled code only")


def near(x: Any, block: Any, c: Any, n: Any, factor: Any, r: Any) -> Any:
    """The gradient of n classes of one row from c on, some of which may be targets."""
    raise NotImplementedError("compiled code only")


def any_near(r: Any, dx: Any, c: Any) -> Any:
    """Whether there may be a target in the four vectors of one row from class c on."""
    raise NotImplementedError("compiled code only")


def targets_of(kind: type, gradient: Any, near_them: Any, any_near_them: Any) -> None:
    """What `gradient_of_block`, `near` and `any_near` are where a row's numbers are of this kind."""

    @overload(gradient_of_block, jit_options=INLINE)
    def typed_gradient(x, dx, block, factor, r, past_caches):  # type: ignore[no-untyped-def]  # Numba compares this signature with the lambda's
        if getattr(r, "instance_class", None) is not kind:
            return None
        return lambda x, dx, block, factor, r, past_caches: gradient(x, dx, block, factor, r, past_caches)

    @overload(near, jit_options=INLINE)
    def typed_near(x, block, c, n, factor, r):  # type: ignore[no-untyped-def]
        if getattr(r, "instance_class", None) is not kind:
            return None
        return lambda x, block, c, n, factor, r: near_them(x, block, c, n, factor, r)

    @overload(any_near, jit_options=INLINE)
    def typed_any_near(r, dx, c):  # type: ignore[no-untyped-def]
        return (lambda r, dx, c: any_near_them(r, dx, c)) if getattr(r, "instance_class", None) is kind else None


def layout_of(way: Walk, dstrides: Strides) -> int:
    """How rows in lanes lie, logits and gradients: short and GAPLESS, one after the other in one piece of memory; ABREAST, side by side; or
    anyhow (0). A loop for one of these, alone in its region, keeps the constants of exp in registers."""
    strides = way.strides
    if way.tile > 1 and strides.lane == dstrides.lane == 1:
        return ABREAST
    gapless = strides.class_ == dstrides.class_ == 1 and strides.lane == dstrides.lane == way.classes
    return GAPLESS if way.tile > 1 and way.classes <= SHORT_ROW and gapless else 0


@njit(**INLINE)
def abreast(x: Any) -> Any:
    """The same tile, whose rows lie side by side."""
    return Lanes(x.at, x.class_, 1, x.tile, x.rows)


@njit(**INLINE)
def gradient_of_row(x: Any, dx: Any, begin: Any, end: Any, classes: Any, terms: Any, kept: Any, r: Any, past_caches: Any) -> None:
    """dlogits of classes begin .. end - 1, whole blocks: scale exp(x - top), less what the targets take. `terms` has the terms of all
    blocks (`kept` = 1), or none (0)."""
    size = block_size(terms, x.tile)
    for first in range(begin, end, size):
        last = min(end, first + size)
        mine, reference, factor = terms, r.top, r.scale  # the top of all rows in the lanes, if there is but one block
        if kept:
            mine = block_of(terms, first // size)
        if relative(terms, x.tile, classes):
            reference = kept_reference(mine) if kept else block_reference(x, first, last, r.top)
            factor = exp(reference - r.top) * r.scale
        if kept:
            gradient_of_block(x, dx, Block(first, last, reference, mine, 1), factor, r, past_caches)
        else:
            gradient_of_block(x, dx, Block(first, last, reference, mine, 0), factor, r, past_caches)


@njit(**INLINE)
def _gradient_of_block(x: Any, dx: Any, block: Any, factor: Any, r: Any, past_caches: Any) -> None:
    """term * factor, less g at the target."""
    lanes, first, last = lanes_of(x.at), block.first, block.last
    if x.tile > 1 and x.lane == dx.lane == 1 and x.rows == lanes:
        x, past_caches = whole_tile(x, 1), past_caches if fills_lines(dx) else 0
        fours = first + (last - first) // 4 * 4
        for c in range(first, fours, 4):
            _stream_class(x, dx, block, c, factor, r, past_caches)
            _stream_class(x, dx, block, c + 1, factor, r, past_caches)
            _stream_class(x, dx, block, c + 2, factor, r, past_caches)
            _stream_class(x, dx, block, c + 3, factor, r, past_caches)
        for c in range(fours, last):
            _stream_class(x, dx, block, c, factor, r, past_caches)
    elif x.tile > 1:
        for c in range(first, last):
            d = term(x, block, c, x.rows) * factor
            store_at(dx, c, x.rows, select(r.y > -1, select(r.y == c, d - r.g, d), 0.0))
    elif x.class_ == dx.class_ == 1:
        # whole lines, with what is left over before and behind them; the line with the target by itself
        x, dx, line = one_row(x.at), one_row(dx.at), line_of(dx.at)
        begin = first_line(dx.at, first, last, past_caches)
        end = begin + (last - begin) // line * line
        ask_for_seam(dx.at, last, past_caches)
        middle = begin + (r.y_row - begin) // line * line if begin <= r.y_row < end else end
        through_caches(x, dx, block, first, begin, factor, r)
        _stream_classes(x, dx, block, begin, middle, factor, past_caches)
        if middle < end:
            for i in range(middle, middle + line, lanes):
                stream(dx.at, i, near_target(x, block, i, lanes, factor, r), past_caches)
        _stream_classes(x, dx, block, middle + line, end, factor, past_caches)
        through_caches(x, dx, block, end, last, factor, r)
    else:
        for c in range(first, last, lanes):
            store_at(dx, c, last - c, near_target(x, block, c, last - c, factor, r))


@njit(**INLINE)
def _stream_class(x: Any, dx: Any, block: Any, c: Any, factor: Any, r: Any, past_caches: Any) -> None:
    """One class of rows that fill the lanes. Four in a row share the constants of exp, which LLVM may load again for every iteration."""
    d = term(x, block, c, x.rows) * factor
    stream(dx.at, c * dx.class_, select(r.y > -1, select(r.y == c, d - r.g, d), 0.0), past_caches)


@njit(**INLINE)
def _stream_classes(x: Any, dx: Any, block: Any, begin: Any, end: Any, factor: Any, past_caches: Any) -> None:
    """Whole lines of one row without its target, four vectors at a time for the same reason."""
    lanes, c = lanes_of(x.at), begin
    while c + 4 * lanes <= end:
        for i in range(c, c + 4 * lanes, 2 * lanes):
            stream_two(dx.at, i, term(x, block, i, lanes) * factor, term(x, block, i + lanes, lanes) * factor, past_caches)
        c += 4 * lanes
    while c < end:
        stream(dx.at, c, term(x, block, c, lanes) * factor, past_caches)
        c += lanes


@njit(**INLINE)
def through_caches(x: Any, dx: Any, block: Any, k: Any, stop: Any, factor: Any, r: Any) -> None:
    """The gradient of classes k .. stop - 1 of one row, which do not fill a line."""
    lanes = lanes_of(x.at)
    while k < stop:
        n = min(lanes, stop - k)
        store_at(dx, k, n, near(x, block, k, n, factor, r))
        k += n


@njit(**INLINE)
def near_target(x: Any, block: Any, c: Any, n: Any, factor: Any, r: Any) -> Any:
    """The gradient of n classes of one row from c on, one of which may be the target."""
    return less_at(term(x, block, c, n) * factor, r.y_row - c, r.g)


@njit(**INLINE)
def _is_target_near(r: Any, dx: Any, c: Any) -> Any:
    return c <= r.y_row < c + 4 * lanes_of(dx.at)


targets_of(RowNumbers, _gradient_of_block, near_target, _is_target_near)


@njit(**INLINE)
def row_numbers(a: Any, factor: Any, x: Any, row: Any) -> Any:
    """The numbers of the rows at x, the first of which is `row`; g is dloss times `factor`, which is w_y where nothing else is said."""
    top = load_numbers(a.rows.top, 1, row, x, 0.0)
    across, n = (1, x.rows) if x.tile > 1 else (0, lanes_of(x.at))
    y = load_classes(a.target, row, across, n, a.ignore_index, top)
    g = load_numbers(a.dloss, a.dloss_stride, row, x, 0.0) * load_numbers(factor, 1, row, x, 0.0)
    return RowNumbers(top, y, a.target[row], g, g / load_numbers(a.rows.total, 1, row, x, 1.0))


@njit(**INLINE)
def write_zeros(dx: Any, first: Any, last: Any, past_caches: Any) -> None:
    """The gradient of one row that does not count."""
    c, n = first, first_vector(dx, first, last, past_caches)
    while c < last:
        store_at(dx, c, n, splat(0.0, dx.at))
        c, n = advance(dx, c, n, last)


@njit(**INLINE)
def gradient_of_tile(dx: Any, classes: Any, terms: Any, r: Any, past_caches: Any) -> None:
    """Rows in lanes, few enough classes for one block; their terms are in `terms`, and are overwritten."""
    lanes, counts = lanes_of(dx.at), r.y > -1
    if dx.class_ == 1 != dx.lane:
        for c in range(classes):
            store(terms, c * lanes, 1, lanes, _of_class(terms, c, counts, r.y == c, r))
        for c in range(0, classes, lanes):
            turn_out(terms, c * lanes, dx.at, c, dx.lane, dx.rows, min(lanes, classes - c))
    elif dx.lane == 1 and dx.rows == lanes:
        past, left, fours = past_caches if fills_lines(dx) else 0, r.y, classes // 4 * 4
        for c in range(0, fours, 4):  # four, for they share what LLVM loads again for every iteration
            stream(dx.at, c * dx.class_, _of_class(terms, c, counts, left == 0, r), past)
            stream(dx.at, (c + 1) * dx.class_, _of_class(terms, c + 1, counts, left == 1, r), past)
            stream(dx.at, (c + 2) * dx.class_, _of_class(terms, c + 2, counts, left == 2, r), past)
            stream(dx.at, (c + 3) * dx.class_, _of_class(terms, c + 3, counts, left == 3, r), past)
            left = left - 4
        for c in range(fours, classes):
            stream(dx.at, c * dx.class_, _of_class(terms, c, counts, r.y == c, r), past)
    else:
        for c in range(classes):
            store_at(dx, c, dx.rows, _of_class(terms, c, counts, r.y == c, r))


@njit(**INLINE)
def _of_class(terms: Any, c: Any, counts: Any, here: Any, r: Any) -> Any:
    """The gradient of class c of rows in lanes, some of which do not count, and for some of which it is the target."""
    lanes = lanes_of(terms)
    d = select(counts, load(terms, c * lanes, 1, lanes, 0.0) * r.scale, 0.0)
    return select(here, d - r.g, d)


@njit(**INLINE)
def gradient_of_short_rows(x: Any, dx: Any, classes: Any, r: Any) -> None:
    """Rows that follow one another without a gap: the lanes go over their numbers as they lie in memory, and each picks its row's."""
    lanes, numbers = lanes_of(x.at), x.rows * classes
    inverse, whole = (1 << 20) // classes + 1, numbers // lanes * lanes
    for k in range(0, whole, lanes):
        _gradient_of_numbers(x, dx, k, lanes, classes, inverse, r)
    if whole < numbers:
        _gradient_of_numbers(x, dx, whole, numbers - whole, classes, inverse, r)


@njit(**INLINE)
def _gradient_of_numbers(x: Any, dx: Any, k: Any, n: Any, classes: Any, inverse: Any, r: Any) -> None:
    number = lane_numbers(r.top) + k
    row = (number * inverse) >> 20  # number // classes, exact up to 255 classes
    prob = exp(load(x.at, k, 1, n, 0.0) - pick(r.top, row)) * pick(r.scale, row)
    y_row = pick(r.y, row)
    prob = select(y_row == number - row * classes, prob - pick(r.g, row), prob)
    store(dx.at, k, 1, n, select(y_row > -1, prob, 0.0))
