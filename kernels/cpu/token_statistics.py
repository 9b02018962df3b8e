"""Statistics of softmax(z), z = scale x, and their joint gradient. Of each row

    log_prob_k = (z_y_k - top) - log total      entropy = log total - gap / total      lse = top + log total
    sum_sq_prob = squares / total^2             argmax = the first class with the largest logit, or that is NaN

(see `moments`), and with the numbers alpha, beta, gamma of each row and the gradient a of log_prob (see `slope`)

    dlogits_c = scale (p_c (alpha - sum_k a_k + beta log p_c + gamma p_c) + sum of a_k over all k with y_k = c)

One visit to the logits going forward, one coming back. A row whose targets are all `ignore_index` is not read; its total is 0.
"""

from typing import Any, NamedTuple

from numba import njit
from torch import Tensor

from ..groups import Answers, Rows, Slope
from .answers import ARGMAX, wanted_of, write_answers, write_nothing
from .arguments import Computed, Known, Stored, arguments
from .blocks import block_of, block_size, blocks_apart, scratch
from .class_table import Targets, classes_at, is_ignored
from .gradient import write_zeros
from .inline import INLINE
from .launch import next_task, next_worker, raise_flag, region
from .math import log
from .memory import load
from .moments import GAP, SQUARES, Moments, block_moments, first_at, merge_moments, no_moments
from .rows import Strides, Walk, bypass_caches, lanes_at, last_tile, load_numbers, strides_of, tile_of, tiles_of, walk
from .simd import any_lane, first_lane, lane_numbers, lane_sum, lanes_of, select, splat
from .slope import LOG, SQUARE, Piece, SlopeNumbers, keep_slope, write_slope
from .targets import refuse_out_of_bounds


class Blocks(NamedTuple):
    logits: Stored
    targets: Targets
    scale: float
    parts: Computed  # [4, N, blocks]: the moments of every block
    blocks: int
    moments: Known
    way: Walk


class Forward(NamedTuple):
    logits: Stored
    targets: Targets
    scale: float
    answers: Answers
    wanted: int
    rows: Rows
    parts: Computed | None  # as in `Blocks`, if blocks were handed out one by one
    blocks: int
    moments: Known
    way: Walk


class Backward(NamedTuple):
    logits: Stored
    targets: Targets
    scale: float
    rows: Rows
    slope: Slope
    dlog_prob: Computed  # [N, targets]
    taken: int  # targets that take something: all or none
    dlogits: Stored
    dstrides: Strides
    values: Computed
    blocks: int
    powers: Known
    past_caches: Known
    way: Walk


def token_statistics_forward(logits: Tensor, target: Tensor, ignore_index: int, logit_scale: float, answers: Answers, rows: Rows) -> None:
    way = walk(logits)
    moments = (GAP if answers.entropy.numel() else 0) | (SQUARES if answers.sum_sq_prob.numel() else 0)
    targets, blocks, parts = Targets(target, target.shape[1], ignore_index), blocks_apart(way, logits), None
    if blocks > 1:
        parts = rows.top.new_empty(4 * rows.top.numel() * blocks)
        _moments_of_blocks(parts.numel() // 4, Blocks(
            logits=logits, targets=targets, scale=logit_scale, parts=parts, blocks=blocks, moments=moments, way=way,
        ))  # fmt: skip
    out_of_bounds = _forward(way.tasks, Forward(
        logits=logits, targets=targets, scale=logit_scale, answers=answers, wanted=wanted_of(answers), rows=rows, parts=parts,
        blocks=blocks, moments=moments, way=way,
    ))  # fmt: skip
    if out_of_bounds:
        refuse_out_of_bounds(target, way.classes, ignore_index)


def token_statistics_backward(
    logits: Tensor, target: Tensor, ignore_index: int, logit_scale: float, rows: Rows, slope: Slope, dlog_prob: Tensor, dlogits: Tensor
) -> None:
    way = walk(logits)
    blocks, powers = blocks_apart(way, logits), (LOG if slope.beta.numel() else 0) | (SQUARE if slope.gamma.numel() else 0)
    _backward(way.tasks * blocks, Backward(
        logits=logits, targets=Targets(target, target.shape[1], ignore_index), scale=logit_scale, rows=rows, slope=slope,
        dlog_prob=dlog_prob, taken=target.shape[1] if dlog_prob.numel() else 0, dlogits=dlogits, dstrides=strides_of(dlogits, way.tile),
        values=scratch(1, logits), blocks=blocks, powers=powers, past_caches=bypass_caches(logits, dlogits), way=way,
    ))  # fmt: skip


# ---------------------------------------------------------------- forward


@region(Blocks)
def _moments_of_blocks(block: Any) -> None:
    a = arguments(block)
    size, apart = block_size(a.parts, 1), a.way.batch * a.way.positions * a.blocks
    task = next_task(block)
    while task >= 0:
        row = task // a.blocks
        if not is_ignored(a.targets, row):
            x = lanes_at(a.logits, a.way.strides, tile_of(row, a.way), a.way)
            first = task % a.blocks * size
            m = block_moments(x, a.scale, first, min(a.way.classes, first + size), a.moments)
            a.parts[task], a.parts[apart + task] = first_lane(m.top), first_lane(m.total)
            a.parts[2 * apart + task], a.parts[3 * apart + task] = first_lane(m.gap), first_lane(m.squares)
        task = next_task(block)


@njit(**INLINE)
def _part(a: Any, row: Any, number: Any) -> Any:
    """The moments of a block that are there already."""
    apart, at = a.way.batch * a.way.positions * a.blocks, row * a.blocks + number
    top, total = splat(a.parts[at], a.logits), splat(a.parts[apart + at], a.logits)
    return Moments(top, total, splat(a.parts[2 * apart + at], a.logits), splat(a.parts[3 * apart + at], a.logits))


