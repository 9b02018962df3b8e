"""nll_loss: every option, dtype, shape and layout against torch and float64."""

import pytest
import torch
from helpers import DTYPES, LAYOUTS, REDUCTIONS, Tensors, check, class_inputs

SHAPES = [
    (1, 1), (7, 1), (1, 2), (16, 16), (17, 10), (33, 49), (4, 100), (2, 8193), (2, 3, 5), (2, 19, 37), (3, 60, 2), (2, 4, 3, 5),
    (2, 3, 2, 2, 2), (5,), (70,), (1, 70, 16),
]  # fmt: skip


def log_probabilities(shape: tuple[int, ...], dtype: torch.dtype, ignored: int | None = None, weighted: bool = False) -> Tensors:
    tensors = class_inputs(shape, dtype, ignored=ignored, weighted=weighted)
    logits = tensors["input"]
    assert logits is not None
    return {**tensors, "input": torch.log_softmax(logits, 1 if len(shape) > 1 else 0)}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weight"])
@pytest.mark.parametrize("ignored", [None, -100, 0], ids=["all", "ignoring", "ignoring_class_0"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_option(dtype: str, ignored: int | None, weighted: bool, reduction: str) -> None:
    for shape in ((21, 11), (6, 77)):
        options = {} if ignored is None else {"ignore_index": ignored}
        check("nll_loss", log_probabilities(shape, DTYPES[dtype], ignored, weighted), reduction=reduction, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_shape(dtype: str, shape: tuple[int, ...]) -> None:
    tensors = log_probabilities(shape, DTYPES[dtype], -100, True)
    check("nll_loss", tensors, reduction="none")
    check("nll_loss", tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(19, 11), (3, 70), (2, 60, 5), (18, 6, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_layout(dtype: str, shape: tuple[int, ...], layout: str) -> None:
    tensors = log_probabilities(shape, DTYPES[dtype], 2, True)
    check("nll_loss", tensors, layouts={"input": layout, "weight": "every_other"}, reduction="none", ignore_index=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.long)], ids=str)
@pytest.mark.parametrize("shape", [(40, 11), (4, 70)], ids=["rows_in_lanes", "row_by_row"])
def test_gradients_written_past_the_caches(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: torch.dtype) -> None:
    from fastloss.kernels.cpu import rows

    monkeypatch.setattr(rows, "STREAM_BYTES", 0)
    for layout in ("contiguous", "misaligned", "padded"):
        check("nll_loss", log_probabilities(shape, dtype), layouts={"input": layout})


def test_numbers_that_are_no_log_probabilities() -> None:
    tensors = log_probabilities((20, 5), torch.float32)
    tensors["input"] = torch.randn(20, 5) * 1e30
    check("nll_loss", tensors)


def test_uint8_targets() -> None:
    tensors = log_probabilities((30, 5), torch.float32)
    tensors["target"] = tensors["target"].to(torch.uint8)
    check("nll_loss", tensors)


def test_infinities_and_nan_are_torchs() -> None:
    odd = torch.tensor([[float("-inf"), 0.0, float("nan"), float("inf")]]).repeat(4, 1)
    for weight in (None, torch.tensor([0.0, 1.0, 0.0, 0.0])):
        check("nll_loss", {"input": odd, "target": torch.arange(4), "weight": weight}, reduction="none")
