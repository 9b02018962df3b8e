"""Results written past the caches: whole cache lines go there, what is left at both ends of a row does not, and no bit depends on it."""

from collections.abc import Callable

import pytest
import torch
from helpers import DTYPES, LAYOUTS
from torch import Tensor

import fastloss

# rows of less than a line, of odd halves of lines, of a tile, of a block and some
CLASSES = (1, 15, 16, 17, 31, 33, 48, 63, 100, 225, 600, 1000, 2049, 4163)


def cross_entropy(x: Tensor) -> Tensor:
    return fastloss.cross_entropy(x, torch.arange(x.shape[0]) % x.shape[1])


def without_reduction(x: Tensor) -> Tensor:
    return fastloss.cross_entropy(x, torch.arange(x.shape[0]) % x.shape[1], reduction="none")


def smoothed(x: Tensor) -> Tensor:
    weight = torch.linspace(0.5, 1.5, x.shape[1]).to(x.dtype)
    return fastloss.cross_entropy(x, torch.arange(x.shape[0]) % x.shape[1], weight, label_smoothing=0.1)


def probabilities(x: Tensor) -> Tensor:
    numbers = torch.arange(x.numel()).view(x.shape) % 7 + 1.0
    return fastloss.cross_entropy(x, (numbers / numbers.sum(1, keepdim=True)).to(x.dtype))


def few_classes(x: Tensor) -> Tensor:
    indices = torch.stack([torch.arange(x.shape[0]) % x.shape[1], torch.arange(x.shape[0]) * 3 % x.shape[1]], 1)
    return fastloss.sparse_soft_cross_entropy(x, indices, torch.full(indices.shape, 0.5))


def statistics(x: Tensor) -> Tensor:
    found = fastloss.token_statistics(x, torch.arange(x.shape[0]) % x.shape[1])
    assert found.log_prob is not None
    assert found.entropy is not None
    return found.log_prob + found.entropy


def softmax(x: Tensor) -> Tensor:
    return fastloss.softmax(x, 1)


def log_softmax(x: Tensor) -> Tensor:
    return fastloss.log_softmax(x, 1)


def nll(x: Tensor) -> Tensor:
    return fastloss.nll_loss(x, torch.arange(x.shape[0]) % x.shape[1])


FUNCTIONS = (cross_entropy, without_reduction, smoothed, probabilities, few_classes, statistics, softmax, log_softmax, nll)


def step(function: Callable[[Tensor], Tensor], leaf: Tensor, view: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    mine = leaf.detach().requires_grad_()
    result = function(view(mine))
    upstream = torch.linspace(-1, 1, result.numel()).view(result.shape).to(result.dtype) if result.dim() else torch.ones_like(result)
    return result.detach(), torch.autograd.grad(result, mine, upstream)[0]


def check(function: Callable[[Tensor], Tensor], dtype: str, all_classes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for classes in all_classes:
        for layout in ("contiguous", "misaligned"):
            leaf, view = LAYOUTS[layout]((torch.randn(21, classes) * 3).to(DTYPES[dtype]))
            found = []
            for limit in (1 << 25, 0):
                monkeypatch.setattr("fastloss.kernels.cpu.rows.STREAM_BYTES", limit)
                found.append(step(function, leaf, view))
            for through, past in zip(*found, strict=True):
                torch.testing.assert_close(past, through, rtol=0, atol=0, equal_nan=True, msg=f"{classes} classes, {layout}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", *(pytest.param(name, marks=pytest.mark.long) for name in ("float64", "float16"))])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_same_bits(function: Callable[[Tensor], Tensor], dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(function, dtype, CLASSES, monkeypatch)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("function", [cross_entropy, smoothed, softmax, log_softmax])
def test_the_same_bits_of_rows_whose_terms_are_not_kept(
    function: Callable[[Tensor], Tensor], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the second-level cache were tiny: such rows are read, and then written."""
    monkeypatch.setattr("fastloss.kernels.cpu.blocks.KEPT_BYTES", 1 << 10)
    check(function, dtype, (2063, 4163, 4176), monkeypatch)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_bits_of_images(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows fill the lanes: of 16-bit numbers a vector of a class is half a line."""
    for classes, pixels in ((3, 64), (21, 64), (21, 48), (21, 50), (70, 64)):
        leaf = torch.randn(2, classes, pixels).to(DTYPES[dtype])
        target = torch.randint(classes, (2, pixels))
        found = []
        for limit in (1 << 25, 0):
            monkeypatch.setattr("fastloss.kernels.cpu.rows.STREAM_BYTES", limit)
            for reduction in ("mean", "none"):
                found.append(
                    step(lambda x, reduction=reduction, y=target: fastloss.cross_entropy(x, y, reduction=reduction), leaf, lambda x: x)
                )
        for through, past in zip(found[:2], found[2:], strict=True):
            for a, b in zip(through, past, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("limit", [0, 1 << 40], ids=["past", "through"])
@pytest.mark.parametrize("function", [cross_entropy, without_reduction, few_classes])
def test_bfloat16_gradients_are_those_of_float32_rounded(
    function: Callable[[Tensor], Tensor], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether vectors are narrowed one by one or two at a time."""
    monkeypatch.setattr("fastloss.kernels.cpu.rows.STREAM_BYTES", limit)
    for classes in CLASSES:
        x = (torch.randn(19, classes) * 3).bfloat16()
        for layout in ("contiguous", "misaligned"):
            found = []
            for dtype in (torch.bfloat16, torch.float32):
                leaf, view = LAYOUTS[layout](x.to(dtype))
                mine = leaf.detach().requires_grad_()
                result = function(view(mine))
                upstream = torch.linspace(-1, 1, result.numel()).bfloat16().view(result.shape) if result.dim() else torch.ones(())
                found.append(torch.autograd.grad(result, mine, upstream.to(dtype))[0].bfloat16())
            assert torch.equal(*found), classes
