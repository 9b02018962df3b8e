"""The losses' definitions are torch's functions."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import REDUCTIONS

from fastloss import losses

f64 = torch.float64


def definition(loss: Any, *arguments: Any) -> torch.Tensor:
    """A loss's definition of its tensors and options, one after the other; the dtype of the loss is left out."""
    tensors = len(loss.tensors._fields)
    options = (*arguments[tensors:], f64)[: len(loss.options._fields)]
    return loss.definition(loss.tensors(*arguments[:tensors]), loss.options(*options))  # type: ignore[no-any-return]


WEIGHT = torch.rand(5, dtype=f64, generator=torch.Generator().manual_seed(3)) + 0.1


def compare(mine: torch.Tensor, theirs: torch.Tensor, leaf: torch.Tensor) -> None:
    """Values, and first and second derivatives under a random upstream gradient."""
    theirs = theirs.reshape(mine.shape)
    torch.testing.assert_close(mine, theirs, equal_nan=True)
    dloss = torch.randn_like(mine.detach())
    gradients = [torch.autograd.grad(loss, leaf, dloss, create_graph=True)[0] for loss in (mine, theirs)]
    torch.testing.assert_close(*gradients, equal_nan=True)
    seconds = [torch.autograd.grad((g**2).sum(), leaf, allow_unused=True)[0] if g.requires_grad else None for g in gradients]
    torch.testing.assert_close(*(torch.zeros_like(leaf) if s is None else s for s in seconds), equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weight", [None, WEIGHT, torch.tensor([0.0, 1, 0, 1, 2], dtype=f64)], ids=["plain", "weight", "zeros"])
def test_class_indices(weight: torch.Tensor | None, reduction: str) -> None:
    for shape, ignore_index, smoothing in itertools.product(((6, 5), (2, 5, 3)), (-100, 2), (0.0, 0.1, 1.0)):
        for target in (torch.randint(5, shape[:1] + shape[2:]), torch.zeros(shape[:1] + shape[2:], dtype=torch.long)):
            leaf = torch.randn(shape, dtype=f64, requires_grad=True)
            target.view(-1)[::3] = ignore_index
            theirs = F.cross_entropy(leaf, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing)
            if weight is not None and reduction == "mean" and weight[0] == 0:
                torch.testing.assert_close(
                    definition(losses.cross_entropy, leaf, target, weight, ignore_index, smoothing, reduction), theirs, equal_nan=True
                )
                continue
            compare(definition(losses.cross_entropy, leaf, target, weight, ignore_index, smoothing, reduction), theirs, leaf)
            if smoothing == 0:
                log_prob = (-torch.rand(shape, dtype=f64)).requires_grad_()
                theirs = F.nll_loss(log_prob, target, weight, ignore_index=ignore_index, reduction=reduction)
                compare(definition(losses.nll_loss, log_prob, target, weight, ignore_index, reduction), theirs, log_prob)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weight"])
def test_class_probabilities(weight: torch.Tensor | None, reduction: str) -> None:
    for shape, smoothing in itertools.product(((6, 5), (2, 5, 3)), (0.0, 0.1, 1.0)):
        leaf, target = torch.randn(shape, dtype=f64, requires_grad=True), torch.rand(shape, dtype=f64, requires_grad=True)
        theirs = F.cross_entropy(leaf, target, weight, reduction=reduction, label_smoothing=smoothing)
        mine = definition(losses.soft_cross_entropy, leaf, target, weight, smoothing, reduction)
        compare(mine, theirs, leaf)
        if smoothing < 1:
            compare(mine, theirs, target)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weights"])
def test_binary(weighted: bool, reduction: str) -> None:
    leaf, target = torch.randn(4, 5, dtype=f64, requires_grad=True), torch.rand(4, 5, dtype=f64)
    weight, positive = (WEIGHT, WEIGHT * 2) if weighted else (None, None)
    theirs = F.binary_cross_entropy_with_logits(leaf, target, weight, reduction=reduction, pos_weight=positive)
    compare(definition(losses.bce_with_logits, leaf, target, weight, positive, reduction), theirs, leaf)
    prob = torch.rand(4, 5, dtype=f64, requires_grad=True)
    compare(
        definition(losses.binary_cross_entropy, prob, target, weight, reduction),
        F.binary_cross_entropy(prob, target, weight, reduction=reduction),
        prob,
    )


def test_all_ignored_and_no_rows() -> None:
    for rows in (0, 3):
        leaf, target = torch.randn(rows, 5, dtype=f64, requires_grad=True), torch.full((rows,), -100)
        for reduction, smoothing in itertools.product(REDUCTIONS, (0.0, 0.1)):
            mine = definition(losses.cross_entropy, leaf, target, None, -100, smoothing, reduction)
            torch.testing.assert_close(mine, F.cross_entropy(leaf, target, reduction=reduction, label_smoothing=smoothing), equal_nan=True)
