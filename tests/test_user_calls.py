"""Calls as users write them, that our first users found to differ from torch: edits, TorchScript, subclasses, nested tensors."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS
from test_after_the_call import FAMILIES, upstream
from torch import Tensor

import fastloss

INF = float("inf")
REDUCED = {family: ("mean",) if "softmax" in family else ("none", "mean", "sum") for family in FAMILIES}
on_every_family = pytest.mark.parametrize("family", FAMILIES)


def arguments(family: str, reduction: str) -> tuple[str, dict[str, Any]]:
    """The function and all of its arguments, fresh."""
    function, inputs, options = FAMILIES[family]
    copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in options.items()}
    return function, {"input": inputs.clone(), **copies, **({} if "softmax" in family else {"reduction": reduction})}


# ---------------------------------------------------------------- edits between forward and backward


def edited_in_place(api: Any, family: str, reduction: str, argument: str, layout: str, dtype: torch.dtype | None) -> Any:
    """The gradient, or 'noticed'."""
    function, named = arguments(family, reduction)
    leaf = named["input"].requires_grad_()
    named["input"] = leaf * 1
    edited = named[argument] if dtype is None else named[argument].clamp(min=0).to(dtype)
    named[argument] = edited = edited if layout == "contiguous" else torch.stack([edited, edited], -1)[..., 0]
    result = getattr(api, function)(**named)
    with torch.no_grad():
        edited[:1] = 1
    try:
        result.backward(upstream(result))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
        return "noticed"
    return leaf.grad


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@on_every_family
def test_arguments_edited_before_the_backward(family: str, layout: str) -> None:
    """An edit that torch notices is noticed; one that torch does not mind is noticed too, or the gradient is torch's."""
    wrong = []
    for reduction in REDUCED[family]:
        _, named = arguments(family, reduction)
        for argument, tensor in named.items():
            if isinstance(tensor, Tensor):
                for dtype in (None, torch.uint8) if tensor.dtype == torch.int64 else (None,):
                    theirs, mine = (edited_in_place(api, family, reduction, argument, layout, dtype) for api in (F, fastloss))
                    if isinstance(mine, Tensor) and (theirs == "noticed" if isinstance(theirs, str) else not torch.allclose(mine, theirs)):
                        wrong.append((argument, dtype, reduction))
    assert wrong == []


# ---------------------------------------------------------------- numbers and dtypes


