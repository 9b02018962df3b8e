"""Sums in one fixed order."""

from typing import Any

from torch import Tensor

from .launch import next_task, region, unpack
from .memory import load
from .simd import lane_sum, lanes_of, splat, widen

_SUM = "TCn"


def sum_rows(values: Tensor, total: Tensor) -> None:
    _sum(values.dtype, 1, values.data_ptr(), total.data_ptr(), values.numel())


@region(_SUM)
def _sum(a: Any) -> None:
    values, total, size = unpack(a, _SUM)
    if next_task(a) == 0:
        subtotals = widen(splat(0.0, values))
        for i in range(0, size, lanes_of(values)):
            subtotals = subtotals + widen(load(values, i, 1, size - i, 0.0))
        total[0] = lane_sum(subtotals)
