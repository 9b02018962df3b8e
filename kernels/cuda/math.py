"""exp and log1p on blocks, in float32 or float64, from what every Triton target and the interpreter have: no libdevice."""

from typing import Any

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.44269502162933349609375)  # log2 e as a float32, and the rest of it
_REST_OF_LOG2_E = tl.constexpr(1.92596299112661746887e-8)
_LOG_2 = tl.constexpr(0.6931471805599453)

fp64 = Any  # `number: "fp64"` is how Triton is told to pass a Python float whole: it would round it to float32


@triton.jit
def _wide(x):
    """Arithmetic is in float64 for float64, else in float32. Widened right after the load: nothing computes in 16 bits."""
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x


@triton.jit
def _lowest(dtype: tl.constexpr):
    """Where a running maximum starts: finite, so that blocks of -inf make no NaN."""
    return -1.7976931348623157e308 if dtype == tl.float64 else -3.4028234663852886e38


@triton.jit
def _exp(x):
    """e**x. exp2 is one instruction; `tl.exp` would add three to reach denormal results."""
    if x.dtype == tl.float64:
        e = tl.exp(x)
    else:
        e = tl.exp2(x * 1.4426950408889634)
    return e


@triton.jit
def _far_exp(x, stored: tl.constexpr):
    """e**x for x <= 0 with all its digits, however far x is. The exponent x log2 e is rounded, by up to |x| / 2.6 ulp of the result: what
    that lost is added to the result. Not for 16-bit logits, whose results are rounded by a thousand times more."""
    if stored == tl.float32:
        x = tl.maximum(x, -104.0, propagate_nan=tl.PropagateNan.ALL)  # finite, and e**x is 0 all the same
        exponent = x * _LOG2_E
        lost = tl.fma(x, _REST_OF_LOG2_E, tl.fma(x, _LOG2_E, -exponent))
        e = tl.exp2(exponent)
        e = tl.fma(e, lost * _LOG_2, e)
    else:
        e = _exp(x)
    return e


@triton.jit
def _log1p(x):
    """log(1 + x) for 0 <= x <= 1, with all its digits for tiny x too."""
    if x.dtype == tl.float64:
        # log(u) for u = fl(1 + x), plus what that rounding lost
        u = x + 1.0
        result = tl.log(u) + (x - (u - 1.0)) / u
    else:
        # x p(x), a Chebyshev fit, relative error 5e-9
        p = x * -3.176057018e-3 + 1.954252726e-2
        p = p * x - 5.637361283e-2
        p = p * x + 1.05436238e-1
        p = p * x - 1.526966707e-1
        p = p * x + 1.966327426e-1
        p = p * x - 2.495161626e-1
        p = p * x + 3.33297105e-1
        p = p * x - 4.999989265e-1
        p = p * x + 9.999999947e-1
        result = p * x
    return result


@triton.jit
def _log_of_rest(p):
    """log(1 - p) for 0 <= p <= 1; -inf at 1."""
    u = 1.0 - p
    lost = (1.0 - u) - p  # what the rounding of u lost: exact
    return tl.where(u == 0.0, float("-inf"), tl.log(u) + lost / u)
