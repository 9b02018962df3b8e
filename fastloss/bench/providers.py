"""Who is measured: one table, which feeds the correctness tests, the pytest-benchmark suites and the reports.

A provider that cannot run says why and is left out by name; it never breaks the others.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import fastloss

from .losses import Loss

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Provider:
    """A name, and how to get the function that computes a loss."""

    name: str
    bind: Callable[[Loss], Function]
    devices: tuple[str, ...] = ("cpu", "cuda")
    package: str | None = None
    """The distribution it needs, under the name it is imported by."""
    losses: tuple[str, ...] | None = None
    """The losses it has; None for all."""
    refused: str | None = None
    """Why it is never measured."""
    inplace: bool = False
    """The gradient goes where the logits were: they must not be a leaf."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables that must be set before torch is loaded: it runs in a process of its own."""
    settings: dict[str, int] = field(default_factory=dict)
    """fastloss.config while it runs."""

    def absent(self, loss: Loss, device: str) -> str | None:
        """Why this provider cannot take part, or None."""
        if self.refused:
            return self.refused
        if device not in self.devices:
            return f"does not run on {device}"
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.losses is not None and loss.name not in self.losses:
            return f"has no {loss.name}"
        if self.inplace and not loss.inplace:
            return f"fastloss has no in-place backward for {loss.function}"
        return None


def _fastloss(loss: Loss) -> Function:
    function: Function = getattr(fastloss, loss.function)
    return function


def _fastloss_inplace(loss: Loss) -> Function:
    function = _fastloss(loss)
    return lambda *args, **kwargs: function(*args, **kwargs, inplace_backward=True)


def _eager(loss: Loss) -> Function:
    return loss.in_torch


def _compiled(loss: Loss) -> Function:
    torch._dynamo.reset()  # a compilation for each case, as a user would have; else the recompile limit strikes
    function = _eager(loss)

    def call(*args: object, **kwargs: object) -> Tensor:
        return function(*args, **kwargs)

    compiled: Function = torch.compile(call, dynamic=False)
    return compiled


def _liger(loss: Loss) -> Function:
    from liger_kernel.transformers.functional import liger_cross_entropy

    function: Function = liger_cross_entropy
    # it writes the gradient over the logits: a copy would be unfair, so it runs like our in-place mode, beside which it is to be read. Its
    # loss is in the logits' dtype, and it waits for the device once a step (`.item()`): its times include that
    return function


def _liger_linear(loss: Loss) -> Function:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    function: Function = liger_fused_linear_cross_entropy
    return function


def _flash_attn(loss: Loss) -> Function:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return lambda input, target: cross_entropy_loss(input, target)[0].mean()


def _quack(loss: Loss) -> Function:
    from quack.cross_entropy import cross_entropy

    return lambda input, target: cross_entropy(input, target, reduction="mean")


def _quack_linear(loss: Loss) -> Function:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    function: Function = chunked_linear_cross_entropy
    return function


def _cut(loss: Loss) -> Function:
    from cut_cross_entropy import linear_cross_entropy

    function: Function = linear_cross_entropy
    return function


def _torch_chunked(loss: Loss) -> Function:
    function = loss.in_torch
    return lambda *args, **kwargs: function(*args, **kwargs, options=torch.nn.LinearCrossEntropyOptions())


FASTLOSS, INPLACE, NO_POOL, NO_FORESIGHT = "fastloss", "fastloss in-place", "fastloss without pool", "fastloss without foresight"
EAGER, COMPILED = "torch eager", "torch.compile"
CHUNKED = "torch chunked"
_LINEAR, _HAS_CHUNKED = ("linear_cross_entropy",), hasattr(torch.nn, "LinearCrossEntropyOptions")
EAGER_HUGE, COMPILED_HUGE = "torch eager, huge pages", "torch.compile, huge pages"

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider(FASTLOSS, _fastloss),
        Provider(INPLACE, _fastloss_inplace, inplace=True),
        Provider(NO_POOL, _fastloss, devices=("cpu",), settings={"pool_max_bytes": 0}),
        Provider(NO_FORESIGHT, _fastloss, devices=("cpu",), settings={"foresight_max_bytes": 0}),
        Provider(EAGER, _eager),
        Provider(COMPILED, _compiled),
        Provider(EAGER_HUGE, _eager, devices=("cpu",), environment={"THP_MEM_ALLOC_ENABLE": "1"}),
        Provider(COMPILED_HUGE, _compiled, devices=("cpu",), environment={"THP_MEM_ALLOC_ENABLE": "1"}),
        Provider("liger-kernel", _liger, ("cuda",), "liger_kernel", ("cross_entropy",), inplace=True),
        Provider("flash-attn", _flash_attn, ("cuda",), "flash_attn", ("cross_entropy",)),
        Provider("quack-kernels", _quack, ("cuda",), "quack", ("cross_entropy",)),
        Provider(CHUNKED, _torch_chunked, losses=_LINEAR, refused=None if _HAS_CHUNKED else "torch before 2.13 has no such function"),
        Provider("liger-kernel, linear", _liger_linear, ("cuda",), "liger_kernel", _LINEAR),
        Provider("quack-kernels, linear", _quack_linear, ("cuda",), "quack", _LINEAR),
        Provider("cut-cross-entropy", _cut, ("cuda",), "cut_cross_entropy", _LINEAR),
    )
}
