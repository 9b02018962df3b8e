"""The launches of a call on CPU, recorded once for each kind of call, and made again for the next one of that kind with new addresses.

What a small call costs is Python: looking at shapes and strides, choosing a walk, allocating, packing. All of it depends on the kind of
call alone (`calls`). So the launches of one call become a program: which words of which argument blocks are addresses, and of what. The
same words make the same bits. That tensors fit their launches was looked at when the call was recorded; whether they still have their
memory is asked every time.

While a call is recorded, a dispatch mode sees what torch does beside the launches. Memory without contents, views, and constants of this
kind of call may be made, and a loss may be rounded at the end; a call that computes anything else by torch has no program.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .storage import extent

_ALIGNED = 64  # bytes
_CPU = torch.device("cpu")

Found = tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]


class Step(NamedTuple):
    """One launch."""

    region: Any
    version: tuple[Any, ...]
    tasks: int
    block: Any  # a ctypes array of words
    words: bytes
    addresses: tuple[tuple[int, int, int], ...]  # a word, which of the tensors it points into, and how far


class Program(NamedTuple):
    """Gradients and results of one kind of call, from its tensors. Addresses point into: the tensors given, those made, the scratch."""

    given: tuple[int, ...]  # bytes from the first element to the end of the last, of each tensor; -1 for None
    made: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None, ...]  # shape, strides, dtype
    gradients: int  # the first so many of those made
    fills: tuple[tuple[int, float], ...]  # which of those made, and with what, before the launches
    scratch: int  # bytes
    steps: tuple[Step, ...]
    rounded: tuple[tuple[int, int], ...]  # which of those made is, in the end, the float32 number so far into the scratch
    constants: tuple[Tensor, ...]  # kept alive: the words hold their addresses

    def run(self, t: Sequence[Tensor | None]) -> Found | None:
        """None if something is wrong with the numbers in the tensors, or with their memory; the call as it was recorded then says what."""
        bases = []
        for tensor, size in zip(t, self.given, strict=True):
            if tensor is None:
                bases.append(0)
                continue
            if tensor.storage_offset() * tensor.element_size() + size > tensor.untyped_storage().nbytes():
                return None
            bases.append(tensor.data_ptr())
        made = [None if m is None else torch.empty_strided(m[0], m[1], dtype=m[2], device=_CPU) for m in self.made]
        for which, number in self.fills:
            made[which].fill_(number)  # type: ignore[union-attr]
        bases += [0 if tensor is None else tensor.data_ptr() for tensor in made]
        scratch = _take_scratch(self.scratch)
        bases.append(scratch.data_ptr())
        for step in self.steps:
            block = step.block.from_buffer_copy(step.words)
            for word, base, distance in step.addresses:
                block[word] = bases[base] + distance
            if step.region.run(step.version, step.tasks, block):
                return None
        for which, distance in self.rounded:
            number = ctypes.c_float.from_address(bases[-1] + distance).value
            made[which].copy_(torch.tensor(number, dtype=torch.float32, device=_CPU))  # type: ignore[union-attr]
        _mine.scratch = scratch
        return tuple(made[: self.gradients]), tuple(made[self.gradients :])  # type: ignore[arg-type]


def record(call: Callable[[], Found], t: Sequence[Tensor | None]) -> tuple[Found, Program | None]:
    """What the call finds, and its program if it can have one."""
    from .kernels.cpu.launch import recorded

    launches: list[Any] = []
    recorded.launches = launches
    watch = _Watch(t, launches)
    try:
        with watch:
            found = call()
    finally:
        recorded.launches = None
    return found, None if watch.computes else _program(t, *found, launches, watch)


class _Watch(TorchDispatchMode):
    """Sorts what torch does: memory without contents, constants, and whether it computes anything of other tensors."""

    def __init__(self, t: Sequence[Tensor | None], launches: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given, self.launches = [tensor for tensor in t if tensor is not None], launches
        self.computes = False
        self.fresh: list[Tensor] = []  # kept, so that no two have one address
        self.fills: list[tuple[Tensor, float]] = []
        self.copies: list[tuple[Tensor, Tensor, int]] = []  # to, from, after so many launches

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch would import Dynamo, which takes a second, to keep it away

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _EMPTY:
            self.fresh.append(result)
        elif func.overloadpacket is _aten.as_strided_:
            pass  # strides of what is fresh
        elif func is _aten.fill_.Scalar and not self.launches:
            self.fills.append(args)
        elif func is _aten.copy_.default and args[0].numel() == 1 and args[1].dtype is torch.float32 and _place(args[1]) in self._fresh():
            self.copies.append((args[0], args[1], len(self.launches)))
        elif not getattr(func, "is_view", False) and (func._schema.is_mutable or self._changes(args, kwargs)):
            self.computes = True
        return result

    def _fresh(self) -> set[int]:
        return {_place(tensor) for tensor in self.fresh}

    def _changes(self, *arguments: Any) -> bool:
        """Whether any of the arguments has another content, or address, in the next call of this kind."""
        places = self._fresh().union(_place(tensor) for tensor in self.given)
        return any(isinstance(a, Tensor) and _place(a) in places for a in tree_leaves(arguments))


_aten = torch.ops.aten
_EMPTY = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}


def _place(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _program(
    t: Sequence[Tensor | None], gradients: tuple[Tensor | None, ...], results: tuple[Tensor, ...], launches: list[Any], watch: _Watch
) -> Program | None:
    from .kernels.cpu.arguments import tensors_in

    made = (*gradients, *results)
    fresh = {_place(tensor) for tensor in watch.fresh}
    bases: dict[int, tuple[int, int]] = {}
    for i, tensor in enumerate((*t, *made)):
        if tensor is None or not tensor.numel():
            continue
        if _place(tensor) in bases or (i >= len(t) and _place(tensor) not in fresh):
            return None  # nobody could tell whose address a word is
        bases[_place(tensor)] = i, tensor.data_ptr()
    fills = []
    for filled, number in watch.fills:
        which = _which(made, filled)
        if which is None:
            return None
        fills.append((which, number))
    scratch, last = 0, len(t) + len(made)
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
        block = ctypes.c_int64 * (len(launch.words) // 8)
        steps.append(Step(launch.region, launch.version, launch.tasks, block, launch.words, tuple(addresses)))
    rounded = []
    for to, source, when in watch.copies:
        which = _which(made, to)
        base, start = bases.get(_place(source), (-1, 0))
        if which is None or base != last or when < len(launches):
            return None
        rounded.append((which, source.data_ptr() - start))
    return Program(
        tuple(-1 if tensor is None else extent(tensor) * tensor.element_size() for tensor in t),
        tuple(None if tensor is None else (tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in made),
        len(gradients),
        tuple(fills),
        scratch,
        tuple(steps),
        tuple(rounded),
        tuple(constants),
    )


def _which(made: Sequence[Tensor | None], whole: Tensor) -> int | None:
    """Which of those made this is, whole."""
    found = [i for i, tensor in enumerate(made) if tensor is not None and tensor.numel() and _place(tensor) == _place(whole)]
    return found[0] if len(found) == 1 and made[found[0]].numel() == whole.numel() else None  # type: ignore[union-attr]


_NONE = torch.empty(0, dtype=torch.uint8, device=_CPU)


class _Mine(threading.local):
    scratch = _NONE


_mine = _Mine()


def _take_scratch(size: int) -> Tensor:
    """So many bytes, those that this thread had last time if they are enough: fresh memory would cost more, in page faults, than kernels.
    Nobody else has them until they are put back: a finalizer or a signal handler may call a loss between two launches."""
    scratch, _mine.scratch = _mine.scratch, _NONE
    return scratch if scratch.numel() >= size else torch.empty(size, dtype=torch.uint8, device=_CPU)
