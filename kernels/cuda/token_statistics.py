"""Statistics of softmax(z), z = scale x, and their joint gradient. Of each row

    log_prob_k = (z_y_k - top) - log total      entropy = log total - gap / total      lse = top + log total
    sum_sq_prob = squares / total^2             argmax = the first class with the largest logit, or that is NaN

(see `moments`), and with the numbers alpha, beta, gamma of each row and the gradient a of log_prob (see `slope`)

    dlogits_c = scale (p_c (alpha - sum_k a_k + beta log p_c + gamma p_c) + sum of a_k over all k with y_k = c)

One visit to the logits going forward, one coming back. A row whose targets are all `ignore_index` counts for nothing; its total is 0.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..groups import Answers, Rows, Slope
from .answers import Wanted, _of_one_row, _write_answers, if_any
from .launch import device_of, launch
from .math import _wide, fp64
from .moments import _NO_CLASS, _merge_moments, _no_moments, _row_moments, _see_moments
from .plan import TILE, Strides, Walk, backward_rows, forward_rows, has_long_rows, power_of_two_from, reading_tiles, tiles, view
from .rows import _blocks_of, _body_of, _edges_of, _first_vector, _lanes_at, _lanes_of_vectors, _row_of, _tile_of
from .slope import _slope, _slope_numbers
from .targets import Targets, _counting, _taken, in_one_step


class Forward(NamedTuple):
    logits: Tensor  # [B, C, P]
    targets: Targets
    answers: Wanted  # [B * P], as `rows`; log_prob [B * P, targets.per_row]
    rows: Rows
    way: Walk


class Parts(NamedTuple):
    """The moments of the parts of a row."""

    tops: Tensor  # [B * P, splits], as the others
    totals: Tensor
    gaps: Tensor
    squares: Tensor
    largest: Tensor
    splits: int
    chunk: int  # classes in a part


class Powers(NamedTuple):
    """`Slope`, None for what has no elements."""

    alpha: Tensor
    beta: Tensor | None
    gamma: Tensor | None


class Backward(NamedTuple):
    logits: Tensor  # [B, C, P]
    targets: Targets
    rows: Rows  # [B * P], as `slope`
    slope: Powers
    dlog_prob: Tensor | None  # [B * P, targets.per_row]
    dlogits: Tensor  # [B, C, P]
    dstrides: Strides
    way: Walk


def token_statistics_forward(logits: Tensor, target: Tensor, ignore_index: int, logit_scale: float, answers: Answers, rows: Rows) -> None:
    v = view(logits.shape, logits.stride())
    a = Forward(
        logits=logits, targets=Targets(target, target.shape[1], ignore_index), answers=Wanted(*map(if_any, answers)), rows=rows, way=v.way,
    )  # fmt: skip
    if not has_long_rows(v):
        t = reading_tiles(v, device_of(logits), TILE // 4)
        sizes = {"BLOCK_N": t.BLOCK_N, "BLOCK_C": t.BLOCK_C, "BLOCK_K": in_one_step(target, t.BLOCK_N)}
        launch(_token_statistics_forward_tiles, t.programs, t.num_warps, logits, a, float(logit_scale), **sizes)
        return
    r = forward_rows(v, logits.element_size(), device_of(logits))
    sizes = {"VEC": r.VEC, "BLOCK_C": r.BLOCK_C, "BLOCK_K": in_one_step(target, 1)}
    if r.splits == 1:
        launch(_token_statistics_forward_rows, r.programs, r.num_warps, logits, a, float(logit_scale), **sizes)
        return
    tops, totals, gaps, squares = rows.top.new_empty(4, r.programs)
    parts = Parts(tops, totals, gaps, squares, rows.top.new_empty(r.programs, dtype=torch.int32), r.splits, r.chunk)
    launch(_moments_of_parts, r.programs, r.num_warps, logits, a, parts, float(logit_scale), **sizes)
    sizes = {"SPLITS": power_of_two_from(r.splits), "BLOCK_C": r.BLOCK_C, "BLOCK_K": sizes["BLOCK_K"]}
    launch(_token_statistics_forward_parts, r.rows, 4, logits, a, parts, float(logit_scale), **sizes)


def token_statistics_backward(
    logits: Tensor, target: Tensor, ignore_index: int, logit_scale: float, rows: Rows, slope: Slope, dlog_prob: Tensor, dlogits: Tensor
) -> None:
    v = view(logits.shape, logits.stride(), dlogits.stride())
    a = Backward(
        logits=logits, targets=Targets(target, target.shape[1], ignore_index), rows=rows,
        slope=Powers(slope.alpha, if_any(slope.beta), if_any(slope.gamma)), dlog_prob=if_any(dlog_prob),
        dlogits=dlogits, dstrides=v.strides[1], way=v.way,
    )  # fmt: skip
    if has_long_rows(v):
        r = backward_rows(v, logits.element_size(), device_of(logits))
        sizes = {"VEC": r.VEC, "BLOCK_C": r.BLOCK_C, "BLOCK_K": in_one_step(target, 1)}
        launch(
            _token_statistics_backward_rows, r.programs, r.num_warps, logits, a, r.splits, r.chunk, float(logit_scale), **sizes
        )  # fmt: skip
    else:
        t = tiles(v, device_of(logits))
        sizes = {"BLOCK_N": t.BLOCK_N, "BLOCK_C": t.BLOCK_C, "BLOCK_K": in_one_step(target, t.BLOCK_N)}
        launch(_token_statistics_backward_tiles, t.elementwise_programs, t.num_warps, logits, a, float(logit_scale), **sizes)


# ---------------------------------------------------------------- forward


# the scale comes by itself: Triton rounds the floats of a tuple to float32
@triton.jit
def _token_statistics_forward_rows(a, scale: "fp64", VEC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where the class stride is 1. One program: one row."""
    scale = scale.to(a.rows.top.dtype.element_ty)
    place = _tile_of(tl.program_id(0), a.way.positions, 1)
    counts = _counting(a, place[2], place[3], BLOCK_K)
    start = _row_of(tl.program_id(0), a.way.positions, a.way.strides)
    # statistics
    moments = _row_moments(a, start, tl.sum(tl.where(counts, a.way.classes, 0), 0), scale, VEC, BLOCK_C)
    _write_answers(a, place, counts, _of_one_row(moments), scale, BLOCK_C, BLOCK_K)


