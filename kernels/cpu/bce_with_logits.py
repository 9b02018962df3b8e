"""Sigmoid binary cross-entropy on logits, element by element; s = sigmoid, v = pos_weight.

    loss = w ((1 - y) x + (1 + (v - 1) y) softplus(-x))      dlogits = dloss w ((1 - y) s(x) - v y s(-x))

Both are written so that no tail is lost to cancellation: the small one of s(x), s(-x) is computed as such, and for x < 0 the loss is
(1 + (v - 1) y) log1p(exp(x)) - v y x.
"""

from typing import Any, NamedTuple

import torch
from numba import njit
from torch import Tensor

from .arguments import Float64, Floats, Known, Stored, arguments
from .elements import (
    Elements,
    Line,
    Strides,
    elements,
    in_use,
    last_piece,
    line_at,
    load_along,
    piece_of,
    prefetch_along,
    store_along,
    value_along,
)
from .inline import INLINE
from .launch import next_task, region
from .math import add_log1p, exp_for
from .memory import load_one, store, stream, to_alignment
from .reduction import sum_rows
from .rows import bypass_caches, to_first_vector, whole_vectors
from .simd import bits, fma, lane_sum, lanes_of, minus_magnitude, select, splat, times_sign, widen


class Inputs(NamedTuple):
    logits: Stored
    strides: Strides
    target: Floats
    target_strides: Strides
    weight: Floats
    weight_strides: Strides
    pos_weight: Floats
    pos_weight_strides: Strides


class Forward(NamedTuple):
    inputs: Inputs
    loss: Floats
    loss_strides: Strides
    way: Elements


class Sum(NamedTuple):
    inputs: Inputs
    partial: Float64  # a sum for each piece
    way: Elements


class Backward(NamedTuple):
    inputs: Inputs
    dloss: Floats
    dloss_strides: Strides
    dlogits: Stored
    dstrides: Strides
    partial: Float64 | None  # as in `Sum`, where both are wanted
    past_caches: Known
    way: Elements


class Lines(NamedTuple):
    """The inputs of a piece, each a `Line`."""

    x: Any
    y: Any
    w: Any
    v: Any


def _inputs(logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor) -> Inputs:
    strides = logits.stride(), target.stride(), weight.stride(), pos_weight.stride()
    return Inputs(logits, strides[0], target, strides[1], weight, strides[2], pos_weight, strides[3])


def bce_with_logits_forward(logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor, loss: Tensor) -> None:
    way = elements(logits)
    inputs = _inputs(logits, target, weight, pos_weight)
    _forward(way.tasks, Forward(inputs=inputs, loss=loss, loss_strides=loss.stride(), way=way))


def bce_with_logits_sum(logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor, total: Tensor) -> None:
    way = elements(logits)
    partial = torch.empty(way.pieces, dtype=torch.float64, device="cpu")
    _sum(way.tasks, Sum(inputs=_inputs(logits, target, weight, pos_weight), partial=partial, way=way))
    sum_rows(partial, total)


def bce_with_logits_backward(logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor, dloss: Tensor, dlogits: Tensor) -> None:
    way = elements(logits)
    _backward(way.tasks, Backward(
        inputs=_inputs(logits, target, weight, pos_weight), dloss=dloss, dloss_strides=dloss.stride(),
        dlogits=dlogits, dstrides=dlogits.stride(), partial=None, past_caches=bypass_caches(logits, dlogits), way=way,
    ))  # fmt: skip


def bce_with_logits_sum_backward(
    logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor, dloss: Tensor, total: Tensor, dlogits: Tensor
) -> None:
    way = elements(logits)
    partial = torch.empty(way.pieces, dtype=torch.float64, device="cpu")
    _sum_backward(way.tasks, Backward(
        inputs=_inputs(logits, target, weight, pos_weight), dloss=dloss, dloss_strides=dloss.stride(),
        dlogits=dlogits, dstrides=dlogits.stride(), partial=partial, past_caches=bypass_caches(logits, dlogits), way=way,
    ))  # fmt: skip
    sum_rows(partial, total)


@njit(**INLINE)
def far_exp(at: Any, x: Any) -> Any:
    """exp(-|x|), of numbers as exact as those behind this pointer."""
    return exp_for(at, minus_magnitude(x))


@njit(**INLINE)
def _sides(x: Any, y: Any, v: Any) -> Any:
    """On the side of 0 where x is: the slope of the loss far out, 1 - y or -v y; and the factor of softplus, 1 - y + v y."""
    positive, negative = 1.0 - y, v * y
    # exactly 1 without pos_weight, also if y is no probability: the loops that leave it out then give the same bits
    factor = select(v == 1.0, 1.0, fma(v, y, positive))
    return select(bits(x) < 0, 0.0 - negative, positive), factor


