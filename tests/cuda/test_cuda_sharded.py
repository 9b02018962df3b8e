"""Losses over sharded classes on the Triton kernels, in the interpreter: two slices one after the other, what they would send put together
by hand, since the interpreter is for one thread and a process group for several processes."""

import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", minversion="3.4", reason="Triton 3.4 is not installed: its interpreter cannot run the CUDA kernels")

from triton_interpreter import interpreted

import fastloss
from fastloss import rows, sharded, torch_launchers
from fastloss.contract import checked

CUTS = (0, 20, 53)
GROUP = SimpleNamespace(group_name="")
SLICES = sharded.Slices((20, 33), (0, 20))


class Sent(Exception):
    """Ends a call where it would talk."""


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package = importlib.import_module("fastloss.kernels.cuda")
    with interpreted("fastloss.kernels.cuda"):
        for module in (rows, torch_launchers):
            monkeypatch.setattr(module, "kernels_for", lambda tensor: checked(package, "cpu"))
        yield


def on_both(monkeypatch: pytest.MonkeyPatch, call: Callable[[slice], Any]) -> list[Any]:
    """What `call(classes)` gives on each of two ranks."""
    numbers, weights = [], []
    for rank in range(2):

        def listen(call: sharded.Call, local: sharded.Local, group: str, device: torch.device, rank: int = rank) -> None:
            numbers.append(torch.empty(call.numbers, call.rows, dtype=call.compute))
            local(CUTS[rank], CUTS[2], numbers[-1])
            weights.append(torch.tensor(0.0).double() if call.weights is None else call.weights)
            raise Sent

        monkeypatch.setattr(sharded, "exchange", listen)
        with pytest.raises(Sent):
            call(slice(CUTS[rank], CUTS[rank + 1]))
    found = []
    for rank in range(2):
        gathered = sharded.Gathered(torch.stack(numbers), torch.stack(weights), SLICES, rank)
        monkeypatch.setattr(sharded, "exchange", lambda *arguments, gathered=gathered: gathered)
        found.append(call(slice(CUTS[rank], CUTS[rank + 1])))
    return found


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(5, 53), (2, 53, 3)])
def test_losses(on_triton: None, monkeypatch: pytest.MonkeyPatch, soft: bool, smoothing: float, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), torch.rand(53) + 0.1
    x[0, :20] = -torch.inf  # nothing on the first rank
    if soft:
        x[0, :20] = -9.0
    y = torch.softmax(torch.randn(shape), 1) if soft else torch.randint(20, 53, (shape[0], *shape[2:]))
    if not soft:
        y.view(-1)[1] = -100
        y.view(-1)[-1] = 3

    def call(classes: slice) -> tuple[Tensor, Tensor]:
        leaf = x[:, classes].clone().requires_grad_()
        loss = fastloss.vocab_parallel_cross_entropy(
            leaf, y[:, classes] if soft else y, weight=weight[classes], label_smoothing=smoothing, reduction="none"
        )
        loss.nan_to_num(posinf=0.0).sum().backward()
        assert leaf.grad is not None
        return loss.detach(), leaf.grad

    wide = x.double().requires_grad_()
    truth = F.cross_entropy(wide, y.double() if soft else y, weight=weight.double(), label_smoothing=smoothing, reduction="none")
    truth.nan_to_num(posinf=0.0).sum().backward()
    found = on_both(monkeypatch, call)
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][0].double(), truth, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert wide.grad is not None
    torch.testing.assert_close(torch.cat([d for _, d in found], 1).double(), wide.grad, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_target_on_no_rank_is_nan_as_on_cuda(on_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastloss.slices, "refuse_out_of_bounds", lambda target, classes, ignore_index: (target < 0) | (target >= classes))

    def call(classes: slice) -> tuple[Tensor, Tensor]:
        leaf = torch.ones(3, 53)[:, classes].clone().requires_grad_()
        loss = fastloss.vocab_parallel_cross_entropy(leaf, torch.tensor([1, 53, 30]), reduction="none")
        loss.sum().backward()
        assert leaf.grad is not None
        return loss.detach(), leaf.grad

    for loss, gradient in on_both(monkeypatch, call):
        assert loss.isnan().tolist() == [False, True, False]
        assert gradient.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("per_row", [1, 3])
def test_token_statistics(on_triton: None, monkeypatch: pytest.MonkeyPatch, per_row: int) -> None:
    x, outputs = torch.randn(6, 53), ("log_prob", "entropy", "lse", "sum_sq_prob", "argmax")
    y = torch.randint(53, (6,) if per_row == 1 else (6, per_row))
    y[2] = -100

    def call(classes: slice, x: Tensor = x, group: Any = GROUP) -> tuple[list[Tensor], Tensor]:
        leaf = x[:, classes].clone().requires_grad_()
        found = fastloss.token_statistics(leaf, y, outputs=outputs, logit_scale=0.7, group=group)
        floats = [a for a in found if a is not None and a.is_floating_point()]
        torch.autograd.backward(floats, [torch.linspace(-1, 2, a.numel()).view(a.shape).to(a) for a in floats])
        assert leaf.grad is not None
        return [a.detach() for a in found if a is not None], leaf.grad

    found = on_both(monkeypatch, call)
    with fastloss.use_backend("torch"):
        truth, gradient = call(slice(None), x.double(), None)
    for mine, other, true in zip(found[0][0], found[1][0], truth, strict=True):
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine.double(), true.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([d for _, d in found], 1).double(), gradient, rtol=1e-5, atol=1e-6)
