"""Who serves a call: our kernels in eager mode, our registered op where a compiler is watching, or torch; and the reason in words."""

from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import backends, config
from .autograd import plain


class Route(NamedTuple):
    """Where a call goes. `path` is 'kernel' (eager), 'op' (registered op, under torch.compile and torch.export) or 'torch'."""

    backend: Literal["numba", "triton", "torch"]
    path: Literal["kernel", "op", "torch"]
    reason: str


class _Explained(BaseException):
    """Carries the route out of a call that is only asked where it would go. Not an Exception: user code must not catch it."""


_explaining: ContextVar[bool] = ContextVar("fastloss_explaining", default=False)


def explain(function: Any, *args: Any, **kwargs: Any) -> Route:
    """Where `function(*args, **kwargs)` would go, without computing anything; `function` is one of fastloss's functions or modules.

    >>> fastloss.explain(fastloss.cross_entropy, torch.randn(4096, 1000), torch.randint(1000, (4096,)))
    Route(backend='numba', path='kernel', reason='...')

    Raises TypeError if the call never reaches fastloss.
    """
    token = _explaining.set(True)
    try:
        function(*args, **kwargs)
    except _Explained as explained:
        route: Route = explained.args[0]
        return route
    finally:
        _explaining.reset(token)
    raise TypeError(f"explain: {function!r} did not call a fastloss function")


def route(function: str, misfit: str | None, logits: Tensor, *others: Tensor | None) -> Route:
    """Where a call of `function` goes. `misfit` says what about its arguments our kernels do not do, None if they fit.

    Raises BackendError if the user named a backend that cannot serve this call.
    """
    if torch.compiler.is_compiling():
        return _compiled(misfit, logits)
    found = _eager(misfit, logits, others)
    choice = backends.get_backend()
    if _explaining.get():
        raise _Explained(found)
    if found.backend != choice and choice not in ("auto", "torch"):
        raise backends.BackendError(f"{function}: backend {choice!r} was chosen, but {found.reason}")
    return found


def _eager(misfit: str | None, logits: Tensor, others: tuple[Tensor | None, ...]) -> Route:
    choice = backends.get_backend()
    if choice == "torch":
        return Route("torch", "torch", "backend 'torch' was chosen")
    if misfit is not None:
        return Route("torch", "torch", misfit)
    if not plain(logits, *others):
        return Route("torch", "torch", "a tensor subclass, functorch transform, forward-mode level, trace or mode is active")
    name = backends.backend_of(logits.device.type)
    if name is None:
        return Route("torch", "torch", f"there are no kernels for device {logits.device}")
    problem = backends.unavailable(name)
    if problem is not None:
        return Route("torch", "torch", problem)
    if logits.numel() < config.min_numel and choice == "auto":
        return Route("torch", "torch", f"{logits.numel()} logits are fewer than config.min_numel = {config.min_numel}")
    return Route(name, "kernel", f"{logits.dtype} on {logits.device.type}")


def _compiled(misfit: str | None, logits: Tensor) -> Route:
    # no size test: it would mean a guard, and a new compilation, for every size
    name = backends.backend_of(logits.device.type) if misfit is None else None
    if name is not None and backends.get_backend() in ("auto", name) and backends.unavailable(name) is None:
        return Route(name, "op", "a compiler is watching")
    return Route("torch", "torch", "a compiler is watching, and the call does not fit the kernels")
