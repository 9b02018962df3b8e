"""Binary cross-entropy on probabilities, element by element.

loss = -w (y max(log p, -100) + (1 - y) max(log(1 - p), -100))      dprob = dloss w (p - y) / max((1 - p) p, 1e-12)
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from torch import Tensor

from .arguments import Floats, Stored
from .elements import Line, Strides, line_at, load_along, value_along
from .elementwise import ANYHOW, SIDE_BY_SIDE, elementwise
from .inline import INLINE
from .math import log
from .memory import load_one
from .simd import fma, select, splat
from .targets import refuse_improbable

_EPSILON = float(np.float32(1e-12))  # torch's constant is a float, for float64 too


class Inputs(NamedTuple):
    prob: Stored
    strides: Strides
    target: Floats
    target_strides: Strides
    weight: Floats
    weight_strides: Strides


class Lines(NamedTuple):
    """The inputs of a piece, each a `Line`."""

    p: Any
    y: Any
    w: Any


def _inputs(prob: Tensor, target: Tensor, weight: Tensor) -> Inputs:
    return Inputs(prob, prob.stride(), target, target.stride(), weight, weight.stride())


def _layout(prob: Tensor, target: Tensor, weight: Tensor) -> int:
    return SIDE_BY_SIDE if prob.stride(2) == target.stride(2) == 1 and weight.stride(2) == 0 else ANYHOW


def binary_cross_entropy_forward(prob: Tensor, target: Tensor, weight: Tensor, loss: Tensor) -> None:
    if _regions.losses(_inputs(prob, target, weight), _layout(prob, target, weight), loss):
        refuse_improbable(prob)


def binary_cross_entropy_sum(prob: Tensor, target: Tensor, weight: Tensor, count: int, total: Tensor) -> None:
    if _regions.total(_inputs(prob, target, weight), _layout(prob, target, weight), count, total):
        refuse_improbable(prob)


def binary_cross_entropy_backward(prob: Tensor, target: Tensor, weight: Tensor, dloss: Tensor, dprob: Tensor) -> None:
    _regions.gradients(_inputs(prob, target, weight), _layout(prob, target, weight), dloss, dprob)


def binary_cross_entropy_sum_backward(
    prob: Tensor, target: Tensor, weight: Tensor, dloss: Tensor, count: int, total: Tensor, dprob: Tensor
) -> None:
    layout = _layout(prob, target, weight)
    if _regions.total_and_gradients(_inputs(prob, target, weight), layout, dloss, count, total, dprob):
        refuse_improbable(prob)


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
def _nearest(e: Any, layout: Any, visit: Any, rest: Any) -> Any:
    return visit(Lines(Line(e.p.at, 1), Line(e.y.at, 1), load_one(e.w.at, 0)), rest)


@njit(**INLINE)
def _loss_at(e: Any, k: Any, n: Any) -> Any:
    return _loss(load_along(e.p, k, n), load_along(e.y, k, n), value_along(e.w, k, n))


@njit(**INLINE)
def _gradient_at(e: Any, g: Any, k: Any, n: Any) -> Any:
    return _gradient(load_along(e.p, k, n), load_along(e.y, k, n), value_along(e.w, k, n), value_along(g, k, n))


@njit(**INLINE)
def _outside_at(e: Any, k: Any, n: Any) -> Any:
    return _outside(load_along(e.p, k, n), load_along(e.y, k, n))


_regions = elementwise((Inputs, Lines), _lines, _nearest, _loss_at, _gradient_at, _outside_at)
_forward, _sum, _backward, _sum_backward = _regions
