"""Softmax cross-entropy and its gradient in one visit to the logits, for callers who know the upstream gradient beforehand.

A row's terms wait in scratch memory, in the second-level cache, between its statistics and its gradient; those of a row too long for that
are computed again. The bits are those of forward and backward.
"""

from typing import Any

from torch import Tensor

from .blocks import all_kept, block_of, blocks_apart, blocks_kept, row_statistics, scratch
from .cross_entropy import (
    cross_entropy_backward,
    cross_entropy_forward,
    gapless,
    gradient_of_row,
    gradient_of_short_rows,
    no_statistics,
    row_numbers,
    see_targets,
    write_losses,
    write_zeros,
)
from .launch import next_task, next_worker, raise_flag, region, unpack
from .memory import offset
from .rows import WALK, bypass_caches, last_tile, rows_of, strides_of, walk
from .simd import lanes_of
from .targets import refuse_out_of_bounds

_FORWARD_BACKWARD = "TICCCCCCTCnnnnnnnn" + WALK


def cross_entropy_forward_backward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, dloss: Tensor,
    loss: Tensor, row_weight: Tensor, top: Tensor, total: Tensor, dlogits: Tensor,
) -> None:  # fmt: skip
    way = walk(logits)
    if blocks_apart(way, logits) > 1:
        cross_entropy_forward(logits, target, weight, ignore_index, loss, row_weight, top, total)
        cross_entropy_backward(logits, target, ignore_index, row_weight, top, total, dloss, dlogits)
        return
    kept = blocks_kept(way, logits)
    terms = scratch(kept)
    out_of_bounds = _forward_backward(
        logits.dtype, way.tasks,
        logits.data_ptr(), target.data_ptr(), weight.data_ptr(), loss.data_ptr(), row_weight.data_ptr(), top.data_ptr(), total.data_ptr(),
        dloss.data_ptr(), dlogits.data_ptr(), terms.data_ptr(), kept, ignore_index, weight.stride(0), dloss.stride(0),
        bypass_caches(logits, dlogits), *strides_of(dlogits), *way,
    )  # fmt: skip
    if out_of_bounds:
        refuse_out_of_bounds(target, way.classes, ignore_index)


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
