"""The linear losses on the Triton kernels: chunk by chunk in the interpreter, without looking at what is on the device; and on a GPU."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", minversion="3.4", reason="Triton 3.4 is not installed: its interpreter cannot run the CUDA kernels")

from triton_interpreter import interpreted

import fastloss
from fastloss import chunks, contract, rows
from fastloss.composed import linear_cross_entropy as composed
from fastloss.composed import linear_token_statistics
from fastloss.contract import checked
from fastloss.losses.token_statistics import ANSWERS

NAMES = ("linear_cross_entropy", "linear_soft_cross_entropy", "linear_token_statistics")
LOSSES = [importlib.import_module(f"fastloss.losses.{name}") for name in NAMES]


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The Triton kernels for CPU tensors, and rows chosen as on CUDA: all of them, since counting would wait for the device."""
    package = importlib.import_module("fastloss.kernels.cuda")
    with interpreted("fastloss.kernels.cuda"):
        for module in (rows, *LOSSES):
            monkeypatch.setattr(module, "kernels_for", lambda tensor: checked(package, "cpu"))
        for module in (LOSSES[0], LOSSES[2]):
            monkeypatch.setattr(module, "not_ignored", lambda *arguments: None)
        monkeypatch.setattr(chunks, "_FEWEST", {"cpu": 5})
        monkeypatch.setattr(fastloss.config, "linear_chunk_bytes", 1)
        yield


def arguments(device: str, soft: bool, out: tuple[int, ...], dtype: torch.dtype, rows: int, classes: int) -> tuple[list[Tensor], Tensor]:
    made = [torch.randn(rows, 16), torch.randn(classes, *out, 16) * 0.3, torch.randn(classes, *out)]
    target = torch.randint(classes, (rows, *out))
    target.view(-1)[::3] = -100
    target = torch.rand(rows, classes, *out).to(dtype) if soft else target
    return [t.to(device, dtype).requires_grad_() for t in made], target.to(device)


def compare(t: list[Tensor], target: Tensor, **options: Any) -> None:
    found = []
    for function, wide in ((fastloss.linear_cross_entropy, False), (composed, True)):
        x, w, b = (a.detach().double().requires_grad_() for a in t) if wide else t
        loss = function(x, w, target.double() if wide and target.is_floating_point() else target, linear_bias=b, **options)
        dloss = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape) if loss.dim() else None
        found.append((loss.detach(), *torch.autograd.grad(loss, (x, w, b), dloss)))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[t[0].dtype]
    for mine, truth in zip(*found, strict=True):
        assert (mine.double() - truth).norm() <= tolerance * truth.norm()


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("out", "options"),
    [
        ((), {}),
        ((), {"label_smoothing": 0.1, "logit_softcap": 3.0, "logit_scale": 0.5}),
        ((3,), {"reduction": "none"}),
        ((), {"reduction": "none", "logit_softcap": 2.0}),
    ],
    ids=str,
)
def test_interpreted(on_triton: None, out: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype, soft: bool) -> None:
    compare(*arguments("cpu", soft, out, dtype, 12, 37), **options)


def compare_statistics(t: list[Tensor], target: Tensor, softcap: float | None) -> None:
    found = []
    for function, wide in ((fastloss.linear_token_statistics, False), (theirs, True)):
        x, w, b = (a.detach().double().requires_grad_() for a in t) if wide else t
        answers = function(x, w, target, linear_bias=b, logit_softcap=softcap, outputs=ANSWERS)[:4]
        upstream = [torch.linspace(-1, 2, a.numel(), dtype=a.dtype, device=a.device).view(a.shape) for a in answers]
        found.append((*(a.detach() for a in answers), *torch.autograd.grad(answers, (x, w, b), upstream)))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[t[0].dtype]
    for mine, truth in zip(*found, strict=True):
        assert (mine.double() - truth).norm() <= tolerance * truth.norm()


def theirs(*arguments: Any, outputs: tuple[str, ...], **options: Any) -> tuple[Tensor, ...]:
    return linear_token_statistics(*arguments, **options, ignore_index=-100, logit_scale=1.0, wanted=" ".join(outputs))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [0, 2], ids=["one target", "two targets"])
def test_statistics_interpreted(on_triton: None, count: int, dtype: torch.dtype, softcap: float | None) -> None:
    t, target = arguments("cpu", False, (), dtype, 12, 37)
    compare_statistics(t, torch.stack([target, target.clamp(max=5)], 1) if count else target, softcap)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: these run on one only")
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_the_device(dtype: torch.dtype, soft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(chunks, "_FEWEST", {})
    monkeypatch.setattr(fastloss.config, "linear_chunk_bytes", 300 * 5003 * 4)
    t, target = arguments("cuda", soft, (), dtype, 1000, 5003)
    for options in ({}, {"label_smoothing": 0.1, "logit_softcap": 3.0}, {"reduction": "none"}):
        compare(t, target, **options)
    compare_statistics(t, target if not soft else torch.randint(5003, (1000, 2), device="cuda"), 3.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: these run on one only")
def test_a_step_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No synchronisation, so that a step can be captured in a graph."""
    monkeypatch.setattr(contract, "watch", None)  # whoever looks at every launch waits
    t, target = arguments("cuda", False, (), torch.bfloat16, 1000, 5003)
    for mode in ("default", "error"):  # the first call compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            fastloss.linear_cross_entropy(t[0], t[1], target, linear_bias=t[2], label_smoothing=0.1).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
