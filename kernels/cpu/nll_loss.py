"""Negative log-likelihood: loss = -w_y log_prob_y, dlog_prob = -dloss w_y onehot(y). One number is read in each row."""

from typing import Any

from torch import Tensor

from .launch import next_task, raise_flag, region, unpack
from .memory import load, load_classes, load_one, offset, store, stream
from .rows import WALK, advance, bypass_caches, first_vector, last_tile, rows_of, walk, whole_vectors
from .simd import lanes_of, select, splat
from .targets import less_at, refuse_out_of_bounds

_FORWARD = "TICCCnn" + WALK
_BACKWARD = "TICCnnn" + WALK


def nll_loss_forward(log_prob: Tensor, target: Tensor, weight: Tensor, ignore_index: int, loss: Tensor, row_weight: Tensor) -> None:
    way = walk(log_prob)
    out_of_bounds = _forward(
        log_prob.dtype, way.tasks,
        log_prob.data_ptr(), target.data_ptr(), weight.data_ptr(), loss.data_ptr(), row_weight.data_ptr(),
        ignore_index, weight.stride(0), *way,
    )  # fmt: skip
    if out_of_bounds:
        refuse_out_of_bounds(target, way.classes, ignore_index)


def nll_loss_backward(target: Tensor, ignore_index: int, row_weight: Tensor, dloss: Tensor, dlog_prob: Tensor) -> None:
    way = walk(dlog_prob)
    _backward(
        dlog_prob.dtype, way.tasks,
        dlog_prob.data_ptr(), target.data_ptr(), row_weight.data_ptr(), dloss.data_ptr(),
        ignore_index, dloss.stride(0), bypass_caches(target, dlog_prob), *way,
    )  # fmt: skip


@region(_FORWARD)
def _forward(a: Any) -> None:
    (log_prob, target, weight, loss, row_weight, ignore_index, weight_stride,
     batch, classes, positions, batch_stride, class_stride, position_stride, tile, grain) = unpack(a, _FORWARD)  # fmt: skip
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_tile(task, grain, batch, positions, tile)):
            b, p, row, count = rows_of(number, positions, tile)
            x = offset(log_prob, b * batch_stride + p * position_stride)
            for i in range(row, row + count):
                y = target[i]
                if y == ignore_index or y < 0 or y >= classes:
                    loss[i], row_weight[i] = 0, 0
                    if y != ignore_index:
                        raise_flag(a)
                else:
                    row_weight[i] = weight[y * weight_stride]
                    loss[i] = -row_weight[i] * load_one(x, (i - row) * position_stride + y * class_stride)
        task = next_task(a)


@region(_BACKWARD)
def _backward(a: Any) -> None:
    (dlog_prob, target, row_weight, dloss, ignore_index, dloss_stride, past_caches,
     batch, classes, positions, batch_stride, class_stride, position_stride, tile, grain) = unpack(a, _BACKWARD)  # fmt: skip
    lanes, across = lanes_of(dlog_prob), 1 if tile > 1 else 0
    lane_stride = position_stride if tile > 1 else class_stride
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_tile(task, grain, batch, positions, tile)):
            b, p, row, count = rows_of(number, positions, tile)
            dx = offset(dlog_prob, b * batch_stride + p * position_stride)
            # row numbers: one for each lane, or the row's in every lane
            size = count if tile > 1 else lanes
            nothing = splat(0.0, dx)
            y = load_classes(target, row, across, size, ignore_index, nothing)
            g = load(dloss, row * dloss_stride, across * dloss_stride, size, 0.0) * load(row_weight, row, across, size, 0.0)
            # gradient
            y_row = -1 if target[row] == ignore_index else target[row]
            c, n = 0, first_vector(dx, classes, tile, count, past_caches)
            while c < classes:
                stop = whole_vectors(c, n, classes, tile, lanes) if class_stride == 1 else c
                if c <= y_row < stop:
                    stop = c + (y_row - c) // lanes * lanes  # the target's vector goes by itself
                for k in range(c, stop, lanes):
                    stream(dx, k, nothing, past_caches)
                if stop > c:
                    c, n = stop, min(lanes, classes - stop)
                else:
                    value = select(y == c, nothing - g, nothing) if tile > 1 else less_at(nothing, y_row - c, g)
                    store(dx, c * class_stride, lane_stride, n, value)
                    c, n = advance(c, n, classes, tile, lanes)
        task = next_task(a)
