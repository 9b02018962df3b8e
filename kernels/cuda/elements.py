"""Where a program's elements lie, for the elementwise losses. Device code shared by their kernels."""

import triton
import triton.language as tl

from .math import _wide
from .rows import _blocks_of


@triton.jit
def _elements_of(number, B, P, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr):
    """A program's elements: a [], b [BLOCK_B, 1], p [1, BLOCK_P], and which of these exist. Consecutive programs are neighbours."""
    across, down = _blocks_of(P, BLOCK_P), _blocks_of(B, BLOCK_B)
    p = number % across * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    b = number // across % down * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    a = number // across // down
    return a.to(tl.int64), b.to(tl.int64), p.to(tl.int64), (b < B) & (p < P)


@triton.jit
def _at(ptr, strides, piece):
    """Pointers [BLOCK_B, BLOCK_P] to the elements `piece`, as `_elements_of` gives them, of a tensor [A, B, P]."""
    a, b, p, _inside = piece
    return ptr + a * strides[0] + b * strides[1] + p * strides[2]


@triton.jit
def _load_at(ptr, strides, piece, other):
    """[BLOCK_B, BLOCK_P], widened; `other` where there is no element."""
    return _wide(tl.load(_at(ptr, strides, piece), mask=piece[3], other=other))


@triton.jit
def _number_at(ptr, strides, piece):
    """What comes with each element, widened: [BLOCK_B, BLOCK_P], or one number for all where there are no strides."""
    if strides is None:
        number = _wide(tl.load(ptr))
    else:
        number = _load_at(ptr, strides, piece, 0.0)
    return number