@pytest.mark.parametrize("shape", [(6, 5), (40, 5), (6, 70)], ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_an_infinite_class_weight(smoothing: float, kind: str, shape: tuple[int, int]) -> None:
    """Also where that class has the largest logit: its log-probability is not 0, though its distance from the largest logit is."""
    logits = torch.randn(shape)
    target = torch.arange(shape[0]) % shape[1] if kind == "indices" else torch.softmax(torch.randn(shape), 1)
    for top in (0, shape[1] - 1):
        weight = torch.ones(shape[1]).index_fill(0, torch.tensor(top), INF)
        logits[0, top] = 5
        for reduction in ("none", "mean", "sum"):
            options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
            mine, theirs = (api.cross_entropy(logits, target, **options) for api in (fastloss, F))
            torch.testing.assert_close(mine, theirs, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("argument", ["weight", "pos_weight"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_weights_of_any_dtype(reduction: str, argument: str, dtype: torch.dtype) -> None:
    """What torch refuses is refused, a boolean pos_weight for one; for the rest values and dtype are torch's."""
    x, y = torch.randn(4, 5), torch.rand(4, 5)
    options = {argument: torch.tensor([1, 0, 1, 1, 1]).to(dtype), "reduction": reduction}
    try:
        expected = F.binary_cross_entropy_with_logits(x, y, **options)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            fastloss.binary_cross_entropy_with_logits(x, y, **options)
        return
    torch.testing.assert_close(fastloss.binary_cross_entropy_with_logits(x, y, **options), expected)


@on_every_family
def test_a_gradient_with_a_graph(family: str) -> None:
    """Whether it can be differentiated again, even where that derivative is 0."""
    for reduction in REDUCED[family]:
        function, named = arguments(family, reduction)
        known = []
        for api in (F, fastloss):
            x = named["input"].clone().requires_grad_()
            result = getattr(api, function)(**{**named, "input": x})
            dloss = upstream(result).requires_grad_()
            (gradient,) = torch.autograd.grad(result, x, dloss, create_graph=True)
            second = torch.autograd.grad(gradient.square().sum(), (x, dloss), allow_unused=True, materialize_grads=True)
            (constant,) = torch.autograd.grad(getattr(api, function)(**{**named, "input": x}), x, upstream(result), create_graph=True)
            known.append([gradient, gradient.requires_grad, constant.requires_grad, *second])
        torch.testing.assert_close(*known)


# ---------------------------------------------------------------- the gradient in the place of the logits


@pytest.mark.parametrize("shared", ["target", "weight", "upstream gradient"])
@pytest.mark.parametrize("kind", ["indices", "smoothed", "probabilities", "smoothed probabilities"])
def test_inplace_backward_and_shared_memory(kind: str, shared: str) -> None:
    """Numbers that the backward still reads are not overwritten by it: refused, or right."""
    if shared == "target" and "probabilities" not in kind:
        pytest.skip("class indices are of another dtype")
    smoothing, gradients = 0.1 if "smoothed" in kind else 0.0, []
    numbers = torch.rand(20, 11) + 0.1
    for inplace in (False, True):
        leaf = numbers.clone().requires_grad_()
        logits = leaf * 1
        other = logits.detach() if inplace else logits.detach().clone()
        target = torch.arange(20) % 11 if "probabilities" not in kind else other if shared == "target" else numbers.flip(0)
        weight = other[3] if shared == "weight" else numbers[4]
        dloss = other.view(-1)[40:60] if shared == "upstream gradient" else numbers[:, 5]
        try:
            fastloss.cross_entropy(logits, target, weight, label_smoothing=smoothing, reduction="none", inplace_backward=inplace).backward(
                dloss
            )
        except RuntimeError as error:
            assert "inplace" in str(error)  # noqa: PT017
            return
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


# ---------------------------------------------------------------- tensors that are not plain, and TorchScript


class Watching(torch.Tensor):
    """Writes down every function that asks it."""

    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(torch.overrides.resolve_name(func) or str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


class WatchingMode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Watching.seen.append(torch.overrides.resolve_name(func) or str(func))
        return func(*args, **(kwargs or {}))


WATCHERS = [
    (family, who)
    for family, (_, _, options) in FAMILIES.items()
    for who in ("mode", "input", *(k for k, v in options.items() if isinstance(v, Tensor)))
]


@pytest.mark.parametrize(("family", "watching"), WATCHERS)
@pytest.mark.parametrize("min_numel", [0, 1 << 18])
def test_who_watches_sees_the_function_first_and_only(family: str, min_numel: int, watching: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subclass as any of the tensors, or a mode: what it sees of our function is what it sees of torch's."""
    monkeypatch.setattr(fastloss.config, "min_numel", min_numel)
    function, named = arguments(family, "mean")
    changed = {k: v.as_subclass(Watching) if k == watching else v for k, v in named.items()}
    seen, results = [], []
    for api in (F, fastloss):
        Watching.seen.clear()
        with WatchingMode() if watching == "mode" else nullcontext():
            results.append(getattr(api, function)(**changed))
        seen.append(list(Watching.seen))
    assert seen[1] == seen[0]
    assert type(results[1]) is type(results[0])
    torch.testing.assert_close(results[1].as_subclass(Tensor), results[0].as_subclass(Tensor))


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("function", ["softmax", "log_softmax"])
def test_nested_tensors(function: str, backend: str, layout: torch.layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of different number: torch's values, gradients and errors, for small and for large ones."""
    parts = [torch.randn(2, 4), torch.randn(3, 4)]
    for min_numel in (0, 1 << 18):
        monkeypatch.setattr(fastloss.config, "min_numel", min_numel)
        for dim in (-1, 2, 1, 0):
            found = []
            for api in (F, fastloss):
                leaves = [part.clone().requires_grad_() for part in parts]
                nested = torch.nested.as_nested_tensor(leaves, layout=layout)
                try:
                    with fastloss.use_backend(backend):  # type: ignore[arg-type]
                        result = getattr(api, function)(nested, dim)
                    result.values().square().sum().backward() if layout == torch.jagged else torch.stack(
                        [part.square().sum() for part in result.unbind()]
                    ).sum().backward()
                    found.append([*result.detach().unbind(), *(leaf.grad for leaf in leaves)])
                except (RuntimeError, NotImplementedError, IndexError) as error:
                    found.append([type(error).__name__, str(error)[:60]])
            mine, theirs = found[1], found[0]
            assert [type(each) for each in mine] == [type(each) for each in theirs]
            texts = [each for each in mine if isinstance(each, str)], [each for each in theirs if isinstance(each, str)]
            assert texts[0] == texts[1]
            torch.testing.assert_close(*([each for each in one if isinstance(each, Tensor)] for one in (mine, theirs)))


def cross_entropy(x: Tensor, y: Tensor) -> Tensor:
    return fastloss.cross_entropy(x, y, ignore_index=2, label_smoothing=0.1)


def nll_loss(x: Tensor, y: Tensor) -> Tensor:
    return fastloss.nll_loss(x, y, reduction="sum")


def bce_with_logits(x: Tensor, y: Tensor) -> Tensor:
    return fastloss.binary_cross_entropy_with_logits(x, torch.sigmoid(x), reduction="none")


def binary_cross_entropy(x: Tensor, y: Tensor) -> Tensor:
    return fastloss.binary_cross_entropy(torch.sigmoid(x), torch.sigmoid(-x))


def softmax(x: Tensor, y: Tensor) -> Tensor:
    return fastloss.softmax(x, dim=1)


def log_softmax(x: Tensor, y: Tensor) -> Tensor:
    return fastloss.log_softmax(x, dim=-1, dtype=torch.float64)


class Calling(torch.nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return fastloss.cross_entropy(fastloss.log_softmax(x, 1), y) + fastloss.nll_loss(x, y)


@pytest.mark.parametrize("function", [cross_entropy, nll_loss, bce_with_logits, binary_cross_entropy, softmax, log_softmax, Calling()])
def test_code_that_calls_us_can_be_scripted(function: Callable[..., Tensor]) -> None:
    """fvcore scripts its focal loss when it is imported, MONAI its Dice losses in tests."""
    x, y = torch.randn(6, 5), torch.arange(6) % 5
    torch.testing.assert_close(torch.jit.script(function)(x, y), function(x, y))


SCRIPTED: dict[str, tuple[dict[str, Any], str]] = {
    "CrossEntropyLoss": ({"ignore_index": 2, "label_smoothing": 0.1, "weight": torch.rand(5)}, "indices"),
    "NLLLoss": ({"reduction": "sum", "weight": torch.rand(5)}, "indices"),
    "BCEWithLogitsLoss": ({"pos_weight": torch.rand(5)}, "numbers"),
    "BCELoss": ({"weight": torch.rand(5), "reduction": "none"}, "numbers"),
    "Softmax": ({"dim": 1}, ""),
    "LogSoftmax": ({"dim": -1}, ""),
}


@pytest.mark.parametrize("name", SCRIPTED)
def test_our_modules_can_be_scripted(name: str) -> None:
    options, target = SCRIPTED[name]
    x = torch.rand(6, 5)
    others = {"indices": (torch.arange(6) % 5,), "numbers": (torch.rand(6, 5),), "": ()}[target]
    mine, theirs = getattr(fastloss, name)(**options), getattr(torch.nn, name)(**options)
    torch.testing.assert_close(torch.jit.script(mine)(x, *others), theirs(x, *others))


# ---------------------------------------------------------------- compiled, with strides


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("layout", ["transposed", "every_other", "padded"])
@pytest.mark.parametrize("function", ["binary_cross_entropy", "binary_cross_entropy_with_logits"])
def test_element_wise_losses_of_strided_inputs_compile(function: str, layout: str, backend: str) -> None:
    """In one graph, for every size."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, y: getattr(fastloss, function)(x, y, reduction="none"), fullgraph=True, dynamic=True, backend=backend
    )
    for rows in (6, 9):
        leaf, view = LAYOUTS[layout](torch.rand(rows, 5))
        gradients = []
        for run in (compiled, lambda x, y: getattr(F, function)(x, y, reduction="none")):
            x = leaf.clone().requires_grad_()
            loss = run(view(x), torch.rand(rows, 5, generator=torch.Generator().manual_seed(1)))
            loss.backward(upstream(loss))
            gradients.append((loss.detach(), x.grad))
        torch.testing.assert_close(*gradients)
