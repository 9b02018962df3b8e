"""The worked examples of five tutorials that fastloss grew from, with the numbers they print."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import kernel_call

import fastloss
from fastloss.backends import kernels
from fastloss.kernels.groups import Rows


def close(actual: torch.Tensor, expected: object, atol: float = 5e-5) -> None:
    torch.testing.assert_close(actual.detach().double(), torch.as_tensor(expected, dtype=torch.float64), atol=atol, rtol=0)


def bare_cross_entropy(logits: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per-row losses and gradients by the kernels alone, from and into NumPy arrays full of NaN."""
    x, y = torch.from_numpy(logits), torch.from_numpy(target)
    n, c = logits.shape
    loss, row_weight, top, total = (torch.from_numpy(np.full(n, np.nan, logits.dtype)) for _ in range(4))
    rows = Rows(row_weight, None, top, total)
    dlogits, ones = np.full_like(logits, np.nan), torch.ones(1, dtype=x.dtype)
    numba = kernels("numba")
    numba.cross_entropy_forward(x, y, ones.expand(c), -100, loss, rows)
    numba.cross_entropy_backward(x, y, -100, rows, ones.expand(n) / n, torch.from_numpy(dlogits))
    return loss.numpy(), dlogits


def test_s1a_equal_scores() -> None:
    scores, target = torch.tensor([[1.0, 1, 1], [0, 0, 0], [2, 2, 2], [2, 2, 2]]), torch.tensor([0, 2, 1, 0])
    expected = -math.log(1 / 3)
    close(torch.tensor(expected), 1.0986)
    close(kernel_call("cross_entropy", scores, target), expected, 1e-6)
    close(fastloss.CrossEntropyLoss()(scores, target), expected, 1e-6)
    close(torch.nn.CrossEntropyLoss()(scores, target), expected, 1e-6)
    loss, _ = bare_cross_entropy(scores.numpy(), target.numpy())
    assert np.allclose(loss, expected)


@pytest.mark.parametrize("form", ["functional", "module", "kernels"])
def test_s1b_through_a_linear_layer(form: str) -> None:
    torch.manual_seed(1)
    inputs, target = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    weight, bias = torch.randn(3, 3, requires_grad=True), torch.randn(1)
    score = inputs @ weight + bias
    if form == "kernels":
        losses, dscore = bare_cross_entropy(score.detach().numpy(), target.numpy())
        loss = torch.from_numpy(losses).mean()
        score.backward(torch.from_numpy(dscore))
    else:
        loss = kernel_call("cross_entropy", score, target) if form == "functional" else fastloss.CrossEntropyLoss()(score, target)
        loss.backward()
    close(loss, 0.9580)
    close(weight.grad, [[-0.3271, 0.3744, -0.0472], [-0.0770, 0.0185, 0.0586], [-0.1946, 0.1629, 0.0316]])
    close(weight.grad, inputs.T @ (torch.softmax(score.detach(), 1) - F.one_hot(target, 3)) / 4, 1e-6)


def image() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    scores = torch.nn.Conv2d(3, 2, 1)(torch.randn(1, 3, 5, 5)).detach()
    target = torch.zeros(1, 2, 5, 5)
    target[0, 0, :2] = 1
    target[0, 1, 2:] = 1
    return scores, target


def test_s1c_sigmoid_of_an_image() -> None:
    """The sigmoid by its definition, and as two-class softmax by fastloss."""
    scores, _ = image()
    assert scores.shape == (1, 2, 5, 5)
    by_definition = 1 / (1 + torch.exp(-scores))
    close(torch.sigmoid(scores), by_definition, 1e-6)
    close(kernel_call("softmax", torch.stack([torch.zeros_like(scores), scores]), 0)[1], by_definition, 1e-6)


def test_s1d_bce_of_an_image() -> None:
    scores, target = image()
    expected = torch.nn.BCELoss()(torch.sigmoid(scores), target)
    close(torch.nn.BCEWithLogitsLoss()(scores, target), expected, 1e-6)
    close(kernel_call("binary_cross_entropy_with_logits", scores, target), expected, 1e-6)
    close(kernel_call("binary_cross_entropy", torch.sigmoid(scores), target), expected, 1e-6)
    close(fastloss.BCEWithLogitsLoss()(scores, target), expected, 1e-6)
    close(fastloss.BCELoss()(torch.sigmoid(scores), target), expected, 1e-6)


def test_s1e_bce_by_two_formulas() -> None:
    scores, target = torch.tensor([5.0, 8.0]), torch.tensor([0.0, 1.0])
    prob = torch.sigmoid(scores)
    close(-(target * prob.log() + (1 - target) * (1 - prob).log()).mean(), 2.5035)
    close((scores.clamp(min=0) - scores * target + torch.log1p(torch.exp(-scores.abs()))).mean(), 2.5035)
    close(kernel_call("binary_cross_entropy_with_logits", scores, target), 2.5035)
    close(kernel_call("binary_cross_entropy", prob, target), 2.5035)


S2 = torch.tensor([-1.7723, -1.5965, 0.8863]), torch.tensor([0.0, 1.0, 0.0])


