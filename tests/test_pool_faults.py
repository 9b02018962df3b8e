"""The pool on systems that refuse: huge pages, memory; and forks in the middle of its work. Nothing here is torch's to mind."""

import errno
import gc
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastloss
from fastloss import memory

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.fixture(autouse=True, scope="module")
def little_to_collect() -> Iterator[None]:
    """A collection looks at what these tests made, not at all that torch and Numba did."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fastloss.config, "pool_min_bytes", 1 << 12)
    monkeypatch.setattr(memory, "_refused", None)
    gc.collect()
    memory.empty_pool()
    yield
    gc.collect()
    memory.empty_pool()


def buffer(size: int) -> torch.Tensor:
    return memory.empty((size,), torch.uint8, CPU)


def madvise_fails(monkeypatch: pytest.MonkeyPatch, code: int) -> list[int]:
    """A kernel whose madvise refuses huge pages; how often it was asked is the length of the list."""
    asked = []

    class Refusing(mmap.mmap):
        def madvise(self, option: int, *where: int) -> None:
            asked.append(option)
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(mmap, "mmap", Refusing)
    return asked


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENOMEM], ids=errno.errorcode.get)
def test_a_kernel_without_huge_pages_is_asked_once(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = madvise_fails(monkeypatch, code)
    assert memory.huge_pages_refused() is None
    first, second = buffer(4 * MIB), buffer(9 * MIB)
    assert asked == [mmap.MADV_HUGEPAGE]
    assert os.strerror(code) in str(memory.huge_pages_refused())
    address = first.data_ptr()
    del first
    assert buffer(4 * MIB).data_ptr() == address  # ordinary pages are worth keeping too
    assert second.fill_(1).all()


TRAIN: dict[str, Any] = {
    "cross_entropy": lambda f, x, y: f.cross_entropy(x, y),
    "per row": lambda f, x, y: f.cross_entropy(x, y, reduction="none").square().sum(),
    "softmax": lambda f, x, y: f.softmax(x, dim=1).square().sum(),
    "log_softmax": lambda f, x, y: f.log_softmax(x, dim=1).square().sum(),
    "bce_with_logits": lambda f, x, y: f.binary_cross_entropy_with_logits(x, F.one_hot(y, x.shape[1]).to(x)),
}


@pytest.mark.parametrize("system", ["madvise refuses", "mmap refuses", "no madvise"])
@pytest.mark.parametrize("name", TRAIN)
def test_every_loss_trains_on_a_lesser_system(name: str, system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if system == "madvise refuses":
        madvise_fails(monkeypatch, errno.EINVAL)
    elif system == "mmap refuses":
        mmap_fails(monkeypatch, times=1 << 30)
    else:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    logits, target = torch.randn(2048, 60), torch.randint(60, (2048,))
    gradients = []
    for library in (fastloss, F):
        leaf = logits.clone().requires_grad_()
        TRAIN[name](library, leaf, target).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def mmap_fails(monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """A system without memory for the next `times` maps; the sizes that were asked for."""
    asked: list[int] = []

    def fails(file: int, size: int, **flags: int) -> mmap.mmap:
        asked.append(size)
        if len(asked) <= times:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return real(file, size, **flags)

    real = mmap.mmap
    monkeypatch.setattr(mmap, "mmap", fails)
    return asked


def test_out_of_memory_empties_the_pool_and_tries_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = buffer(4 * MIB)
    del kept
    assert memory.pool_bytes() == 4 * MIB
    asked = mmap_fails(monkeypatch, times=1)
    assert buffer(64 * MIB).fill_(3).all()
    assert asked == [64 * MIB] * 2
    assert memory.pool_bytes() == 64 * MIB


def test_what_the_pool_cannot_map_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = mmap_fails(monkeypatch, times=1 << 30)
    assert buffer(4 * MIB).fill_(3).all()
    assert asked == [4 * MIB] * 2
    assert memory.pool_bytes() == 0


@pytest.mark.parametrize("shape", [(1 << 25, 1 << 25), (1 << 31, 1 << 31)], ids=str)
@pytest.mark.parametrize("function", ["softmax", "log_softmax"])
def test_out_of_memory_is_torchs_error(function: str, shape: tuple[int, int]) -> None:
    """More than an address space, more than the largest size."""
    logits = torch.zeros(1).expand(shape)
    said = []
    for library in (F, fastloss):
        with pytest.raises(RuntimeError) as caught:
            getattr(library, function)(logits, dim=1)
        said.append(str(caught.value))
    assert said[1] == said[0]


LIMITED = """
import resource, torch
from fastloss import config, memory
MIB, cpu = 1 << 20, torch.device("cpu")
def buffer(size):
    return memory.empty((size,), torch.uint8, cpu)
