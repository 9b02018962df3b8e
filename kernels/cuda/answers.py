"""What the caller of `token_statistics` gets of the rows, once their moments are known; see there for the formulas. Device code: `a` is a
kernel's block of arguments."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .math import _wide
from .moments import _NO_CLASS, _look_again
from .targets import _targets_of


class Wanted(NamedTuple):
    """`Answers`, None for those without elements."""

    log_prob: Tensor | None
    entropy: Tensor | None
    lse: Tensor | None
    sum_sq_prob: Tensor | None
    argmax: Tensor | None


def if_any(numbers: Tensor) -> Tensor | None:
    """None for what has no elements."""
    return numbers if numbers.numel() else None


@triton.jit
def _write_log_probs(a, place, top, log_total, scale, BLOCK_K: tl.constexpr):
    """log_prob of all targets of the rows: 0 for `ignore_index`, NaN if a target is no class."""
    b, p, row, inside = place
    x_ptr = a.logits + b * a.way.strides.batch + p * a.way.strides.position
    for first in tl.range(0, a.targets.per_row, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        at, y, is_class = _targets_of(a, row, inside, k)
        x_y = _wide(tl.load(x_ptr[:, None] + y * a.way.strides.class_, mask=is_class, other=float("nan")))
        log_prob = (x_y - top[:, None]) * scale - log_total[:, None]
        exists = inside[:, None] & (k < a.targets.per_row)[None, :]
        tl.store(a.answers.log_prob + at, tl.where(y == a.targets.ignore_index, 0.0, log_prob), mask=exists)


@triton.jit
def _write_answers(a, place, counts, moments, scale, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """The answers of rows, all else [rows]."""
    _b, _p, row, inside = place
    top, summed, gap, squares, largest = moments
    # statistics: every row but one of nothing but -inf has its largest term, 1, in the sum
    total = tl.where(summed > 0.5, summed, float("nan"))
    log_total = tl.log(total)
    odd = tl.full(row.shape, _NO_CLASS, tl.int32)
    if a.answers.lse is not None or a.answers.argmax is not None:
        unclear = summed != summed
        if a.answers.argmax is not None:
            unclear = unclear | (largest == _NO_CLASS)
        unclear = unclear & counts
        if tl.max(unclear.to(tl.int32), 0) > 0:
            odd, largest = _look_again(a, place, top, BLOCK_C)
    # answers
    tl.store(a.rows.top + row, tl.where(counts, top, 0.0), mask=inside)
    tl.store(a.rows.total + row, tl.where(counts, total, 0.0), mask=inside)
    if a.answers.entropy is not None:
        tl.store(a.answers.entropy + row, tl.where(counts, log_total - gap / total, 0.0), mask=inside)
    if a.answers.lse is not None:
        lse = top * scale + tl.log(summed)  # of nothing but -inf, -inf
        lse = tl.where((odd == _NO_CLASS) & (top == float("inf")), float("inf"), lse)
        tl.store(a.answers.lse + row, tl.where(counts, lse, 0.0), mask=inside)
    if a.answers.sum_sq_prob is not None:
        tl.store(a.answers.sum_sq_prob + row, tl.where(counts, squares / (total * total), 0.0), mask=inside)
    if a.answers.argmax is not None:
        largest = tl.where(odd == _NO_CLASS, largest, odd)
        largest = tl.where(counts & (largest != _NO_CLASS), largest, 0)
        tl.store(a.answers.argmax + row, largest.to(tl.int64), mask=inside)
    if a.answers.log_prob is not None:
        _write_log_probs(a, place, top, log_total, scale, BLOCK_K)


@triton.jit
def _of_one_row(moments):
    """Numbers as [1]."""
    top, total, gap, squares, largest = moments
    one = tl.zeros([1], top.dtype)
    return one + top, one + total, one + gap, one + squares, tl.zeros([1], tl.int32) + largest
