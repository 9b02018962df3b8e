"""Sums in one fixed order: blocks of a fixed size by any thread, then the blocks."""

from typing import Any, NamedTuple

import torch
from numba import njit
from torch import Tensor

from .arguments import Computed, Float32, Float64, Int64, Stored, arguments
from .inline import INLINE
from .launch import next_task, region
from .memory import load, load_classes
from .simd import lane_sum, lanes_of, splat, widen
from .targets import weights_of

BLOCK = 1 << 14
_TOTAL, _NARROW, _SUBTOTALS = range(3)


class Sum(NamedTuple):
    values: Stored
    total: Stored | None  # for the sum itself, if one block is all there is
    narrow: Float32 | None  # the same, where the values are float64 and their sum is not
    subtotals: Float64 | None  # else for those of the blocks
    size: int
    to: int  # which of the three


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


class Quotient(NamedTuple):
    total: Stored
    divisor: Computed
    result: Computed


def sum_rows(values: Tensor, total: Tensor) -> None:
    blocks = max(1, -(-values.numel() // BLOCK))
    a = Sum(values=values, total=None, narrow=None, subtotals=None, size=values.numel(), to=_TOTAL)
    if blocks > 1:
        subtotals = torch.empty(blocks, dtype=torch.float64, device="cpu")
        _sum(blocks, a._replace(subtotals=subtotals, to=_SUBTOTALS))
        total.copy_(subtotals.sum())  # few numbers: torch sums them on one thread
    elif total.dtype is values.dtype:
        _sum(1, a._replace(total=total))
    else:
        _sum(1, a._replace(narrow=total, to=_NARROW))


def mean_of_rows(values: Tensor, weights: Tensor, divisor: Tensor, mean: Tensor) -> None:
    """In three launches, which cost little here."""
    sum_rows(weights, divisor)
    sum_rows(values, mean)
    divide(mean, divisor, mean)


def sum_weights(target: Tensor, weight: Tensor, ignore_index: int, total: Tensor) -> None:
    blocks, subtotals = _subtotals(target.numel(), weight.dtype, total)
    direct = subtotals is None
    _sum_of_weights(blocks, SumOfWeights(
        target=target, ignore_index=ignore_index, weight=weight, weight_stride=weight.stride(0), classes=weight.numel(),
        total=total if direct else None, subtotals=subtotals, size=target.numel(), direct=direct,
    ))  # fmt: skip
    if subtotals is not None:
        total.copy_(subtotals.sum())


def divide(total: Tensor, divisor: Tensor, result: Tensor) -> None:
    _divide(1, Quotient(total, divisor, result))


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
        if a.to == _TOTAL:
            a.total[0] = subtotal
        elif a.to == _NARROW:
            a.narrow[0] = subtotal
        else:
            a.subtotals[task] = subtotal
        task = next_task(block)


@region(Quotient)
def _divide(block: Any) -> None:
    a = arguments(block)
    a.result[0] = a.total[0] / a.divisor[0]


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
