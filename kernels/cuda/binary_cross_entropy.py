"""Binary cross-entropy of probabilities p and targets y.

loss = -w (y max(log p, -100) + (1 - y) max(log(1 - p), -100))      dprob = dloss w (p - y) / max((1 - p) p, 1e-12)
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elements import _at, _elements_of, _load_at, _number_at
from .launch import launch
from .math import _log_of_rest
from .plan import Elements, ElementsPlan, ElementStrides, elements
from .reduction import sum_over


class Inputs(NamedTuple):
    """All tensors are [A, B, P]."""

    prob: Tensor
    strides: ElementStrides
    target: Tensor
    target_strides: ElementStrides
    weight: Tensor
    weight_strides: ElementStrides


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
    dprob: Tensor
    dstrides: ElementStrides
    way: Elements


def _inputs(prob: Tensor, target: Tensor, weight: Tensor, e: ElementsPlan) -> Inputs:
    return Inputs(prob, e.strides[0], target, e.strides[1], weight, e.strides[2])


def binary_cross_entropy_forward(prob: Tensor, target: Tensor, weight: Tensor, loss: Tensor) -> None:
    e = elements(prob.shape, prob.stride(), target.stride(), weight.stride(), loss.stride())
    a = Forward(inputs=_inputs(prob, target, weight, e), loss=loss, loss_strides=e.strides[3], way=e.way)
    launch(_binary_cross_entropy_forward, e.programs, 4, prob, a, BLOCK_B=e.BLOCK_B, BLOCK_P=e.BLOCK_P)


def binary_cross_entropy_sum(prob: Tensor, target: Tensor, weight: Tensor, count: int, total: Tensor) -> None:
    e = elements(prob.shape, prob.stride(), target.stride(), weight.stride())
    partial = torch.empty(e.programs, dtype=torch.float64, device=prob.device)
    a = Sum(inputs=_inputs(prob, target, weight, e), partial=partial, way=e.way)
    launch(_binary_cross_entropy_sum, e.programs, 4, prob, a, BLOCK_B=e.BLOCK_B, BLOCK_P=e.BLOCK_P)
    sum_over(partial, count, total)


def binary_cross_entropy_backward(prob: Tensor, target: Tensor, weight: Tensor, dloss: Tensor, dprob: Tensor) -> None:
    e = elements(prob.shape, prob.stride(), target.stride(), weight.stride(), dloss.stride(), dprob.stride())
    a = Backward(
        inputs=_inputs(prob, target, weight, e), dloss=dloss, dloss_strides=e.strides[3], dprob=dprob, dstrides=e.strides[4], way=e.way
    )
    launch(_binary_cross_entropy_backward, e.programs, 4, prob, a, BLOCK_B=e.BLOCK_B, BLOCK_P=e.BLOCK_P)


def binary_cross_entropy_sum_backward(
    prob: Tensor, target: Tensor, weight: Tensor, dloss: Tensor, count: int, total: Tensor, dprob: Tensor
) -> None:
    """In two visits: only plain cross-entropy has a kernel for one."""
    binary_cross_entropy_sum(prob, target, weight, count, total)
    binary_cross_entropy_backward(prob, target, weight, dloss, dprob)


@triton.jit
def _at_least(x, least):
    """max(x, least), but NaN for NaN."""
    return tl.where(x < least, least, x)


@triton.jit
def _loss(prob, y, w):
    return -w * (y * _at_least(tl.log(prob), -100.0) + (1.0 - y) * _at_least(_log_of_rest(prob), -100.0))


@triton.jit
def _inputs_at(inputs, piece):
    prob = _load_at(inputs.prob, inputs.strides, piece, 0.5)
    y = _load_at(inputs.target, inputs.target_strides, piece, 0.0)
    return prob, y, _number_at(inputs.weight, inputs.weight_strides, piece)


@triton.jit
def _binary_cross_entropy_forward(a, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr):
    """One program: BLOCK_B by BLOCK_P elements."""
    piece = _elements_of(tl.program_id(0), a.way.b, a.way.p, BLOCK_B, BLOCK_P)
    prob, y, w = _inputs_at(a.inputs, piece)
    tl.store(_at(a.loss, a.loss_strides, piece), _loss(prob, y, w), mask=piece[3])


@triton.jit
def _binary_cross_entropy_sum(a, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr):
    """One program: the sum over BLOCK_B by BLOCK_P elements."""
    piece = _elements_of(tl.program_id(0), a.way.b, a.way.p, BLOCK_B, BLOCK_P)
    prob, y, w = _inputs_at(a.inputs, piece)
    loss = tl.where(piece[3], _loss(prob, y, w), 0.0)
    tl.store(a.partial + tl.program_id(0), tl.sum(tl.sum(loss, 1), 0))


@triton.jit
def _binary_cross_entropy_backward(a, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr):
    """One program: BLOCK_B by BLOCK_P elements."""
    piece = _elements_of(tl.program_id(0), a.way.b, a.way.p, BLOCK_B, BLOCK_P)
    prob, y, w = _inputs_at(a.inputs, piece)
    g = _number_at(a.dloss, a.dloss_strides, piece)
    tl.store(_at(a.dprob, a.dstrides, piece), g * w * (prob - y) / _at_least((1.0 - prob) * prob, 1e-12), mask=piece[3])
