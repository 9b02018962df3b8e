"""Where a program's rows lie, and what is learned from one visit to them. Device code shared by the kernels.
`a` is a kernel's block of arguments.

`top` starts at the lowest finite number: exp(-inf - top) is then 0, also in a block of nothing but -inf. A row with +inf ends with
a `total` of NaN, because the lane that met it is scaled by exp(inf - inf) when the lanes are merged.
"""

import triton
import triton.language as tl

from .math import _exp, _lowest, _wide


@triton.jit
def _row_of(row, P, strides):
    """The offset of a row's first class. Divided in int32: `row` and P fit."""
    return (row // P).to(tl.int64) * strides.batch + (row % P).to(tl.int64) * strides.position


@triton.jit
def _blocks_of(n, BLOCK: tl.constexpr):
    """How many blocks hold n > 0: tl.cdiv, whose sum would overflow where n is near 2**31."""
    return (n - 1) // BLOCK + 1


@triton.jit
def _tile_of(number, P, BLOCK_N: tl.constexpr):
    """A tile's batch entry [], positions [BLOCK_N], rows [BLOCK_N], and which of these exist."""
    tiles = _blocks_of(P, BLOCK_N)
    b = (number // tiles).to(tl.int64)
    p = number % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    return b, p.to(tl.int64), b * P + p, p < P


@triton.jit
def _lanes_at(ptr, strides, b, p, c):
    """Pointers [BLOCK_N, BLOCK_C] to classes c of positions p."""
    return ptr + b * strides.batch + p[:, None] * strides.position + c.to(tl.int64)[None, :] * strides.class_


@triton.jit
def _weight_of(a, y, is_class):
    """w_y. Outside [0, C) a target is no index: its weight, and with it the loss, is NaN."""
    if a.weight_stride is None:
        w_y = tl.where(is_class, tl.load(a.weight), float("nan"))
    else:
        w_y = tl.load(a.weight + y * a.weight_stride, mask=is_class, other=float("nan"))
    return w_y


@triton.jit
def _no_statistics(shape: tl.constexpr, dtype: tl.constexpr):
    return tl.full(shape, _lowest(dtype), dtype), tl.zeros(shape, dtype)


@triton.jit
def _see(top, total, x):
    """The statistics of every lane after one more logit. One exp serves both cases: the old sum is scaled to a new top, or the new
    term to the old top."""
    higher = x > top
    e = _exp(-tl.abs(x - top))
    total = tl.where(higher, total * e + 1.0, total + e)
    return tl.where(higher, x, top), total


@triton.jit
def _see_vectors(top, total, x, x2):
    """The statistics [R] of R lanes after 2 VEC more logits each, x and x2 [R, VEC]. The VEC lie in one thread, so threads exchange
    nothing, and there is one exp for each logit and one more for each lane."""
    joint = tl.maximum(top, tl.maximum(tl.max(x, 1), tl.max(x2, 1)))
    terms = tl.sum(_exp(x - joint[:, None]), 1) + tl.sum(_exp(x2 - joint[:, None]), 1)
    return joint, total * _exp(top - joint) + terms


@triton.jit
def _merge(tops, totals, axis: tl.constexpr):
    """The statistics of all lanes along an axis taken together."""
    top = tl.max(tops, axis)
    return top, tl.sum(totals * _exp(tops - tl.expand_dims(top, axis)), axis)


@triton.jit
def _first_vector(start, VEC: tl.constexpr):
    """The offset of the first aligned vector of a row, as a product, so that the compiler sees its alignment wherever the row starts."""
    return (start + (VEC - 1)) // VEC * VEC


@triton.jit
def _body_of(start, C, VEC: tl.constexpr):
    """Of C classes from offset `start`: those before the first aligned vector, whole vectors, and the offset of the first vector."""
    first = _first_vector(start, VEC)
    head = tl.minimum((first - start).to(tl.int32), C)
    return head, (C - head) // VEC, first


@triton.jit
def _lanes_of_vectors(LANES: tl.constexpr, VEC: tl.constexpr):
    """The numbers of so many vectors [LANES], and where their classes lie behind the first [LANES, VEC]."""
    lane = tl.arange(0, LANES)
    return lane, lane[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def _edges_of(head, vectors, C, VEC: tl.constexpr):
    """The classes [2 VEC] on either side of the whole vectors, and which of these exist."""
    e = tl.arange(0, 2 * VEC)
    c = tl.where(e < VEC, e, head + vectors * VEC + e - VEC)
    return c, tl.where(e < VEC, e < head, c < C)


@triton.jit
def _row_statistics(logits_ptr, start, C, VEC: tl.constexpr, BLOCK_C: tl.constexpr):
    """`top` and `total` of C classes that lie side by side from offset `start`."""
    LANES: tl.constexpr = BLOCK_C // (2 * VEC)
    head, vectors, first = _body_of(start, C, VEC)
    lane, offset = _lanes_of_vectors(LANES, VEC)
    body_ptr = logits_ptr + first
    # edges
    c, at_edge = _edges_of(head, vectors, C, VEC)
    edges = _wide(tl.load(logits_ptr + start + c, mask=at_edge, other=float("-inf")))
    tops, totals = _no_statistics([LANES], edges.dtype)
    # whole blocks, then the rest: a mask in every step would cost an instruction for each logit
    whole = vectors // (2 * LANES) * (2 * LANES)
    for v in tl.range(0, whole, 2 * LANES):
        x = tl.load(body_ptr + (v * VEC + offset))
        x2 = tl.load(body_ptr + (v * VEC + offset) + LANES * VEC)
        tops, totals = _see_vectors(tops, totals, _wide(x), _wide(x2))
    if whole < vectors:
        x = tl.load(body_ptr + (whole * VEC + offset), mask=(whole + lane < vectors)[:, None], other=float("-inf"))
        x2 = tl.load(body_ptr + (whole * VEC + offset) + LANES * VEC, mask=(whole + LANES + lane < vectors)[:, None], other=float("-inf"))
        tops, totals = _see_vectors(tops, totals, _wide(x), _wide(x2))
    # merge
    top, total = _merge(tops, totals, 0)
    joint = tl.maximum(top, tl.max(edges, 0))
    return joint, total * _exp(top - joint) + tl.sum(_exp(edges - joint), 0)
