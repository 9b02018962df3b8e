"""Memory asked for before its time: out-of-order execution alone does not look far past an exp. Asking is harmless at any address."""

from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from .inline import INLINE
from .llvm import SIZE, vector_of
from .memory import offset
from .stream import FIRST_LEVEL, LINE, SECOND_LEVEL, ask, to_line

PAGE = 4096  # bytes
AHEAD, PAGES = 8192, 2  # bytes, pages
NEAR = 2048  # bytes


@intrinsic
def prefetch(typingctx: Any, pointer: Any, index: Any) -> Any:
    """For a loop through a row that loads the vector at element `index`: ask for what it loads AHEAD bytes later, into the second-level
    cache; so long before, it would be in the way in the first.

    Once in PAGES pages, ask for a line of each of the PAGES pages after the next ones, too. Whoever touches a page first waits until the
    machine has found where it is, and so does all that comes after him; two wait as long as one. Most tensors lie in pages of 4 KB.
    """
    return _typed_prefetch(pointer, 1)


@intrinsic
def prefetch_four(typingctx: Any, pointer: Any, index: Any) -> Any:
    """The same, for a loop that loads four vectors from there."""
    return _typed_prefetch(pointer, 4)


@intrinsic
def prefetch_near(typingctx: Any, pointer: Any, index: Any) -> Any:
    """For a loop that reads, computes and forgets: ask for what it loads NEAR bytes later, into the first-level cache."""
    return _typed_ask(pointer, NEAR, FIRST_LEVEL)


@intrinsic
def prefetch_line(typingctx: Any, pointer: Any, index: Any) -> Any:
    """Ask for the cache line of element `index`."""
    return _typed_ask(pointer, 0, SECOND_LEVEL)


@njit(**INLINE)
def ask_for_seam(at: Any, last: Any, past_caches: Any) -> None:
    """Of a piece that is written past the caches: if it ends within a line, ask for that one, part of which is written as usual. While such
    a store waits for its line, no other store is done."""
    if past_caches and to_line(offset(at, last)) > 0:
        _prefetch_to_write(at, last)


@intrinsic
def _prefetch_to_write(typingctx: Any, pointer: Any, index: Any) -> Any:
    return _typed_ask(pointer, 0, FIRST_LEVEL, to_write=1)


def _typed_prefetch(pointer: Any, vectors: int) -> Any:
    size = vectors * vector_of(pointer.dtype).lanes * SIZE[pointer.dtype]

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        here = _address(builder, args)
        for line in range(0, size, LINE):
            ask(builder, here, AHEAD + line, SECOND_LEVEL)
        group = PAGES * PAGE
        place = builder.and_(here, ir.Constant(here.type, group - 1))
        with builder.if_then(builder.icmp_unsigned("<", place, ir.Constant(here.type, size)), likely=False):
            for page in range(PAGES):
                ask(builder, here, AHEAD + group + page * PAGE, SECOND_LEVEL)
        return context.get_dummy_value()

    return types.void(pointer, types.int64), codegen


def _typed_ask(pointer: Any, ahead: int, cache: int, to_write: int = 0) -> Any:
    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        ask(builder, _address(builder, args), ahead, cache, to_write)
        return context.get_dummy_value()

    return types.void(pointer, types.int64), codegen


def _address(builder: ir.IRBuilder, args: Any) -> ir.Value:
    pointer, index = args
    return builder.ptrtoint(builder.gep(pointer, [index]), ir.IntType(64))
