"""Softmax cross-entropy and its gradient in one visit to the logits, for callers who know the upstream gradient beforehand.

A row's terms wait in scratch memory, in the second-level cache, between its statistics and its gradient; those of a row too long for that
are computed again. The bits are those of forward and backward.
"""

from typing import Any, NamedTuple

import torch
from numba import njit
from torch import Tensor

from ..groups import Foreseen, Reduction, Rows
from .arguments import arguments
from .blocks import (
    Block,
    ahead_of_top,
    all_kept,
    block_of,
    block_size,
    blocks_apart,
    blocks_in,
    blocks_kept,
    first_reference,
    four_terms,
    kept_in_turn,
    kept_reference,
    merge,
    real_total,
    relative,
    row_statistics,
    scratch,
    settled,
    sum_with_rest,
    term,
)
from .cross_entropy import cross_entropy_backward, cross_entropy_forward, no_statistics, see_targets, write_losses
from .cross_entropy_tiles import FEW_VECTORS, blocks_of_tile, short_rows_in_turn, tiles_in_turn
from .cross_entropy_visit import MEAN, SUM, ForwardBackward, after_all_rows, before_all_rows
from .gradient import (
    ABREAST,
    GAPLESS,
    IN_ROWS,
    abreast,
    any_near,
    gradient_of_row,
    gradient_of_short_rows,
    layout_of,
    near,
    row_numbers,
    through_caches,
    write_zeros,
)
from .inline import INLINE
from .launch import last_task, next_task, next_worker, raise_flag, region
from .math import exp
from .prefetch import ask_for_seam
from .reduction import BLOCK, divide, sum_rows, sum_weights
from .rows import (
    SHORT_ROW,
    Walk,
    by_tiles,
    bypass_caches,
    first_line,
    lanes_at,
    lanes_for,
    last_tile,
    one_row,
    row_at,
    strides_of,
    tile_of,
    walk,
)
from .simd import lanes_of, splat
from .stream import line_of, stream, stream_two
from .targets import refuse_out_of_bounds
from .tiles import FEW_TO_TURN


def cross_entropy_forward_backward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, dloss: Tensor, loss: Tensor, rows: Rows, dlogits: Tensor
) -> None:
    way = walk(logits, SHORT_ROW)
    if blocks_apart(way, logits) > 1:
        cross_entropy_forward(logits, target, weight, ignore_index, loss, rows)
        cross_entropy_backward(logits, target, ignore_index, rows, dloss, dlogits)
    else:
        _visit(_arguments(way, logits, target, weight, ignore_index, dloss, loss, rows, dlogits))


def foreseen_cross_entropy_forward_backward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, foreseen: Foreseen, loss: Tensor, rows: Rows, dlogits: Tensor
) -> None:
    """Here nothing is lost by looking."""
    reduction = Reduction(foreseen.dloss[0].item(), foreseen.divisor, foreseen.total)
    reduced_cross_entropy_forward_backward(logits, target, weight, ignore_index, reduction, loss, rows, dlogits)


def cross_entropy_repair(
    logits: Tensor, target: Tensor, ignore_index: int, rows: Rows, dloss: Tensor, upstream: Tensor, foreseen: Tensor, dlogits: Tensor
) -> None:
    came, *expected = upstream.view(1).tolist() + foreseen.tolist()
    if any(number != came or number == 0 for number in expected):  # there are two zeros
        cross_entropy_backward(logits, target, ignore_index, rows, dloss, dlogits)


def reduced_cross_entropy_forward_backward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, reduction: Reduction, loss: Tensor, rows: Rows, dlogits: Tensor
) -> None:
    way, mean = walk(logits, SHORT_ROW), reduction.divisor.numel() > 0
    if loss.numel() <= BLOCK and blocks_apart(way, logits) == 1:
        # so few that every thread may sum their weights, and the last one their losses: launches apart would cost more
        dloss = torch.full((2,), reduction.dloss, dtype=loss.dtype, device=loss.device)
        a = _arguments(way, logits, target, weight, ignore_index, dloss, loss, rows, dlogits)
        _visit(a._replace(dloss_stride=0, alone=MEAN if mean else SUM, reduction=reduction))
        return
    dloss = torch.full((1,), reduction.dloss, dtype=loss.dtype, device=loss.device)
    if mean:
        sum_weights(target, weight, ignore_index, reduction.divisor)
        number, dloss = dloss, torch.empty_like(dloss)
        divide(number, reduction.divisor, dloss)
    cross_entropy_forward_backward(logits, target, weight, ignore_index, dloss.expand(loss.numel()), loss, rows, dlogits)
    sum_rows(loss, reduction.total)
    if mean:
        divide(reduction.total, reduction.divisor, reduction.total)


