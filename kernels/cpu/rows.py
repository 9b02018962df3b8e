"""How the kernels go over logits [N, C] or [B, C, P].

The lanes of a vector are either rows (*rows in lanes*: few classes, or rows that lie closer together than classes) or classes of one row
(*row by row*). Every kernel is written once for both, over `Lanes`; `load_numbers` reads [N] vectors for either, and `advance` goes on to
the next vector.
"""

from typing import Any, NamedTuple

import torch
from numba import njit
from torch import Tensor

from .arguments import Known
from .inline import INLINE
from .memory import load, offset, store
from .simd import lanes_of
from .stream import line_of, to_alignment, to_line

FEW_CLASSES = 48  # up to here lanes are rows
SHORT_ROW = 64  # up to here they are where cross-entropy turns rows about, or goes over a gradient without gaps as it lies in memory
MOST_IN_LANES = (1 << 31) - 1  # a class number has 32 bits where lanes are rows, and one number is for all that are no class
TASK_NUMEL = (1 << 14, 1 << 16)  # logits in a task, at least and at most: 3 to 15 microseconds; less is not worth waking a thread
STREAM_BYTES = 1 << 25  # results from here on bypass the caches: they would not stay there anyway
FRESH_BYTES = 1 << 25  # tensors from here on have pages from the system if they are of torch's own memory: glibc keeps none so large


class Strides(NamedTuple):
    """Of a tensor shaped like the logits, in elements."""

    batch: int
    class_: int
    position: int
    lane: int  # from one lane of a vector to the next


def strides_of(tensor: Tensor, tile: int) -> Strides:
    """[B, C, P] as it is; the N rows of [N, C], and of [N, C, 1], are the positions of one batch entry."""
    strides = tensor.stride()
    one_entry = len(strides) == 2 or tensor.shape[2] == 1
    batch, class_, position = (0, strides[1], strides[0]) if one_entry else strides
    return Strides(batch, class_, position, position if tile > 1 else class_)


