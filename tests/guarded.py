"""Tensors between pages that may not be touched, in pages that may not be written, with random strides and offsets."""

import contextlib
import ctypes
import mmap
import random
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
NOTHING, READ, WRITE = 0, 1, 3  # PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE: the same numbers on all systems that have them


def _protect(address: int, size: int, what: int) -> None:
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), what):
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded(count: int, dtype: torch.dtype, at_the_end: bool) -> Tensor:
    """[count] numbers that are NaN, or -1, right before (else right behind) a page that may not be touched.

    The memory lives as long as anything that refers to it.
    """
    size = count * dtype.itemsize
    pages = max(1, -(-size // PAGE)) * PAGE
    block = mmap.mmap(-1, pages + 2 * PAGE)
    block[PAGE : PAGE + pages] = b"\xff" * pages
    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    _protect(address, PAGE, NOTHING)
    _protect(address + PAGE + pages, PAGE, NOTHING)
    if count == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(block, dtype=dtype, count=count, offset=PAGE + (pages - size if at_the_end else 0))


def read_only(tensor: Tensor, what: int = READ) -> Tensor:
    """Whoever writes into this storage from now on dies."""
    if tensor.untyped_storage().nbytes():
        start = tensor.untyped_storage().data_ptr()
        first = start // PAGE * PAGE
        _protect(first, start + tensor.untyped_storage().nbytes() - first, what)
    return tensor


class Layout:
    """Random strides and offsets, and tensors that have them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def strides(self, shape: tuple[int, ...]) -> list[int]:
        """Of dimensions in any order, with gaps, again and again (0), or overlapping; or none of that."""
        order, strides, step = list(range(len(shape))), [0] * len(shape), 1
        odd = self.random.random() < 0.65
        if odd and self.random.random() < 0.5:
            self.random.shuffle(order)
        if odd:
            step = self.random.choice([1, 1, 1, 2, 3])
        for dim in reversed(order):
            if odd and self.random.random() < 0.12:
                continue
            strides[dim] = step
            if not odd or self.random.random() < 0.95:  # else the next dimension is a sliding window over this one
                step = step * max(1, shape[dim]) + (self.random.choice([0, 0, 0, 1, 3, 5]) if odd else 0)
        return strides

    def place(self, shape: tuple[int, ...], dtype: torch.dtype, values: Callable[[int], Tensor]) -> Tensor:
        """A tensor whose numbers are `values(count)`, cast, wherever it has some; not yet read-only."""
        strides = self.strides(shape)
        before = self.random.choice([0, 0, 0, 1, 2, 7])
        reach = torch.zeros(1, dtype=torch.long)
        for size, stride in zip(shape, strides, strict=True):
            reach = (reach[:, None] + torch.arange(size) * stride).reshape(-1)
        count = int(reach.max()) + 1 if reach.numel() else 0
        storage = guarded(before + count, dtype, self.random.random() < 0.7)
        if count:
            storage[before:][reach] = values(count).to(dtype)[reach]
        # no view of anything: autograd must not know of the storage's other numbers
        return torch.empty(0, dtype=dtype).set_(storage.untyped_storage(), storage.storage_offset() + before, shape, strides)


def overlaps(tensor: Tensor) -> bool:
    """Whether two elements might be one in memory."""
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


@contextlib.contextmanager
def guarded_results(layout: Layout) -> Iterator[None]:
    """Within this, what Python code allocates lies between guard pages, too."""

    def moved(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*args: Any, **options: Any) -> Tensor:
            fresh = allocate(*args, **options)
            if fresh.device.type != "cpu" or fresh.numel() == 0 or overlaps(fresh) or type(fresh) is not Tensor:
                return fresh
            count = sum((size - 1) * stride for size, stride in zip(fresh.shape, fresh.stride(), strict=True)) + 1
            storage = guarded(count, fresh.dtype, layout.random.random() < 0.7)
            return fresh.new_tensor(()).set_(storage.untyped_storage(), storage.storage_offset(), fresh.shape, fresh.stride())

        return allocated

    with contextlib.ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, moved(getattr(owner, name))))
        yield