@triton.jit
def _moments_of_parts(a, parts, scale: "fp64", VEC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where the class stride is 1. One program: `chunk` classes of a row."""
    number = tl.program_id(0)
    row, first = number // parts.splits, number % parts.splits * parts.chunk
    place = _tile_of(row, a.way.positions, 1)
    counts = _counting(a, place[2], place[3], BLOCK_K)
    count = tl.sum(tl.where(counts, tl.minimum(parts.chunk, a.way.classes - first), 0), 0)
    start = _row_of(row, a.way.positions, a.way.strides) + first
    top, total, gap, squares, largest = _row_moments(a, start, count, scale.to(a.rows.top.dtype.element_ty), VEC, BLOCK_C)
    tl.store(parts.tops + number, top)
    tl.store(parts.totals + number, total)
    tl.store(parts.gaps + number, gap)
    tl.store(parts.squares + number, squares)
    none = largest == _NO_CLASS
    tl.store(parts.largest + number, tl.where(none, largest, first + tl.where(none, 0, largest)))


@triton.jit
def _token_statistics_forward_parts(a, parts, scale: "fp64", SPLITS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """After `_moments_of_parts`. One program: one row, merging its parts."""
    scale = scale.to(a.rows.top.dtype.element_ty)
    place = _tile_of(tl.program_id(0), a.way.positions, 1)
    part = tl.arange(0, SPLITS)
    at, there = tl.program_id(0) * parts.splits + part, part < parts.splits
    # statistics
    tops = tl.load(parts.tops + at, mask=there, other=float("-inf"))
    totals = tl.load(parts.totals + at, mask=there, other=0.0)
    gaps = tl.load(parts.gaps + at, mask=there, other=0.0)
    squares = tl.load(parts.squares + at, mask=there, other=0.0)
    largest = tl.load(parts.largest + at, mask=there, other=_NO_CLASS)
    top, total, gap, square = _merge_moments(a, tops, totals, gaps, squares, scale, 0)
    largest = tl.min(tl.where(tops == top, largest, _NO_CLASS), 0)
    moments = _of_one_row((top, total, gap, square, largest))
    _write_answers(a, place, _counting(a, place[2], place[3], BLOCK_K), moments, scale, BLOCK_C, BLOCK_K)


@triton.jit
def _token_statistics_forward_tiles(a, scale: "fp64", BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """One program: all classes of BLOCK_N positions."""
    scale = scale.to(a.rows.top.dtype.element_ty)
    place = _tile_of(tl.program_id(0), a.way.positions, BLOCK_N)
    b, p, row, inside = place
    # statistics
    tops, totals, gaps, squares = _no_moments([BLOCK_N, BLOCK_C], a.rows.top.dtype.element_ty)
    found = tl.full([BLOCK_N, BLOCK_C], _NO_CLASS, tl.int32)
    for first in tl.range(0, a.way.classes, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        lanes = inside[:, None] & (c < a.way.classes)[None, :]
        x = _wide(tl.load(_lanes_at(a.logits, a.way.strides, b, p, c), mask=lanes, other=float("-inf")))
        old = tops
        tops, totals, gaps, squares = _see_moments(a, tops, totals, gaps, squares, x, scale)
        if a.answers.argmax is not None:
            found = tl.where(tops > old, c[None, :], found)
    top, total, gap, square = _merge_moments(a, tops, totals, gaps, squares, scale, 1)
    largest = tl.min(tl.where(tops == top[:, None], found, _NO_CLASS), 1)
    moments = (top, total, gap, square, largest)
    _write_answers(a, place, _counting(a, row, inside, BLOCK_K), moments, scale, BLOCK_C, BLOCK_K)


# ---------------------------------------------------------------- backward


@triton.jit
def _token_statistics_backward_rows(a, splits, chunk, scale: "fp64", VEC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where the class strides are 1 and rows start alike modulo VEC. One program: `chunk` classes of a row."""
    LANES: tl.constexpr = BLOCK_C // VEC
    scale = scale.to(a.rows.top.dtype.element_ty)
    number = tl.program_id(0)
    row, part = number // splits, number % splits * chunk
    count = tl.minimum(chunk, a.way.classes - part)
    start, to = _row_of(row, a.way.positions, a.way.strides) + part, _row_of(row, a.way.positions, a.dstrides) + part
    head, vectors, first = _body_of(start, count, VEC)
    x_ptr, dx_ptr = a.logits + first, a.dlogits + _first_vector(to, VEC)
    # row numbers: a row that does not count is not read, its logits count as 0, and its numbers are 0
    rows = row + tl.zeros([1], tl.int32)
    counts, top, numbers = _slope_numbers(a, row, row >= 0, tl.sum(_taken(a, rows, rows >= 0, BLOCK_K), 0), scale)
    seen, target = tl.where(counts, count, 0), row.to(tl.int64) * a.targets.per_row
    # gradient
    lane, offset = _lanes_of_vectors(LANES, VEC)
    for v in tl.range(0, vectors, LANES):
        inside = (v + lane < vectors)[:, None]
        x = _wide(tl.load(x_ptr + (v * VEC + offset), mask=(v + lane < tl.minimum(vectors, seen))[:, None], other=0.0))
        d = _slope(a, x, top, numbers, scale)
        if a.dlog_prob is not None:
            for k in tl.range(0, a.targets.per_row):
                # only the block that holds y compares: elsewhere that would be much of the work
                y = tl.load(a.targets.classes + target + k)
                y_here = y - (part + head + v * VEC)
                if (y_here >= 0) & (y_here < BLOCK_C) & (y != a.targets.ignore_index):
                    d = tl.where(offset == y_here.to(tl.int32), d + tl.load(a.dlog_prob + target + k) * scale, d)
        tl.store(dx_ptr + (v * VEC + offset), d, mask=inside)
    # edges
    c, at_edge = _edges_of(head, vectors, count, VEC)
    edges = _wide(tl.load(a.logits + start + c, mask=at_edge & (seen > 0), other=0.0))
    d = _slope(a, edges, top, numbers, scale)
    if a.dlog_prob is not None:
        for k in tl.range(0, a.targets.per_row):
            y = tl.load(a.targets.classes + target + k)
            if y != a.targets.ignore_index:
                d = tl.where(part + c == y, d + tl.load(a.dlog_prob + target + k) * scale, d)
    tl.store(a.dlogits + to + c, d, mask=at_edge)


@triton.jit
def _token_statistics_backward_tiles(a, scale: "fp64", BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """One program: BLOCK_C classes of BLOCK_N positions."""
    scale = scale.to(a.rows.top.dtype.element_ty)
    blocks = _blocks_of(a.way.classes, BLOCK_C)
    b, p, row, inside = _tile_of(tl.program_id(0) // blocks, a.way.positions, BLOCK_N)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    # row numbers
    counts, top, numbers = _slope_numbers(a, row[:, None], inside[:, None], _taken(a, row, inside, BLOCK_K)[:, None], scale)
    # gradient
    lanes = inside[:, None] & (c < a.way.classes)[None, :]
    x = _wide(tl.load(_lanes_at(a.logits, a.way.strides, b, p, c), mask=lanes, other=0.0))
    d = _slope(a, x, top, numbers, scale)
    if a.dlog_prob is not None:
        for k in tl.range(0, a.targets.per_row):
            at = row[:, None] * a.targets.per_row + k
            y = tl.load(a.targets.classes + at, mask=inside[:, None], other=a.targets.ignore_index)
            here = (c[None, :] == y) & (y != a.targets.ignore_index)
            d = tl.where(here, d + tl.load(a.dlog_prob + at, mask=inside[:, None], other=0.0) * scale, d)
    tl.store(_lanes_at(a.dlogits, a.dstrides, b, p, c), tl.where(counts, d, 0.0), mask=lanes)
