"""Derivatives of every order and by every road that torch offers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fastloss

f64 = torch.float64


def cases() -> dict[str, tuple[str, torch.Tensor, dict[str, Any]]]:
    """Function, input, everything else."""
    generator = torch.Generator().manual_seed(7)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=f64, generator=generator)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(shape, dtype=f64, generator=generator) * 0.8 + 0.1

    index, ignoring = torch.tensor([0, 4, 2, 2]), torch.tensor([0, -100, 2, 4])
    soft = torch.softmax(randn(4, 5), 1)
    result: dict[str, tuple[str, torch.Tensor, dict[str, Any]]] = {}
    for reduction in ("none", "mean", "sum"):
        reduced = {"reduction": reduction}
        weighted = {"target": ignoring, "weight": rand(5), **reduced}
        smoothed_soft = {"target": soft, "weight": rand(5), "label_smoothing": 0.2, **reduced}
        binary = {"target": rand(4, 5), "weight": rand(5), **reduced}
        result |= {
            f"indices {reduction}": ("cross_entropy", randn(4, 5), {"target": index, **reduced}),
            f"ignoring, weighted {reduction}": ("cross_entropy", randn(4, 5), weighted),
            f"smoothed {reduction}": ("cross_entropy", randn(4, 5), {**weighted, "label_smoothing": 0.2}),
            f"probabilities {reduction}": ("cross_entropy", randn(4, 5), smoothed_soft),
            f"image {reduction}": ("cross_entropy", randn(2, 3, 2), {"target": torch.tensor([[0, 1], [2, -100]]), **reduced}),
            f"nll_loss {reduction}": ("nll_loss", -rand(4, 5), weighted),
            f"bce with logits {reduction}": ("binary_cross_entropy_with_logits", randn(4, 5), {**binary, "pos_weight": rand(5)}),
            f"bce {reduction}": ("binary_cross_entropy", rand(4, 5), binary),
        }
    for dim in (0, 1):
        result[f"softmax {dim}"] = ("softmax", randn(4, 5), {"dim": dim})
        result[f"log_softmax {dim}"] = ("log_softmax", randn(4, 5), {"dim": dim})
    result["one row"] = ("cross_entropy", randn(5), {"target": torch.tensor(3)})
    return result


CASES = cases()
on_every_case = pytest.mark.parametrize("case", CASES)


def pair(case: str) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    """Ours and torch's as functions of the input alone, and a fresh input."""
    function, inputs, options = CASES[case]
    return (
        lambda x: getattr(fastloss, function)(x, **options),
        lambda x: getattr(F, function)(x, **options),
        inputs.clone(),
    )


@on_every_case
def test_gradcheck_with_forward_mode_and_batched_gradients(case: str) -> None:
    mine, _, inputs = pair(case)
    inputs.requires_grad_()
    assert fastloss.explain(mine, inputs).path == "kernel"
    gradcheck(mine, inputs, check_forward_ad=True, check_batched_grad=True, check_undefined_grad=True)


@on_every_case
def test_gradgradcheck(case: str) -> None:
    mine, _, inputs = pair(case)
    inputs.requires_grad_()
    dloss = torch.randn_like(mine(inputs).detach()).requires_grad_()
    gradgradcheck(mine, inputs, dloss)


def test_gradcheck_by_probabilities_and_logits() -> None:
    logits, target = torch.randn(4, 5, dtype=f64, requires_grad=True), torch.rand(4, 5, dtype=f64, requires_grad=True)
    weight = torch.rand(5, dtype=f64)

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return fastloss.cross_entropy(logits, target, weight, label_smoothing=0.1, reduction="none")

    assert fastloss.explain(loss, logits, target).path == "kernel"
    gradcheck(loss, (logits, target))
    gradgradcheck(loss, (logits, target))


TRANSFORMS: dict[str, Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor], Any]] = {
    "grad": lambda f, x: torch.func.grad(lambda x: (f(x) ** 2).sum())(x),
    "vjp": lambda f, x: (lambda out, pull: pull(torch.ones_like(out) * 1.7))(*torch.func.vjp(f, x)),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.cos(x),)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x / 2, -x.abs() if (x < 0).all() else x / 3])),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(torch.stack([x, x / 2])),
    "grad of vmap": lambda f, x: torch.func.grad(lambda x: torch.func.vmap(f)(x).sum())(torch.stack([x, x / 2])),
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](torch.cos(x)),
    "autograd.functional.hessian": lambda f, x: torch.autograd.functional.hessian(lambda x: (f(x) * 1.3).sum(), x),
    "autograd.functional.jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x),
    "vectorized jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@on_every_case
def test_function_transforms(case: str, transform: str) -> None:
    mine, theirs, inputs = pair(case)
    try:
        expected = TRANSFORMS[transform](theirs, inputs)
    except RuntimeError as error:  # the same error, if torch cannot
        with pytest.raises(type(error)):
            TRANSFORMS[transform](mine, inputs)
        return
    torch.testing.assert_close(TRANSFORMS[transform](mine, inputs), expected)


