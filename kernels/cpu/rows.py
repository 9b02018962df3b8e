"""How the kernels go over logits [N, C] or [B, C, P].

The lanes of a vector are either rows (*rows in lanes*: few classes, or classes that do not lie side by side) or classes of one row
(*row by row*). Every kernel is written once for both: lane i of the vector at class c lies at
c * class_stride + i * lane_stride; [N] vectors are read with a stride of `across` lanes, 1 or 0; `advance` goes on to the next vector.
"""

from typing import Any, NamedTuple

import torch
from numba import njit
from torch import Tensor

from .math import INLINE
from .memory import to_alignment
from .simd import lanes_of

FEW_CLASSES = 48  # up to here lanes are rows
SHORT_ROW = 64  # up to here a gradient is faster over several rows at once, if they lie without gaps
MOST_IN_LANES = (1 << 31) - 1  # a class number has 32 bits where lanes are rows, and one number is for all that are no class
TASK_NUMEL = (1 << 14, 1 << 16)  # logits in a task, at least and at most: 3 to 15 microseconds; less is not worth waking a thread
AHEAD = 512  # logits asked for ahead of their use: out-of-order execution alone does not look that far past an exp
STREAM_BYTES = 1 << 25  # results from here on bypass the caches: they would not stay there anyway


class Strides(NamedTuple):
    """Of a tensor shaped like the logits, in elements."""

    batch: int
    class_: int
    position: int


def strides_of(tensor: Tensor) -> Strides:
    """[B, C, P] as it is; the N rows of [N, C] are the positions of one batch entry."""
    return Strides(0, tensor.stride(1), tensor.stride(0)) if tensor.dim() == 2 else Strides(*tensor.stride())


class Walk(NamedTuple):
    """The way over the logits: all integers, handed to the region as they are (`WALK` are their kinds)."""

    batch: int
    classes: int
    positions: int
    batch_stride: int
    class_stride: int
    position_stride: int
    tile: int  # rows in a vector: 1 is row by row
    grain: int  # tiles in a task

    @property
    def tasks(self) -> int:
        return -(-self.batch * -(-self.positions // self.tile) // self.grain)


WALK = "n" * 8


def walk(logits: Tensor, few: int = FEW_CLASSES) -> Walk:
    """With at most `few` classes, lanes are rows."""
    batch, classes, positions = (1, logits.shape[1], logits.shape[0]) if logits.dim() == 2 else logits.shape
    strides = strides_of(logits)
    rows, lanes = batch * positions, lanes_for(logits)
    tile = lanes if (classes <= few or (strides.class_ != 1 and classes <= MOST_IN_LANES)) and rows >= lanes else 1
    least, most = (numel // max(1, tile * classes) for numel in TASK_NUMEL)
    share = rows // (tile * 4 * torch.get_num_threads())  # tiles in a task if every thread is to get four
    return Walk(batch, classes, positions, *strides, tile, max(1, least, min(most, share)))


def lanes_for(logits: Tensor) -> int:
    """Lanes of a vector of these logits, widened: 64 bytes."""
    return 8 if logits.dtype == torch.float64 else 16


def bypass_caches(source: Tensor, result: Tensor) -> bool:
    """Whether to write a result past the caches: it is large, and it is not the memory just read."""
    return result.numel() * result.element_size() >= STREAM_BYTES and result.data_ptr() != source.data_ptr()


@njit(**INLINE)
def last_tile(task: Any, grain: Any, batch: Any, positions: Any, tile: Any) -> Any:
    """One past the last tile of a task."""
    return min((task + 1) * grain, batch * ((positions + tile - 1) // tile))


@njit(**INLINE)
def rows_of(number: Any, positions: Any, tile: Any) -> Any:
    """A tile's batch entry, first position, first row and number of rows."""
    tiles = (positions + tile - 1) // tile
    b, p = number // tiles, number % tiles * tile
    return b, p, b * positions + p, min(tile, positions - p)


@njit(**INLINE)
def first_vector(result: Any, classes: Any, tile: Any, count: Any, past_caches: Any) -> Any:
    """How many lanes the first vector fills: every row of a tile; or so many classes that all further vectors lie aligned."""
    if tile > 1:
        return count
    head = to_alignment(result) if past_caches else 0
    return min(classes, head if head > 0 else lanes_of(result))


@njit(**INLINE)
def advance(c: Any, n: Any, classes: Any, tile: Any, lanes: Any) -> Any:
    """The class where the next vector starts, and how many lanes it fills."""
    return (c + 1, n) if tile > 1 else (c + n, min(lanes, classes - c - n))


@njit(**INLINE)
def whole_vectors(c: Any, n: Any, classes: Any, tile: Any, lanes: Any) -> Any:
    """Where the stretch of whole vectors of one row from class c on ends; c if there is none.

    Where classes lie side by side, such a stretch gets a loop of its own, with strides and counts that the compiler knows: only
    without a branch does it keep the constants of exp in registers.
    """
    return c + (classes - c) // lanes * lanes if tile == 1 and n == lanes else c
