"""Vectors in and out of memory: consecutive, strided or the same element, in float16, bfloat16, float32 or float64.

A load widens float16 and bfloat16, a store narrows them, once (see `half`).
"""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .half import narrow, widen
from .llvm import (
    COMPUTE,
    INT_OF,
    SIZE,
    STORED,
    Vector,
    call,
    constant,
    fold,
    llvm_type,
    mask_below,
    spread,
    suffix,
    vector_of,
)


def _at(builder: ir.IRBuilder, pointer: ir.Value, index: ir.Value, element: ir.Type) -> ir.Value:
    return builder.bitcast(builder.gep(pointer, [index]), element.as_pointer())


def _memory_vector(storage: types.Type, lanes: int) -> ir.VectorType:
    """What lies in memory for one vector of `storage`."""
    return ir.VectorType(STORED[storage], lanes)


def _choose(builder: ir.IRBuilder, result: ir.Type, condition: ir.Value, yes: Any, no: Any) -> ir.Value:
    """condition ? yes() : no(), each side evaluated only where it is taken."""
    with builder.if_else(condition) as (then, otherwise):
        with then:
            value, block = yes(), builder.block
        with otherwise:
            other, other_block = no(), builder.block
    phi = builder.phi(result)
    phi.add_incoming(value, block)
    phi.add_incoming(other, other_block)
    return phi


def _places(builder: ir.IRBuilder, place: ir.Value, stride: ir.Value, memory: ir.VectorType) -> ir.Value:
    """The address of every lane's element, `stride` elements apart."""
    size = {"i16": 2, "float": 4, "double": 8, "i64": 8}[str(memory.element)]
    steps = builder.mul(spread(builder, stride, memory.count), constant(64, memory.count, lambda lane: lane * size))
    base = spread(builder, builder.ptrtoint(place, ir.IntType(64)), memory.count)
    return builder.inttoptr(builder.add(base, steps), ir.VectorType(memory.element.as_pointer(), memory.count))


@intrinsic
def load(typingctx: Any, pointer: Any, index: Any, stride: Any, count: Any, other: Any) -> Any:
    """Lane i holds element index + i * stride; lanes from `count` on hold `other` and their memory is not touched."""
    storage = pointer.dtype
    vector = vector_of(storage)
    lanes, memory = vector.lanes, _memory_vector(storage, vector.lanes)
    i64, align = ir.IntType(64), ir.Constant(ir.IntType(32), 1)

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        pointer, index, stride, count, other = args
        first = builder.gep(pointer, [index])
        place = builder.bitcast(first, memory.as_pointer())
        whole = builder.icmp_signed(">=", count, ir.Constant(i64, lanes))
        nothing = ir.Constant(memory, None)

        def consecutive() -> ir.Value:
            return _choose(builder, memory, whole, lambda: builder.load(place, align=1), part)

        def part() -> ir.Value:
            arguments = [place, align, mask_below(builder, count, lanes), nothing]
            return call(builder, f"llvm.masked.load.{suffix(memory)}.p0", memory, arguments)

        def same() -> ir.Value:
            return spread(builder, builder.load(builder.bitcast(first, memory.element.as_pointer()), align=1), lanes)

        def apart() -> ir.Value:
            arguments = [_places(builder, place, stride, memory), align, mask_below(builder, count, lanes), nothing]
            return call(builder, f"llvm.masked.gather.{suffix(memory)}.v{lanes}p0", memory, arguments)

        def strided() -> ir.Value:
            return _choose(builder, memory, builder.icmp_signed("==", stride, ir.Constant(i64, 0)), same, apart)

        raw = _choose(builder, memory, builder.icmp_signed("==", stride, ir.Constant(i64, 1)), consecutive, strided)
        value = widen(builder, raw, storage)
        others = spread(builder, other, lanes)
        return _choose(builder, value.type, whole, lambda: value, lambda: builder.select(mask_below(builder, count, lanes), value, others))

    return vector(pointer, types.int64, types.int64, types.int64, vector.scalar), codegen


@intrinsic
def store(typingctx: Any, pointer: Any, index: Any, stride: Any, count: Any, value: Any) -> Any:
    """Write lane i < count to element index + i * stride."""
    storage, lanes = pointer.dtype, value.lanes
    i64, align = ir.IntType(64), ir.Constant(ir.IntType(32), 1)

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        pointer, index, stride, count, value = args
        raw = narrow(builder, value, storage)
        place = builder.bitcast(builder.gep(pointer, [index]), raw.type.as_pointer())
        with builder.if_else(builder.icmp_signed("==", stride, ir.Constant(i64, 1))) as (consecutive, apart):
            with consecutive, builder.if_else(builder.icmp_signed(">=", count, ir.Constant(i64, lanes))) as (whole, part):
                with whole:
                    builder.store(raw, place, align=1)
                with part:
                    arguments = [raw, place, align, mask_below(builder, count, lanes)]
                    call(builder, f"llvm.masked.store.{suffix(raw.type)}.p0", ir.VoidType(), arguments)
            with apart:
                places = _places(builder, place, stride, raw.type)
                arguments = [raw, places, align, mask_below(builder, count, lanes)]
                call(builder, f"llvm.masked.scatter.{suffix(raw.type)}.v{lanes}p0", ir.VoidType(), arguments)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.int64, types.int64, value), codegen


