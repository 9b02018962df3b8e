"""Sigmoid binary cross-entropy on logits, element by element; s = sigmoid, v = pos_weight.

    loss = w ((1 - y) x + (1 + (v - 1) y) softplus(-x))      dlogits = dloss w ((1 - y) s(x) - v y s(-x))

Both are written so that no tail is lost to cancellation. With e = exp(-|x|), c = 1 - y + v y, and far = 1 - y on the side of x > 0, -v y
on the other, the loss is w (far x + c log1p(e)), its slope w (far - sign(x) c e / (1 + e)).
"""

from typing import Any, NamedTuple

from numba import njit
from torch import Tensor

from .arguments import Floats, Stored
from .elements import Line, Strides, line_at, load_along, value_along
from .elementwise import ANYHOW, SIDE_BY_SIDE, elementwise
from .inline import INLINE
from .math import add_log1p, exp
from .memory import load_one
from .simd import bits, fma, minus_magnitude, select, times_sign

EACH = SIDE_BY_SIDE + 1  # and pos_weight, too, where it has a number for each element


class Inputs(NamedTuple):
    logits: Stored
    strides: Strides
    target: Floats
    target_strides: Strides
    weight: Floats
    weight_strides: Strides
    pos_weight: Floats
    pos_weight_strides: Strides


class Lines(NamedTuple):
    """The inputs of a piece, each a `Line`."""

    x: Any
    y: Any
    w: Any
    v: Any


def _inputs(logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor) -> Inputs:
    strides = logits.stride(), target.stride(), weight.stride(), pos_weight.stride()
    return Inputs(logits, strides[0], target, strides[1], weight, strides[2], pos_weight, strides[3])


def _layout(logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor) -> int:
    step = pos_weight.stride(2)
    near = logits.stride(2) == target.stride(2) == 1 and weight.stride(2) == 0 and step < 2
    return (EACH if step else SIDE_BY_SIDE) if near else ANYHOW


def bce_with_logits_forward(logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor, loss: Tensor) -> None:
    tensors = logits, target, weight, pos_weight
    _regions.losses(_inputs(*tensors), _layout(*tensors), loss)


def bce_with_logits_sum(logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor, count: int, total: Tensor) -> None:
    tensors = logits, target, weight, pos_weight
    _regions.total(_inputs(*tensors), _layout(*tensors), count, total)


def bce_with_logits_backward(logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor, dloss: Tensor, dlogits: Tensor) -> None:
    tensors = logits, target, weight, pos_weight
    _regions.gradients(_inputs(*tensors), _layout(*tensors), dloss, dlogits)


def bce_with_logits_sum_backward(
    logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor, dloss: Tensor, count: int, total: Tensor, dlogits: Tensor
) -> None:
    tensors = logits, target, weight, pos_weight
    _regions.total_and_gradients(_inputs(*tensors), _layout(*tensors), dloss, count, total, dlogits)


@njit(**INLINE)
def far_exp(x: Any) -> Any:
    """exp(-|x|)."""
    return exp(minus_magnitude(x))


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
    return fma(far, x, add_log1p(at, factor, far_exp(x), nan))


@njit(**INLINE)
def _gradient_of(x: Any, y: Any, v: Any, g: Any) -> Any:
    """g (far - sign(x) factor s(-|x|))."""
    far, factor = _sides(x, y, v)
    e = far_exp(x)
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
def _nearest(e: Any, layout: Any, visit: Any, rest: Any) -> Any:
    x, y, w = Line(e.x.at, 1), Line(e.y.at, 1), load_one(e.w.at, 0)
    if layout == EACH:
        return visit(Lines(x, y, w, Line(e.v.at, 1)), rest)
    v = load_one(e.v.at, 0)
    if w == 1.0 and v == 1.0:  # as where there are no weights: a loop without them
        return visit(Lines(x, y, 1.0, 1.0), rest)
    return visit(Lines(x, y, w, v), rest)


@njit(**INLINE)
def _loss_at(e: Any, k: Any, n: Any) -> Any:
    x, y = load_along(e.x, k, n), load_along(e.y, k, n)
    return value_along(e.w, k, n) * loss_of(e.x.at, x, y, value_along(e.v, k, n))


@njit(**INLINE)
def _gradient_at(e: Any, g: Any, k: Any, n: Any) -> Any:
    x, y = load_along(e.x, k, n), load_along(e.y, k, n)
    return _gradient_of(x, y, value_along(e.v, k, n), value_along(g, k, n) * value_along(e.w, k, n))


_regions = elementwise((Inputs, Lines), _lines, _nearest, _loss_at, _gradient_at)
_forward, _sum, _backward, _sum_backward = _regions
