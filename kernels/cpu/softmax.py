"""softmax and log_softmax over the classes.

p = exp(x - top) / total               dlogits = p (dp - sum_c dp_c p_c)
log p = (x - top) - log total          dlogits = d - p sum_c d_c
"""

from typing import Any

from numba import njit
from torch import Tensor

from .arguments import arguments
from .blocks import (
    KEPT_BYTES,
    Block,
    all_kept,
    block_of,
    block_size,
    block_statistics,
    blocks_kept,
    kept_in_turn,
    kept_reference,
    row_statistics,
    scratch,
)
from .inline import INLINE
from .launch import next_task, next_worker, region
from .math import exp, log
from .memory import load
from .prefetch import prefetch
from .rows import (
    advance,
    bypass_caches,
    first_vector,
    lanes_at,
    last_tile,
    load_at,
    store_at,
    strides_of,
    tile_of,
    walk,
    whole_vectors,
)
from .simd import fma, lane_sum, lanes_of, splat
from .softmax_in_turn import (
    CHUNK,
    Backward,
    Forward,
    log_softmax_backward_in_turn,
    log_softmax_in_turn,
    probabilities,
    softmax_backward_in_turn,
    softmax_in_turn,
)
from .stream import stream_row


def softmax_forward(logits: Tensor, prob: Tensor) -> None:
    _run_forward(_softmax, softmax_in_turn, logits, prob)


def log_softmax_forward(logits: Tensor, log_prob: Tensor) -> None:
    _run_forward(_log_softmax, log_softmax_in_turn, logits, log_prob)


def softmax_backward(prob: Tensor, dprob: Tensor, dlogits: Tensor) -> None:
    _run_backward(_softmax_backward, softmax_backward_in_turn, prob, dprob, dlogits)


def log_softmax_backward(log_prob: Tensor, dlog_prob: Tensor, dlogits: Tensor) -> None:
    _run_backward(_log_softmax_backward, log_softmax_backward_in_turn, log_prob, dlog_prob, dlogits)


def _run_forward(run: Any, run_in_turn: Any, logits: Tensor, result: Tensor) -> None:
    way, past_caches = walk(logits), bypass_caches(logits, result)
    kept, strides = blocks_kept(way, logits), strides_of(result, way.tile)
    in_turn = kept_in_turn(way, kept, logits, strides)
    (run_in_turn if in_turn else run)(way.tasks, Forward(
        logits=logits, prob=result, prob_strides=strides, terms=scratch(kept, logits), kept=kept,
        past_caches=past_caches, way=way,
    ))  # fmt: skip


def _run_backward(run: Any, run_in_turn: Any, result: Tensor, dresult: Tensor, dlogits: Tensor) -> None:
    way, past_caches = walk(result), bypass_caches(result, dlogits)
    d_strides, to_strides = strides_of(dresult, way.tile), strides_of(dlogits, way.tile)
    side_by_side = way.tile == way.strides.class_ == d_strides.class_ == to_strides.class_ == 1
    in_turn = side_by_side and 4 * way.classes * result.element_size() <= KEPT_BYTES  # two rows of two tensors
    (run_in_turn if in_turn else run)(way.tasks, Backward(
        prob=result, dprob=dresult, d_strides=d_strides, dlogits=dlogits, to_strides=to_strides, past_caches=past_caches, way=way,
    ))  # fmt: skip


@region(Forward)
def _softmax(block: Any) -> None:
    a = arguments(block)
    terms = block_of(a.terms, next_worker(block) * a.kept)
    size, keep, classes = block_size(terms, a.way.tile), all_kept(terms, a.kept, a.way), a.way.classes
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_tile(task, a.way)):
            t = tile_of(number, a.way)
            x, out = lanes_at(a.logits, a.way.strides, t, a.way), lanes_at(a.prob, a.prob_strides, t, a.way)
            # statistics
            top, total = row_statistics(x, classes, terms, keep)
            # probabilities
            for first in range(0, classes, size):
                mine, last = block_of(terms, first // size * keep), min(classes, first + size)
                if not keep:
                    block_statistics(x, first, last, mine)
                factor = exp(kept_reference(mine) - top) * (1.0 / total)
                probabilities(out, Block(first, last, factor, mine, 1), factor, a.past_caches)
        task = next_task(block)


@region(Forward)
def _log_softmax(block: Any) -> None:
    a = arguments(block)
    lanes, classes = lanes_of(a.logits), a.way.classes
    consecutive = a.way.tile == a.way.strides.class_ == a.prob_strides.class_ == 1
    terms = block_of(a.terms, next_worker(block) * a.kept)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_tile(task, a.way)):
            t = tile_of(number, a.way)
            x, out = lanes_at(a.logits, a.way.strides, t, a.way), lanes_at(a.prob, a.prob_strides, t, a.way)
            # statistics
            top, total = row_statistics(x, classes, terms, 0)
            log_total = log(total)
            # log-probabilities
            c, n = 0, first_vector(out, 0, classes, a.past_caches)
            while c < classes:
                stop = whole_vectors(out.at, c, n, classes, a.past_caches) if consecutive else c
                for k in range(c, stop, lanes):
                    stream_row(out.at, k, (load(x.at, k, 1, lanes, 0.0) - top) - log_total, a.past_caches)
                if stop > c:
                    c, n = stop, min(lanes, classes - stop)
                else:
                    store_at(out, c, n, (load_at(x, c, n, 0.0) - top) - log_total)
                    c, n = advance(out, c, n, classes)
        task = next_task(block)