def _arguments(
    way: Walk, logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, dloss: Tensor, loss: Tensor, rows: Rows, dlogits: Tensor
) -> ForwardBackward:
    kept, dstrides = blocks_kept(way, logits), strides_of(dlogits, way.tile)
    layout = layout_of(way, dstrides)
    if way.tile == way.strides.class_ == dstrides.class_ == 1 and way.classes <= FEW_VECTORS * lanes_for(logits):
        way, layout = by_tiles(way, logits), IN_ROWS
        kept, dstrides = blocks_of_tile(way), strides_of(dlogits, way.tile)
    return ForwardBackward(
        logits=logits, target=target, weight=weight, weight_stride=weight.stride(0), ignore_index=ignore_index,
        dloss=dloss, dloss_stride=dloss.stride(0), loss=loss, rows=rows,
        dlogits=dlogits, dstrides=dstrides, layout=layout,
        terms=scratch(2 * kept if way.tile > 1 else kept, logits), kept=kept, past_caches=bypass_caches(logits, dlogits), way=way,
        alone=0, reduction=Reduction(0.0, loss, loss),
    )  # fmt: skip


def _visit(a: ForwardBackward) -> None:
    blocks = blocks_in(a.way, a.logits)
    if a.layout == IN_ROWS:
        visit = short_rows_in_turn
    elif a.way.tile > 1 and blocks == 1 and (a.layout != GAPLESS or a.way.classes >= FEW_TO_TURN):
        visit = tiles_in_turn
    elif kept_in_turn(a.way, a.kept, a.logits, a.dstrides):
        visit = _rows_in_turn
    else:
        visit = _forward_backward
    if visit(a.way.tasks, a):
        refuse_out_of_bounds(a.target, a.way.classes, a.ignore_index)


@region(ForwardBackward)
def _rows_in_turn(block: Any) -> None:
    """Rows of consecutive classes. The gradient of a row is written while the next one is read: stores wait for memory and exp for
    arithmetic, and so neither for the other."""
    a = arguments(block)
    way, classes = a.way, a.way.classes
    terms = block_of(a.terms, next_worker(block) * a.kept)
    if a.alone:
        before_all_rows(a)
    # the row whose gradient is still to be written, and where: its terms are in `terms`
    before, before_dx = -1, a.dlogits
    task = next_task(block)
    while task >= 0:
        begin, end = task * way.grain, last_tile(task, way)
        t = tile_of(begin, way)
        b, p = t.b, t.p
        for row in range(begin, end):
            x, dx = one_row(row_at(a.logits, way.strides, b, p)), row_at(a.dlogits, a.dstrides, b, p)
            tops, totals = no_statistics(x)
            if a.target[row] == a.ignore_index:
                write_zeros(one_row(dx), 0, classes, a.past_caches)
            elif before < 0:
                tops, totals = row_statistics(x, classes, terms, 1)
            else:
                r = row_numbers(a, a.rows.row_weight, x, before)
                tops, totals = statistics_and_gradient(x, classes, terms, one_row(before_dx), r, a.past_caches)
            if see_targets(a, x, row, tops, totals):
                raise_flag(block)
            if a.target[row] != a.ignore_index:
                before, before_dx = row, dx
            b, p = (b, p + 1) if p + 1 < way.positions else (b + 1, 0)
        write_losses(a, begin, end)
        if last_task(block) and a.alone:
            after_all_rows(a)
        task = next_task(block)
    if before >= 0:
        dx_before = one_row(before_dx)
        r = row_numbers(a, a.rows.row_weight, dx_before, before)
        gradient_of_row(dx_before, dx_before, 0, classes, classes, terms, 1, r, a.past_caches)


class Other(NamedTuple):
    """A row whose gradient is written while the next one is read."""

    dx: Any
    factor: Any  # of the terms of a block
    r: Any


