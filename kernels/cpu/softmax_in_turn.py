"""softmax and log_softmax of rows of consecutive classes: a row is written while the next one is read.

Stores wait for memory, and exp for arithmetic. The bits are those of `softmax`, whose argument blocks are here too.
"""

from typing import Any, NamedTuple

from numba import njit

from .arguments import Computed, Floats, Known, Stored, arguments
from .blocks import block_of, row_statistics, term
from .cross_entropy_one_visit import statistics_and_gradient
from .gradient import gradient_of_row, targets_of
from .inline import INLINE
from .launch import next_task, next_worker, region
from .math import exp, log
from .memory import load, store
from .prefetch import ask_for_seam, prefetch
from .rows import Strides, Walk, advance, first_vector, last_tile, one_row, row_at, store_at, tile_of, whole_vectors
from .simd import fma, lane_sum, lanes_of, splat
from .stream import line_of, stream, stream_row, to_line

CHUNK = 8192  # classes between two sums of sums, which lose fewer digits


class Forward(NamedTuple):
    logits: Stored
    prob: Floats  # or its logarithm
    prob_strides: Strides
    terms: Computed
    kept: int  # blocks that there is room for in `terms`
    past_caches: Known
    way: Walk


class Backward(NamedTuple):
    prob: Stored  # or its logarithm
    dprob: Stored
    d_strides: Strides
    dlogits: Floats
    to_strides: Strides
    past_caches: Known
    way: Walk


class Waiting(NamedTuple):
    """A row whose probabilities are still to be written: its numbers, in every lane."""

    top: Any
    scale: Any  # 1 / total


class LogWaiting(NamedTuple):
    """The same where it is their logarithms."""

    top: Any
    scale: Any  # nobody asks
    log_total: Any
    logits: Any  # a pointer


@njit(**INLINE)
def probabilities(out: Any, block: Any, factor: Any, past_caches: Any) -> None:
    """term * factor."""
    lanes, last = lanes_of(out.at), block.last
    consecutive = out.tile == 1 and out.class_ == 1
    c, n = block.first, first_vector(out, block.first, last, past_caches)
    while c < last:
        stop = whole_vectors(out.at, c, n, last, past_caches) if consecutive else c
        for k in range(c, stop, lanes):
            stream_row(out.at, k, term(one_row(out.at), block, k, lanes) * factor, past_caches)
        if stop > c:
            c, n = stop, min(lanes, last - stop)
        else:
            store_at(out, c, n, term(out, block, c, n) * factor)
            c, n = advance(out, c, n, last)


@njit(**INLINE)
def _waiting_block(x: Any, out: Any, block: Any, factor: Any, r: Any, past_caches: Any) -> None:
    probabilities(out, block, factor, past_caches)


@njit(**INLINE)
def _waiting_prob(x: Any, block: Any, c: Any, n: Any, factor: Any, r: Any) -> Any:
    return term(x, block, c, n) * factor


@njit(**INLINE)
def _none_near(r: Any, out: Any, c: Any) -> Any:
    return False


targets_of(Waiting, _waiting_block, _waiting_prob, _none_near)


@region(Forward)
def softmax_in_turn(block: Any) -> None:
    """Rows of consecutive classes. A row is written while the next one is read: see `cross_entropy_one_visit`."""
    a = arguments(block)
    way, classes = a.way, a.way.classes
    terms = block_of(a.terms, next_worker(block) * a.kept)
    waits, before, r = False, a.prob, Waiting(splat(0.0, a.logits), splat(0.0, a.logits))
    task = next_task(block)
    while task >= 0:
        for row in range(task * way.grain, last_tile(task, way)):
            t = tile_of(row, way)
            x, out = one_row(row_at(a.logits, way.strides, t.b, t.p)), row_at(a.prob, a.prob_strides, t.b, t.p)
            if waits:
                top, total = statistics_and_gradient(x, classes, terms, one_row(before), r, a.past_caches)
            else:
                top, total = row_statistics(x, classes, terms, 1)
            waits, before, r = True, out, Waiting(top, 1.0 / total)
        task = next_task(block)
    if waits:
        gradient_of_row(one_row(before), one_row(before), 0, classes, classes, terms, 1, r, a.past_caches)


@njit(**INLINE)
def _log_waiting_block(x: Any, out: Any, block: Any, factor: Any, r: Any, past_caches: Any) -> None:
    lanes, c = lanes_of(out.at), block.first
    n = first_vector(out, c, block.last, past_caches)
    while c < block.last:
        stop = whole_vectors(out.at, c, n, block.last, past_caches)
        for k in range(c, stop, lanes):
            stream(out.at, k, _log_waiting(x, block, k, lanes, factor, r), past_caches)
        if stop > c:
            c, n = stop, min(lanes, block.last - stop)
        else:
            store_at(out, c, n, _log_waiting(x, block, c, n, factor, r))
            c, n = advance(out, c, n, block.last)


@njit(**INLINE)
def _log_waiting(x: Any, block: Any, c: Any, n: Any, factor: Any, r: Any) -> Any:
    return (load(r.logits, c, 1, n, 0.0) - r.top) - r.log_total


