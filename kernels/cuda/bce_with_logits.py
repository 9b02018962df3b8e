"""Binary cross-entropy of logits x and targets y; s = sigmoid, v = pos_weight.

    loss = w ((1 - y) x + (1 + (v - 1) y) softplus(-x))      dlogits = dloss w ((1 - y) s(x) - v y s(-x))

Both are written so that no tail is lost to cancellation: the small one of s(x), s(-x) is computed as such, and for x < 0 the loss is
(1 + (v - 1) y) log1p(exp(x)) - v y x.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elements import _at, _elements_of, _load_at, _number_at
from .launch import launch
from .math import _far_exp, _log1p
from .plan import Elements, ElementsPlan, ElementStrides, elements
from .reduction import sum_over


class Inputs(NamedTuple):
    """All tensors are [A, B, P]."""

    logits: Tensor
    strides: ElementStrides
    target: Tensor
    target_strides: ElementStrides
    weight: Tensor
    weight_strides: ElementStrides
    pos_weight: Tensor
    pos_weight_strides: ElementStrides


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


def _inputs(logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor, e: ElementsPlan) -> Inputs:
    return Inputs(logits, e.strides[0], target, e.strides[1], weight, e.strides[2], pos_weight, e.strides[3])


def bce_with_logits_forward(logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor, loss: Tensor) -> None:
    e = elements(logits.shape, logits.stride(), target.stride(), weight.stride(), pos_weight.stride(), loss.stride())
    a = Forward(inputs=_inputs(logits, target, weight, pos_weight, e), loss=loss, loss_strides=e.strides[4], way=e.way)
    launch(_bce_with_logits_forward, e.programs, 4, logits, a, BLOCK_B=e.BLOCK_B, BLOCK_P=e.BLOCK_P)


def bce_with_logits_sum(logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor, count: int, total: Tensor) -> None:
    e = elements(logits.shape, logits.stride(), target.stride(), weight.stride(), pos_weight.stride())
    partial = torch.empty(e.programs, dtype=torch.float64, device=logits.device)
    a = Sum(inputs=_inputs(logits, target, weight, pos_weight, e), partial=partial, way=e.way)
    launch(_bce_with_logits_sum, e.programs, 4, logits, a, BLOCK_B=e.BLOCK_B, BLOCK_P=e.BLOCK_P)
    sum_over(partial, count, total)


def bce_with_logits_backward(logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor, dloss: Tensor, dlogits: Tensor) -> None:
    e = elements(logits.shape, logits.stride(), target.stride(), weight.stride(), pos_weight.stride(), dloss.stride(), dlogits.stride())
    a = Backward(
        inputs=_inputs(logits, target, weight, pos_weight, e), dloss=dloss, dloss_strides=e.strides[4],
        dlogits=dlogits, dstrides=e.strides[5], way=e.way,
    )  # fmt: skip
    launch(_bce_with_logits_backward, e.programs, 4, logits, a, BLOCK_B=e.BLOCK_B, BLOCK_P=e.BLOCK_P)


def bce_with_logits_sum_backward(
    logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor, dloss: Tensor, count: int, total: Tensor, dlogits: Tensor
) -> None:
    """In two visits: only plain cross-entropy has a kernel for one."""
    bce_with_logits_sum(logits, target, weight, pos_weight, count, total)
    bce_with_logits_backward(logits, target, weight, pos_weight, dloss, dlogits)


@triton.jit
def _unweighted(x, y, pos_weight, stored: tl.constexpr):
    """The loss of logits loaded from the dtype `stored`, but for w."""
    negative = 1.0 - y
    high = negative * x
    # 0 * high: an infinite x makes the loss NaN where torch's does
    linear = tl.where(x > 0.0, high, high * 0.0 - pos_weight * y * x)
    return (pos_weight * y + negative) * _log1p(_far_exp(-tl.abs(x), stored)) + linear


@triton.jit
def _loss(x, y, w, pos_weight, stored: tl.constexpr):
    return w * _unweighted(x, y, pos_weight, stored)


@triton.jit
def _slope(x, y, w, pos_weight, stored: tl.constexpr):
    e = _far_exp(-tl.abs(x), stored)
    large = 1.0 / (1.0 + e)
    small = e * large
    positive = x > 0.0
    return w * ((1.0 - y) * tl.where(positive, large, small) - pos_weight * y * tl.where(positive, small, large))


@triton.jit
def _inputs_at(inputs, piece):
    x = _load_at(inputs.logits, inputs.strides, piece, 0.0)
    y = _load_at(inputs.target, inputs.target_strides, piece, 0.0)
    w = _number_at(inputs.weight, inputs.weight_strides, piece)
    return x, y, w, _number_at(inputs.pos_weight, inputs.pos_weight_strides, piece)


@triton.jit
def _bce_with_logits_forward(a, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr):
    """One program: BLOCK_B by BLOCK_P elements."""
    piece = _elements_of(tl.program_id(0), a.way.b, a.way.p, BLOCK_B, BLOCK_P)
    x, y, w, pos_weight = _inputs_at(a.inputs, piece)
    tl.store(_at(a.loss, a.loss_strides, piece), _loss(x, y, w, pos_weight, a.inputs.logits.dtype.element_ty), mask=piece[3])


@triton.jit
def _bce_with_logits_sum(a, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr):
    """One program: the sum over BLOCK_B by BLOCK_P elements."""
    piece = _elements_of(tl.program_id(0), a.way.b, a.way.p, BLOCK_B, BLOCK_P)
    x, y, w, pos_weight = _inputs_at(a.inputs, piece)
    loss = tl.where(piece[3], _loss(x, y, w, pos_weight, a.inputs.logits.dtype.element_ty), 0.0)
    tl.store(a.partial + tl.program_id(0), tl.sum(tl.sum(loss, 1), 0))


@triton.jit
def _bce_with_logits_backward(a, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr):
    """One program: BLOCK_B by BLOCK_P elements."""
    piece = _elements_of(tl.program_id(0), a.way.b, a.way.p, BLOCK_B, BLOCK_P)
    x, y, w, pos_weight = _inputs_at(a.inputs, piece)
    g = _number_at(a.dloss, a.dloss_strides, piece)
    slope = _slope(x, y, w, pos_weight, a.inputs.logits.dtype.element_ty)
    tl.store(_at(a.dlogits, a.dstrides, piece), g * slope, mask=piece[3])
