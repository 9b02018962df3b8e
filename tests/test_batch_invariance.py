"""The numbers of a row have the same bits whatever rows share the call: every slice of a batch against the whole batch."""

from collections.abc import Callable
from operator import itemgetter

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
Cuts = tuple[Cut, Cut]  # of tensors with a class dimension, and without


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


def assert_same_bits(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape, what
        same = torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))
        assert same, f"{what}: off by {(a.double() - b.double()).abs().max():.3g}"


def compare(call: str, tensors: Tensors, upstream: Tensor, cuts: dict[str, Cuts]) -> None:
    """Every cut of the tensors against the same cut of what the whole gives."""
    kernel_call(call.split(",")[0], **tensors, **CALLS[call])  # the proof that kernels serve it
    whole = numbers_of(call, tensors, upstream)
    dims = tensors["input"].dim()  # type: ignore[union-attr]
    for name, (cut, cut_rows) in cuts.items():

        def of(t: Tensor, cut: Cut = cut, cut_rows: Cut = cut_rows) -> Tensor:
            return cut(t) if t.dim() == dims else cut_rows(t)

        given = {k: t if t is None or k == "weight" else of(t) for k, t in tensors.items()}
        assert_same_bits(numbers_of(call, given, of(upstream)), [of(t) for t in whole], f"{call} {name}")


def upstream_for(call: str, tensors: Tensors) -> Tensor:
    x = tensors["input"]
    assert x is not None
    of_classes = call not in OF_ROWS or "softmax" in call
    return (torch.randn(x.shape if of_classes else (*x.shape[:1], *x.shape[2:])) * 1.7).to(x.dtype)


CUTS = [slice(a, b) for a, b in ((0, 1), (0, 2), (1, 2), (0, 4), (2, 4), (3, 19), (7, 39), (15, 16), (17, 33), (24, 40), (39, 40))]


def batch_cuts(rows: int, every: int = 1) -> dict[str, Cuts]:
    """Beginnings, and cuts from the middle and the end."""
    cuts = [slice(0, n) for n in range(1, rows, every)] + [s for s in CUTS if s.stop <= rows]
    return {f"[{s.start}:{s.stop}]": (itemgetter(s),) * 2 for s in cuts}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", *(pytest.param(name, marks=pytest.mark.long) for name in ("float64", "float16"))])
@pytest.mark.parametrize("call", CALLS)
def test_every_number_of_rows(call: str, dtype: str) -> None:
    for classes in (1, 2, 3, 10, 17, 31, 32, 48, 49, 64, 65, 70) if call in OF_ROWS else (1, 3, 17):
        tensors = tensors_of(call, (ROWS, classes), DTYPES[dtype], "contiguous")
        compare(call, tensors, upstream_for(call, tensors), batch_cuts(ROWS))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", CALLS)
def test_rows_in_every_layout(call: str, layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for classes in (3, 31, 48, 70):
            tensors = tensors_of(call, (ROWS, classes), dtype, layout)
            compare(call, tensors, upstream_for(call, tensors), batch_cuts(ROWS, 5))


def position_cuts(height: int, width: int) -> dict[str, Cuts]:
    """Parts of images, down to one position."""
    found: dict[str, Cuts] = {}
    for h, w in ((slice(0, 1), slice(0, 1)), (slice(1, 2), slice(0, width)), (slice(0, height), slice(2, 3)), (slice(1, 3), slice(1, 4))):
        found[f"[..., {h.start}:{h.stop}, {w.start}:{w.stop}]"] = ((lambda t, h=h, w=w: t[..., h, w]),) * 2
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", OF_ROWS)
def test_images_and_their_parts(call: str, layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for classes in (3, 40, 70):
            tensors = tensors_of(call, (9, classes, 3, 4), dtype, layout)
            cuts = batch_cuts(9) | position_cuts(3, 4)
            if "softmax" in call and classes > 48:  # their backward goes by their result, which is new: one position is a layout of its own
                cuts.pop("[..., 0:1, 0:1]")
            compare(call, tensors, upstream_for(call, tensors), cuts)


@pytest.mark.parametrize(
    "layout", ["contiguous", "padded", *(pytest.param(name, marks=pytest.mark.long) for name in ("transposed", "every_other"))]
)
@pytest.mark.parametrize("call", OF_ROWS)
def test_long_rows_and_threads(call: str, layout: str) -> None:
    """Blocks, rows shared out over threads, terms kept or computed again."""
    for dtype, classes, rows in ((torch.float32, 300, 19), (torch.bfloat16, 5000, 19), (torch.float32, 40000, 4)):
        tensors = tensors_of(call, (rows, classes), dtype, layout)
        upstream, cuts = upstream_for(call, tensors), {f"[{s.start}:{s.stop}]": (itemgetter(s),) * 2 for s in CUTS if s.stop <= rows}
        for threads in (1, 2):
            torch.set_num_threads(threads)
            compare(call, tensors, upstream, cuts)


@pytest.mark.parametrize("call", [call for call in CALLS if "softmax" not in call])
def test_gradients_of_a_sum_foreseen_and_not(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Whoever writes it and however many rows there are: what the rows' own upstream gradients give."""
    for may_wait in (0, 1 << 30):
        monkeypatch.setattr(config, "foresight_max_bytes", may_wait)
        for shape in ((18, 3), (18, 31), (18, 48), (18, 70), (3, 40000), (18, 60, 2)):
            tensors = tensors_of(call, shape, torch.float32, "contiguous")
            _, *whole = numbers_of(call, tensors, 1.0)
            for n, threads in ((1, 1), (1, 2), (2, 2), (15, 1), (16, 2), (17, 1)):
                torch.set_num_threads(threads)
                given = {k: t if t is None or k == "weight" else t[:n] for k, t in tensors.items()}
                assert_same_bits(numbers_of(call, given, 1.0, "sum"), [g[:n] for g in whole], f"{call} {shape} [:{n}]")


@pytest.mark.parametrize("classes", [3, 10, pytest.param(64, marks=pytest.mark.long), 5000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_with_a_few_classes_of_a_probability_each(dtype: str, classes: int) -> None:
    logits, upstream = (torch.randn(ROWS, classes) * 3).to(DTYPES[dtype]), torch.randn(ROWS).to(DTYPES[dtype])
    indices, probabilities = torch.randint(classes, (ROWS, 3)), torch.rand(ROWS, 3)
    indices[::7, 1] = -100

    def numbers(cut: slice) -> list[Tensor]:
        leaf = logits[cut].detach().requires_grad_()
        loss = fastloss.sparse_soft_cross_entropy(leaf, indices[cut], probabilities[cut], reduction="none", label_smoothing=0.1)
        return [loss.detach(), *torch.autograd.grad(loss, leaf, upstream[cut])]

    whole = numbers(slice(None))
    for n in range(1, ROWS):
        for cut in (slice(n), slice(ROWS - n, None)):
            assert all(torch.equal(part, of_all[cut]) for part, of_all in zip(numbers(cut), whole, strict=True)), cut
