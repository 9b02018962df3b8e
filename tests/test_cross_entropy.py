"""cross_entropy: every option, dtype, shape and layout against torch and float64."""

import itertools

import pytest
import torch
from helpers import DTYPES, LAYOUTS, REDUCTIONS, check, class_inputs, kernel_call

import fastloss

SMOOTHINGS = (0.0, 0.1, 1.0)
# one vector, tails, rows in lanes, row by row, chunk borders
SHAPES = [
    (1, 1), (7, 1), (1, 2), (5, 2), (16, 16), (17, 10), (40, 48), (33, 49), (4, 100), (2, 513), (3, 1000), (2, 8192), (3, 8193), (1, 20011),
    (2, 3, 5), (2, 19, 37), (3, 60, 2), (2, 4, 3, 5), (1, 100, 2, 3), (2, 3, 2, 2, 2), (5,), (70,), (1, 70, 16), (2, 3, 1),
]  # fmt: skip


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weight"])
@pytest.mark.parametrize("kind", ["indices", "ignoring", "probabilities"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_option(dtype: str, kind: str, weighted: bool, smoothing: float, reduction: str) -> None:
    for shape in ((21, 11), (6, 77)):
        tensors = class_inputs(
            shape, DTYPES[dtype], ignored=-100 if kind == "ignoring" else None, weighted=weighted, soft=kind == "probabilities"
        )
        wanted = ("input", "target") if kind == "probabilities" else ("input",)
        check("cross_entropy", tensors, wanted=wanted, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_shape(dtype: str, shape: tuple[int, ...], soft: bool) -> None:
    wanted = ("input", "target") if soft else ("input",)
    tensors = class_inputs(shape, DTYPES[dtype], ignored=None if soft else -100, weighted=True, soft=soft)
    ulps = 8 if soft and shape == (40, 48) else 2  # 48 sequential additions: up to 8 ulp, torch 1 to 2
    scale = 1.0 if 1 in shape[1:2] else 0.0  # the gradient of a single class is a difference of equal numbers
    for smoothing in (0.0, 0.2):
        check("cross_entropy", tensors, wanted=wanted, reduction="none", label_smoothing=smoothing, ulps=ulps, scale=scale)
    check("cross_entropy", tensors, wanted=wanted, ulps=ulps, scale=scale)


@pytest.mark.parametrize("kind", ["indices", "smoothed", "probabilities"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(19, 11), (3, 70), (2, 60, 5), (18, 6, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_every_layout(dtype: str, shape: tuple[int, ...], layout: str, kind: str) -> None:
    soft = kind == "probabilities"
    tensors = class_inputs(shape, DTYPES[dtype], ignored=None if soft else 2, weighted=True, soft=soft)
    options = {"ignore_index": 2} if not soft else {}
    check(
        "cross_entropy", tensors, wanted=("input", "target") if soft else ("input",), layouts={"input": layout, "weight": "every_other"},
        label_smoothing=0.1 if kind == "smoothed" else 0.0, reduction="none", **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "other"), list(itertools.permutations(["contiguous", "transposed", "padded", "expanded", "every_other"], 2))
)
def test_probabilities_laid_out_unlike_the_logits(layout: str, other: str) -> None:
    for shape in ((19, 11), (3, 70)):
        tensors = class_inputs(shape, torch.float32, weighted=True, soft=True)
        check("cross_entropy", tensors, wanted=("input", "target"), layouts={"input": layout, "target": other}, label_smoothing=0.1)


@pytest.mark.parametrize("layout", ["every_other", "transposed", "expanded"])
def test_indices_in_any_layout(layout: str) -> None:
    for shape in ((6, 7, 5), (20, 9, 3)):
        target = torch.randint(shape[1], (shape[0], shape[2]))
        odd = {
            "every_other": target.repeat_interleave(2, 1)[:, ::2],
            "transposed": target.t().contiguous().t(),
            "expanded": target[:1].expand_as(target),
        }
        check("cross_entropy", {"input": torch.randn(shape), "target": odd[layout]}, reduction="none")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", *(pytest.param(name, marks=pytest.mark.long) for name in ("float64", "float16"))])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(40, 11), (4, 70)], ids=["rows_in_lanes", "row_by_row"])
def test_gradients_written_past_the_caches(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], smoothing: float, dtype: str) -> None:
    from fastloss.kernels.cpu import rows

    monkeypatch.setattr(rows, "STREAM_BYTES", 0)
    for layout, soft in itertools.product(("contiguous", "misaligned", "padded"), (False, True)):
        tensors = class_inputs(shape, DTYPES[dtype], soft=soft)
        check(
            "cross_entropy",
            tensors,
            wanted=("input", "target") if soft else ("input",),
            layouts={"input": layout},
            label_smoothing=smoothing,
        )


def test_large_enough_to_be_written_past_the_caches() -> None:
    tensors = class_inputs((270, 32000), torch.float32, ignored=-100)
    check("cross_entropy", tensors)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_uint8_targets(smoothing: float) -> None:
    tensors = class_inputs((37, 100), torch.float32)
    tensors["target"] = tensors["target"].to(torch.uint8)
    check("cross_entropy", tensors, label_smoothing=smoothing)
    check("cross_entropy", tensors, label_smoothing=smoothing, ignore_index=99)


def test_uint8_class_156_is_not_the_default_ignore_index() -> None:
    """torch compares with ignore_index in uint8, where -100 is 156, and forgets that class's smoothing term; we do not."""
    logits, target = torch.randn(3, 200), torch.tensor([1, 156, 5], dtype=torch.uint8)
    bytes_, longs = (kernel_call("cross_entropy", logits, t, label_smoothing=0.5, reduction="none") for t in (target, target.long()))
    assert torch.equal(bytes_, longs)
    if logits.is_cpu:  # a quirk of torch's CPU kernel
        assert not torch.allclose(torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.5, reduction="none"), longs)


@pytest.mark.parametrize("ignore_index", [0, -1, 4, 255, -100, 2**62], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_any_ignore_index(ignore_index: int, smoothing: float) -> None:
    for rows in (3, 24):
        tensors = class_inputs((rows, 5), torch.float32, ignored=ignore_index, weighted=True)
        check("cross_entropy", tensors, ignore_index=ignore_index, label_smoothing=smoothing, reduction="none")
        check("cross_entropy", tensors, ignore_index=ignore_index, label_smoothing=smoothing)


@pytest.mark.skipif(torch.__version__ < (2, 11), reason="an older torch refuses this; test_errors compares with the target alone")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_row_with_a_target_of_one_element(reduction: str) -> None:
    check("cross_entropy", {"input": torch.randn(70), "target": torch.tensor([3])}, wanted=(), reduction=reduction)


def test_weights_without_influence() -> None:
    tensors = class_inputs((20, 6), torch.float32)
    tensors["weight"] = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0, 0.5])
    for smoothing in SMOOTHINGS:
        check("cross_entropy", tensors, label_smoothing=smoothing)
    tensors["target"] = torch.zeros(20, dtype=torch.long)
    for smoothing in SMOOTHINGS:
        check("cross_entropy", tensors, label_smoothing=smoothing)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["indices", "smoothed", "probabilities"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_rows_and_classes(dtype: str, kind: str) -> None:
    soft = kind == "probabilities"
    for rows, classes in itertools.product((*range(1, 35), 63, 64, 65), (*range(1, 52, 3), *range(61, 67), 127, 128, 129)):
        tensors = class_inputs((rows, classes), DTYPES[dtype], weighted=True, soft=soft)
        options = {"wanted": ("input", "target") if soft else ("input",), "label_smoothing": 0.1 if kind == "smoothed" else 0.0}
        # in float64 torch is its own truth, with an error of 0. Ours is an ulp of 1 in one of the rows where p is about 1: it is what
        # p - 1 and log total, about 0, are rounded from. So there only that number can be the scale
        own_truth = 1.0 / rows if dtype == "float64" else 0.0
        # the gradient of the only class is 0, what is left when numbers about 1 cancel
        check("cross_entropy", tensors, scale=1.0 if classes == 1 else own_truth, value_scale=own_truth, **options)


def test_the_result_is_the_mean_over_positions_of_an_image() -> None:
    logits, target = torch.randn(2, 21, 8, 9), torch.randint(21, (2, 8, 9))
    rows = logits.movedim(1, -1).reshape(-1, 21)
    torch.testing.assert_close(fastloss.cross_entropy(logits, target), fastloss.cross_entropy(rows, target.view(-1)))
