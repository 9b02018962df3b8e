"""Softmax cross-entropy with class indices and label smoothing; keep = 1 - label smoothing, spread = label smoothing / C.

mass = keep w_y + spread sum(w)      loss = keep w_y (-log p_y) + spread sum_c w_c (-log p_c)
dlogits = dloss (mass p - spread w - keep w_y onehot(y))
"""

from functools import cache
from typing import Any

import torch
from numba import njit
from torch import Tensor

from ..groups import Rows, Smoothing
from .blocks import all_kept, block_of, blocks_kept, scratch
from .cross_entropy import row_numbers, see_targets, write_zeros
from .launch import next_task, next_worker, raise_flag, region, unpack
from .math import INLINE, log
from .memory import load, load_classes, offset, store
from .rows import WALK, bypass_caches, last_tile, rows_of, strides_of, walk
from .simd import lanes_of, select
from .targets import refuse_out_of_bounds
from .weighted import weighted_gradient_of_row, weighted_statistics

_FORWARD = "TITCCCCCCCxxnn" + WALK
_BACKWARD = "TITCCCCCCTxxnnnnnnn" + WALK
_FORWARD_BACKWARD = "TITCCCCCCCTCxxnnnnnnnn" + WALK


def smoothed_cross_entropy_forward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, smoothing: Smoothing, loss: Tensor, rows: Rows
) -> None:
    (keep, spread), (row_weight, mass, top, total) = smoothing, rows
    way, terms = walk(logits), scratch(1)
    out_of_bounds = _forward(
        logits.dtype, way.tasks,
        logits.data_ptr(), target.data_ptr(), _zero(logits.dtype).data_ptr(), weight.data_ptr(), loss.data_ptr(), row_weight.data_ptr(),
        mass.data_ptr(), top.data_ptr(), total.data_ptr(), terms.data_ptr(), keep, spread, ignore_index, weight.stride(0), *way,
    )  # fmt: skip
    if out_of_bounds:
        refuse_out_of_bounds(target, way.classes, ignore_index)


def smoothed_cross_entropy_backward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, smoothing: Smoothing, rows: Rows, dloss: Tensor, dlogits: Tensor
) -> None:
    (keep, spread), (row_weight, mass, top, total) = smoothing, rows
    way = walk(logits)
    _backward(
        logits.dtype, way.tasks,
        logits.data_ptr(), target.data_ptr(), _zero(logits.dtype).data_ptr(), weight.data_ptr(), row_weight.data_ptr(), mass.data_ptr(),
        top.data_ptr(), total.data_ptr(), dloss.data_ptr(), dlogits.data_ptr(),
        keep, spread, ignore_index, weight.stride(0), dloss.stride(0), bypass_caches(logits, dlogits), *strides_of(dlogits), *way,
    )  # fmt: skip


def smoothed_cross_entropy_forward_backward(
    logits: Tensor, target: Tensor, weight: Tensor, ignore_index: int, smoothing: Smoothing,
    dloss: Tensor, loss: Tensor, rows: Rows, dlogits: Tensor,
) -> None:  # fmt: skip
    (keep, spread), (row_weight, mass, top, total) = smoothing, rows
    way = walk(logits)
    kept = blocks_kept(way, logits)
    terms = scratch(kept)
    out_of_bounds = _forward_backward(
        logits.dtype, way.tasks,
        logits.data_ptr(), target.data_ptr(), _zero(logits.dtype).data_ptr(), weight.data_ptr(), loss.data_ptr(), row_weight.data_ptr(),
        mass.data_ptr(), top.data_ptr(), total.data_ptr(), dloss.data_ptr(), dlogits.data_ptr(), terms.data_ptr(),
        keep, spread, kept, ignore_index, weight.stride(0), dloss.stride(0), bypass_caches(logits, dlogits), *strides_of(dlogits), *way,
    )  # fmt: skip
    if out_of_bounds:
        refuse_out_of_bounds(target, way.classes, ignore_index)


@cache
def _zero(dtype: torch.dtype) -> Tensor:
    """The class probabilities of smoothing alone, stride 0."""
    return torch.zeros(1, dtype=dtype, device="cpu")


@njit(**INLINE)
def _write_loss(
    target: Any, ignore_index: Any, keep: Any, loss: Any, row_weight: Any, mass: Any, top: Any, total: Any,
    row: Any, count: Any, masses: Any, gaps: Any,
) -> None:  # fmt: skip
    """After `see_targets`."""
    tops, totals = load(top, row, 1, count, 0.0), load(total, row, 1, count, 1.0)
    valid = load_classes(target, row, 1, count, ignore_index, tops) > -1
    kept = keep * load(row_weight, row, 1, count, 0.0)
    log_total = log(totals)
    nll = log_total - (load(loss, row, 1, count, 0.0) - tops)
    store(loss, row, 1, count, select(valid, kept * nll + (masses * log_total + gaps), 0.0))
    store(mass, row, 1, count, select(valid, masses + kept, 0.0))


