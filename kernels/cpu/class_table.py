"""Class indices [N, K], the targets of each row: a class may be there twice, and `ignore_index` is none."""

from typing import Any, NamedTuple

from numba import njit

from .arguments import Int64
from .inline import INLINE
from .memory import load_classes
from .simd import lane_numbers, lanes_of


class Targets(NamedTuple):
    classes: Int64  # [N, K]
    per_row: int  # K
    ignore_index: int


@njit(**INLINE)
def is_ignored(targets: Any, row: Any) -> Any:
    """Whether all targets of a row are `ignore_index`."""
    first, last = row * targets.per_row, (row + 1) * targets.per_row
    k = first
    while k < last and targets.classes[k] == targets.ignore_index:
        k += 1
    return k == last > first


@njit(**INLINE)
def classes_at(targets: Any, x: Any, row: Any, k: Any, like: Any) -> Any:
    """Target k of the rows in the lanes, or targets k and those after it of the one row; -1 for `ignore_index`."""
    first = row * targets.per_row + k
    if x.tile > 1:
        return load_classes(targets.classes, first, targets.per_row, x.rows, targets.ignore_index, like)
    return load_classes(targets.classes, first, 1, targets.per_row - k, targets.ignore_index, like)


@njit(**INLINE)
def counting(targets: Any, x: Any, row: Any, like: Any) -> Any:
    """Which rows in the lanes have a target, or need none."""
    counts = lane_numbers(like) < (0 if targets.per_row > 0 else lanes_of(like))
    for k in range(targets.per_row):
        y = classes_at(targets, x, row, k, like)
        counts = counts | (y > -1) | (y < -1)
    return counts
