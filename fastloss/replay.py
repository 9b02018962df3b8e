"""The launches of a call on CPU, made again for the next one of its kind with new addresses.

What a small call costs is Python: looking at shapes and strides, choosing a walk, allocating, packing. All of it depends on the kind of
call alone (`calls`). So the launches of one call become a program (`record`): which words of which argument blocks are addresses, and of
what. The same words make the same bits. That tensors fit their launches was looked at when the call was recorded; whether they still have
their memory is asked every time.
"""

import ctypes
import threading
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import config, memory

_NUMBER = 4  # bytes of a float32
_CPU = torch.device("cpu")

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