def test_s2a_bce_value() -> None:
    logits, target = S2
    for reduction, expected in (("none", [0.1570, 1.7810, 1.2314]), ("mean", 1.0565)):
        close(kernel_call("binary_cross_entropy_with_logits", logits, target, reduction=reduction), expected, 1e-4)
        close(fastloss.BCELoss(reduction=reduction)(torch.sigmoid(logits), target), expected, 1e-4)
        close(fastloss.BCEWithLogitsLoss(reduction=reduction)(logits, target), expected, 1e-4)


def test_s2a_bce_value_by_the_kernel_alone() -> None:
    logits, target = (t.view(1, 1, 3) for t in S2)
    loss, ones = torch.full((1, 1, 3), math.nan), torch.ones(1, 1, 1).expand(1, 1, 3)
    kernels("numba").bce_with_logits_forward(logits, target, ones, ones, loss)
    close(loss.view(3), [0.1570, 1.7810, 1.2314], 1e-4)


def test_s2b_bce_gradient() -> None:
    target = S2[1]
    expected = [0.0484, -0.2772, 0.2360]
    for loss in (
        lambda z: kernel_call("binary_cross_entropy_with_logits", z, target),
        lambda z: fastloss.BCELoss()(torch.sigmoid(z), target),
    ):
        logits = S2[0].clone().requires_grad_()
        loss(logits).backward()
        close(logits.grad, expected)
        close(logits.grad, -(target - torch.sigmoid(S2[0])) / 3, 1e-6)


def test_s3a_one_hot_targets() -> None:
    one_hot = F.one_hot(torch.tensor([2, 1, 0]), 3).float()
    for loss in (lambda x: kernel_call("cross_entropy", x, one_hot), lambda x: fastloss.CrossEntropyLoss()(x, one_hot)):
        logits = torch.tensor([[1.0, 2, 3]] * 3, requires_grad=True)
        value = loss(logits)
        value.backward()
        close(value, 1.4076)
        close(logits.grad, [[0.0300, 0.0816, -0.1116], [0.0300, -0.2518, 0.2217], [-0.3033, 0.0816, 0.2217]], 1e-4)


@pytest.mark.parametrize(
    ("label", "loss", "gradient"),
    [(0, 2.4076, [-0.9100, 0.2447, 0.6652]), (1, 1.4076, [0.0900, -0.7553, 0.6652]), (2, 0.4076, [0.0900, 0.2447, -0.3348])],
)
def test_s3b_one_row_each_label(label: int, loss: float, gradient: list[float]) -> None:
    for target in (torch.tensor([label]), F.one_hot(torch.tensor([label]), 3).float()):
        logits = torch.tensor([[1.0, 2, 3]], requires_grad=True)
        value = kernel_call("cross_entropy", logits, target)
        value.backward()
        close(value, loss)
        close(logits.grad, [gradient], 1e-4)
    losses, dlogits = bare_cross_entropy(np.array([[1.0, 2, 3]]), np.array([label]))
    assert np.allclose(losses, loss, atol=5e-5)
    assert np.allclose(dlogits, gradient, atol=1e-4)


def test_s3c_softmax_log_softmax_nll() -> None:
    row = torch.tensor([[1.0, 2, 3]])
    close(kernel_call("softmax", row, 1), [[0.0900, 0.2447, 0.6652]])
    close(kernel_call("log_softmax", row, 1), [[-2.4076, -1.4076, -0.4076]])
    close(fastloss.Softmax(1)(row), [[0.0900, 0.2447, 0.6652]])
    logits = row.repeat(3, 1).requires_grad_()
    one_hot = F.one_hot(torch.tensor([2, 1, 0]), 3)
    value = fastloss.NLLLoss()(fastloss.LogSoftmax(1)(logits), one_hot.argmax(1))
    value.backward()
    close(value, 1.4076)
    close(logits.grad, [[0.0300, 0.0816, -0.1116], [0.0300, -0.2518, 0.2217], [-0.3033, 0.0816, 0.2217]], 1e-4)


def test_s4a_softmax_of_a_vector() -> None:
    vector = torch.tensor([1.5, 2.2, 3.1, 0.9, 1.2, 1.7], dtype=torch.float64)
    close(kernel_call("softmax", vector, 0), F.softmax(vector, 0), 1e-12)
    close(kernel_call("log_softmax", vector, 0), F.log_softmax(vector, 0), 1e-12)
    close(fastloss.LogSoftmax(0)(vector), F.log_softmax(vector, 0), 1e-12)


P, TARGET = torch.tensor([[0.1, 0.4, 0.8], [0.2, 0.9, 0.2], [0.7, 0.1, 0.6]]), torch.tensor([1, 0, 2])


