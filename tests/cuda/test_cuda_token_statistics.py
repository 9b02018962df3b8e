"""token_statistics on the Triton kernels, in the interpreter: dtypes, layouts, answers, targets; and broken copies, each noticed."""

import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", minversion="3.4", reason="Triton 3.4 is not installed: its interpreter cannot run the CUDA kernels")

import kernel_checks as check
from test_cuda_mutants import copy_of_kernels
from token_statistics_checks import ALL, IGNORED, NAN, forward, make, token_statistics
from triton_interpreter import interpreted

import fastloss
from fastloss.contract import checked
from fastloss.kernels.cuda.plan import Device

PACKAGE = "fastloss.kernels.cuda"
DTYPES = [torch.float32, torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.long) for dtype in (torch.float64, torch.float16))]
INF = float("inf")


@pytest.fixture
def k() -> Iterator[Any]:
    package = importlib.import_module(PACKAGE)
    torch.manual_seed(0)
    with interpreted(PACKAGE):
        yield checked(package, "cpu")  # the interpreter's tensors are on the CPU


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", check.SHAPES)
def test_interpreted(k: Any, name: str, dtype: torch.dtype) -> None:
    shape, layout = check.SHAPES[name]
    if shape[0] == 0:
        forward(k, torch.empty(shape, dtype=dtype), torch.empty(0, 3, dtype=torch.int64))
        return
    for per_row, scale in ((1, 1.0), (5, 0.7), (0, 1.3)):
        logits, target = make(shape, dtype, layout, per_row)
        token_statistics(k, logits, target, scale=scale)
    token_statistics(k, *make(shape, dtype, layout, 1), parts=("dlog_prob",), inplace=True)


@pytest.mark.parametrize("shape", [(5, 10), (2, 1100), (2, 20001)], ids=str)
def test_every_subset_of_answers_has_the_bits_of_all(k: Any, shape: tuple[int, ...]) -> None:
    logits, target = torch.randn(shape), torch.randint(shape[1], (shape[0], 2))
    whole, numbers = forward(k, logits, target)
    for wanted in itertools.chain.from_iterable(itertools.combinations(ALL, n) for n in range(5)):
        answers, rows = forward(k, logits, target, wanted=wanted)
        check.assert_same(numbers[2:], rows[2:])
        for name, one, other in zip(ALL, answers, whole, strict=True):
            assert torch.equal(one, other) if name in wanted else not one.numel()


