"""The class indices of rows that have several, [rows, K]. Device code shared by kernels whose block of arguments `a` has `targets`."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .plan import power_of_two_from

_IN_ONE_STEP = 1024


class Targets(NamedTuple):
    classes: Tensor  # [B * P, per_row]
    per_row: int
    ignore_index: int


def in_one_step(target: Tensor, rows: int) -> int:
    """How many targets of each of so many rows a kernel takes together."""
    return min(power_of_two_from(target.shape[1]), max(1, _IN_ONE_STEP // rows))


@triton.jit
def _targets_of(a, row, inside, k):
    """Where targets k of the rows are, [rows, k]; their classes; which of them are classes. `ignore_index` is none, even in [0, C)."""
    t = a.targets
    at = row.to(tl.int64)[:, None] * t.per_row + k[None, :]
    y = tl.load(t.classes + at, mask=inside[:, None] & (k < t.per_row)[None, :], other=t.ignore_index)
    return at, y, (y != t.ignore_index) & (y >= 0) & (y < a.way.classes)


@triton.jit
def _counting(a, row, inside, BLOCK_K: tl.constexpr):
    """Which rows have a target, or need none."""
    counts = inside & (a.targets.per_row == 0)
    for first in tl.range(0, a.targets.per_row, BLOCK_K):
        _at, y, _is_class = _targets_of(a, row, inside, first + tl.arange(0, BLOCK_K))
        counts = counts | (tl.max((y != a.targets.ignore_index).to(tl.int32), 1) > 0)
    return counts


@triton.jit
def _taken(a, row, inside, BLOCK_K: tl.constexpr):
    """sum_k a_k. NaN if a target is no class."""
    taken = tl.zeros(row.shape, a.rows.top.dtype.element_ty)
    if a.dlog_prob is not None:
        for first in tl.range(0, a.targets.per_row, BLOCK_K):
            at, y, is_class = _targets_of(a, row, inside, first + tl.arange(0, BLOCK_K))
            given = tl.load(a.dlog_prob + at, mask=is_class, other=float("nan"))
            taken += tl.sum(tl.where(y == a.targets.ignore_index, 0.0, given), 1)
    return taken
