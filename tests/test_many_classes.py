"""More classes than a 32-bit number counts."""

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastloss.backends import kernels
from fastloss.kernels.cpu.arguments import Int64, Stored, arguments
from fastloss.kernels.cpu.gradient import RowNumbers, gradient_of_row
from fastloss.kernels.cpu.launch import next_task, region
from fastloss.kernels.cpu.memory import load_classes, offset
from fastloss.kernels.cpu.rows import Lanes, walk
from fastloss.kernels.cpu.simd import lanes_of, splat
from fastloss.kernels.groups import Rows, Smoothing


class Part(NamedTuple):
    logits: Stored
    target: Int64
    dlogits: Stored
    begin: int
    class_stride: int
    g: float
    scale: float


@region(Part)
def _part_of_a_row(block: Any) -> None:
    """The gradient of 128 classes from `begin` on, of so many that the rest need not be in memory."""
    a = arguments(block)
    while next_task(block) >= 0:
        y = load_classes(a.target, 0, 0, lanes_of(a.logits), -100, splat(0.0, a.logits))
        x = Lanes(offset(a.logits, -a.begin * a.class_stride), a.class_stride, a.class_stride, 1, 1)
        dx = Lanes(offset(a.dlogits, -a.begin * a.class_stride), a.class_stride, a.class_stride, 1, 1)
        r = RowNumbers(splat(0.0, x.at), y, a.target[0], splat(a.g, x.at), splat(a.scale, x.at))
        gradient_of_row(x, dx, a.begin, a.begin + 128, a.begin + 128, a.logits, 0, r, 0)


@pytest.mark.parametrize("class_stride", [1, 2])
@pytest.mark.parametrize("begin", [1 << 30, (1 << 31) - 64, 1 << 31, (1 << 32) - 64])
def test_only_the_target_is_the_target(begin: int, class_stride: int) -> None:
    logits = torch.randn(128 * class_stride)
    for y in (begin - 1, begin, begin + 63, begin + 64, begin + 127, begin + 128, begin + (1 << 32), (1 << 31) - 1, 3):
        target, dlogits = torch.tensor([y]), torch.full_like(logits, 7.0)
        part = Part(logits=logits, target=target, dlogits=dlogits, begin=begin, class_stride=class_stride, g=1.7, scale=0.3)
        _part_of_a_row(1, part)
        expected = logits.double()[::class_stride].exp() * 0.3
        expected[y - begin : y - begin + 1] -= 1.7 if 0 <= y - begin < 128 else 0.0
        torch.testing.assert_close(dlogits[::class_stride].double(), expected, atol=1e-6, rtol=1e-6, msg=lambda text, y=y: f"{y=}: {text}")


def test_rows_are_in_lanes_only_where_a_lane_holds_a_class_number() -> None:
    one = torch.zeros(1)
    assert walk(one.expand(16, (1 << 31) - 1)).tile == 16
    assert walk(one.expand(16, 1 << 31)).tile == 1


@pytest.fixture
def repeating() -> Iterator[Callable[[Tensor, int], Tensor]]:
    """Tensors larger than memory: the content of a small one (whole pages) again and again, all in the same pages."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    with ExitStack() as stack:

        def repeat(content: Tensor, times: int) -> Tensor:
            size, fixed, read_write = content.numel() * content.element_size(), 0x10, mmap.PROT_READ | mmap.PROT_WRITE
            file = os.memfd_create("repeating")
            stack.callback(os.close, file)
            os.write(file, content.view(torch.uint8).numpy().tobytes())
            start = libc.mmap(None, size * times, read_write, mmap.MAP_SHARED | 0x4000, file, 0)  # 0x4000: MAP_NORESERVE
            assert start not in (None, ctypes.c_void_p(-1).value)
            stack.callback(libc.munmap, start, size * times)
            for i in range(times):
                assert libc.mmap(start + i * size, size, read_write, mmap.MAP_SHARED | fixed, file, 0) == start + i * size
            return torch.frombuffer((ctypes.c_char * (size * times)).from_address(start), dtype=content.dtype)

        yield repeat


WINDOW = 1 << 20  # classes that differ


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memfd_create")
@pytest.mark.parametrize(
    ("loss", "most"),
    [("cross_entropy", 1 << 31), ("smoothed_cross_entropy", 1 << 31), ("nll_loss", 1 << 31), ("soft_cross_entropy", 1 << 30)],
)
def test_gradients_of_the_last_classes(loss: str, most: int, repeating: Callable[[Tensor, int], Tensor]) -> None:
    """Gradients of later classes lie where those of earlier ones lay, so those of the last ones are left to be seen."""
    numba: Any = kernels("numba")
    classes, g = most + WINDOW, 1.7
    window = torch.randn(WINDOW).to(torch.bfloat16)
    logits = repeating(window, classes // WINDOW)[None]
    dlogits = repeating(torch.full_like(window, 7.0), classes // WINDOW)[None]
    ones = torch.ones(1).expand(classes)
    x = window.double()
    total = (x - x.max()).exp().sum() * (classes // WINDOW)
    p = (x - x.max()).exp() / total
    numbers = [torch.full((1,), n) for n in (1.0, x.max().item(), total.item())]
    dloss = torch.tensor([g])
    for y in (most + 5, most - 1, 3):
        target = torch.tensor([y])
        here = torch.zeros_like(p)
        here[y - most : y - most + 1] = 1.0 if y >= most else 0.0
        if loss == "cross_entropy":
            out = [torch.full((1,), 7.0) for _ in range(4)]
            if y == most + 5:
                numba.cross_entropy_forward(logits, target, ones, -100, out[0], Rows(out[1], None, *out[2:]))
                torch.testing.assert_close(out[0].double(), (total.log() - (x[5] - x.max()))[None], rtol=1e-3, atol=0)
            numba.cross_entropy_backward(logits, target, -100, Rows(numbers[0], None, *numbers[1:]), dloss, dlogits)
            expected = g * (p - here)
        elif loss == "smoothed_cross_entropy":
            keep, spread = 0.9, 0.1 / classes
            rows = Rows(numbers[0], *numbers)
            numba.smoothed_cross_entropy_backward(logits, target, ones, -100, Smoothing(keep, spread), rows, dloss, dlogits)
            expected = g * (p - spread - keep * here)
        elif loss == "soft_cross_entropy":
            numba.soft_cross_entropy_backward(logits, logits, ones, Smoothing(1.0, 0.0), Rows(None, *numbers), dloss, dlogits)
            expected = g * (p - x)
        else:
            numba.nll_loss_backward(target, -100, numbers[0], dloss, dlogits)
            expected = -g * here
        torch.testing.assert_close(dlogits[0, most:].double(), expected, rtol=2e-2, atol=1e-12)
        if loss == "soft_cross_entropy":
            break
