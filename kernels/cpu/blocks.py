"""A row block by block: the largest logit of a block, its terms exp(x - reference), and their sum, about the top.

The reference is a number that is not far below the top and known before it; where lanes are rows, and in a block that is not whole, it is
the top. The logits come from memory once. The terms stay in scratch memory, each thread's own, so that no exp is computed twice: the
gradient, the probabilities are a term times a number of the block. A kernel that needs them when the whole row has been seen keeps those
of every block (`keep` = 1); else each block's take the place of the last one's (`keep` = 0). Terms, references, tops and totals have the
same bits in every kernel, so it does not matter to a gradient which kernel wrote it.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .arguments import COMPUTED
from .inline import INLINE
from .math import exp
from .memory import load, offset, store
from .prefetch import prefetch, prefetch_four
from .rows import Strides, Walk, lanes_for, load_at, one_row, whole_tile
from .simd import first_lane, fma, lane_max, lane_sum, lanes_of, larger, lowest, select, splat
from .tiles import bring_tile, terms_of_tile

BLOCK = 128  # vectors: 8 KB of float32, so that a block, the next one and its terms fit the first-level cache
ROOM = BLOCK + 1  # vectors of scratch for a block: its terms, its reference
_CPU = torch.device("cpu")
KEPT_BYTES = 1 << 20  # scratch for a whole row: more would leave the second-level cache
FIRST = 8  # vectors of a block whose largest logit its terms are relative to
MANY = 32  # vectors of a block for which that pays; the top of a smaller one is looked for beforehand
FAR = 24.0  # so much above that, a top takes its place: exp does not overflow, and what is lost below is e**-63 of a row's largest


def blocks_in(way: Walk, logits: Tensor) -> int:
    """How many blocks a row has, or a tile of rows."""
    return max(1, -(-way.classes // (BLOCK if way.tile > 1 else BLOCK * lanes_for(logits))))


def blocks_kept(way: Walk, logits: Tensor) -> int:
    """How many blocks to have room for so that the terms of a whole row are kept; 1 if that is too many."""
    blocks = blocks_in(way, logits)
    return blocks if blocks * ROOM * 64 <= KEPT_BYTES else 1


def kept_in_turn(way: Walk, kept: int, logits: Tensor, *others: Strides) -> bool:
    """Whether rows are of consecutive classes, of the logits and of the others, and their terms all kept: then a row can be written while
    the next one is read."""
    return way.tile == 1 and all(s.class_ == 1 for s in (way.strides, *others)) and kept == blocks_in(way, logits)


def blocks_apart(way: Walk, logits: Tensor) -> int:
    """How many blocks of a row to hand out one by one: all of them if there are fewer rows than threads, else 1."""
    return blocks_in(way, logits) if way.tile == 1 and way.batch * way.positions < torch.get_num_threads() else 1


def scratch(blocks: int, logits: Tensor) -> Tensor:
    """Room for so many blocks for each thread."""
    return torch.empty(torch.get_num_threads() * blocks * ROOM * lanes_for(logits), dtype=COMPUTED[logits.dtype], device=_CPU)


class Block(NamedTuple):
    """Some classes of a row, or of a tile of rows, and what its terms are to be had from."""

    first: int
    last: int  # one past it
    reference: Any  # what its terms are relative to
    terms: Any  # scratch memory
    kept: int  # 1 if the terms are there, 0 if they are computed again from the logits


@njit(**INLINE)
def block_of(terms: Any, number: Any) -> Any:
    """The scratch of one block."""
    return offset(terms, number * ROOM * lanes_of(terms))


@njit(**INLINE)
def block_size(terms: Any, tile: Any) -> Any:
    """Classes in a block."""
    return BLOCK if tile > 1 else BLOCK * lanes_of(terms)


@njit(**INLINE)
def all_kept(terms: Any, kept: Any, way: Any) -> Any:
    """1 if there is room for all blocks of a row among `kept`, else 0: what `keep` is in a kernel that wants all of them."""
    return 1 if kept * block_size(terms, way.tile) >= way.classes else 0


@njit(**INLINE)
def _top(x: Any, first: Any, last: Any) -> Any:
    step, n = (1, x.rows) if x.tile > 1 else (lanes_of(x.at), lanes_of(x.at))
    top, c = lowest(x.at), first
    while c + 4 * step <= last:
        x0, x1 = load_at(x, c, n, -np.inf), load_at(x, c + step, n, -np.inf)
        x2, x3 = load_at(x, c + 2 * step, n, -np.inf), load_at(x, c + 3 * step, n, -np.inf)
        top = larger(larger(top, larger(x0, x1)), larger(x2, x3))
        c += 4 * step
    while c < last:
        top = larger(top, load_at(x, c, x.rows if x.tile > 1 else last - c, -np.inf))
        c += step
    return top if x.tile > 1 else splat(lane_max(top), x.at)


@njit(**INLINE)
def _statistics(x: Any, first: Any, last: Any, terms: Any) -> Any:
    lanes, reference = lanes_of(x.at), first_reference(x, first, last)
    top, total, c = splat(reference, x.at), splat(0.0, x.at), first
    while c + 4 * lanes <= last:
        four, top = four_terms(x, reference, top, c, terms, c - first)
        total, c = total + four, c + 4 * lanes
    top, total = sum_with_rest(x, reference, top, total, first, c, last, terms)
    return top, settled(x, reference, top, total, first, last, terms)


@njit(**INLINE)
def ahead_of_top(x: Any, first: Any, last: Any) -> Any:
    """Whether the terms of a block of one row are made before its top is known."""
    return last - first >= MANY * lanes_of(x.at)


@njit(**INLINE)
def first_reference(x: Any, first: Any, last: Any) -> Any:
    """What the terms of a block of one row are relative to, unless its top proves to be far from it: the largest of its first logits, or
    the top."""
    return first_lane(_top(x, first, first + FIRST * lanes_of(x.at) if ahead_of_top(x, first, last) else last))


@njit(**INLINE)
def reference_below(x: Any, first: Any, last: Any, top: Any) -> Any:
    """What they are relative to where the top is known."""
    if ahead_of_top(x, first, last):
        reference = first_reference(x, first, last)
        if not _is_far(top, reference):
            return reference
    return top


@njit(**INLINE)
def settled(x: Any, reference: Any, top: Any, total: Any, first: Any, last: Any, terms: Any) -> Any:
    """The total of a block of one row, whose terms are relative to `reference` and have this sum. Where its top is far from that, terms and
    sum are made again, relative to the top. Of what they are relative to, a note is left for the gradient."""
    if _is_far(first_lane(top), reference):
        reference = first_lane(top)
        top, total = sum_with_rest(x, reference, top, splat(0.0, x.at), first, first, last, terms)
    keep_reference(terms, splat(reference, x.at))
    # at least 1: the term of the top is in the sum as it is here
    return total / exp(top - reference) if ahead_of_top(x, first, last) else total


@njit(**INLINE)
def _is_far(top: Any, reference: Any) -> Any:
    return top - reference > FAR


@njit(**INLINE)
def _statistics_of_tile(x: Any, first: Any, last: Any, terms: Any) -> Any:
    top = bring_tile(x, first, last, terms)
    keep_reference(terms, top)
    return top, terms_of_tile(x, last - first, terms, top)


@njit(**INLINE)
def four_terms(x: Any, reference: Any, top: Any, c: Any, terms: Any, at: Any) -> Any:
    """The terms of four vectors of one row from class c on, written to `terms` from element `at` on: their sum, and the larger of `top`
    and the logits in each lane."""
    lanes = lanes_of(x.at)
    prefetch_four(x.at, c * x.class_)
    x0, x1 = load_at(x, c, lanes, -np.inf), load_at(x, c + lanes, lanes, -np.inf)
    e0, e1 = exp(x0 - reference), exp(x1 - reference)
    top = larger(top, larger(x0, x1))
    store(terms, at, 1, lanes, e0)
    store(terms, at + lanes, 1, lanes, e1)
    two = e0 + e1  # stored before the others are loaded, which no compiler may do for us: AVX2 has registers for two
    x2, x3 = load_at(x, c + 2 * lanes, lanes, -np.inf), load_at(x, c + 3 * lanes, lanes, -np.inf)
    e2, e3 = exp(x2 - reference), exp(x3 - reference)
    top = larger(top, larger(x2, x3))
    store(terms, at + 2 * lanes, 1, lanes, e2)
    store(terms, at + 3 * lanes, 1, lanes, e3)
    return two + (e2 + e3), top


@njit(**INLINE)
def sum_with_rest(x: Any, reference: Any, top: Any, total: Any, first: Any, c: Any, last: Any, terms: Any) -> Any:
    """`top` and `total` of one row with classes c .. last - 1, fewer than four vectors, and of all lanes taken together."""
    lanes = lanes_of(x.at)
    while c < last:
        logits = load_at(x, c, last - c, -np.inf)
        e = exp(logits - reference)
        store(terms, c - first, 1, lanes, e)
        top, total, c = larger(top, logits), total + e, c + lanes
    return splat(lane_max(top), x.at), splat(lane_sum(total), x.at)


@njit(**INLINE)
def block_statistics(x: Any, first: Any, last: Any, terms: Any) -> Any:
    """`top` and `total` of classes first .. last - 1, the largest logit and the sum of exp(x - top): of the rows in the lanes, or of the
    one row, in every lane. The terms are written to `terms`, vector after vector, and behind them what they are relative to."""
    if x.tile == 1 and x.class_ == 1:
        return _statistics(one_row(x.at), first, last, terms)
    if x.tile > 1:
        if x.rows == lanes_of(x.at) and x.lane == 1:
            return _statistics_of_tile(whole_tile(x, 1), first, last, terms)
        return _statistics_of_tile(x, first, last, terms)
    return _statistics(x, first, last, terms)


@njit(**INLINE)
def merge(top: Any, total: Any, top2: Any, total2: Any) -> Any:
    """The statistics of two disjoint sets of classes taken together."""
    joint = larger(top, top2)
    return joint, fma(total, exp(top - joint), total2 * exp(top2 - joint))


@njit(**INLINE)
def real_total(total: Any) -> Any:
    """NaN where a row was all -inf: every other has its largest term, 1, in the sum."""
    return select(total > 0.5, total, np.nan)


@njit(**INLINE)
def row_statistics(x: Any, classes: Any, terms: Any, keep: Any) -> Any:
    """`top` and `total` of the rows in the lanes, or of one row, block by block in order."""
    size = block_size(terms, x.tile)
    top, total = block_statistics(x, 0, min(classes, size), terms)
    for first in range(size, classes, size):
        block = block_statistics(x, first, min(classes, first + size), block_of(terms, first // size * keep))
        top, total = merge(top, total, *block)
    return top, real_total(total)


@njit(**INLINE)
def block_top(x: Any, first: Any, last: Any) -> Any:
    """`top` alone, as `block_statistics` has it."""
    if x.tile == 1 and x.class_ == 1:
        return _top(one_row(x.at), first, last)
    if x.tile > 1 and x.rows == lanes_of(x.at):
        if x.lane == 1:
            return _top(whole_tile(x, 1), first, last)
        return _top(whole_tile(x, x.lane), first, last)
    return _top(x, first, last)


@njit(**INLINE)
def relative(terms: Any, tile: Any, classes: Any) -> Any:
    """Whether terms are relative to another number than the row's top."""
    return classes >= (BLOCK if tile > 1 else MANY * lanes_of(terms))


