"""The launches of a call on CPU, recorded once for each kind of call, and made again for the next one of that kind with new addresses.

What a small call costs is Python: looking at shapes and strides, choosing a walk, allocating, packing. All of it depends on the kind of
call alone (`calls`). So the launches of one call become a program: which words of which argument blocks are addresses, and of what. The
same words make the same bits. That tensors fit their launches was looked at when the call was recorded; whether they still have their
memory is asked every time.

While a call is recorded, a dispatch mode sees what torch does beside the launches. Memory without contents, views, and constants of this
kind of call may be made, tensors may be copied in another dtype or order before all launches, and losses rounded after them; a call that
computes anything else by torch has no program.
"""

import ctypes
import threading
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import config, memory
from .storage import extent

_ALIGNED = 64  # bytes
_MOST_FILLED = 2  # numbers
_NUMBER = 4  # bytes of a float32
_CPU = torch.device("cpu")
_C_TYPES = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}

Found = tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]


class Step(NamedTuple):
    """One launch."""

    run: Callable[[int], None]  # with the address of an argument block
    words: "array[int]"  # of that block
    flag: int  # which of them is not 0 afterwards if something is wrong with the numbers in the tensors
    addresses: tuple[tuple[int, int, int], ...]  # a word, which of the tensors it points into, and how far


class Copied(NamedTuple):
    """A given tensor, in another dtype or order in the scratch."""

    which: int
    begin: int
    end: int
    dtype: torch.dtype
    shape: torch.Size


class Rounded(NamedTuple):
    """Float32 numbers in the scratch, which one of those made has in another dtype."""

    which: int
    begin: int
    end: int


class Program(NamedTuple):
    """Gradients and results of one kind of call, from its tensors. Addresses point into: the tensors given, those made, the scratch."""

    given: tuple[tuple[int, int, int], ...]  # which there are; bytes of an element, and from the first element to the end of the last
    made: tuple[Callable[[], Tensor] | None, ...]
    gradients: int  # the first so many of those made
    fills: tuple[tuple[int, int, Any, list[float]], ...]  # before the launches: where, of what C type, and with what numbers
    scratch: int  # bytes
    copied: tuple[Copied, ...]  # before the launches
    steps: tuple[Step, ...]
    rounded: tuple[Rounded, ...]  # after them
    constants: tuple[Tensor, ...]  # kept alive: the words hold their addresses

    def run(self, t: Sequence[Tensor | None]) -> Found | None:
        """None if something is wrong with the numbers in the tensors, or with their memory; the call as it was recorded then says what."""
        bases = []
        for which, itemsize, size in self.given:
            tensor: Any = t[which]
            if tensor.storage_offset() * itemsize + size > tensor.untyped_storage().nbytes():
                return None
            bases.append(tensor.data_ptr())
        made: list[Any] = []
        for make in self.made:
            fresh = None if make is None else make()
            made.append(fresh)
            bases.append(0 if fresh is None else fresh.data_ptr())
        scratch = _take_scratch(self.scratch)
        bases.append(scratch.address)
        for which, begin, end, dtype, shape in self.copied:
            given: Any = t[which]
            scratch.memory[begin:end].view(dtype).view(shape).copy_(given.detach())
        for base, distance, kind, numbers in self.fills:
            kind.from_address(bases[base] + distance)[:] = numbers
        for run, words, flag, addresses in self.steps:
            block = words[:]
            for word, base, distance in addresses:
                block[word] = bases[base] + distance
            run(block.buffer_info()[0])
            if block[flag]:
                return None
        for which, begin, end in self.rounded:
            if end - begin == _NUMBER:  # views would take longer
                number = ctypes.c_float.from_address(bases[-1] + begin).value
                made[which].copy_(torch.tensor(number, dtype=torch.float32, device=_CPU))
            else:
                made[which].view(-1).copy_(scratch.memory[begin:end].view(torch.float32))
        _put_back(scratch)
        return tuple(made[: self.gradients]), tuple(made[self.gradients :])


