"""Targets that are a few entries a row: classes y_k with probabilities q_k, the same class perhaps more than once. Entries of class PAD
count for nothing.

Going forward they are looked up one by one. What the gradient is less there has to be known when a vector is written: to touch its line
again after a store past the caches costs 200 ns. So a thread hangs a row's entries into lists, one for every four vectors (or for every
class, where lanes are rows), that a gradient looks into on its way: O(K) a row in whatever order entries come, and one question for every
four vectors.
"""

from typing import Any, NamedTuple

import torch
from numba import njit
from torch import Tensor

from ..groups import PAD
from .arguments import Computed, Int64
from .blocks import term
from .gradient import targets_of, through_caches
from .inline import INLINE
from .memory import load_one, offset
from .prefetch import ask_for_seam
from .rows import Lanes, Walk, first_line, lanes_for, load_at, load_numbers, one_row, store_at
from .simd import lanes_of, select
from .stream import line_of, stream, stream_two, to_line
from .targets import less_at


class Entries(NamedTuple):
    """The targets of all rows."""

    indices: Int64  # [N, K]
    prob: Computed  # [N, K]
    row_stride: int  # of `prob`
    entry_stride: int
    per_row: int  # K
    weight: Computed
    weight_stride: int
    keep: float


class Scratch(NamedTuple):
    """Memory for the lists, each thread's own."""

    integers: Int64
    numbers: Computed
    buckets: int


class Lists(NamedTuple):
    """Entry number n is at class at[n] (in lane at[n], where lanes are rows) and takes g[n] off the gradient."""

    heads: Any  # of a bucket: its first entry, -1 if it has none
    following: Any
    at: Any
    bucket: Any
    g: Any
    shift: int  # class c is in bucket (c + shift) // (4 vectors)


class EntryNumbers(NamedTuple):
    """What a gradient wants of a row: one number for each lane, or the row's in every lane."""

    top: Any
    scale: Any  # dloss mass / total
    row_weight: Any  # 0 where a row does not count
    spread: Any  # dloss times what smoothing gives to every class
    weight: Any  # class weights, as `Lanes`
    smoothed: int  # 0 if there is no smoothing: neither is looked at then
    lists: Lists


def entries_of(indices: Tensor, prob: Tensor, weight: Tensor, keep: float) -> Entries:
    return Entries(indices, prob, prob.stride(0), prob.stride(1), indices.shape[1], weight, weight.stride(0), keep)


def scratch_lists(way: Walk, entries: Entries, logits: Tensor) -> Scratch:
    """Room for the entries of a row, or of a tile of rows, for each thread."""
    threads, nodes = torch.get_num_threads(), way.tile * entries.per_row
    buckets = way.classes if way.tile > 1 else way.classes // (4 * lanes_for(logits)) + 2
    integers = torch.empty(threads * (buckets + 3 * nodes), dtype=torch.int64, device="cpu")
    return Scratch(integers, torch.empty(threads * nodes, dtype=entries.prob.dtype, device="cpu"), buckets)


# ---------------------------------------------------------------- going forward


@njit(**INLINE)
def only_pads(e: Any, row: Any) -> Any:
    """True if a row has no entry that counts."""
    pads = 0
    for k in range(row * e.per_row, (row + 1) * e.per_row):
        pads += e.indices[k] == PAD
    return pads == e.per_row


@njit(**INLINE)
def _factor(e: Any, row: Any, k: Any, y: Any) -> Any:
    """keep w_y q_k."""
    return e.keep * e.weight[y * e.weight_stride] * e.prob[row * e.row_stride + k * e.entry_stride]


