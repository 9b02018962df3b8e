"""linear_cross_entropy against F.linear and F.cross_entropy in the same dtype and in float64: numbers, layouts, memory, errors, options."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, LAYOUTS, REDUCTIONS, assert_no_worse, kernel_call, value_and_gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastloss
from fastloss import chunks
from fastloss.composed import linear_cross_entropy as composed

in_torch = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch before 2.13 has no linear_cross_entropy")
GRADIENTS = ("input", "linear_weight", "linear_bias")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of seven rows."""
    monkeypatch.setattr(chunks, "_FEWEST", {"cpu": 7})
    monkeypatch.setattr(fastloss.config, "linear_chunk_bytes", 1)


def tensors(
    rows: tuple[int, ...] = (23,), classes: int = 33, out: tuple[int, ...] = (), dtype: torch.dtype = torch.float32, **wanted: bool
) -> dict[str, Any]:
    """The arguments; every third class index is ignored, of K-dimensional heads whole rows, too. `wanted`: bias, soft, weighted."""
    x, w = torch.randn(*rows, 12).to(dtype), (torch.randn(classes, *out, 12) * 0.7).to(dtype)
    target = torch.randint(classes, (*rows, *out))
    target.view(-1)[::3] = -100
    if out:
        target[1::4] = -100
    if wanted.get("soft"):
        target = torch.softmax(torch.randn(*rows, classes, *out), len(rows)).to(dtype)
    bias = torch.randn(classes, *out).to(dtype) if wanted.get("bias") else None
    weight = (torch.rand(classes) + 0.1).to(dtype) if wanted.get("weighted") else None
    return {"input": x, "linear_weight": w, "linear_bias": bias, "target": target, "weight": weight}


def ours(**arguments: Any) -> Tensor:
    return kernel_call("linear_cross_entropy", **arguments)


