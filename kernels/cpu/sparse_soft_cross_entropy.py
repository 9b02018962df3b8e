"""Softmax cross-entropy with a few classes y_k of probability q_k as a target; keep = 1 - label smoothing, spread = smoothing / C.

k_k = keep w_{y_k} q_k      mass = sum_k k_k + spread sum(w)      loss = sum_k k_k (-log p_{y_k}) + spread sum_c w_c (-log p_c)
dlogits = dloss (mass p - spread w - sum_k k_k onehot(y_k))      dprob_k = dloss keep w_{y_k} (-log p_{y_k})
"""

from typing import Any, NamedTuple

from numba import njit
from torch import Tensor

from ..groups import PAD, Rows, Smoothing
from .arguments import Computed, Int64, Known, Stored, arguments
from .blocks import all_kept, block_of, blocks_kept, kept_in_turn, row_statistics, scratch
from .cross_entropy import no_statistics
from .cross_entropy_one_visit import statistics_and_gradient
from .entries import (
    Entries,
    Scratch,
    empty_lists,
    entries_of,
    entry_numbers,
    hang_entries,
    only_pads,
    scratch_lists,
    see_entries,
    take_down,
)
from .gradient import gradient_of_row, write_zeros
from .inline import INLINE
from .launch import next_task, next_worker, raise_flag, region
from .math import log
from .memory import load_one, store
from .rows import Lanes, Strides, Walk, bypass_caches, lanes_at, last_tile, one_row, row_at, strides_of, tile_of, walk
from .simd import first_lane, splat
from .smoothed_cross_entropy import zero
from .targets import refuse_out_of_bounds
from .weighted import factors_of, weighted_loss, weighted_statistics


class Forward(NamedTuple):
    logits: Stored
    entries: Entries
    zero: Stored  # the class probabilities of smoothing alone
    smoothed: Known  # 0 if the spread is 0
    spread: float
    loss: Computed
    rows: Rows
    terms: Computed
    way: Walk


class Backward(NamedTuple):
    logits: Stored
    entries: Entries
    smoothed: Known
    spread: float
    rows: Rows
    dloss: Computed
    dloss_stride: int
    dlogits: Stored
    dstrides: Strides
    lists: Scratch
    past_caches: Known
    way: Walk


class ForwardBackward(NamedTuple):
    logits: Stored
    entries: Entries
    zero: Stored
    smoothed: Known
    spread: float
    dloss: Computed
    dloss_stride: int
    loss: Computed
    rows: Rows
    dlogits: Stored
    dstrides: Strides
    lists: Scratch
    terms: Computed
    kept: int  # blocks that there is room for in `terms`
    past_caches: Known
    way: Walk


class ProbBackward(NamedTuple):
    logits: Stored
    indices: Int64
    per_row: int  # entries
    weight: Computed
    weight_stride: int
    keep: float
    rows: Rows
    dloss: Computed
    dloss_stride: int
    dprob: Computed
    way: Walk


def sparse_soft_cross_entropy_forward(
    logits: Tensor, indices: Tensor, prob: Tensor, weight: Tensor, smoothing: Smoothing, loss: Tensor, rows: Rows
) -> None:
    way = walk(logits)
    out_of_bounds = _forward(way.tasks, Forward(
        logits=logits, entries=entries_of(indices, prob, weight, smoothing.keep), zero=zero(logits.dtype),
        smoothed=int(smoothing.spread > 0), spread=smoothing.spread, loss=loss, rows=rows, terms=scratch(1, logits), way=way,
    ))  # fmt: skip
    if out_of_bounds:
        refuse_out_of_bounds(indices.view(-1), way.classes, PAD)


def sparse_soft_cross_entropy_backward(
    logits: Tensor, indices: Tensor, prob: Tensor, weight: Tensor, smoothing: Smoothing, rows: Rows, dloss: Tensor, dlogits: Tensor
) -> None:
    way, entries = walk(logits), entries_of(indices, prob, weight, smoothing.keep)
    _backward(way.tasks, Backward(
        logits=logits, entries=entries, smoothed=int(smoothing.spread > 0), spread=smoothing.spread, rows=rows,
        dloss=dloss, dloss_stride=dloss.stride(0), dlogits=dlogits, dstrides=strides_of(dlogits, way.tile),
        lists=scratch_lists(way, entries, logits), past_caches=bypass_caches(logits, dlogits), way=way,
    ))  # fmt: skip


