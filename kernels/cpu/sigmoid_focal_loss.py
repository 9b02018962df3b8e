"""Sigmoid focal loss on logits, element by element; s = sigmoid, q = y s(-x) + (1 - y) s(x) is how wrong the prediction is.

    loss = a q^gamma bce      a = positive y + negative (1 - y)      bce = (1 - y) x + softplus(-x)
    dlogits = dloss a q^gamma ((1 - y) s(x) - y s(-x) + gamma (1 - 2 y) s(x) s(-x) / q bce)

q has no cancellation: the small one of s(x), s(-x) is computed as such. Where it is 0, so is what it divides.
"""

from typing import Any, NamedTuple

import torch
from numba import njit
from torch import Tensor

from ..groups import Focus
from .arguments import Float64, Floats, Stored, arguments
from .bce_with_logits import far_exp, loss_of
from .elements import Elements, Line, Strides, elements, in_use, last_piece, line_at, load_along, piece_of, prefetch_along, store_along
from .inline import INLINE
from .launch import next_task, region
from .math import exp, log
from .memory import load, store, stream, to_alignment
from .reduction import sum_rows
from .rows import bypass_caches, to_first_vector, whole_vectors
from .simd import lane_sum, lanes_of, select, splat, widen

_SMALLEST = 2.0**-126  # a normal number: below, q^fraction is taken as 0


class Inputs(NamedTuple):
    logits: Stored
    strides: Strides
    target: Floats
    target_strides: Strides
    focus: Focus


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
    past_caches: int
    way: Elements


class Lines(NamedTuple):
    """The inputs of a piece, each a `Line`."""

    x: Any
    y: Any


def sigmoid_focal_loss_forward(logits: Tensor, target: Tensor, focus: Focus, loss: Tensor) -> None:
    way = elements(logits)
    _forward(way.tasks, Forward(inputs=_inputs(logits, target, focus), loss=loss, loss_strides=loss.stride(), way=way))


def sigmoid_focal_loss_sum(logits: Tensor, target: Tensor, focus: Focus, total: Tensor) -> None:
    way = elements(logits)
    partial = torch.empty(way.pieces, dtype=torch.float64, device="cpu")
    _sum(way.tasks, Sum(inputs=_inputs(logits, target, focus), partial=partial, way=way))
    sum_rows(partial, total)


def sigmoid_focal_loss_backward(logits: Tensor, target: Tensor, focus: Focus, dloss: Tensor, dlogits: Tensor) -> None:
    way = elements(logits)
    _backward(way.tasks, Backward(
        inputs=_inputs(logits, target, focus), dloss=dloss, dloss_strides=dloss.stride(),
        dlogits=dlogits, dstrides=dlogits.stride(), partial=None, past_caches=bypass_caches(logits, dlogits), way=way,
    ))  # fmt: skip


def sigmoid_focal_loss_sum_backward(logits: Tensor, target: Tensor, focus: Focus, dloss: Tensor, total: Tensor, dlogits: Tensor) -> None:
    way = elements(logits)
    partial = torch.empty(way.pieces, dtype=torch.float64, device="cpu")
    _sum_backward(way.tasks, Backward(
        inputs=_inputs(logits, target, focus), dloss=dloss, dloss_strides=dloss.stride(),
        dlogits=dlogits, dstrides=dlogits.stride(), partial=partial, past_caches=bypass_caches(logits, dlogits), way=way,
    ))  # fmt: skip
    sum_rows(partial, total)


def _inputs(logits: Tensor, target: Tensor, focus: Focus) -> Inputs:
    return Inputs(logits, logits.stride(), target, target.stride(), focus)


@njit(**INLINE)
def _wrong(at: Any, x: Any, y: Any) -> Any:
    """q, s(x) and s(-x)."""
    e = far_exp(at, x)
    large = 1.0 / (e + 1.0)
    small = e * large
    s, rest = select(x > 0.0, large, small), select(x > 0.0, small, large)
    return y * rest + (1.0 - y) * s, s, rest


@njit(**INLINE)
def _power(q: Any, gamma: Any) -> Any:
    """q^gamma: whole powers by products, which keep all digits, and the rest by exp and log."""
    whole = int(gamma)
    fraction = gamma - whole
    power = splat(1.0, q)
    for _ in range(whole):
        power = power * q
    if fraction > 0:
        power = power * select(q > _SMALLEST, exp(log(select(q > _SMALLEST, q, 1.0)) * fraction), 0.0)
    return power


@njit(**INLINE)
def _weight(y: Any, focus: Any) -> Any:
    return focus.positive * y + focus.negative * (1.0 - y)


@njit(**INLINE)
def _loss(at: Any, x: Any, y: Any, focus: Any) -> Any:
    q, _s, _rest = _wrong(at, x, y)
    return _weight(y, focus) * _power(q, focus.gamma) * loss_of(at, x, y, 1.0)


@njit(**INLINE)
def _loss_and_slope(at: Any, x: Any, y: Any, focus: Any) -> Any:
    q, s, rest = _wrong(at, x, y)
    bce, steep = loss_of(at, x, y, 1.0), _weight(y, focus) * _power(q, focus.gamma)
    steeper = focus.gamma * (1.0 - y - y) * select(q > 0.0, s * rest / q, 0.0) * bce
    return steep * bce, steep * ((1.0 - y) * s - y * rest + steeper)


