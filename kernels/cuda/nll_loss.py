"""Negative log-likelihood: loss = -w_y log_prob_y, dlog_prob = -dloss w_y onehot(y). One number is read in each row."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import device_of, launch
from .math import _wide
from .plan import ceil_div, class_stride, tiles, view
from .reduction import sum_rows
from .rows import _blocks_of, _lanes_at, _tile_of, _weight_of


def nll_loss_forward(log_prob: Tensor, target: Tensor, weight: Tensor, ignore_index: int, loss: Tensor, row_weight: Tensor) -> None:
    v = view(log_prob.shape, log_prob.stride())
    block = 128
    launch(
        _nll_loss_forward, v.batch * ceil_div(v.positions, block), 4, log_prob,
        log_prob, v.strides[0], target, ignore_index, weight, class_stride(weight.stride(0)), loss, row_weight,
        v.classes, v.positions, BLOCK_N=block,
    )  # fmt: skip


def nll_loss_backward(target: Tensor, ignore_index: int, row_weight: Tensor, dloss: Tensor, dlog_prob: Tensor) -> None:
    v = view(dlog_prob.shape, dlog_prob.stride())
    t = tiles(v, device_of(dlog_prob))
    launch(
        _nll_loss_backward, t.elementwise_programs, t.num_warps, dlog_prob,
        target, ignore_index, row_weight, dloss, dloss.stride(0), dlog_prob, v.strides[0], v.classes, v.positions,
        BLOCK_N=t.BLOCK_N, BLOCK_C=t.BLOCK_C,
    )  # fmt: skip


def sum_weights(target: Tensor, weight: Tensor, ignore_index: int, total: Tensor) -> None:
    """The loss of log-probabilities that are all 0 leaves the weights behind."""
    nothing = weight.new_zeros(1).expand(target.shape[0], weight.shape[0])
    loss, row_weight = weight.new_empty(target.shape[0]), weight.new_empty(target.shape[0])
    nll_loss_forward(nothing, target, weight, ignore_index, loss, row_weight)
    sum_rows(row_weight, total)


@triton.jit
def _nll_loss_forward(
    log_prob_ptr, strides, target_ptr, ignore_index, weight_ptr, weight_stride, loss_ptr, row_weight_ptr, C, P, BLOCK_N: tl.constexpr
):
    """log_prob [B, C, P]; target, loss, row_weight [B * P]; weight [C]. One program: BLOCK_N positions."""
    b, p, row, inside = _tile_of(tl.program_id(0), P, BLOCK_N)
    y = tl.load(target_ptr + row, mask=inside, other=ignore_index)
    is_row = y != ignore_index
    is_class = is_row & (y >= 0) & (y < C)
    w_y = _weight_of(weight_ptr, weight_stride, y, is_class)
    x_ptr = log_prob_ptr + b * strides.batch + p * strides.position + y * strides.class_
    loss = -w_y * _wide(tl.load(x_ptr, mask=is_class, other=0.0))
    tl.store(loss_ptr + row, tl.where(is_row, loss, 0.0), mask=inside)
    tl.store(row_weight_ptr + row, tl.where(is_row, w_y, 0.0), mask=inside)


@triton.jit
def _nll_loss_backward(
    target_ptr, ignore_index, row_weight_ptr, dloss_ptr, dloss_stride, dlog_prob_ptr, strides, C, P,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dlog_prob [B, C, P]; the others [B * P]. One program: BLOCK_C classes of BLOCK_N positions."""
    blocks = _blocks_of(C, BLOCK_C)
    b, p, row, inside = _tile_of(tl.program_id(0) // blocks, P, BLOCK_N)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    # row numbers
    y = tl.load(target_ptr + row, mask=inside, other=ignore_index)
    is_row = y != ignore_index
    g = tl.load(dloss_ptr + row * dloss_stride, mask=is_row, other=0.0) * tl.load(row_weight_ptr + row, mask=is_row, other=0.0)
    # gradient: NaN all along a row whose target is outside [0, C)
    elsewhere = tl.where(is_row & ((y < 0) | (y >= C)), float("nan"), 0.0)
    d = tl.where(is_row[:, None] & (c[None, :] == y[:, None]), -g[:, None], elsewhere[:, None])
    tl.store(_lanes_at(dlog_prob_ptr, strides, b, p, c), d, mask=inside[:, None] & (c < C)[None, :])
