"""Sums in one fixed order: neither the device nor its load changes a bit."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .plan import ceil_div

_CHUNK = 16384  # numbers for one program
_BLOCK = 4096  # in four steps, each of which waits for memory once
_WARPS = 16


def sum_rows(values: Tensor, total: Tensor) -> None:
    """Chunks side by side, then their sums one after the other."""
    size = values.numel()
    chunks = ceil_div(size, _CHUNK)
    if chunks > 1:
        parts = torch.empty(chunks, dtype=torch.float64, device=values.device)
        launch(_sum, chunks, _WARPS, values, values, parts, size, _CHUNK, BLOCK=_BLOCK)
        values, size = parts, chunks
    launch(_sum, 1, _WARPS, values, values, total, size, size, BLOCK=_BLOCK)


def sum_over(values: Tensor, count: int, total: Tensor) -> None:
    """The sum of values over a number that the host knows."""
    sum_rows(values, total)
    if count != 1:
        torch.div(total, count, out=total)


def mean_of_rows(values: Tensor, weights: Tensor, divisor: Tensor, mean: Tensor) -> None:
    """The sums as in `sum_rows`, both at once."""
    size = values.numel()
    chunks = ceil_div(size, _CHUNK)
    if chunks > 1:
        parts = torch.empty(2, chunks, dtype=torch.float64, device=values.device)
        launch(_two_sums, chunks, _WARPS, values, values, weights, parts, size, BLOCK=_BLOCK, CHUNK=_CHUNK)
        (values, weights), size = parts, chunks
    launch(_mean, 1, _WARPS, values, values, weights, divisor, mean, size, BLOCK=_BLOCK)


def divide(total: Tensor, divisor: Tensor, result: Tensor) -> None:
    torch.div(total, divisor, out=result)


@triton.jit
def _sum(values_ptr, total_ptr, size, chunk, BLOCK: tl.constexpr):
    """values [size], total [programs]. One program: the sum of `chunk` values, in float64."""
    first = tl.program_id(0).to(tl.int64) * chunk
    count = tl.minimum(chunk, size - first).to(tl.int32)
    subtotals = tl.zeros([BLOCK], tl.float64)
    for done in tl.range(0, count, BLOCK):
        i = done + tl.arange(0, BLOCK)
        subtotals += tl.load(values_ptr + first + i, mask=i < count, other=0.0).to(tl.float64)
    tl.store(total_ptr + tl.program_id(0), tl.sum(subtotals, 0))


@triton.jit
def _sums_of(values_ptr, weights_ptr, count, BLOCK: tl.constexpr):
    """Of `count` values and weights, in float64, in the order of `_sum`."""
    subtotals = tl.zeros([BLOCK], tl.float64)
    subweights = tl.zeros([BLOCK], tl.float64)
    for done in tl.range(0, count, BLOCK):
        i = done + tl.arange(0, BLOCK)
        subtotals += tl.load(values_ptr + i, mask=i < count, other=0.0).to(tl.float64)
        subweights += tl.load(weights_ptr + i, mask=i < count, other=0.0).to(tl.float64)
    return tl.sum(subtotals, 0), tl.sum(subweights, 0)


@triton.jit
def _two_sums(values_ptr, weights_ptr, parts_ptr, size, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """values and weights [size], parts [2, programs]. One program: the sums of CHUNK of each."""
    first = tl.program_id(0).to(tl.int64) * CHUNK
    total, weight = _sums_of(values_ptr + first, weights_ptr + first, tl.minimum(CHUNK, size - first).to(tl.int32), BLOCK)
    tl.store(parts_ptr + tl.program_id(0), total)
    tl.store(parts_ptr + tl.num_programs(0) + tl.program_id(0), weight)


@triton.jit
def _mean(values_ptr, weights_ptr, divisor_ptr, mean_ptr, size, BLOCK: tl.constexpr):
    """values and weights [size]. The only program."""
    total, weight = _sums_of(values_ptr, weights_ptr, size, BLOCK)
    divisor = weight.to(divisor_ptr.dtype.element_ty)
    tl.store(divisor_ptr, divisor)
    # both rounded, and divided as torch divides
    if divisor.dtype == tl.float64:
        mean = total / divisor
    else:
        mean = tl.div_rn(total.to(divisor.dtype), divisor)
    tl.store(mean_ptr, mean)
