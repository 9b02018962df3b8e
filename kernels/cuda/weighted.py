"""What is learned from one visit to rows where every class counts with a factor k_c: beside `top` and `total`

    mass = sum k_c      gap = sum k_c (top - x_c)

so that sum k_c (-log p_c) = mass log total + gap, whose terms cancel for no logits. Device code: `a` is a kernel's block of arguments.
"""

import triton
import triton.language as tl

from .math import _exp
from .rows import _no_statistics


@triton.jit
def _class_weights(a, c, there):
    """Shaped like the classes c, 0 for those that are not there. Without a stride one number serves all: none is loaded for each class."""
    if a.weight_stride is None:
        w = tl.where(there, tl.load(a.weight), tl.zeros(c.shape, a.weight.dtype.element_ty))
    else:
        w = tl.load(a.weight + c.to(tl.int64) * a.weight_stride, mask=there, other=0.0)
    return w


@triton.jit
def _gap_of(gaps, masses, tops, totals, top):
    """sum k (top - x) of all lanes. One that saw no logit above -inf has no top of its own, and nothing rises from there."""
    return tl.sum(gaps + tl.where(totals > 0.0, masses * (top[:, None] - tops), 0.0), 1)


@triton.jit
def _loss_of(mass, log_total, gap):
    """sum k (-log p). Where a k is infinite, so is its product with any -log p above 0; mass or gap may have met 0 x inf instead."""
    endless = tl.where(log_total > 0.0, mass, gap + log_total)
    return tl.where(tl.abs(mass) == float("inf"), endless, mass * log_total + gap)


@triton.jit
def _no_weighted(shape: tl.constexpr, dtype: tl.constexpr):
    """Of no class at all: top, total, gap, mass."""
    tops, totals = _no_statistics(shape, dtype)
    return tops, totals, tl.zeros(shape, dtype), tl.zeros(shape, dtype)


@triton.jit
def _see_weighted_vectors(tops, totals, gaps, masses, x, k, inside, later):
    """The statistics [R] of R lanes after VEC more logits each, x and k [R, VEC]; see `rows._see_vectors`. In the first step nothing rises:
    from the lowest number that could be infinite, and 0 x inf."""
    joint = tl.maximum(tops, tl.max(x, 1))
    below = joint[:, None] - x
    gaps += tl.where(later, masses * (joint - tops), 0.0) + tl.sum(tl.where(inside, k * below, 0.0), 1)
    return joint, totals * _exp(tops - joint) + tl.sum(_exp(-below), 1), gaps, masses + tl.sum(k, 1)


@triton.jit
def _merge_weighted(tops, totals, gaps, masses, x, k, there):
    """The statistics of R lanes [R] and of single logits x with factors k, taken together."""
    top = tl.maximum(tl.max(tops, 0), tl.max(x, 0))
    total = tl.sum(totals * _exp(tops - top), 0) + tl.sum(_exp(x - top), 0)
    # a lane that saw no logit above -inf has no top of its own, and nothing rises from there
    gap = tl.sum(gaps + tl.where(totals > 0.0, masses * (top - tops), 0.0), 0) + tl.sum(tl.where(there, k * (top - x), 0.0), 0)
    return top, total, gap, tl.sum(masses, 0) + tl.sum(k, 0)
