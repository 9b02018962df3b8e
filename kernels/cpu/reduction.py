"""Sums in one fixed order: blocks of a fixed size by any thread, then the blocks."""

from typing import Any

import torch
from torch import Tensor

from .launch import next_task, region, unpack
from .memory import load
from .simd import lane_sum, lanes_of, splat, widen

_SUM = "TDnn"
_BLOCK = 1 << 14


def sum_rows(values: Tensor, total: Tensor) -> None:
    subtotals = torch.empty(-(-values.numel() // _BLOCK), dtype=torch.float64)
    _sum_blocks(values.dtype, subtotals.numel(), values.data_ptr(), subtotals.data_ptr(), values.numel(), _BLOCK)
    total.copy_(subtotals.sum())  # few numbers: torch sums them on one thread


@region(_SUM)
def _sum_blocks(a: Any) -> None:
    values, subtotals, size, block = unpack(a, _SUM)
    task = next_task(a)
    while task >= 0:
        subtotal = widen(splat(0.0, values))
        last = min(size, (task + 1) * block)
        for i in range(task * block, last, lanes_of(values)):
            subtotal = subtotal + widen(load(values, i, 1, last - i, 0.0))
        subtotals[task] = lane_sum(subtotal)
        task = next_task(a)
