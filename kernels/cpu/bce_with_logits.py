"""Sigmoid binary cross-entropy on logits, element by element; s = sigmoid, v = pos_weight.

    loss = w ((1 - y) x + (1 + (v - 1) y) softplus(-x))      dlogits = dloss w ((1 - y) s(x) - v y s(-x))

Both are written so that no tail is lost to cancellation: the small one of s(x), s(-x) is computed as such, and for x < 0 the loss is
(1 + (v - 1) y) log1p(exp(x)) - v y x.
"""

from typing import Any

import torch
from numba import njit
from torch import Tensor

from .elements import ELEMENTS, elements, last_piece, piece_of
from .launch import next_task, region, unpack
from .math import INLINE, exp, log1p
from .memory import load, offset, prefetch, store, stream, to_alignment
from .reduction import sum_rows
from .rows import AHEAD, bypass_caches, first_vector, whole_vectors
from .simd import fma, lane_sum, lanes_of, select, splat, widen

_FORWARD = "TTCCC" + "n" * 15 + ELEMENTS
_SUM = "TTCCD" + "n" * 12 + ELEMENTS
_BACKWARD = "TTCCCT" + "n" * 19 + ELEMENTS
_SUM_BACKWARD = "TTCCCTD" + "n" * 19 + ELEMENTS


def bce_with_logits_forward(logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor, loss: Tensor) -> None:
    way = elements(logits)
    _forward(
        logits.dtype, way.tasks,
        logits.data_ptr(), target.data_ptr(), weight.data_ptr(), pos_weight.data_ptr(), loss.data_ptr(),
        *logits.stride(), *target.stride(), *weight.stride(), *pos_weight.stride(), *loss.stride(), *way,
    )  # fmt: skip


def bce_with_logits_sum(logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor, total: Tensor) -> None:
    way = elements(logits)
    partial = torch.empty(way.pieces, dtype=torch.float64, device="cpu")
    _sum(
        logits.dtype, way.tasks,
        logits.data_ptr(), target.data_ptr(), weight.data_ptr(), pos_weight.data_ptr(), partial.data_ptr(),
        *logits.stride(), *target.stride(), *weight.stride(), *pos_weight.stride(), *way,
    )  # fmt: skip
    sum_rows(partial, total)


def bce_with_logits_backward(logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor, dloss: Tensor, dlogits: Tensor) -> None:
    way = elements(logits)
    _backward(
        logits.dtype, way.tasks,
        logits.data_ptr(), target.data_ptr(), weight.data_ptr(), pos_weight.data_ptr(), dloss.data_ptr(), dlogits.data_ptr(),
        bypass_caches(logits, dlogits), *logits.stride(), *target.stride(), *weight.stride(), *pos_weight.stride(), *dloss.stride(),
        *dlogits.stride(), *way,
    )  # fmt: skip


def bce_with_logits_sum_backward(
    logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor, dloss: Tensor, total: Tensor, dlogits: Tensor
) -> None:
    way = elements(logits)
    partial = torch.empty(way.pieces, dtype=torch.float64, device="cpu")
    _sum_backward(
        logits.dtype, way.tasks,
        logits.data_ptr(), target.data_ptr(), weight.data_ptr(), pos_weight.data_ptr(), dloss.data_ptr(), dlogits.data_ptr(),
        partial.data_ptr(), bypass_caches(logits, dlogits), *logits.stride(), *target.stride(), *weight.stride(), *pos_weight.stride(),
        *dloss.stride(), *dlogits.stride(), *way,
    )  # fmt: skip
    sum_rows(partial, total)


@njit(**INLINE)
def _loss(x: Any, y: Any, weight: Any, pos_weight: Any) -> Any:
    negative = 1.0 - y
    high = negative * x
    # 0 * high: an infinite x makes the loss NaN where torch's does
    linear = select(x > 0.0, high, fma(high, 0.0, 0.0 - pos_weight * y * x))
    softplus = log1p(exp(select(x > 0.0, 0.0 - x, x)))
    return weight * fma(fma(pos_weight, y, negative), softplus, linear)


@njit(**INLINE)
def _slope(x: Any, y: Any, weight: Any, pos_weight: Any) -> Any:
    e = exp(select(x > 0.0, 0.0 - x, x))
    large = 1.0 / (e + 1.0)
    small = e * large
    positive = x > 0.0
    return weight * ((1.0 - y) * select(positive, large, small) - pos_weight * y * select(positive, small, large))


@njit(**INLINE)
def _loss_at(x: Any, x_p: Any, y: Any, y_p: Any, w: Any, w_p: Any, v: Any, v_p: Any, k: Any, n: Any) -> Any:
    return _loss(load(x, k * x_p, x_p, n, 0.0), load(y, k * y_p, y_p, n, 0.0), load(w, k * w_p, w_p, n, 0.0), load(v, k * v_p, v_p, n, 0.0))


