"""Rows whose classes lie side by side, turned about in registers, so that lanes are rows: up to as many classes as a vector has lanes.

A gather reads each number by itself. 16 rows of 16 classes are 16 loads and 64 shuffles here, and 256 loads there.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .half import narrow, widen
from .llvm import STORED, call, mask_below, suffix, vector_of

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_ANY_ADDRESS = ir.Constant(_I32, 1)


@intrinsic
def turn_in(typingctx: Any, source: Any, index: Any, stride: Any, rows: Any, count: Any, terms: Any, at: Any) -> Any:
    """Element index + r stride + k of `source`, widened, goes to lane r of the k-th vector of `terms` from element `at` on, for each of
    `rows` rows and k < count. What else there is in as many vectors as a vector has lanes becomes anything."""
    storage, lanes = source.dtype, vector_of(source.dtype).lanes

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        source, index, stride, rows, count, terms, at = args

        def turn(width: int) -> None:
            memory, mask = ir.VectorType(STORED[storage], width), mask_below(builder, count, width)

            def row(number: int) -> ir.Value:
                there = builder.icmp_signed("<", ir.Constant(_I64, number), rows)
                this = builder.select(there, ir.Constant(_I64, number), ir.Constant(_I64, 0))  # if it is not there, the first again
                place = builder.bitcast(_element(builder, source, index, this, stride), memory.as_pointer())
                arguments = [place, _ANY_ADDRESS, mask, ir.Constant(memory, None)]
                return call(builder, f"llvm.masked.load.{suffix(memory)}.p0", memory, arguments)

            vectors = [_joined(builder, [row(number) for number in range(k, lanes, width)]) for k in range(width)]
            for k, vector in enumerate(_turned(builder, [widen(builder, vector, storage) for vector in vectors])):
                place = builder.gep(terms, [builder.add(at, ir.Constant(_I64, k * lanes))])
                builder.store(vector, builder.bitcast(place, vector.type.as_pointer()), align=1)

        _narrowest(builder, count, lanes, turn)
        return context.get_dummy_value()

    return types.void(source, *[types.int64] * 4, terms, types.int64), codegen


@intrinsic
def turn_out(typingctx: Any, terms: Any, at: Any, result: Any, index: Any, stride: Any, rows: Any, count: Any) -> Any:
    """The way back: lane r of the k-th vector of `terms` from element `at` on goes, narrowed, to element index + r stride + k of `result`,
    for each of `rows` rows and k < count."""
    storage, lanes = result.dtype, vector_of(result.dtype).lanes

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        terms, at, result, index, stride, rows, count = args

        def turn(width: int) -> None:
            memory, mask = ir.VectorType(STORED[storage], width), mask_below(builder, count, width)
            vectors = []
            for k in range(width):
                vectors.append(_vector_at(builder, terms, builder.add(at, ir.Constant(_I64, k * lanes)), lanes))
            for k, vector in enumerate(_turned(builder, vectors)):
                vector = narrow(builder, vector, storage)
                for part, number in enumerate(range(k, lanes, width)):
                    with builder.if_then(builder.icmp_signed("<", ir.Constant(_I64, number), rows)):
                        value = _shuffled(builder, vector, vector, range(part * width, (part + 1) * width))
                        element = _element(builder, result, index, ir.Constant(_I64, number), stride)
                        place = builder.bitcast(element, memory.as_pointer())
                        call(builder, f"llvm.masked.store.{suffix(memory)}.p0", ir.VoidType(), [value, place, _ANY_ADDRESS, mask])

        _narrowest(builder, count, lanes, turn)
        return context.get_dummy_value()

    return types.void(terms, types.int64, result, *[types.int64] * 4), codegen


@intrinsic
def sum_of_each(typingctx: Any, terms: Any, at: Any) -> Any:
    """Lane r is the sum of the r-th vector of `terms` from element `at` on, to the bits of `lane_sum`."""
    return _each_folded(terms, lambda builder, a, b: builder.fadd(a, b))


@intrinsic
def largest_of_each(typingctx: Any, terms: Any, at: Any) -> Any:
    """Lane r is the largest number of the r-th vector of `terms` from element `at` on, as `lane_max` has it."""
    return _each_folded(terms, lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))


def _each_folded(terms: Any, combine: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]) -> Any:
    """As many vectors as each has lanes, folded in halves (`llvm.fold`), two at a time side by side: 15 steps for 16 vectors, not 64."""
    vector = vector_of(terms.dtype)
    lanes = vector.lanes

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        terms, at = args
        vectors = [_vector_at(builder, terms, builder.add(at, ir.Constant(_I64, k * lanes)), lanes) for k in range(lanes)]
        size = lanes
        while size > 1:
            size //= 2
            low = [lane + side * lanes for part in range(0, lanes, 2 * size) for side in (0, 1) for lane in range(part, part + size)]
            high = [lane + size for lane in low]
            pairs = zip(vectors[:size], vectors[size:], strict=True)
            vectors = [combine(builder, _shuffled(builder, a, b, low), _shuffled(builder, a, b, high)) for a, b in pairs]
        return vectors[0]

    return vector(terms, types.int64), codegen


def _narrowest(builder: ir.IRBuilder, count: ir.Value, lanes: int, turn: Callable[[int], None], width: int = 4) -> None:
    """turn(width), where width is 4, or 8, or 16: the least that `count` fits."""
    if width == lanes:
        turn(width)
        return
    with builder.if_else(builder.icmp_signed(">", count, ir.Constant(_I64, width))) as (more, fits):
        with more:
            _narrowest(builder, count, lanes, turn, 2 * width)
        with fits:
            turn(width)


def _turned(builder: ir.IRBuilder, vectors: list[ir.Value]) -> list[ir.Value]:
    """Squares of as many lanes as there are vectors, each turned about: blocks of one number change places across the diagonal, then of
    two, four, ... The vectors may hold several such squares side by side."""
    vectors, size, lanes = list(vectors), 1, range(vectors[0].type.count)
    while size < len(vectors):
        for i in (i for i in range(len(vectors)) if not i & size):
            a, b = vectors[i], vectors[i + size]
            vectors[i] = _shuffled(builder, a, b, [len(lanes) + k - size if k & size else k for k in lanes])
            vectors[i + size] = _shuffled(builder, a, b, [len(lanes) + k if k & size else k + size for k in lanes])
        size *= 2
    return vectors


def _joined(builder: ir.IRBuilder, parts: list[ir.Value]) -> ir.Value:
    """One vector of several, a power of two of them."""
    while len(parts) > 1:
        both = range(2 * parts[0].type.count)
        parts = [_shuffled(builder, a, b, both) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _vector_at(builder: ir.IRBuilder, terms: ir.Value, at: ir.Value, lanes: int) -> ir.Value:
    place = builder.gep(terms, [at])
    return builder.load(builder.bitcast(place, ir.VectorType(place.type.pointee, lanes).as_pointer()), align=1)


def _shuffled(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, order: Any) -> ir.Value:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(order)), list(order)))


def _element(builder: ir.IRBuilder, pointer: ir.Value, index: ir.Value, row: ir.Value, stride: ir.Value) -> ir.Value:
    return builder.gep(pointer, [builder.add(index, builder.mul(row, stride))])
