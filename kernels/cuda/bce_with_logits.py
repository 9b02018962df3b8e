"""Binary cross-entropy of logits x and targets y.

loss = w ((1 - y) x + (1 + (pos_weight - 1) y) softplus(-x)),    softplus(-x) = log1p(exp(-|x|)) + max(-x, 0)
dlogits = dloss w ((1 - y) - (1 + (pos_weight - 1) y) sigmoid(-x))
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elements import _at, _elements_of, _number_at
from .launch import launch
from .math import _exp, _log1p, _wide
from .plan import elements
from .reduction import sum_rows


def bce_with_logits_forward(logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor, loss: Tensor) -> None:
    e = elements(logits.shape, logits.stride(), target.stride(), weight.stride(), pos_weight.stride(), loss.stride())
    launch(
        _bce_with_logits_forward, e.programs, 4, logits,
        logits, e.strides[0], target, e.strides[1], weight, e.strides[2], pos_weight, e.strides[3], loss, e.strides[4],
        e.shape[1], e.shape[2], BLOCK_B=e.BLOCK_B, BLOCK_P=e.BLOCK_P,
    )  # fmt: skip


def bce_with_logits_sum(logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor, total: Tensor) -> None:
    e = elements(logits.shape, logits.stride(), target.stride(), weight.stride(), pos_weight.stride())
    parts = torch.empty(e.programs, dtype=torch.float64, device=logits.device)
    launch(
        _bce_with_logits_sum, e.programs, 4, logits,
        logits, e.strides[0], target, e.strides[1], weight, e.strides[2], pos_weight, e.strides[3], parts,
        e.shape[1], e.shape[2], BLOCK_B=e.BLOCK_B, BLOCK_P=e.BLOCK_P,
    )  # fmt: skip
    sum_rows(parts, total)


def bce_with_logits_backward(logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor, dloss: Tensor, dlogits: Tensor) -> None:
    e = elements(logits.shape, logits.stride(), target.stride(), weight.stride(), pos_weight.stride(), dloss.stride(), dlogits.stride())
    launch(
        _bce_with_logits_backward, e.programs, 4, logits,
        logits, e.strides[0], target, e.strides[1], weight, e.strides[2], pos_weight, e.strides[3], dloss, e.strides[4],
        dlogits, e.strides[5], e.shape[1], e.shape[2], BLOCK_B=e.BLOCK_B, BLOCK_P=e.BLOCK_P,
    )  # fmt: skip


def bce_with_logits_sum_backward(
    logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor, dloss: Tensor, total: Tensor, dlogits: Tensor
) -> None:
    """In two visits: only plain cross-entropy has a kernel for one."""
    bce_with_logits_sum(logits, target, weight, pos_weight, total)
    bce_with_logits_backward(logits, target, weight, pos_weight, dloss, dlogits)


@triton.jit
def _loss(x, y, w, pos_weight):
    softplus = _log1p(_exp(-tl.abs(x))) + tl.where(x < 0.0, -x, 0.0)
    return w * ((1.0 - y) * x + (1.0 + (pos_weight - 1.0) * y) * softplus)


@triton.jit
def _bce_with_logits_forward(
    logits_ptr, strides, target_ptr, target_strides, weight_ptr, weight_strides, pos_weight_ptr, pos_weight_strides,
    loss_ptr, loss_strides, B, P, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """All tensors [A, B, P]. One program: BLOCK_B by BLOCK_P elements."""
    a, b, p, inside = _elements_of(tl.program_id(0), B, P, BLOCK_B, BLOCK_P)
    x = _wide(tl.load(_at(logits_ptr, strides, a, b, p), mask=inside, other=0.0))
    y = _wide(tl.load(_at(target_ptr, target_strides, a, b, p), mask=inside, other=0.0))
    w = _number_at(weight_ptr, weight_strides, a, b, p, inside)
    pos_weight = _number_at(pos_weight_ptr, pos_weight_strides, a, b, p, inside)
    tl.store(_at(loss_ptr, loss_strides, a, b, p), _loss(x, y, w, pos_weight), mask=inside)


@triton.jit
def _bce_with_logits_sum(
    logits_ptr, strides, target_ptr, target_strides, weight_ptr, weight_strides, pos_weight_ptr, pos_weight_strides,
    parts_ptr, B, P, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """All tensors [A, B, P], but parts [programs]. One program: the sum over BLOCK_B by BLOCK_P elements."""
    a, b, p, inside = _elements_of(tl.program_id(0), B, P, BLOCK_B, BLOCK_P)
    x = _wide(tl.load(_at(logits_ptr, strides, a, b, p), mask=inside, other=0.0))
    y = _wide(tl.load(_at(target_ptr, target_strides, a, b, p), mask=inside, other=0.0))
    w = _number_at(weight_ptr, weight_strides, a, b, p, inside)
    pos_weight = _number_at(pos_weight_ptr, pos_weight_strides, a, b, p, inside)
    loss = tl.where(inside, _loss(x, y, w, pos_weight), 0.0)
    tl.store(parts_ptr + tl.program_id(0), tl.sum(tl.sum(loss, 1), 0))


@triton.jit
def _bce_with_logits_backward(
    logits_ptr, strides, target_ptr, target_strides, weight_ptr, weight_strides, pos_weight_ptr, pos_weight_strides,
    dloss_ptr, dloss_strides, dlogits_ptr, dstrides, B, P, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """All tensors [A, B, P]. One program: BLOCK_B by BLOCK_P elements."""
    a, b, p, inside = _elements_of(tl.program_id(0), B, P, BLOCK_B, BLOCK_P)
    x = _wide(tl.load(_at(logits_ptr, strides, a, b, p), mask=inside, other=0.0))
    y = _wide(tl.load(_at(target_ptr, target_strides, a, b, p), mask=inside, other=0.0))
    w = _number_at(weight_ptr, weight_strides, a, b, p, inside)
    pos_weight = _number_at(pos_weight_ptr, pos_weight_strides, a, b, p, inside)
    g = _number_at(dloss_ptr, dloss_strides, a, b, p, inside)
    # sigmoid(-x) without overflow: e / (1 + e) or 1 / (1 + e)
    e = _exp(-tl.abs(x))
    rest = tl.where(x < 0.0, 1.0, e) / (1.0 + e)
    d = g * w * ((1.0 - y) - (1.0 + (pos_weight - 1.0) * y) * rest)
    tl.store(_at(dlogits_ptr, dstrides, a, b, p), d, mask=inside)