def record(call: Callable[[], Found], t: Sequence[Tensor | None], results: int | None = None) -> tuple[Found, Program | None]:
    """What the call finds, and its program if it can have one: of the gradients and the first so many results, of all if None."""
    from .kernels.cpu.launch import recorded

    launches: list[Any] = []
    recorded.launches = launches
    watch = _Watch(t, launches)
    try:
        with watch:
            found = call()
    finally:
        recorded.launches = None
    gradients, everything = found
    return found, None if watch.computes else _program(t, gradients, everything[:results], launches, watch)


class _Watch(TorchDispatchMode):
    """Sorts what torch does: memory without contents, constants, and whether it computes anything of other tensors."""

    def __init__(self, t: Sequence[Tensor | None], launches: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given, self.launches = [(which, tensor) for which, tensor in enumerate(t) if tensor is not None], launches
        self.computes = False
        self.fresh: list[Tensor] = []  # kept, so that no two have one address
        self.fills: list[tuple[Tensor, float]] = []
        self.copied: list[tuple[int, Tensor]] = []  # which of those given, and its copy
        self.rounded: list[tuple[Tensor, Tensor, int]] = []  # to, from, after so many launches

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch would import Dynamo, which takes a second, to keep it away

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _EMPTY:
            self.fresh.append(result)
        elif func.overloadpacket is _aten.as_strided_:
            pass  # strides of what is fresh
        elif func.overloadpacket is _aten.resize_ and not args[0].untyped_storage().resizable():
            self.fresh.append(result)  # from the pool
        elif func is _aten.fill_.Scalar and not self.launches:
            self.fills.append(args)
        elif func in _COPYING and not self.launches and result.is_contiguous() and (which := self._whole(args[0])) is not None:
            self.fresh.append(result)
            self.copied.append((which, result))
        elif func is _aten.copy_.default and self._rounds(*args[:2]):
            self.rounded.append((args[0], args[1], len(self.launches)))
        elif not _is_view(func) and (func._schema.is_mutable or self._changes(args, kwargs)):
            self.computes = True
        return result

    def _whole(self, source: Tensor) -> int | None:
        """Which of those given this is, all of its numbers in its order."""
        for which, tensor in self.given:
            same = tensor.shape == source.shape and tensor.stride() == source.stride()
            flat = tensor.numel() == source.numel() and tensor.is_contiguous() and source.is_contiguous()
            if tensor.data_ptr() == source.data_ptr() and (same or flat):
                return which
        return None

    def _rounds(self, to: Tensor, source: Tensor) -> bool:
        whole = to.numel() == source.numel() and to.is_contiguous() and source.is_contiguous()
        return whole and source.dtype is torch.float32 and _place(source) in self._fresh()

    def _fresh(self) -> set[int]:
        return {_place(tensor) for tensor in self.fresh}

    def _changes(self, *arguments: Any) -> bool:
        """Whether any of the arguments has another content, or address, in the next call of this kind."""
        places = self._fresh().union(_place(tensor) for _, tensor in self.given)
        return any(isinstance(a, Tensor) and _place(a) in places for a in tree_leaves(arguments))


_aten = torch.ops.aten
_COPYING = {_aten._to_copy.default, _aten.clone.default}
_EMPTY = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}


def _is_view(func: Any) -> bool:
    return getattr(func, "is_view", False) or func is _aten._unsafe_view.default


