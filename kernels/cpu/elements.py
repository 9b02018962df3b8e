"""How the elementwise losses go over tensors [A, B, P]: all of one shape, each with its own strides (0 where it is broadcast).

A *piece* is a stretch of at most PIECE numbers along P; a task is some pieces. Lanes lie along P.
"""

from typing import Any, NamedTuple

import torch
from numba import njit
from torch import Tensor

from .math import INLINE

PIECE = 8192  # numbers in a piece
TASK_NUMEL = (1 << 13, 1 << 15)  # elements in a task, at least and at most: see `rows.TASK_NUMEL`


class Elements(NamedTuple):
    """The way over the elements: all integers, handed to the region as they are (`ELEMENTS` are their kinds)."""

    a: int
    b: int
    p: int
    grain: int  # pieces in a task

    @property
    def pieces(self) -> int:
        return self.a * self.b * -(-self.p // PIECE)

    @property
    def tasks(self) -> int:
        return -(-self.pieces // self.grain)


ELEMENTS = "nnnn"


def elements(tensor: Tensor) -> Elements:
    a, b, p = tensor.shape
    whole = Elements(a, b, p, 1)
    least, most = (numel // max(1, min(p, PIECE)) for numel in TASK_NUMEL)
    share = whole.pieces // (4 * torch.get_num_threads())  # pieces in a task if every thread is to get four
    return Elements(a, b, p, max(1, least, min(most, share)))


@njit(**INLINE)
def last_piece(task: Any, grain: Any, a: Any, b: Any, p: Any) -> Any:
    """One past the last piece of a task."""
    return min((task + 1) * grain, a * b * ((p + PIECE - 1) // PIECE))


@njit(**INLINE)
def piece_of(number: Any, b: Any, p: Any) -> Any:
    """A piece's place: index along A, along B, first number along P, how many numbers."""
    pieces = (p + PIECE - 1) // PIECE
    row, first = number // pieces, number % pieces * PIECE
    return row // b, row % b, first, min(PIECE, p - first)