@region(_FORWARD)
def _forward(a: Any) -> None:
    (logits, target, zero, weight, loss, row_weight, mass, top, total, terms, keep, spread, ignore_index, w_class,
     batch, classes, positions, batch_stride, class_stride, position_stride, tile, grain) = unpack(a, _FORWARD)  # fmt: skip
    lane_stride, w_lane = (position_stride, 0) if tile > 1 else (class_stride, w_class)
    terms = block_of(terms, next_worker(a))
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_tile(task, grain, batch, positions, tile)):
            b, p, row, count = rows_of(number, positions, tile)
            x = offset(logits, b * batch_stride + p * position_stride)
            seen = 0 if tile == 1 and target[row] == ignore_index else classes
            tops, totals, masses, gaps = weighted_statistics(
                x, zero, weight, keep, spread, seen, class_stride, lane_stride, 0, 0, w_class, w_lane, tile, count, terms, 0
            )
            if see_targets(
                x, tops, totals, target, ignore_index, weight, w_class, loss, row_weight, top, total,
                row, tile, count, classes, class_stride, lane_stride,
            ):  # fmt: skip
                raise_flag(a)
            _write_loss(target, ignore_index, keep, loss, row_weight, mass, top, total, row, count, masses, gaps)
        task = next_task(a)


@region(_BACKWARD)
def _backward(a: Any) -> None:
    (logits, target, zero, weight, row_weight, mass, top, total, dloss, dlogits,
     keep, spread, ignore_index, w_class, dloss_stride, past_caches, to_batch, to_class, to_position,
     batch, classes, positions, batch_stride, class_stride, position_stride, tile, grain) = unpack(a, _BACKWARD)  # fmt: skip
    lane_stride, to_lane, w_lane = (position_stride, to_position, 0) if tile > 1 else (class_stride, to_class, w_class)
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_tile(task, grain, batch, positions, tile)):
            b, p, row, count = rows_of(number, positions, tile)
            x = offset(logits, b * batch_stride + p * position_stride)
            dx = offset(dlogits, b * to_batch + p * to_position)
            tops, y, g, g_y, scale = _row_numbers(
                target, ignore_index, keep, row_weight, mass, top, total, dloss, dloss_stride, row, tile, count
            )
            if tile == 1 and target[row] == ignore_index:
                write_zeros(dx, 0, classes, to_class, past_caches)
            else:
                weighted_gradient_of_row(
                    x, dx, classes, class_stride, lane_stride, to_class, to_lane, zero, 0, 0, weight, w_class, w_lane, keep, spread,
                    tile, count, top, 0, tops, scale, g, y, target[row], g_y, past_caches,
                )  # fmt: skip
        task = next_task(a)


@njit(**INLINE)
def _row_numbers(
    target: Any, ignore_index: Any, keep: Any, row_weight: Any, mass: Any, top: Any, total: Any,
    dloss: Any, dloss_stride: Any, row: Any, tile: Any, count: Any,
) -> Any:  # fmt: skip
    """top, y, g = dloss, g keep w_y and g mass / total, one for each lane, or the row's in every lane."""
    tops, y, g_y, _ = row_numbers(target, ignore_index, row_weight, top, total, dloss, dloss_stride, row, tile, count)
    _, _, _, scale = row_numbers(target, ignore_index, mass, top, total, dloss, dloss_stride, row, tile, count)
    across, n = (1, count) if tile > 1 else (0, lanes_of(top))
    return tops, y, load(dloss, row * dloss_stride, across * dloss_stride, n, 0.0), keep * g_y, scale


@region(_FORWARD_BACKWARD)
def _forward_backward(a: Any) -> None:
    (logits, target, zero, weight, loss, row_weight, mass, top, total, dloss, dlogits, terms,
     keep, spread, kept, ignore_index, w_class, dloss_stride, past_caches, to_batch, to_class, to_position,
     batch, classes, positions, batch_stride, class_stride, position_stride, tile, grain) = unpack(a, _FORWARD_BACKWARD)  # fmt: skip
    lane_stride, to_lane, w_lane = (position_stride, to_position, 0) if tile > 1 else (class_stride, to_class, w_class)
    terms = block_of(terms, next_worker(a) * kept)
    all_blocks = all_kept(terms, kept, classes, tile)
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_tile(task, grain, batch, positions, tile)):
            b, p, row, count = rows_of(number, positions, tile)
            x = offset(logits, b * batch_stride + p * position_stride)
            dx = offset(dlogits, b * to_batch + p * to_position)
            # statistics
            seen = 0 if tile == 1 and target[row] == ignore_index else classes
            tops, totals, masses, gaps = weighted_statistics(
                x, zero, weight, keep, spread, seen, class_stride, lane_stride, 0, 0, w_class, w_lane, tile, count, terms, all_blocks
            )
            if see_targets(
                x, tops, totals, target, ignore_index, weight, w_class, loss, row_weight, top, total,
                row, tile, count, classes, class_stride, lane_stride,
            ):  # fmt: skip
                raise_flag(a)
            _write_loss(target, ignore_index, keep, loss, row_weight, mass, top, total, row, count, masses, gaps)
            # gradient
            tops, y, g, g_y, scale = _row_numbers(
                target, ignore_index, keep, row_weight, mass, top, total, dloss, dloss_stride, row, tile, count
            )
            if tile == 1 and target[row] == ignore_index:
                write_zeros(dx, 0, classes, to_class, past_caches)
            else:
                weighted_gradient_of_row(
                    x, dx, classes, class_stride, lane_stride, to_class, to_lane, zero, 0, 0, weight, w_class, w_lane, keep, spread,
                    tile, count, terms, all_blocks, tops, scale, g, y, target[row], g_y, past_caches,
                )  # fmt: skip
        task = next_task(a)