@njit(**INLINE)
def _row_moments(a: Any, x: Any, row: Any) -> Any:
    """The moments of the rows in the lanes, or of one row, block by block in order; and the first class with the largest logit."""
    size, m = block_size(x.at, x.tile), no_moments(x)
    largest = splat(0, lane_numbers(m.top))
    for first in range(0, a.way.classes, size):
        last = min(a.way.classes, first + size)
        if x.tile == 1 and a.blocks > 1:
            m2 = _part(a, row, first // size)
        else:
            m2 = block_moments(x, a.scale, first, last, a.moments)
        if a.wanted & ARGMAX:
            rises = m2.top > m.top
            if any_lane(rises):
                largest = select(rises, first_at(x, first, last, m2.top), largest)
        m = m2 if first == 0 else merge_moments(m, m2, a.scale, a.moments)
    return m, largest


@njit(**INLINE)
def _see_row(a: Any, x: Any, row: Any) -> Any:
    """Write the answers of the rows at x, the first of which is `row`. True if a target is no class."""
    m, largest = _row_moments(a, x, row)
    return write_answers(a, x, row, m, largest)


@region(Forward)
def _forward(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_tile(task, a.way)):
            t = tile_of(number, a.way)
            x = lanes_at(a.logits, a.way.strides, t, a.way)
            if x.tile == 1 and is_ignored(a.targets, t.row):
                write_nothing(a, t.row)
            elif _see_row(a, x, t.row):
                raise_flag(block)
        task = next_task(block)


# ---------------------------------------------------------------- backward


@njit(**INLINE)
def _taken(a: Any, x: Any, row: Any, like: Any) -> Any:
    """sum_k a_k of the rows at x."""
    count, taken = a.targets.per_row, splat(0.0, like)
    for k in range(0, a.taken, 1 if x.tile > 1 else lanes_of(like)):
        y = classes_at(a.targets, x, row, k, like)
        step, n = (count, x.rows) if x.tile > 1 else (1, count - k)
        taken = taken + select(y > -1, load(a.dlog_prob, row * count + k, step, n, 0.0), 0.0)
    return taken if x.tile > 1 else splat(lane_sum(taken), like)


@njit(**INLINE)
def _slope_numbers(a: Any, x: Any, row: Any) -> Any:
    top, total = load_numbers(a.rows.top, 1, row, x, 0.0), load_numbers(a.rows.total, 1, row, x, 1.0)
    nothing, inverse = splat(0.0, x.at), splat(a.scale, x.at) / total
    alpha, b, c = load_numbers(a.slope.alpha, 1, row, x, 0.0) - _taken(a, x, row, top), nothing, nothing
    if a.powers & LOG:
        beta = load_numbers(a.slope.beta, 1, row, x, 0.0)
        alpha, b = alpha - beta * log(total), beta * inverse
    if a.powers & SQUARE:
        c = load_numbers(a.slope.gamma, 1, row, x, 0.0) * inverse / total
    y, g = splat(-1, lane_numbers(top)), nothing
    if x.tile > 1 and a.taken == 1:
        y, g = classes_at(a.targets, x, row, 0, top), load(a.dlog_prob, row, 1, x.rows, 0.0) * a.scale
    return SlopeNumbers(top, a.scale, alpha * inverse, b, c, total != 0.0, y, g)


@njit(**INLINE)
def _give_targets(a: Any, x: Any, row: Any, piece: Any) -> Any:
    """Add what the targets take to the gradient of a piece in scratch memory."""
    for i in range(x.rows):
        for k in range((row + i) * a.targets.per_row, (row + i + 1) * a.targets.per_row):
            y = a.targets.classes[k]
            if piece.first <= y < piece.last and y != a.targets.ignore_index:
                at = (y - piece.first) * lanes_of(x.at) + i if x.tile > 1 else y - piece.first
                piece.values[at] += a.dlog_prob[k] * a.scale


@njit(**INLINE)
def _has_target(a: Any, x: Any, row: Any, first: Any, last: Any) -> Any:
    """Whether targets take something here that the row's numbers do not know."""
    if x.tile > 1:
        return a.taken > 1
    k, end = row * a.targets.per_row, row * a.targets.per_row + a.taken
    while k < end and not first <= a.targets.classes[k] < last:
        k += 1
    return k < end


@region(Backward)
def _backward(block: Any) -> None:
    a = arguments(block)
    values = block_of(a.values, next_worker(block))
    size = block_size(values, a.way.tile)
    blocks = 1 if a.way.tile > 1 else a.blocks
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, min((task + 1) * a.way.grain, tiles_of(a.way) * blocks)):
            t = tile_of(number // blocks, a.way)
            x, dx = lanes_at(a.logits, a.way.strides, t, a.way), lanes_at(a.dlogits, a.dstrides, t, a.way)
            begin = number % blocks * size
            end = min(a.way.classes, begin + size) if blocks > 1 else a.way.classes
            if x.tile == 1 and a.rows.total[t.row] == 0:
                write_zeros(dx, begin, end, a.past_caches)
            else:
                r = _slope_numbers(a, x, t.row)
                for first in range(begin, end, size):
                    last = min(end, first + size)
                    if _has_target(a, x, t.row, first, last):
                        keep_slope(x, Piece(first, last, values, 1), r, a.powers)
                        _give_targets(a, x, t.row, Piece(first, last, values, 1))
                        write_slope(x, dx, Piece(first, last, values, 1), r, a.powers, a.past_caches)
                    else:
                        write_slope(x, dx, Piece(first, last, values, 0), r, a.powers, a.past_caches)
        task = next_task(block)