@njit(**INLINE)
def _lines(inputs: Any, piece: Any) -> Any:
    return Lines(line_at(inputs.logits, inputs.strides, piece), line_at(inputs.target, inputs.target_strides, piece))


@njit(**INLINE)
def _side_by_side(e: Any) -> Any:
    """The same with steps that the compiler knows: see `rows.whole_vectors`."""
    return Lines(Line(e.x.at, 1), Line(e.y.at, 1))


@njit(**INLINE)
def _prefetch(e: Any, k: Any) -> None:
    prefetch_along(e.x, k)
    prefetch_along(e.y, k)


@region(Forward)
def _forward(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_piece(task, a.way)):
            piece = piece_of(number, a.way)
            e, loss = _lines(a.inputs, piece), line_at(a.loss, a.loss_strides, piece)
            for k in range(0, piece.size, lanes_of(e.x.at)):
                n = piece.size - k
                _prefetch(e, k)
                store_along(loss, k, n, _loss(e.x.at, load_along(e.x, k, n), load_along(e.y, k, n), a.inputs.focus))
        task = next_task(block)


@njit(**INLINE)
def _total_of_piece(e: Any, size: Any, focus: Any) -> Any:
    subtotal = widen(splat(0.0, e.x.at))
    for k in range(0, size, lanes_of(e.x.at)):
        n = size - k
        _prefetch(e, k)
        loss = _loss(e.x.at, load_along(e.x, k, n), load_along(e.y, k, n), focus)
        subtotal = subtotal + widen(in_use(loss, n))
    return lane_sum(subtotal)


@region(Sum)
def _sum(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_piece(task, a.way)):
            piece = piece_of(number, a.way)
            a.partial[number] = _total_of_piece(_lines(a.inputs, piece), piece.size, a.inputs.focus)
        task = next_task(block)


@njit(**INLINE)
def _gradient_of_piece(e: Any, g: Any, dx: Any, size: Any, focus: Any, past_caches: Any) -> None:
    lanes = lanes_of(e.x.at)
    consecutive = e.x.step == e.y.step == dx.step == 1 and g.step == 0
    k, n = 0, to_first_vector(dx.at, size, past_caches)
    while k < size:
        stop = whole_vectors(k, n, size, lanes) if consecutive else k
        if stop > k:
            near, dloss = _side_by_side(e), load(g.at, 0, 0, lanes, 0.0)
            for i in range(k, stop, lanes):
                _prefetch(near, i)
                _loss, slope = _loss_and_slope(near.x.at, load_along(near.x, i, lanes), load_along(near.y, i, lanes), focus)
                stream(dx.at, i, dloss * slope, past_caches)
            k, n = stop, size - stop
        else:
            _prefetch(e, k)
            _loss, slope = _loss_and_slope(e.x.at, load_along(e.x, k, n), load_along(e.y, k, n), focus)
            store_along(dx, k, n, load_along(g, k, n) * slope)
            k, n = k + n, min(lanes, size - k - n)


@region(Backward)
def _backward(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_piece(task, a.way)):
            piece = piece_of(number, a.way)
            g, dx = line_at(a.dloss, a.dloss_strides, piece), line_at(a.dlogits, a.dstrides, piece)
            _gradient_of_piece(_lines(a.inputs, piece), g, dx, piece.size, a.inputs.focus, a.past_caches)
        task = next_task(block)


@njit(**INLINE)
def _sum_and_gradient_of_piece(e: Any, g: Any, dx: Any, size: Any, focus: Any, past_caches: Any) -> Any:
    """`_total_of_piece`, and the gradient on the way, of the same powers."""
    lanes = lanes_of(e.x.at)
    subtotal, whole = widen(splat(0.0, e.x.at)), size // lanes * lanes
    dloss = load(g.at, 0, 0, lanes, 0.0)
    for k in range(0, whole, lanes):
        _prefetch(e, k)
        loss, slope = _loss_and_slope(e.x.at, load_along(e.x, k, lanes), load_along(e.y, k, lanes), focus)
        subtotal = subtotal + widen(loss)
        stream(dx.at, k, dloss * slope, past_caches)
    if whole < size:
        n = size - whole
        loss, slope = _loss_and_slope(e.x.at, load_along(e.x, whole, n), load_along(e.y, whole, n), focus)
        subtotal = subtotal + widen(in_use(loss, n))
        store(dx.at, whole, 1, n, dloss * slope)
    return lane_sum(subtotal)


@region(Backward)
def _sum_backward(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_piece(task, a.way)):
            piece = piece_of(number, a.way)
            e, g, dx = _lines(a.inputs, piece), line_at(a.dloss, a.dloss_strides, piece), line_at(a.dlogits, a.dstrides, piece)
            consecutive = e.x.step == e.y.step == dx.step == 1 and g.step == 0
            if consecutive and (a.past_caches == 0 or to_alignment(dx.at) == 0):
                a.partial[number] = _sum_and_gradient_of_piece(_side_by_side(e), g, dx, piece.size, a.inputs.focus, a.past_caches)
            else:  # one after the other: the second finds the piece in the caches
                a.partial[number] = _total_of_piece(e, piece.size, a.inputs.focus)
                _gradient_of_piece(e, g, dx, piece.size, a.inputs.focus, a.past_caches)
        task = next_task(block)
