"""One visit where the host does not look at the upstream gradient, through the public function: with the Triton kernels in the interpreter,
with their twins on the CPU, and on a GPU where there is one."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", minversion="3.4", reason="Triton 3.4 is not installed: its interpreter cannot run the CUDA kernels")

from triton_interpreter import interpreted

import fastloss
from fastloss import foresight, rows
from fastloss.contract import checked

LOSS = importlib.import_module("fastloss.losses.cross_entropy")
NUMBERS = [1.0, 0.5, 0.5, 0.5, -0.0, 0.0, 0.0, float("nan"), float("nan"), 3.0]
AHEAD = ("foreseen_cross_entropy_forward_backward", "cross_entropy_repair")
ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: these run on one only")


@pytest.fixture(params=["triton", "numba"])
def package(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def launched(package: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """CPU tensors served as if they were elsewhere; what is launched for them."""
    names: list[str] = []
    monkeypatch.setattr(foresight, "_LOOKED_AT", set())
    monkeypatch.setattr(foresight, "_last_on", {})
    kernels = importlib.import_module(f"fastloss.kernels.{'cuda' if package == 'triton' else 'cpu'}")

    class Named:
        def __getattr__(self, name: str) -> Any:
            names.append(name)
            return getattr(checked(kernels, "cpu"), name)

    for module in (rows, LOSS):
        monkeypatch.setattr(module, "kernels_for", lambda tensor: Named())
    if package == "triton":
        with interpreted("fastloss.kernels.cuda"):
            yield names
    else:
        yield names


def made(classes: int, dtype: torch.dtype, device: str = "cpu", count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    target = torch.randint(classes, (count,), device=device)
    target[1], target[2] = -100, classes - 1
    return (
        torch.randn(count, classes, device=device).mul(3).to(dtype).requires_grad_(),
        target,
        (torch.rand(classes, device=device) + 0.5).to(dtype),
    )


@pytest.mark.parametrize(
    ("classes", "dtype", "reduction"),
    [(517, torch.float32, "mean"), (1000, torch.bfloat16, "mean"), (10, torch.float32, "sum"),
     pytest.param(1031, torch.float16, "sum", marks=pytest.mark.long)],
    ids=str,
)  # fmt: skip
def test_the_gradient_has_the_bits_of_a_backward(launched: list[str], classes: int, dtype: torch.dtype, reduction: str) -> None:
    """Whatever number comes and was expected. Of a second backward through the same graph nothing is ready, and it is computed."""
    logits, target, weight = made(classes, dtype)
    for number in NUMBERS:
        loss = fastloss.cross_entropy(logits, target, weight, reduction=reduction)
        launched.clear()
        upstream = torch.tensor(number, dtype=loss.dtype)
        (first,) = torch.autograd.grad(loss, logits, upstream, retain_graph=True)
        shares = ["divide"] if logits.is_cpu and reduction == "mean" else []  # torch divides elsewhere: `rows.row_gradient`
        assert launched == [*shares, "cross_entropy_repair"]
        before = first.clone()
        (second,) = torch.autograd.grad(loss, logits, upstream)
        assert launched == [*shares, "cross_entropy_repair", *shares, "cross_entropy_backward"]
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(first.signbit(), second.signbit())
        torch.testing.assert_close(first, before, rtol=0, atol=0, equal_nan=True)  # nothing of it was lent twice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_torch(launched: list[str], dtype: torch.dtype) -> None:
    logits, target, weight = made(1031, dtype)
    for number in (1.0, -0.75, -0.75, -0.75):
        loss = fastloss.cross_entropy(logits, target, weight)
        truth = torch.nn.functional.cross_entropy(wide := logits.detach().double().requires_grad_(), target, weight.double())
        got, want = torch.autograd.grad(number * loss, logits)[0], torch.autograd.grad(number * truth, wide)[0]
        near = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[dtype]
        torch.testing.assert_close(got.double(), want, rtol=near, atol=1e-7)
        torch.testing.assert_close(loss.double(), truth, rtol=near, atol=0)


@pytest.mark.parametrize("package", ["triton"], indirect=True)
def test_what_is_foreseen_is_written_ahead_and_nothing_else(launched: list[str]) -> None:
    """After the same number twice. Fresh memory is NaN in the tests: it shows what nobody wrote. The twin on the CPU writes in any case."""
    logits, target, _ = made(1000, torch.float32)
    written = []
    for number in (1.0, 2.0, 2.0, 2.0, 3.0, 3.0):
        loss = fastloss.cross_entropy(logits, target)
        (waiting,) = _kept(loss)
        written.append(not waiting.isnan().any().item())
        torch.autograd.grad(loss, logits, torch.tensor(number))
    assert written == [True, True, False, True, True, False]


def _kept(loss: Tensor) -> list[Tensor]:
    """The gradients that wait in the graph of a loss."""
    return [gradient for gradients in loss.grad_fn.foresight._gradients for gradient in gradients]  # type: ignore[union-attr]


def test_graph_and_hooks_do_without(launched: list[str]) -> None:
    logits, target, _ = made(517, torch.float32)
    loss = fastloss.cross_entropy(logits, target)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    want = torch.autograd.functional.hessian(lambda x: torch.nn.functional.cross_entropy(x, target), logits.detach()[:, :517])
    (second,) = torch.autograd.grad(gradient[0, 0], logits)
    torch.testing.assert_close(second, want[0, 0], rtol=1e-4, atol=1e-7)
    launched.clear()
    with torch.autograd.graph.save_on_cpu():
        fastloss.cross_entropy(logits, target)
    assert AHEAD[0] not in launched


def test_an_edited_input_is_noticed(launched: list[str]) -> None:
    logits, target, _ = made(517, torch.float32)
    x = logits * 1.0
    loss = fastloss.cross_entropy(x, target)
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.gpu
@ON_A_GPU
@pytest.mark.parametrize("classes", [1000, 10007, 16384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_the_device(classes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the device; the same bits as a second backward."""
    monkeypatch.setattr("fastloss.kernels.cuda.cross_entropy_one_visit.ONE_VISIT_BYTES", 0)
    monkeypatch.setattr(foresight, "_last_on", {})
    logits, target, weight = made(classes, dtype, "cuda", 300)
    numbers = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.0, 2.0], device="cuda")
    for step, number in enumerate(numbers):
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")  # the first steps compile
        try:
            loss = fastloss.cross_entropy(logits, target, weight)
            upstream = number.to(loss.dtype)
            (first,) = torch.autograd.grad(loss, logits, upstream, retain_graph=True)
            (second,) = torch.autograd.grad(loss, logits, upstream)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(first, second)
    assert foresight._last_on


@pytest.mark.gpu
@ON_A_GPU
def test_in_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastloss.kernels.cuda.cross_entropy_one_visit.ONE_VISIT_BYTES", 0)
    monkeypatch.setattr(foresight, "_last_on", {})
    logits, target, _ = made(5001, torch.bfloat16, "cuda", 64)
    upstream = torch.ones((), device="cuda", dtype=torch.bfloat16)

    def step() -> Tensor:
        return torch.autograd.grad(fastloss.cross_entropy(logits, target), logits, upstream)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradient = step()
    for number in (1.0, 1.0, 0.5, 0.5, 1.0):
        upstream.fill_(number)
        gradient.fill_(float("nan"))
        graph.replay()
        assert torch.equal(gradient, step())
