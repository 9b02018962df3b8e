"""PyTorch's own test samples for these functions and modules, and their twins that are not contiguous: same result, gradient and error."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, assert_no_worse, check, copy_of

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")

from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_utils import noncontiguous_like

import fastloss

FUNCTIONS = {
    "nn.functional.cross_entropy": "cross_entropy",
    "nn.functional.nll_loss": "nll_loss",
    "nn.functional.binary_cross_entropy": "binary_cross_entropy",
    "nn.functional.binary_cross_entropy_with_logits": "binary_cross_entropy_with_logits",
    "softmax": "softmax",
    "log_softmax": "log_softmax",
}
OPS = [op for op in op_db if op.name in FUNCTIONS]
MODULES = {"CrossEntropyLoss", "NLLLoss", "BCELoss", "BCEWithLogitsLoss", "Softmax", "LogSoftmax"}


def apart(value: Any) -> Any:
    """A tensor with something else between its numbers; anything else as it is."""
    return noncontiguous_like(value) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("twin", [False, True], ids=["contiguous", "apart"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS, ids=lambda op: f"{op.name}-{op.variant_test_name}")
def test_samples(op: Any, dtype: str, twin: bool) -> None:
    function, served = FUNCTIONS[op.name], 0
    for sample in op.sample_inputs("cpu", DTYPES[dtype], requires_grad=True):
        sample = sample.noncontiguous() if twin else sample
        names = ("input", "dim", "dtype") if "softmax" in function else ("input", "target", "weight")
        options = {**dict(zip(names[1:], sample.args, strict=False)), **sample.kwargs}
        tensors = {"input": sample.input.detach()}
        wanted = ["input"]
        for name in [name for name, value in options.items() if isinstance(value, torch.Tensor)]:
            tensors[name] = options.pop(name)
            tensors[name] = tensors[name].detach()
        if function == "cross_entropy" and tensors["target"].is_floating_point():
            wanted.append("target")
        if "softmax" in function and options.get("dtype") in (None, DTYPES[dtype]):
            options.pop("dtype", None)
        try:
            route = fastloss.explain(
                getattr(fastloss, function), **{k: copy_of(t).requires_grad_(k in wanted) for k, t in tensors.items()}, **options
            )
        except TypeError:
            raise AssertionError(f"{sample} never reached fastloss") from None
        if route.path != "kernel":
            compare_with_torch(function, {k: copy_of(t).requires_grad_(k in wanted) for k, t in tensors.items()}, options)
            continue
        served += 1
        cancels = 1.0 if function in ("softmax", "cross_entropy") else 0.0
        check(function, tensors, wanted=tuple(wanted), ulps=16, scale=cancels, **options)
    assert served, "no sample was served by the kernels"


def compare_with_torch(function: str, tensors: dict[str, torch.Tensor], options: dict[str, Any]) -> None:
    expected = getattr(F, function)(**tensors, **options)
    torch.testing.assert_close(getattr(fastloss, function)(**tensors, **options), expected, equal_nan=True)


def error_inputs(op: Any) -> Iterator[Any]:
    if op.error_inputs_func is not None:
        yield from op.error_inputs("cpu")


@pytest.mark.parametrize("op", [op for op in OPS if op.error_inputs_func is not None], ids=lambda op: op.name)
def test_error_samples(op: Any) -> None:
    function, count = FUNCTIONS[op.name], 0
    for error in error_inputs(op):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            getattr(fastloss, function)(sample.input, *sample.args, **sample.kwargs)
        count += 1
    assert count


@pytest.mark.parametrize("twin", [False, True], ids=["contiguous", "apart"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("info", [m for m in module_db if m.module_cls.__name__ in MODULES], ids=lambda m: m.module_cls.__name__)
def test_module_samples(info: Any, dtype: str, twin: bool) -> None:
    name, served = info.module_cls.__name__, 0
    for sample in info.module_inputs_func(info, device="cpu", dtype=DTYPES[dtype], requires_grad=True, training=True):
        construct, call = sample.constructor_input, sample.forward_input
        placed = apart if twin else lambda value: value
        given, named = [placed(a) for a in construct.args], {k: placed(a) for k, a in construct.kwargs.items()}
        mine, theirs = (kind(*given, **named).to(DTYPES[dtype]) for kind in (getattr(fastloss, name), info.module_cls))
        results = []
        for module in (mine, theirs):
            args = [copy_of(placed(a)).requires_grad_(i == 0) if isinstance(a, torch.Tensor) else a for i, a in enumerate(call.args)]
            if not args[0].is_floating_point():
                continue
            served += fastloss.explain(mine, *args).path == "kernel"
            value = module(*args)
            value.backward(torch.full_like(value, 1.7))
            results.append((value.detach(), args[0].grad))
        for actual, expected in zip(*results, strict=True):
            assert_no_worse(actual, expected, expected.double(), name, ulps=32, scale=0.1)
    assert served


def test_every_function_and_module_has_samples() -> None:
    assert {op.name for op in OPS} == set(FUNCTIONS)
    assert {m.module_cls.__name__ for m in module_db} >= MODULES
