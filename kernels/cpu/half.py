"""float16 and bfloat16: widened to float32, and narrowed to nearest, ties to even; nothing else in the package knows them.

LLVM has instructions for that where the target has, and elsewhere calls functions of a runtime library that need not be there: then the
process ends. So LLVM is asked first, and what it would call a function for is done with integers here.
"""

import re
from functools import cache, partial

from llvmlite import binding, ir
from numba.core import types

from .llvm import BFloat, bfloat16, call, constant, float16, suffix
from .target import Conversion, assembly

_I16, _I32, _FLOAT = ir.IntType(16), ir.IntType(32), ir.FloatType()
_CALLS = re.compile(r"__\w*(trunc|extend|f2h|h2f)\w*")  # __truncsfbf2, __gnu_h2f_ieee and the like


def widen(builder: ir.IRBuilder, value: ir.Value, storage: types.Type) -> ir.Value:
    """Numbers as they lie in memory, in the dtype to compute with."""
    if storage == bfloat16:  # the upper half of a float32
        lanes = value.type.count
        floats = _as_floats(builder, builder.shl(builder.zext(value, ir.VectorType(_I32, lanes)), _all(lanes, 16)))
        return call(builder, f"llvm.arithmetic.fence.{suffix(floats.type)}", floats.type, [floats])
    if storage == float16:
        return (_extend if "widen float16" in instructions() else _float16_to_float32)(builder, value)
    return value


def narrow(builder: ir.IRBuilder, value: ir.Value, storage: types.Type) -> ir.Value:
    """Numbers as they are to lie in memory. NaN stays NaN."""
    if storage == bfloat16:
        return (_truncate_to_bfloat16 if "narrow bfloat16" in instructions() else _float32_to_bfloat16)(builder, value)
    if storage == float16:
        return (_truncate_to_float16 if "narrow float16" in instructions() else _float32_to_float16)(builder, value)
    return value


def narrow_two(builder: ir.IRBuilder, first: ir.Value, second: ir.Value, storage: types.Type) -> ir.Value | None:
    """Two vectors, one after the other, where one instruction does that: the bits are those of `narrow`. None elsewhere."""
    return _truncate_two(builder, first, second) if storage == bfloat16 and "narrow two bfloat16" in instructions() else None


@cache
def instructions() -> frozenset[str]:
    """What Numba's target, which need not be this CPU, has instructions for."""
    floats, halves = ir.VectorType(_FLOAT, 16), ir.VectorType(_I16, 16)
    conversions: dict[str, tuple[Conversion, ir.VectorType]] = {
        "widen float16": (_extend, halves),
        "narrow float16": (_truncate_to_float16, floats),
    }
    if binding.llvm_version_info[0] >= 20:  # LLVM 15, which older Numba has, lacks it on every target
        conversions["narrow bfloat16"] = _truncate_to_bfloat16, floats
    found = {name for name, (convert, source) in conversions.items() if not _CALLS.search(assembly(convert, source))}
    # of AVX-512; some have the one for a vector without it
    if "narrow bfloat16" in found and re.search(r"vcvtneps2bf16.*, %ymm", assembly(_truncate_to_bfloat16, floats)):
        found.add("narrow two bfloat16")
    return frozenset(found)


# ---------------------------------------------------------------- by instruction


def _extend(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    lanes = value.type.count
    return builder.fpext(builder.bitcast(value, ir.VectorType(ir.HalfType(), lanes)), ir.VectorType(_FLOAT, lanes))


def _truncate(half: ir.Type, builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    lanes = value.type.count
    return builder.bitcast(builder.fptrunc(value, ir.VectorType(half, lanes)), ir.VectorType(_I16, lanes))


_truncate_to_float16 = partial(_truncate, ir.HalfType())
_truncate_to_bfloat16 = partial(_truncate, BFloat())  # AVX512-BF16 takes what is below 2**-126 for 0


def _truncate_two(builder: ir.IRBuilder, first: ir.Value, second: ir.Value) -> ir.Value:
    pair = ir.VectorType(BFloat(), 32)
    return builder.bitcast(call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", pair, [second, first]), ir.VectorType(_I16, 32))


# ---------------------------------------------------------------- by integers


def _all(lanes: int, number: int) -> ir.Constant:
    return constant(32, lanes, lambda lane: number)


def _as_integers(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return builder.bitcast(value, ir.VectorType(_I32, value.type.count))


def _as_floats(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return builder.bitcast(value, ir.VectorType(_FLOAT, value.type.count))


def _float32_to_bfloat16(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    number = partial(_all, value.type.count)
    bits = _as_integers(builder, value)
    high = builder.lshr(bits, number(16))
    odd = builder.and_(high, number(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, number(0x7FFF))), number(16))
    nan = builder.or_(high, number(0x40))
    return builder.trunc(builder.select(builder.fcmp_unordered("uno", value, value), nan, rounded), ir.VectorType(_I16, value.type.count))


def _float32_to_float16(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    number = partial(_all, value.type.count)
    bits = _as_integers(builder, value)
    sign = builder.and_(builder.lshr(bits, number(16)), number(0x8000))
    size = builder.and_(bits, number(0x7FFFFFFF))
    high = builder.lshr(size, number(13))
    odd = builder.and_(high, number(1))
    # the exponent counts from 15 instead of 127; what is too large for it is infinite
    rounded = builder.sub(builder.lshr(builder.add(size, builder.add(odd, number(0xFFF))), number(13)), number(112 << 10))
    result = builder.select(builder.icmp_signed("<", rounded, number(0x7C00)), rounded, number(0x7C00))
    # below 2**-14: the sum with 1/2 is rounded to a multiple of 2**-24, and its low bits say to which
    half = ir.Constant(ir.VectorType(_FLOAT, value.type.count), [0.5] * value.type.count)
    tiny = builder.sub(_as_integers(builder, builder.fadd(_as_floats(builder, size), half)), number(0x3F000000))
    result = builder.select(builder.icmp_signed("<", size, number(0x38800000)), tiny, result)
    nan = builder.or_(builder.and_(high, number(0x3FF)), number(0x7E00))
    result = builder.select(builder.icmp_signed(">", size, number(0x7F800000)), nan, result)
    return builder.trunc(builder.or_(result, sign), ir.VectorType(_I16, value.type.count))


def _float16_to_float32(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    number = partial(_all, value.type.count)
    bits = builder.zext(value, ir.VectorType(_I32, value.type.count))
    sign = builder.shl(builder.and_(bits, number(0x8000)), number(16))
    size = builder.and_(bits, number(0x7FFF))
    bias = builder.select(builder.icmp_signed("<", size, number(0x7C00)), number(112 << 23), number(224 << 23))  # infinity stays infinite
    result = builder.add(builder.shl(size, number(13)), bias)
    # denormals: 1/2 plus so many 2**-24, less 1/2
    half = ir.Constant(ir.VectorType(_FLOAT, value.type.count), [0.5] * value.type.count)
    tiny = _as_integers(builder, builder.fsub(_as_floats(builder, builder.add(size, number(0x3F000000))), half))
    result = builder.select(builder.icmp_signed("<", size, number(0x400)), tiny, result)
    return _as_floats(builder, builder.or_(result, sign))
