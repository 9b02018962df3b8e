"""Every public function once, against float64: what `fastloss doctor` and `make gpu` ask first."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastloss

from . import composed


def errors(device: str) -> list[tuple[str, float, float]]:
    """Name, error and what is allowed, for each function in two dtypes."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 257, generator=generator) * 3
    target = torch.randint(257, (64,), generator=generator)
    target[5] = -100
    labels = torch.rand(64, 257, generator=generator)
    calls: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "cross_entropy": lambda f, x: f.cross_entropy(x, target.to(x.device)),
        "cross_entropy (smoothed)": lambda f, x: f.cross_entropy(x, target.to(x.device), label_smoothing=0.1),
        "cross_entropy (probabilities)": lambda f, x: f.cross_entropy(x, labels.to(x)),
        "linear_cross_entropy": lambda f, x: _linear_cross_entropy(f, x[:, :64], labels.to(x).t(), target.to(x.device)),
        "nll_loss": lambda f, x: f.nll_loss(x, target.to(x.device)),
        "binary_cross_entropy_with_logits": lambda f, x: f.binary_cross_entropy_with_logits(x, labels.to(x)),
        "binary_cross_entropy": lambda f, x: f.binary_cross_entropy(x.sigmoid(), labels.to(x)),
        "softmax": lambda f, x: f.softmax(x, dim=1).square().sum(),
        "log_softmax": lambda f, x: f.log_softmax(x, dim=1).square().sum(),
    }
    found = []
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        x = logits.to(device, dtype)
        for name, call in calls.items():
            if dtype == torch.bfloat16 and not name.startswith(("cross_entropy", "binary_cross_entropy_with")):
                continue
            title, truth = f"{name} {str(dtype).removeprefix('torch.')}", _with_gradient(F, call, x.double())
            try:
                ours = _with_gradient(fastloss, call, x)
            except Exception as problem:
                found.append((f"{title} ({short(problem)})", math.inf, limit))
                continue
            error = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(ours, truth, strict=True))
            found.append((title, error, limit))
    return found


def _linear_cross_entropy(library: Any, x: Tensor, head: Tensor, target: Tensor) -> Tensor:
    function = composed.linear_cross_entropy if library is F else library.linear_cross_entropy
    loss: Tensor = function(x, head, target)
    return loss


def _with_gradient(library: Any, call: Callable[[Any, Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    loss = call(library, leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def short(problem: Exception) -> str:
    """What kind of exception, and the first line of what it says."""
    return f"{type(problem).__name__}: {problem}".splitlines()[0][:300]
