"""Softmax cross-entropy with class probabilities q as targets; keep = 1 - label smoothing, spread = label smoothing / C.

k_c = w_c (keep q_c + spread)      mass = sum k      loss = sum_c k_c (-log p_c)
dlogits = dloss (mass p - k)       dtarget = dloss keep w_c (-log p_c)
"""

from typing import Any

from numba import njit
from torch import Tensor

from ..groups import Rows, Smoothing
from .blocks import all_kept, block_of, blocks_kept, scratch
from .launch import next_task, next_worker, region, unpack
from .math import INLINE, log
from .memory import load, offset, store
from .rows import WALK, advance, bypass_caches, last_tile, rows_of, strides_of, walk
from .simd import lane_numbers, lanes_of, splat
from .weighted import weighted_gradient_of_row, weighted_statistics

_FORWARD = "TTCCCCCCxxnnnn" + WALK
_BACKWARD = "TTCCCCCTxxnnnnnnnnn" + WALK
_FORWARD_BACKWARD = "TTCCCCCCTCxxnnnnnnnnnn" + WALK
_TARGET_BACKWARD = "TCCCCTxnnnnn" + WALK


def soft_cross_entropy_forward(logits: Tensor, target: Tensor, weight: Tensor, smoothing: Smoothing, loss: Tensor, rows: Rows) -> None:
    (keep, spread), (_, mass, top, total) = smoothing, rows
    way, terms = walk(logits), scratch(1)
    _forward(
        logits.dtype, way.tasks,
        logits.data_ptr(), target.data_ptr(), weight.data_ptr(), loss.data_ptr(), mass.data_ptr(), top.data_ptr(), total.data_ptr(),
        terms.data_ptr(), keep, spread, weight.stride(0), *strides_of(target), *way,
    )  # fmt: skip


def soft_cross_entropy_backward(
    logits: Tensor, target: Tensor, weight: Tensor, smoothing: Smoothing, rows: Rows, dloss: Tensor, dlogits: Tensor
) -> None:
    (keep, spread), (_, mass, top, total) = smoothing, rows
    way = walk(logits)
    _backward(
        logits.dtype, way.tasks,
        logits.data_ptr(), target.data_ptr(), weight.data_ptr(), mass.data_ptr(), top.data_ptr(), total.data_ptr(), dloss.data_ptr(),
        dlogits.data_ptr(), keep, spread, weight.stride(0), dloss.stride(0), bypass_caches(logits, dlogits),
        *strides_of(target), *strides_of(dlogits), *way,
    )  # fmt: skip


def soft_cross_entropy_forward_backward(
    logits: Tensor, target: Tensor, weight: Tensor, smoothing: Smoothing, dloss: Tensor, loss: Tensor, rows: Rows, dlogits: Tensor
) -> None:
    (keep, spread), (_, mass, top, total) = smoothing, rows
    way = walk(logits)
    kept = blocks_kept(way, logits)
    terms = scratch(kept)
    _forward_backward(
        logits.dtype, way.tasks,
        logits.data_ptr(), target.data_ptr(), weight.data_ptr(), loss.data_ptr(), mass.data_ptr(), top.data_ptr(), total.data_ptr(),
        dloss.data_ptr(), dlogits.data_ptr(), terms.data_ptr(), keep, spread, kept, weight.stride(0), dloss.stride(0),
        bypass_caches(logits, dlogits), *strides_of(target), *strides_of(dlogits), *way,
    )  # fmt: skip


def soft_cross_entropy_target_backward(logits: Tensor, weight: Tensor, keep: float, rows: Rows, dloss: Tensor, dtarget: Tensor) -> None:
    _, _, top, total = rows
    way = walk(logits)
    _target_backward(
        logits.dtype, way.tasks,
        logits.data_ptr(), weight.data_ptr(), top.data_ptr(), total.data_ptr(), dloss.data_ptr(), dtarget.data_ptr(),
        keep, weight.stride(0), dloss.stride(0), *strides_of(dtarget), *way,
    )  # fmt: skip


@njit(**INLINE)
def _write_loss(loss: Any, mass: Any, top: Any, total: Any, row: Any, count: Any, tops: Any, totals: Any, masses: Any, gaps: Any) -> None:
    store(top, row, 1, count, tops)
    store(total, row, 1, count, totals)
    store(mass, row, 1, count, masses)
    store(loss, row, 1, count, masses * log(totals) + gaps)


@region(_FORWARD)
def _forward(a: Any) -> None:
    (logits, target, weight, loss, mass, top, total, terms, keep, spread, w_class, q_batch, q_class, q_position,
     batch, classes, positions, batch_stride, class_stride, position_stride, tile, grain) = unpack(a, _FORWARD)  # fmt: skip
    lane_stride, q_lane, w_lane = (position_stride, q_position, 0) if tile > 1 else (class_stride, q_class, w_class)
    terms = block_of(terms, next_worker(a))
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_tile(task, grain, batch, positions, tile)):
            b, p, row, count = rows_of(number, positions, tile)
            x = offset(logits, b * batch_stride + p * position_stride)
            q = offset(target, b * q_batch + p * q_position)
            statistics = weighted_statistics(
                x, q, weight, keep, spread, classes, class_stride, lane_stride, q_class, q_lane, w_class, w_lane, tile, count, terms, 0
            )
            _write_loss(loss, mass, top, total, row, count, *statistics)
        task = next_task(a)