def sparse_soft_cross_entropy_forward_backward(
    logits: Tensor, indices: Tensor, prob: Tensor, weight: Tensor, smoothing: Smoothing,
    dloss: Tensor, loss: Tensor, rows: Rows, dlogits: Tensor,
) -> None:  # fmt: skip
    way, entries = walk(logits), entries_of(indices, prob, weight, smoothing.keep)
    kept, dstrides, smoothed = blocks_kept(way, logits), strides_of(dlogits, way.tile), int(smoothing.spread > 0)
    in_turn = kept_in_turn(way, kept, logits, dstrides) and not smoothed
    out_of_bounds = (_rows_in_turn if in_turn else _forward_backward)(way.tasks, ForwardBackward(
        logits=logits, entries=entries, zero=zero(logits.dtype), smoothed=smoothed, spread=smoothing.spread,
        dloss=dloss, dloss_stride=dloss.stride(0), loss=loss, rows=rows, dlogits=dlogits, dstrides=dstrides,
        lists=scratch_lists(way, entries, logits), terms=scratch(kept, logits), kept=kept,
        past_caches=bypass_caches(logits, dlogits), way=way,
    ))  # fmt: skip
    if out_of_bounds:
        refuse_out_of_bounds(indices.view(-1), way.classes, PAD)


def sparse_soft_cross_entropy_prob_backward(
    logits: Tensor, indices: Tensor, weight: Tensor, keep: float, rows: Rows, dloss: Tensor, dprob: Tensor
) -> None:
    way = walk(logits)
    _prob_backward(way.tasks, ProbBackward(
        logits=logits, indices=indices, per_row=indices.shape[1], weight=weight, weight_stride=weight.stride(0), keep=keep,
        rows=rows, dloss=dloss, dloss_stride=dloss.stride(0), dprob=dprob, way=way,
    ))  # fmt: skip


@njit(**INLINE)
def _see_rows(a: Any, x: Any, row: Any, terms: Any, kept: Any) -> Any:
    """Write the losses and the numbers of the rows at x. True if an entry is no class."""
    # statistics
    masses, losses = splat(0.0, a.loss), splat(0.0, a.loss)
    if a.smoothed:
        factors = factors_of(x, Lanes(a.zero, 0, 0, x.tile, x.rows), a.entries.weight, a.entries.weight_stride, Smoothing(0.0, a.spread))
        tops, totals, masses, gaps = weighted_statistics(x, factors, a.way.classes, terms, kept)
        losses = weighted_loss(masses, log(totals), gaps)
    elif x.tile == 1 and only_pads(a.entries, row):
        tops, totals = no_statistics(x)
    else:
        tops, totals = row_statistics(x, a.way.classes, terms, kept)
    return _note(a, x, row, tops, totals, masses, losses)


@njit(**INLINE)
def _note(a: Any, x: Any, row: Any, tops: Any, totals: Any, masses: Any, losses: Any) -> Any:
    """Write the losses and the numbers of the rows at x, of which smoothing gives `masses` and `losses`."""
    store(a.rows.top, row, 1, x.rows, tops)
    store(a.rows.total, row, 1, x.rows, totals)
    store(a.rows.row_weight, row, 1, x.rows, log(totals))
    store(a.rows.mass, row, 1, x.rows, masses)
    store(a.loss, row, 1, x.rows, losses)
    return see_entries(a, x, row)


@njit(**INLINE)
def _gradient(a: Any, x: Any, dx: Any, row: Any, terms: Any, kept: Any, lists: Any) -> None:
    """Write the gradients of the rows at x."""
    if x.tile == 1 and a.rows.row_weight[row] == 0:
        write_zeros(dx, 0, a.way.classes, a.past_caches)
        return
    hung, count = hang_entries(a, dx, row, lists)
    gradient_of_row(x, dx, 0, a.way.classes, a.way.classes, terms, kept, entry_numbers(a, x, row, hung), a.past_caches)
    take_down(hung, count)


