"""Sums in one fixed order: blocks of a fixed size by any thread, then the blocks."""

from typing import Any

import torch
from torch import Tensor

from .launch import next_task, region, unpack
from .memory import load
from .simd import lane_sum, lanes_of, splat, widen

_SUM = "TDTnnn"
_BLOCK = 1 << 14


def sum_rows(values: Tensor, total: Tensor) -> None:
    blocks = max(1, -(-values.numel() // _BLOCK))
    direct = blocks == 1 and values.dtype == total.dtype  # the common small case, without two more torch calls
    subtotals = total if direct else torch.empty(blocks, dtype=torch.float64, device="cpu")
    _sum(values.dtype, blocks, values.data_ptr(), subtotals.data_ptr(), total.data_ptr(), values.numel(), _BLOCK, direct)
    if not direct:
        total.copy_(subtotals.sum())  # few numbers: torch sums them on one thread


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
