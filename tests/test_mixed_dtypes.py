"""Tensors of several dtypes in one call, under autocast and without: torch's dtypes, torch's errors, the truth's numbers, no copies."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS, assert_no_worse, copy_of, gaps
from torch import Tensor

import fastloss
from fastloss import composed, contract, foresight

HALF, OTHER_HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float16, torch.float32, torch.float64
N, C = 9, 70
Make = Callable[[torch.dtype, torch.dtype], dict[str, Any]]


def logits(dtype: torch.dtype) -> Tensor:
    return (torch.randn(N, C) * 3).to(dtype)


def shares(dtype: torch.dtype) -> Tensor:
    return torch.softmax(torch.randn(N, C), 1).to(dtype)


def numbers(dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.rand(shape) * 0.9 + 0.05).to(dtype)


# a call with logits of the first dtype, and what else there is of the second
CALLS: dict[str, tuple[str, Make]] = {
    "indices, weighted": ("cross_entropy", lambda a, b: {"input": logits(a), "target": torch.randint(C, (N,)), "weight": numbers(b, C)}),
    "smoothed, weighted": (
        "cross_entropy",
        lambda a, b: {"input": logits(a), "target": torch.randint(C, (N,)), "weight": numbers(b, C), "label_smoothing": 0.1},
    ),
    "probabilities": ("cross_entropy", lambda a, b: {"input": logits(a), "target": shares(b)}),
    "probabilities, weighted": ("cross_entropy", lambda a, b: {"input": logits(a), "target": shares(a), "weight": numbers(b, C)}),
    "nll_loss, weighted": ("nll_loss", lambda a, b: {"input": -logits(a).abs(), "target": torch.randint(C, (N,)), "weight": numbers(b, C)}),
    "bce with logits": ("binary_cross_entropy_with_logits", lambda a, b: {"input": logits(a), "target": numbers(b, N, C)}),
    "bce with logits, pos_weight": (
        "binary_cross_entropy_with_logits",
        lambda a, b: {"input": logits(a), "target": numbers(b, N, C), "pos_weight": numbers(SINGLE, C)},
    ),
    "bce with logits, weight of each element": (
        "binary_cross_entropy_with_logits",
        lambda a, b: {"input": logits(a), "target": numbers(a, N, C), "weight": numbers(b, N, C)},
    ),
    "bce": ("binary_cross_entropy", lambda a, b: {"input": numbers(a, N, C), "target": numbers(b, N, C), "weight": numbers(b, N, 1)}),
    "focal": ("sigmoid_focal_loss", lambda a, b: {"input": logits(a), "target": numbers(b, N, C)}),
}
MIXTURES = [(HALF, SINGLE), *(pytest.param(a, b, marks=pytest.mark.long) for a, b in [
    (HALF, HALF), (HALF, OTHER_HALF), (HALF, DOUBLE), (OTHER_HALF, OTHER_HALF), (OTHER_HALF, SINGLE), (OTHER_HALF, HALF),
    (SINGLE, HALF), (SINGLE, OTHER_HALF), (SINGLE, SINGLE), (SINGLE, DOUBLE), (DOUBLE, HALF), (DOUBLE, SINGLE), (DOUBLE, DOUBLE),
])]  # fmt: skip
REFUSED = ("indices, weighted", "smoothed, weighted", "nll_loss, weighted", "bce")  # by torch, unless autocast is active
FIRST = ("indices, weighted", "probabilities", "bce with logits")
REDUCTIONS = ["mean", pytest.param("sum", marks=pytest.mark.long), "none"]


def theirs(function: str) -> Any:
    return getattr(F, function, None) or getattr(composed, function)


def autocast(active: bool) -> Any:
    return torch.autocast("cpu", HALF) if active else nullcontext()


def found(function: Any, arguments: dict[str, Any], wanted: Sequence[str], active: bool, dloss: Tensor | None = None) -> Any:
    """Value and gradients; or the error, as a text."""
    leaves = {k: copy_of(t).requires_grad_(k in wanted) if isinstance(t, Tensor) else t for k, t in arguments.items()}
    try:
        with autocast(active):
            value = function(**leaves)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    d = (torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) * 1.7 if dloss is None else dloss).to(value.dtype)
    return value.detach(), dict(zip(wanted, torch.autograd.grad(value, [leaves[k] for k in wanted], d), strict=True)), d


@pytest.mark.parametrize("active", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(("dtype", "other"), MIXTURES, ids=str)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_torch_takes_and_returns(reduction: str, call: str, dtype: torch.dtype, other: torch.dtype, active: bool) -> None:
    """The same errors; else the same dtypes of value and gradients, and by the kernels wherever nothing is computed in float64 for some
    tensors only."""
    function, make = CALLS[call]
    arguments = {**make(dtype, other), "reduction": reduction}
    wanted = ("input", "target") if call.startswith("probabilities") else ("input",)
    mine, expected = (found(f, arguments, wanted, active) for f in (getattr(fastloss, function), theirs(function)))
    if isinstance(expected, str) or isinstance(mine, str):
        assert mine == expected
        return
    with autocast(active):
        route = fastloss.explain(getattr(fastloss, function), **arguments)
    widths = {t.dtype is DOUBLE for k, t in arguments.items() if isinstance(t, Tensor) and t.is_floating_point() and k != "pos_weight"}
    if len(widths) == 1 or (function.startswith("binary") and arguments["target"].dtype == dtype):
        assert route.path == "kernel", route
    wide = {k: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for k, t in arguments.items()}
    truth = found(theirs(function), wide, wanted, False, expected[2].double())
    assert_no_worse(mine[0], expected[0], truth[0], f"{call} value", 4)
    for name in wanted:
        assert_no_worse(mine[1][name], expected[1][name], truth[1][name], f"{call} gradient of {name}", 4, scale=1.7)


@pytest.mark.parametrize("target", [torch.bool, torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("active", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("call", ["bce with logits", "bce", "focal"])
def test_torch_takes_no_whole_numbers_for_targets(call: str, active: bool, target: torch.dtype) -> None:
    """Its error comes, of any version: where a version takes them, so do we."""
    function, make = CALLS[call]
    for dtype in (SINGLE, HALF):
        arguments = {**make(dtype, dtype), "target": torch.randint(2, (N, C)).to(target)}
        mine, expected = (found(f, arguments, ("input",), active) for f in (getattr(fastloss, function), theirs(function)))
        assert mine == expected if isinstance(expected, str) else torch.equal(mine[0], expected[0])


@pytest.mark.parametrize("active", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [None, SINGLE, pytest.param(HALF, marks=pytest.mark.long), pytest.param(DOUBLE, marks=pytest.mark.long)])
@pytest.mark.parametrize("given", [HALF, pytest.param(OTHER_HALF, marks=pytest.mark.long), pytest.param(SINGLE, marks=pytest.mark.long)])
@pytest.mark.parametrize("function", ["softmax", "log_softmax"])
def test_softmax_into_another_dtype(function: str, given: torch.dtype, dtype: torch.dtype | None, active: bool) -> None:
    for shape, dim in (((N, C), 1), ((40, 6), 1), ((3, 20, 7), 1), ((2, 2500), -1)):
        arguments = {"input": (torch.randn(shape) * 3).to(given), "dim": dim, "dtype": dtype}
        mine, expected = (found(getattr(module, function), arguments, ("input",), active) for module in (fastloss, F))
        with autocast(active):
            assert fastloss.explain(getattr(fastloss, function), **arguments).path == "kernel"
        cast = arguments["input"] if dtype is None else arguments["input"].to(dtype)  # torch casts first
        wide = {"input": cast.double(), "dim": dim}
        truth = found(getattr(F, function), wide, ("input",), False, expected[2].double())
        assert_no_worse(mine[0], expected[0], truth[0], f"{function} value", 4)
        assert_no_worse(mine[1]["input"], expected[1]["input"], truth[1]["input"], f"{function} gradient", 4, scale=8.0)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("active", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("call", [*CALLS, "softmax", "log_softmax"])
def test_kernels_are_given_the_users_memory(call: str, reduction: str, active: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy of what is as large as the logits: what a launcher gets of that size is the caller's, or returned to him."""
    if call in CALLS:
        function, make = CALLS[call]
        arguments = {**make(HALF, SINGLE), "reduction": reduction}
    else:
        function, arguments = call, {"input": logits(HALF), "dim": 1, "dtype": SINGLE}
    if not active and call in REFUSED:
        pytest.skip("torch raises")
    with autocast(active):
        assert fastloss.explain(getattr(fastloss, function), **arguments).path == "kernel"
    seen: set[int] = set()  # addresses: autograd copies a gradient that somebody else holds

    def look(name: str, launcher: Any, given: Sequence[Any], places: Sequence[contract.Place]) -> None:
        seen.update(t.data_ptr() for place in places if (t := place.of(given)).numel() == N * C and 0 not in t.stride())
        launcher(*given)

    monkeypatch.setattr(contract, "watch", look)
    monkeypatch.setattr(foresight, "_last", {})  # else a gradient is made for another upstream gradient, and again for this one
    leaves = {k: t.detach().requires_grad_(k == "input") if isinstance(t, Tensor) else t for k, t in arguments.items()}
    with autocast(active):
        value = getattr(fastloss, function)(**leaves)
    dloss = torch.ones_like(value)
    value.backward(dloss)
    tensors = [t for t in (*leaves.values(), leaves["input"].grad, value, dloss) if isinstance(t, Tensor)]
    assert seen
    assert seen <= {t.data_ptr() for t in tensors}