@njit(**INLINE)
def _row_numbers(mass: Any, top: Any, total: Any, dloss: Any, dloss_stride: Any, row: Any, tile: Any, count: Any) -> Any:
    """top, g = dloss and g mass / total, one for each lane, or the row's in every lane."""
    across, n = (1, count) if tile > 1 else (0, lanes_of(top))
    g = load(dloss, row * dloss_stride, across * dloss_stride, n, 0.0)
    return load(top, row, across, n, 0.0), g, g * load(mass, row, across, n, 0.0) / load(total, row, across, n, 1.0)


@region(_BACKWARD)
def _backward(a: Any) -> None:
    (logits, target, weight, mass, top, total, dloss, dlogits, keep, spread, w_class, dloss_stride, past_caches,
     q_batch, q_class, q_position, to_batch, to_class, to_position,
     batch, classes, positions, batch_stride, class_stride, position_stride, tile, grain) = unpack(a, _BACKWARD)  # fmt: skip
    lane_stride, to_lane = (position_stride, to_position) if tile > 1 else (class_stride, to_class)
    q_lane, w_lane = (q_position, 0) if tile > 1 else (q_class, w_class)
    no_class = lane_numbers(splat(0.0, logits)) + (1 << 30)
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_tile(task, grain, batch, positions, tile)):
            b, p, row, count = rows_of(number, positions, tile)
            x = offset(logits, b * batch_stride + p * position_stride)
            q = offset(target, b * q_batch + p * q_position)
            dx = offset(dlogits, b * to_batch + p * to_position)
            tops, g, scale = _row_numbers(mass, top, total, dloss, dloss_stride, row, tile, count)
            weighted_gradient_of_row(
                x, dx, classes, class_stride, lane_stride, to_class, to_lane, q, q_class, q_lane, weight, w_class, w_lane, keep, spread,
                tile, count, top, 0, tops, scale, g, no_class, -1, g, past_caches,
            )  # fmt: skip
        task = next_task(a)


@region(_FORWARD_BACKWARD)
def _forward_backward(a: Any) -> None:
    (logits, target, weight, loss, mass, top, total, dloss, dlogits, terms, keep, spread, kept, w_class, dloss_stride, past_caches,
     q_batch, q_class, q_position, to_batch, to_class, to_position,
     batch, classes, positions, batch_stride, class_stride, position_stride, tile, grain) = unpack(a, _FORWARD_BACKWARD)  # fmt: skip
    lane_stride, to_lane = (position_stride, to_position) if tile > 1 else (class_stride, to_class)
    q_lane, w_lane = (q_position, 0) if tile > 1 else (q_class, w_class)
    terms = block_of(terms, next_worker(a) * kept)
    all_blocks = all_kept(terms, kept, classes, tile)
    no_class = lane_numbers(splat(0.0, logits)) + (1 << 30)
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_tile(task, grain, batch, positions, tile)):
            b, p, row, count = rows_of(number, positions, tile)
            x = offset(logits, b * batch_stride + p * position_stride)
            q = offset(target, b * q_batch + p * q_position)
            dx = offset(dlogits, b * to_batch + p * to_position)
            # statistics
            statistics = weighted_statistics(
                x, q, weight, keep, spread, classes, class_stride, lane_stride, q_class, q_lane, w_class, w_lane, tile, count, terms,
                all_blocks,
            )  # fmt: skip
            _write_loss(loss, mass, top, total, row, count, *statistics)
            # gradient
            tops, g, scale = _row_numbers(mass, top, total, dloss, dloss_stride, row, tile, count)
            weighted_gradient_of_row(
                x, dx, classes, class_stride, lane_stride, to_class, to_lane, q, q_class, q_lane, weight, w_class, w_lane, keep, spread,
                tile, count, terms, all_blocks, tops, scale, g, no_class, -1, g, past_caches,
            )  # fmt: skip
        task = next_task(a)


@region(_TARGET_BACKWARD)
def _target_backward(a: Any) -> None:
    (logits, weight, top, total, dloss, dtarget, keep, w_class, dloss_stride, to_batch, to_class, to_position,
     batch, classes, positions, batch_stride, class_stride, position_stride, tile, grain) = unpack(a, _TARGET_BACKWARD)  # fmt: skip
    lanes, across = lanes_of(logits), 1 if tile > 1 else 0
    lane_stride, to_lane, w_lane = (position_stride, to_position, 0) if tile > 1 else (class_stride, to_class, w_class)
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_tile(task, grain, batch, positions, tile)):
            b, p, row, count = rows_of(number, positions, tile)
            x = offset(logits, b * batch_stride + p * position_stride)
            dq = offset(dtarget, b * to_batch + p * to_position)
            # row numbers: one for each lane, or the row's in every lane
            size = count if tile > 1 else lanes
            tops = load(top, row, across, size, 0.0)
            log_total = log(load(total, row, across, size, 1.0))
            g = load(dloss, row * dloss_stride, across * dloss_stride, size, 0.0) * keep
            # gradient
            c, n = 0, count if tile > 1 else min(lanes, classes)
            while c < classes:
                nll = log_total - (load(x, c * class_stride, lane_stride, n, 0.0) - tops)
                store(dq, c * to_class, to_lane, n, g * load(weight, c * w_class, w_lane, n, 0.0) * nll)
                c, n = advance(c, n, classes, tile, lanes)
        task = next_task(a)
