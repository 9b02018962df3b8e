"""The checks can fail: each breaks a copy of the kernels in one place and must be noticed."""

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", minversion="3.4", reason="Triton 3.4 is not installed: its interpreter cannot run the CUDA kernels")

import kernel_checks as check
from triton_interpreter import interpreted

SOURCES = Path(__file__).parents[2] / "kernels" / "cuda"


def index_targets(shape: tuple[int, ...], smoothing: float | None = None, inplace: bool = False) -> Callable[[Any], None]:
    def run(k: Any) -> None:
        rows = shape[0] * (shape[2] if len(shape) == 3 else 1)
        target = torch.randint(shape[1], (rows,))
        target[1] = check.NOT_A_ROW
        target[2] = shape[1] - 1
        check.cross_entropy(k, torch.randn(shape).mul(3), target, torch.rand(shape[1]) + 0.5, smoothing, inplace)

    return run


def elements(k: Any) -> None:
    x = torch.randn(1, 40, 30)
    check.bce_with_logits(k, x, torch.rand(1, 40, 30), torch.rand(1, 40, 30), torch.rand(1, 1, 30).expand(1, 40, 30))


ROWS, FEW, HUGE = index_targets((4, 5001)), index_targets((5, 10)), index_targets((3, 20001))
SOFT = lambda k: check.soft_cross_entropy(k, torch.randn(4, 50), torch.softmax(torch.randn(4, 50), 1), torch.rand(50) + 0.5, 0.1)  # noqa: E731
SOFTMAX = lambda k: check.softmax(k, torch.randn(4, 50))  # noqa: E731
NLL = lambda k: check.nll_loss(k, torch.randn(4, 50), torch.tensor([1, -100, 49, 0]), torch.rand(50))  # noqa: E731
NO_CLASS = lambda k: check.nll_loss(k, torch.randn(1, 5), torch.tensor([5]), torch.rand(5))  # noqa: E731

MUTANTS: list[tuple[str, str, str, Callable[[Any], None]]] = [
    ("rows.py", "total * e + 1.0", "total + 1.0", FEW),
    ("rows.py", "joint, total * _exp(top - joint) + terms", "joint, total + terms", ROWS),
    ("rows.py", "e < head", "e < head - 1", ROWS),
    ("rows.py", "c < C)\n\n\n", "c < C - 1)\n\n\n", ROWS),
    ("rows.py", "(whole + lane < vectors)", "(whole + lane < vectors - 1)", ROWS),
    ("rows.py", "b * P + p, p < P", "b * P + p, p <= P", index_targets((2, 7, 3))),
    ("cross_entropy.py", "y - head - v * VEC", "y - v * VEC", ROWS),
    ("cross_entropy.py", "inside = (v + lane < vectors)", "inside = (v + lane < vectors - 1)", ROWS),
    (
        "cross_entropy.py",
        "tl.where(is_row[:, None], d, 0.0)",
        "d",
        lambda k: check.cross_entropy(k, torch.full((1, 5), torch.nan), torch.tensor([-100])),
    ),
    ("cross_entropy.py", "number % parts.splits * parts.chunk\n    count = tl.where", "0 * parts.chunk\n    count = tl.where", HUGE),
    ("cross_entropy.py", "(x_y - top)", "(x_y)", FEW),
    ("cross_entropy.py", "tl.where(is_row, w_y * nll, 0.0)", "w_y * nll", FEW),
    ("smoothed_cross_entropy.py", "_gap_of(gaps, weights, tops", "_gap_of(gaps, weights * 0, tops", index_targets((5, 300), 0.1)),
    ("smoothed_cross_entropy.py", "- g[:, None] * w", "", index_targets((5, 10), 0.1)),
    ("weighted.py", "masses * (joint - tops)", "0.0", index_targets((3, 20001), 0.1)),
    ("weighted.py", "masses * (top - tops)", "0.0", index_targets((4, 5001), 0.1)),
    ("smoothed_cross_entropy.py", "y_here = y - head", "y_here = y", index_targets((4, 5001), 0.1)),
    ("soft_cross_entropy.py", "_class_weights(a, part + c,", "_class_weights(a, c,", lambda k: soft_rows(k)),
    ("soft_cross_entropy.py", "a.target + _first_vector(given, VEC)", "a.target + given", lambda k: soft_rows(k)),
    ("softmax.py", "+ tl.sum(y_edges * dy_edges, 0)", "", lambda k: check.softmax(k, torch.randn(4, 601) * 3)),
    ("soft_cross_entropy.py", "+ spread.to(real))\n    d = ", ")\n    d = ", SOFT),
    ("soft_cross_entropy.py", "log_total[:, None] - (x", "log_total[:, None] * 0 - (x", SOFT),
    ("sparse_soft_cross_entropy.py", "d - less[:, None]", "d", lambda k: sparse(k)),
    ("sparse_soft_cross_entropy.py", "tl.where(is_entry, factor, 0.0)", "factor", lambda k: sparse(k)),
    ("sparse_soft_cross_entropy.py", "(y < first + BLOCK_C)", "(y < first + BLOCK_C - 1)", lambda k: sparse(k)),
    ("sparse_soft_cross_entropy.py", "d -= g", "d -= 0 * g", lambda k: sparse(k, 0.1)),
    ("softmax.py", "(dy - dot[:, None])", "dy", SOFTMAX),
    ("softmax.py", "dy - _exp(y) * dot[:, None]", "dy - dot[:, None]", SOFTMAX),
    ("nll_loss.py", "-g[:, None], elsewhere[:, None]", "-g[:, None], -0.5", NLL),
    ("nll_loss.py", 'float("nan"), 0.0)\n    d', "0.0, 0.0)\n    d", NO_CLASS),
    ("math.py", "p * x - 4.999989265e-1", "p * x - 4.9e-1", elements),
    ("math.py", "tl.fma(e, lost * _LOG_2, e)", "e", check.tails),
    ("bce_with_logits.py", "tl.where(positive, small, large)", "small", elements),
    ("bce_with_logits.py", "tl.where(x > 0.0, high, high", "high + tl.where(x > 0.0, 0.0, high - high", check.tails),
    ("sigmoid_focal_loss.py", "(1.0 - y - y)", "(1.0 - y)", lambda k: focal(k)),
    ("sigmoid_focal_loss.py", "if fraction > 0.0", "if fraction > 1.0", lambda k: focal(k)),
    ("sigmoid_focal_loss.py", "negative.to(y.dtype) * (1.0 - y)", "negative.to(y.dtype)", lambda k: focal(k)),
    ("elements.py", "p * strides[2]", "p", lambda k: elements_transposed(k)),
    ("reduction.py", "tl.num_programs(0) + ", "", lambda k: check.mean_of_rows(k, torch.randn(40000), torch.rand(40000))),
    ("reduction.py", "mask=i < count", "mask=i <= count", lambda k: check.sum_rows(k, torch.randn(40000)[:20000])),
]


