"""Binary cross-entropy on probabilities, element by element.

loss = -w (y max(log p, -100) + (1 - y) max(log(1 - p), -100))      dprob = dloss w (p - y) / max((1 - p) p, 1e-12)
"""

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .elements import ELEMENTS, elements, last_piece, piece_of
from .launch import next_task, raise_flag, region, unpack
from .math import INLINE, log
from .memory import load, offset, prefetch, store
from .reduction import sum_rows
from .rows import AHEAD
from .simd import fma, lane_max, lane_sum, lanes_of, select, splat, widen
from .targets import refuse_improbable

_EPSILON = float(np.float32(1e-12))  # torch's constant is a float, for float64 too
_FORWARD = "TTCC" + "n" * 12 + ELEMENTS
_SUM = "TTCD" + "n" * 9 + ELEMENTS
_BACKWARD = "TTCCT" + "n" * 15 + ELEMENTS


def binary_cross_entropy_forward(prob: Tensor, target: Tensor, weight: Tensor, loss: Tensor) -> None:
    way = elements(prob)
    improbable = _forward(
        prob.dtype, way.tasks,
        prob.data_ptr(), target.data_ptr(), weight.data_ptr(), loss.data_ptr(),
        *prob.stride(), *target.stride(), *weight.stride(), *loss.stride(), *way,
    )  # fmt: skip
    if improbable:
        refuse_improbable(prob)


def binary_cross_entropy_sum(prob: Tensor, target: Tensor, weight: Tensor, total: Tensor) -> None:
    way = elements(prob)
    partial = torch.empty(way.pieces, dtype=torch.float64, device="cpu")
    improbable = _sum(
        prob.dtype, way.tasks,
        prob.data_ptr(), target.data_ptr(), weight.data_ptr(), partial.data_ptr(),
        *prob.stride(), *target.stride(), *weight.stride(), *way,
    )  # fmt: skip
    if improbable:
        refuse_improbable(prob)
    sum_rows(partial, total)


def binary_cross_entropy_backward(prob: Tensor, target: Tensor, weight: Tensor, dloss: Tensor, dprob: Tensor) -> None:
    way = elements(prob)
    _backward(
        prob.dtype, way.tasks,
        prob.data_ptr(), target.data_ptr(), weight.data_ptr(), dloss.data_ptr(), dprob.data_ptr(),
        *prob.stride(), *target.stride(), *weight.stride(), *dloss.stride(), *dprob.stride(), *way,
    )  # fmt: skip


@njit(**INLINE)
def _clamped(log_p: Any) -> Any:
    return select(log_p > -100.0, log_p, -100.0)


@njit(**INLINE)
def _loss(p: Any, y: Any, weight: Any) -> Any:
    # log(1 - p) = log(rest) plus what the rounding of `rest` lost
    rest = 1.0 - p
    lost = ((1.0 - rest) - p) / rest
    log_rest = _clamped(log(rest) + select(rest > 0.0, lost, 0.0))
    return weight * (fma(y - 1.0, log_rest, 0.0 - y * _clamped(log(p))))


@njit(**INLINE)
def _outside(p: Any, y: Any) -> Any:
    """1 in lanes where p or y is not a probability, NaN included."""
    p_wrong = select(p < 0.0, 1.0, select(p > 1.0, splat(1.0, p), select(p == p, splat(0.0, p), 1.0)))
    return select(y < 0.0, 1.0, select(y > 1.0, splat(1.0, p), select(y == y, p_wrong, 1.0)))


@region(_FORWARD)
def _forward(a: Any) -> None:
    (prob, target, weight, loss, p_a, p_b, p_p, y_a, y_b, y_p, w_a, w_b, w_p, l_a, l_b, l_p,
     size_a, size_b, size_p, grain) = unpack(a, _FORWARD)  # fmt: skip
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_piece(task, grain, size_a, size_b, size_p)):
            i, j, first, size = piece_of(number, size_b, size_p)
            p, y = offset(prob, i * p_a + j * p_b + first * p_p), offset(target, i * y_a + j * y_b + first * y_p)
            w, out = offset(weight, i * w_a + j * w_b + first * w_p), offset(loss, i * l_a + j * l_b + first * l_p)
            wrong = splat(0.0, p)
            for k in range(0, size, lanes_of(p)):
                n = size - k
                prefetch(p, k * p_p + AHEAD)
                prefetch(y, k * y_p + AHEAD)
                value, label = load(p, k * p_p, p_p, n, 0.0), load(y, k * y_p, y_p, n, 0.0)
                wrong = wrong + _outside(value, label)
                store(out, k * l_p, l_p, n, _loss(value, label, load(w, k * w_p, w_p, n, 0.0)))
            if lane_max(wrong) > 0:
                raise_flag(a)
        task = next_task(a)


@region(_SUM)
def _sum(a: Any) -> None:
    (prob, target, weight, partial, p_a, p_b, p_p, y_a, y_b, y_p, w_a, w_b, w_p,
     size_a, size_b, size_p, grain) = unpack(a, _SUM)  # fmt: skip
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_piece(task, grain, size_a, size_b, size_p)):
            i, j, first, size = piece_of(number, size_b, size_p)
            p, y = offset(prob, i * p_a + j * p_b + first * p_p), offset(target, i * y_a + j * y_b + first * y_p)
            w = offset(weight, i * w_a + j * w_b + first * w_p)
            subtotal, wrong = widen(splat(0.0, p)), splat(0.0, p)
            for k in range(0, size, lanes_of(p)):
                n = size - k
                prefetch(p, k * p_p + AHEAD)
                prefetch(y, k * y_p + AHEAD)
                value, label = load(p, k * p_p, p_p, n, 0.0), load(y, k * y_p, y_p, n, 0.0)
                wrong = wrong + _outside(value, label)
                subtotal = subtotal + widen(_loss(value, label, load(w, k * w_p, w_p, n, 0.0)))
            partial[number] = lane_sum(subtotal)
            if lane_max(wrong) > 0:
                raise_flag(a)
        task = next_task(a)


@region(_BACKWARD)
def _backward(a: Any) -> None:
    (prob, target, weight, dloss, dprob, p_a, p_b, p_p, y_a, y_b, y_p, w_a, w_b, w_p, g_a, g_b, g_p, d_a, d_b, d_p,
     size_a, size_b, size_p, grain) = unpack(a, _BACKWARD)  # fmt: skip
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_piece(task, grain, size_a, size_b, size_p)):
            i, j, first, size = piece_of(number, size_b, size_p)
            p, y = offset(prob, i * p_a + j * p_b + first * p_p), offset(target, i * y_a + j * y_b + first * y_p)
            w, g = offset(weight, i * w_a + j * w_b + first * w_p), offset(dloss, i * g_a + j * g_b + first * g_p)
            dp = offset(dprob, i * d_a + j * d_b + first * d_p)
            for k in range(0, size, lanes_of(p)):
                n = size - k
                prefetch(p, k * p_p + AHEAD)
                prefetch(y, k * y_p + AHEAD)
                value = load(p, k * p_p, p_p, n, 0.0)
                variance = (1.0 - value) * value
                slope = (value - load(y, k * y_p, y_p, n, 0.0)) / select(variance > _EPSILON, variance, _EPSILON)
                store(dp, k * d_p, d_p, n, load(g, k * g_p, g_p, n, 0.0) * load(w, k * w_p, w_p, n, 0.0) * slope)
        task = next_task(a)
