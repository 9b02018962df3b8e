"""Where gradients on CPU live.

A fresh 500 MB tensor costs more in page faults than the whole loss costs in arithmetic. So large gradients come from anonymous memory
that asks the kernel for huge pages, and that memory is kept for the next gradient of that size once nothing refers to it any more:
`fastloss.config.pool_max_bytes = 0` turns this off, `fastloss.memory.pool_bytes()` says how much is kept, `empty_pool()` frees it.

A block comes back only when the last tensor, view, NumPy array or storage on it has died, since all of them keep `exporter` alive.
"""

import math
import mmap
import threading
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

from . import config

_HUGE_PAGE = 1 << 21
_idle: deque[mmap.mmap] = deque()  # appending is atomic, so a finalizer may run at any moment, in any thread
_lock = threading.Lock()


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < config.pool_min_bytes or config.pool_max_bytes <= 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    block = _take(size) or _map(size)
    exporter = np.frombuffer(block, np.uint8, size)
    weakref.finalize(exporter, _give_back, block).atexit = False
    return torch.from_numpy(exporter).view(dtype).view(shape)


def empty_like(tensor: Tensor) -> Tensor:
    """The same like `tensor`, with its strides where they are dense, as torch.empty_like has it."""
    fresh = empty(tensor.shape, tensor.dtype, tensor.device)
    return fresh if tensor.is_contiguous() else fresh.as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride())


def pool_bytes() -> int:
    """Bytes of freed gradient memory that the pool keeps."""
    return sum(len(block) for block in list(_idle))


def empty_pool() -> None:
    """Give all kept memory back to the system."""
    with _lock:
        _idle.clear()


def _map(size: int) -> mmap.mmap:
    # private: after a fork, parent and child must not see each other's gradients
    block = mmap.mmap(-1, -(-size // _HUGE_PAGE) * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _take(size: int) -> mmap.mmap | None:
    """A kept block that fits and wastes less than a quarter of itself."""
    with _lock:
        for block in list(_idle):
            if size <= len(block) <= size + size // 4 + _HUGE_PAGE:
                try:
                    _idle.remove(block)
                except (ValueError, IndexError):  # a finalizer, which takes no lock, was faster
                    continue
                return block
    return None


def _give_back(block: mmap.mmap) -> None:
    # no lock here: the garbage collector may call this while this very thread holds it
    _idle.append(block)
    while pool_bytes() > config.pool_max_bytes:
        try:
            _idle.popleft()
        except IndexError:
            return