def soft_rows(k: Any) -> None:
    q = torch.softmax(torch.randn(3, 5001), 1)
    check.soft_cross_entropy(k, torch.randn(3, 5001), q, torch.rand(5001) + 0.5, 0.1)


def elements_transposed(k: Any) -> None:
    x = torch.randn(1, 30, 40).transpose(1, 2)
    check.bce_with_logits(k, x, torch.rand(1, 40, 30), torch.rand(1, 40, 30), torch.ones(1, 1, 1).expand(1, 40, 30))


def sparse(k: Any, smoothing: float = 0.0) -> None:
    indices = torch.tensor([[1, 2047, -100], [0, 5, 0], [2999, 2047, 2048]])
    check.sparse_soft_cross_entropy(k, torch.randn(3, 3000), indices, torch.rand(3, 3), torch.rand(3000) + 0.5, smoothing)


def focal(k: Any) -> None:
    check.sigmoid_focal_loss(k, torch.randn(1, 40, 30), torch.rand(1, 40, 30), 0.25, 2.5)


def copy_of_kernels(folder: Path, name: str, file: str, old: str, new: str) -> Any:
    copy = folder / name / "cuda"
    shutil.copytree(SOURCES, copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(SOURCES.parent / "groups.py", copy.parent)
    source = (copy / file).read_text()
    assert old in source, f"{file} no longer contains {old!r}: update this mutant"
    (copy / file).write_text(source.replace(old, new))
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(f"{name}.cuda")
    finally:
        sys.path.remove(str(folder))


@pytest.mark.parametrize("number", range(len(MUTANTS)), ids=lambda i: f"{MUTANTS[i][0]}: {MUTANTS[i][1].strip()}")
def test_broken_kernel_is_noticed(number: int, tmp_path: Path) -> None:
    file, old, new, run = MUTANTS[number]
    torch.manual_seed(1)
    package = copy_of_kernels(tmp_path, f"mutant_{number}", file, old, new)
    with interpreted(package.__name__), pytest.raises(AssertionError):
        run(package)


@pytest.mark.parametrize("run", sorted({id(m[3]): m[3] for m in MUTANTS}.values(), key=id))
def test_unbroken_kernel_passes(run: Callable[[Any], None]) -> None:
    torch.manual_seed(1)
    package = importlib.import_module("fastloss.kernels.cuda")
    with interpreted(package.__name__):
        run(package)
