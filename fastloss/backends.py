"""Which kernels run: device -> kernel package, and the user's choice."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from .contract import checked
from .launchers import Kernels

KernelsName = Literal["numba", "triton"]
BackendName = Literal["auto", KernelsName, "torch"]


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot serve a call."""


_KERNELS_OF: dict[str, KernelsName] = {"cpu": "numba", "cuda": "triton"}
_DEVICE_OF: dict[str, str] = {name: device for device, name in _KERNELS_OF.items()}
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
    global _choice
    before = get_backend()
    set_backend(name)
    try:
        yield
    finally:
        _choice = before  # nothing is asked: FASTLOSS_BACKEND may name one that cannot run here


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
    """The launchers of a kernel package, each behind its contract; imported at the first use."""
    return cast(Kernels, checked(_import(f"{__package__}{_MODULE_OF[name]}"), _DEVICE_OF[name]))


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


def one_visit_pays(logits: Tensor) -> bool:
    """Whether the CUDA kernels make the loss and the gradient of such logits, [N, C] or [B, C, P], in one visit, faster than in two."""
    return logits.is_cuda and bool(_import(f"{__package__}{_MODULE_OF['triton']}.cross_entropy_one_visit").one_visit_pays(logits))
