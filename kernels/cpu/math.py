"""exp, log and log1p on vectors, one or two units in the last place from the truth.

Numba has no vector exp without Intel's SVML: `np.exp` in a loop becomes one libm call per number, five times slower than torch.
The polynomials are Chebyshev fits made with mpmath.chebyfit; the logarithm follows fdlibm's e_log.c.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic, overload

from .inline import INLINE
from .llvm import Vector, bfloat16, call, constant, float16, float32, spread
from .simd import bits, fma, from_bits, select, splat, to_float
from .target import has_256_bits, has_512_bits

f32 = np.float32
LOG2E = 1.4426950408889634
# ln 2 in two parts, the first with so few digits that n * LN2_HIGH is exact
LN2 = 0.6931471805599453
LN2_HIGH32, LN2_LOW32 = f32(0.693359375), f32(-2.12194440e-4)
LN2_HIGH64, LN2_LOW64 = 6.93147180369123816490e-01, 1.90821492927058770002e-10
# adding 1.5 * 2**(bits of the fraction) rounds to an integer n and leaves it in the low bits; with the bias of exponents added, these are
# the exponent of 2**n
BIASED32, BIASED64 = f32(1.5 * 2**23 + 127), 1.5 * 2.0**52 + 1023
EIGHTHS = f32(1.5 * 2**20)  # the same for multiples of 1/8
EIGHTH_ROOTS = [f32(2.0 ** (j / 8)) for j in range(8)]
SQRT_HALF32, SQRT_HALF64 = 0x3F3504F3, 0x3FE6A09E667F3BCD  # bit patterns of sqrt(1/2)


def exp(x: Any) -> Any:
    """e**x for x <= 16. NaN for NaN; 0 where the result would be below the smallest normal number (denormals are slow)."""
    raise NotImplementedError("compiled code only")


def log(x: Any) -> Any:
    """The natural logarithm of a finite x >= 0. NaN for NaN, -inf for 0."""
    raise NotImplementedError("compiled code only")


def add_log1p(pointer: Any, factor: Any, x: Any, a: Any) -> Any:
    """a + factor log(1 + x) for 0 <= x <= 1, the logarithm as exact as the numbers behind this pointer deserve: to 2e-7 for 16-bit ones."""
    raise NotImplementedError("compiled code only")


@njit(**INLINE)
def _exp32(x: Any) -> Any:
    # x = n ln 2 + r with |r| <= ln 2 / 2; e**r = 1 + r + r**2 q(r) to 8e-9
    shifted = fma(x, f32(LOG2E), BIASED32)
    n = shifted - BIASED32
    r = fma(n, -LN2_LOW32, fma(n, -LN2_HIGH32, x))
    q = fma(r, f32(1.392621347e-3), f32(8.363202972e-3))
    q = fma(r, q, f32(4.166655444e-2))
    q = fma(r, q, f32(1.666657685e-1))
    q = fma(r, q, f32(0.5))
    p = fma(r, fma(r, q, f32(1.0)), f32(1.0))
    return times_two_to(p, shifted, BIASED32, x < f32(-87.3))


@njit(**INLINE)
def _to_eighths(x: Any) -> Any:
    # x = n ln 2 + r with n a multiple of 1/8 and |r| <= ln 2 / 16; e**r = 1 + r q(r) to 3e-8. ln 2 in one part: its product with n is wrong
    # by less than x is, where x is a difference
    shifted = fma(x, f32(LOG2E), EIGHTHS)
    r = fma(shifted - EIGHTHS, f32(-LN2), x)
    return shifted, r, fma(r, fma(r, f32(0.1666823071), f32(0.5000647108)), f32(1.0))


@njit(**INLINE)
def _exp32_avx512(x: Any) -> Any:
    shifted, r, q = _to_eighths(x)
    root = eighth_root(shifted)
    return times_two_to(fma(root * r, q, root), shifted, EIGHTHS, x < f32(-87.3))


@njit(**INLINE)
def _exp32_avx2(x: Any) -> Any:
    shifted, r, q = _to_eighths(x)
    # 2**n: the exponent of n, less its eighths, is added to the root's
    power = from_bits(eighth_root_bits(bits(shifted)) + (bits(shifted) << np.int32(20)))
    return select(x < f32(-87.3), f32(0.0), fma(power * r, q, power))


@njit(**INLINE)
def _exp64(x: Any) -> Any:
    shifted = fma(x, LOG2E, BIASED64)
    n = shifted - BIASED64
    r = fma(n, -LN2_LOW64, fma(n, -LN2_HIGH64, x))
    q = fma(r, 2.0914717341716375952e-9, 2.5105259538448493419e-8)
    q = fma(r, q, 2.7557273570102139673e-7)
    q = fma(r, q, 2.7557255297969644392e-6)
    q = fma(r, q, 2.4801587325605322782e-5)
    q = fma(r, q, 1.9841269874901259234e-4)
    q = fma(r, q, 1.3888888888883731828e-3)
    q = fma(r, q, 8.3333333333261120526e-3)
    q = fma(r, q, 4.1666666666666669767e-2)
    q = fma(r, q, 1.6666666666666671008e-1)
    q = fma(r, q, 0.5)
    p = fma(r, fma(r, q, 1.0), 1.0)
    return times_two_to(p, shifted, BIASED64, x < -708.3)


@njit(**INLINE)
def _log32(x: Any) -> Any:
    tiny = x < f32(1.17549435e-38)
    x, shift = select(tiny, x * f32(2.0**24), x), select(tiny, splat(f32(-24.0), x), f32(0.0))  # denormals
    # x = 2**k (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2); log(1 + f) by a series in s = f / (2 + f)
    k = (bits(x) - np.int32(SQRT_HALF32)) >> np.int32(23)
    f = from_bits(bits(x) - (k << np.int32(23))) - f32(1.0)
    s = f / (f + f32(2.0))
    z = s * s
    series = z * fma(z, fma(z, fma(z, f32(0.24279078841), f32(0.28498786688)), f32(0.40000972152)), f32(0.66666662693))
    half = f * f * f32(0.5)
    n = to_float(k) + shift
    result = fma(n, LN2_HIGH32, f - (half - fma(s, half + series, n * LN2_LOW32)))
    return select(x > f32(0.0), result, select(x == f32(0.0), f32(-np.inf), x * f32(np.nan)))


@njit(**INLINE)
def _log64(x: Any) -> Any:
    tiny = x < 2.2250738585072014e-308
    x, shift = select(tiny, x * 2.0**54, x), select(tiny, splat(-54.0, x), 0.0)
    k = (bits(x) - np.int64(SQRT_HALF64)) >> np.int64(52)
    f = from_bits(bits(x) - (k << np.int64(52))) - 1.0
    s = f / (f + 2.0)
    z = s * s
    series = fma(z, 1.479819860511658591e-01, 1.531383769920937332e-01)
    series = fma(z, series, 1.818357216161805012e-01)
    series = fma(z, series, 2.222219843214978396e-01)
    series = fma(z, series, 2.857142874366239149e-01)
    series = fma(z, series, 3.999999999940941908e-01)
    series = z * fma(z, series, 6.666666666666735130e-01)
    half = f * f * 0.5
    n = to_float(k) + shift
    result = fma(n, LN2_HIGH64, f - (half - fma(s, half + series, n * LN2_LOW64)))
    return select(x > 0.0, result, select(x == 0.0, -np.inf, x * np.nan))


@njit(**INLINE)
def _add_log1p32(factor: Any, x: Any, a: Any) -> Any:
    # log(1 + x) = x p(x), relative error 5e-9 on [0, 1]
    p = fma(x, f32(-3.176057018e-3), f32(1.954252726e-2))
    p = fma(x, p, f32(-5.637361283e-2))
    p = fma(x, p, f32(1.05436238e-1))
    p = fma(x, p, f32(-1.526966707e-1))
    p = fma(x, p, f32(1.966327426e-1))
    p = fma(x, p, f32(-2.495161626e-1))
    p = fma(x, p, f32(3.33297105e-1))
    p = fma(x, p, f32(-4.999989265e-1))
    return fma(factor * x, fma(x, p, f32(1.0)), a)


@njit(**INLINE)
def _add_log1p_for_half(factor: Any, x: Any, a: Any) -> Any:
    # as _add_log1p32, to 2e-7
    p = fma(x, f32(-8.539244582e-3), f32(4.408975343e-2))
    p = fma(x, p, f32(-1.076818755e-1))
    p = fma(x, p, f32(1.774525263e-1))
    p = fma(x, p, f32(-2.449546723e-1))
    p = fma(x, p, f32(3.327548081e-1))
    p = fma(x, p, f32(-4.999740552e-1))
    p = fma(x, p, f32(9.999998057e-1))
    return fma(factor * x, p, a)


@njit(**INLINE)
def _add_log1p64(factor: Any, x: Any, a: Any) -> Any:
    # log(u) for u = fl(1 + x), plus what that rounding lost
    u = x + 1.0
    return fma(factor, _log64(u) + (x - (u - 1.0)) / u, a)


@intrinsic
def eighth_root(typingctx: Any, shifted: Any) -> Any:
    """2**(j/8), where j is what the three low bits say: looked up in a register, by one instruction of AVX-512."""
    table = [float(number) for number in EIGHTH_ROOTS]

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        places = builder.bitcast(args[0], ir.VectorType(ir.IntType(32), 16))
        return call(builder, "llvm.x86.avx512.permvar.sf.512", args[0].type, [ir.Constant(args[0].type, table * 2), places])

    return shifted(shifted), codegen


@intrinsic
def eighth_root_bits(typingctx: Any, j: Any) -> Any:
    """The bit pattern of 2**(j/8), less j << 20, of which only the three low bits count: the same by AVX2."""
    table = [int(number.view(np.int32)) - (j << 20) for j, number in enumerate(EIGHTH_ROOTS)]

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        roots = constant(32, 8, lambda lane: table[lane])
        halves = [builder.shuffle_vector(args[0], args[0], constant(32, 8, first.__add__)) for first in (0, 8)]
        found = [call(builder, "llvm.x86.avx2.permd", roots.type, [roots, half]) for half in halves]
        return builder.shuffle_vector(*found, constant(32, 16, lambda lane: lane))

    return j(j), codegen


@intrinsic
def times_two_to(typingctx: Any, a: Any, shifted: Any, zero: Any, nothing: Any) -> Any:
    """a 2**n, where `shifted` is n + `zero` and has the exponent of 2**n in its low bits; 0 where the mask `nothing` is set.

    A product, not n added to the bits of a: a NaN then stays one without a select of its own, which AVX2 has in two instructions.
    """
    names = {types.float32: "llvm.x86.avx512.mask.scalef.ps.512", types.float64: "llvm.x86.avx512.mask.scalef.pd.512"}
    width, fraction = a.scalar.bitwidth, {types.float32: 23, types.float64: 52}[a.scalar]

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        value, shifted, zero, nothing = args
        lanes, zeros = value.type.count, ir.Constant(value.type, None)
        if has_512_bits():  # vscalef does all of it in one instruction
            n = builder.fsub(shifted, spread(builder, zero, lanes))
            something, as_rounded_now = builder.bitcast(builder.not_(nothing), ir.IntType(lanes)), ir.Constant(ir.IntType(32), 4)
            return call(builder, names[a.scalar], value.type, [value, n, zeros, something, as_rounded_now])
        exponents = builder.bitcast(shifted, ir.VectorType(ir.IntType(width), lanes))
        power = builder.bitcast(builder.shl(exponents, constant(width, lanes, lambda lane: fraction)), value.type)
        return builder.select(nothing, zeros, builder.fmul(value, power))

    return a(a, a, a.scalar, nothing), codegen


def _choose(function: Callable[..., Any], for32: Callable[..., Any], for64: Callable[..., Any]) -> None:
    """`function` on a vector is `for32` or `for64`, by its lanes."""

    @overload(function, jit_options=INLINE)
    def typed(x: Any) -> Any:  # Numba compares this signature with the chosen one's
        if not isinstance(x, Vector):
            return None
        return (for32 if x.scalar == float32 else for64).py_func


_choose(exp, _exp32_avx512 if has_512_bits() else _exp32_avx2 if has_256_bits() else _exp32, _exp64)
_choose(log, _log32, _log64)


@overload(add_log1p, jit_options=INLINE)
def _typed_add_log1p(pointer, factor, x, a):  # type: ignore[no-untyped-def]
    if not isinstance(pointer, types.CPointer) or not isinstance(x, Vector):
        return None
    half = pointer.dtype in (float16, bfloat16)
    chosen = _add_log1p_for_half if half else _add_log1p32 if x.scalar == float32 else _add_log1p64
    return lambda pointer, factor, x, a: chosen(factor, x, a)
