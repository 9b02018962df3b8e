"""Softmax cross-entropy and its gradient in one visit to the logits, for callers who know the upstream gradient beforehand.

A row's terms wait in scratch memory, in the second-level cache, between its statistics and its gradient; those of a row too long for that
are computed again. The bits are those of forward and backward.
"""

from typing import Any

from numba import njit
from torch import Tensor

from ..groups import Rows
from .blocks import (
    all_kept,
    block_of,
    block_size,
    block_top,
    blocks_apart,
    blocks_in,
    blocks_kept,
    four_terms,
    keep_top,
    kept_top,
    merge,
    real_total,
    row_statistics,
    scratch,
    sum_with_rest,
    term,
)
from .cross_entropy import (
    FEW_TO_GATHER,
    cross_entropy_backward,
    cross_entropy_forward,
    gapless,
    gradient_of_row,
    gradient_of_short_rows,
    near_target,
    no_statistics,
    row_numbers,
    see_targets,
    write_losses,
    write_zeros,
)
from .launch import next_task, next_worker, raise_flag, region, unpack
from .math import INLINE, exp
from .memory import offset, store, stream, to_alignment
from .rows import WALK, bypass_caches, last_tile, rows_of, strides_of, walk
from .simd import lanes_of, splat
from .targets import refuse_out_of_bounds

_FORWARD_BACKWARD = "TICCCCCCTCnnnnnnnn" + WALK


def cross_entropy_forward_backward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, dloss: Tensor, loss: Tensor, rows: Rows, dlogits: Tensor
) -> None:
    way, to = walk(logits, FEW_TO_GATHER), strides_of(dlogits)
    if blocks_apart(way, logits) > 1:
        cross_entropy_forward(logits, target, weight, ignore_index, loss, rows)
        cross_entropy_backward(logits, target, ignore_index, rows, dloss, dlogits)
        return
    row_weight, _, top, total = rows
    kept = blocks_kept(way, logits)
    in_turn = way.tile == way.class_stride == to.class_ == 1 and kept == blocks_in(way, logits)
    terms = scratch(2 * kept if in_turn else kept)
    out_of_bounds = (_rows_in_turn if in_turn else _forward_backward)(
        logits.dtype, way.tasks,
        logits.data_ptr(), target.data_ptr(), weight.data_ptr(), loss.data_ptr(), row_weight.data_ptr(), top.data_ptr(), total.data_ptr(),
        dloss.data_ptr(), dlogits.data_ptr(), terms.data_ptr(), kept, ignore_index, weight.stride(0), dloss.stride(0),
        bypass_caches(logits, dlogits), *to, *way,
    )  # fmt: skip
    if out_of_bounds:
        refuse_out_of_bounds(target, way.classes, ignore_index)


@region(_FORWARD_BACKWARD)
def _rows_in_turn(a: Any) -> None:
    """Rows of consecutive classes. The gradient of a row is written while the next one is read: stores wait for memory and exp for
    arithmetic, and so neither for the other."""
    (logits, target, weight, loss, row_weight, top, total, dloss, dlogits, terms, blocks, ignore_index, weight_stride, dloss_stride,
     past_caches, to_batch, _, to_position,
     batch, classes, positions, batch_stride, _, position_stride, _, grain) = unpack(a, _FORWARD_BACKWARD)  # fmt: skip
    lanes = lanes_of(logits)
    mine = block_of(terms, next_worker(a) * 2 * blocks)
    theirs = block_of(mine, blocks)
    task = next_task(a)
    while task >= 0:
        begin, end = task * grain, last_tile(task, grain, batch, positions, 1)
        # the row whose gradient is still to be written, and where: its terms are `theirs`
        before, before_dx = -1, dlogits
        b, p, _, _ = rows_of(begin, positions, 1)
        for row in range(begin, end):
            x = offset(logits, b * batch_stride + p * position_stride)
            dx = offset(dlogits, b * to_batch + p * to_position)
            tops, totals = no_statistics(x)
            if target[row] == ignore_index:
                write_zeros(dx, 0, classes, 1, past_caches)
            elif before < 0:
                tops, totals = row_statistics(x, classes, 1, 1, 1, lanes, mine, 1)
            else:
                numbers = row_numbers(target, ignore_index, row_weight, top, total, dloss, dloss_stride, before, 1, 1)
                tops, totals = _statistics_and_gradient(x, classes, mine, before_dx, theirs, target[before], *numbers, past_caches)
            if see_targets(
                x, tops, totals, target, ignore_index, weight, weight_stride, loss, row_weight, top, total, row, 1, 1, classes, 1, 1
            ):
                raise_flag(a)
            if target[row] != ignore_index:
                before, before_dx, mine, theirs = row, dx, theirs, mine
            b, p = (b, p + 1) if p + 1 < positions else (b + 1, 0)
        if before >= 0:
            tops, y, g, scale = row_numbers(target, ignore_index, row_weight, top, total, dloss, dloss_stride, before, 1, 1)
            gradient_of_row(
                before_dx, before_dx, 0, classes, classes, 1, 1, 1, 1, 1, lanes, theirs, 1, tops, y, target[before], g, scale, past_caches
            )
        write_losses(loss, row_weight, top, total, begin, end)
        task = next_task(a)


