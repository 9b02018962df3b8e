"""softmax and log_softmax over the classes.

p = exp(x - top) / total               dlogits = p (dp - sum_c dp_c p_c)
log p = (x - top) - log total          dlogits = d - p sum_c d_c
"""

from typing import Any

from numba import njit
from torch import Tensor

from .blocks import (
    all_kept,
    block_of,
    block_size,
    block_statistics,
    blocks_kept,
    kept_top,
    row_statistics,
    scratch,
    term,
)
from .launch import next_task, next_worker, region, unpack
from .math import INLINE, exp, log
from .memory import load, offset, prefetch, store, stream
from .rows import (
    AHEAD,
    WALK,
    advance,
    bypass_caches,
    first_vector,
    last_tile,
    rows_of,
    strides_of,
    walk,
    whole_vectors,
)
from .simd import fma, lane_sum, lanes_of, splat

_FORWARD = "TTCnnnnn" + WALK
_BACKWARD = "TTTnnnnnnn" + WALK
_CHUNK = 8192  # classes between two sums of sums, which lose fewer digits


def softmax_forward(logits: Tensor, prob: Tensor) -> None:
    _forward(_softmax, logits, prob)


def log_softmax_forward(logits: Tensor, log_prob: Tensor) -> None:
    _forward(_log_softmax, logits, log_prob)


def softmax_backward(prob: Tensor, dprob: Tensor, dlogits: Tensor) -> None:
    _backward(_softmax_backward, prob, dprob, dlogits)


def log_softmax_backward(log_prob: Tensor, dlog_prob: Tensor, dlogits: Tensor) -> None:
    _backward(_log_softmax_backward, log_prob, dlog_prob, dlogits)


def _forward(run: Any, logits: Tensor, result: Tensor) -> None:
    way = walk(logits)
    kept = blocks_kept(way, logits)
    terms = scratch(kept)
    pointers = logits.data_ptr(), result.data_ptr(), terms.data_ptr()
    run(logits.dtype, way.tasks, *pointers, kept, bypass_caches(logits, result), *strides_of(result), *way)


def _backward(run: Any, result: Tensor, dresult: Tensor, dlogits: Tensor) -> None:
    way = walk(result)
    pointers = result.data_ptr(), dresult.data_ptr(), dlogits.data_ptr()
    past_caches = bypass_caches(result, dlogits)
    run(result.dtype, way.tasks, *pointers, past_caches, *strides_of(dresult), *strides_of(dlogits), *way)


@region(_FORWARD)
def _softmax(a: Any) -> None:
    (logits, prob, terms, kept, past_caches, to_batch, to_class, to_position,
     batch, classes, positions, batch_stride, class_stride, position_stride, tile, grain) = unpack(a, _FORWARD)  # fmt: skip
    lane_stride, to_lane = (position_stride, to_position) if tile > 1 else (class_stride, to_class)
    terms = block_of(terms, next_worker(a) * kept)
    size, keep = block_size(terms, tile), all_kept(terms, kept, classes, tile)
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_tile(task, grain, batch, positions, tile)):
            b, p, _, count = rows_of(number, positions, tile)
            x = offset(logits, b * batch_stride + p * position_stride)
            out = offset(prob, b * to_batch + p * to_position)
            # statistics
            top, total = row_statistics(x, classes, class_stride, lane_stride, tile, count, terms, keep)
            # probabilities
            for first in range(0, classes, size):
                block, last = block_of(terms, first // size * keep), min(classes, first + size)
                if not keep:
                    block_statistics(x, first, last, class_stride, lane_stride, tile, count, block)
                factor = exp(kept_top(block) - top) * (1.0 / total)
                _probabilities(x, block, out, first, last, to_class, to_lane, tile, count, factor, past_caches)
        task = next_task(a)


@njit(**INLINE)
def _probabilities(
    x: Any, terms: Any, out: Any, first: Any, last: Any, to_class: Any, to_lane: Any, tile: Any, count: Any, factor: Any, past_caches: Any
) -> None:
    """term * factor of classes first .. last - 1."""
    lanes = lanes_of(out)
    c, n = first, first_vector(offset(out, first * to_class), last - first, tile, count, past_caches)
    while c < last:
        stop = whole_vectors(c, n, last, tile, lanes) if to_class == 1 else c
        for k in range(c, stop, lanes):
            stream(out, k, term(x, factor, 1, 1, terms, 1, first, k, 1, lanes) * factor, past_caches)
        if stop > c:
            c, n = stop, last - stop
        else:
            store(out, c * to_class, to_lane, n, term(x, factor, 1, 1, terms, 1, first, c, tile, n) * factor)
            c, n = advance(c, n, last, tile, lanes)


@region(_FORWARD)
def _log_softmax(a: Any) -> None:
    (logits, log_prob, terms, kept, past_caches, to_batch, to_class, to_position,
     batch, classes, positions, batch_stride, class_stride, position_stride, tile, grain) = unpack(a, _FORWARD)  # fmt: skip
    lane_stride, to_lane = (position_stride, to_position) if tile > 1 else (class_stride, to_class)
    lanes, consecutive = lanes_of(logits), class_stride == to_class == 1
    terms = block_of(terms, next_worker(a) * kept)
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_tile(task, grain, batch, positions, tile)):
            b, p, _, count = rows_of(number, positions, tile)
            x = offset(logits, b * batch_stride + p * position_stride)
            out = offset(log_prob, b * to_batch + p * to_position)
            # statistics
            top, total = row_statistics(x, classes, class_stride, lane_stride, tile, count, terms, 0)
            log_total = log(total)
            # log-probabilities
            c, n = 0, first_vector(out, classes, tile, count, past_caches)
            while c < classes:
                stop = whole_vectors(c, n, classes, tile, lanes) if consecutive else c
                for k in range(c, stop, lanes):
                    stream(out, k, (load(x, k, 1, lanes, 0.0) - top) - log_total, past_caches)
                if stop > c:
                    c, n = stop, classes - stop
                else:
                    store(out, c * to_class, to_lane, n, (load(x, c * class_stride, lane_stride, n, 0.0) - top) - log_total)
                    c, n = advance(c, n, classes, tile, lanes)
        task = next_task(a)


