"""How the elementwise losses go over tensors [A, B, P]: all of one shape, each with its own strides (0 where it is broadcast).

A *piece* is a stretch of numbers along P, at most as long as the tensor's size says; a task is some pieces. Lanes lie along P.
"""

from typing import Annotated, Any, NamedTuple

import torch
from numba import njit
from numba.core import types
from numba.extending import overload
from torch import Tensor

from .inline import INLINE
from .memory import load, offset, store
from .prefetch import prefetch_near
from .simd import lane_numbers, select

PIECES = (1 << 11, 1 << 13)  # numbers in a piece, at most: of a small tensor, so that threads can share it, and of others
SMALL_NUMEL = 1 << 18
ALONE_NUMEL = 1 << 13  # up to here one thread does all: see `rows.TASK_NUMEL`
TASK_NUMEL = (1 << 11, 1 << 15)  # elements in a task, at least and at most


Strides = Annotated[tuple[int, ...], 3]  # of a tensor [A, B, P], in elements


class Elements(NamedTuple):
    """The way over the elements."""

    a: int
    b: int
    p: int
    piece: int  # how long one is, at most; the number of threads must not be asked here
    pieces: int
    grain: int  # pieces in a task

    @property
    def tasks(self) -> int:
        return -(-self.pieces // self.grain)


def elements(tensor: Tensor) -> Elements:
    a, b, p = tensor.shape
    piece = PIECES[0] if tensor.numel() < SMALL_NUMEL else PIECES[1]
    pieces, numel = a * b * -(-p // piece), max(1, min(p, piece))
    if tensor.numel() < ALONE_NUMEL:
        return Elements(a, b, p, piece, pieces, max(1, pieces))
    share = pieces // (4 * torch.get_num_threads())  # pieces in a task if every thread is to get four
    return Elements(a, b, p, piece, pieces, max(1, TASK_NUMEL[0] // numel, min(TASK_NUMEL[1] // numel, share)))


class Piece(NamedTuple):
    a: int
    b: int
    first: int  # along P
    size: int


class Line(NamedTuple):
    """A piece of a tensor: number k lies at + k * step."""

    at: Any  # a pointer
    step: int


@njit(**INLINE)
def last_piece(task: Any, way: Any) -> Any:
    """One past the last piece of a task."""
    return min((task + 1) * way.grain, way.pieces)


@njit(**INLINE)
def piece_of(number: Any, way: Any) -> Any:
    pieces = (way.p + way.piece - 1) // way.piece
    row, first = number // pieces, number % pieces * way.piece
    return Piece(row // way.b, row % way.b, first, min(way.piece, way.p - first))


@njit(**INLINE)
def line_at(pointer: Any, strides: Any, piece: Any) -> Any:
    """A piece of the tensor at `pointer`."""
    return Line(offset(pointer, piece.a * strides[0] + piece.b * strides[1] + piece.first * strides[2]), strides[2])


@njit(**INLINE)
def load_along(x: Any, k: Any, n: Any) -> Any:
    """Numbers k .. k + n - 1; 0 in the lanes that are left."""
    return load(x.at, k * x.step, x.step, n, 0.0)


def value_along(x: Any, k: Any, n: Any) -> Any:
    """`load_along`, or the number itself if x is one that all elements share."""
    raise NotImplementedError("compiled code only")


@overload(value_along, jit_options=INLINE)
def _typed_value_along(x, k, n):  # type: ignore[no-untyped-def]
    return (lambda x, k, n: x) if isinstance(x, types.Float) else (lambda x, k, n: load_along(x, k, n))


@njit(**INLINE)
def store_along(x: Any, k: Any, n: Any, value: Any) -> None:
    store(x.at, k * x.step, x.step, n, value)


@njit(**INLINE)
def in_use(losses: Any, n: Any) -> Any:
    """The first n lanes; 0 in those that are left, whose numbers have a loss, too."""
    return select(lane_numbers(losses) < n, losses, 0.0)


@njit(**INLINE)
def prefetch_along(x: Any, k: Any) -> None:
    """Ask for what is needed some vectors after number k."""
    prefetch_near(x.at, k * x.step)