# ---------------------------------------------------------------- layouts, repeated calls, derivatives, compilers


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize("call", ["probabilities", "bce with logits", "bce", "focal"])
def test_every_layout_of_a_float32_target(call: str, layout: str) -> None:
    """The target's strides are counted in its own elements."""
    function, make = CALLS[call]
    arguments = make(HALF, SINGLE)
    leaf, view = LAYOUTS[layout](arguments["target"])
    results = []
    for target in (view(leaf), view(leaf).contiguous()):
        with autocast(True):
            assert fastloss.explain(getattr(fastloss, function), **{**arguments, "target": target}).path == "kernel"
        results.append(found(getattr(fastloss, function), {**arguments, "target": target, "reduction": "none"}, ("input",), True))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[0][1]["input"], results[1][1]["input"])


@pytest.mark.parametrize("call", [c if c in FIRST else pytest.param(c, marks=pytest.mark.long) for c in CALLS])
def test_a_mixture_is_a_kind_of_call_of_its_own(call: str) -> None:
    """The same shapes in other dtypes, in turn: what was remembered, and recorded, of one is not done for another."""
    function, make = CALLS[call]
    every = [make(a, b) for a, b in ((HALF, SINGLE), (SINGLE, SINGLE), (HALF, HALF))]
    first = [found(getattr(fastloss, function), arguments, ("input",), False) for arguments in every]
    for _ in range(4):
        for arguments, expected in zip(every, first, strict=True):
            again = found(getattr(fastloss, function), arguments, ("input",), False)
            if isinstance(expected, str):
                assert again == expected
            else:
                assert torch.equal(again[0], expected[0])
                assert torch.equal(again[1]["input"], expected[1]["input"])


