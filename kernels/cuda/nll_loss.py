"""Negative log-likelihood: loss = -w_y log_prob_y, dlog_prob = -dloss w_y onehot(y). One number is read in each row."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import device_of, launch
from .math import _wide
from .plan import Walk, ceil_div, class_stride, tiles, view
from .reduction import sum_rows
from .rows import _blocks_of, _lanes_at, _tile_of, _weight_of


class Forward(NamedTuple):
    log_prob: Tensor  # [B, C, P]
    target: Tensor  # [B * P], as the results
    weight: Tensor  # [C]
    weight_stride: int | None
    ignore_index: int
    loss: Tensor
    row_weight: Tensor
    way: Walk


class Backward(NamedTuple):
    target: Tensor  # [B * P], as `row_weight` and `dloss`
    ignore_index: int
    row_weight: Tensor
    dloss: Tensor
    dloss_stride: int
    dlog_prob: Tensor  # [B, C, P]
    way: Walk


def nll_loss_forward(log_prob: Tensor, target: Tensor, weight: Tensor, ignore_index: int, loss: Tensor, row_weight: Tensor) -> None:
    v = view(log_prob.shape, log_prob.stride())
    a = Forward(
        log_prob=log_prob, target=target, weight=weight, weight_stride=class_stride(weight.stride(0)), ignore_index=ignore_index,
        loss=loss, row_weight=row_weight, way=v.way,
    )  # fmt: skip
    block = 128
    launch(_nll_loss_forward, v.batch * ceil_div(v.positions, block), 4, log_prob, a, BLOCK_N=block)


def nll_loss_backward(target: Tensor, ignore_index: int, row_weight: Tensor, dloss: Tensor, dlog_prob: Tensor) -> None:
    v = view(dlog_prob.shape, dlog_prob.stride())
    t = tiles(v, device_of(dlog_prob))
    a = Backward(
        target=target, ignore_index=ignore_index, row_weight=row_weight, dloss=dloss, dloss_stride=dloss.stride(0),
        dlog_prob=dlog_prob, way=v.way,
    )  # fmt: skip
    launch(_nll_loss_backward, t.elementwise_programs, t.num_warps, dlog_prob, a, BLOCK_N=t.BLOCK_N, BLOCK_C=t.BLOCK_C)


def sum_weights(target: Tensor, weight: Tensor, ignore_index: int, total: Tensor) -> None:
    """The loss of log-probabilities that are all 0 leaves the weights behind."""
    nothing = weight.new_zeros(1).expand(target.shape[0], weight.shape[0])
    loss, row_weight = weight.new_empty(target.shape[0]), weight.new_empty(target.shape[0])
    nll_loss_forward(nothing, target, weight, ignore_index, loss, row_weight)
    sum_rows(row_weight, total)


@triton.jit
def _nll_loss_forward(a, BLOCK_N: tl.constexpr):
    """One program: BLOCK_N positions."""
    strides = a.way.strides
    b, p, row, inside = _tile_of(tl.program_id(0), a.way.positions, BLOCK_N)
    y = tl.load(a.target + row, mask=inside, other=a.ignore_index)
    is_row = y != a.ignore_index
    is_class = is_row & (y >= 0) & (y < a.way.classes)
    w_y = _weight_of(a, y, is_class)
    x_ptr = a.log_prob + b * strides.batch + p * strides.position + y * strides.class_
    loss = -w_y * _wide(tl.load(x_ptr, mask=is_class, other=0.0))
    tl.store(a.loss + row, tl.where(is_row, loss, 0.0), mask=inside)
    tl.store(a.row_weight + row, tl.where(is_row, w_y, 0.0), mask=inside)


@triton.jit
def _nll_loss_backward(a, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program: BLOCK_C classes of BLOCK_N positions."""
    blocks = _blocks_of(a.way.classes, BLOCK_C)
    b, p, row, inside = _tile_of(tl.program_id(0) // blocks, a.way.positions, BLOCK_N)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    # row numbers
    y = tl.load(a.target + row, mask=inside, other=a.ignore_index)
    is_row = y != a.ignore_index
    g = tl.load(a.dloss + row * a.dloss_stride, mask=is_row, other=0.0) * tl.load(a.row_weight + row, mask=is_row, other=0.0)
    # gradient: NaN all along a row whose target is outside [0, C)
    elsewhere = tl.where(is_row & ((y < 0) | (y >= a.way.classes)), float("nan"), 0.0)
    d = tl.where(is_row[:, None] & (c[None, :] == y[:, None]), -g[:, None], elsewhere[:, None])
    tl.store(_lanes_at(a.dlog_prob, a.way.strides, b, p, c), d, mask=inside[:, None] & (c < a.way.classes)[None, :])
