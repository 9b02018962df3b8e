"""Sums in one fixed order: neither the device nor its load changes a bit."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .plan import ceil_div

_CHUNK = 16384  # numbers for one program
_BLOCK = 1024


def sum_rows(values: Tensor, total: Tensor) -> None:
    """Chunks side by side, then their sums one after the other."""
    size = values.numel()
    chunks = ceil_div(size, _CHUNK)
    if chunks > 1:
        parts = torch.empty(chunks, dtype=torch.float64, device=values.device)
        launch(_sum, chunks, 4, values, values, parts, size, _CHUNK, BLOCK=_BLOCK)
        values, size = parts, chunks
    launch(_sum, 1, 4, values, values, total, size, size, BLOCK=_BLOCK)


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