@njit(**INLINE)
def see_entries(a: Any, x: Any, row: Any) -> Any:
    """Add what the entries of the rows at x, `row` and those after it, give to `loss` and `mass`; `top` is there, and for now log total is
    in `row_weight`. A row without entries gets 0, 0, 0 and 1 unless something is smoothed. True if an entry is no class."""
    e, out_of_bounds = a.entries, False
    for i in range(x.rows):
        log_total, top = a.rows.row_weight[row + i], a.rows.top[row + i]
        loss, mass, counts = a.loss[row + i] + 0.0, a.rows.mass[row + i] + 0.0, a.smoothed  # summed in float64
        for k in range(e.per_row):
            y = e.indices[(row + i) * e.per_row + k]
            if y != PAD and 0 <= y < a.way.classes:
                factor = _factor(e, row + i, k, y)
                loss += factor * (log_total - (load_one(x.at, i * x.lane + y * x.class_) - top))
                mass += factor
                counts = 1
            elif y != PAD:
                out_of_bounds = True
        a.loss[row + i], a.rows.mass[row + i], a.rows.row_weight[row + i] = loss, mass, counts
        if counts == 0:
            a.rows.top[row + i], a.rows.total[row + i] = 0, 1
    return out_of_bounds


# ---------------------------------------------------------------- lists


@njit(**INLINE)
def empty_lists(a: Any, worker: Any) -> Any:
    """The lists of one thread."""
    s, nodes = a.lists, a.way.tile * a.entries.per_row
    heads = offset(s.integers, worker * (s.buckets + 3 * nodes))
    for bucket in range(s.buckets):
        heads[bucket] = -1
    following = offset(heads, s.buckets)
    at, bucket_of = offset(following, nodes), offset(following, 2 * nodes)
    return Lists(heads, following, at, bucket_of, offset(s.numbers, worker * nodes), 0)


@njit(**INLINE)
def hang_entries(a: Any, dx: Any, row: Any, lists: Any) -> Any:
    """Lists of the entries of the rows whose gradient is to be written at dx, and how many there are."""
    e, four, n = a.entries, 4 * lanes_of(dx.at), 0
    # where vectors of one row are aligned, so are the lists
    head = to_line(dx.at) if dx.tile == 1 and dx.class_ == 1 and a.past_caches else 0
    shift = four - head if head > 0 else 0
    for i in range(dx.rows):
        dloss = a.dloss[(row + i) * a.dloss_stride]
        for k in range(e.per_row - 1, -1, -1):  # the first entry comes to hang first
            y = e.indices[(row + i) * e.per_row + k]
            if 0 <= y < a.way.classes:
                bucket = y if dx.tile > 1 else (y + shift) // four
                lists.at[n] = i if dx.tile > 1 else y
                lists.g[n] = dloss * _factor(e, row + i, k, y)
                lists.bucket[n], lists.following[n] = bucket, lists.heads[bucket]
                lists.heads[bucket] = n
                n += 1
    return Lists(lists.heads, lists.following, lists.at, lists.bucket, lists.g, shift), n


@njit(**INLINE)
def take_down(lists: Any, count: Any) -> None:
    """Leave empty lists behind."""
    for n in range(count):
        lists.heads[lists.bucket[n]] = -1


@njit(**INLINE)
def _bucket_at(lists: Any, dx: Any, c: Any) -> Any:
    return c if dx.tile > 1 else (c + lists.shift) // (4 * lanes_of(dx.at))


@njit(**INLINE)
def _less_entries(d: Any, lists: Any, bucket: Any, c: Any) -> Any:
    """d, less what the entries of a bucket take of the vector whose first lane is number c."""
    n = lists.heads[bucket]
    while n >= 0:
        d = less_at(d, lists.at[n] - c, lists.g[n])
        n = lists.following[n]
    return d


# ---------------------------------------------------------------- coming back


@njit(**INLINE)
def entry_numbers(a: Any, x: Any, row: Any, lists: Any) -> Any:
    """The numbers of the rows at x, the first of which is `row`."""
    top, dloss = load_numbers(a.rows.top, 1, row, x, 0.0), load_numbers(a.dloss, a.dloss_stride, row, x, 0.0)
    scale = dloss * load_numbers(a.rows.mass, 1, row, x, 0.0) / load_numbers(a.rows.total, 1, row, x, 1.0)
    stride = a.entries.weight_stride
    weight = Lanes(a.entries.weight, stride, 0 if x.tile > 1 else stride, x.tile, x.rows)
    return EntryNumbers(top, scale, load_numbers(a.rows.row_weight, 1, row, x, 0.0), dloss * a.spread, weight, a.smoothed, lists)