def _place(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _program(
    t: Sequence[Tensor | None], gradients: tuple[Tensor | None, ...], results: tuple[Tensor, ...], launches: list[Any], watch: _Watch
) -> Program | None:
    from .kernels.cpu.arguments import tensors_in
    from .kernels.cpu.launch import FLAG

    made = (*gradients, *results)
    fresh = {_place(tensor) for tensor in watch.fresh}
    bases: dict[int, tuple[int, int]] = {}
    given = [(which, tensor) for which, tensor in enumerate(t) if tensor is not None]
    for i, tensor in enumerate((*(tensor for _, tensor in given), *made)):
        if tensor is None or not tensor.numel():
            continue
        if _place(tensor) in bases or (i >= len(given) and _place(tensor) not in fresh):
            return None  # nobody could tell whose address a word is
        bases[_place(tensor)] = i, tensor.data_ptr()
    scratch, last = 0, len(given) + len(made)
    constants, steps = [], []
    for launch in launches:
        addresses = []
        for word, tensor in tensors_in(launch.arguments):
            place = _place(tensor)
            if not tensor.data_ptr():
                continue
            if place not in bases:
                if place not in fresh:
                    constants.append(tensor)
                    continue
                bases[place] = last, place - scratch
                scratch += -(-tensor.untyped_storage().nbytes() // _ALIGNED) * _ALIGNED
            base, start = bases[place]
            addresses.append((word, base, tensor.data_ptr() - start))
        steps.append(Step(launch.region.bound(launch.version, launch.tasks), array("q", launch.words), FLAG, tuple(addresses)))
    fills = []
    for filled, number in watch.fills:
        count = filled.numel()
        if count > _MOST_FILLED or not filled.is_contiguous() or filled.dtype not in _C_TYPES:
            return None
        if _place(filled) in bases:  # else no launch looks at it, nor anybody else
            base, start = bases[_place(filled)]
            fills.append((base, filled.data_ptr() - start, _C_TYPES[filled.dtype] * count, [number] * count))
    copied, rounded = [], []
    for which, copy in watch.copied:
        base, start = bases.get(_place(copy), (-1, 0))
        if base == last:
            begin, shape = copy.data_ptr() - start, t[which].shape  # type: ignore[union-attr]
            copied.append(Copied(which, begin, begin + copy.nbytes, copy.dtype, shape))
        elif base >= 0:
            return None  # it is a result
    for to, source, when in watch.rounded:
        found = _which(made, to)
        base, start = bases.get(_place(source), (-1, 0))
        if found is None or base != last or when < len(launches):
            return None
        begin = source.data_ptr() - start
        rounded.append(Rounded(found, begin, begin + source.nbytes))
    if any(tensor is not None and torch.empty_like(tensor, device="meta").stride() != tensor.stride() for tensor in made):
        return None
    return Program(
        tuple((which, tensor.element_size(), extent(tensor) * tensor.element_size()) for which, tensor in given),
        tuple(None if tensor is None else _maker(tensor) for tensor in made),
        len(gradients),
        tuple(fills),
        scratch,
        tuple(copied),
        tuple(steps),
        tuple(rounded),
        tuple(constants),
    )


def _maker(t: Tensor) -> Callable[[], Tensor]:
    """Makes tensors like this one, from where it came. torch.empty_like reads one without memory faster than sizes and strides."""
    like = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=_CPU)
    like.untyped_storage().resize_(0)
    return partial(memory.empty_like if t.nbytes >= config.pool_min_bytes else torch.empty_like, like)


def _which(made: Sequence[Tensor | None], whole: Tensor) -> int | None:
    """Which of those made this is, whole."""
    found = [i for i, tensor in enumerate(made) if tensor is not None and tensor.numel() and _place(tensor) == _place(whole)]
    return found[0] if len(found) == 1 and made[found[0]].numel() == whole.numel() else None  # type: ignore[union-attr]


class _Scratch(NamedTuple):
    memory: Tensor
    size: int  # bytes
    address: int


class _Mine(threading.local):
    scratch = _Scratch(torch.empty(0, dtype=torch.uint8, device=_CPU), 0, 0)


_mine, _NONE = _Mine(), _Mine.scratch


def _take_scratch(size: int) -> _Scratch:
    """So many bytes, those that this thread had last time if they are enough: fresh memory would cost more, in page faults, than kernels.
    Nobody else has them until they are put back: a finalizer or a signal handler may call a loss between two launches."""
    scratch, _mine.scratch = _mine.scratch, _NONE
    if scratch.size >= size:
        return scratch
    fresh = memory.empty((size,), torch.uint8, _CPU)
    return _Scratch(fresh, size, fresh.data_ptr())


def _put_back(scratch: _Scratch) -> None:
    if scratch.size < config.pool_min_bytes:  # else the pool keeps it
        _mine.scratch = scratch
