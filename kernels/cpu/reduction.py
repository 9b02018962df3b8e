"""Sums in one fixed order: blocks of a fixed size by any thread, then the blocks."""

from typing import Any, NamedTuple

import torch
from numba import njit
from torch import Tensor

from .arguments import Float64, Int64, Stored, arguments
from .launch import next_task, region
from .math import INLINE
from .memory import load, load_classes
from .simd import lane_sum, lanes_of, splat, widen
from .targets import weights_of

BLOCK = 1 << 14


class Sum(NamedTuple):
    values: Stored
    total: Stored | None  # for the sum itself, if one block is all there is
    subtotals: Float64 | None  # else for those of the blocks
    size: int
    direct: int


class SumOfWeights(NamedTuple):
    target: Int64
    ignore_index: int
    weight: Stored
    weight_stride: int
    classes: int
    total: Stored | None  # as in `Sum`
    subtotals: Float64 | None
    size: int
    direct: int


def sum_rows(values: Tensor, total: Tensor) -> None:
    blocks, subtotals = _subtotals(values.numel(), values.dtype, total)
    direct = subtotals is None
    _sum(blocks, Sum(
        values=values, total=total if direct else None, subtotals=subtotals, size=values.numel(), direct=direct
    ))  # fmt: skip
    if subtotals is not None:
        total.copy_(subtotals.sum())  # few numbers: torch sums them on one thread


def mean_of_rows(values: Tensor, weights: Tensor, divisor: Tensor, mean: Tensor) -> None:
    """In two launches, which cost little here."""
    sum_rows(weights, divisor)
    sum_rows(values, mean)
    mean.div_(divisor)


def sum_weights(target: Tensor, weight: Tensor, ignore_index: int, total: Tensor) -> None:
    blocks, subtotals = _subtotals(target.numel(), weight.dtype, total)
    direct = subtotals is None
    _sum_of_weights(blocks, SumOfWeights(
        target=target, ignore_index=ignore_index, weight=weight, weight_stride=weight.stride(0), classes=weight.numel(),
        total=total if direct else None, subtotals=subtotals, size=target.numel(), direct=direct,
    ))  # fmt: skip
    if subtotals is not None:
        total.copy_(subtotals.sum())


def _subtotals(rows: int, dtype: torch.dtype, total: Tensor) -> tuple[int, Tensor | None]:
    """How many blocks, and where their sums go; nowhere if the only one writes the total itself, the common small case, without two more
    torch calls."""
    blocks = max(1, -(-rows // BLOCK))
    return blocks, None if blocks == 1 and dtype == total.dtype else torch.empty(blocks, dtype=torch.float64, device="cpu")


@region(Sum)
def _sum(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        subtotal = sum_of(a.values, task * BLOCK, min(a.size, (task + 1) * BLOCK))
        if a.direct:
            a.total[0] = subtotal
        else:
            a.subtotals[task] = subtotal
        task = next_task(block)


@njit(**INLINE)
def sum_of(values: Any, first: Any, last: Any) -> Any:
    subtotal = widen(splat(0.0, values))
    for i in range(first, last, lanes_of(values)):
        subtotal = subtotal + widen(load(values, i, 1, last - i, 0.0))
    return lane_sum(subtotal)


@region(SumOfWeights)
def _sum_of_weights(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        subtotal = sum_of_weights(a, a.classes, task * BLOCK, min(a.size, (task + 1) * BLOCK))
        if a.direct:
            a.total[0] = subtotal
        else:
            a.subtotals[task] = subtotal
        task = next_task(block)


@njit(**INLINE)
def sum_of_weights(a: Any, classes: Any, first: Any, last: Any) -> Any:
    subtotal = widen(splat(0.0, a.weight))
    for i in range(first, last, lanes_of(a.weight)):
        y = load_classes(a.target, i, 1, last - i, a.ignore_index, subtotal)
        subtotal = subtotal + widen(weights_of(a.weight, a.weight_stride, y, classes))
    return lane_sum(subtotal)
