"""`inplace_backward=True`: the gradient takes the logits' place and is right, or the call is refused."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, LAYOUTS, class_inputs

import fastloss


@pytest.mark.parametrize("layout", ["contiguous", "padded", "transposed", "every_other", "misaligned"])
@pytest.mark.parametrize("kind", ["indices", "smoothed", "probabilities"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_is_right_and_lies_in_the_logits(dtype: str, kind: str, layout: str) -> None:
    for shape in ((20, 11), (3, 70), (2, 9000), (2, 5, 6)):
        tensors = class_inputs(
            shape, DTYPES[dtype], ignored=None if kind == "probabilities" else -100, weighted=True, soft=kind == "probabilities"
        )
        options = {"label_smoothing": 0.1} if kind == "smoothed" else {}
        target, weight = tensors["target"], tensors["weight"]
        leaf, view = LAYOUTS[layout](tensors["input"])
        gradients = []
        for inplace in (False, True):
            start = leaf.clone().requires_grad_()
            logits = view(start * 1)
            loss = fastloss.cross_entropy(logits, target, weight, reduction="none", inplace_backward=inplace, **options)
            dloss = torch.linspace(-2, 2, loss.numel()).view(loss.shape).to(loss.dtype)
            logits.retain_grad()
            version = logits._version
            loss.backward(dloss)
            gradients.append(logits.grad)
            if inplace:
                assert logits._version > version
                assert torch.equal(logits.detach(), logits.grad)
        assert torch.equal(*gradients)


def test_the_gradient_of_probabilities_too() -> None:
    tensors = class_inputs((20, 11), torch.float32, soft=True)
    gradients = []
    for inplace in (False, True):
        leaf, target = tensors["input"].clone().requires_grad_(), tensors["target"].clone().requires_grad_()
        fastloss.cross_entropy(leaf * 1, target, label_smoothing=0.1, inplace_backward=inplace).backward()
        gradients.append((leaf.grad, target.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])


def test_no_memory_is_allocated_for_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    leaf = torch.randn(20, 11, requires_grad=True)
    loss = fastloss.cross_entropy(leaf * 1, torch.randint(11, (20,)), inplace_backward=True)

    def refuse(tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError("allocated a gradient")

    monkeypatch.setattr(fastloss.memory, "empty_like", refuse)
    loss.backward()


TARGET = torch.randint(11, (20,))


def test_refused_for_a_leaf() -> None:
    with pytest.raises(RuntimeError, match=r"inplace_backward: .*leaf"):
        fastloss.cross_entropy(torch.randn(20, 11, requires_grad=True), TARGET, inplace_backward=True)


def test_refused_for_a_view_of_a_leaf() -> None:
    """Writing over a view would write over the parameter itself."""
    leaf = torch.randn(11, 20, requires_grad=True)
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError):
        fastloss.cross_entropy(leaf.t(), TARGET, inplace_backward=True).backward()
    assert torch.equal(leaf.detach(), before)


@pytest.mark.parametrize("overlap", ["expanded rows", "expanded classes", "sliding window"])
def test_refused_for_logits_that_overlap_themselves(overlap: str) -> None:
    base = torch.randn(40, requires_grad=True) * 1
    logits = {
        "expanded rows": lambda: base[:11].expand(20, 11),
        "expanded classes": lambda: base[:20, None].expand(20, 11),
        "sliding window": lambda: base.unfold(0, 11, 1)[:20],
    }[overlap]()
    with pytest.raises(RuntimeError, match=r"inplace_backward: .*share memory"):
        fastloss.cross_entropy(logits, TARGET, inplace_backward=True)


def test_refused_for_a_second_derivative() -> None:
    leaf = torch.randn(20, 11, requires_grad=True)
    loss = fastloss.cross_entropy(leaf * 1, TARGET, inplace_backward=True)
    with pytest.raises(RuntimeError, match=r"inplace_backward: .*create_graph"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_refused_for_a_second_backward() -> None:
    leaf = torch.randn(20, 11, requires_grad=True)
    loss = fastloss.cross_entropy(leaf * 1, TARGET, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_refused_by_autograd_where_the_logits_were_saved_before() -> None:
    """Softmax saved its output, which is our logits; the backward would otherwise be silently wrong (Liger #272)."""
    leaf = torch.randn(20, 11, requires_grad=True)
    loss = fastloss.cross_entropy(torch.softmax(leaf, 1), TARGET, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_refused_by_autograd_where_the_logits_are_used_again() -> None:
    leaf = torch.randn(20, 11, requires_grad=True)
    logits = leaf * 1
    loss = (logits**2).sum() + fastloss.cross_entropy(logits, TARGET, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_refused_where_the_kernels_do_not_serve() -> None:
    with fastloss.use_backend("torch"), pytest.raises(RuntimeError, match=r"inplace_backward: .*torch"):
        fastloss.cross_entropy(torch.randn(20, 11), TARGET, inplace_backward=True)


def test_refused_where_the_target_is_the_logits() -> None:
    logits = torch.rand(20, 11, requires_grad=True) * 1
    with pytest.raises(RuntimeError, match=r"inplace_backward: .*target"):
        fastloss.cross_entropy(logits, logits.detach(), inplace_backward=True)


def test_a_linear_head_trains_the_same() -> None:
    head = torch.nn.Linear(8, 50)
    inputs, target = torch.randn(30, 8), torch.randint(50, (30,))
    fastloss.cross_entropy(head(inputs), target, inplace_backward=True).backward()
    mine, head.weight.grad = head.weight.grad, None
    F.cross_entropy(head(inputs), target).backward()
    torch.testing.assert_close(mine, head.weight.grad)


def test_nothing_is_written_without_a_backward() -> None:
    logits = torch.randn(20, 11)
    before = logits.clone()
    fastloss.cross_entropy(logits, TARGET, inplace_backward=True)
    assert torch.equal(logits, before)
