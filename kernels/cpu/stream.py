"""Whole vectors to memory, past the caches or through them, and where their lines begin."""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .half import narrow, narrow_two
from .llvm import SIZE, call, suffix, vector_of

LINE = 64  # bytes
WRITE_AHEAD = 1024  # bytes
FIRST_LEVEL, SECOND_LEVEL = 3, 2  # what LLVM calls the caches


@intrinsic
def stream(typingctx: Any, pointer: Any, index: Any, value: Any, past_caches: Any) -> Any:
    """Write a whole vector from element `index` on. If `past_caches` is not 0, its address must be a multiple of its size, and it
    bypasses the caches, which saves reading the old content of that memory first."""
    return _typed_stream(pointer, value, 0)


@intrinsic
def stream_row(typingctx: Any, pointer: Any, index: Any, value: Any, past_caches: Any) -> Any:
    """The same for a loop along a row. Through the caches, it asks for the line that it will write WRITE_AHEAD bytes later: stores wait in
    order, each for its own. (16-bit numbers are so few bytes that they need not.)"""
    return _typed_stream(pointer, value, _ahead(pointer.dtype))


@intrinsic
def stream_two(typingctx: Any, pointer: Any, index: Any, first: Any, second: Any, past_caches: Any) -> Any:
    """Two vectors of a row, one after the other: of 16-bit numbers they are a line, which begins here if they go past the caches. Two
    bfloat16 ones are narrowed in little more time than one."""
    storage = pointer.dtype

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        pointer, index, first, second, past_caches = args
        both = narrow_two(builder, first, second, storage)
        parts = [narrow(builder, first, storage), narrow(builder, second, storage)] if both is None else [both]
        for part in parts:
            _write(builder, storage, builder.gep(pointer, [index]), part, past_caches, _ahead(storage))
            index = builder.add(index, ir.Constant(index.type, part.type.count))
        return context.get_dummy_value()

    return types.void(pointer, types.int64, first, first, types.int64), codegen


def _typed_stream(pointer: Any, value: Any, ahead: int) -> Any:
    storage = pointer.dtype

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        pointer, index, value, past_caches = args
        _write(builder, storage, builder.gep(pointer, [index]), narrow(builder, value, storage), past_caches, ahead)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, value, types.int64), codegen


def _ahead(storage: types.Type) -> int:
    return WRITE_AHEAD if SIZE[storage] > 2 else 0


def _write(builder: ir.IRBuilder, storage: types.Type, at: ir.Value, raw: ir.Value, past_caches: ir.Value, ahead: int) -> None:
    place = builder.bitcast(at, raw.type.as_pointer())
    with builder.if_else(builder.icmp_signed("!=", past_caches, ir.Constant(ir.IntType(64), 0))) as (past, through):
        with past:
            hint = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
            kept = _as_words(builder, raw) if SIZE[storage] == 2 else raw
            place_of_kept = builder.bitcast(place, kept.type.as_pointer())
            builder.store(kept, place_of_kept, align=raw.type.count * SIZE[storage]).set_metadata("nontemporal", hint)
        with through:
            builder.store(raw, place, align=1)
            if ahead:
                ask(builder, builder.ptrtoint(place, ir.IntType(64)), ahead, FIRST_LEVEL, to_write=1)


def _as_words(builder: ir.IRBuilder, raw: ir.Value) -> ir.Value:
    """16-bit numbers in twos, behind a fence: LLVM 22 sees that they come from a conversion, stores them as bfloat or half, and for these
    x86's backend forgets the hint."""
    words = ir.VectorType(ir.FloatType(), raw.type.count // 2)
    return call(builder, f"llvm.arithmetic.fence.{suffix(words)}", words, [builder.bitcast(raw, words)])


def ask(builder: ir.IRBuilder, here: ir.Value, ahead: int, cache: int, to_write: int = 0) -> None:
    """Ask for the cache line so many bytes after an address, whatever is there."""
    i32 = ir.IntType(32)
    write, level, data = (ir.Constant(i32, n) for n in (to_write, cache, 1))
    place = builder.inttoptr(builder.add(here, ir.Constant(here.type, ahead)), ir.IntType(8).as_pointer())
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [place, write, level, data])


@intrinsic
def to_alignment(typingctx: Any, pointer: Any) -> Any:
    """How many elements from here until a whole vector lies aligned in memory (0 if none ever does)."""
    return _typed_until(pointer, SIZE[pointer.dtype] * vector_of(pointer.dtype).lanes)


@intrinsic
def line_of(typingctx: Any, pointer: Any) -> Any:
    """How many elements fill a cache line: a vector, or two of 16-bit ones."""
    count = LINE // SIZE[pointer.dtype]
    return types.int64(pointer), lambda context, builder, sig, args: ir.Constant(ir.IntType(64), count)


@intrinsic
def to_line(typingctx: Any, pointer: Any) -> Any:
    """How many elements from here until a cache line begins. What is written past the caches is whole lines: half a one has to wait for
    the other half, which memory has."""
    return _typed_until(pointer, LINE)


def _typed_until(pointer: Any, size: int) -> Any:
    """How many elements until an address is a multiple of so many bytes."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        i64 = ir.IntType(64)
        missing = builder.and_(builder.neg(builder.ptrtoint(args[0], i64)), ir.Constant(i64, size - 1))
        return builder.udiv(missing, ir.Constant(i64, SIZE[pointer.dtype]))

    return types.int64(pointer), codegen
