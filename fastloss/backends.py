"""Which kernels run: device -> kernel package, the user's choice, and the protocol that both packages keep."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, Protocol, cast, get_args

import torch
from torch import Tensor

KernelsName = Literal["numba", "triton"]
BackendName = Literal["auto", KernelsName, "torch"]


class Kernels(Protocol):
    """What a kernel package offers. Launchers fill the buffers they are given and return None.

    `logits` is [N, C] or [B, C, P] with any strides; a *row* is one position, number b * P + p (N = B * P rows).
    Tensors marked [N] hold one number for each row, contiguous unless a stride of 0 is spelled out. They are in the compute
    dtype: float64 for float64 logits, else float32. `target` is int64 [N]. `weight` is [C], any stride, compute dtype; no class
    weight is a one with stride 0. Rows whose target equals `ignore_index` are not rows: their logits are not read, their loss,
    row_weight and mass are 0, their gradient is written as zero. A target outside [0, C) that is not `ignore_index` is never
    used as an index: on CPU IndexError, on CUDA a loss of NaN. `top` is the largest logit of a row, `total` the sum of exp(x - top).
    Gradients are written whole, every element, exactly once; `dlogits` may be the memory of `logits`. `dloss` is [N], stride 0 or 1.
    """

    def cross_entropy_forward(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor,
        ignore_index: int,
        loss: Tensor,
        row_weight: Tensor,
        top: Tensor,
        total: Tensor,
    ) -> None:
        """row_weight = w_y; loss = w_y (log total - (x_y - top))."""

    def cross_entropy_backward(
        self,
        logits: Tensor,
        target: Tensor,
        ignore_index: int,
        row_weight: Tensor,
        top: Tensor,
        total: Tensor,
        dloss: Tensor,
        dlogits: Tensor,
    ) -> None:
        """dlogits = dloss w_y (p - onehot(y)), p = exp(x - top) / total."""

    def cross_entropy_forward_backward(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor,
        ignore_index: int,
        dloss: Tensor,
        loss: Tensor,
        row_weight: Tensor,
        top: Tensor,
        total: Tensor,
        dlogits: Tensor,
    ) -> None:
        """What forward and backward compute, in one visit to the logits where that can be."""

    def smoothed_cross_entropy_forward(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor,
        ignore_index: int,
        keep: float,
        spread: float,
        loss: Tensor,
        row_weight: Tensor,
        mass: Tensor,
        top: Tensor,
        total: Tensor,
    ) -> None:
        """mass = keep w_y + spread sum(w); loss = keep w_y (-log p_y) + spread sum_c w_c (-log p_c); keep = 1 - eps, spread = eps / C."""

    def smoothed_cross_entropy_backward(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor,
        ignore_index: int,
        keep: float,
        spread: float,
        row_weight: Tensor,
        mass: Tensor,
        top: Tensor,
        total: Tensor,
        dloss: Tensor,
        dlogits: Tensor,
    ) -> None:
        """dlogits = dloss (mass p - spread w - keep w_y onehot(y))."""

    def smoothed_cross_entropy_forward_backward(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor,
        ignore_index: int,
        keep: float,
        spread: float,
        dloss: Tensor,
        loss: Tensor,
        row_weight: Tensor,
        mass: Tensor,
        top: Tensor,
        total: Tensor,
        dlogits: Tensor,
    ) -> None:
        """What forward and backward compute, in one visit to the logits where that can be."""

    def soft_cross_entropy_forward(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor,
        keep: float,
        spread: float,
        loss: Tensor,
        mass: Tensor,
        top: Tensor,
        total: Tensor,
    ) -> None:
        """target q is shaped and typed like logits, own strides. k_c = w_c (keep q_c + spread); mass = sum k; loss = sum k_c (-log p_c)."""

    def soft_cross_entropy_backward(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor,
        keep: float,
        spread: float,
        mass: Tensor,
        top: Tensor,
        total: Tensor,
        dloss: Tensor,
        dlogits: Tensor,
    ) -> None:
        """dlogits = dloss (mass p - k)."""

    def soft_cross_entropy_forward_backward(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor,
        keep: float,
        spread: float,
        dloss: Tensor,
        loss: Tensor,
        mass: Tensor,
        top: Tensor,
        total: Tensor,
        dlogits: Tensor,
    ) -> None:
        """What forward and backward compute, in one visit to the logits where that can be."""

    def soft_cross_entropy_target_backward(
        self, logits: Tensor, weight: Tensor, keep: float, top: Tensor, total: Tensor, dloss: Tensor, dtarget: Tensor
    ) -> None:
        """dtarget = dloss keep w_c (-log p_c)."""

    def softmax_forward(self, logits: Tensor, prob: Tensor) -> None:
        """prob = exp(x - top) / total, shaped like logits."""

    def softmax_backward(self, prob: Tensor, dprob: Tensor, dlogits: Tensor) -> None:
        """dlogits = p (dp - sum_c dp_c p_c)."""

    def log_softmax_forward(self, logits: Tensor, log_prob: Tensor) -> None:
        """log_prob = (x - top) - log total, shaped like logits."""

    def log_softmax_backward(self, log_prob: Tensor, dlog_prob: Tensor, dlogits: Tensor) -> None:
        """dlogits = d - p sum_c d_c, p = exp(log_prob)."""

    def nll_loss_forward(
        self, log_prob: Tensor, target: Tensor, weight: Tensor, ignore_index: int, loss: Tensor, row_weight: Tensor
    ) -> None:
        """row_weight = w_y; loss = -w_y log_prob_y. log_prob is shaped like logits."""

    def nll_loss_backward(self, target: Tensor, ignore_index: int, row_weight: Tensor, dloss: Tensor, dlog_prob: Tensor) -> None:
        """dlog_prob = -dloss w_y onehot(y)."""

    # The elementwise losses: every tensor is [A, B, P], all of one shape, each with its own strides (0 where it is broadcast).
    # logits, prob, target, dlogits and dprob are in the logits' dtype; weight, pos_weight, loss and dloss in the compute dtype.

    def bce_with_logits_forward(self, logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor, loss: Tensor) -> None:
        """loss = w ((1 - y) x + (1 + (pos_weight - 1) y) softplus(-x)), softplus(-x) = log1p(exp(-|x|)) + max(-x, 0)."""

    def bce_with_logits_sum(self, logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor, total: Tensor) -> None:
        """total [1] = the sum of these losses, in one fixed order."""

    def bce_with_logits_backward(
        self, logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor, dloss: Tensor, dlogits: Tensor
    ) -> None:
        """dlogits = dloss w ((1 - y) - (1 + (pos_weight - 1) y) sigmoid(-x))."""

    def bce_with_logits_sum_backward(
        self, logits: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor, dloss: Tensor, total: Tensor, dlogits: Tensor
    ) -> None:
        """What sum and backward compute, in one visit where that can be."""

    def binary_cross_entropy_forward(self, prob: Tensor, target: Tensor, weight: Tensor, loss: Tensor) -> None:
        """loss = -w (y max(log p, -100) + (1 - y) max(log(1 - p), -100))."""

    def binary_cross_entropy_sum(self, prob: Tensor, target: Tensor, weight: Tensor, total: Tensor) -> None:
        """total [1] = the sum of these losses, in one fixed order."""

    def binary_cross_entropy_backward(self, prob: Tensor, target: Tensor, weight: Tensor, dloss: Tensor, dprob: Tensor) -> None:
        """dprob = dloss w (p - y) / max((1 - p) p, 1e-12)."""

    def sum_rows(self, values: Tensor, total: Tensor) -> None:
        """total [1] = the sum of values [N] (compute dtype), accumulated in float64 in one fixed order."""

    def sum_weights(self, target: Tensor, weight: Tensor, ignore_index: int, total: Tensor) -> None:
        """total [1] = the sum of row_weight, to the same bits, from the targets alone. A target that is no class counts for nothing on
        CPU, makes the sum NaN on CUDA."""


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot serve a call."""


