"""Where gradients on CPU live.

A fresh 500 MB tensor costs more in page faults than the whole loss costs in arithmetic. So large gradients come from anonymous memory
that asks the kernel for huge pages, and that memory is kept for the next gradient of that size once nothing refers to it any more:
`fastloss.config.pool_max_bytes = 0` turns this off, `fastloss.memory.pool_bytes()` says how much is kept, `empty_pool()` frees it.

A block comes back only when the last tensor, view, NumPy array or storage on it has died, since all of them keep `exporter` alive.

Nothing here takes a lock: a fork in the middle of anything leaves a child that can allocate, and the garbage collector may give a block
back at any moment. A list's own operations are atomic, and whoever removes a block from it has it.
"""

import math
import mmap
import weakref

import numpy as np
import torch
from torch import Tensor

from . import config

_HUGE_PAGE = 1 << 21
_idle: list[mmap.mmap] = []
_refused: str | None = None


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor."""
    size = math.prod(shape) * dtype.itemsize
    pooled = 0 < size >= config.pool_min_bytes and device.type == "cpu" and config.pool_max_bytes > 0 and hasattr(mmap, "MADV_HUGEPAGE")
    block = (_take(size) or _map(size)) if pooled else None
    if block is None:
        return torch.empty(shape, dtype=dtype, device=device)
    exporter = np.frombuffer(block, np.uint8, size)
    weakref.finalize(exporter, _give_back, block).atexit = False
    return torch.frombuffer(exporter, dtype=dtype).resize_(shape)  # no view: autograd lets nobody edit a view that a Function made


def empty_like(tensor: Tensor) -> Tensor:
    """The same like `tensor`, with its strides where they are dense, as torch.empty_like has it."""
    fresh = empty(tensor.shape, tensor.dtype, tensor.device)
    return fresh if tensor.is_contiguous() else fresh.as_strided_(tensor.shape, torch.empty_like(tensor, device="meta").stride())


def pool_bytes() -> int:
    """Bytes of freed gradient memory that the pool keeps."""
    return sum(len(block) for block in _idle.copy())


def empty_pool() -> None:
    """Give all kept memory back to the system."""
    _idle.clear()


def huge_pages_refused() -> str | None:
    """What the kernel said when it was asked for huge pages and refused; None if it did not refuse, or was not asked yet."""
    return _refused


def _map(size: int) -> mmap.mmap | None:
    """Fresh memory. None if the system has none, also without what the pool keeps: torch then says so in its own words."""
    for _ in range(2):
        try:
            # private: after a fork, parent and child must not see each other's gradients
            block = mmap.mmap(-1, -(-size // _HUGE_PAGE) * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError):
            empty_pool()
        else:
            _ask_for_huge_pages(block)
            return block
    return None


def _ask_for_huge_pages(block: mmap.mmap) -> None:
    """A kernel that refuses (built without them, gVisor) is not asked again: ordinary pages that are kept still save their page faults."""
    global _refused
    if _refused is None:
        try:
            block.madvise(mmap.MADV_HUGEPAGE)
        except OSError as problem:
            _refused = str(problem)


def _take(size: int) -> mmap.mmap | None:
    """A kept block that fits and wastes less than a quarter of itself."""
    for block in _idle.copy():
        if size <= len(block) <= size + size // 4 + _HUGE_PAGE:
            try:
                _idle.remove(block)
            except ValueError:  # another thread was faster
                continue
            return block
    return None


def _give_back(block: mmap.mmap) -> None:
    _idle.append(block)
    while pool_bytes() > config.pool_max_bytes:
        try:
            _idle.pop(0)
        except IndexError:
            return
