"""What a kernel is given that does cross-entropy and its gradient in one visit, and what it does before and after all rows."""

from typing import Any, NamedTuple

from numba import njit

from ..groups import Reduction, Rows
from .arguments import Computed, Int64, Known, Stored
from .inline import INLINE
from .reduction import sum_of, sum_of_weights
from .rows import Strides, Walk

SUM, MEAN = 1, 2


class ForwardBackward(NamedTuple):
    logits: Stored
    target: Int64
    weight: Computed
    weight_stride: int
    ignore_index: int
    dloss: Computed
    dloss_stride: int
    loss: Computed
    rows: Rows
    dlogits: Stored
    dstrides: Strides
    layout: Known  # see `gradient.layout_of`
    terms: Computed
    kept: int  # blocks that there is room for in `terms`, twice for tiles
    past_caches: Known
    way: Walk
    alone: int  # 0: `dloss` holds what it should. Else this launch reduces too, by SUM or MEAN, and makes dloss[0] of dloss[1]
    reduction: Reduction


@njit(**INLINE)
def before_all_rows(a: Any) -> None:
    """The upstream gradient of every row, in one place, where all threads write the same numbers."""
    if a.alone == MEAN:
        a.reduction.divisor[0] = sum_of_weights(a, a.way.classes, 0, a.way.batch * a.way.positions)
        a.dloss[0] = a.dloss[1] / a.reduction.divisor[0]


@njit(**INLINE)
def after_all_rows(a: Any) -> None:
    """The loss of all rows."""
    a.reduction.total[0] = sum_of(a.loss, 0, a.way.batch * a.way.positions)
    if a.alone == MEAN:
        a.reduction.total[0] = a.reduction.total[0] / a.reduction.divisor[0]