@region(Backward)
def _softmax_backward(block: Any) -> None:
    a = arguments(block)
    lanes, classes = lanes_of(a.dlogits), a.way.classes
    consecutive = a.way.tile == a.way.strides.class_ == a.d_strides.class_ == a.to_strides.class_ == 1
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_tile(task, a.way)):
            t = tile_of(number, a.way)
            y, dy = lanes_at(a.prob, a.way.strides, t, a.way), lanes_at(a.dprob, a.d_strides, t, a.way)
            dx = lanes_at(a.dlogits, a.to_strides, t, a.way)
            # sum of dp p
            dot = splat(0.0, y.at)
            for first in range(0, classes, CHUNK):
                subtotal = splat(0.0, y.at)
                last = min(classes, first + CHUNK)
                c, n = first, y.rows if y.tile > 1 else min(lanes, last - first)
                while c < last:
                    _prefetch_both(y, dy, c)
                    subtotal = fma(load_at(y, c, n, 0.0), load_at(dy, c, n, 0.0), subtotal)
                    c, n = advance(y, c, n, last)
                dot = dot + subtotal
            if y.tile == 1:
                dot = splat(lane_sum(dot), y.at)
            # gradient
            c, n = 0, first_vector(dx, 0, classes, a.past_caches)
            while c < classes:
                stop = whole_vectors(dx.at, c, n, classes, a.past_caches) if consecutive else c
                for k in range(c, stop, lanes):
                    stream_row(dx.at, k, load(y.at, k, 1, lanes, 0.0) * (load(dy.at, k, 1, lanes, 0.0) - dot), a.past_caches)
                if stop > c:
                    c, n = stop, min(lanes, classes - stop)
                else:
                    store_at(dx, c, n, load_at(y, c, n, 0.0) * (load_at(dy, c, n, 0.0) - dot))
                    c, n = advance(dx, c, n, classes)
        task = next_task(block)


@region(Backward)
def _log_softmax_backward(block: Any) -> None:
    a = arguments(block)
    lanes, classes = lanes_of(a.dlogits), a.way.classes
    consecutive = a.way.tile == a.way.strides.class_ == a.d_strides.class_ == a.to_strides.class_ == 1
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_tile(task, a.way)):
            t = tile_of(number, a.way)
            y, dy = lanes_at(a.prob, a.way.strides, t, a.way), lanes_at(a.dprob, a.d_strides, t, a.way)
            dx = lanes_at(a.dlogits, a.to_strides, t, a.way)
            # sum of d
            dot = splat(0.0, y.at)
            for first in range(0, classes, CHUNK):
                subtotal = splat(0.0, y.at)
                last = min(classes, first + CHUNK)
                c, n = first, y.rows if y.tile > 1 else min(lanes, last - first)
                while c < last:
                    _prefetch_both(y, dy, c)
                    subtotal = subtotal + load_at(dy, c, n, 0.0)
                    c, n = advance(y, c, n, last)
                dot = dot + subtotal
            if y.tile == 1:
                dot = splat(lane_sum(dot), y.at)
            # gradient
            c, n = 0, first_vector(dx, 0, classes, a.past_caches)
            while c < classes:
                stop = whole_vectors(dx.at, c, n, classes, a.past_caches) if consecutive else c
                for k in range(c, stop, lanes):
                    stream_row(dx.at, k, load(dy.at, k, 1, lanes, 0.0) - exp(load(y.at, k, 1, lanes, 0.0)) * dot, a.past_caches)
                if stop > c:
                    c, n = stop, min(lanes, classes - stop)
                else:
                    prob = exp(load_at(y, c, n, 0.0))
                    store_at(dx, c, n, load_at(dy, c, n, 0.0) - prob * dot)
                    c, n = advance(dx, c, n, classes)
        task = next_task(block)


@njit(**INLINE)
def _prefetch_both(y: Any, dy: Any, c: Any) -> None:
    if y.tile == 1:
        prefetch(y.at, c * y.class_)
        prefetch(dy.at, c * dy.class_)