@njit(**INLINE)
def loss_of(at: Any, x: Any, y: Any, v: Any) -> Any:
    """far x + factor log1p(exp(-|x|)): `_sides`."""
    far, factor = _sides(x, y, v)
    nan = select(bits(x) < 0, x * 0.0, 0.0)  # torch's loss of -inf
    return fma(far, x, add_log1p(at, factor, far_exp(at, x), nan))


@njit(**INLINE)
def _gradient_of(at: Any, x: Any, y: Any, v: Any, g: Any) -> Any:
    """g (far - sign(x) factor s(-|x|))."""
    far, factor = _sides(x, y, v)
    e = far_exp(at, x)
    return fma(times_sign(factor * e, x), (0.0 - g) / (e + 1.0), g * far)


@njit(**INLINE)
def _lines(inputs: Any, piece: Any) -> Any:
    return Lines(
        line_at(inputs.logits, inputs.strides, piece),
        line_at(inputs.target, inputs.target_strides, piece),
        line_at(inputs.weight, inputs.weight_strides, piece),
        line_at(inputs.pos_weight, inputs.pos_weight_strides, piece),
    )


@njit(**INLINE)
def _side_by_side(e: Any, w: Any, v: Any) -> Any:
    """Logits and targets side by side, with steps that the compiler knows: see `rows.whole_vectors`. Weights are lines, or numbers."""
    return Lines(Line(e.x.at, 1), Line(e.y.at, 1), w, v)


@njit(**INLINE)
def _prefetch(e: Any, k: Any) -> None:
    prefetch_along(e.x, k)
    prefetch_along(e.y, k)


@njit(**INLINE)
def _loss_at(e: Any, k: Any, n: Any) -> Any:
    x, y = load_along(e.x, k, n), load_along(e.y, k, n)
    return value_along(e.w, k, n) * loss_of(e.x.at, x, y, value_along(e.v, k, n))


@njit(**INLINE)
def _gradient_at(e: Any, g: Any, k: Any, n: Any) -> Any:
    x, y = load_along(e.x, k, n), load_along(e.y, k, n)
    return _gradient_of(e.x.at, x, y, value_along(e.v, k, n), value_along(g, k, n) * value_along(e.w, k, n))


@region(Forward)
def _forward(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_piece(task, a.way)):
            piece = piece_of(number, a.way)
            e, out = _lines(a.inputs, piece), line_at(a.loss, a.loss_strides, piece)
            if e.x.step == e.y.step == out.step == 1 and e.w.step == e.v.step == 0:
                near = _side_by_side(e, load_one(e.w.at, 0), load_one(e.v.at, 0))
                _losses_of_piece(near, Line(out.at, 1), piece.size)
            else:
                _losses_of_piece(e, out, piece.size)
        task = next_task(block)


@njit(**INLINE)
def _losses_of_piece(e: Any, out: Any, size: Any) -> None:
    for k in range(0, size, lanes_of(e.x.at)):
        _prefetch(e, k)
        store_along(out, k, size - k, _loss_at(e, k, size - k))


@njit(**INLINE)
def _total_of_piece(e: Any, size: Any) -> Any:
    if e.x.step == e.y.step == 1 and e.w.step == 0:
        if e.v.step == 1:
            return load_one(e.w.at, 0) * _sum_of_piece(_side_by_side(e, 1.0, Line(e.v.at, 1)), size)
        if e.v.step == 0 and load_one(e.v.at, 0) == 1.0:
            return load_one(e.w.at, 0) * _sum_of_piece(_side_by_side(e, 1.0, 1.0), size)
        if e.v.step == 0:
            return load_one(e.w.at, 0) * _sum_of_piece(_side_by_side(e, 1.0, load_one(e.v.at, 0)), size)
    return _sum_of_piece(e, size)


@njit(**INLINE)
def _sum_of_piece(e: Any, size: Any) -> Any:
    lanes = lanes_of(e.x.at)
    subtotal, whole = widen(splat(0.0, e.x.at)), size // (8 * lanes) * (8 * lanes)
    for k in range(0, whole, 8 * lanes):
        eight = splat(0.0, e.x.at)
        for i in range(k, k + 8 * lanes, 2 * lanes):
            _prefetch(e, i)
            _prefetch(e, i + lanes)
            eight = eight + (_loss_at(e, i, lanes) + _loss_at(e, i + lanes, lanes))
        subtotal = subtotal + widen(eight)
    for k in range(whole, size, lanes):
        subtotal = subtotal + widen(in_use(_loss_at(e, k, size - k), size - k))
    return lane_sum(subtotal)


@region(Sum)
def _sum(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_piece(task, a.way)):
            piece = piece_of(number, a.way)
            a.partial[number] = _total_of_piece(_lines(a.inputs, piece), piece.size)
        task = next_task(block)


