"""The gradient of rows of logits that is a polynomial of p and log p. Device code: `a` is a kernel's block of arguments.

    dlogits_c = scale p_c (alpha + beta log p_c + gamma p_c)

With z = scale (x - top) and e = exp(z), which is 0 where z is -inf, it is e (a + b z + c e). A beta or gamma of None costs nothing.
"""

import triton
import triton.language as tl

from .math import _exp
from .moments import _not_endless


@triton.jit
def _slope_numbers(a, row, inside, taken, scale):
    """Which rows count; their top; their a, b and c, 0 for rows that do not count. `taken` is what targets take of alpha."""
    total = tl.load(a.rows.total + row, mask=inside, other=0.0)
    counts = total != 0.0
    top = tl.load(a.rows.top + row, mask=counts, other=0.0)
    total = tl.where(counts, total, 1.0)
    inverse = scale / total
    alpha = tl.load(a.slope.alpha + row, mask=counts, other=0.0) - taken
    b = tl.zeros_like(top)
    c = tl.zeros_like(top)
    if a.slope.beta is not None:
        beta = tl.load(a.slope.beta + row, mask=counts, other=0.0)
        alpha, b = alpha - beta * tl.log(total), beta * inverse
    if a.slope.gamma is not None:
        c = tl.load(a.slope.gamma + row, mask=counts, other=0.0) * inverse / total
    return counts, top, (alpha * inverse, b, c)


@triton.jit
def _slope(a, x, top, numbers, scale):
    """Of rows with these a, b and c."""
    factor, b, c = numbers
    z = (x - top) * scale
    if a.slope.beta is not None:
        z = _not_endless(z)
    e = _exp(z)
    if a.slope.beta is not None:
        factor = factor + z * b
    if a.slope.gamma is not None:
        factor = factor + e * c
    return e * factor
