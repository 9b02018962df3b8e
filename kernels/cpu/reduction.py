"""Sums in one fixed order: blocks of a fixed size by any thread, then the blocks."""

from typing import Any

import torch
from torch import Tensor

from .launch import next_task, region, unpack
from .memory import load, load_classes
from .simd import lane_sum, lanes_of, splat, widen
from .targets import weights_of

_SUM = "TDTnnn"
_SUM_OF_WEIGHTS = "ITDTnnnnnn"
_BLOCK = 1 << 14


def sum_rows(values: Tensor, total: Tensor) -> None:
    blocks, direct, subtotals = _blocks(values.numel(), values.dtype, total)
    _sum(values.dtype, blocks, values.data_ptr(), subtotals.data_ptr(), total.data_ptr(), values.numel(), _BLOCK, direct)
    if not direct:
        total.copy_(subtotals.sum())  # few numbers: torch sums them on one thread


def sum_weights(target: Tensor, weight: Tensor, ignore_index: int, total: Tensor) -> None:
    blocks, direct, subtotals = _blocks(target.numel(), weight.dtype, total)
    _sum_of_weights(
        weight.dtype, blocks, target.data_ptr(), weight.data_ptr(), subtotals.data_ptr(), total.data_ptr(),
        target.numel(), _BLOCK, direct, ignore_index, weight.numel(), weight.stride(0),
    )  # fmt: skip
    if not direct:
        total.copy_(subtotals.sum())


def _blocks(rows: int, dtype: torch.dtype, total: Tensor) -> tuple[int, bool, Tensor]:
    """How many blocks, whether the only one writes the total itself (the common small case, without two more torch calls), and where
    the sums of the blocks go."""
    blocks = max(1, -(-rows // _BLOCK))
    direct = blocks == 1 and dtype == total.dtype
    return blocks, direct, total if direct else torch.empty(blocks, dtype=torch.float64, device="cpu")


@region(_SUM)
def _sum(a: Any) -> None:
    values, subtotals, total, size, block, direct = unpack(a, _SUM)
    task = next_task(a)
    while task >= 0:
        subtotal = widen(splat(0.0, values))
        last = min(size, (task + 1) * block)
        for i in range(task * block, last, lanes_of(values)):
            subtotal = subtotal + widen(load(values, i, 1, last - i, 0.0))
        if direct:
            total[0] = lane_sum(subtotal)
        else:
            subtotals[task] = lane_sum(subtotal)
        task = next_task(a)


@region(_SUM_OF_WEIGHTS)
def _sum_of_weights(a: Any) -> None:
    target, weight, subtotals, total, size, block, direct, ignore_index, classes, weight_stride = unpack(a, _SUM_OF_WEIGHTS)
    task = next_task(a)
    while task >= 0:
        subtotal = widen(splat(0.0, weight))
        last = min(size, (task + 1) * block)
        for i in range(task * block, last, lanes_of(weight)):
            y = load_classes(target, i, 1, last - i, ignore_index, subtotal)
            subtotal = subtotal + widen(weights_of(weight, weight_stride, y, classes))
        if direct:
            total[0] = lane_sum(subtotal)
        else:
            subtotals[task] = lane_sum(subtotal)
        task = next_task(a)