@region(_BACKWARD)
def _softmax_backward(a: Any) -> None:
    (prob, dprob, dlogits, past_caches, d_batch, d_class, d_position, to_batch, to_class, to_position,
     batch, classes, positions, batch_stride, class_stride, position_stride, tile, grain) = unpack(a, _BACKWARD)  # fmt: skip
    lane_stride, d_lane, to_lane = (position_stride, d_position, to_position) if tile > 1 else (class_stride, d_class, to_class)
    lanes, consecutive = lanes_of(dlogits), class_stride == d_class == to_class == 1
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_tile(task, grain, batch, positions, tile)):
            b, p, _, count = rows_of(number, positions, tile)
            y = offset(prob, b * batch_stride + p * position_stride)
            dy = offset(dprob, b * d_batch + p * d_position)
            dx = offset(dlogits, b * to_batch + p * to_position)
            # sum of dp p
            dot = splat(0.0, y)
            for first in range(0, classes, _CHUNK):
                subtotal = splat(0.0, y)
                last = min(classes, first + _CHUNK)
                c, n = first, count if tile > 1 else min(lanes, last - first)
                while c < last:
                    _prefetch_both(y, c * class_stride, dy, c * d_class, tile)
                    subtotal = fma(load(y, c * class_stride, lane_stride, n, 0.0), load(dy, c * d_class, d_lane, n, 0.0), subtotal)
                    c, n = advance(c, n, last, tile, lanes)
                dot = dot + subtotal
            if tile == 1:
                dot = splat(lane_sum(dot), y)
            # gradient
            c, n = 0, first_vector(dx, classes, tile, count, past_caches)
            while c < classes:
                stop = whole_vectors(c, n, classes, tile, lanes) if consecutive else c
                for k in range(c, stop, lanes):
                    stream(dx, k, load(y, k, 1, lanes, 0.0) * (load(dy, k, 1, lanes, 0.0) - dot), past_caches)
                if stop > c:
                    c, n = stop, classes - stop
                else:
                    value = load(y, c * class_stride, lane_stride, n, 0.0) * (load(dy, c * d_class, d_lane, n, 0.0) - dot)
                    store(dx, c * to_class, to_lane, n, value)
                    c, n = advance(c, n, classes, tile, lanes)
        task = next_task(a)


@region(_BACKWARD)
def _log_softmax_backward(a: Any) -> None:
    (log_prob, dlog_prob, dlogits, past_caches, d_batch, d_class, d_position, to_batch, to_class, to_position,
     batch, classes, positions, batch_stride, class_stride, position_stride, tile, grain) = unpack(a, _BACKWARD)  # fmt: skip
    lane_stride, d_lane, to_lane = (position_stride, d_position, to_position) if tile > 1 else (class_stride, d_class, to_class)
    lanes, consecutive = lanes_of(dlogits), class_stride == d_class == to_class == 1
    task = next_task(a)
    while task >= 0:
        for number in range(task * grain, last_tile(task, grain, batch, positions, tile)):
            b, p, _, count = rows_of(number, positions, tile)
            y = offset(log_prob, b * batch_stride + p * position_stride)
            dy = offset(dlog_prob, b * d_batch + p * d_position)
            dx = offset(dlogits, b * to_batch + p * to_position)
            # sum of d
            dot = splat(0.0, y)
            for first in range(0, classes, _CHUNK):
                subtotal = splat(0.0, y)
                last = min(classes, first + _CHUNK)
                c, n = first, count if tile > 1 else min(lanes, last - first)
                while c < last:
                    _prefetch_both(y, c * class_stride, dy, c * d_class, tile)
                    subtotal = subtotal + load(dy, c * d_class, d_lane, n, 0.0)
                    c, n = advance(c, n, last, tile, lanes)
                dot = dot + subtotal
            if tile == 1:
                dot = splat(lane_sum(dot), y)
            # gradient
            c, n = 0, first_vector(dx, classes, tile, count, past_caches)
            while c < classes:
                stop = whole_vectors(c, n, classes, tile, lanes) if consecutive else c
                for k in range(c, stop, lanes):
                    stream(dx, k, load(dy, k, 1, lanes, 0.0) - exp(load(y, k, 1, lanes, 0.0)) * dot, past_caches)
                if stop > c:
                    c, n = stop, classes - stop
                else:
                    prob = exp(load(y, c * class_stride, lane_stride, n, 0.0))
                    store(dx, c * to_class, to_lane, n, load(dy, c * d_class, d_lane, n, 0.0) - prob * dot)
                    c, n = advance(c, n, classes, tile, lanes)
        task = next_task(a)


@njit(**INLINE)
def _prefetch_both(y: Any, at: Any, dy: Any, d_at: Any, tile: Any) -> None:
    if tile == 1:
        prefetch(y, at + AHEAD)
        prefetch(dy, d_at + AHEAD)
