"""Class weights of targets; and what the kernels found and would not compute with, as torch's exceptions."""

from typing import Any

from numba import njit
from torch import Tensor

from .inline import INLINE
from .memory import load_each
from .simd import lane_numbers, lanes_of, select, splat


@njit(**INLINE)
def weights_of(weight: Any, weight_stride: Any, y: Any, classes: Any) -> Any:
    """w_y, 0 where y is no class. Without a stride one number serves all, which saves a gather."""
    is_class = (y > -1) & (y < classes)
    return select(is_class, splat(weight[0], weight), 0.0) if weight_stride == 0 else load_each(weight, 0, y, weight_stride, is_class)


@njit(**INLINE)
def less_at(d: Any, lane: Any, g: Any) -> Any:
    """d, less g in one lane; in none if there is no lane of that number. A number may be larger than a lane could hold."""
    return select(lane_numbers(d) == (lane if 0 <= lane < lanes_of(d) else -1), d - g, d)


def refuse_out_of_bounds(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise for the first class index that is not a class; it was not used as an index."""
    bad = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
    raise IndexError(f"Target {int(bad[0])} is out of bounds.")


def refuse_improbable(prob: Tensor) -> None:
    """Raise for a number outside [0, 1] or NaN, in `prob` or else in the target."""
    name = "target" if bool(((prob >= 0) & (prob <= 1)).all()) else "input"
    raise RuntimeError(f"all elements of {name} should be between 0 and 1")