@pytest.mark.parametrize("shape", [(5, 10), (3, 1100), (2, 9, 3)], ids=str)
@pytest.mark.parametrize("parts", [(), ("beta",), ("gamma",), ("dlog_prob",), ("beta", "dlog_prob"), ("gamma", "beta")], ids=str)
def test_some_upstream_gradients(k: Any, parts: tuple[str, ...], shape: tuple[int, ...]) -> None:
    token_statistics(k, *make(shape, torch.float32, "contiguous", 3), scale=0.5, parts=parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_huge_rows(k: Any, dtype: torch.dtype) -> None:
    """Split over programs: two launches going forward."""
    logits, target = make((3, 50257), dtype, "contiguous", 3)
    logits[0, :9000] = -INF  # whole parts without a finite logit
    logits[2, 40000] = logits[2, 30011] = 77.0
    target[0, 0], target[2, 0] = 50256, 30011
    token_statistics(k, logits, target, scale=0.5)
    logits[0], logits[1], logits[2, 30001::3] = INF, -INF, NAN
    target[1] = 5
    token_statistics(k, logits, target)


def test_many_odd_rows(k: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 50257 start at every place modulo a vector; not split, as with thousands of rows. Four blocks to a program coming back."""
    monkeypatch.setattr("fastloss.kernels.cuda.launch.ASSUMED", Device(processors=1, warp=32))
    logits, target = make((9, 50257), torch.bfloat16, "contiguous", 2)
    target[0], target[2], target[3] = torch.tensor([0, 50256]), 50256, torch.tensor([50250, 7])
    token_statistics(k, logits, target)


@pytest.mark.parametrize("shape", [(6, 20), (2, 1500), (1, 9, 7)], ids=str)
def test_more_targets_than_one_step_takes(k: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastloss.kernels.cuda.targets._IN_ONE_STEP", 4)
    token_statistics(k, *make(shape, torch.float32, "contiguous", 37), scale=2.0)


@pytest.mark.parametrize("ignore_index", [0, -1, 3, 255])
@pytest.mark.parametrize("classes", [5, 1030])
def test_ignore_index(k: Any, ignore_index: int, classes: int) -> None:
    target = torch.tensor([[0, 1], [3, 2], [4, 4]])
    target[1], target[2, 1] = ignore_index, ignore_index
    token_statistics(k, torch.randn(3, classes), target, ignore_index=ignore_index)


@pytest.mark.parametrize("shape", [(4, 9), (4, 2000), (1, 9, 4), (4, 33000)], ids=str)
def test_targets_that_are_no_class(k: Any, shape: tuple[int, ...]) -> None:
    """log_prob of the target is NaN, and so is the gradient of its row, if log_prob has one; all other answers are what they were."""
    for target in (torch.tensor([shape[1], -1, 1 << 40, 0])[:, None], torch.tensor([[0, shape[1]], [-1, 1], [IGNORED, -2], [1, 0]])):
        token_statistics(k, torch.randn(shape), target)
        token_statistics(k, torch.randn(shape), target, parts=("beta",))


SPECIAL = {
    "minus infinity everywhere but at the end": lambda x: x[:, :-1].fill_(-INF),
    "minus infinity everywhere but at the end, which is the lowest number": lambda x: (
        x[:, :-1].fill_(-INF), x[:, -1].fill_(torch.finfo(x.dtype).min),
    ),
    "a whole row of minus infinity": lambda x: x[0].fill_(-INF),
    "a whole row of the lowest number": lambda x: x[0].fill_(torch.finfo(x.dtype).min),
    "plus infinity": lambda x: x[0, 3].fill_(INF),
    "plus infinity twice": lambda x: x[0, 3:5].fill_(INF),
    "nan": lambda x: x[0, -1].fill_(NAN),
    "nan after plus infinity": lambda x: (x[0, 5].fill_(INF), x[0, 7].fill_(NAN), x[0, 8].fill_(NAN)),
    "all equal": lambda x: x.fill_(2.5),
    "one towers": lambda x: x.mul_(0).sub_(1e4)[:, 5].fill_(1e4),
    "two tower": lambda x: x.mul_(0).sub_(1e4)[:, 5:9:3].fill_(1e4),
    "far from zero": lambda x: x.add_(5000.0),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES[2:]], ids=str)
@pytest.mark.parametrize("shape", [(3, 9), (3, 4111), (2, 9, 2), pytest.param((2, 20000), marks=pytest.mark.long)], ids=str)
@pytest.mark.parametrize("name", SPECIAL)
def test_special_values(k: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = torch.randn(shape).to(dtype)
    SPECIAL[name](logits)
    rows = logits.numel() // shape[1]
    token_statistics(k, logits, torch.full((rows, 1), shape[1] - 1), scale=0.5)
    token_statistics(k, logits, torch.empty(rows, 0, dtype=torch.int64))


def test_a_sure_row_has_no_entropy(k: Any) -> None:
    for classes in (9, 1500, 20000):
        logits = torch.full((2, classes), -1e4).index_fill_(1, torch.tensor([5]), 1e4)
        answers, _ = forward(k, logits, torch.full((2, 1), 5))
        assert not answers.entropy.any()
        assert not answers.log_prob.any()
        assert (answers.sum_sq_prob == 1).all()


def test_a_temperature_keeps_its_digits(k: Any) -> None:
    """Triton would round it to float32."""
    token_statistics(k, torch.randn(3, 40, dtype=torch.float64) * 9, torch.tensor([[1], [2], [3]]), scale=1 / 3)


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package, loss = importlib.import_module(PACKAGE), importlib.import_module("fastloss.losses.token_statistics")
    with interpreted(PACKAGE):
        monkeypatch.setattr(loss, "kernels_for", lambda tensor: checked(package, "cpu"))
        yield


def test_the_public_function(public: None) -> None:
    logits, target = torch.randn(2, 30, 3, requires_grad=True), torch.randint(30, (2, 3, 2))
    target[0, 1] = IGNORED
    found = []
    for x in (logits, logits.detach().double().requires_grad_()):
        answers = fastloss.token_statistics(x, target, dim=1, logit_scale=0.8, outputs=ALL)
        total = sum((i + 1) * answer.sum() for i, answer in enumerate(answers[:4]) if answer is not None)
        found.append((*(a.detach() for a in answers if a is not None), *torch.autograd.grad(total, x)))
    for single, double in zip(*found, strict=True):
        torch.testing.assert_close(single.double(), double.double(), rtol=1e-5, atol=1e-5)


MUTANTS = [
    ("moments.py", "higher, e * (gaps + z * totals)", "higher, e * gaps"),
    ("moments.py", "risen * (gaps + rise * totals), axis", "risen * gaps, axis"),
    ("moments.py", "squares * (e * e) + 1.0", "squares * e + 1.0"),
    ("moments.py", "return tl.maximum(z, _NEVER, propagate_nan=tl.PropagateNan.ALL)", "return z"),
    ("moments.py", "x == top, c", "x >= 0.0, c"),
    ("answers.py", "(odd == _NO_CLASS) & (top", "(top"),
    ("answers.py", "tl.where(odd == _NO_CLASS, largest, odd)", "largest"),
    ("targets.py", "(y != t.ignore_index) & (y >= 0)", "(y != t.ignore_index)"),
    ("token_statistics.py", "first + tl.where(none", "tl.where(none"),
    ("token_statistics.py", "y - (part + head + v * VEC)", "y - (part + v * VEC)"),
    ("token_statistics.py", "part + c == y", "c == y"),
    ("token_statistics.py", "(c[None, :] == y) & (y != a.targets.ignore_index)", "c[None, :] == y"),
    ("slope.py", "alpha - beta * tl.log(total)", "alpha"),
    ("slope.py", "inverse / total\n", "inverse\n"),
]


def every_way(k: Any) -> None:
    """All kernels, and what each of them is careful about."""
    torch.manual_seed(1)
    for shape in ((5, 10), (3, 300), (4, 1101), (3, 20001)):
        logits, target = torch.randn(shape) * 3, torch.randint(shape[1], (shape[0], 3))
        logits[0, :-2], logits[-1, shape[1] // 2] = -INF, 1e3
        target[0], target[1], target[2] = 3, torch.tensor([5, shape[1] - 1, -1]), torch.tensor([3, shape[1] - 1, 1])
        token_statistics(k, logits, target, ignore_index=3, scale=0.5)
    logits = torch.randn(3, 10)
    logits[0, 5], logits[0, 7], logits[1, 4] = INF, NAN, INF
    token_statistics(k, logits, torch.tensor([[1], [2], [3]]))


def test_unbroken_kernels_pass(k: Any) -> None:
    every_way(k)


@pytest.mark.parametrize("number", range(len(MUTANTS)), ids=lambda i: f"{MUTANTS[i][0]}: {MUTANTS[i][1].strip()}")
def test_broken_kernel_is_noticed(number: int, tmp_path: Path) -> None:
    package = copy_of_kernels(tmp_path, f"broken_statistics_{number}", *MUTANTS[number])
    with interpreted(package.__name__), pytest.raises(AssertionError):
        every_way(package)