@njit(**INLINE)
def _sum_of_piece(x: Any, x_p: Any, y: Any, y_p: Any, w: Any, w_p: Any, v: Any, v_p: Any, size: Any) -> Any:
    """Called with strides that the compiler knows wherever that is possible: see `rows.whole_vectors`."""
    lanes = lanes_of(x)
    subtotal, whole = widen(splat(0.0, x)), size // (4 * lanes) * (4 * lanes)
    for k in range(0, whole, 4 * lanes):
        four = splat(0.0, x)
        for i in range(k, k + 4 * lanes, lanes):
            prefetch(x, i * x_p + AHEAD)
            prefetch(y, i * y_p + AHEAD)
            four = four + _loss_at(x, x_p, y, y_p, w, w_p, v, v_p, i, lanes)
        subtotal = subtotal + widen(four)
    for k in range(whole, size, lanes):
        subtotal = subtotal + widen(_loss_at(x, x_p, y, y_p, w, w_p, v, v_p, k, size - k))
    return lane_sum(subtotal)


@region(_FORWARD)
def _forward(a: Any) -> None:
    (logits, target, weight, pos_weight, loss, x_a, x_b, x_p, y_a, y_b, y_p, w_a, w_b, w_p, v_a, v_b, v_p, l_a, l_b, l_p,
     size_a, size_b, size_p, grain) = unpack(a, _FORWARD)  # fmt: skip
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_piece(task, grain, size_a, size_b, size_p)):
            i, j, first, size = piece_of(number, size_b, size_p)
            x, y = offset(logits, i * x_a + j * x_b + first * x_p), offset(target, i * y_a + j * y_b + first * y_p)
            w, v = offset(weight, i * w_a + j * w_b + first * w_p), offset(pos_weight, i * v_a + j * v_b + first * v_p)
            out = offset(loss, i * l_a + j * l_b + first * l_p)
            for k in range(0, size, lanes_of(x)):
                n = size - k
                prefetch(x, k * x_p + AHEAD)
                prefetch(y, k * y_p + AHEAD)
                value = _loss_at(x, x_p, y, y_p, w, w_p, v, v_p, k, n)
                store(out, k * l_p, l_p, n, value)
        task = next_task(a)


@njit(**INLINE)
def _total_of_piece(x: Any, x_p: Any, y: Any, y_p: Any, w: Any, w_p: Any, v: Any, v_p: Any, size: Any) -> Any:
    if x_p == y_p == 1 and w_p == v_p == 0:
        return _sum_of_piece(x, 1, y, 1, w, 0, v, 0, size)
    if x_p == y_p == v_p == 1 and w_p == 0:
        return _sum_of_piece(x, 1, y, 1, w, 0, v, 1, size)
    return _sum_of_piece(x, x_p, y, y_p, w, w_p, v, v_p, size)


@region(_SUM)
def _sum(a: Any) -> None:
    (logits, target, weight, pos_weight, partial, x_a, x_b, x_p, y_a, y_b, y_p, w_a, w_b, w_p, v_a, v_b, v_p,
     size_a, size_b, size_p, grain) = unpack(a, _SUM)  # fmt: skip
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_piece(task, grain, size_a, size_b, size_p)):
            i, j, first, size = piece_of(number, size_b, size_p)
            x, y = offset(logits, i * x_a + j * x_b + first * x_p), offset(target, i * y_a + j * y_b + first * y_p)
            w, v = offset(weight, i * w_a + j * w_b + first * w_p), offset(pos_weight, i * v_a + j * v_b + first * v_p)
            partial[number] = _total_of_piece(x, x_p, y, y_p, w, w_p, v, v_p, size)
        task = next_task(a)


@njit(**INLINE)
def _slope_at(x: Any, x_p: Any, y: Any, y_p: Any, w: Any, w_p: Any, v: Any, v_p: Any, k: Any, n: Any) -> Any:
    return _slope(
        load(x, k * x_p, x_p, n, 0.0), load(y, k * y_p, y_p, n, 0.0), load(w, k * w_p, w_p, n, 0.0), load(v, k * v_p, v_p, n, 0.0)
    )


@njit(**INLINE)
def _gradient_of_piece(
    x: Any, x_p: Any, y: Any, y_p: Any, w: Any, w_p: Any, v: Any, v_p: Any, g: Any, g_p: Any, dx: Any, d_p: Any, size: Any, past_caches: Any
) -> None:
    lanes = lanes_of(x)
    k, n = 0, first_vector(dx, size, 1, 0, past_caches)
    while k < size:
        stop = whole_vectors(k, n, size, 1, lanes) if x_p == y_p == d_p == 1 and w_p == g_p == 0 else k
        if stop > k and v_p == 0:
            _slopes_of_piece(x, y, w, v, 0, g, 0, dx, k, stop, past_caches)
            k, n = stop, size - stop
        elif stop > k and v_p == 1:
            _slopes_of_piece(x, y, w, v, 1, g, 0, dx, k, stop, past_caches)
            k, n = stop, size - stop
        else:
            prefetch(x, k * x_p + AHEAD)
            prefetch(y, k * y_p + AHEAD)
            slope = _slope_at(x, x_p, y, y_p, w, w_p, v, v_p, k, n)
            store(dx, k * d_p, d_p, n, load(g, k * g_p, g_p, n, 0.0) * slope)
            k, n = k + n, min(lanes, size - k - n)