def test_s4b_nll_loss() -> None:
    close(kernel_call("nll_loss", P, TARGET), -0.4)
    close(kernel_call("nll_loss", P, TARGET, reduction="sum"), -1.2)
    close(fastloss.NLLLoss()(P, TARGET), -0.4)
    image = P.view(3, 3, 1, 1).expand(3, 3, 2, 4)
    close(kernel_call("nll_loss", image, TARGET.view(3, 1, 1).expand(3, 2, 4)), -0.4)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_s4c_cross_entropy_is_log_softmax_and_nll(reduction: str) -> None:
    weight = torch.tensor([0.2, 0.5, 2.0])
    for options in ({}, {"weight": weight}, {"ignore_index": 0}, {"weight": weight, "ignore_index": 1}):
        expected = F.cross_entropy(P, TARGET, reduction=reduction, **options)
        close(kernel_call("cross_entropy", P, TARGET, reduction=reduction, **options), expected, 1e-6)
        close(fastloss.nll_loss(fastloss.log_softmax(P, 1), TARGET, reduction=reduction, **options), expected, 1e-6)
        close(fastloss.CrossEntropyLoss(reduction=reduction, **options)(P, TARGET), expected, 1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_s4d_bce_of_probabilities(reduction: str) -> None:
    prob = torch.tensor([[0.1, 0.9, 0.8], [0.2, 0.9, 0.1], [0.3, 0.4, 0.5]], dtype=torch.float64)
    target = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 1]], dtype=torch.float64)
    expected = F.binary_cross_entropy(prob, target, reduction=reduction)
    close(kernel_call("binary_cross_entropy", prob, target, reduction=reduction), expected, 1e-12)
    close(fastloss.BCELoss(reduction=reduction)(prob, target), expected, 1e-12)
    with pytest.raises(ValueError, match="Using a target size"):
        fastloss.binary_cross_entropy(prob, target[0], reduction=reduction)


@pytest.mark.parametrize("shape", [(64, 10), (6, 1000), (2, 21, 8, 8)])
def test_s4f_confidence_regularised_cross_entropy(shape: tuple[int, ...]) -> None:
    """CE + 0.1 mean(sum p^2), from one call."""
    y = torch.randint(shape[1], (shape[0], *shape[2:]))
    ours, theirs = (torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    found = kernel_call("token_statistics", ours, y, dim=1, outputs=("log_prob", "sum_sq_prob"))
    value = -found.log_prob.mean() + 0.1 * found.sum_sq_prob.mean()
    expected = F.cross_entropy(theirs, y) + 0.1 * F.softmax(theirs, 1).square().sum(1).mean()
    value.backward()
    expected.backward()
    close(value, expected, 1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)


def test_s5a_softmax_of_123() -> None:
    prob = kernel_call("softmax", torch.tensor([1.0, 2, 3]), 0)
    close(prob, [0.0900, 0.2447, 0.6652])
    close(prob.sum(), 1, 1e-6)


def test_s5b_one_hot_by_scatter() -> None:
    torch.manual_seed(1)
    logits, target = torch.rand(3, 5), torch.tensor([0, 2, 1])
    one_hot = torch.zeros(3, 5).scatter_(1, target[:, None], 1)
    ways = [
        (one_hot * -torch.log(fastloss.softmax(logits, 1))).sum(1),
        (one_hot * -fastloss.log_softmax(logits, 1)).sum(1),
        fastloss.nll_loss(fastloss.log_softmax(logits, 1), target, reduction="none"),
        kernel_call("cross_entropy", logits, target, reduction="none"),
    ]
    for per_sample in ways:
        close(per_sample, [1.3301, 1.4602, 1.6165])
        close(per_sample.mean(), 1.4689)
    close(kernel_call("cross_entropy", logits, target), 1.4689)


X = torch.tensor([[1.0, 2, 1, 1], [2, 1, 3, 2], [3, 1, 3, 4], [4, 1, 5, 5], [1, 7, 5, 5], [1, 2, 5, 6], [1, 6, 6, 6], [1, 7, 7, 7]])
Y = torch.tensor([2, 2, 2, 1, 1, 1, 0, 0])
COSTS = [1.098612, 0.761050, 0.689991, 0.643229, 0.604117, 0.568255, 0.533922, 0.500291, 0.466908, 0.433507, 0.399962]


def test_s5c_softmax_classifier_by_sgd() -> None:
    weight, bias = torch.zeros(4, 3, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=0.1)
    costs = []
    for epoch in range(1001):
        cost = fastloss.cross_entropy(X @ weight + bias, Y)
        optimizer.zero_grad()
        cost.backward()
        optimizer.step()
        if epoch % 100 == 0:
            costs.append(cost.item())
    close(torch.tensor(costs), COSTS, 2e-5)


def test_s5d_softmax_classifier_as_a_module() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    other = torch.nn.Linear(4, 3)
    other.load_state_dict(model.state_dict())
    runs = []
    for network, loss in ((model, fastloss.cross_entropy), (other, F.cross_entropy)):
        optimizer, costs = torch.optim.SGD(network.parameters(), lr=0.1), []
        for _ in range(1000):
            cost = loss(network(X), Y)
            optimizer.zero_grad()
            cost.backward()
            optimizer.step()
            costs.append(cost.item())
        runs.append(torch.tensor(costs))
    mine, theirs = runs
    close(mine, theirs, 1e-5)
    assert (mine[::100].diff() < 0).all()  # from epoch to epoch torch's own goes up and down