@njit(**INLINE)
def _statistics_and_gradient(
    x: Any, classes: Any, terms: Any, dx: Any, other_terms: Any, y_row: Any, other_top: Any, y: Any, g: Any, scale: Any, past_caches: Any
) -> Any:
    """`row_statistics` of the row at x, and meanwhile `gradient_of_row` of the other one, whose terms are in `other_terms`."""
    lanes, size = lanes_of(x), block_size(terms, 1)
    top, total = no_statistics(x)
    for first in range(0, classes, size):
        last = min(classes, first + size)
        block, other = block_of(terms, first // size), block_of(other_terms, first // size)
        factor = exp(kept_top(other) - other_top) * scale if classes > size else scale
        here_total, here_top = splat(0.0, x), block_top(x, first, last, 1, 1, 1, lanes)
        keep_top(block, here_top)
        # c goes over the classes of this row, k over those of the other: from where its vectors lie aligned
        c, k = first, min(last, first + to_alignment(offset(dx, first))) if past_caches else first
        if k > first:
            store(dx, first, 1, k - first, near_target(x, scale, 1, other, 1, first, first, k - first, factor, y, g))
        while c + 4 * lanes <= last and k + 4 * lanes <= last:
            here_total = here_total + four_terms(x, here_top, c, 1, 1, 1, lanes, block, c - first)
            if k <= y_row < k + 4 * lanes:
                for i in range(k, k + 4 * lanes, lanes):
                    stream(dx, i, near_target(x, scale, 1, other, 1, first, i, lanes, factor, y, g), past_caches)
            else:
                for i in range(k, k + 4 * lanes, lanes):
                    stream(dx, i, term(x, scale, 1, 1, other, 1, first, i, 1, lanes) * factor, past_caches)
            c, k = c + 4 * lanes, k + 4 * lanes
        if c + 4 * lanes <= last:  # k was ahead by less than a vector
            here_total, c = here_total + four_terms(x, here_top, c, 1, 1, 1, lanes, block, c - first), c + 4 * lanes
        here_total = sum_with_rest(x, here_top, here_total, first, c, last, 1, 1, 1, lanes, block)
        while k < last:
            n = min(lanes, last - k)
            store(dx, k, 1, n, near_target(x, scale, 1, other, 1, first, k, n, factor, y, g))
            k += n
        if first == 0:
            top, total = here_top, here_total
        else:
            top, total = merge(top, total, here_top, here_total)
    return top, real_total(total)


@region(_FORWARD_BACKWARD)
def _forward_backward(a: Any) -> None:
    (logits, target, weight, loss, row_weight, top, total, dloss, dlogits, terms, kept, ignore_index, weight_stride, dloss_stride,
     past_caches, to_batch, to_class, to_position,
     batch, classes, positions, batch_stride, class_stride, position_stride, tile, grain) = unpack(a, _FORWARD_BACKWARD)  # fmt: skip
    terms = block_of(terms, next_worker(a) * kept)
    keep = all_kept(terms, kept, classes, tile)
    lane_stride, to_lane = (position_stride, to_position) if tile > 1 else (class_stride, to_class)
    task = next_task(a)
    while task >= 0:
        begin = rows_of(task * grain, positions, tile)[2]
        end = begin
        for number in range(task * grain, last_tile(task, grain, batch, positions, tile)):
            b, p, row, count = rows_of(number, positions, tile)
            end = row + count
            x = offset(logits, b * batch_stride + p * position_stride)
            dx = offset(dlogits, b * to_batch + p * to_position)
            # statistics
            if tile > 1 or target[row] != ignore_index:
                tops, totals = row_statistics(x, classes, class_stride, lane_stride, tile, count, terms, keep)
            else:
                tops, totals = no_statistics(x)
            # target logit and class weight
            if see_targets(
                x, tops, totals, target, ignore_index, weight, weight_stride, loss, row_weight, top, total,
                row, tile, count, classes, class_stride, lane_stride,
            ):  # fmt: skip
                raise_flag(a)
            # gradient
            tops, y, g, scale = row_numbers(target, ignore_index, row_weight, top, total, dloss, dloss_stride, row, tile, count)
            if tile == 1 and target[row] == ignore_index:
                write_zeros(dx, 0, classes, to_class, past_caches)
            elif gapless(class_stride, position_stride, to_class, to_position, classes, tile, count, lanes_of(x)):
                gradient_of_short_rows(x, dx, classes, y, tops, scale, g)
            else:
                gradient_of_row(
                    x, dx, 0, classes, classes, class_stride, lane_stride, to_class, to_lane, tile, count, terms, keep,
                    tops, y, target[row], g, scale, past_caches,
                )  # fmt: skip
        write_losses(loss, row_weight, top, total, begin, end)
        task = next_task(a)