def check(t: dict[str, Any], layouts: dict[str, str] | None = None, ulps: float = 4, **options: Any) -> None:
    leaves, views = dict(t), {}
    for name, layout in (layouts or {}).items():
        tensor = t[name]
        if tensor is not None:
            leaves[name], views[name] = LAYOUTS[layout](tensor)
    target = t["target"]
    wanted = tuple(name for name in GRADIENTS if t[name] is not None) + (("target",) if target.is_floating_point() else ())
    value, _ = value_and_gradients(lambda **a: composed(**a, **options), leaves, views, wanted, None)
    dloss = (torch.randn(value.shape) * 1.7).to(value)
    expected = value_and_gradients(lambda **a: composed(**a, **options), leaves, views, wanted, dloss)
    wide = {k: a.double() if a is not None and a.is_floating_point() else a for k, a in leaves.items()}
    truth = value_and_gradients(lambda **a: composed(**a, **options), wide, views, wanted, dloss.double())
    mine = value_and_gradients(lambda **a: ours(**a, **options), leaves, views, wanted, dloss)
    assert_no_worse(mine[0], expected[0], truth[0], "loss", ulps)
    for name, g, e, true in zip(wanted, mine[1], expected[1], truth[1], strict=True):
        assert_no_worse(g, e, true, f"gradient of {name}", ulps)
    without_graph, _ = value_and_gradients(lambda **a: ours(**a, **options), leaves, views, wanted, None)
    assert torch.equal(without_graph.nan_to_num(12345.0), mine[0].nan_to_num(12345.0)), "the value depends on requires_grad"


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers(dtype: str, soft: bool, reduction: str) -> None:
    for bias, weighted, smoothing in itertools.product((False, True), (False, True), (0.0, 0.1)):
        t = tensors(dtype=DTYPES[dtype], soft=soft, bias=bias, weighted=weighted)
        check(t, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_and_softcap(dtype: str, soft: bool) -> None:
    for scale, cap in ((0.3, None), (-2.0, None), (1.0, 3.0), (0.7, 1.5)):
        for bias, reduction in ((False, "mean"), (True, "none")):
            check(tensors(dtype=DTYPES[dtype], soft=soft, bias=bias), reduction=reduction, logit_scale=scale, logit_softcap=cap)


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes(dtype: str, soft: bool) -> None:
    """K-dimensional heads, one row, and more dimensions of rows than torch takes."""
    for rows, out in (((), ()), ((1,), ()), ((9,), (3,)), ((10,), (2, 2)), ((3, 5), ()), ((2, 3, 4), ())):
        for reduction in ("mean", "none"):
            check(tensors(rows, 17, out, DTYPES[dtype], soft=soft, bias=True, weighted=True), reduction=reduction)


@pytest.mark.parametrize("argument", ["input", "linear_weight", "linear_bias", "target", "weight"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_layouts(layout: str, argument: str) -> None:
    check(tensors(bias=True, weighted=True), {argument: layout}, label_smoothing=0.1)
    check(tensors((8,), 5, (3,), bias=True, weighted=True, soft=True), {argument: layout}, reduction="sum")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_are_never_looked_at(reduction: str) -> None:
    """On CPU they are not even multiplied: NaN in them stays there."""
    t = tensors(bias=True, weighted=True)
    x, y = t["input"], t["target"]
    clean, _ = value_and_gradients(ours, t, {}, (), None)
    check(t, reduction=reduction, label_smoothing=0.2)
    x[y == -100] = float("nan")
    value, (dx, dw) = value_and_gradients(lambda **a: ours(**a), t, {}, ("input", "linear_weight"), torch.ones(()))
    torch.testing.assert_close(value, clean)
    assert bool(dw.isfinite().all())
    assert not dx[y == -100].any()


@pytest.mark.parametrize(("reduction", "expected"), [("mean", float("nan")), ("sum", 0.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_rows_ignored(reduction: str, expected: float, smoothing: float) -> None:
    t = tensors(bias=True)
    t["target"] = torch.full((23,), 5)
    options = {"ignore_index": 5, "reduction": reduction, "label_smoothing": smoothing}
    value, gradients = value_and_gradients(lambda **a: ours(**a, **options), t, {}, GRADIENTS, torch.ones(()))
    torch.testing.assert_close(value, torch.tensor(expected), equal_nan=True)
    assert not any(bool(g.any()) for g in gradients)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_magnitudes_and_infinities(dtype: str) -> None:
    t = tensors(dtype=DTYPES[dtype], bias=True)
    x, bias = t["input"], t["linear_bias"]
    x.mul_(3e3)
    check(t, reduction="none")
    x.fill_(0.25)
    bias[::5] = -float("inf")
    y = t["target"] = torch.randint(6, (23,)) * 5 + 1
    assert bool(bias[y].isfinite().all())
    check(t)
    with_nan = ours(**{**t, "input": torch.full_like(x, float("nan"))})
    assert bool(with_nan.isnan())


def test_half_precision_is_summed_in_float32() -> None:
    """Over many chunks dW is as accurate as in one; summed in bfloat16 it is not."""
    t = tensors((700,), 33, dtype=torch.bfloat16)
    wide = {k: a.double() if a is not None and a.is_floating_point() else a for k, a in t.items()}
    up = torch.ones((), dtype=torch.bfloat16)
    _, (truth,) = value_and_gradients(composed, wide, {}, ("linear_weight",), up.double())
    _, (eager,) = value_and_gradients(composed, t, {}, ("linear_weight",), up)
    _, (mine,) = value_and_gradients(ours, t, {}, ("linear_weight",), up)
    assert (mine - truth).norm() <= 1.2 * (eager - truth).norm()


# ---------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return result


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch) -> Largest:
    """Watches the operations that our forward and backward call, but not the call itself: a mode would send that to torch."""
    watch, begin, go = Largest(), chunks.Chunks.__init__, chunks.Chunks.__iter__

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        with watch:
            begin(self, *args, **kwargs)

    def iterate(self: Any) -> Any:
        it = go(self)
        while True:
            with watch:
                try:
                    found = next(it)
                except StopIteration:
                    return
            yield found

    monkeypatch.setattr(chunks.Chunks, "__init__", watched)
    monkeypatch.setattr(chunks.Chunks, "__iter__", iterate)
    return watch


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_are_never_all_logits(allocations: Largest, dtype: str, cap: float | None, reduction: str) -> None:
    t = tensors((2000,), 100, dtype=DTYPES[dtype], bias=True, weighted=True)
    dloss = torch.ones((2000,) if reduction == "none" else (), dtype=DTYPES[dtype])
    value_and_gradients(lambda **a: ours(**a, logit_softcap=cap, reduction=reduction), t, {}, GRADIENTS, dloss)
    inputs = max(a.untyped_storage().nbytes() for a in t.values() if a is not None)
    assert 7 * 100 * DTYPES[dtype].itemsize <= allocations.bytes <= inputs


@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (200, 200), (300, 160), (1000, 256)])
def test_chunks_are_even_and_as_large_as_the_budget_allows(monkeypatch: pytest.MonkeyPatch, rows: int, expected: int) -> None:
    monkeypatch.setattr(fastloss.config, "linear_chunk_bytes", 256 * 1000 * 4)
    layer = chunks.Layer(torch.empty(rows, 8), torch.empty(1000, 8), None, 1.0, 0.0, torch.float32, torch.float32, 0)
    size = chunks.rows_of_chunk(rows, layer)
    assert min(size, rows) == expected
    assert chunks.rows_of_chunk(rows, layer._replace(chunk_rows=5)) == 5


# ---------------------------------------------------------------- errors, options, routing

BAD: dict[str, Any] = {
    "class out of bounds": lambda t: {**t, "target": t["target"] + 50},
    "two dimensional head for one dimensional features": lambda t: {**t, "linear_weight": t["linear_weight"][0]},
    "features": lambda t: {**t, "linear_weight": t["linear_weight"][:, :5]},
    "bias": lambda t: {**t, "linear_bias": t["linear_bias"][:5]},
    "dtype": lambda t: {**t, "linear_weight": t["linear_weight"].double()},
    "target shape": lambda t: {**t, "target": t["target"][:5]},
    "target dtype": lambda t: {**t, "target": t["target"].int()},
    "weight": lambda t: {**t, "weight": torch.ones(5)},
    "reduction": lambda t: {**t, "reduction": "most"},
    "smoothing": lambda t: {**t, "label_smoothing": 1.5},
    "unbatched K-dimensional": lambda t: {**t, "input": t["input"][0], "linear_weight": torch.randn(4, 3, 12), "linear_bias": None},
    "ignore_index with probabilities": lambda t: {**t, "target": torch.rand(23, 33), "ignore_index": -100},
    "no tensor": lambda t: {**t, "target": [1, 2]},
}


@in_torch
@pytest.mark.parametrize("case", BAD)
def test_errors_are_torchs(case: str) -> None:
    arguments = BAD[case](tensors(bias=True))
    with pytest.raises(Exception) as theirs:
        F.linear_cross_entropy(**arguments)
    for extra in ({}, {"logit_scale": 2.0}):
        with pytest.raises(theirs.type) as mine:
            fastloss.linear_cross_entropy(**arguments, **extra)
        if case not in ("no tensor", "dtype"):
            assert str(mine.value).split(" (")[0] == str(theirs.value).split(" (")[0]


def test_own_errors() -> None:
    t = tensors()
    for cap in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="logit_softcap must be positive or None, got"):
            fastloss.linear_cross_entropy(**t, logit_softcap=cap)
    with pytest.raises(RuntimeError, match=r"target must have shape \(2, 3\) or \(2, 3, 33\), got \(3, 2\)"):
        fastloss.linear_cross_entropy(torch.randn(2, 3, 12), t["linear_weight"], torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="dimensionality 1 or 2, got 3"):
        fastloss.linear_cross_entropy(torch.randn(2, 3, 12), torch.randn(4, 5, 12), torch.zeros(2, 3, dtype=torch.int64))


def test_few_logits_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    t = tensors()
    assert fastloss.explain(fastloss.linear_cross_entropy, **t) == ("numba", "kernel", "torch.float32 on cpu")
    monkeypatch.setattr(fastloss.config, "min_numel", 190)
    assert "759 logits are fewer than 760: config.min_numel" in fastloss.explain(fastloss.linear_cross_entropy, **t).reason
    torch.testing.assert_close(fastloss.linear_cross_entropy(**t), composed(**t))


@in_torch
def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """What of torch's options means something, and what does not."""
    t, seen = tensors((23,), dtype=torch.bfloat16), []
    real = chunks.rows_of_chunk
    monkeypatch.setattr(chunks, "rows_of_chunk", lambda *a: seen.append((real(*a), a[1].sums)) or seen[-1][0])
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=5, acc_dtype=torch.bfloat16, acc_policy="compact")
    route = fastloss.explain(fastloss.linear_cross_entropy, **t, options=options)
    assert route == ("numba", "kernel", "torch.bfloat16 on cpu; options: acc_policy means nothing here")
    ours(**t, options=options)
    ours(**t, options=torch.nn.LinearCrossEntropyOptions())
    assert seen == [(5, torch.bfloat16), (7, torch.float32)]
    contrary = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=5, chunking_method="aspect_ratio:2")
    with pytest.raises(ValueError, match="batch_chunk_size"):
        fastloss.linear_cross_entropy(**t, options=contrary)


@pytest.mark.parametrize("out", [(), (3,)])
def test_the_module(out: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    module = fastloss.LinearCrossEntropyLoss(12, 9, out_features=out, bias=True, label_smoothing=0.1, weight=torch.rand(9))
    assert isinstance(module, getattr(torch.nn, "LinearCrossEntropyLoss", torch.nn.Module))
    assert fastloss.explain(module, torch.randn(6, 12), torch.zeros(6, *out, dtype=torch.int64)).path == "kernel"
    x, y = torch.randn(6, 12), torch.randint(9, (6, *out))
    logits = module.linear(x).view(6, 9, *out)
    expected = F.cross_entropy(logits, y, weight=module.weight, label_smoothing=0.1)
    torch.testing.assert_close(module(x, y), expected)
    for mine, theirs in zip(*(torch.autograd.grad(loss, list(module.parameters())) for loss in (module(x, y), expected)), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert set(module.state_dict()) == {"weight", "linear.weight", "linear.bias"}
    if not out:
        torch.testing.assert_close(module(x.view(2, 3, 12), y.view(2, 3)), expected)
