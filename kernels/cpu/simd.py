"""Vectors for Numba: the CPU's counterpart of Triton's blocks.

A `Vector` holds 512 bits (16 float32 or 8 float64). LLVM lowers it to whatever the machine has: one AVX-512 register, two AVX2
registers, four NEON registers. Writing the vectors down, instead of hoping for the loop vectoriser, is what makes these kernels fast
on every Numba and LLVM version, keeps in-place calls on the same code, and lets a reader compare them with Triton line by line.

Arithmetic happens in float32 or float64 only: `load` widens float16 and bfloat16, `store` narrows, nothing in between knows.
No fast-math flag is set anywhere, so sums are never reordered, and NaN and infinity mean what IEEE 754 says.
"""

import operator
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic

from .llvm import FLOAT_OF, INT_OF, Vector, call, constant, float32, float64, fold, llvm_type, spread, suffix, vector_of

# ---------------------------------------------------------------- arithmetic: + - * / < and friends, a scalar is spread over the lanes


def _result(op: Any, vector: Vector) -> Vector:
    return Vector(types.boolean, vector.lanes) if op in _COMPARE else vector


def _binary_typer(op: Any) -> None:
    class VectorOperator(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if kws or len(args) != 2 or not any(isinstance(a, Vector) for a in args):
                return None
            vector = next(a for a in args if isinstance(a, Vector))
            return signature(_result(op, vector), *(a if isinstance(a, Vector) else vector.scalar for a in args))

    infer_global(op)(VectorOperator)


def _binary_lowering(op: Any, left: Any, right: Any) -> None:
    @lower_builtin(op, left, right)
    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        vector = next(a for a in sig.args if isinstance(a, Vector))
        a, b = (v if isinstance(t, Vector) else spread(builder, v, vector.lanes) for v, t in zip(args, sig.args, strict=True))
        floating = isinstance(vector.scalar, types.Float)
        if op in _COMPARE:
            if floating:
                return (builder.fcmp_unordered if op is operator.ne else builder.fcmp_ordered)(_COMPARE[op], a, b)
            return builder.icmp_signed(_COMPARE[op], a, b)
        return getattr(builder, _ARITHMETIC[op][0 if floating else 1])(a, b)


_ARITHMETIC = {
    operator.add: ("fadd", "add"),
    operator.sub: ("fsub", "sub"),
    operator.mul: ("fmul", "mul"),
    operator.truediv: ("fdiv", "sdiv"),
    operator.and_: ("and_", "and_"),
    operator.or_: ("or_", "or_"),
    operator.lshift: ("shl", "shl"),
    operator.rshift: ("ashr", "ashr"),
}
_COMPARE = {operator.lt: "<", operator.gt: ">", operator.eq: "==", operator.ne: "!="}
for _op in (*_ARITHMETIC, *_COMPARE):
    _binary_typer(_op)
    for _left, _right in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        _binary_lowering(_op, _left, _right)


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c in one rounding where the machine has it. Scalars are spread over the lanes."""
    vector = next(t for t in (a, b, c) if isinstance(t, Vector))

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        values = [v if isinstance(t, Vector) else spread(builder, v, vector.lanes) for v, t in zip(args, sig.args, strict=True)]
        return call(builder, f"llvm.fmuladd.{suffix(values[0].type)}", values[0].type, values)

    return vector(*(t if isinstance(t, Vector) else vector.scalar for t in (a, b, c))), codegen


@intrinsic
def select(typingctx: Any, mask: Any, a: Any, b: Any) -> Any:
    """a where mask, else b. Scalars are spread over the lanes."""
    vector = next(t for t in (a, b) if isinstance(t, Vector))

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        values = [v if isinstance(t, Vector) else spread(builder, v, vector.lanes) for v, t in zip(args[1:], sig.args[1:], strict=True)]
        return builder.select(args[0], *values)

    return vector(mask, *(t if isinstance(t, Vector) else vector.scalar for t in (a, b))), codegen


@intrinsic
def lane_numbers(typingctx: Any, like: Any) -> Any:
    """0, 1, 2, ... as integers as wide as the lanes of `like`."""
    result = Vector(INT_OF[like.scalar], like.lanes)
    width = result.scalar.bitwidth
    return result(like), lambda context, builder, sig, args: constant(width, result.lanes, lambda lane: lane)


@intrinsic
def first_lane(typingctx: Any, a: Any) -> Any:
    """The number in lane 0."""
    zero = ir.Constant(ir.IntType(32), 0)
    return a.scalar(a), lambda context, builder, sig, args: builder.extract_element(args[0], zero)


@intrinsic
def larger(typingctx: Any, a: Any, b: Any) -> Any:
    """The larger number in each lane; a where b is NaN. One instruction on x86, unlike a maximum that keeps NaN."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.select(builder.fcmp_ordered(">", args[1], args[0]), args[1], args[0])

    return a(a, a), codegen


@intrinsic
def any_lane(typingctx: Any, mask: Any) -> Any:
    """True if any lane of the mask is."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        word = ir.IntType(mask.lanes)
        return builder.icmp_unsigned("!=", builder.bitcast(args[0], word), ir.Constant(word, 0))

    return types.boolean(mask), codegen


@intrinsic
def bits(typingctx: Any, a: Any) -> Any:
    """The bit pattern of a float vector as integers."""
    result = Vector(INT_OF[a.scalar], a.lanes)
    return result(a), lambda context, builder, sig, args: builder.bitcast(args[0], llvm_type(result))


@intrinsic
def from_bits(typingctx: Any, a: Any) -> Any:
    """The float vector with this bit pattern."""
    result = Vector(FLOAT_OF[a.scalar], a.lanes)
    return result(a), lambda context, builder, sig, args: builder.bitcast(args[0], llvm_type(result))


@intrinsic
def minus_magnitude(typingctx: Any, a: Any) -> Any:
    """-|a|, of NaN too."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return builder.fneg(call(builder, f"llvm.fabs.{suffix(args[0].type)}", args[0].type, args))

    return a(a), codegen


@intrinsic
def times_sign(typingctx: Any, a: Any, b: Any) -> Any:
    """-a where the sign bit of b is set, else a. One instruction on AVX-512."""
    integers = Vector(INT_OF[a.scalar], a.lanes)

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        width = integers.scalar.bitwidth
        sign = constant(width, a.lanes, lambda lane: -(1 << (width - 1)))
        a_bits, b_bits = (builder.bitcast(value, llvm_type(integers)) for value in args)
        return builder.bitcast(builder.xor(a_bits, builder.and_(b_bits, sign)), args[0].type)

    return a(a, a), codegen


@intrinsic
def to_float(typingctx: Any, a: Any) -> Any:
    """Integers as floats of the same width."""
    result = Vector(FLOAT_OF[a.scalar], a.lanes)
    return result(a), lambda context, builder, sig, args: builder.sitofp(args[0], llvm_type(result))


@intrinsic
def splat(typingctx: Any, value: Any, like: Any) -> Any:
    """A number in every lane of a vector like `like`, or like what a load from this pointer gives."""
    result = like if isinstance(like, Vector) else vector_of(like.dtype)
    return result(result.scalar, like), lambda context, builder, sig, args: spread(builder, args[0], result.lanes)


@intrinsic
def lowest(typingctx: Any, like: Any) -> Any:
    """The lowest finite number in every lane. A running maximum starts here and not at -inf, whose difference with -inf is NaN."""
    result = like if isinstance(like, Vector) else vector_of(like.dtype)
    number = float(np.finfo(np.float32 if result.scalar == float32 else np.float64).min)
    return result(like), lambda context, builder, sig, args: ir.Constant(llvm_type(result), [number] * result.lanes)


@intrinsic
def lanes_of(typingctx: Any, pointer: Any) -> Any:
    """How many lanes a vector has, or one loaded from this pointer; a compile-time constant."""
    lanes = pointer.lanes if isinstance(pointer, Vector) else vector_of(pointer.dtype).lanes
    return types.int64(pointer), lambda context, builder, sig, args: ir.Constant(ir.IntType(64), lanes)


@intrinsic
def pick(typingctx: Any, a: Any, lanes: Any) -> Any:
    """a's lanes in the order given: result[i] = a[lanes[i]]."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        width = args[1].type.element.width
        inside = builder.and_(args[1], constant(width, a.lanes, lambda lane: a.lanes - 1))
        result = ir.Constant(llvm_type(a), ir.Undefined)
        for i in range(a.lanes):  # LLVM makes one permutation of this
            place = ir.Constant(ir.IntType(32), i)
            lane = builder.extract_element(inside, place)
            result = builder.insert_element(result, builder.extract_element(args[0], lane), place)
        return result

    return a(a, lanes), codegen


# ---------------------------------------------------------------- reductions over the lanes, in one fixed order


@intrinsic
def lane_sum(typingctx: Any, a: Any) -> Any:
    """The sum of all lanes."""
    return a.scalar(a), lambda context, builder, sig, args: fold(builder, args[0], builder.fadd)


@intrinsic
def lane_max(typingctx: Any, a: Any) -> Any:
    """The largest lane; NaN lanes may be skipped."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return fold(builder, args[0], lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))

    return a.scalar(a), codegen


@intrinsic
def widen(typingctx: Any, a: Any) -> Any:
    """The same lanes as float64."""
    result = Vector(float64, a.lanes)
    widened = a.scalar != float64
    return result(a), lambda context, builder, sig, args: builder.fpext(args[0], llvm_type(result)) if widened else args[0]