@njit(**INLINE)
def _gradient_of_piece(e: Any, g: Any, dx: Any, size: Any, past_caches: Any) -> None:
    lanes = lanes_of(e.x.at)
    consecutive = e.x.step == e.y.step == dx.step == 1 and e.w.step == g.step == 0
    k, n = 0, to_first_vector(dx.at, size, past_caches)
    while k < size:
        stop = whole_vectors(k, n, size, lanes) if consecutive and e.v.step < 2 else k
        if stop > k:
            _gradients_of_weight(e, load_one(g.at, 0) * load_one(e.w.at, 0), dx, k, stop, past_caches)
            k, n = stop, size - stop
        else:
            _prefetch(e, k)
            store_along(dx, k, n, _gradient_at(e, g, k, n))
            k, n = k + n, min(lanes, size - k - n)


@njit(**INLINE)
def _gradients_of_weight(e: Any, g: Any, dx: Any, first: Any, last: Any, past_caches: Any) -> None:
    """Whole vectors of logits, targets and gradients that lie side by side, with one g for all."""
    if e.v.step == 1:
        _gradients_of_vectors(_side_by_side(e, 1.0, Line(e.v.at, 1)), g, dx, first, last, past_caches)
    elif load_one(e.v.at, 0) == 1.0:
        _gradients_of_vectors(_side_by_side(e, 1.0, 1.0), g, dx, first, last, past_caches)
    else:
        _gradients_of_vectors(_side_by_side(e, 1.0, load_one(e.v.at, 0)), g, dx, first, last, past_caches)


@njit(**INLINE)
def _gradients_of_vectors(e: Any, g: Any, dx: Any, first: Any, last: Any, past_caches: Any) -> None:
    lanes = lanes_of(e.x.at)
    for k in range(first, last, lanes):
        _prefetch(e, k)
        stream(dx.at, k, _gradient_at(e, g, k, lanes), past_caches)


@region(Backward)
def _backward(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_piece(task, a.way)):
            piece = piece_of(number, a.way)
            g, dx = line_at(a.dloss, a.dloss_strides, piece), line_at(a.dlogits, a.dstrides, piece)
            _gradient_of_piece(_lines(a.inputs, piece), g, dx, piece.size, a.past_caches)
        task = next_task(block)


@njit(**INLINE)
def _sum_and_gradient_of_weight(e: Any, g: Any, dx: Any, size: Any, past_caches: Any) -> Any:
    if e.v.step == 1:
        return _sum_and_gradient_of_piece(_side_by_side(e, 1.0, Line(e.v.at, 1)), g, dx, size, past_caches)
    if load_one(e.v.at, 0) == 1.0:
        return _sum_and_gradient_of_piece(_side_by_side(e, 1.0, 1.0), g, dx, size, past_caches)
    return _sum_and_gradient_of_piece(_side_by_side(e, 1.0, load_one(e.v.at, 0)), g, dx, size, past_caches)


@njit(**INLINE)
def _sum_and_gradient_of_piece(e: Any, g: Any, dx: Any, size: Any, past_caches: Any) -> Any:
    """`_sum_of_piece`, and the gradient on the way: the compiler sees that both need the same exp."""
    lanes = lanes_of(e.x.at)
    subtotal, whole = widen(splat(0.0, e.x.at)), size // (8 * lanes) * (8 * lanes)
    for k in range(0, whole, 8 * lanes):
        eight = splat(0.0, e.x.at)
        for i in range(k, k + 8 * lanes, 2 * lanes):
            _prefetch(e, i)
            _prefetch(e, i + lanes)
            two = _loss_at(e, i, lanes)
            stream(dx.at, i, _gradient_at(e, g, i, lanes), past_caches)
            eight = eight + (two + _loss_at(e, i + lanes, lanes))
            stream(dx.at, i + lanes, _gradient_at(e, g, i + lanes, lanes), past_caches)
        subtotal = subtotal + widen(eight)
    for k in range(whole, size, lanes):
        n = size - k
        subtotal = subtotal + widen(in_use(_loss_at(e, k, n), n))
        store(dx.at, k, 1, n, _gradient_at(e, g, k, n))
    return lane_sum(subtotal)


@region(Backward)
def _sum_backward(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_piece(task, a.way)):
            piece = piece_of(number, a.way)
            e, g, dx = _lines(a.inputs, piece), line_at(a.dloss, a.dloss_strides, piece), line_at(a.dlogits, a.dstrides, piece)
            consecutive = e.x.step == e.y.step == dx.step == 1 and e.w.step == g.step == 0 and e.v.step < 2
            if consecutive and (a.past_caches == 0 or to_alignment(dx.at) == 0):
                w = load_one(e.w.at, 0)
                a.partial[number] = w * _sum_and_gradient_of_weight(e, load_one(g.at, 0) * w, dx, piece.size, a.past_caches)
            else:  # one after the other: the second finds the piece in the caches
                a.partial[number] = _total_of_piece(e, piece.size)
                _gradient_of_piece(e, g, dx, piece.size, a.past_caches)
        task = next_task(block)
