"""Sigmoid focal loss of logits x and targets y; s = sigmoid, q = y s(-x) + (1 - y) s(x) is how wrong the prediction is.

    loss = a q^gamma bce      a = positive y + negative (1 - y)      bce = (1 - y) x + softplus(-x)
    dlogits = dloss a q^gamma ((1 - y) s(x) - y s(-x) + gamma (1 - 2 y) s(x) s(-x) / q bce)

q has no cancellation: the small one of s(x), s(-x) is computed as such. Where it is 0, so is what it divides.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..groups import Focus
from .bce_with_logits import _unweighted
from .elements import _at, _elements_of, _load_at, _number_at
from .launch import device_of, launch
from .math import _exp, _far_exp, fp64
from .plan import Elements, ElementsPlan, ElementStrides, elements, warps
from .reduction import sum_over

THREADS = 256  # twice those of the other elementwise kernels: with 16 elements each, float64 would not fit in registers
_SMALLEST = tl.constexpr(2.0**-126)  # a normal number: below, q^fraction is taken as 0


class Inputs(NamedTuple):
    """All tensors are [A, B, P]."""

    logits: Tensor
    strides: ElementStrides
    target: Tensor
    target_strides: ElementStrides


class Forward(NamedTuple):
    inputs: Inputs
    loss: Tensor
    loss_strides: ElementStrides
    way: Elements


class Sum(NamedTuple):
    inputs: Inputs
    partial: Tensor  # [programs]
    way: Elements


class Backward(NamedTuple):
    inputs: Inputs
    dloss: Tensor
    dloss_strides: ElementStrides
    dlogits: Tensor
    dstrides: ElementStrides
    way: Elements


def _inputs(logits: Tensor, target: Tensor, e: ElementsPlan) -> Inputs:
    return Inputs(logits, e.strides[0], target, e.strides[1])


def sigmoid_focal_loss_forward(logits: Tensor, target: Tensor, focus: Focus, loss: Tensor) -> None:
    e = elements(logits.shape, logits.stride(), target.stride(), loss.stride())
    a = Forward(inputs=_inputs(logits, target, e), loss=loss, loss_strides=e.strides[2], way=e.way)
    _launch(_sigmoid_focal_loss_forward, e, a, focus)


def sigmoid_focal_loss_sum(logits: Tensor, target: Tensor, focus: Focus, count: int, total: Tensor) -> None:
    e = elements(logits.shape, logits.stride(), target.stride())
    partial = torch.empty(e.programs, dtype=torch.float64, device=logits.device)
    a = Sum(inputs=_inputs(logits, target, e), partial=partial, way=e.way)
    _launch(_sigmoid_focal_loss_sum, e, a, focus)
    sum_over(partial, count, total)


def sigmoid_focal_loss_backward(logits: Tensor, target: Tensor, focus: Focus, dloss: Tensor, dlogits: Tensor) -> None:
    e = elements(logits.shape, logits.stride(), target.stride(), dloss.stride(), dlogits.stride())
    a = Backward(
        inputs=_inputs(logits, target, e), dloss=dloss, dloss_strides=e.strides[2], dlogits=dlogits, dstrides=e.strides[3], way=e.way
    )
    _launch(_sigmoid_focal_loss_backward, e, a, focus)


def sigmoid_focal_loss_sum_backward(
    logits: Tensor, target: Tensor, focus: Focus, dloss: Tensor, count: int, total: Tensor, dlogits: Tensor
) -> None:
    """In two visits: only plain cross-entropy has a kernel for one."""
    sigmoid_focal_loss_sum(logits, target, focus, count, total)
    sigmoid_focal_loss_backward(logits, target, focus, dloss, dlogits)


def _launch(kernel: Any, e: ElementsPlan, a: Forward | Sum | Backward, focus: Focus) -> None:
    on = a.inputs.logits
    launch(kernel, e.programs, warps(THREADS, device_of(on)), on, a, *focus, BLOCK_B=e.BLOCK_B, BLOCK_P=e.BLOCK_P)


@triton.jit
def _wrong(x, y, stored: tl.constexpr):
    """q, s(x) and s(-x) of a number loaded from the dtype `stored`."""
    e = _far_exp(-tl.abs(x), stored)
    large = 1.0 / (1.0 + e)
    small = e * large
    s, rest = tl.where(x > 0.0, large, small), tl.where(x > 0.0, small, large)
    return y * rest + (1.0 - y) * s, s, rest


@triton.jit
def _power(q, gamma):
    """q^gamma: whole powers by products, which keep all digits, and the rest by exp and log."""
    whole = gamma.to(tl.int32)
    fraction = (gamma - whole).to(q.dtype)
    power = tl.full(q.shape, 1.0, q.dtype)
    for _ in tl.range(0, whole):
        power *= q
    if fraction > 0.0:
        normal = q > _SMALLEST
        power *= tl.where(normal, _exp(tl.log(tl.where(normal, q, 1.0)) * fraction), 0.0)
    return power


@triton.jit
def _weight(y, positive, negative):
    return positive.to(y.dtype) * y + negative.to(y.dtype) * (1.0 - y)


@triton.jit
def _loss(x, y, positive, negative, gamma, stored: tl.constexpr):
    q, _s, _rest = _wrong(x, y, stored)
    return _weight(y, positive, negative) * _power(q, gamma) * _unweighted(x, y, 1.0, stored)


@triton.jit
def _slope(x, y, positive, negative, gamma, stored: tl.constexpr):
    q, s, rest = _wrong(x, y, stored)
    steeper = gamma.to(x.dtype) * (1.0 - y - y) * tl.where(q > 0.0, s * rest / q, 0.0) * _unweighted(x, y, 1.0, stored)
    slope = (1.0 - y) * s - y * rest + steeper  # before the loop of `_power`: fewer numbers stay in registers
    return _weight(y, positive, negative) * _power(q, gamma) * slope


@triton.jit
def _inputs_at(inputs, piece):
    x = _load_at(inputs.logits, inputs.strides, piece, 0.0)
    return x, _load_at(inputs.target, inputs.target_strides, piece, 0.0)


# the numbers of a Focus come one by one: Triton rounds the floats of a tuple to float32
@triton.jit
def _sigmoid_focal_loss_forward(
    a, positive: "fp64", negative: "fp64", gamma: "fp64", BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """One program: BLOCK_B by BLOCK_P elements."""
    piece = _elements_of(tl.program_id(0), a.way.b, a.way.p, BLOCK_B, BLOCK_P)
    x, y = _inputs_at(a.inputs, piece)
    tl.store(_at(a.loss, a.loss_strides, piece), _loss(x, y, positive, negative, gamma, a.inputs.logits.dtype.element_ty), mask=piece[3])


@triton.jit
def _sigmoid_focal_loss_sum(a, positive: "fp64", negative: "fp64", gamma: "fp64", BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr):
    """One program: the sum over BLOCK_B by BLOCK_P elements."""
    piece = _elements_of(tl.program_id(0), a.way.b, a.way.p, BLOCK_B, BLOCK_P)
    x, y = _inputs_at(a.inputs, piece)
    loss = tl.where(piece[3], _loss(x, y, positive, negative, gamma, a.inputs.logits.dtype.element_ty), 0.0)
    tl.store(a.partial + tl.program_id(0), tl.sum(tl.sum(loss, 1), 0))


@triton.jit
def _sigmoid_focal_loss_backward(
    a, positive: "fp64", negative: "fp64", gamma: "fp64", BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """One program: BLOCK_B by BLOCK_P elements."""
    piece = _elements_of(tl.program_id(0), a.way.b, a.way.p, BLOCK_B, BLOCK_P)
    x, y = _inputs_at(a.inputs, piece)
    g = _number_at(a.dloss, a.dloss_strides, piece)
    tl.store(
        _at(a.dlogits, a.dstrides, piece), g * _slope(x, y, positive, negative, gamma, a.inputs.logits.dtype.element_ty), mask=piece[3]
    )
