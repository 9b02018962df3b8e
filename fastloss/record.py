"""A call on CPU, watched while it is made, as a program to repeat (`replay`).

A dispatch mode sees what torch does beside the launches. Memory without contents, views, and constants of this kind of call may be made,
tensors may be copied in another dtype or order before all launches, and losses rounded after them; a call that computes anything else by
torch has no program.
"""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import config, memory
from .replay import Copied, Found, Program, Rounded, Step
from .storage import extent

_ALIGNED = 64  # bytes
_MOST_FILLED = 2  # numbers
_CPU = torch.device("cpu")
_C_TYPES = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}


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


class _Places:
    """What a program's addresses point into: the tensors given, those made, and, laid out one after the other, the scratch."""

    def __init__(self, tensors: Sequence[Tensor | None], fresh: set[int]) -> None:
        self.tensors, self.fresh, self.scratch, self.last = tensors, fresh, 0, len(tensors)
        self._bases = {_place(t): (i, t.data_ptr()) for i, t in enumerate(tensors) if t is not None and t.numel()}

    def clear(self, given: int) -> bool:
        """Whether every address belongs to one of them, and all but the first so many were made by this call."""
        used = [t for t in self.tensors if t is not None and t.numel()]
        made = [t for t in self.tensors[given:] if t is not None and t.numel()]
        return len(used) == len(self._bases) and all(_place(t) in self.fresh for t in made)

    def find(self, t: Tensor) -> tuple[int, int] | None:
        """Which of them, and how far into it; None if it is none of them."""
        base, start = self._bases.get(_place(t), (-1, 0))
        return None if base < 0 else (base, t.data_ptr() - start)

    def find_or_add(self, t: Tensor) -> tuple[int, int] | None:
        """The same for memory of the call's own, which is scratch if it is nothing else; None for a constant."""
        if _place(t) not in self._bases and _place(t) in self.fresh:
            self._bases[_place(t)] = self.last, _place(t) - self.scratch
            self.scratch += -(-t.untyped_storage().nbytes() // _ALIGNED) * _ALIGNED
        return self.find(t)

    def find_scratch(self, t: Tensor) -> int | None:
        """How far into the scratch."""
        found = self.find(t)
        return found[1] if found is not None and found[0] == self.last else None


def _program(
    t: Sequence[Tensor | None], gradients: tuple[Tensor | None, ...], results: tuple[Tensor, ...], launches: list[Any], watch: _Watch
) -> Program | None:
    made = (*gradients, *results)
    places = _Places((*(tensor for _, tensor in watch.given), *made), {_place(tensor) for tensor in watch.fresh})
    if not places.clear(len(watch.given)):
        return None
    steps, constants = _steps(launches, places)
    fills, copied, rounded = _fills(watch, places), _copied(t, watch, places), _rounded(made, watch, places)
    if fills is None or copied is None or rounded is None:
        return None
    if any(tensor is not None and torch.empty_like(tensor, device="meta").stride() != tensor.stride() for tensor in made):
        return None
    return Program(
        tuple((which, tensor.element_size(), extent(tensor) * tensor.element_size()) for which, tensor in watch.given),
        tuple(None if tensor is None else _maker(tensor) for tensor in made),
        len(gradients),
        fills,
        places.scratch,
        copied,
        steps,
        rounded,
        constants,
    )


def _steps(launches: list[Any], places: _Places) -> tuple[tuple[Step, ...], tuple[Tensor, ...]]:
    """The launches; and the constants that they look at."""
    from .kernels.cpu.arguments import tensors_in
    from .kernels.cpu.launch import FLAG

    steps, constants = [], []
    for launch in launches:
        addresses = []
        for word, tensor in tensors_in(launch.arguments):
            if not tensor.data_ptr():
                continue
            place = places.find_or_add(tensor)
            if place is None:
                constants.append(tensor)
            else:
                addresses.append((word, *place))
        steps.append(Step(launch.region.bound(launch.version, launch.tasks), array("q", launch.words), FLAG, tuple(addresses)))
    return tuple(steps), tuple(constants)


def _fills(watch: _Watch, places: _Places) -> tuple[tuple[int, int, Any, list[float]], ...] | None:
    found = []
    for filled, number in watch.fills:
        count, place = filled.numel(), places.find(filled)
        if count > _MOST_FILLED or not filled.is_contiguous() or filled.dtype not in _C_TYPES:
            return None
        if place is not None:  # else no launch looks at it, nor anybody else
            found.append((*place, _C_TYPES[filled.dtype] * count, [number] * count))
    return tuple(found)


def _copied(t: Sequence[Tensor | None], watch: _Watch, places: _Places) -> tuple[Copied, ...] | None:
    found = []
    for which, copy in watch.copied:
        begin, given = places.find_scratch(copy), t[which]
        if begin is not None and given is not None:
            found.append(Copied(which, begin, begin + copy.nbytes, copy.dtype, given.shape))
        elif places.find(copy) is not None:
            return None  # it is a result
    return tuple(found)


def _rounded(made: Sequence[Tensor | None], watch: _Watch, places: _Places) -> tuple[Rounded, ...] | None:
    found = []
    for to, source, when in watch.rounded:
        which, begin = _which(made, to), places.find_scratch(source)
        if which is None or begin is None or when < len(watch.launches):
            return None
        found.append(Rounded(which, begin, begin + source.nbytes))
    return tuple(found)


def _which(made: Sequence[Tensor | None], whole: Tensor) -> int | None:
    """Which of those made this is, whole."""
    for i, tensor in enumerate(made):
        if tensor is not None and tensor.numel() and _place(tensor) == _place(whole):
            return i if tensor.numel() == whole.numel() and tensor.is_contiguous() else None
    return None


def _maker(t: Tensor) -> Callable[[], Tensor]:
    """Makes tensors like this one, from where it came. torch.empty_like reads one without memory faster than sizes and strides."""
    like = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=_CPU)
    like.untyped_storage().resize_(0)
    return partial(memory.empty_like if t.nbytes >= config.pool_min_bytes else torch.empty_like, like)
