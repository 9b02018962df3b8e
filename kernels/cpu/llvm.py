"""The vector type of the kernels, and small helpers to write LLVM instructions for it."""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import models, register_model

VECTOR_BITS = 512


class Half(types.Type):
    """A 16-bit float in memory; Numba has none on CPU. It exists only behind a pointer."""


class BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


class Vector(types.Type):
    """VECTOR_BITS of float32, float64, int32, int64, or a mask (`types.boolean`) for as many lanes."""

    def __init__(self, scalar: types.Type, lanes: int) -> None:
        self.scalar, self.lanes = scalar, lanes
        super().__init__(name=f"Vector({scalar}, {lanes})")


@register_model(Half)
class _HalfModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Half) -> None:
        super().__init__(dmm, fe_type, ir.IntType(16))


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(_LLVM[fe_type.scalar], fe_type.lanes))


float16, bfloat16 = Half("float16"), Half("bfloat16")
float32, float64 = types.float32, types.float64
COMPUTE = {float16: float32, bfloat16: float32, float32: float32, float64: float64}
_LLVM = {
    types.boolean: ir.IntType(1),
    types.int32: ir.IntType(32),
    types.int64: ir.IntType(64),
    float32: ir.FloatType(),
    float64: ir.DoubleType(),
}
SIZE = {float16: 2, bfloat16: 2, float32: 4, float64: 8}
INT_OF = {float32: types.int32, float64: types.int64}
FLOAT_OF = {types.int32: float32, types.int64: float64}
STORED = {float16: ir.IntType(16), bfloat16: ir.IntType(16), float32: ir.FloatType(), float64: ir.DoubleType()}


def vector_of(storage: types.Type) -> Vector:
    """The vector that a load from `storage` memory gives."""
    scalar = COMPUTE[storage]
    return Vector(scalar, VECTOR_BITS // scalar.bitwidth)


def llvm_type(vector: Vector) -> ir.VectorType:
    return ir.VectorType(_LLVM[vector.scalar], vector.lanes)


def spread(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    one = builder.insert_element(ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes))


def call(builder: ir.IRBuilder, name: str, result: ir.Type, args: list[ir.Value]) -> ir.Value:
    fnty = ir.FunctionType(result, [a.type for a in args])
    module = builder.module
    return builder.call(module.globals.get(name) or ir.Function(module, fnty, name), args)


def suffix(vector: ir.VectorType) -> str:
    return f"v{vector.count}{ {'float': 'f32', 'double': 'f64'}.get(str(vector.element)) or str(vector.element) }"


def constant(bits: int, lanes: int, number: Any) -> ir.Constant:
    """The integer vector number(0), number(1), ..."""
    return ir.Constant(ir.VectorType(ir.IntType(bits), lanes), [number(lane) for lane in range(lanes)])


def mask_below(builder: ir.IRBuilder, count: ir.Value, lanes: int) -> ir.Value:
    """Lanes 0 .. count - 1."""
    return builder.icmp_signed("<", constant(64, lanes, lambda lane: lane), spread(builder, count, lanes))


def fold(builder: ir.IRBuilder, value: ir.Value, combine: Any) -> ir.Value:
    """Halve the vector until one lane is left: the same tree on every machine, so the same bits."""
    lanes = value.type.count
    while lanes > 1:
        lanes //= 2
        i32 = ir.IntType(32)
        halves = [
            builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(i32, lanes), list(range(s, s + lanes)))) for s in (0, lanes)
        ]
        value = combine(*halves)
    return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))
