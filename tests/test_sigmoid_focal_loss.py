"""Sigmoid focal loss against torchvision's composition and against float64, where that composition loses digits."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, LAYOUTS, REDUCTIONS, assert_no_worse
from torch import Tensor

import fastloss

KINDS = list(itertools.product((0.25, 0.9, 0.0, -1.0), (0.0, 0.5, 1.0, 2.0, 2.5, 5.0)))


def composition(x: Tensor, y: Tensor, alpha: float, gamma: float, reduction: str) -> Tensor:
    """torchvision.ops.sigmoid_focal_loss, line by line."""
    p = torch.sigmoid(x)
    loss = F.binary_cross_entropy_with_logits(x, y, reduction="none") * (1 - (p * y + (1 - p) * (1 - y))) ** gamma
    if alpha >= 0:
        loss = (alpha * y + (1 - alpha) * (1 - y)) * loss
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def exact(x: Tensor, y: Tensor, alpha: float, gamma: float, reduction: str) -> Tensor:
    """The same in float64, with nothing subtracted from 1."""
    x, y = x.double(), y.double()
    wrong = y * torch.sigmoid(-x) + (1 - y) * torch.sigmoid(x)
    loss = F.binary_cross_entropy_with_logits(x, y, reduction="none") * wrong**gamma
    loss = loss if alpha < 0 else (alpha * y + (1 - alpha) * (1 - y)) * loss
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def both(function: object, leaf: Tensor, view: object, *arguments: object) -> tuple[Tensor, Tensor]:
    leaf = leaf.clone().requires_grad_()
    value = function(view(leaf), *arguments)  # type: ignore[operator]
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(value)
    return value.detach(), torch.autograd.grad(value, leaf, upstream)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_value_and_gradient(reduction: str, dtype: str) -> None:
    x = (torch.randn(3, 80, 7) * 4).to(DTYPES[dtype])
    for (alpha, gamma), y in itertools.product(KINDS, (torch.rand_like(x).round(), torch.rand_like(x))):
        route = fastloss.explain(fastloss.sigmoid_focal_loss, x, y, alpha, gamma, reduction)
        assert route.path == "kernel", route.reason
        arguments = y, alpha, gamma, reduction
        ours = both(fastloss.sigmoid_focal_loss, x, lambda leaf: leaf, *arguments)
        theirs, true = (both(function, x, lambda leaf: leaf, *arguments) for function in (composition, exact))
        for what, mine, other, truth in zip(("value", "gradient"), ours, theirs, true, strict=True):
            assert_no_worse(mine, other, truth.double(), f"{what}, alpha {alpha}, gamma {gamma}", ulps=8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    x, y = torch.randn(4, 6, 5), torch.rand(4, 6, 5).round()
    (leaf, view), (labels, view_labels) = LAYOUTS[layout](x), LAYOUTS[layout](y)
    arguments = view_labels(labels), 0.25, 2.0, "none"
    ours, theirs = (both(function, leaf, view, *arguments) for function in (fastloss.sigmoid_focal_loss, composition))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.5])
def test_sure_predictions(gamma: float) -> None:
    """p = 0 and p = 1 in float32: right and sure gives zero loss and gradient, wrong and sure the slope of cross-entropy."""
    x = torch.tensor([-200.0, 200.0, -200.0, 200.0], requires_grad=True)
    y = torch.tensor([0.0, 1.0, 1.0, 0.0])
    loss = fastloss.sigmoid_focal_loss(x, y, -1.0, gamma)
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.0, 200.0, 200.0]))
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.0, -1.0, 1.0]))


def test_a_small_loss_keeps_its_digits() -> None:
    """Where 1 - p_t rounds to 0 in torchvision's composition."""
    x, y = torch.tensor([20.0, -20.0]), torch.tensor([1.0, 0.0])
    torch.testing.assert_close(fastloss.sigmoid_focal_loss(x, y).double(), exact(x, y, 0.25, 2.0, "none"), rtol=1e-5, atol=0)


def test_gamma_0_is_cross_entropy() -> None:
    x, y = torch.randn(50), torch.rand(50)
    torch.testing.assert_close(fastloss.sigmoid_focal_loss(x, y, -1, 0, "mean"), fastloss.binary_cross_entropy_with_logits(x, y))


@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_differentiates_twice_and_compiles(gamma: float) -> None:
    x, y = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.rand(3, 4, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: fastloss.sigmoid_focal_loss(x, y, gamma=gamma), x)
    compiled = torch.compile(fastloss.sigmoid_focal_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y, gamma=gamma), fastloss.sigmoid_focal_loss(x, y, gamma=gamma))


def test_what_does_not_fit() -> None:
    x, y = torch.randn(3, 4), torch.rand(3, 4)
    with pytest.raises(ValueError, match="reduction must be one of none, mean, sum, got 'most'"):
        fastloss.sigmoid_focal_loss(x, y, reduction="most")
    with pytest.raises(ValueError, match="Target size"):
        fastloss.sigmoid_focal_loss(x, y[:2])
    for other in (y.double(), y.requires_grad_()):  # torch's composition serves
        torch.testing.assert_close(fastloss.sigmoid_focal_loss(x, other), composition(x, other, 0.25, 2.0, "none"))