@njit(**INLINE)
def _slopes_of_piece(x: Any, y: Any, w: Any, v: Any, v_p: Any, g: Any, g_p: Any, dx: Any, first: Any, last: Any, past_caches: Any) -> None:
    """Whole vectors of logits, targets and gradients that lie side by side, with one weight for all."""
    lanes = lanes_of(x)
    for k in range(first, last, lanes):
        prefetch(x, k + AHEAD)
        prefetch(y, k + AHEAD)
        stream(dx, k, load(g, k * g_p, g_p, lanes, 0.0) * _slope_at(x, 1, y, 1, w, 0, v, v_p, k, lanes), past_caches)


@region(_BACKWARD)
def _backward(a: Any) -> None:
    (logits, target, weight, pos_weight, dloss, dlogits, past_caches, x_a, x_b, x_p, y_a, y_b, y_p, w_a, w_b, w_p, v_a, v_b, v_p,
     g_a, g_b, g_p, d_a, d_b, d_p, size_a, size_b, size_p, grain) = unpack(a, _BACKWARD)  # fmt: skip
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_piece(task, grain, size_a, size_b, size_p)):
            i, j, first, size = piece_of(number, size_b, size_p)
            x, y = offset(logits, i * x_a + j * x_b + first * x_p), offset(target, i * y_a + j * y_b + first * y_p)
            w, v = offset(weight, i * w_a + j * w_b + first * w_p), offset(pos_weight, i * v_a + j * v_b + first * v_p)
            g, dx = offset(dloss, i * g_a + j * g_b + first * g_p), offset(dlogits, i * d_a + j * d_b + first * d_p)
            _gradient_of_piece(x, x_p, y, y_p, w, w_p, v, v_p, g, g_p, dx, d_p, size, past_caches)
        task = next_task(a)


@njit(**INLINE)
def _sum_and_slopes_of_piece(x: Any, y: Any, w: Any, v: Any, v_p: Any, g: Any, dx: Any, size: Any, past_caches: Any) -> Any:
    """`_sum_of_piece`, and the gradient on the way: the compiler sees that both need the same exp."""
    lanes = lanes_of(x)
    subtotal, whole = widen(splat(0.0, x)), size // (4 * lanes) * (4 * lanes)
    dloss = load(g, 0, 0, lanes, 0.0)
    for k in range(0, whole, 4 * lanes):
        four = splat(0.0, x)
        for i in range(k, k + 4 * lanes, lanes):
            prefetch(x, i + AHEAD)
            prefetch(y, i + AHEAD)
            four = four + _loss_at(x, 1, y, 1, w, 0, v, v_p, i, lanes)
            stream(dx, i, dloss * _slope_at(x, 1, y, 1, w, 0, v, v_p, i, lanes), past_caches)
        subtotal = subtotal + widen(four)
    for k in range(whole, size, lanes):
        n = size - k
        subtotal = subtotal + widen(_loss_at(x, 1, y, 1, w, 0, v, v_p, k, n))
        store(dx, k, 1, n, dloss * _slope_at(x, 1, y, 1, w, 0, v, v_p, k, n))
    return lane_sum(subtotal)


@region(_SUM_BACKWARD)
def _sum_backward(a: Any) -> None:
    (logits, target, weight, pos_weight, dloss, dlogits, partial, past_caches, x_a, x_b, x_p, y_a, y_b, y_p, w_a, w_b, w_p, v_a, v_b, v_p,
     g_a, g_b, g_p, d_a, d_b, d_p, size_a, size_b, size_p, grain) = unpack(a, _SUM_BACKWARD)  # fmt: skip
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_piece(task, grain, size_a, size_b, size_p)):
            i, j, first, size = piece_of(number, size_b, size_p)
            x, y = offset(logits, i * x_a + j * x_b + first * x_p), offset(target, i * y_a + j * y_b + first * y_p)
            w, v = offset(weight, i * w_a + j * w_b + first * w_p), offset(pos_weight, i * v_a + j * v_b + first * v_p)
            g, dx = offset(dloss, i * g_a + j * g_b + first * g_p), offset(dlogits, i * d_a + j * d_b + first * d_p)
            consecutive = x_p == y_p == d_p == 1 and w_p == g_p == 0 and (past_caches == 0 or to_alignment(dx) == 0)
            if consecutive and v_p == 0:
                partial[number] = _sum_and_slopes_of_piece(x, y, w, v, 0, g, dx, size, past_caches)
            elif consecutive and v_p == 1:
                partial[number] = _sum_and_slopes_of_piece(x, y, w, v, 1, g, dx, size, past_caches)
            else:  # one after the other: the second finds the piece in the caches
                partial[number] = _total_of_piece(x, x_p, y, y_p, w, w_p, v, v_p, size)
                _gradient_of_piece(x, x_p, y, y_p, w, w_p, v, v_p, g, g_p, dx, d_p, size, past_caches)
        task = next_task(a)