def test_per_sample_gradients() -> None:
    model = torch.nn.Linear(6, 5).double()
    parameters = dict(model.named_parameters())
    inputs, target = torch.randn(7, 6, dtype=f64), torch.randint(5, (7,))

    def gradients(loss: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        def one(parameters: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return loss(torch.func.functional_call(model, parameters, (x[None],)), y[None])

        result: dict[str, torch.Tensor] = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(parameters, inputs, target)
        return result

    torch.testing.assert_close(gradients(fastloss.cross_entropy), gradients(F.cross_entropy))


@on_every_case
def test_batched_upstream_gradients(case: str) -> None:
    mine, theirs, inputs = pair(case)
    results = []
    for function in (mine, theirs):
        leaf = inputs.clone().requires_grad_()
        loss = function(leaf)
        dloss = torch.linspace(-1, 2, 3 * loss.numel(), dtype=f64).view(3, *loss.shape)
        results.append(torch.autograd.grad(loss, leaf, dloss, is_grads_batched=True)[0])
    torch.testing.assert_close(*results)


@on_every_case
def test_dual_numbers_keep_their_tangent(case: str) -> None:
    mine, theirs, inputs = pair(case)
    tangents = []
    for function in (mine, theirs):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(inputs, torch.sin(inputs))
            tangents.append(torch.autograd.forward_ad.unpack_dual(function(dual)).tangent)
    assert tangents[0] is not None
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("use_reentrant", [False, True])
@on_every_case
def test_checkpoint(case: str, use_reentrant: bool) -> None:
    mine, theirs, inputs = pair(case)
    leaf, other = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    loss = checkpoint(mine, leaf, use_reentrant=use_reentrant)
    dloss = torch.randn_like(loss)
    loss.backward(dloss)
    theirs(other).backward(dloss)
    torch.testing.assert_close(leaf.grad, other.grad)


@on_every_case
def test_hooks_see_and_may_replace_gradients(case: str) -> None:
    mine, theirs, inputs = pair(case)
    seen: list[list[torch.Tensor]] = []
    for function in (mine, theirs):
        notes: list[torch.Tensor] = []
        leaf = inputs.clone().requires_grad_()
        middle = leaf * 1.0
        middle.register_hook(lambda g, notes=notes: notes.append(g.clone()))
        middle.register_hook(lambda g: g * 2)
        loss = function(middle)
        loss.register_hook(lambda g, notes=notes: notes.append(g.clone()))
        loss.backward(torch.full_like(loss, 1.7))
        seen.append([*notes, leaf.grad])
    torch.testing.assert_close(*seen)


def test_saved_tensor_hooks() -> None:
    packed = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor.shape)
        return tensor.clone()

    leaf = torch.randn(6, 5, requires_grad=True)
    other = leaf.detach().clone().requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = fastloss.cross_entropy(leaf, target)
    loss.backward()
    F.cross_entropy(other, target).backward()
    assert packed
    torch.testing.assert_close(leaf.grad, other.grad)


@on_every_case
def test_backward_twice_without_retain_graph_raises(case: str) -> None:
    mine, _, inputs = pair(case)
    loss = mine(inputs.requires_grad_()).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@on_every_case
def test_gradients_accumulate(case: str) -> None:
    mine, theirs, inputs = pair(case)
    results = []
    for function in (mine, theirs):
        leaf = inputs.clone().requires_grad_()
        for factor in (1.0, -0.3, 2.5):
            (function(leaf * factor if "bce" not in case else leaf).sum() * factor).backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results)


@on_every_case
def test_no_grad_and_inference_mode(case: str) -> None:
    mine, theirs, inputs = pair(case)
    with torch.no_grad():
        assert not mine(inputs.requires_grad_()).requires_grad
    with torch.inference_mode():
        assert mine(inputs).is_inference()
        torch.testing.assert_close(mine(inputs), theirs(inputs))


def test_logits_changed_after_the_loss_are_refused() -> None:
    """A deliberate difference: torch saves the log-probabilities, we save the logits, so autograd's version check speaks up."""
    logits = torch.randn(6, 5, requires_grad=True) * 1.0
    loss = fastloss.cross_entropy(logits, torch.tensor([0, 1, 2, 3, 4, 0]))
    logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("function", ["cross_entropy", "nll_loss", "softmax", "log_softmax"])
def test_wide_results_of_half_inputs_differentiate_twice(function: str) -> None:
    results = []
    for module in (fastloss, F):
        leaf = torch.linspace(-2, 2, 20).view(4, 5).to(torch.bfloat16).requires_grad_()
        other = {"dim": 1} if "softmax" in function else {"target": torch.tensor([0, 1, 2, 3])}
        (gradient,) = torch.autograd.grad(getattr(module, function)(leaf, **other).float().square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient.float().square().sum(), leaf)
        assert second.dtype == torch.bfloat16
        results.append(second)
    torch.testing.assert_close(*results, rtol=0.1, atol=0.1)