@njit(**INLINE)
def block_reference(x: Any, first: Any, last: Any, row_top: Any) -> Any:
    """What the terms of a block of a row with this top are relative to, from the logits."""
    if x.tile > 1:
        return block_top(x, first, last)
    if x.class_ == 1:
        return _reference(one_row(x.at), first, last, row_top)
    return _reference(x, first, last, row_top)


@njit(**INLINE)
def _reference(x: Any, first: Any, last: Any, row_top: Any) -> Any:
    reference = first_reference(x, first, last)
    if _is_far(first_lane(row_top), reference):  # and so perhaps the block's own top
        reference = reference_below(x, first, last, first_lane(_top(x, first, last)))
    return splat(reference, x.at)


@njit(**INLINE)
def keep_reference(terms: Any, reference: Any) -> None:
    """Write it behind the terms of a block."""
    store(terms, BLOCK * lanes_of(terms), 1, lanes_of(terms), reference)


@njit(**INLINE)
def kept_reference(terms: Any) -> Any:
    """What the terms of a block in scratch memory are relative to."""
    return load(terms, BLOCK * lanes_of(terms), 1, lanes_of(terms), 0.0)


@njit(**INLINE)
def term(x: Any, block: Any, c: Any, n: Any) -> Any:
    """The terms of the n classes from c on, or of class c of n rows in the lanes: from scratch memory or again from the logits, to the
    same bits."""
    lanes = lanes_of(x.at)
    if block.kept:
        return load(block.terms, (c - block.first) * lanes if x.tile > 1 else c - block.first, 1, lanes if x.tile > 1 else n, 0.0)
    if x.tile == 1:
        prefetch(x.at, c * x.class_)
    return exp(load_at(x, c, n, 0.0) - block.reference)