@njit(**INLINE)
def statistics_and_gradient(x: Any, classes: Any, terms: Any, dx: Any, r: Any, past_caches: Any) -> Any:
    """`row_statistics` of the row at x, and meanwhile the gradient of the other one at dx, whose terms are in `terms`; the row's own are
    there afterwards. Each vector takes the place of one that has just been read: with a place of their own, what is written past the
    caches and what comes from the second-level cache wait for the same line buffers longer."""
    lanes, line, size, rescaled = lanes_of(x.at), line_of(dx.at), block_size(terms, 1), relative(terms, 1, classes)
    top, total = no_statistics(x)
    for first in range(0, classes, size):
        last, mine = min(classes, first + size), block_of(terms, first // size)
        block = Block(first, last, r.scale, mine, 1)  # of kept terms the reference is not asked for
        factor = exp(kept_reference(mine) - r.top) * r.scale if rescaled else r.scale
        other, reference = Other(dx, factor, r), first_reference(x, first, last)
        # c goes over the classes of this row, k over those of the other, ahead: from where its lines begin
        c, k = first, first_line(dx.at, first, last, past_caches)
        ask_for_seam(dx.at, last, past_caches)
        through_caches(x, dx, block, first, k, factor, r)
        if ahead_of_top(x, first, last):
            here_top, here_total, c, k = _fours(x, reference, block, other, k, past_caches)
        else:  # `reference` is the top already
            _, here_total, c, k = _fours(x, reference, block, other, k, past_caches)
            here_top = splat(reference, x.at)
        while k + line <= last:
            for i in range(k, k + line, lanes):
                stream(dx.at, i, near(x, block, i, lanes, factor, r), past_caches)
            k += line
        through_caches(x, dx, block, k, last, factor, r)
        if c + 4 * lanes <= last:  # k was ahead by less than a line
            four, here_top = four_terms(x, reference, here_top, c, mine, c - first)
            here_total, c = here_total + four, c + 4 * lanes
        here_top, here_total = sum_with_rest(x, reference, here_top, here_total, first, c, last, mine)
        here_total = settled(x, reference, here_top, here_total, first, last, mine)
        if first == 0:
            top, total = here_top, here_total
        else:
            top, total = merge(top, total, here_top, here_total)
    return top, real_total(total)


@njit(**INLINE)
def _fours(x: Any, reference: Any, block: Any, other: Any, k: Any, past_caches: Any) -> Any:
    """Four vectors of this row and of the other, again and again, until there are fewer left: `top` and `total` for each lane, and how
    far it went."""
    lanes, c, last, dx, r = lanes_of(x.at), block.first, block.last, other.dx, other.r
    top, total = splat(reference, x.at), splat(0.0, x.at)
    while k + 4 * lanes <= last:
        if any_near(r, dx, k):
            for i in range(k, k + 4 * lanes, 2 * lanes):
                d, e = near(x, block, i, lanes, other.factor, r), near(x, block, i + lanes, lanes, other.factor, r)
                stream_two(dx.at, i, d, e, past_caches)
        else:
            for i in range(k, k + 4 * lanes, 2 * lanes):
                d, e = term(x, block, i, lanes) * other.factor, term(x, block, i + lanes, lanes) * other.factor
                stream_two(dx.at, i, d, e, past_caches)
        four, top = four_terms(x, reference, top, c, block.terms, c - block.first)
        total, c, k = total + four, c + 4 * lanes, k + 4 * lanes
    return top, total, c, k


@region(ForwardBackward)
def _forward_backward(block: Any) -> None:
    a = arguments(block)
    way, classes = a.way, a.way.classes
    terms = block_of(a.terms, next_worker(block) * a.kept)
    keep = all_kept(terms, a.kept, way)
    if a.alone:
        before_all_rows(a)
    task = next_task(block)
    while task >= 0:
        begin = tile_of(task * way.grain, way).row
        end = begin
        for number in range(task * way.grain, last_tile(task, way)):
            t = tile_of(number, way)
            end = t.row + t.rows
            x, dx = lanes_at(a.logits, way.strides, t, way), lanes_at(a.dlogits, a.dstrides, t, way)
            if a.layout == ABREAST:
                x, dx = abreast(x), abreast(dx)
            # statistics
            if x.tile > 1 or a.target[t.row] != a.ignore_index:
                tops, totals = row_statistics(x, classes, terms, keep)
            else:
                tops, totals = no_statistics(x)
            # target logit and class weight
            if see_targets(a, x, t.row, tops, totals):
                raise_flag(block)
            # gradient
            r = row_numbers(a, a.rows.row_weight, x, t.row)
            if x.tile == 1 and r.y_row == a.ignore_index:
                write_zeros(dx, 0, classes, a.past_caches)
            elif a.layout == GAPLESS and classes < FEW_TO_TURN:
                gradient_of_short_rows(x, dx, classes, r)
            else:
                gradient_of_row(x, dx, 0, classes, classes, terms, keep, r, a.past_caches)
        write_losses(a, begin, end)
        if last_task(block) and a.alone:
            after_all_rows(a)
        task = next_task(block)
