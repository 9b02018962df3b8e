"""Binary cross-entropy of probabilities p and targets y.

loss = -w (y max(log p, -100) + (1 - y) max(log(1 - p), -100))      dprob = dloss w (p - y) / max((1 - p) p, 1e-12)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elements import _at, _elements_of, _number_at
from .launch import launch
from .math import _log_of_rest, _wide
from .plan import elements
from .reduction import sum_rows


def binary_cross_entropy_forward(prob: Tensor, target: Tensor, weight: Tensor, loss: Tensor) -> None:
    e = elements(prob.shape, prob.stride(), target.stride(), weight.stride(), loss.stride())
    launch(
        _binary_cross_entropy_forward, e.programs, 4, prob,
        prob, e.strides[0], target, e.strides[1], weight, e.strides[2], loss, e.strides[3],
        e.shape[1], e.shape[2], BLOCK_B=e.BLOCK_B, BLOCK_P=e.BLOCK_P,
    )  # fmt: skip


def binary_cross_entropy_sum(prob: Tensor, target: Tensor, weight: Tensor, total: Tensor) -> None:
    e = elements(prob.shape, prob.stride(), target.stride(), weight.stride())
    parts = torch.empty(e.programs, dtype=torch.float64, device=prob.device)
    launch(
        _binary_cross_entropy_sum, e.programs, 4, prob,
        prob, e.strides[0], target, e.strides[1], weight, e.strides[2], parts,
        e.shape[1], e.shape[2], BLOCK_B=e.BLOCK_B, BLOCK_P=e.BLOCK_P,
    )  # fmt: skip
    sum_rows(parts, total)


def binary_cross_entropy_backward(prob: Tensor, target: Tensor, weight: Tensor, dloss: Tensor, dprob: Tensor) -> None:
    e = elements(prob.shape, prob.stride(), target.stride(), weight.stride(), dloss.stride(), dprob.stride())
    launch(
        _binary_cross_entropy_backward, e.programs, 4, prob,
        prob, e.strides[0], target, e.strides[1], weight, e.strides[2], dloss, e.strides[3], dprob, e.strides[4],
        e.shape[1], e.shape[2], BLOCK_B=e.BLOCK_B, BLOCK_P=e.BLOCK_P,
    )  # fmt: skip


@triton.jit
def _at_least(x, least):
    """max(x, least), but NaN for NaN."""
    return tl.where(x < least, least, x)


@triton.jit
def _loss(prob, y, w):
    return -w * (y * _at_least(tl.log(prob), -100.0) + (1.0 - y) * _at_least(_log_of_rest(prob), -100.0))


@triton.jit
def _binary_cross_entropy_forward(
    prob_ptr, strides, target_ptr, target_strides, weight_ptr, weight_strides, loss_ptr, loss_strides, B, P,
    BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """All tensors [A, B, P]. One program: BLOCK_B by BLOCK_P elements."""
    a, b, p, inside = _elements_of(tl.program_id(0), B, P, BLOCK_B, BLOCK_P)
    prob = _wide(tl.load(_at(prob_ptr, strides, a, b, p), mask=inside, other=0.5))
    y = _wide(tl.load(_at(target_ptr, target_strides, a, b, p), mask=inside, other=0.0))
    w = _number_at(weight_ptr, weight_strides, a, b, p, inside)
    tl.store(_at(loss_ptr, loss_strides, a, b, p), _loss(prob, y, w), mask=inside)


@triton.jit
def _binary_cross_entropy_sum(
    prob_ptr, strides, target_ptr, target_strides, weight_ptr, weight_strides, parts_ptr, B, P,
    BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """All tensors [A, B, P], but parts [programs]. One program: the sum over BLOCK_B by BLOCK_P elements."""
    a, b, p, inside = _elements_of(tl.program_id(0), B, P, BLOCK_B, BLOCK_P)
    prob = _wide(tl.load(_at(prob_ptr, strides, a, b, p), mask=inside, other=0.5))
    y = _wide(tl.load(_at(target_ptr, target_strides, a, b, p), mask=inside, other=0.0))
    w = _number_at(weight_ptr, weight_strides, a, b, p, inside)
    loss = tl.where(inside, _loss(prob, y, w), 0.0)
    tl.store(parts_ptr + tl.program_id(0), tl.sum(tl.sum(loss, 1), 0))


@triton.jit
def _binary_cross_entropy_backward(
    prob_ptr, strides, target_ptr, target_strides, weight_ptr, weight_strides, dloss_ptr, dloss_strides, dprob_ptr, dstrides, B, P,
    BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """All tensors [A, B, P]. One program: BLOCK_B by BLOCK_P elements."""
    a, b, p, inside = _elements_of(tl.program_id(0), B, P, BLOCK_B, BLOCK_P)
    prob = _wide(tl.load(_at(prob_ptr, strides, a, b, p), mask=inside, other=0.5))
    y = _wide(tl.load(_at(target_ptr, target_strides, a, b, p), mask=inside, other=0.0))
    w = _number_at(weight_ptr, weight_strides, a, b, p, inside)
    g = _number_at(dloss_ptr, dloss_strides, a, b, p, inside)
    tl.store(_at(dprob_ptr, dstrides, a, b, p), g * w * (prob - y) / _at_least((1.0 - prob) * prob, 1e-12), mask=inside)