@intrinsic
def load_one(typingctx: Any, pointer: Any, index: Any) -> Any:
    """Element `index` alone, widened."""
    storage = pointer.dtype
    memory = _memory_vector(storage, 1)

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return fold(builder, widen(builder, builder.load(_at(builder, *args, memory), align=1), storage), None)

    return COMPUTE[storage](pointer, types.int64), codegen


@intrinsic
def load_each(typingctx: Any, pointer: Any, lane_stride: Any, numbers: Any, stride: Any, mask: Any) -> Any:
    """Lane i holds element i * lane_stride + numbers[i] * stride, widened, where the mask is set, else 0 and its memory is not touched."""
    storage, lanes = pointer.dtype, numbers.lanes
    vector = vector_of(storage)
    memory = _memory_vector(storage, lanes)

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        pointer, lane_stride, numbers, stride, mask = args
        wide = ir.VectorType(ir.IntType(64), lanes)
        numbers = builder.sext(numbers, wide) if sig.args[2].scalar.bitwidth < 64 else numbers
        number = builder.mul(numbers, spread(builder, stride, lanes))
        lane = builder.mul(constant(64, lanes, lambda lane: lane), spread(builder, lane_stride, lanes))
        offset = builder.mul(builder.add(number, lane), constant(64, lanes, lambda lane: SIZE[storage]))
        base = spread(builder, builder.ptrtoint(pointer, ir.IntType(64)), lanes)
        places = builder.inttoptr(builder.add(base, offset), ir.VectorType(memory.element.as_pointer(), lanes))
        arguments = [places, ir.Constant(ir.IntType(32), 1), mask, ir.Constant(memory, None)]
        return widen(builder, call(builder, f"llvm.masked.gather.{suffix(memory)}.v{lanes}p0", memory, arguments), storage)

    return vector(pointer, types.int64, numbers, types.int64, mask), codegen


@intrinsic
def load_classes(typingctx: Any, pointer: Any, index: Any, stride: Any, count: Any, ignored: Any, like: Any) -> Any:
    """Class numbers from int64 memory as integers as wide as the lanes of `like`; -1 for `ignored` and, unless the stride is 0, from lane
    `count` on. A number that is no class stays none: -2 for the negative ones, a large one for those that are
    too large for the lanes."""
    result = Vector(INT_OF[like.scalar], like.lanes)
    lanes = like.lanes

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        pointer, index, stride, count, ignored, _ = args
        i64 = ir.IntType(64)
        wide = ir.VectorType(i64, lanes)
        place = builder.gep(pointer, [index])

        def in_range(number: ir.Value, ignored: ir.Value, constant: Any) -> ir.Value:
            largest = constant((1 << (result.scalar.bitwidth - 1)) - 1)
            held = builder.select(builder.icmp_signed("<", number, largest), number, largest)
            held = builder.select(builder.icmp_signed("<", number, constant(0)), constant(-2), held)
            return builder.select(builder.icmp_signed("==", number, ignored), constant(-1), held)

        def vector_in_range(numbers: ir.Value, ignored: ir.Value) -> ir.Value:
            return in_range(numbers, ignored, lambda number: constant(64, lanes, lambda lane: number))

        def consecutive() -> ir.Value:
            where, none = builder.bitcast(place, wide.as_pointer()), spread(builder, ignored, lanes)
            arguments = [where, ir.Constant(ir.IntType(32), 8), mask_below(builder, count, lanes), none]
            return vector_in_range(call(builder, f"llvm.masked.load.v{lanes}i64.p0", wide, arguments), none)

        def apart() -> ir.Value:
            none = spread(builder, ignored, lanes)
            arguments = [_places(builder, place, stride, wide), ir.Constant(ir.IntType(32), 8), mask_below(builder, count, lanes), none]
            return vector_in_range(call(builder, f"llvm.masked.gather.v{lanes}i64.v{lanes}p0", wide, arguments), none)

        def several() -> ir.Value:
            return _choose(builder, wide, builder.icmp_signed("==", stride, ir.Constant(i64, 1)), consecutive, apart)

        def same() -> ir.Value:
            return spread(builder, in_range(builder.load(place), ignored, lambda number: ir.Constant(i64, number)), lanes)

        number = _choose(builder, wide, builder.icmp_signed("!=", stride, ir.Constant(i64, 0)), several, same)
        return builder.trunc(number, llvm_type(result)) if result.scalar.bitwidth < 64 else number

    return result(pointer, types.int64, types.int64, types.int64, types.int64, like), codegen


@intrinsic
def store_classes(typingctx: Any, pointer: Any, index: Any, count: Any, numbers: Any) -> Any:
    """Write lane i < count, a class number, to element index + i of int64 memory."""
    lanes = numbers.lanes

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        pointer, index, count, numbers = args
        wide = ir.VectorType(ir.IntType(64), lanes)
        numbers = builder.sext(numbers, wide) if sig.args[3].scalar.bitwidth < 64 else numbers
        place = builder.bitcast(builder.gep(pointer, [index]), wide.as_pointer())
        arguments = [numbers, place, ir.Constant(ir.IntType(32), 8), mask_below(builder, count, lanes)]
        call(builder, f"llvm.masked.store.v{lanes}i64.p0", ir.VoidType(), arguments)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.int64, numbers), codegen


@intrinsic
def offset(typingctx: Any, pointer: Any, count: Any) -> Any:
    """The pointer `count` elements further on."""
    return pointer(pointer, types.int64), lambda context, builder, sig, args: builder.gep(args[0], [args[1]])
