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
from .bce_with_logits import loss_of
from .elements import Elements, Strides, elements, last_piece, line_at, load_along, piece_of, prefetch_along, store_along
from .inline import INLINE
from .launch import next_task, region
from .math import exp, log
from .reduction import sum_rows
from .simd import lane_numbers, lane_sum, lanes_of, select, splat, widen

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
    way: Elements


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
        dlogits=dlogits, dstrides=dlogits.stride(), way=way,
    ))  # fmt: skip


def _inputs(logits: Tensor, target: Tensor, focus: Focus) -> Inputs:
    return Inputs(logits, logits.stride(), target, target.stride(), focus)


@njit(**INLINE)
def _wrong(x: Any, y: Any) -> Any:
    """q, s(x) and s(-x)."""
    e = exp(select(x > 0.0, 0.0 - x, x))
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
def _loss(x: Any, y: Any, focus: Any) -> Any:
    q, _s, _rest = _wrong(x, y)
    return _weight(y, focus) * _power(q, focus.gamma) * loss_of(x, y, 1.0, 1.0)


@njit(**INLINE)
def _slope(x: Any, y: Any, focus: Any) -> Any:
    q, s, rest = _wrong(x, y)
    steeper = focus.gamma * (1.0 - y - y) * select(q > 0.0, s * rest / q, 0.0) * loss_of(x, y, 1.0, 1.0)
    return _weight(y, focus) * _power(q, focus.gamma) * ((1.0 - y) * s - y * rest + steeper)


@region(Forward)
def _forward(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_piece(task, a.way)):
            piece = piece_of(number, a.way)
            x, y = line_at(a.inputs.logits, a.inputs.strides, piece), line_at(a.inputs.target, a.inputs.target_strides, piece)
            loss = line_at(a.loss, a.loss_strides, piece)
            for k in range(0, piece.size, lanes_of(x.at)):
                n = piece.size - k
                prefetch_along(x, k)
                prefetch_along(y, k)
                store_along(loss, k, n, _loss(load_along(x, k, n), load_along(y, k, n), a.inputs.focus))
        task = next_task(block)


@region(Sum)
def _sum(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_piece(task, a.way)):
            piece = piece_of(number, a.way)
            x, y = line_at(a.inputs.logits, a.inputs.strides, piece), line_at(a.inputs.target, a.inputs.target_strides, piece)
            subtotal = widen(splat(0.0, x.at))
            for k in range(0, piece.size, lanes_of(x.at)):
                n = piece.size - k
                prefetch_along(x, k)
                prefetch_along(y, k)
                loss = _loss(load_along(x, k, n), load_along(y, k, n), a.inputs.focus)
                # the lanes that are left hold x = y = 0, which has a loss
                subtotal = subtotal + widen(select(lane_numbers(loss) < n, loss, 0.0))
            a.partial[number] = lane_sum(subtotal)
        task = next_task(block)


@region(Backward)
def _backward(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_piece(task, a.way)):
            piece = piece_of(number, a.way)
            x, y = line_at(a.inputs.logits, a.inputs.strides, piece), line_at(a.inputs.target, a.inputs.target_strides, piece)
            g, dx = line_at(a.dloss, a.dloss_strides, piece), line_at(a.dlogits, a.dstrides, piece)
            for k in range(0, piece.size, lanes_of(x.at)):
                n = piece.size - k
                prefetch_along(x, k)
                prefetch_along(y, k)
                store_along(dx, k, n, load_along(g, k, n) * _slope(load_along(x, k, n), load_along(y, k, n), a.inputs.focus))
        task = next_task(block)
