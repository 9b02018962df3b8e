"""Every Triton kernel in Triton's interpreter on the CPU, for every dtype and on awkward shapes."""

import importlib
import mmap
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", minversion="3.4", reason="Triton 3.4 is not installed: its interpreter cannot run the CUDA kernels")

import kernel_checks as check
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from triton_interpreter import interpreted

from fastloss.contract import checked
from fastloss.kernels.cuda import elements, rows
from fastloss.kernels.cuda.plan import Device
from fastloss.kernels.groups import Rows, Smoothing

PACKAGE = "fastloss.kernels.cuda"
DTYPES = [torch.float32, torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.long) for dtype in (torch.float64, torch.float16))]
DENSE = ["one class", "few classes", "middling", "long rows, not a multiple of anything", "images", "shifted few"]
DENSE_TOO = ["padded rows", "shifted tokens", "every other class"]  # rows that start anywhere, and tiles in several steps
INF = float("inf")


@pytest.fixture
def k() -> Iterator[Any]:
    package = importlib.import_module(PACKAGE)
    torch.manual_seed(0)
    with interpreted(PACKAGE):
        yield checked(package, "cpu")  # the interpreter's tensors are on the CPU


def make(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets with one row ignored (its logits are NaN), class weights."""
    classes, rows = shape[1], shape[0] * (shape[2] if len(shape) == 3 else 1)
    logits = torch.randn(shape).mul(3).to(dtype)
    target = torch.randint(classes, (rows,))
    if rows > 1:
        target[1] = check.NOT_A_ROW
        by_position = logits.view(shape[0], classes, -1)
        by_position[1 // by_position.shape[2], :, 1 % by_position.shape[2]] = float("nan")
    return check.laid_out(logits, layout), target, torch.rand(classes, dtype=check.real(dtype)) + 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", check.SHAPES)
def test_cross_entropy(k: Any, name: str, dtype: torch.dtype) -> None:
    shape, layout = check.SHAPES[name]
    logits, target, weight = make(shape, dtype, layout)
    if logits.numel() == 0:
        nothing = torch.empty(0, dtype=check.real(dtype))
        return k.cross_entropy_forward(logits, target, weight, -100, nothing, Rows(nothing, None, nothing, nothing))
    check.cross_entropy(k, logits, target, weight)
    check.cross_entropy(k, logits, target, inplace=True)
    return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [50257, 20480])
def test_cross_entropy_of_few_huge_rows(k: Any, classes: int, dtype: torch.dtype) -> None:
    """Split over programs: two launches going forward."""
    logits, target, weight = make((2, classes), dtype)
    logits[0, :9000] = -INF  # whole parts without a finite logit
    target[0] = classes - 1
    check.cross_entropy(k, logits, target, weight, inplace=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy_of_many_odd_rows(k: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 50257 start at every place modulo a vector; not split, as with thousands of rows."""
    monkeypatch.setattr("fastloss.kernels.cuda.launch.ASSUMED", Device(processors=1, warp=32))
    logits, target, weight = make((5, 50257), dtype)
    target[0], target[2], target[3] = 0, 50256, 50250
    check.cross_entropy(k, logits, target, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((3, 1000), "contiguous"), ((3, 5008), "padded8"), ((3, 1031), "contiguous"), ((3, 517), "padded3"), ((2, 1040, 3), "shifted")],
)
def test_one_visit(k: Any, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    """Rows kept in registers, and shapes for which there are two visits after all."""
    logits, target, weight = make(shape, dtype, layout)
    target[2] = shape[1]
    check.cross_entropy(k, logits, target, weight, one_visit=True)
    check.cross_entropy(k, logits, target, inplace=True, one_visit=True)


@pytest.mark.parametrize("classes", [32000, 128256])
def test_one_visit_by_a_cluster(k: Any, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLOSS_CLUSTER", "1")
    logits, target, weight = make((2, classes), torch.bfloat16)
    check.cross_entropy(k, logits, target, weight, inplace=True, one_visit=True)


SPECIAL = {
    "minus infinity everywhere but at the end": lambda x: x[:, :-1].fill_(-INF),
    "a whole row of minus infinity": lambda x: x[0].fill_(-INF),
    "a whole row of the lowest number": lambda x: x[0].fill_(torch.finfo(x.dtype).min),
    "plus infinity": lambda x: x[0, 3].fill_(INF),
    "nan": lambda x: x[0, -1].fill_(float("nan")),
    "all equal": lambda x: x.fill_(2.5),
    "one towers": lambda x: x.mul_(0).sub_(1e4)[:, 5].fill_(1e4),
    "far from zero": lambda x: x.add_(5000.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES[2:]], ids=str)
@pytest.mark.parametrize("shape", [(3, 9), (3, 4111), (2, 9, 2)], ids=str)
@pytest.mark.parametrize("name", SPECIAL)
def test_special_values(k: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = torch.randn(shape).to(dtype)
    SPECIAL[name](logits)
    target = torch.full((logits.numel() // shape[1],), shape[1] - 1)
    check.cross_entropy(k, logits.clone(), target)
    if shape[1] > 1024:
        check.cross_entropy(k, logits[:, -1040:].clone(), target.clamp(max=1039), one_visit=True)
    if "minus infinity" not in name:  # 0 * inf: torch gives NaN there as well
        check.cross_entropy(k, logits.clone(), target, smoothing=0.1)


@pytest.mark.parametrize("shape", [(4, 9), (4, 2000)], ids=str)
@pytest.mark.parametrize("smoothing", [None, 0.1])
def test_targets_out_of_range(k: Any, shape: tuple[int, ...], smoothing: float | None) -> None:
    logits = torch.randn(shape)
    target = torch.tensor([shape[1], -1, 1 << 40, 0])
    check.cross_entropy(k, logits, target, smoothing=smoothing)


@pytest.mark.parametrize("ignore_index", [0, -1, 3, 255])
def test_ignore_index(k: Any, ignore_index: int) -> None:
    target = torch.tensor([0, 1, 3, 2, 4])
    target[4] = ignore_index
    check.cross_entropy(k, torch.randn(5, 5), target, ignore_index=ignore_index)


def test_scalar_upstream_gradient(k: Any) -> None:
    """dloss with stride 0."""
    logits, target = torch.randn(3, 2000), torch.tensor([5, 6, 7])
    loss, row_weight, top, total = (check.poisoned_rows(logits) for _ in range(4))
    rows = Rows(row_weight, None, top, total)
    k.cross_entropy_forward(logits, target, torch.ones(1).expand(2000), -100, loss, rows)
    dlogits = check.poisoned(logits)
    k.cross_entropy_backward(logits, target, -100, rows, torch.tensor([-1.7]).expand(3), dlogits)
    want = -1.7 * (torch.softmax(logits.double(), 1) - torch.nn.functional.one_hot(target, 2000))
    check.assert_close(dlogits, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_smoothed_cross_entropy(k: Any, name: str, dtype: torch.dtype, smoothing: float) -> None:
    logits, target, weight = make(*[check.SHAPES[name][0], dtype, check.SHAPES[name][1]])
    check.cross_entropy(k, logits, target, weight, smoothing=smoothing)
    check.cross_entropy(k, logits, target, smoothing=smoothing, inplace=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_soft_cross_entropy(k: Any, name: str, dtype: torch.dtype) -> None:
    shape, layout = check.SHAPES[name]
    logits = check.laid_out(torch.randn(shape).mul(3).to(dtype), layout)
    q = torch.softmax(torch.randn(shape), 1).to(dtype)
    weight = torch.rand(shape[1], dtype=check.real(dtype)) + 0.5
    check.soft_cross_entropy(k, logits, q, weight, smoothing=0.1)
    check.soft_cross_entropy(k, logits, check.laid_out(q, "classes last"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DENSE_TOO)
def test_dense_losses_of_long_rows(k: Any, name: str, dtype: torch.dtype) -> None:
    shape, layout = check.SHAPES[name]
    logits, target, weight = make(shape, dtype, layout)
    q = torch.softmax(torch.randn(shape), 1).to(dtype)
    check.cross_entropy(k, logits, target, weight, smoothing=0.1)
    check.cross_entropy(k, logits, target, smoothing=0.1)
    check.soft_cross_entropy(k, logits.nan_to_num(), q, weight, smoothing=0.1)
    check.soft_cross_entropy(k, logits.nan_to_num(), check.laid_out(q, layout))
    check.softmax(k, logits.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)], ids=str)
@pytest.mark.parametrize("loss", ["smoothed", "soft", "softmax"])
def test_dense_losses_of_many_odd_rows(k: Any, loss: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with thousands of rows: several blocks of a row in one program."""
    monkeypatch.setattr("fastloss.kernels.cuda.launch.ASSUMED", Device(processors=1, warp=32))
    logits, target, weight = make((3, 20011), dtype)
    if loss == "smoothed":
        check.cross_entropy(k, logits, target, weight, smoothing=0.1, inplace=True)
    elif loss == "soft":
        check.soft_cross_entropy(k, logits.nan_to_num(), torch.softmax(torch.randn(logits.shape), 1).to(dtype), weight, smoothing=0.1)
    else:
        check.softmax(k, logits.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 50), (2, 4099), (2, 30, 3)], ids=str)
def test_classes_masked_by_the_lowest_number(k: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """No probability there, so the loss is ordinary: the gap must not be measured from a mask."""
    logits, q = torch.randn(shape).to(dtype), torch.softmax(torch.randn(shape), 1).to(dtype)
    masked = shape[1] // 2 + 3
    logits[:, :masked], q[:, :masked] = torch.finfo(dtype).min, 0.0
    check.soft_cross_entropy(k, logits, q, target_too=False)
    weight = torch.ones(shape[1], dtype=check.real(dtype))
    weight[:masked] = 0.0
    target = torch.full((logits.numel() // shape[1],), shape[1] - 1)
    check.cross_entropy(k, logits, target, weight, smoothing=0.1)


def far(x: Tensor) -> float:
    """So large that the lowest number less this is infinite, so small that no sum over the classes is."""
    return torch.finfo(x.dtype).max / (4 * x.shape[1])


HUGE = {
    "2^103 or 2^970": lambda x: x.fill_(2.0**970 if x.dtype == torch.float64 else 2.0**103),
    "the largest of all": lambda x: x.fill_(torch.finfo(x.dtype).max),
    "towers": lambda x: x.index_fill_(1, torch.tensor([1, x.shape[1] - 1]), far(x)),
    "both signs": lambda x: x.sign_().mul_(far(x)),
    "far below, then ordinary": lambda x: x[:, : x.shape[1] // 2].fill_(-far(x)),
}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long), DTYPES[2]], ids=str)
@pytest.mark.parametrize("shape", [(3, 50), (2, 1500), (2, 30, 3)], ids=str)
@pytest.mark.parametrize("name", HUGE)
def test_huge_logits(k: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The gap starts where nothing has been seen: the rise from there is infinite and must not meet a mass of 0."""
    logits, q = torch.randn(shape).to(dtype), torch.softmax(torch.randn(shape), 1).to(dtype)
    HUGE[name](logits)
    target = torch.randint(shape[1], (logits.numel() // shape[1],))
    weight = torch.rand(shape[1], dtype=check.real(dtype)) + 0.5
    weight[1], q[:, 1] = 0.0, 0.0
    check.cross_entropy(k, logits, target)
    check.cross_entropy(k, logits, target, weight, smoothing=0.1)
    check.soft_cross_entropy(k, logits, q, weight, smoothing=0.1, target_too=False)
    check.soft_cross_entropy(k, logits, q, target_too=False)


def smoothed_and_soft(k: Any, logits: Tensor, target: Tensor, q: Tensor, weight: Tensor, smoothing: float) -> list[tuple[Tensor, Tensor]]:
    """(loss, dlogits) of both losses by the launchers."""
    share, found = Smoothing(1 - smoothing, smoothing / logits.shape[1]), []
    dloss = torch.ones(1, dtype=weight.dtype).expand(logits.shape[0])
    loss, *numbers = (check.poisoned_rows(logits) for _ in range(5))
    rows, dlogits = Rows(*numbers), check.poisoned(logits)
    k.smoothed_cross_entropy_forward(logits, target, weight, -100, share, loss, rows)
    k.smoothed_cross_entropy_backward(logits, target, weight, -100, share, rows, dloss, dlogits)
    found.append((loss, dlogits))
    loss, dlogits = check.poisoned_rows(logits), check.poisoned(logits)
    k.soft_cross_entropy_forward(logits, q, weight, share, loss, rows._replace(row_weight=None))
    k.soft_cross_entropy_backward(logits, q, weight, share, rows._replace(row_weight=None), dloss, dlogits)
    return [*found, (loss, dlogits)]


def beyond_numbers(classes: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Logits [1, C] and class weights, one of them or a difference of logits infinite."""
    x, w, top = torch.randn(1, classes), torch.rand(classes) + 0.5, torch.finfo(torch.float32).max
    late = classes - 2

    def put(t: Tensor, **at: float) -> Tensor:
        t = t.clone()
        for name, value in at.items():
            t[..., int(name[1:])] = value
        return t

    return {
        "weight inf": (x, put(w, c1=INF)),
        "weight inf, late": (x, put(w, **{f"c{late}": INF})),
        "weight -inf": (x, put(w, c1=-INF)),
        "weights inf and -inf": (x, put(w, c1=-INF, **{f"c{late}": INF})),
        "all weights inf": (x, w + INF),
        "weight nan": (x, put(w, c1=float("nan"))),
        "weight inf of the sure class": (put(x, c0=500.0), put(w, c0=INF)),
        "weight inf, the top": (put(x, c1=9.0), put(w, c1=INF)),
        "logit -inf": (put(x, c1=-INF), w),
        "logit -inf, weight 0": (put(x, c1=-INF), put(w, c1=0.0)),
        "logit -inf, weight inf": (put(x, c1=-INF), put(w, c1=INF)),
        "first logits -inf": (torch.where(torch.arange(classes) < late, -INF, x), w),
        "logit inf": (put(x, c1=INF), w),
        "logit inf, weight inf": (put(x, c1=INF), put(w, c1=INF)),
        "logit nan, weight inf": (put(x, c1=float("nan")), put(w, **{f"c{late}": INF})),
        "all -inf": (x - INF, w),
        "all -inf, weight inf": (x - INF, w + INF),
        "lowest, then largest": (put(x, c0=-top, **{f"c{late}": top}), w),
        "largest, then lowest": (put(x, c0=top, **{f"c{late}": -top}), w),
        "lowest with weight 0, then largest": (put(x, c0=-top, **{f"c{late}": top}), put(w, c0=0.0)),
        "largest, then lowest with weight 0": (put(x, c0=top, **{f"c{late}": -top}), put(w, **{f"c{late}": 0.0})),
    }


@pytest.mark.parametrize("classes", [5, 3000])
@pytest.mark.parametrize("name", beyond_numbers(5))
def test_nan_and_infinity_are_torchs(k: Any, name: str, classes: int) -> None:
    x, weight = beyond_numbers(classes)[name]
    q = torch.softmax(torch.randn(1, classes), 1)
    for target in (torch.tensor([0]), torch.tensor([1]), torch.tensor([classes - 1])):
        found = smoothed_and_soft(k, x, target, q, weight, 0.1)
        for (loss, dlogits), wanted in zip(found, (target, q), strict=True):
            logits = x.clone().requires_grad_()
            torchs = torch.nn.functional.cross_entropy(logits, wanted, weight, reduction="none", label_smoothing=0.1)
            truth = torch.nn.functional.cross_entropy(
                x.double(), wanted if wanted is target else q.double(), weight.double(), reduction="none", label_smoothing=0.1
            )
            if not torchs.isfinite() and truth.isfinite():  # too large for float32: infinite, 0 x infinity, or right after all
                assert not loss.isfinite() or torch.isclose(loss.double(), truth, rtol=1e-5)
            else:
                torch.testing.assert_close(loss, torchs.detach(), rtol=1e-5, atol=1e-6, equal_nan=True)
            torch.testing.assert_close(dlogits, torch.autograd.grad(torchs.sum(), logits)[0], rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_softmax(k: Any, name: str, dtype: torch.dtype) -> None:
    shape, layout = check.SHAPES[name]
    check.softmax(k, check.laid_out(torch.randn(shape).mul(3).to(dtype), layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 10), (3, 2500), (2, 7, 5)], ids=str)
def test_nll_loss(k: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits, target, weight = make(shape, dtype)
    check.nll_loss(k, logits, target, weight)
    target[0], target[-1] = shape[1], -1
    check.nll_loss(k, logits, target, weight)


def broadcast_cases(dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Elements, class numbers for a weight, all of one shape [A, B, P]."""
    real = check.real(dtype)
    one = torch.ones(1, 1, 1, dtype=real)
    return {
        "one line": (torch.randn(1, 1, 2500), one.expand(1, 1, 2500), torch.rand(1, 1, 2500, dtype=real)),
        "a weight for each class": (torch.randn(1, 40, 30), torch.rand(1, 1, 30, dtype=real).expand(1, 40, 30), one.expand(1, 40, 30)),
        "a weight for each channel": (torch.randn(3, 2, 25), torch.rand(1, 2, 1, dtype=real).expand(3, 2, 25), one.expand(3, 2, 25)),
        "transposed": (torch.randn(1, 30, 40).transpose(1, 2), one.expand(1, 40, 30), torch.rand(1, 40, 1, dtype=real).expand(1, 40, 30)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long), *DTYPES[2:]], ids=str)
@pytest.mark.parametrize("name", [name for name, (shape, _) in check.SHAPES.items() if shape[0]])
def test_sparse_soft_cross_entropy(k: Any, name: str, dtype: torch.dtype) -> None:
    """A class twice, padding, a row of nothing else whose logits are NaN, an index that is no class."""
    shape, layout = check.SHAPES[name]
    logits, target, weight = make(shape, dtype, layout)
    indices = torch.randint(shape[1], (target.numel(), 5))
    indices[:, 4], indices[:, 2] = indices[:, 0], check.NOT_A_ROW
    indices[1:2] = check.NOT_A_ROW
    prob = torch.rand(indices.shape, dtype=check.real(dtype))
    check.sparse_soft_cross_entropy(k, logits, indices, prob, weight)
    indices[2:3, 3] = shape[1]
    check.sparse_soft_cross_entropy(k, logits, indices, prob)
    check.sparse_soft_cross_entropy(k, logits.nan_to_num(), indices, prob[:1].expand(indices.shape), weight, smoothing=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", broadcast_cases(torch.float32))
def test_bce_with_logits(k: Any, name: str, dtype: torch.dtype) -> None:
    x, pos_weight, weight = broadcast_cases(dtype)[name]
    x = (x * 8).to(dtype)
    check.bce_with_logits(k, x, torch.rand(x.shape).to(dtype), weight, pos_weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", broadcast_cases(torch.float32))
def test_binary_cross_entropy(k: Any, name: str, dtype: torch.dtype) -> None:
    x, weight, _ = broadcast_cases(dtype)[name]
    p = torch.sigmoid(x * 4).to(dtype)
    y = torch.rand(x.shape).to(dtype)
    p[0, 0, :2], y[0, 0, :2] = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    check.binary_cross_entropy(k, p, y, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 2.5])
@pytest.mark.parametrize("alpha", [0.25, -1.0])
def test_sigmoid_focal_loss(k: Any, alpha: float, gamma: float, dtype: torch.dtype) -> None:
    """Soft targets; and the surest logits, right and wrong."""
    x = (torch.randn(1, 30, 40) * 8).to(dtype).transpose(1, 2)
    y = torch.rand(1, 40, 30).to(dtype)
    x[0, 0, :6] = torch.tensor([100.0, 100.0, -100.0, -100.0, 0.0, 0.0])
    y[0, 0, :6] = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    check.sigmoid_focal_loss(k, x, y, alpha, gamma)
    check.sigmoid_focal_loss(k, torch.randn(1, 1, 2500).to(dtype), torch.randint(2, (1, 1, 2500)).to(dtype), alpha, gamma)


MIXED = [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("dtype", "other"), MIXED, ids=str)
def test_mixed_dtypes(k: Any, dtype: torch.dtype, other: torch.dtype) -> None:
    """Targets, weights and results of another dtype than the logits."""
    for shape, layout in ((5, 10), "contiguous"), ((3, 1037), "padded3"), ((2, 1031, 3), "shifted"):
        logits, q = check.laid_out(torch.randn(shape).to(dtype), layout), torch.softmax(torch.randn(shape), 1).to(other)
        check.soft_cross_entropy(k, logits, q, torch.rand(shape[1]) + 0.5, smoothing=0.1)
        check.softmax(k, logits, other)
    x, y = (torch.randn(1, 30, 40) * 8).to(dtype).transpose(1, 2), torch.rand(1, 40, 30).to(other)
    weight, pos_weight = torch.rand(1, 40, 30).to(dtype), (torch.rand(1, 1, 1) + 0.5).to(other).expand(1, 40, 30)
    check.bce_with_logits(k, x, y, weight, pos_weight, other)
    check.binary_cross_entropy(k, torch.sigmoid(x), y, weight)
    check.sigmoid_focal_loss(k, x, y, 0.25, 2.0)


def test_elementwise_losses_in_the_tails(k: Any) -> None:
    check.tails(k)


@triton.jit
def _where_tiles_lie(number, n, rows_ptr, inside_ptr, elements_ptr, exist_ptr, BLOCK: tl.constexpr):
    """A tile of n positions and an elementwise program of n elements."""
    _b, _p, row, inside = rows._tile_of(number, n, BLOCK)
    _a, _b, p, exist = elements._elements_of(number, 1, n, 1, BLOCK)
    lane = tl.arange(0, BLOCK)
    tl.store(rows_ptr + lane, row)
    tl.store(inside_ptr + lane, inside)
    tl.store(elements_ptr + lane[None, :], p)
    tl.store(exist_ptr + lane[None, :], exist)


@pytest.mark.parametrize("n", [2**31 - 2048, 2**31 - 2047, 2**31 - 1, 2**31, 2**33 + 5])
@pytest.mark.parametrize("block", [256, 2048])
def test_the_last_block_of_positions_around_int32(k: Any, n: int, block: int) -> None:
    """The interpreter raises where an int32 overflows."""
    number = (n - 1) // block
    found, exist = torch.zeros(2, block, dtype=torch.int64), torch.zeros(2, block, dtype=torch.bool)
    InterpretedFunction(_where_tiles_lie.fn)[(1,)](number, n, found[0], exist[0], found[1], exist[1], BLOCK=block)
    want = number * block + torch.arange(block)
    assert torch.equal(exist, (want < n).expand(2, block))
    assert torch.equal(found[exist], want.expand(2, block)[exist])


@triton.jit
def _do(x_ptr, y_ptr, out_ptr, HOW: tl.constexpr):
    x, y = tl.load(x_ptr + tl.arange(0, 2)), tl.load(y_ptr + tl.arange(0, 2))
    tl.store(out_ptr + tl.arange(0, 2), x + y if HOW == "add" else x - y if HOW == "sub" else x * y)


@pytest.mark.parametrize(
    ("how", "x", "y", "fits"),
    [("add", 2**31 - 2, 1, True), ("add", 2**31 - 1, 1, False), ("sub", -(2**31) + 1, 1, True), ("sub", -(2**31), 1, False),
     ("mul", 2**30, -2, True), ("mul", 2**30, 2, False)],
)  # fmt: skip
def test_an_int32_that_overflows_is_an_error(k: Any, how: str, x: int, y: int, fits: bool) -> None:
    left, right = torch.tensor([0, x], dtype=torch.int32), torch.tensor([1, y], dtype=torch.int32)
    out = torch.empty(2, dtype=torch.int32)
    run = partial(InterpretedFunction(_do.fn)[(1,)], left, right, out, HOW=how)
    if fits:
        run()
        assert out[1] == {"add": x + y, "sub": x - y, "mul": x * y}[how]
    else:
        with pytest.raises(Exception, match=f"int32 overflow detected for operation {how}"):
            run()


def test_a_class_weight_with_a_huge_stride(k: Any) -> None:
    """The last lies more than 2**31 numbers behind the first; only pages that are touched exist."""
    stride, no_reserve = 3 << 28, 0x4000
    pages = mmap.mmap(-1, (3 * stride + 1) * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    weight = torch.frombuffer(pages, dtype=torch.float32)[::stride].copy_(torch.rand(4) + 0.5)
    check.cross_entropy(k, torch.randn(3, 4), torch.tensor([1, 3, 0]), weight, smoothing=0.1)


@pytest.mark.parametrize("size", [0, 1, 5, 3000, 40000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sum_rows(k: Any, size: int, dtype: torch.dtype) -> None:
    check.sum_rows(k, torch.randn(size, dtype=dtype))
    check.mean_of_rows(k, torch.randn(size, dtype=dtype), torch.rand(size, dtype=dtype))
