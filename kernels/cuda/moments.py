"""What one visit to the logits says of their softmax: beside `top` and `total` (here of z = scale x) two moments,

    gap = sum e^(z - top) (z - top)        squares = sum e^(2 (z - top))

so that entropy = log total - gap / total, whose terms all have one sign, and sum p^2 = squares / total^2; and the first class with the
largest logit. Device code: `a` is a kernel's block of arguments. What `a.answers` does not want stays 0 and costs nothing.
"""

import triton
import triton.language as tl

from .math import _exp, _lowest, _wide
from .rows import _body_of, _lanes_at, _no_statistics

_NEVER = tl.constexpr(-1000.0)  # e^_NEVER is 0, and 0 times _NEVER too, which 0 times -inf is not
_NO_CLASS = tl.constexpr((1 << 31) - 1)


@triton.jit
def _not_endless(z):
    """-inf made finite; NaN stays."""
    return tl.maximum(z, _NEVER, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _powers(a, z):
    """z <= 0 and e^z."""
    if a.answers.entropy is not None:
        z = _not_endless(z)
    return z, _exp(z)


@triton.jit
def _no_moments(shape: tl.constexpr, dtype: tl.constexpr):
    """Of no class at all: top, total, gap, squares."""
    tops, totals = _no_statistics(shape, dtype)
    return tops, totals, tl.zeros(shape, dtype), tl.zeros(shape, dtype)


@triton.jit
def _see_moments(a, tops, totals, gaps, squares, x, scale):
    """The moments of every lane after one more logit. As in `_see`, one exp serves a new top and a new term."""
    higher = x > tops
    z, e = _powers(a, -tl.abs(x - tops) * scale)
    if a.answers.entropy is not None:
        gaps = tl.where(higher, e * (gaps + z * totals), gaps + e * z)
    if a.answers.sum_sq_prob is not None:
        squares = tl.where(higher, squares * (e * e) + 1.0, squares + e * e)
    totals = tl.where(higher, totals * e + 1.0, totals + e)
    return tl.where(higher, x, tops), totals, gaps, squares


@triton.jit
def _see_more_moments(a, tops, totals, gaps, squares, x, x2, scale, axis: tl.constexpr):
    """The moments after the logits along an axis of x and x2, all of them of one lane: see `_see_vectors`."""
    joint = tl.maximum(tops, tl.maximum(tl.max(x, axis), tl.max(x2, axis)))
    z, e = _powers(a, (x - tl.expand_dims(joint, axis)) * scale)
    z2, e2 = _powers(a, (x2 - tl.expand_dims(joint, axis)) * scale)
    rise, risen = _powers(a, (tops - joint) * scale)
    if a.answers.entropy is not None:
        gaps = risen * (gaps + rise * totals) + (tl.sum(e * z, axis) + tl.sum(e2 * z2, axis))
    if a.answers.sum_sq_prob is not None:
        squares = risen * risen * squares + (tl.sum(e * e, axis) + tl.sum(e2 * e2, axis))
    return joint, totals * risen + (tl.sum(e, axis) + tl.sum(e2, axis)), gaps, squares


@triton.jit
def _merge_moments(a, tops, totals, gaps, squares, scale, axis: tl.constexpr):
    """The moments of all lanes along an axis taken together."""
    top = tl.max(tops, axis)
    rise, risen = _powers(a, (tops - tl.expand_dims(top, axis)) * scale)
    gap, square = tl.sum(gaps, axis), tl.sum(squares, axis)
    if a.answers.entropy is not None:
        gap = tl.sum(risen * (gaps + rise * totals), axis)
    if a.answers.sum_sq_prob is not None:
        square = tl.sum(risen * risen * squares, axis)
    return top, tl.sum(risen * totals, axis), gap, square


@triton.jit
def _row_moments(a, start, C, scale, VEC: tl.constexpr, BLOCK_C: tl.constexpr):
    """The moments and the largest of C classes that lie side by side from offset `start`."""
    LANES: tl.constexpr = BLOCK_C // (2 * VEC)
    head, vectors, first = _body_of(start, C, VEC)
    lane = tl.arange(0, LANES)
    e = tl.arange(0, VEC)
    offset = lane[:, None] * VEC + e[None, :]
    body_ptr = a.logits + first
    # edges
    last = head + vectors * VEC + e
    before = _wide(tl.load(a.logits + start + e, mask=e < head, other=float("-inf")))
    behind = _wide(tl.load(a.logits + start + last, mask=last < C, other=float("-inf")))
    # whole blocks, then the rest: a mask in every step would cost an instruction for each logit
    tops, totals, gaps, squares = _no_moments([LANES], before.dtype)
    found = tl.zeros([LANES], tl.int32)  # the step in which a lane met its top
    whole = vectors // (2 * LANES) * (2 * LANES)
    for v in tl.range(0, whole, 2 * LANES):
        x = _wide(tl.load(body_ptr + (v * VEC + offset)))
        x2 = _wide(tl.load(body_ptr + (v * VEC + offset) + LANES * VEC))
        old = tops
        tops, totals, gaps, squares = _see_more_moments(a, tops, totals, gaps, squares, x, x2, scale, 1)
        if a.answers.argmax is not None:
            found = tl.where(tops > old, v, found)
    if whole < vectors:
        x = _wide(tl.load(body_ptr + (whole * VEC + offset), mask=(whole + lane < vectors)[:, None], other=float("-inf")))
        inside = (whole + LANES + lane < vectors)[:, None]
        x2 = _wide(tl.load(body_ptr + (whole * VEC + offset) + LANES * VEC, mask=inside, other=float("-inf")))
        old = tops
        tops, totals, gaps, squares = _see_more_moments(a, tops, totals, gaps, squares, x, x2, scale, 1)
        if a.answers.argmax is not None:
            found = tl.where(tops > old, whole, found)
    # merge
    top, total, gap, square = _merge_moments(a, tops, totals, gaps, squares, scale, 0)
    top, total, gap, square = _see_more_moments(a, top, total, gap, square, before, behind, scale, 0)
    # largest: one more look at what the lanes with the top saw in that step. None, if the top is where all lanes began
    largest = tl.full([], _NO_CLASS, tl.int32)
    if a.answers.argmax is not None:
        largest = tl.min(tl.minimum(_classes_with(before, top, e), _classes_with(behind, top, last)), 0)
        step = found[:, None] * VEC + offset
        there = (tops == top)[:, None] & (step < vectors * VEC)
        x = _wide(tl.load(body_ptr + step, mask=there, other=float("nan")))
        there = there & (step + LANES * VEC < vectors * VEC)
        x2 = _wide(tl.load(body_ptr + step + LANES * VEC, mask=there, other=float("nan")))
        c = tl.minimum(_classes_with(x, top, head + step), _classes_with(x2, top, head + step + LANES * VEC))
        largest = tl.where(top > _lowest(top.dtype), tl.minimum(largest, tl.min(tl.min(c, 1), 0)), _NO_CLASS)
    return top, total, gap, square, largest


@triton.jit
def _classes_with(x, top, c):
    """c where x is the top."""
    return tl.where(x == top, c, _NO_CLASS)


@triton.jit
def _look_again(a, place, top, BLOCK_C: tl.constexpr):
    """The first class that is NaN and the first that holds the top: a second visit, for rows of which the first did not say it."""
    b, p, row, inside = place
    odd = tl.full(row.shape, _NO_CLASS, tl.int32)
    largest = tl.full(row.shape, _NO_CLASS, tl.int32)
    for first in tl.range(0, a.way.classes, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        lanes = inside[:, None] & (c < a.way.classes)[None, :]
        x = _wide(tl.load(_lanes_at(a.logits, a.way.strides, b, p, c), mask=lanes, other=float("-inf")))
        odd = tl.minimum(odd, tl.min(tl.where(x != x, c[None, :], _NO_CLASS), 1))
        largest = tl.minimum(largest, tl.min(tl.where(lanes, _classes_with(x, top[:, None], c[None, :]), _NO_CLASS), 1))
    return odd, largest
