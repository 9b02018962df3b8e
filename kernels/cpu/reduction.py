"""Sums in one fixed order: blocks of a fixed size by any thread, then the blocks."""

from typing import Any, NamedTuple

import torch
from numba import njit
from torch import Tensor

from .arguments import Computed, Float32, Float64, Int64, Stored, arguments
from .inline import INLINE
from .launch import last_task, next_task, region
from .memory import load, load_classes
from .simd import lane_sum, lanes_of, splat, widen
from .targets import weights_of

BLOCK = 1 << 14


class Total(NamedTuple):
    """Where the sum of all blocks goes: to one of the first two."""

    as_values: Stored | None
    narrow: Float32 | None  # where the values are float64 and their sum is not
    subtotals: Float64  # of the blocks
    blocks: int
    narrowed: int  # 1: to the second


class Sum(NamedTuple):
    values: Stored
    size: int
    total: Total


class SumOfWeights(NamedTuple):
    target: Int64
    ignore_index: int
    weight: Stored
    weight_stride: int
    classes: int
    size: int
    total: Total


class Quotient(NamedTuple):
    total: Stored
    divisor: Computed
    result: Computed


def sum_rows(values: Tensor, total: Tensor) -> None:
    to = _total_of(values, total)
    blocks = _blocks(values.numel())
    _sum(blocks, Sum(values=values, size=values.numel(), total=_place_for(to, values, blocks)))
    if to is not total:
        total.copy_(to)


def mean_of_rows(values: Tensor, weights: Tensor, divisor: Tensor, mean: Tensor) -> None:
    """In three launches, which cost little here."""
    sum_rows(weights, divisor)
    sum_rows(values, mean)
    divide(mean, divisor, mean)


def sum_weights(target: Tensor, weight: Tensor, ignore_index: int, total: Tensor) -> None:
    to, blocks = _total_of(weight, total), _blocks(target.numel())
    _sum_of_weights(blocks, SumOfWeights(
        target=target, ignore_index=ignore_index, weight=weight, weight_stride=weight.stride(0), classes=weight.numel(),
        size=target.numel(), total=_place_for(to, weight, blocks),
    ))  # fmt: skip
    if to is not total:
        total.copy_(to)


def divide(total: Tensor, divisor: Tensor, result: Tensor) -> None:
    _divide(1, Quotient(total, divisor, result))


def _blocks(rows: int) -> int:
    return max(1, -(-rows // BLOCK))


def _total_of(values: Tensor, total: Tensor) -> Tensor:
    """`total`, or a number in its place if it is neither of the values' dtype nor float32."""
    return total if total.dtype in (values.dtype, torch.float32) else values.new_empty(1)


def _place_for(total: Tensor, values: Tensor, blocks: int) -> Total:
    subtotals = torch.empty(blocks, dtype=torch.float64, device="cpu")
    return Total(total, None, subtotals, blocks, 0) if total.dtype == values.dtype else Total(None, total, subtotals, blocks, 1)


@region(Sum)
def _sum(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        a.total.subtotals[task] = sum_of(a.values, task * BLOCK, min(a.size, (task + 1) * BLOCK))
        if last_task(block):
            _add_up(a.total)
        task = next_task(block)


@njit(**INLINE)
def _add_up(total: Any) -> None:
    whole = sum_of(total.subtotals, 0, total.blocks)
    if total.narrowed:
        total.narrow[0] = whole
    else:
        total.as_values[0] = whole


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
        a.total.subtotals[task] = sum_of_weights(a, a.classes, task * BLOCK, min(a.size, (task + 1) * BLOCK))
        if last_task(block):
            _add_up(a.total)
        task = next_task(block)


@njit(**INLINE)
def sum_of_weights(a: Any, classes: Any, first: Any, last: Any) -> Any:
    subtotal = widen(splat(0.0, a.weight))
    for i in range(first, last, lanes_of(a.weight)):
        y = load_classes(a.target, i, 1, last - i, a.ignore_index, subtotal)
        subtotal = subtotal + widen(weights_of(a.weight, a.weight_stride, y, classes))
    return lane_sum(subtotal)