@njit(**INLINE)
def _far(x: Any, block: Any, c: Any, n: Any, factor: Any, r: Any) -> Any:
    """The gradient of one vector without its entries."""
    d = term(x, block, c, n) * factor
    return d - r.spread * load_at(r.weight, c, n, 0.0) if r.smoothed else d


@njit(**INLINE)
def _near_entries(x: Any, block: Any, c: Any, n: Any, factor: Any, r: Any) -> Any:
    """The gradient of n classes of one row from c on, some of which may have entries."""
    return _less_entries(_far(x, block, c, n, factor, r), r.lists, _bucket_at(r.lists, x, c), c)


@njit(**INLINE)
def _are_entries_near(r: Any, dx: Any, c: Any) -> Any:
    return r.lists.heads[_bucket_at(r.lists, dx, c)] >= 0


@njit(**INLINE)
def _gradient_of_block(x: Any, dx: Any, block: Any, factor: Any, r: Any, past_caches: Any) -> None:
    """term * factor, less what smoothing and entries take; zero for rows that do not count."""
    lanes, first, last = lanes_of(x.at), block.first, block.last
    if x.tile > 1:
        for c in range(first, last):
            d = _far(x, block, c, x.rows, factor, r)
            if r.lists.heads[c] >= 0:
                d = _less_entries(d, r.lists, c, 0)
            store_at(dx, c, x.rows, select(r.row_weight > 0.0, d, 0.0))
    elif x.class_ == dx.class_ == 1 and (r.weight.class_ == 1 or not r.smoothed):
        _gradient_side_by_side(one_row(x.at), one_row(dx.at), block, factor, _with_weight(r, one_row(r.weight.at)), past_caches)
    else:
        # from where on a vector has one list
        c, n = first, lanes - (first + r.lists.shift) % lanes
        while c < last:
            n = min(n, last - c)
            store_at(dx, c, n, _near_entries(x, block, c, n, factor, r))
            c, n = c + n, lanes


@njit(**INLINE)
def _with_weight(r: Any, weight: Any) -> Any:
    return EntryNumbers(r.top, r.scale, r.row_weight, r.spread, weight, r.smoothed, r.lists)


@njit(**INLINE)
def _gradient_side_by_side(x: Any, dx: Any, block: Any, factor: Any, r: Any, past_caches: Any) -> None:
    """Whole vectors by four, whole lines, with what is left over before and behind them."""
    lanes, line, first, last = lanes_of(x.at), line_of(dx.at), block.first, block.last
    c = first_line(dx.at, first, last, past_caches)
    ask_for_seam(dx.at, last, past_caches)
    through_caches(x, dx, block, first, c, factor, r)
    while c + 4 * lanes <= last:
        _four_of_gradient(x, dx, block, c, factor, r, past_caches)
        c += 4 * lanes
    while c + line <= last:
        for i in range(c, c + line, lanes):
            stream(dx.at, i, _near_entries(x, block, i, lanes, factor, r), past_caches)
        c += line
    through_caches(x, dx, block, c, last, factor, r)


@njit(**INLINE)
def _four_of_gradient(x: Any, dx: Any, block: Any, c: Any, factor: Any, r: Any, past_caches: Any) -> None:
    """Four whole vectors of one row from class c on."""
    lanes = lanes_of(x.at)
    if _are_entries_near(r, dx, c):
        for i in range(c, c + 4 * lanes, 2 * lanes):
            d, e = _near_entries(x, block, i, lanes, factor, r), _near_entries(x, block, i + lanes, lanes, factor, r)
            stream_two(dx.at, i, d, e, past_caches)
    else:
        for i in range(c, c + 4 * lanes, 2 * lanes):
            d, e = _far(x, block, i, lanes, factor, r), _far(x, block, i + lanes, lanes, factor, r)
            stream_two(dx.at, i, d, e, past_caches)


targets_of(EntryNumbers, _gradient_of_block, _near_entries, _are_entries_near)