@pytest.mark.parametrize("active", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("call", CALLS)
def test_second_derivatives(call: str, active: bool) -> None:
    function, make = CALLS[call]
    arguments = make(HALF, SINGLE)
    seconds = []
    for f in (getattr(fastloss, function), theirs(function)):
        leaf = arguments["input"].clone().requires_grad_()
        try:
            with autocast(active):
                value = f(**{**arguments, "input": leaf})
        except RuntimeError:
            continue
        (first,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
        seconds.append(torch.autograd.grad((first * first).sum(), leaf)[0])
    assert len(seconds) in (0, 2)
    if seconds:
        assert seconds[0].dtype == seconds[1].dtype
        torch.testing.assert_close(*seconds, rtol=2**-5, atol=2**-5 * float(seconds[1].abs().max()))


@pytest.mark.parametrize("call", ["indices, weighted", "probabilities", "bce with logits, pos_weight", "bce", "softmax"])
def test_under_a_compiler(call: str) -> None:
    """No graph break, the eager dtypes, and the kernels' ops: those of a compiled program run without autocast."""
    function, make = CALLS.get(call, ("softmax", lambda a, b: {"input": logits(a), "dim": 1, "dtype": b}))
    arguments = make(HALF, SINGLE)
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    def step(**given: Any) -> Tensor:
        with torch.autocast("cpu", HALF):
            result: Tensor = getattr(fastloss, function)(**given)
        return result

    eager = found(step, arguments, ("input",), False)
    for compiled in (torch.compile(step, fullgraph=True, backend=backend), torch.compile(step, fullgraph=True, backend="aot_eager")):
        mine = found(compiled, arguments, ("input",), False)
        assert (mine[0].dtype, mine[1]["input"].dtype) == (eager[0].dtype, eager[1]["input"].dtype)
        torch.testing.assert_close(mine[0], eager[0])
        torch.testing.assert_close(mine[1]["input"], eager[1]["input"])
    assert any("fastloss" in str(node.target) for node in graphs[0].graph.nodes)
    torch._dynamo.reset()


@pytest.mark.parametrize("call", ["probabilities", "bce with logits", "softmax"])
def test_ops_declare_the_dtypes_they_return(call: str) -> None:
    arguments: tuple[Any, ...] = {
        "probabilities": (logits(HALF), shares(SINGLE), None, 0.1, "mean", SINGLE),
        "bce with logits": (logits(HALF), numbers(SINGLE, N, C), None, numbers(HALF, C), "none", SINGLE),
        "softmax": (logits(HALF), 1, SINGLE, HALF),
    }[call]
    op = {"probabilities": "soft_cross_entropy", "bce with logits": "bce_with_logits"}.get(call, call)
    leaves = arguments[0].requires_grad_(), *arguments[1:]
    torch.library.opcheck(
        getattr(torch.ops.fastloss, op).default, leaves, test_utils=["test_schema", "test_faketensor", "test_aot_dispatch_static"]
    )


def test_gaps_of_a_float32_target_are_not_read() -> None:
    wide = gaps((N, C + 5), SINGLE)
    wide[:, :C] = shares(SINGLE)
    with autocast(True):
        assert fastloss.cross_entropy(logits(HALF), wide[:, :C]).isfinite()
        assert fastloss.binary_cross_entropy_with_logits(logits(HALF), wide[:, :C]).isfinite()
