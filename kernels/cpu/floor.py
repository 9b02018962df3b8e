"""The floor: two kernels that compute nothing, one that reads N x C numbers and one that also writes as many, past the caches where a
gradient would go past them. On the same threads, in the same memory, they say what this machine makes every loss pay. The benchmark times
them in the same rounds as the losses; nobody else calls them, and on CUDA the copy rate says as much.
"""

from typing import Any, NamedTuple

import torch
from numba import njit
from torch import Tensor

from .arguments import Computed, Known, Stored, arguments
from .inline import INLINE
from .launch import next_task, region
from .memory import load, store
from .prefetch import prefetch_four
from .rows import STREAM_BYTES
from .simd import lane_sum, lanes_of, splat
from .stream import stream

TASK = 1 << 16  # numbers
VECTOR_BYTES = 64


class Read(NamedTuple):
    source: Stored
    sums: Computed  # one a task: numbers that nobody wants are not read
    size: int


class ReadAndWrite(NamedTuple):
    source: Stored
    sink: Stored
    size: int
    past_caches: Known


def sums_for(source: Tensor) -> Tensor:
    """Where `read` puts a sum for each task."""
    return torch.empty(_tasks(_as_float32(source)), dtype=torch.float32, device="cpu")


def read(source: Tensor, sums: Tensor) -> None:
    """Read all of a contiguous tensor, whatever its dtype, as float32."""
    words = _as_float32(source)
    _read(_tasks(words), Read(source=words, sums=sums, size=words.numel()))


def read_and_write(source: Tensor, sink: Tensor) -> None:
    """Write a contiguous tensor's bytes to another of its size."""
    words, copied = _as_float32(source), _as_float32(sink)
    past_caches = int(copied.nbytes >= STREAM_BYTES and copied.data_ptr() % VECTOR_BYTES == 0)
    _read_and_write(_tasks(words), ReadAndWrite(source=words, sink=copied, size=words.numel(), past_caches=past_caches))


def _as_float32(tensor: Tensor) -> Tensor:
    """Its bytes, less up to three that make no float32."""
    flat = tensor.view(-1)
    return flat[: flat.numel() * flat.element_size() // 4 * 4 // flat.element_size()].view(torch.float32)


def _tasks(words: Tensor) -> int:
    return -(-words.numel() // TASK)


@region(Read)
def _read(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        a.sums[task] = _sum(a.source, task * TASK, min(a.size, (task + 1) * TASK))
        task = next_task(block)


@njit(**INLINE)
def _sum(source: Any, first: Any, last: Any) -> Any:
    lanes = lanes_of(source)
    whole = last - (last - first) % (4 * lanes)
    s = splat(0.0, source)
    s0, s1, s2, s3 = s, s, s, s  # four additions at a time: they must not wait for each other
    for i in range(first, whole, 4 * lanes):
        prefetch_four(source, i)
        s0 = s0 + load(source, i, 1, lanes, 0.0)
        s1 = s1 + load(source, i + lanes, 1, lanes, 0.0)
        s2 = s2 + load(source, i + 2 * lanes, 1, lanes, 0.0)
        s3 = s3 + load(source, i + 3 * lanes, 1, lanes, 0.0)
    for i in range(whole, last, lanes):
        s0 = s0 + load(source, i, 1, last - i, 0.0)
    return lane_sum((s0 + s1) + (s2 + s3))


@region(ReadAndWrite)
def _read_and_write(block: Any) -> None:
    a = arguments(block)
    task = next_task(block)
    while task >= 0:
        first, last = task * TASK, min(a.size, (task + 1) * TASK)
        lanes = lanes_of(a.source)
        whole = last - (last - first) % (4 * lanes)
        for i in range(first, whole, 4 * lanes):
            prefetch_four(a.source, i)
            for k in range(0, 4 * lanes, lanes):
                stream(a.sink, i + k, load(a.source, i + k, 1, lanes, 0.0), a.past_caches)
        for i in range(whole, last, lanes):
            store(a.sink, i, 1, last - i, load(a.source, i, 1, last - i, 0.0))
        task = next_task(block)
