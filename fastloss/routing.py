"""Who serves a call: our kernels in eager mode, our registered op where a compiler is watching, or torch; and the reason in words."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import _C, Tensor

from . import backends, config
from .loss import Worth

Result = TypeVar("Result")

ALL, ANY = Worth(), Worth(0.0, 0.0)


class Route(NamedTuple):
    """Where a call goes. `path` is 'kernel' (eager), 'op' (registered op, under torch.compile and torch.export) or 'torch'."""

    backend: Literal["numba", "triton", "torch"]
    path: Literal["kernel", "op", "torch"]
    reason: str


class _Explained(BaseException):
    """Carries the route out of a call that is only asked where it would go. Not an Exception: user code must not catch it."""


_explaining: ContextVar[bool] = ContextVar("fastloss_explaining", default=False)
_asking: list[None] = []  # not empty if any thread asks: for who has no time to look into a ContextVar


def explain(function: Any, *args: Any, **kwargs: Any) -> Route:
    """Where `function(*args, **kwargs)` would go, without computing anything; `function` is one of fastloss's functions or modules.

    >>> import fastloss
    >>> fastloss.explain(fastloss.cross_entropy, torch.randn(4096, 1000), torch.randint(1000, (4096,)))
    Route(backend='numba', path='kernel', reason='torch.float32 on cpu')

    Raises TypeError if the call never reaches fastloss.
    """
    token = _explaining.set(True)
    _asking.append(None)
    try:
        function(*args, **kwargs)
    except _Explained as explained:
        route: Route = explained.args[0]
        return route
    finally:
        _asking.pop()
        _explaining.reset(token)
    raise TypeError(f"explain: {function!r} did not call a fastloss function")


@contextmanager
def noted(note: str) -> Iterator[None]:
    """Say more of a call that is made on the way to another's result."""
    try:
        yield
    except _Explained as explained:
        found: Route = explained.args[0]
        raise _Explained(found._replace(reason=found.reason + note)) from None


def watched() -> bool:
    """Whether somebody wants to see a call as it is: a compiler, a mode, a forward-mode level; or only asks where it would go."""
    return (
        torch.compiler.is_compiling()
        or _C._is_torch_function_mode_enabled()
        or _C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
        or bool(_asking)
    )


def tiny(input: Any, worth: Worth = ALL) -> bool:
    """Whether torch is to serve a call at once, because of its size alone. Decided first: the other questions cost more than the loss, and
    each one that a compiler sees is a guard, which costs every call of what it compiled."""
    # a mode would see the question; a subclass may have no size
    if type(input) is not Tensor and type(input) is not torch.nn.Parameter:
        return False
    if torch.compiler.is_compiling():
        return not input.is_nested and backends.get_backend() == "auto" and _surely_few(input, worth)
    if _C._is_torch_function_mode_enabled():
        return False
    numel, usually = input.numel(), _share(input, worth) * config.min_numel
    return (
        numel < usually * worth.half
        and (numel < usually * worth.few or input.is_nested or numel < _least(input, worth))
        and backends.get_backend() == "auto"
        and not _asking
    )


def route(misfit: str | None, logits: Any, worth: Worth = ALL, note: str = "") -> Route:
    """Where a call goes. `misfit` says what about its arguments our kernels do not do, None if they fit; with fewer logits than they are
    worth it goes to torch. `note` is what there is to say of a call that the kernels serve."""
    if torch.compiler.is_compiling():
        return _compiled(misfit, logits, worth)
    found = _eager(misfit, logits, worth)
    if _explaining.get():
        raise _Explained(found if found.path == "torch" else found._replace(reason=found.reason + note))
    return found


def served_by_torch(name: str, way: Route, result: Result) -> Result:
    """The result of torch's function of this name, unless the user named a backend that should have computed it. By now torch has raised
    what it had to raise."""
    choice = backends.get_backend()
    if choice not in ("auto", "torch"):
        raise backends.BackendError(f"{name}: backend {choice!r} was chosen, but {way.reason}")
    return result


def _eager(misfit: str | None, logits: Any, worth: Worth) -> Route:
    choice = backends.get_backend()
    if choice == "torch":
        return Route("torch", "torch", "backend 'torch' was chosen")
    if misfit is not None:
        return Route("torch", "torch", misfit)
    name = backends.backend_of(logits.device.type)
    if name is None:
        return Route("torch", "torch", f"there are no kernels for device {logits.device}")
    if choice not in ("auto", name):
        return Route("torch", "torch", f"the tensors are on device {logits.device}")
    problem = backends.unavailable(name)
    if problem is not None:
        return Route("torch", "torch", problem)
    if choice == "auto" and logits.numel() < (least := _least(logits, worth)):
        return Route("torch", "torch", f"{logits.numel()} logits are fewer than {least}: config.min_numel")
    return Route(name, "kernel", f"{logits.dtype} on {logits.device.type}")


def _share(logits: Tensor, worth: Worth) -> float:
    return worth.step if logits.requires_grad and torch.is_grad_enabled() else worth.forward


def _least(logits: Tensor, worth: Worth) -> int:
    """How many logits make a kernel worth its call."""
    share = _share(logits, worth)
    if logits.dim() > 1 and logits.shape[1] < 16:
        share *= worth.few
    if logits.element_size() == 2:
        share *= worth.half
    return math.ceil(share * config.min_numel)


def _compiled(misfit: str | None, logits: Any, worth: Worth) -> Route:
    name = backends.backend_of(logits.device.type) if misfit is None else None
    choice = backends.get_backend()
    if name is None or choice not in ("auto", name) or backends.unavailable(name) is not None:
        return Route("torch", "torch", misfit or "there are no kernels for this device, or another backend was chosen")
    if choice == "auto" and _surely_few(logits, worth):
        return Route("torch", "torch", "there are few logits, of a size that is known when this is compiled: config.min_numel")
    return Route(name, "op", "a compiler is watching")


def _surely_few(logits: Tensor, worth: Worth) -> bool:
    """Whether kernels are not worth their call in compiled code: below `config.min_numel` the compiler's own loops are as fast for every
    loss, and for rows of few classes, too. Of a size that may be another one later the answer is no: one op serves all sizes, and nothing
    is guarded."""
    if not _SIZES_CAN_BE_ASKED:
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    share = _share(logits, worth)
    least = max(1.0, share) * config.min_numel if share else 0  # where torch has no such function, no call is small
    return bool(statically_known_true(logits.numel() < least))


_SIZES_CAN_BE_ASKED = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)  # by what is being compiled, without a guard