class Walk(NamedTuple):
    """The way over the logits."""

    batch: int
    classes: int
    positions: int
    strides: Strides  # of the logits
    tile: Known  # rows in a vector: 1 is row by row
    grain: int  # tiles in a task

    @property
    def tasks(self) -> int:
        return -(-self.batch * -(-self.positions // self.tile) // self.grain)


def walk(logits: Tensor, few: int = FEW_CLASSES) -> Walk:
    """With at most `few` classes, or if rows lie closer together than classes, lanes are rows.

    The number of rows must not be asked here, and of strides only those that a slice keeps: row by row a sum has another order, and so
    perhaps other bits, and the numbers of a row are not to depend on how many there are beside it. Few rows leave lanes empty.
    """
    strides = logits.stride()
    if logits.dim() == 2:
        batch, (positions, classes) = 1, logits.shape
        lane = strides[0]
    else:
        batch, classes, positions = logits.shape
        lane = strides[2]
        if positions == 1:
            batch, positions = 1, batch
    tile = lanes_for(logits) if classes <= few or (lane <= strides[1] != 1 and classes <= MOST_IN_LANES) else 1
    return Walk(batch, classes, positions, strides_of(logits, tile), tile, _grain(tile * classes, batch * positions // tile))


def by_tiles(way: Walk, logits: Tensor) -> Walk:
    """The same way row by row, taken in tiles of as many rows as there would be lanes."""
    tile = lanes_for(logits)
    grain = _grain(tile * way.classes, way.batch * way.positions // tile)
    return way._replace(strides=way.strides._replace(lane=way.strides.position), tile=tile, grain=grain)


def _grain(numel: int, tiles: int) -> int:
    """Tiles in a task, of `numel` logits each: so many that every thread gets four tasks, within the limits of a task."""
    numel, share = max(1, numel), tiles // (4 * torch.get_num_threads())
    return max(1, TASK_NUMEL[0] // numel, min(TASK_NUMEL[1] // numel, share))


def lanes_for(logits: Tensor) -> int:
    """Lanes of a vector of these logits, widened: 64 bytes."""
    return 8 if logits.dtype == torch.float64 else 16


def bypass_caches(source: Tensor, result: Tensor) -> int:
    """1 if a result is to be written past the caches, because it is large and not the memory just read; else 0.

    A page that the system has yet to make is zeroed in the caches, from where such a store would have to drive it out first: 1024x32000
    float32 took softmax 93 ms instead of 72. torch's own memory has such pages; what has been kept for results cannot be resized by torch.
    """
    fresh = result.nbytes >= FRESH_BYTES and result.untyped_storage().resizable()
    return 1 if result.nbytes >= STREAM_BYTES and result.data_ptr() != source.data_ptr() and not fresh else 0


class Tile(NamedTuple):
    """Rows that share a vector, or the one row."""

    b: int
    p: int  # of the first row, as `row` is
    row: int
    rows: int  # how many


class Lanes(NamedTuple):
    """A tile of a tensor: lane i of the vector at class c lies at + c * class_ + i * lane."""

    at: Any  # a pointer
    class_: int
    lane: int
    tile: int  # rows in a vector: 1 is row by row
    rows: int  # of these, how many there are


@njit(**INLINE)
def last_tile(task: Any, way: Any) -> Any:
    """One past the last tile of a task."""
    return min((task + 1) * way.grain, tiles_of(way))


@njit(**INLINE)
def tiles_of(way: Any) -> Any:
    return way.batch * ((way.positions + way.tile - 1) // way.tile)


@njit(**INLINE)
def tile_of(number: Any, way: Any) -> Any:
    tiles = (way.positions + way.tile - 1) // way.tile
    b, p = number // tiles, number % tiles * way.tile
    return Tile(b, p, b * way.positions + p, min(way.tile, way.positions - p))


@njit(**INLINE)
def row_at(pointer: Any, strides: Any, b: Any, p: Any) -> Any:
    return offset(pointer, b * strides.batch + p * strides.position)


@njit(**INLINE)
def lanes_at(pointer: Any, strides: Any, t: Any, way: Any) -> Any:
    """A tile of the tensor at `pointer`."""
    return Lanes(row_at(pointer, strides, t.b, t.p), strides.class_, strides.lane, way.tile, t.rows)


@njit(**INLINE)
def one_row(at: Any) -> Any:
    """A row whose classes lie side by side. Strides and counts that the compiler knows make loops without branches."""
    return Lanes(at, 1, 1, 1, 1)


@njit(**INLINE)
def whole_tile(x: Any, lane: Any) -> Any:
    """Rows that fill the lanes, `lane` apart; the fewer questions are left in a loop, the surer LLVM takes them all out of it."""
    lanes = lanes_of(x.at)
    return Lanes(x.at, x.class_, lane, lanes, lanes)


@njit(**INLINE)
def load_at(x: Any, c: Any, n: Any, other: Any) -> Any:
    """The n lanes in use of the vector at class c; `other` in the others."""
    return load(x.at, c * x.class_, x.lane, n, other)


@njit(**INLINE)
def store_at(x: Any, c: Any, n: Any, value: Any) -> None:
    store(x.at, c * x.class_, x.lane, n, value)


@njit(**INLINE)
def load_numbers(numbers: Any, stride: Any, row: Any, x: Any, other: Any) -> Any:
    """Numbers of the rows of a tile x, the first of which is `row`: one in each lane, or the one row's in every lane."""
    if x.tile > 1:
        return load(numbers, row * stride, stride, x.rows, other)
    return load(numbers, row * stride, 0, lanes_of(x.at), other)


@njit(**INLINE)
def first_vector(x: Any, first: Any, last: Any, past_caches: Any) -> Any:
    """How many lanes the vector at class `first` fills: every row of a tile; or so many classes that all further vectors lie aligned."""
    return x.rows if x.tile > 1 else to_first_vector(offset(x.at, first * x.class_), last - first, past_caches)


@njit(**INLINE)
def first_line(at: Any, first: Any, last: Any, past_caches: Any) -> Any:
    """From where on a row of classes side by side is written by whole vectors: past the caches, where a line begins."""
    return min(last, first + to_line(offset(at, first))) if past_caches else first


@njit(**INLINE)
def fills_lines(x: Any) -> Any:
    """Whether every vector of whole tiles like this one is a cache line. One of 16-bit numbers is half of a line, and there may be more
    classes than halves that the machine can keep until it has both: 21 took eight times as long past the caches as through them."""
    return line_of(x.at) == lanes_of(x.at) and to_line(x.at) == to_line(offset(x.at, x.class_)) == 0


@njit(**INLINE)
def to_first_vector(result: Any, count: Any, past_caches: Any) -> Any:
    """How many of `count` numbers to write one by one so that all further vectors lie aligned, or how many the first vector fills."""
    head = to_alignment(result) if past_caches else 0
    return min(count, head if head > 0 else lanes_of(result))


@njit(**INLINE)
def advance(x: Any, c: Any, n: Any, last: Any) -> Any:
    """The class where the next vector starts, and how many lanes it fills."""
    return (c + 1, n) if x.tile > 1 else (c + n, min(lanes_of(x.at), last - c - n))


@njit(**INLINE)
def whole_vectors(to: Any, c: Any, n: Any, last: Any, past_caches: Any) -> Any:
    """Where the stretch of whole vectors of one row from class c on ends, or of whole lines if they go past the caches; c if there is none.

    Where classes lie side by side, such a stretch gets a loop of its own, with strides and counts that the compiler knows: only
    without a branch does it keep the constants of exp in registers.
    """
    if n < lanes_of(to) or (past_caches and to_line(offset(to, c)) > 0):
        return c
    step = line_of(to) if past_caches else lanes_of(to)
    return c + (last - c) // step * step