_KERNELS_OF: dict[str, KernelsName] = {"cpu": "numba", "cuda": "triton"}
_MODULE_OF = {"numba": ".kernels.cpu", "triton": ".kernels.cuda"}
_OLDEST = {"numba": (0, 61), "triton": (3, 4)}


def _named(name: str, source: str) -> BackendName:
    if name not in get_args(BackendName):
        raise ValueError(f"{source} must be one of {', '.join(get_args(BackendName))}, got {name!r}")
    return cast(BackendName, name)


_choice: BackendName = _named(os.environ.get("FASTLOSS_BACKEND", "auto"), "FASTLOSS_BACKEND")


def get_backend() -> BackendName:
    """The backend chosen by `set_backend`, `use_backend` or the environment variable FASTLOSS_BACKEND; 'auto' if none was."""
    return _choice


def set_backend(name: BackendName) -> None:
    """Choose who computes, for the whole process.

    'auto': Numba on CPU and Triton on CUDA, torch where they cannot serve a call (`fastloss.explain` says why).
    'numba', 'triton': these kernels, and a BackendError for every call that they cannot serve.
    'torch': torch.nn.functional.

    Raises ValueError for another name, BackendError if the backend cannot run on this machine.
    """
    global _choice
    chosen = _named(name, "backend")
    if chosen in _MODULE_OF:
        problem = unavailable(chosen)
        if problem:
            raise BackendError(f"backend {chosen!r} cannot be used here: {problem}")
    _choice = chosen


@contextmanager
def use_backend(name: BackendName) -> Iterator[None]:
    """`set_backend` for the length of a with block."""
    before = get_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def backend_of(device: str) -> KernelsName | None:
    """The kernels for a device type, or None if there are none."""
    return _KERNELS_OF.get(device)


def unavailable(name: BackendName) -> str | None:
    """Why these kernels cannot run on this machine, or None if they can."""
    return _problem(name)


# torch.compiler.assume_constant_result, which Dynamo needs as it cannot trace an import, without loading Dynamo
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _problem(name: BackendName) -> str | None:
    if importlib.util.find_spec(name) is None:
        return f"{name} is not installed"
    try:
        module = _import(name)
    except ImportError as error:
        return f"{name} cannot be imported: {error}"
    version = str(module.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST[name]:
        return f"{name} {version} is too old, {'.'.join(map(str, _OLDEST[name]))} is needed"
    if name == "numba" and module.config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT is set"
    if name == "triton" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


@cache
def kernels(name: BackendName) -> Kernels:
    """The kernel package, imported at its first use."""
    return cast(Kernels, _import(f"{__package__}{_MODULE_OF[name]}"))


def _import(name: str) -> Any:
    """The module. If that is interrupted (Ctrl-C), whatever came with it goes again: Python itself forgets only modules that did not get
    ready, and then a package imported again does not know the modules in it that did."""
    before = set(sys.modules)
    try:
        return importlib.import_module(name)
    except BaseException:
        for module in set(sys.modules) - before:
            if module.partition(".")[0] not in before or module.startswith(f"{__package__}.kernels"):
                sys.modules.pop(module, None)
        raise


def kernels_for(tensor: Tensor) -> Kernels:
    """The kernels for this tensor's device. Raises BackendError if there are none."""
    name = backend_of(tensor.device.type)
    if name is None:
        raise BackendError(f"there are no kernels for device {tensor.device}")
    return kernels(name)