try:
    torch.empty(1 << 60)
except RuntimeError as problem:
    words = str(problem).partition(" bytes")[0].replace(str(1 << 62), str(800 * MIB))
kept = [buffer(200 * MIB), buffer(200 * MIB)]
kept.clear()
assert memory.pool_bytes() == 400 * MIB
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100 * MIB, -1))
larger = buffer(300 * MIB)  # fits only in place of what the pool keeps
assert memory.pool_bytes() == 0
larger[-1] = 1
try:
    buffer(800 * MIB)
except RuntimeError as problem:
    assert words in str(problem), problem
print("fine")
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux's limits")
def test_under_ulimit() -> None:
    assert run(LIMITED) == "fine"


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 5, 3), (4, 5, 0)], ids=str)
def test_empty_tensors_where_every_size_is_pooled(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastloss.config, "pool_min_bytes", 0)
    assert memory.empty(shape, torch.float32, CPU).shape == shape
    assert memory.empty_like(torch.empty(shape).transpose(0, 1)).shape == torch.empty(shape).transpose(0, 1).shape
    found = []
    for library in (fastloss, F):
        leaf = torch.zeros(shape, requires_grad=True)
        losses = [library.softmax(leaf, dim=1), library.binary_cross_entropy_with_logits(leaf, leaf.detach(), reduction="none")]
        if shape[1]:
            losses.append(library.cross_entropy(leaf, leaf.detach()[:, 0].long(), reduction="none"))
        torch.cat([loss.flatten() for loss in losses]).sum().backward()
        found.append([*losses, leaf.grad])
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


# A thread walks through the pool line by line; at each line the process forks, and the child allocates.
FORKS = """
import os, signal, sys, threading, torch
from fastloss import config, memory
config.pool_min_bytes = 1
at_a_line, forked, lines = threading.Semaphore(0), threading.Semaphore(0), []
def allocate(size=1 << 16):
    memory.empty((size,), torch.uint8, torch.device("cpu"))
def trace(frame, event, argument):
    if frame.f_code.co_filename != memory.__file__:
        return None
    if event == "line":
        lines.append(frame.f_lineno)
        at_a_line.release()
        forked.acquire()
    return trace
def walk():
    sys.settrace(trace)
    allocate()  # a new block
    allocate()  # the same again
    config.pool_max_bytes = 1 << 20
    allocate(1 << 24)  # too large to be kept
    memory.empty_pool()
    sys.settrace(None)
    lines.append(None)
    at_a_line.release()
threading.Thread(target=walk, daemon=True).start()
while True:
    at_a_line.acquire()
    if lines[-1] is None:
        break
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        allocate()
        allocate()
        memory.empty_pool()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        print(f"forked at line {lines[-1]} of memory.py: the child ends with {status}")
        os._exit(1)
    forked.release()
print("fine" if len(set(lines)) > 15 else f"only these lines: {lines}")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_can_allocate_wherever_another_thread_was_at_the_fork() -> None:
    assert run(FORKS) == "fine"


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", script], capture_output=True, text=True, timeout=120
    )
    return done.stdout.strip() or done.stderr
