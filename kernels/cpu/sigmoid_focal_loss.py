"""Sigmoid focal loss on logits, element by element; s = sigmoid, q = y s(-x) + (1 - y) s(x) is how wrong the prediction is.

    loss = a q^gamma bce      a = positive y + negative (1 - y)      bce = (1 - y) x + softplus(-x)
    dlogits = dloss a q^gamma ((1 - y) s(x) - y s(-x) + gamma (1 - 2 y) s(x) s(-x) / q bce)

q has no cancellation: the small one of s(x), s(-x) is computed as such. Where it is 0, so is what it divides.
"""

from typing import Any, NamedTuple

from numba import njit
from torch import Tensor

from ..groups import Focus
from .arguments import Floats, Stored
from .bce_with_logits import far_exp, loss_of
from .elements import Line, Strides, line_at, load_along, value_along
from .elementwise import ANYHOW, SIDE_BY_SIDE, elementwise
from .inline import INLINE
from .math import exp, log
from .simd import select, splat

_SMALLEST = 2.0**-126  # a normal number: below, q^fraction is taken as 0


class Inputs(NamedTuple):
    logits: Stored
    strides: Strides
    target: Floats
    target_strides: Strides
    focus: Focus


class Lines(NamedTuple):
    """The inputs of a piece: two `Line`s, and what is the same for all."""

    x: Any
    y: Any
    focus: Any


def sigmoid_focal_loss_forward(logits: Tensor, target: Tensor, focus: Focus, loss: Tensor) -> None:
    _regions.losses(_inputs(logits, target, focus), _layout(logits, target), loss)


def sigmoid_focal_loss_sum(logits: Tensor, target: Tensor, focus: Focus, count: int, total: Tensor) -> None:
    _regions.total(_inputs(logits, target, focus), _layout(logits, target), count, total)


def sigmoid_focal_loss_backward(logits: Tensor, target: Tensor, focus: Focus, dloss: Tensor, dlogits: Tensor) -> None:
    _regions.gradients(_inputs(logits, target, focus), _layout(logits, target), dloss, dlogits)


def sigmoid_focal_loss_sum_backward(
    logits: Tensor, target: Tensor, focus: Focus, dloss: Tensor, count: int, total: Tensor, dlogits: Tensor
) -> None:
    _regions.total_and_gradients(_inputs(logits, target, focus), _layout(logits, target), dloss, count, total, dlogits)


def _layout(logits: Tensor, target: Tensor) -> int:
    return SIDE_BY_SIDE if logits.stride(2) == target.stride(2) == 1 else ANYHOW


def _inputs(logits: Tensor, target: Tensor, focus: Focus) -> Inputs:
    return Inputs(logits, logits.stride(), target, target.stride(), focus)


@njit(**INLINE)
def _wrong(x: Any, y: Any) -> Any:
    """q, s(x) and s(-x)."""
    e = far_exp(x)
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
    q, _s, _rest = _wrong(x, y)
    return _weight(y, focus) * _power(q, focus.gamma) * loss_of(at, x, y, 1.0)


@njit(**INLINE)
def _slope(at: Any, x: Any, y: Any, focus: Any) -> Any:
    q, s, rest = _wrong(x, y)
    bce, steep = loss_of(at, x, y, 1.0), _weight(y, focus) * _power(q, focus.gamma)
    steeper = focus.gamma * (1.0 - y - y) * select(q > 0.0, s * rest / q, 0.0) * bce
    return steep * ((1.0 - y) * s - y * rest + steeper)


@njit(**INLINE)
def _lines(inputs: Any, piece: Any) -> Any:
    x, y = line_at(inputs.logits, inputs.strides, piece), line_at(inputs.target, inputs.target_strides, piece)
    return Lines(x, y, inputs.focus)


@njit(**INLINE)
def _nearest(e: Any, layout: Any, visit: Any, rest: Any) -> Any:
    return visit(Lines(Line(e.x.at, 1), Line(e.y.at, 1), e.focus), rest)


@njit(**INLINE)
def _loss_at(e: Any, k: Any, n: Any) -> Any:
    return _loss(e.x.at, load_along(e.x, k, n), load_along(e.y, k, n), e.focus)


@njit(**INLINE)
def _gradient_at(e: Any, g: Any, k: Any, n: Any) -> Any:
    return value_along(g, k, n) * _slope(e.x.at, load_along(e.x, k, n), load_along(e.y, k, n), e.focus)


_regions = elementwise((Inputs, Lines), _lines, _nearest, _loss_at, _gradient_at)
_forward, _sum, _backward, _sum_backward = _regions
