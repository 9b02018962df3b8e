"""Binary cross-entropy on probabilities, element by element.

loss = -w (y max(log p, -100) + (1 - y) max(log(1 - p), -100))      dprob = dloss w (p - y) / max((1 - p) p, 1e-12)
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .arguments import Float64, Floats, Stored, arguments
from .elements import Elements, Line, Strides, elements, last_piece, line_at, load_along, piece_of, prefetch_along, store_along
from .inline import INLINE
from .launch import next_task, raise_flag, region
from .math import log
from .memory import load, store, stream, to_alignment
from .reduction import sum_rows
from .rows import bypass_caches, to_first_vector, whole_vectors
from .simd import fma, lane_max, lane_sum, lanes_of, select, splat, widen
from .targets import refuse_improbable

_EPSILON = float(np.float32(1e-12))  # torch's constant is a float, for float64 too


class Inputs(NamedTuple):
    prob: Stored
    strides: Strides
    target: Floats
    target_strides: Strides
    weight: Floats
    weight_strides: Strides


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
    dprob: Stored
    dstrides: Strides
    partial: Float64 | None  # as in `Sum`, where both are wanted
    past_caches: int
    way: Elements


class Lines(NamedTuple):
    """The inputs of a piece, each a `Line`."""

    p: Any
    y: Any
    w: Any


def _inputs(prob: Tensor, target: Tensor, weight: Tensor) -> Inputs:
    return Inputs(prob, prob.stride(), target, target.stride(), weight, weight.stride())


def binary_cross_entropy_forward(prob: Tensor, target: Tensor, weight: Tensor, loss: Tensor) -> None:
    way = elements(prob)
    inputs = _inputs(prob, target, weight)
    if _forward(way.tasks, Forward(inputs=inputs, loss=loss, loss_strides=loss.stride(), way=way)):
        refuse_improbable(prob)


def binary_cross_entropy_sum(prob: Tensor, target: Tensor, weight: Tensor, total: Tensor) -> None:
    way = elements(prob)
    partial = torch.empty(way.pieces, dtype=torch.float64, device="cpu")
    if _sum(way.tasks, Sum(inputs=_inputs(prob, target, weight), partial=partial, way=way)):
        refuse_improbable(prob)
    sum_rows(partial, total)


def binary_cross_entropy_backward(prob: Tensor, target: Tensor, weight: Tensor, dloss: Tensor, dprob: Tensor) -> None:
    way = elements(prob)
    _backward(way.tasks, Backward(
        inputs=_inputs(prob, target, weight), dloss=dloss, dloss_strides=dloss.stride(),
        dprob=dprob, dstrides=dprob.stride(), partial=None, past_caches=bypass_caches(prob, dprob), way=way,
    ))  # fmt: skip


def binary_cross_entropy_sum_backward(prob: Tensor, target: Tensor, weight: Tensor, dloss: Tensor, total: Tensor, dprob: Tensor) -> None:
    way = elements(prob)
    partial = torch.empty(way.pieces, dtype=torch.float64, device="cpu")
    if _sum_backward(way.tasks, Backward(
        inputs=_inputs(prob, target, weight), dloss=dloss, dloss_strides=dloss.stride(),
        dprob=dprob, dstrides=dprob.stride(), partial=partial, past_caches=bypass_caches(prob, dprob), way=way,
    )):  # fmt: skip
        refuse_improbable(prob)
    sum_rows(partial, total)


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
def _gradient(p: Any, y: Any, weight: Any, dloss: Any) -> Any:
    variance = (1.0 - p) * p
    return dloss * weight * ((p - y) / select(variance > _EPSILON, variance, _EPSILON))


@njit(**INLINE)
def _outside(p: Any, y: Any) -> Any:
    """1 in lanes where p or y is not a probability, NaN included."""
    p_wrong = select(p < 0.0, 1.0, select(p > 1.0, splat(1.0, p), select(p == p, splat(0.0, p), 1.0)))
    return select(y < 0.0, 1.0, select(y > 1.0, splat(1.0, p), select(y == y, p_wrong, 1.0)))


@njit(**INLINE)
def _lines(inputs: Any, piece: Any) -> Any:
    return Lines(
        line_at(inputs.prob, inputs.strides, piece),
        line_at(inputs.target, inputs.target_strides, piece),
        line_at(inputs.weight, inputs.weight_strides, piece),
    )


@njit(**INLINE)
def _one_weight(e: Any) -> Any:
    """Probabilities and targets side by side and one weight for all, with steps that the compiler knows: see `rows.whole_vectors`."""
    return Lines(Line(e.p.at, 1), Line(e.y.at, 1), Line(e.w.at, 0))


@njit(**INLINE)
def _prefetch(e: Any, k: Any) -> None:
    prefetch_along(e.p, k)
    prefetch_along(e.y, k)


@region(Forward)
def _forward(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_piece(task, a.way)):
            piece = piece_of(number, a.way)
            e, out = _lines(a.inputs, piece), line_at(a.loss, a.loss_strides, piece)
            if e.p.step == e.y.step == out.step == 1 and e.w.step == 0:
                wrong = _losses_of_piece(_one_weight(e), Line(out.at, 1), piece.size)
            else:
                wrong = _losses_of_piece(e, out, piece.size)
            if lane_max(wrong) > 0:
                raise_flag(block)
        task = next_task(block)


@njit(**INLINE)
def _losses_of_piece(e: Any, out: Any, size: Any) -> Any:
    """Write the losses. More than 0 in a lane that met a number that is no probability."""
    wrong = splat(0.0, e.p.at)
    for k in range(0, size, lanes_of(e.p.at)):
        n = size - k
        _prefetch(e, k)
        p, y = load_along(e.p, k, n), load_along(e.y, k, n)
        wrong = wrong + _outside(p, y)
        store_along(out, k, n, _loss(p, y, load_along(e.w, k, n)))
    return wrong


@njit(**INLINE)
def _total_of_piece(e: Any, size: Any) -> Any:
    """The sum of the losses; and more than 0 in a lane that met a number that is no probability."""
    if e.p.step == e.y.step == 1 and e.w.step == 0:
        return _sum_of_piece(_one_weight(e), size)
    return _sum_of_piece(e, size)


@njit(**INLINE)
def _sum_of_piece(e: Any, size: Any) -> Any:
    subtotal, wrong = widen(splat(0.0, e.p.at)), splat(0.0, e.p.at)
    for k in range(0, size, lanes_of(e.p.at)):
        n = size - k
        _prefetch(e, k)
        p, y = load_along(e.p, k, n), load_along(e.y, k, n)
        wrong = wrong + _outside(p, y)
        subtotal = subtotal + widen(_loss(p, y, load_along(e.w, k, n)))
    return lane_sum(subtotal), wrong


@region(Sum)
def _sum(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_piece(task, a.way)):
            piece = piece_of(number, a.way)
            a.partial[number], wrong = _total_of_piece(_lines(a.inputs, piece), piece.size)
            if lane_max(wrong) > 0:
                raise_flag(block)
        task = next_task(block)


@njit(**INLINE)
def _gradient_at(e: Any, g: Any, k: Any, n: Any) -> Any:
    return _gradient(load_along(e.p, k, n), load_along(e.y, k, n), load_along(e.w, k, n), load_along(g, k, n))


@njit(**INLINE)
def _gradient_of_piece(e: Any, g: Any, dp: Any, size: Any, past_caches: Any) -> None:
    lanes = lanes_of(e.p.at)
    consecutive = e.p.step == e.y.step == dp.step == 1 and e.w.step == g.step == 0
    k, n = 0, to_first_vector(dp.at, size, past_caches)
    while k < size:
        stop = whole_vectors(k, n, size, lanes) if consecutive else k
        if stop > k:
            _gradient_of_vectors(_one_weight(e), Line(g.at, 0), dp, k, stop, past_caches)
            k, n = stop, size - stop
        else:
            _prefetch(e, k)
            store_along(dp, k, n, _gradient_at(e, g, k, n))
            k, n = k + n, min(lanes, size - k - n)


@njit(**INLINE)
def _gradient_of_vectors(e: Any, g: Any, dp: Any, first: Any, last: Any, past_caches: Any) -> None:
    """Whole vectors of probabilities, targets and gradients that lie side by side, with one weight for all."""
    lanes = lanes_of(e.p.at)
    for k in range(first, last, lanes):
        _prefetch(e, k)
        stream(dp.at, k, _gradient_at(e, g, k, lanes), past_caches)


@region(Backward)
def _backward(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_piece(task, a.way)):
            piece = piece_of(number, a.way)
            g, dp = line_at(a.dloss, a.dloss_strides, piece), line_at(a.dprob, a.dstrides, piece)
            _gradient_of_piece(_lines(a.inputs, piece), g, dp, piece.size, a.past_caches)
        task = next_task(block)


@njit(**INLINE)
def _sum_and_gradient_of_piece(e: Any, g: Any, dp: Any, size: Any, past_caches: Any) -> Any:
    """`_sum_of_piece`, and the gradient on the way."""
    lanes = lanes_of(e.p.at)
    subtotal, wrong, whole = widen(splat(0.0, e.p.at)), splat(0.0, e.p.at), size // lanes * lanes
    dloss, w = load(g.at, 0, 0, lanes, 0.0), load_along(e.w, 0, lanes)
    for k in range(0, whole, lanes):
        _prefetch(e, k)
        p, y = load_along(e.p, k, lanes), load_along(e.y, k, lanes)
        wrong = wrong + _outside(p, y)
        subtotal = subtotal + widen(_loss(p, y, w))
        stream(dp.at, k, _gradient(p, y, w, dloss), past_caches)
    if whole < size:
        n = size - whole
        p, y = load_along(e.p, whole, n), load_along(e.y, whole, n)
        wrong = wrong + _outside(p, y)
        subtotal = subtotal + widen(_loss(p, y, load_along(e.w, whole, n)))
        store(dp.at, whole, 1, n, _gradient(p, y, w, dloss))
    return lane_sum(subtotal), wrong


@region(Backward)
def _sum_backward(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_piece(task, a.way)):
            piece = piece_of(number, a.way)
            e, g, dp = _lines(a.inputs, piece), line_at(a.dloss, a.dloss_strides, piece), line_at(a.dprob, a.dstrides, piece)
            consecutive = e.p.step == e.y.step == dp.step == 1 and e.w.step == g.step == 0
            if consecutive and (a.past_caches == 0 or to_alignment(dp.at) == 0):
                a.partial[number], wrong = _sum_and_gradient_of_piece(_one_weight(e), g, dp, piece.size, a.past_caches)
            else:  # one after the other: the second finds the piece in the caches
                a.partial[number], wrong = _total_of_piece(e, piece.size)
                _gradient_of_piece(e, g, dp, piece.size, a.past_caches)
            if lane_max(wrong) > 0:
                raise_flag(block)
        task = next_task(block)
