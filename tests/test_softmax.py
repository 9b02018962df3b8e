"""softmax and log_softmax: every dtype, shape, dimension and layout against torch and float64."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, LAYOUTS, check, kernel_call

import fastloss

CANCELS = {"ulps": 4, "scale": 4.0}  # in the gradient of softmax, dp - sum dp p
FUNCTIONS = ["softmax", "log_softmax"]
SHAPES = [
    (1,),
    (70,),
    (5, 1),
    (1, 5),
    (17, 10),
    (16, 48),
    (33, 49),
    (3, 1000),
    (2, 8193),
    (1, 20011),
    (2, 3, 5),
    (3, 60, 2),
    (2, 4, 3, 5),
    (2, 3, 2, 2, 2),
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_shape_and_dimension(dtype: str, shape: tuple[int, ...], function: str) -> None:
    for dim in range(-len(shape), len(shape)):
        tensors = {"input": (torch.randn(shape) * 3).to(DTYPES[dtype])}
        check(function, tensors, dim=dim, **CANCELS if function == "softmax" else {})


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(19, 11), (3, 70), (2, 60, 5), (18, 6, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_layout(dtype: str, shape: tuple[int, ...], layout: str, function: str) -> None:
    for dim in range(len(shape)):
        tensors = {"input": (torch.randn(shape) * 3).to(DTYPES[dtype])}
        check(function, tensors, layouts={"input": layout}, dim=dim, **CANCELS if function == "softmax" else {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.long)], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(40, 11), (4, 70), (40, 3, 7)], ids=str)
def test_results_written_past_the_caches(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], function: str, dtype: torch.dtype
) -> None:
    from fastloss.kernels.cpu import rows

    monkeypatch.setattr(rows, "STREAM_BYTES", 0)
    for layout in ("contiguous", "misaligned", "padded"):
        check(function, {"input": torch.randn(shape).to(dtype)}, layouts={"input": layout}, dim=1, **CANCELS)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_past_the_caches_results_have_the_same_bits(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """There a row is written while the next one is read."""
    from fastloss.kernels.cpu import rows

    for shape, layout in (((9, 5003), "contiguous"), ((9, 4096), "misaligned"), ((70, 601), "padded")):
        x = torch.randn(shape) * 3
        x[1], x[2, 5], x[3, 7], x[4, ::2] = -torch.inf, torch.inf, torch.nan, -torch.inf
        leaf, view = LAYOUTS[layout](x)
        upstream, found = torch.randn(shape), []
        for limit, threads in ((1 << 25, 1), (0, 1), (0, 2)):
            monkeypatch.setattr(rows, "STREAM_BYTES", limit)
            torch.set_num_threads(threads)
            mine = leaf.detach().requires_grad_()
            result = getattr(fastloss, function)(view(mine), 1)
            found.append((result.detach(), torch.autograd.grad(result, mine, upstream)[0]))
        for pair in found[1:]:
            for a, b in zip(pair, found[0], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_upstream_gradient_in_any_layout(layout: str, function: str) -> None:
    for shape in ((19, 11), (3, 70), (2, 60, 5)):
        leaf, view = LAYOUTS[layout](torch.randn(shape))
        results = []
        for module, dtype in ((fastloss, torch.float32), (F, torch.float32), (F, torch.float64)):
            logits = torch.linspace(-3, 3, torch.Size(shape).numel(), dtype=dtype).view(shape).requires_grad_()
            getattr(module, function)(logits, 1).backward(view(leaf.to(dtype)))
            results.append(logits.grad)
        mine, theirs, truth = results
        allowed = 2 * (theirs - truth).abs().max() + 2 * truth.abs().max() * 2**-23
        assert (mine - truth).abs().max() <= allowed


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("layout", ["transposed", "channels_last", "every_other", "expanded", "reversed_dims"])
def test_result_is_contiguous_like_torchs(layout: str, function: str) -> None:
    for shape in ((6, 5), (40, 11), (4, 5, 6), (2, 3, 4, 5)):
        leaf, view = LAYOUTS[layout](torch.randn(shape))
        for dim in range(len(shape)):
            result = kernel_call(function, view(leaf), dim)
            assert result.stride() == getattr(F, function)(view(leaf), dim).stride(), (shape, dim)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("source", [torch.int64, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dtype_argument(function: str, source: torch.dtype, dtype: torch.dtype) -> None:
    logits = (torch.randn(5, 7) * 4).to(source)
    if source == torch.int64:
        expected = getattr(F, function)(logits, 1, dtype=dtype)
        torch.testing.assert_close(getattr(fastloss, function)(logits, 1, dtype=dtype), expected)
    else:
        check(function, {"input": logits}, dim=1, dtype=dtype, ulps=4)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_warning_about_no_dimension_points_to_the_caller(function: str) -> None:
    module = {"softmax": fastloss.Softmax, "log_softmax": fastloss.LogSoftmax}[function]()
    theirs = {"softmax": torch.nn.Softmax, "log_softmax": torch.nn.LogSoftmax}[function]()
    for mine, call in ((getattr(fastloss, function), getattr(F, function)), (module, theirs)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mine(torch.randn(2, 3))
            call(torch.randn(2, 3))
        ours, torchs = caught
        assert str(ours.message) == str(torchs.message)
        assert (ours.category, ours.filename) == (torchs.category, torchs.filename)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3), (2, 3, 0)], ids=str)
def test_nothing(function: str, shape: tuple[int, ...]) -> None:
    for dim in range(len(shape)):
        mine, theirs = (torch.empty(shape, requires_grad=True) for _ in range(2))
        result, expected = kernel_call(function, mine, dim), getattr(F, function)(theirs, dim)
        assert result.shape == expected.shape
        result.sum().backward()
        assert mine.grad is not None
        assert mine.grad.shape == shape


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("classes", [3, 70])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_infinities_and_nan_are_torchs(function: str, classes: int, rows: int) -> None:
    inf, nan = float("inf"), float("nan")
    for special in ((-inf,), (inf,), (nan,), (inf, -inf), (inf, inf), (torch.finfo(torch.float32).min,), (-inf,) * classes):
        logits = torch.randn(rows, classes)
        logits[-1, -len(special) :] = torch.tensor(special)
        check(function, {"input": logits}, dim=1)
