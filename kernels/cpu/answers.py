"""What the caller of `token_statistics` gets of the rows, once their moments are known; see there for the formulas. `a` is a region's block
of arguments."""

from typing import Any

import numpy as np
from numba import njit

from ..groups import Answers
from .blocks import real_total
from .class_table import classes_at, counting
from .inline import INLINE
from .math import log
from .memory import load_each, store, store_classes
from .moments import first_nan
from .simd import any_lane, lane_numbers, lanes_of, select

LOG_PROB, ENTROPY, LSE, SUM_SQ_PROB, ARGMAX = 1, 2, 4, 8, 16  # what is wanted, as the bits of a number


def wanted_of(answers: Answers) -> int:
    return sum(bit for bit, answer in zip((LOG_PROB, ENTROPY, LSE, SUM_SQ_PROB, ARGMAX), answers, strict=True) if answer.numel())


@njit(**INLINE)
def write_answers(a: Any, x: Any, row: Any, m: Any, largest: Any) -> Any:
    """The answers of the rows at x, the first of which is `row`, from their moments. True if a target is no class."""
    # statistics
    total = real_total(m.total)
    log_total, lse = log(total), m.top * a.scale + log(m.total)  # of nothing but -inf, lse is -inf
    if any_lane(total != total):
        odd = first_nan(x, a.way.classes)
        largest = select(odd > -1, odd, largest)
        lse = select((odd < 0) & (m.top == np.inf), np.inf, lse)
    counts = counting(a.targets, x, row, total) if x.tile > 1 else lane_numbers(total) > -1
    # answers
    store(a.rows.top, row, 1, x.rows, select(counts, m.top, 0.0))
    store(a.rows.total, row, 1, x.rows, select(counts, total, 0.0))
    if a.wanted & ENTROPY:
        store(a.answers.entropy, row, 1, x.rows, select(counts, log_total - m.gap / total, 0.0))
    if a.wanted & LSE:
        store(a.answers.lse, row, 1, x.rows, select(counts, lse, 0.0))
    if a.wanted & SUM_SQ_PROB:
        store(a.answers.sum_sq_prob, row, 1, x.rows, select(counts, m.squares / (total * total), 0.0))
    if a.wanted & ARGMAX:
        store_classes(a.answers.argmax, row, x.rows, select(counts, largest, 0))
    return _write_log_probs(a, x, row, m.top, log_total) if a.wanted & LOG_PROB else False


@njit(**INLINE)
def _write_log_probs(a: Any, x: Any, row: Any, top: Any, log_total: Any) -> Any:
    """log_prob of all targets of the rows at x; 0 for `ignore_index`. True if a target is no class."""
    lanes, count, classes, bad = lanes_of(top), a.targets.per_row, a.way.classes, False
    for k in range(0, count, 1 if x.tile > 1 else lanes):
        y = classes_at(a.targets, x, row, k, top)
        is_class = (y > -1) & (y < classes)
        x_y = load_each(x.at, x.lane if x.tile > 1 else 0, y, x.class_, is_class)
        log_prob = select(is_class, (x_y - top) * a.scale - log_total, 0.0)
        if x.tile > 1:
            store(a.answers.log_prob, row * count + k, count, x.rows, log_prob)
        else:
            store(a.answers.log_prob, row * count + k, 1, count - k, log_prob)
        bad = bad or any_lane((y < -1) | (y > classes - 1))
    return bad


@njit(**INLINE)
def write_nothing(a: Any, row: Any) -> None:
    """The answers of one row that does not count."""
    a.rows.top[row], a.rows.total[row] = 0, 0
    if a.wanted & LOG_PROB:
        for k in range(row * a.targets.per_row, (row + 1) * a.targets.per_row):
            a.answers.log_prob[k] = 0
    if a.wanted & ENTROPY:
        a.answers.entropy[row] = 0
    if a.wanted & LSE:
        a.answers.lse[row] = 0
    if a.wanted & SUM_SQ_PROB:
        a.answers.sum_sq_prob[row] = 0
    if a.wanted & ARGMAX:
        a.answers.argmax[row] = 0
