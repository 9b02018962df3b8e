"""The two binary cross-entropies: every option, dtype, shape, layout and broadcast weight against torch and float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, LAYOUTS, REDUCTIONS, Tensors, check, kernel_call, on_device

import fastloss
from fastloss import elements

WITH_LOGITS, PLAIN = "binary_cross_entropy_with_logits", "binary_cross_entropy"
SHAPES = [
    (),
    (1,),
    (5,),
    (16,),
    (17,),
    (33,),
    (100,),
    (8191,),
    (8193,),
    (20011,),
    (3, 7),
    (40, 48),
    (2, 3, 5),
    (2, 1, 4, 3),
    (2, 3, 2, 3, 2),
]


def inputs(
    function: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    weight: tuple[int, ...] | None = None,
    positive: tuple[int, ...] | None = None,
) -> Tensors:
    logits = torch.randn(shape) * 4
    tensors: Tensors = {
        "input": (logits if function == WITH_LOGITS else torch.sigmoid(logits)).to(dtype),
        "target": torch.rand(shape).to(dtype),
        "weight": None if weight is None else (torch.rand(weight) + 0.2).to(dtype),
    }
    if function == WITH_LOGITS:
        # float32 for half precision, as people have it: every mixture is a compilation
        tensors["pos_weight"] = None if positive is None else (torch.rand(positive) * 3 + 0.2).to(torch.promote_types(dtype, torch.float32))
    return tensors


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weight"])
@pytest.mark.parametrize("positive", [False, True], ids=["plain", "pos_weight"])
@pytest.mark.parametrize("function", [WITH_LOGITS, PLAIN])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_option(dtype: str, function: str, positive: bool, weighted: bool, reduction: str) -> None:
    for shape in ((7, 5), (3, 100)):
        tensors = inputs(function, shape, DTYPES[dtype], shape if weighted else None, shape[1:] if positive else None)
        check(function, tensors, reduction=reduction)


@pytest.mark.parametrize("function", [WITH_LOGITS, PLAIN])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_shape(dtype: str, shape: tuple[int, ...], function: str) -> None:
    for reduction in REDUCTIONS:
        check(function, inputs(function, shape, DTYPES[dtype], shape, shape), reduction=reduction)


@pytest.mark.parametrize("function", [WITH_LOGITS, PLAIN])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", ["contiguous", "transposed", "padded"])
def test_every_layout(other: str, layout: str, function: str) -> None:
    for shape in ((19, 11), (3, 70), (2, 6, 5), (3, 4, 3, 5)):
        for dtype in (torch.float32, torch.bfloat16):
            check(
                function, inputs(function, shape, dtype, shape, shape), reduction="none",
                layouts={"input": layout, "target": other, "weight": "every_other", "pos_weight": layout},
            )  # fmt: skip
    check(function, inputs(function, shape, torch.float32, shape), layouts={"input": layout, "target": other})


@pytest.mark.parametrize("function", [WITH_LOGITS, PLAIN])
@pytest.mark.parametrize(
    "weight", [(), (1,), (5,), (1, 5), (4, 1), (4, 5), (1, 1), (3, 1, 1), (3, 1, 5), (1, 4, 1), (3, 4, 5), (1, 1, 1)], ids=str
)
def test_weights_of_every_broadcastable_shape(weight: tuple[int, ...], function: str) -> None:
    for shape in ((3, 4, 5), (2, 3, 4, 5)):
        for positive in (weight, shape[-1:]):
            check(function, inputs(function, shape, torch.float32, weight, positive))
            check(function, inputs(function, shape, torch.float32, weight, positive), reduction="none", layouts={"input": "transposed"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", *(pytest.param(name, marks=pytest.mark.long) for name in ("float64", "float16"))])
@pytest.mark.parametrize("function", [WITH_LOGITS, PLAIN])
def test_gradients_written_past_the_caches(monkeypatch: pytest.MonkeyPatch, function: str, dtype: str) -> None:
    from fastloss.kernels.cpu import rows

    monkeypatch.setattr(rows, "STREAM_BYTES", 0)
    for layout in ("contiguous", "misaligned", "padded"):
        check(function, inputs(function, (5, 77), DTYPES[dtype]), layouts={"input": layout})


@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.int64, torch.bfloat16], ids=str)
def test_weights_of_another_dtype(weight_dtype: torch.dtype) -> None:
    logits, target, weight = torch.randn(6, 5), torch.rand(6, 5), torch.tensor([1, 2, 3, 4, 5]).to(weight_dtype)
    for options in ({"weight": weight}, {"pos_weight": weight}):
        mine = kernel_call(WITH_LOGITS, logits, target, **options)
        expected = F.binary_cross_entropy_with_logits(logits, target, **options)
        assert mine.dtype == expected.dtype
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("target", [0.0, 1.0, 0.3, -1.0, 2.0], ids=str)
def test_logits_in_the_tails(target: float) -> None:
    """At least as accurate as torch, element by element, where the loss or its gradient is tiny."""
    for dtype in (torch.float32, torch.float64):
        logits = torch.linspace(-80, 80, 321, dtype=torch.float64).to(dtype).requires_grad_()
        wide = logits.detach().double().requires_grad_()
        loss = kernel_call(WITH_LOGITS, logits, torch.full_like(logits, target), reduction="none")
        loss.sum().backward()
        # sigmoid and softplus without cancellation
        small = torch.log1p(torch.exp(-wide.abs()))
        truth = torch.where(wide > 0, (1 - target) * wide + small, small - target * wide)
        sigmoid, other = 1 / (1 + torch.exp(-wide)), 1 / (1 + torch.exp(wide))
        gradient = (1 - target) * sigmoid - target * other
        allowed = on_device(cpu=4, cuda=8) * torch.finfo(dtype).eps
        assert ((loss - truth).abs() <= allowed * truth.abs() + 1e-37).all()
        assert ((logits.grad - gradient).abs() <= allowed * (((1 - target) * sigmoid).abs() + (target * other).abs()) + 1e-37).all()


@pytest.mark.parametrize("positive", [None, 0.0, 3.0], ids=str)
@pytest.mark.parametrize("target", [0.0, 1.0, 0.5], ids=str)
@pytest.mark.parametrize("logit", [math.inf, -math.inf, math.nan, 3e38, -3e38], ids=str)
def test_infinities_and_nan_are_torchs(logit: float, target: float, positive: float | None) -> None:
    tensors: Tensors = {
        "input": torch.tensor([0.5, logit]),
        "target": torch.tensor([0.5, target]),
        "pos_weight": None if positive is None else torch.tensor(positive),
    }
    for weight in (None, torch.tensor([1.0, 0.0])):
        check(WITH_LOGITS, {**tensors, "weight": weight}, reduction="none")


def test_probabilities_of_exactly_0_and_1() -> None:
    prob, target = torch.meshgrid(torch.tensor([0.0, 1.0, 1e-30, 1e-12, 0.5, 1 - 2**-24]), torch.tensor([0.0, 1.0, 0.25]), indexing="ij")
    for dtype in (torch.float32, torch.float64):
        for reduction in REDUCTIONS:
            check(PLAIN, {"input": prob.to(dtype), "target": target.to(dtype)}, reduction=reduction)


@pytest.mark.parametrize("function", [WITH_LOGITS, PLAIN])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)], ids=str)
def test_nothing(function: str, shape: tuple[int, ...]) -> None:
    for reduction in REDUCTIONS:
        check(function, inputs(function, shape, torch.float32), reduction=reduction)


@pytest.mark.parametrize("function", [WITH_LOGITS, PLAIN])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_upstream_gradient_in_any_layout(layout: str, function: str) -> None:
    for shape in ((19, 11), (2, 6, 5)):
        leaf, view = LAYOUTS[layout](torch.randn(shape))
        tensors = inputs(function, shape, torch.float32)
        gradients = []
        for module in (fastloss, F):
            logits = tensors["input"].clone().requires_grad_()
            getattr(module, function)(logits, tensors["target"], reduction="none").backward(view(leaf))
            gradients.append(logits.grad)
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("function", [WITH_LOGITS, PLAIN])
@pytest.mark.parametrize("layout", ["transposed", "channels_last", "every_other", "expanded", "reversed_dims"])
def test_strides_of_the_unreduced_loss_are_torchs(layout: str, function: str) -> None:
    for shape in ((6, 5), (4, 5, 6), (2, 3, 4, 5)):
        tensors = inputs(function, shape, torch.float32)
        leaf, view = LAYOUTS[layout](tensors["input"])
        mine = kernel_call(function, view(leaf), tensors["target"], reduction="none")
        assert mine.is_contiguous() or mine.stride() == getattr(F, function)(view(leaf), tensors["target"], reduction="none").stride(), (
            shape
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_broadcast_weight_is_never_written_out(dtype: torch.dtype) -> None:
    """Casting bfloat16 weights after broadcasting them made an N x C copy in float32."""
    logits, weight = torch.empty(300, 7, 40, dtype=dtype), torch.rand(7, 1).to(dtype)
    wide = elements.computed(weight.expand(300, 7, 40), logits)
    assert (wide.shape, wide.dtype) == (logits.shape, torch.float32)
    assert wide.untyped_storage().nbytes() <= 7 * 4
    assert torch.equal(wide, weight.float().expand(300, 7, 40))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_second_derivatives_at_certain_probabilities(dtype: torch.dtype, reduction: str) -> None:
    """0 and 1, which bfloat16 rounds other numbers to: those of the definition are NaN, torch's are not."""
    p, y = torch.tensor([0.0, 1.0, 0.25, 1e-6], dtype=dtype), torch.tensor([0.0, 0.3, 0.75, 1.0], dtype=dtype)
    p, y = (t.flatten() for t in torch.meshgrid(p, y, indexing="ij"))
    weight, upstream = torch.rand(p.shape, dtype=dtype), torch.randn(p.shape, dtype=dtype)
    found = []
    for module in (fastloss, F):
        leaf = p.clone().requires_grad_()
        loss = module.binary_cross_entropy(leaf, y, weight, reduction=reduction)
        (first,) = torch.autograd.grad((loss * upstream.sum()).sum(), leaf, create_graph=True)
        found.append((first, *torch.autograd.grad((first * upstream).sum(), leaf)))
    (first, second), (torch_first, torch_second) = found
    torch.testing.assert_close(first, torch_first)
    right = (p == y) & (p * (1 - p) == 0)  # 1, as nearby, where torch has 0
    assert bool((second[right] != 0).all())
    assert bool((torch_second[right] == 0).all())
    torch.testing.assert_close(second[~right], torch_second[~right], rtol=1e-5, atol=1e-5)  # torch's is that far off near 0
