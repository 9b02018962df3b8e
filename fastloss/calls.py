"""What was decided of a call like this one before.

Which path a call takes, and what it does there, depends on its *kind*: the shapes, strides and dtypes of its tensors, its options, and what
modes and settings are on. Small calls spend more time on these questions than in the kernels, so for a kind that came before they are not
asked again, and where there is a `replay` of it, nor is anything that the answers led to.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import _C, Tensor

from . import backends, config, contract, replay, routing
from .foresight import Subject, subject_of
from .loss import Loss

Kind = tuple[Any, ...]

_MOST_KINDS, _MOST_PROGRAMS = 1 << 10, 8  # remembered; programs of a kind differ in the upstream gradient that is foreseen
_PLAIN = _C._dispatch_keys(torch.empty(0, device="cpu"))  # of a tensor that is nothing but numbers in memory
_INCLUDED, _EXCLUDED = _C._dispatch_tls_local_include_set(), _C._dispatch_tls_local_exclude_set()  # by no mode
_OPTIONS = {type(None), bool, int, float, str, torch.dtype}
_NOT_RECORDED: Any = object()


class Call:
    """A kind of call on its way to the kernels: which loss, and with what options."""

    __slots__ = ("graph", "loss", "options", "programs", "subject")

    def __init__(self, loss: Any, o: Any, t: tuple[Tensor | None, ...] = ()) -> None:
        self.loss: Loss[Any, Any, Any] = loss
        self.options = o
        self.graph = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in t)
        self.subject: Subject | None = None  # of the one visit, if there is to be one
        if self.graph and loss.one_visit and loss.one_visit_pays(t, o):
            self.subject = subject_of(loss.name, t[: loss.one_visit], o.reduction)
        # of its forward, and of its one visit under an upstream gradient
        small = t and t[0] is not None and t[0].nbytes < config.pool_min_bytes
        self.programs: dict[float | None, replay.Program | None] | None = {} if small else None

    def forward(self, t: Any) -> tuple[Tensor, ...]:
        """The loss's `forward`."""
        return self._again(None, t, lambda: ((), self.loss.forward(t, self.options)))[1]

    def forward_backward(self, dloss: Any, t: Any, needed: tuple[bool, ...]) -> replay.Found:
        """The loss's `forward_backward`."""
        return self._again(dloss, t, lambda: self.loss.forward_backward(dloss, t, self.options, needed))

    def _again(self, dloss: float | None, t: Any, compute: Callable[[], replay.Found]) -> replay.Found:
        programs = self.programs
        if programs is None or contract.watch is not None:
            return compute()
        program = programs.get(dloss, _NOT_RECORDED)
        if program is _NOT_RECORDED:
            if len(programs) >= _MOST_PROGRAMS:
                programs.clear()
            found, programs[dloss] = replay.record(compute, t)
            return found
        return (program and program.run(t)) or compute()


THEIRS: Call = Call(None, None)  # torch serves it
_remembered: dict[Kind, Call] = {}


def kind_of(function: str, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Kind | None:
    """The kind of a call on CPU; None where more matters than that: a subclass, a transform, a compiler, a mode."""
    if (
        torch.compiler.is_compiling()
        or _C._is_torch_function_mode_enabled()
        or _C._dispatch_tls_local_include_set() != _INCLUDED
        or _C._dispatch_tls_local_exclude_set() != _EXCLUDED
        or _C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or routing.explaining()
    ):
        return None
    found: list[Any] = [
        function,
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        backends.get_backend(),
        config.min_numel,
        config.pool_min_bytes,
    ]
    for t in tensors:
        if t is None:
            found.append(None)
            continue
        if (type(t) is not Tensor and type(t) is not torch.nn.Parameter) or _C._dispatch_keys(t) != _PLAIN:
            return None
        found += t.shape, t.stride(), t.dtype, t.requires_grad
    kinds = tuple(map(type, options))  # 1 is True and 1.0, but not as an option
    return (*found, *options, *kinds) if _OPTIONS.issuperset(kinds) else None


def recall(kind: Kind | None) -> Call | None:
    """The call that was remembered for this kind, `THEIRS` if torch serves it; None if this kind is new."""
    return None if kind is None else _remembered.get(kind)


def remember(kind: Kind | None, call: Call) -> Call:
    """The call, from now on that of its kind."""
    if kind is not None:
        if len(_remembered) >= _MOST_KINDS:
            _remembered.clear()
        _remembered[kind] = call
    return call
