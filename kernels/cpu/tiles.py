"""The logits of rows in lanes, of one block: brought to scratch memory, and made into terms there."""

from typing import Any

import numpy as np
from numba import njit

from .inline import INLINE
from .math import exp
from .memory import load, store
from .prefetch import prefetch_line
from .rows import load_at
from .simd import lanes_of, larger, lowest, splat
from .transpose import turn_in

FEW_TO_TURN = 4  # classes: fewer are gathered


@njit(**INLINE)
def bring_tile(x: Any, first: Any, last: Any, terms: Any) -> Any:
    """The largest logits of rows in lanes. They are all brought to where their terms will be, once: to reach them takes as long as to work
    with them."""
    lanes, n = lanes_of(x.at), x.rows
    top, fours = lowest(x.at), first + (last - first) // 4 * 4
    if x.class_ == 1 != x.lane and last - first >= FEW_TO_TURN:
        for c in range(first, last, lanes):
            turn_in(x.at, c, x.lane, x.rows, min(lanes, last - c), terms, (c - first) * lanes)
        for c in range(first, fours, 4):
            at = (c - first) * lanes
            two = larger(_brought(x, terms, at), _brought(x, terms, at + lanes))
            top = larger(larger(top, two), larger(_brought(x, terms, at + 2 * lanes), _brought(x, terms, at + 3 * lanes)))
        for c in range(fours, last):
            top = larger(top, _brought(x, terms, (c - first) * lanes))
        return top
    for c in range(first, fours, 4):
        at = (c - first) * lanes
        two = larger(_bring(x, c, n, terms, at), _bring(x, c + 1, n, terms, at + lanes))
        top = larger(larger(top, two), larger(_bring(x, c + 2, n, terms, at + 2 * lanes), _bring(x, c + 3, n, terms, at + 3 * lanes)))
    for c in range(fours, last):
        top = larger(top, _bring(x, c, n, terms, (c - first) * lanes))
    return top


@njit(**INLINE)
def _bring(x: Any, c: Any, n: Any, terms: Any, at: Any) -> Any:
    """A logit of every row in the lanes, put where its term will be."""
    logits = load_at(x, c, n, -np.inf)
    prefetch_line(x.at, c * x.class_ + 2 * lanes_of(x.at))  # of the tile after the next one
    store(terms, at, 1, lanes_of(x.at), logits)
    return logits


@njit(**INLINE)
def terms_of_tile(x: Any, classes: Any, terms: Any, top: Any) -> Any:
    """The sum of the terms of rows in lanes, which take the places of their logits."""
    lanes = lanes_of(x.at)
    total, fours, vectors = splat(0.0, x.at), classes // 4 * 4 * lanes, classes * lanes
    for at in range(0, fours, 4 * lanes):
        e0, e1 = _to_term(x, terms, at, top), _to_term(x, terms, at + lanes, top)
        total = total + ((e0 + e1) + (_to_term(x, terms, at + 2 * lanes, top) + _to_term(x, terms, at + 3 * lanes, top)))
    for at in range(fours, vectors, lanes):
        total = total + _to_term(x, terms, at, top)
    return total


@njit(**INLINE)
def _brought(x: Any, terms: Any, at: Any) -> Any:
    """A logit of every row in the lanes, from scratch memory."""
    return load(terms, at, 1, lanes_of(x.at), 0.0)


@njit(**INLINE)
def _to_term(x: Any, terms: Any, at: Any, top: Any) -> Any:
    """Its term, put in its place."""
    e = exp(_brought(x, terms, at) - top)
    store(terms, at, 1, lanes_of(x.at), e)
    return e
