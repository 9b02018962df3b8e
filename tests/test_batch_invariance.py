"""The numbers of a row have the same bits whatever rows share the call: every slice of a batch against the whole batch."""

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import DTYPES, LAYOUTS, class_inputs, kernel_call
from torch import Tensor

import fastloss
from fastloss import config

CALLS = {
    "cross_entropy": {},
    "cross_entropy, weighted": {"ignore_index": 0},
    "cross_entropy, smoothed": {"ignore_index": 0, "label_smoothing": 0.1},
    "cross_entropy, probabilities": {"label_smoothing": 0.1},
    "nll_loss": {"ignore_index": 0},
    "softmax": {"dim": 1},
    "log_softmax": {"dim": 1},
    "binary_cross_entropy_with_logits": {},
    "binary_cross_entropy": {},
    "sigmoid_focal_loss": {},
}
OF_ROWS = [call for call in CALLS if "binary" not in call and "focal" not in call]
ROWS = 40
Tensors = dict[str, Tensor | None]
Cut = Callable[[Tensor], Tensor]


def tensors_of(call: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensors:
    """Of which all but the class weight have a place for every row, in dimension 0 and behind dimension 1."""
    if "binary" in call or "focal" in call:
        found: Tensors = {"input": (torch.rand(shape) * 0.9 + 0.05).to(dtype), "target": (torch.rand(shape) * 0.9 + 0.05).to(dtype)}
    elif "softmax" in call:
        found = {"input": (torch.randn(shape) * 3).to(dtype)}
    else:
        soft, ignored = "probabilities" in call, CALLS[call].get("ignore_index")
        found = class_inputs(shape, dtype, ignored=ignored, weighted=call != "cross_entropy", soft=soft)
    for name in ("input", "target"):
        tensor = found.get(name)
        if tensor is not None and tensor.is_floating_point():
            leaf, view = LAYOUTS[layout](tensor)
            found[name] = view(leaf)
    return found


def numbers_of(call: str, tensors: Tensors, upstream: Tensor | float, reduction: str = "none") -> list[Tensor]:
    """What comes out for every row, and its gradients under this upstream gradient."""
    given = dict(tensors)
    wanted = ("input", "target") if "probabilities" in call else ("input",)
    leaves = [t.detach().requires_grad_() for t in (given[name] for name in wanted) if t is not None]
    given.update(zip(wanted, leaves, strict=True))
    options = dict(CALLS[call]) if "softmax" in call else {**CALLS[call], "reduction": reduction}
    result: Tensor = getattr(fastloss, call.split(",")[0])(**given, **options)
    d = upstream if isinstance(upstream, Tensor) else torch.full_like(result, upstream)
    gradients = torch.autograd.grad(result, leaves, d)
    return [result.detach(), *gradients] if reduction == "none" else list(gradients)


def slices(rows: int) -> Iterator[tuple[str, slice]]:
    """All beginnings, and some cuts from the middle and the end."""
    for n in range(1, rows):
        yield f"[:{n}]", slice(0, n)
    for begin, end in ((1, 2), (3, 20), (7, 39), (15, 16), (17, 33), (24, 40), (39, 40)):
        yield f"[{begin}:{end}]", slice(begin, end)


def same_bits(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape, what
        same = torch.equal(a, b) or torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))
        assert same, f"{what}: {'value' if k == 0 else 'gradient'} off by {(a.double() - b.double()).abs().max():.3g}"


def compare(call: str, tensors: Tensors, upstream: Tensor, cuts: dict[str, tuple[Cut, Cut]]) -> None:
    """Every cut (of tensors with the class dimension, and without) of the tensors against the same cut of what the whole gives."""
    kernel_call(call.split(",")[0], **tensors, **CALLS[call])  # the proof that kernels serve it
    whole = numbers_of(call, tensors, upstream)
    dims = tensors["input"].dim()  # type: ignore[union-attr]
    for name, (cut, cut_rows) in cuts.items():

        def of(t: Tensor, cut: Cut = cut, cut_rows: Cut = cut_rows) -> Tensor:
            return cut(t) if t.dim() == dims else cut_rows(t)

        given = {k: t if t is None or k == "weight" else of(t) for k, t in tensors.items()}
        same_bits(numbers_of(call, given, of(upstream)), [of(t) for t in whole], f"{call} {name}")


def upstream_for(call: str, tensors: Tensors) -> Tensor:
    x = tensors["input"]
    assert x is not None
    elementwise = call not in OF_ROWS or "softmax" in call
    shape = x.shape if elementwise else (*x.shape[:1], *x.shape[2:])
    compute = x.dtype
    return (torch.randn(shape) * 1.7).to(compute)


def batch_cuts(rows: int, every: int = 1) -> dict[str, tuple[Cut, Cut]]:
    found = list(slices(rows))[::every]
    return {name: ((lambda t, s=s: t[s]), (lambda t, s=s: t[s])) for name, s in found}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS)
def test_every_number_of_rows(call: str, dtype: str) -> None:
    for classes in (1, 2, 3, 10, 17, 31, 32, 48, 49, 64, 65, 70) if call in OF_ROWS else (1, 3, 17):
        tensors = tensors_of(call, (ROWS, classes), DTYPES[dtype], "contiguous")
        compare(call, tensors, upstream_for(call, tensors), batch_cuts(ROWS))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", CALLS)
def test_rows_in_every_layout(call: str, layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for classes in (3, 31, 48, 70, 150):
            tensors = tensors_of(call, (ROWS, classes), dtype, layout)
            compare(call, tensors, upstream_for(call, tensors), batch_cuts(ROWS, 4))