@njit(**INLINE)
def _all_near(r: Any, out: Any, c: Any) -> Any:
    return True


targets_of(LogWaiting, _log_waiting_block, _log_waiting, _all_near)


@region(Forward)
def log_softmax_in_turn(block: Any) -> None:
    a = arguments(block)
    way, classes = a.way, a.way.classes
    terms = block_of(a.terms, next_worker(block) * a.kept)
    nothing = splat(0.0, a.logits)
    waits, before, r = False, a.prob, LogWaiting(nothing, nothing, nothing, a.logits)
    task = next_task(block)
    while task >= 0:
        for row in range(task * way.grain, last_tile(task, way)):
            t = tile_of(row, way)
            x, out = one_row(row_at(a.logits, way.strides, t.b, t.p)), row_at(a.prob, a.prob_strides, t.b, t.p)
            if waits:
                top, total = statistics_and_gradient(x, classes, terms, one_row(before), r, a.past_caches)
            else:
                top, total = row_statistics(x, classes, terms, 1)
            waits, before, r = True, out, LogWaiting(top, nothing, log(total), x.at)
        task = next_task(block)
    if waits:
        gradient_of_row(one_row(before), one_row(before), 0, classes, classes, terms, 1, r, a.past_caches)


class Pending(NamedTuple):
    """A row whose gradient is still to be written: where its numbers are and go, and what is known of all of them."""

    y: Any  # a pointer, as the next two
    dy: Any
    dx: Any
    dot: Any


@njit(**INLINE)
def _added(dot: Any, y: Any, dy: Any, logarithm: Any) -> Any:
    return dot + dy if logarithm else fma(y, dy, dot)


@njit(**INLINE)
def _gradient_at(r: Any, c: Any, n: Any, logarithm: Any) -> Any:
    y, dy = load(r.y, c, 1, n, 0.0), load(r.dy, c, 1, n, 0.0)
    return dy - exp(y) * r.dot if logarithm else y * (dy - r.dot)


@njit(**INLINE)
def _through_caches(r: Any, first: Any, last: Any, logarithm: Any) -> None:
    """Classes of the pending row that do not fill a line."""
    lanes = lanes_of(r.dx)
    for c in range(first, last, lanes):
        n = min(lanes, last - c)
        store(r.dx, c, 1, n, _gradient_at(r, c, n, logarithm))


@njit(**INLINE)
def _dot_and_gradient(y: Any, dy: Any, r: Any, count: Any, classes: Any, logarithm: Any, past_caches: Any) -> Any:
    """The sum over the row at y and dy, as the other kernels have it, and meanwhile `count` classes, all or none, of the pending row."""
    lanes = lanes_of(y)
    head = min(count, to_line(r.dx))  # through the caches, too: a store over the end of a line is two
    whole = (count - head) // line_of(r.dx) * line_of(r.dx)
    ask_for_seam(r.dx, count, past_caches)
    _through_caches(r, 0, head, logarithm)
    dot = splat(0.0, y)
    for first in range(0, classes, CHUNK):
        subtotal, last = splat(0.0, y), min(classes, first + CHUNK)
        full = first + (last - first) // lanes * lanes
        both = max(first, min(full, whole))
        for c in range(first, both, lanes):
            prefetch(y, c)
            prefetch(dy, c)
            subtotal = _added(subtotal, load(y, c, 1, lanes, 0.0), load(dy, c, 1, lanes, 0.0), logarithm)
            stream_row(r.dx, head + c, _gradient_at(r, head + c, lanes, logarithm), past_caches)
        for c in range(both, last, lanes):
            prefetch(y, c)
            prefetch(dy, c)
            subtotal = _added(subtotal, load(y, c, 1, last - c, 0.0), load(dy, c, 1, last - c, 0.0), logarithm)
        dot = dot + subtotal
    _through_caches(r, head + whole, count, logarithm)
    return splat(lane_sum(dot), y)


@njit(**INLINE)
def _rows_backward_in_turn(block: Any, logarithm: Any) -> None:
    """Rows of consecutive classes. A row is written while the next one is read: see `cross_entropy_one_visit`."""
    a = arguments(block)
    way, classes, lanes = a.way, a.way.classes, lanes_of(a.dlogits)
    r, count = Pending(a.prob, a.dprob, a.dlogits, splat(0.0, a.prob)), 0
    task = next_task(block)
    while task >= 0:
        for row in range(task * way.grain, last_tile(task, way)):
            t = tile_of(row, way)
            y, dy = row_at(a.prob, way.strides, t.b, t.p), row_at(a.dprob, a.d_strides, t.b, t.p)
            dot = _dot_and_gradient(y, dy, r, count, classes, logarithm, a.past_caches)
            r, count = Pending(y, dy, row_at(a.dlogits, a.to_strides, t.b, t.p), dot), classes
        task = next_task(block)
    for c in range(0, count, lanes):
        store(r.dx, c, 1, count - c, _gradient_at(r, c, count - c, logarithm))


@region(Backward)
def softmax_backward_in_turn(block: Any) -> None:
    _rows_backward_in_turn(block, False)


@region(Backward)
def log_softmax_backward_in_turn(block: Any) -> None:
    _rows_backward_in_turn(block, True)