@region(Forward)
def _forward(block: Any) -> None:
    a = arguments(block)
    terms = block_of(a.terms, next_worker(block))
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_tile(task, a.way)):
            t = tile_of(number, a.way)
            if _see_rows(a, lanes_at(a.logits, a.way.strides, t, a.way), t.row, terms, 0):
                raise_flag(block)
        task = next_task(block)


@region(Backward)
def _backward(block: Any) -> None:
    a = arguments(block)
    lists = empty_lists(a, next_worker(block))
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_tile(task, a.way)):
            t = tile_of(number, a.way)
            x, dx = lanes_at(a.logits, a.way.strides, t, a.way), lanes_at(a.dlogits, a.dstrides, t, a.way)
            _gradient(a, x, dx, t.row, a.rows.top, 0, lists)
        task = next_task(block)


@region(ForwardBackward)
def _forward_backward(block: Any) -> None:
    a = arguments(block)
    worker = next_worker(block)
    terms, lists = block_of(a.terms, worker * a.kept), empty_lists(a, worker)
    keep = all_kept(terms, a.kept, a.way)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_tile(task, a.way)):
            t = tile_of(number, a.way)
            x, dx = lanes_at(a.logits, a.way.strides, t, a.way), lanes_at(a.dlogits, a.dstrides, t, a.way)
            if _see_rows(a, x, t.row, terms, keep):
                raise_flag(block)
            _gradient(a, x, dx, t.row, terms, keep, lists)
        task = next_task(block)


@region(ForwardBackward)
def _rows_in_turn(block: Any) -> None:
    """Rows of consecutive classes, without smoothing. The gradient of a row is written while the next one is read: see
    `cross_entropy_one_visit`."""
    a = arguments(block)
    way, classes, worker = a.way, a.way.classes, next_worker(block)
    terms, lists = block_of(a.terms, worker * a.kept), empty_lists(a, worker)
    # the row whose gradient is still to be written, and where: its terms are in `terms`
    before, before_dx = -1, a.dlogits
    task = next_task(block)
    while task >= 0:
        t = tile_of(task * way.grain, way)
        b, p = t.b, t.p
        for row in range(task * way.grain, last_tile(task, way)):
            x, dx = one_row(row_at(a.logits, way.strides, b, p)), row_at(a.dlogits, a.dstrides, b, p)
            tops, totals = no_statistics(x)
            counts = not only_pads(a.entries, row)
            if not counts:
                write_zeros(one_row(dx), 0, classes, a.past_caches)
            elif before < 0:
                tops, totals = row_statistics(x, classes, terms, 1)
            else:
                hung, count = hang_entries(a, one_row(before_dx), before, lists)
                r = entry_numbers(a, x, before, hung)
                tops, totals = statistics_and_gradient(x, classes, terms, one_row(before_dx), r, a.past_caches)
                take_down(hung, count)
            if _note(a, x, row, tops, totals, splat(0.0, a.loss), splat(0.0, a.loss)):
                raise_flag(block)
            if counts:
                before, before_dx = row, dx
            b, p = (b, p + 1) if p + 1 < way.positions else (b + 1, 0)
        task = next_task(block)
    if before >= 0:
        dx_before = one_row(before_dx)
        _gradient(a, dx_before, dx_before, before, terms, 1, lists)


@region(ProbBackward)
def _prob_backward(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        for number in range(task * a.way.grain, last_tile(task, a.way)):
            t = tile_of(number, a.way)
            x = lanes_at(a.logits, a.way.strides, t, a.way)
            for i in range(t.rows):
                row = t.row + i
                # row numbers
                top, log_total = a.rows.top[row], first_lane(log(splat(a.rows.total[row], a.rows.total)))
                g = a.dloss[row * a.dloss_stride] * a.keep
                # gradient
                for k in range(row * a.per_row, (row + 1) * a.per_row):
                    y = a.indices[k]
                    if 0 <= y < a.way.classes:
                        nll = log_total - (load_one(x.at, i * x.lane + y * x.class_) - top)
                        a.dprob[k] = g * a.weight[y * a.weight_stride] * nll
                    else:
                        a.dprob[k] = 0
        task = next_task(block)
